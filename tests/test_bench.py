"""The bench scripts run, and what they compare agrees. Never what they time."""

import argparse
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config.recipe import load_recipe
from rlhf.distributed.topology import topology_of_environment
from rlhf.packing import packing_mode
from rlhf.training.plan import make_plan

ROOT = Path(__file__).parent.parent
CASES = [("dpo", ["--variants", "trl", "shared"])] + [
    pytest.param(stage, words, marks=pytest.mark.slow)
    for stage, words in (
        ("dpo", ["--train", "full", "--data", "completion-heavy"]), ("dpo", ["--train", "qlora"]), ("reward", []),
        ("sft", ["--max-length", "1024"]), ("sft", ["--max-length", "1024", "--dtype", "bfloat16", "--gradient-checkpointing"]),
    )
]  # fmt: skip


@pytest.mark.parametrize(("stage", "words"), CASES, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_bench(stage, words, forks, smollm2, tiny_llama, few_pairs):
    model = smollm2 if "qlora" in words else tiny_llama  # bitsandbytes takes no layer narrower than its block
    data = [] if "--data" in words else ["--data", few_pairs]
    command = [sys.executable, str(ROOT / "bench" / f"{stage}.py"), "--model", model, *data, "--examples", "2"]
    command += ["--steps", "1", "--rounds", "1", "--no-result", "--device", "cpu", "--max-length", "256", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    head, rows = rows[0], rows[2:]
    assert len(rows) >= 2 and rows[0][0] == "trl"
    differences = [float(row[head.index("max loss difference")]) for row in rows]
    assert max(differences) <= (2e-2 if "bfloat16" in words or "qlora" in words else 1e-5)
    assert all(re.fullmatch(r"[\d.]+x", row[head.index("ratio")]) for row in rows)


@pytest.mark.slow
def test_bench_of_a_start(few_pairs, tiny_llama):
    command = [sys.executable, str(ROOT / "bench" / "data.py"), "--data", few_pairs, "--model", tiny_llama]
    done = subprocess.run([*command, "--only", "rlhf", "check"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"^\| (rlhf|trl|check) \| (first|second) \| [\d.]+ \|", done.stdout, re.M)
    assert rows == [(side, start) for side in ("rlhf", "check") for start in ("first", "second")]


def test_bench_of_an_evaluation(forks, tiny_llama, few_pairs):
    command = [
        sys.executable,
        str(ROOT / "bench" / "evaluate.py"),
        "--model",
        tiny_llama,
        "--data",
        few_pairs,
        "--answers",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(
        r"^(one pair.*padded|one pair.*packed|packed batches) .*x  largest relative difference (\S+)$",
        done.stdout,
        re.M,
    )
    assert len(rows) == 3 and max(float(off) for _, off in rows) < 1e-5
    assert "0 of 2 differ between 1 and 16 per batch" in done.stdout


def bench_module(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module(name)


@pytest.fixture
def plan(recipe, tiny_llama, few_pairs, tmp_path):
    def make(stage):
        file = recipe(stage.name, model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "out"),
                      use_cpu=True, bf16=False)  # fmt: skip
        loaded = load_recipe(file, stage.name)
        return make_plan(stage, loaded, topology_of_environment())

    return make


@pytest.mark.parametrize("name", ["dpo", "reward", "sft"])
def test_each_variant_is_what_its_name_says(name, plan, monkeypatch):
    """And one that is not is refused: where the argument is lost, or a build forgets it."""
    bench, compare = bench_module(name, monkeypatch), bench_module("compare", monkeypatch)
    assert bench.MODES.keys() == bench.VARIANTS.keys()
    for variant, mode in bench.MODES.items():
        if variant == "trl-padding-free":  # wants rows that are short enough
            continue
        trainer = bench.build(variant, plan(bench.STAGE), compare.Clock())
        assert packing_mode(trainer.model) == mode
        compare.check_variant(variant, mode, trainer)
        for other in {None, "rows", "pairs"} - {mode}:
            with pytest.raises(SystemExit, match=f"{variant}: batches are packed as {mode}, expected {other}"):
                compare.check_variant(variant, other, trainer)


def test_a_lost_argument_publishes_no_number(plan, monkeypatch, tmp_path):
    """As when `pack` moves, or no longer listens: the worker ends before it measures."""
    bench, compare = bench_module("reward", monkeypatch), bench_module("compare", monkeypatch)
    made = plan(bench.STAGE)
    replace = dataclasses.replace
    monkeypatch.setattr(dataclasses, "replace", lambda it, **new: it if "packing_mode" in new else replace(it, **new))
    monkeypatch.setattr(compare, "load_plan", lambda bench, args: made)
    args = argparse.Namespace(worker="packed", out=str(tmp_path / "out.json"), folder=str(tmp_path), profile=None)
    with pytest.raises(SystemExit, match="packed: batches are packed as pairs, expected rows"):
        compare.worker(compare.Bench("reward", bench.VARIANTS, bench.MODES, bench.build), args)
    assert not (tmp_path / "out.json").exists()


def test_a_reference_that_took_no_time_publishes_no_number(plan, monkeypatch):
    import rlhf.training.dpo

    bench, compare = bench_module("dpo", monkeypatch), bench_module("compare", monkeypatch)
    trainer_class = rlhf.training.dpo.trainer_class

    def without_clock(plan, stopper):
        return type(
            "Trainer",
            (trainer_class(plan, stopper),),
            {"reference_seconds": property(lambda self: 0.0, lambda self, x: None)},
        )

    monkeypatch.setattr(rlhf.training.dpo, "trainer_class", without_clock)
    with pytest.raises(SystemExit, match="shared: the cached reference took no time"):
        bench.build("shared", plan(bench.STAGE), compare.Clock())
