"""`--status` and `rlhf status`: what a batch script decides by."""

import json
import subprocess
import sys

import pytest

from rlhf.__main__ import main
from rlhf.files import Lock
from rlhf.runs.checkpoints import digest_files, place_checkpoint
from rlhf.runs.stop import Stopper


def add_checkpoint(folder, step, of):
    partial = folder / ".partial"
    partial.mkdir(parents=True)
    content = json.dumps({"global_step": step, "max_steps": of})
    (partial / "trainer_state.json").write_text(content)
    place_checkpoint(partial, folder / f"checkpoint-{step}", digest_files(partial))


def add_metrics(folder, steps):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in steps))
    (folder / "recipe.yaml").write_text((folder.parent / "dpo.yaml").read_text())


@pytest.fixture
def asked(recipe, tmp_path, capsys):
    """-> (exit code, the line) of a recipe whose run folder is tmp_path / "out"."""
    file = recipe("dpo", model_name_or_path="m", dataset_name="embedded:sample", output_dir=str(tmp_path / "out"))

    def ask(*words):
        code = main(["dpo", file, "--status", *words])
        found = capsys.readouterr()
        return code, found.out.strip() or found.err.strip()

    return ask


def test_not_started(asked, tmp_path):
    assert asked() == (3, f"dpo: not started · {tmp_path}/out")
    assert not (tmp_path / "out").exists()  # a question changes nothing
    assert asked("--output_dir", str(tmp_path / "x")) == (3, f"dpo: not started · {tmp_path}/x")


def test_interrupted(asked, tmp_path):
    """Killed after step 7 of 10; the checkpoint of step 6 is cut, that of step 4 whole: 7 - 4 = 3 steps are lost."""
    out = tmp_path / "out"
    add_metrics(out, range(1, 8))
    assert asked() == (
        1,
        f"dpo: interrupted at step 7 · {out} · no checkpoint yet: the same command starts from scratch",
    )
    add_checkpoint(out, 4, 10)
    add_checkpoint(out, 6, 10)
    (out / "checkpoint-6" / "trainer_state.json").write_text("{")
    says = f"dpo: interrupted at step 7 of 10 · {out} · the same command resumes after step 4 (3 steps lost)"
    assert asked() == (1, says)


def test_stopped_and_complete(asked, tmp_path):
    out = tmp_path / "out"
    add_metrics(out, range(1, 7))
    add_checkpoint(out, 6, 10)
    (out / "stopped.json").write_text(json.dumps({"step": 6, "of": 10, "by": "SIGUSR1", "checkpoint": "x"}))
    assert asked() == (
        85,
        f"dpo: stopped at step 6 of 10 (SIGUSR1) · {out} · the same command resumes after step 6",
    )
    (out / "complete.json").write_text(json.dumps({"steps": 10}))
    assert asked() == (0, f"dpo: complete, step 10 of 10 · {out}")


def test_running(asked, tmp_path):
    """The lock of a living process; asking does not take it away, and it is free again when the process has ended."""
    out = tmp_path / "out"
    add_metrics(out, [1, 2])
    lock = Lock(out, "dpo.yaml")
    code, line = asked()
    assert code == 4 and line.startswith(f"dpo: running, step 2 · {out} · process ")
    lock.release()
    assert asked()[0] == 1


def test_another_run_in_the_folder_is_a_mistake(asked, tmp_path):
    add_metrics(tmp_path / "out", [1])
    code, line = asked("--beta", "0.3")
    assert code == 2 and "holds another run; it differs in beta: 0.1 (default) -> 0.3" in line


def test_it_takes_no_time(asked, tmp_path):
    """A batch script asks several times: what would take seconds is not imported."""
    heavy = {"torch", "transformers", "datasets", "numpy"}
    code = f"import sys; from rlhf.__main__ import main; main(['status', sys.argv[1]]); assert not {heavy} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not started" in done.stdout


def test_table(asked, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    add_metrics(tmp_path / "out", [1, 2, 3])
    (tmp_path / "out" / "provenance.json").write_text('{"stage": "dpo"}')
    for folder in (tmp_path, tmp_path / "out"):  # of recipes, of a run
        assert main(["status", str(folder)]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("dpo"))
        assert row.split()[:3] == ["dpo", "interrupted", "3"] and str(tmp_path / "out") in row
    (tmp_path / "dpo.yaml").unlink()
    assert main(["status", str(tmp_path)]) == 0  # of runs
    assert "interrupted" in capsys.readouterr().out
    assert main(["status", str(tmp_path / "nothing")]) == 2
    assert "contains neither recipes (sft.yaml, ...) nor runs" in capsys.readouterr().err


def test_a_stop_file_outside_of_the_run_folder(tmp_path, monkeypatch):
    """Which a batch script can name before the recipe is read. It is its maker's: nobody else removes it."""
    other = tmp_path / "job-7.0.stop"
    monkeypatch.setenv("RLHF_STOP_FILE", str(other))
    with Stopper(tmp_path) as stopper:
        assert stopper.agree() == ""
        other.touch()
        stopper._looked_at = -10.0  # it looks once a second
        assert stopper.agree() == stopper.agreed == f"the file {other}"
    assert other.exists()
