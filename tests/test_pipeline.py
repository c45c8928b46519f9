"""launch/pipeline.sh on tiny models: every stage feeds the next, complete ones are skipped, interrupted ones go on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pipelines import pipeline, write_recipes

from rlhf.runs.metrics import read_metrics
from rlhf.runs.stop import EXIT_STOPPED

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipes(tiny_llama, tmp_path):
    """The quickstart's own recipes with a tiny model in place of the real one."""
    return write_recipes(tmp_path / "recipes", tiny_llama)


def test_all_stages_then_nothing_then_what_is_missing(recipes):
    run = recipes.parent / "runs" / "quickstart"
    first = pipeline(recipes)
    assert (
        first.index("=== SFT")
        < first.index("=== Reward model")
        < first.index("=== DPO")
        < first.index("=== Evaluation")
    )
    assert "On 4 held-out pairs" in first and f"Report    {Path('runs/quickstart/report.html')}" in first
    assert read_metrics(run / "dpo")[0]["rewards/margins"] == pytest.approx(0, abs=1e-3)  # starts as its reference
    inputs = json.loads((run / "dpo" / "provenance.json").read_text())["inputs"]
    assert inputs["model_name_or_path"] == json.loads((run / "sft" / "complete.json").read_text())["weights_sha256"]

    again = pipeline(recipes)
    assert "===" not in again and "On 4 held-out pairs" in again
    for title in ("SFT", "Reward model", "DPO", "Evaluation"):
        assert f"{title:<12} complete: runs/quickstart/" in again

    (run / "dpo" / "complete.json").unlink()  # as if it had been killed after its last checkpoint
    (run / "evaluation" / "complete.json").unlink()
    third = pipeline(recipes)
    assert "=== SFT" not in third and "=== DPO" in third and "resuming from runs/quickstart/dpo/checkpoint-2" in third


def test_through_a_launch_file_on_two_processes(recipes):
    shown = pipeline(recipes, str(ROOT / "launch" / "ddp.yaml"), "--num_processes", "2")
    assert shown.count("(2 processes on cpu)") == 3 and "On 4 held-out pairs" in shown


@pytest.mark.parametrize("launch", [(), (str(ROOT / "launch" / "ddp.yaml"), "--num_processes", "2")])
def test_a_stage_that_is_stopped_ends_it(recipes, launch):
    """With one code and no traceback, also through a launcher that knows only success and failure."""
    run = recipes.parent / "runs" / "quickstart"
    (run / "sft").mkdir(parents=True)
    (run / "sft" / "stop").touch()
    shown = pipeline(recipes, *launch, code=EXIT_STOPPED)
    assert "Stopped after step 1 of 2" in shown and "Traceback" not in shown and "=== REWARD" not in shown
    assert not (run / "reward").exists()


@pytest.mark.slow
def test_ctrl_c_reaches_the_launcher_too(recipes, hold):
    """A terminal signals all processes: the launcher ends with a traceback and code 1, although the run has saved."""
    for stage in ("reward", "dpo", "evaluate"):  # one is enough
        (recipes / f"{stage}.yaml").unlink()
    file = recipes / "sft.yaml"
    file.write_text(file.read_text().replace("max_steps: 2", "max_steps: 12"))
    out = recipes.parent / "runs" / "quickstart" / "sft"
    command = [
        str(ROOT / "launch" / "pipeline.sh"),
        str(recipes),
        str(ROOT / "launch" / "ddp.yaml"),
        "--num_processes=2",
    ]
    hold(3)
    started = subprocess.Popen(
        command, cwd=recipes.parent, env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": hold.pythonpath},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    shown = []
    reader = threading.Thread(target=lambda: shown.append(started.stdout.read()))
    reader.start()
    try:
        end = time.monotonic() + 600
        while len(read_metrics(out)) < 3 and time.monotonic() < end and started.poll() is None:
            time.sleep(0.1)
        os.killpg(started.pid, signal.SIGINT)
        code = started.wait(timeout=600)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
        reader.join(timeout=300)
    assert code == EXIT_STOPPED and "(SIGINT); saved as runs/quickstart/sft/checkpoint-" in shown[0], shown[0][-3000:]
    assert "Report" not in shown[0]


def test_asked_to_stop_between_two_stages(recipes, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_STOP_FILE", str(tmp_path / "stop"))
    (tmp_path / "stop").touch()
    assert "=== SFT" not in pipeline(recipes, code=EXIT_STOPPED)


def test_a_mistake_in_the_last_recipe_stops_before_the_first_stage_trains(recipes):
    text = (recipes / "evaluate.yaml").read_text()
    (recipes / "evaluate.yaml").write_text(text + "batchsize: 3\n")
    shown = pipeline(recipes, code=2)
    assert (
        f"evaluate.yaml:{text.count(chr(10)) + 1}: unknown key 'batchsize'; did you mean 'batch_size'?" in shown
        and "===" not in shown
    )


def test_metrics_reach_tensorboard(recipe, tiny_llama, few_pairs, tmp_path):
    pytest.importorskip("tensorboard")
    from rlhf.__main__ import main

    file = recipe("sft", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "o"))
    assert main(["sft", file, "--report_to", "tensorboard"]) == 0
    assert list((tmp_path / "o").rglob("events.out.tfevents.*"))
