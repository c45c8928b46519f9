"""bench/scale_proof.py: launch files that split the model give what one process gives. `make scale-proof` runs all of it."""

import importlib.util
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
SHORT = [
    "--shapes",
    "short",
    "--max-length",
    "272",
]  # the longest of the 13 rows has 262 of the tiny tokenizer's tokens
LONG = ["--shapes", "long", "--steps", "3"]
CASES = {
    "dpo": (["--stages", "dpo", "--processes", "2", "--launch", "zero3", "fsdp2"], 2),
    "sft and reward": (["--stages", "sft", "reward", "--processes", "2", "--launch", "zero1", "zero2", "zero3", "fsdp2"], 8),
    "qlora": (["--stages", "dpo-qlora", "--processes", "2", "--steps", "3", "--launch", "ddp", "zero2", "zero3", "fsdp2"], 4),
    "offload": (["--stages", "dpo-full", "--processes", "2", "--steps", "3", "--launch", "zero3_offload"], 1),
    "4-bit reference": (["--stages", "dpo-nf4", "--processes", "2", "--steps", "3", "--launch", "ddp", "zero1", "zero2", "zero3", "fsdp2"], 5),
    "full, 4 processes": (["--stages", "dpo-full", "--processes", "4", "--launch", "ddp", "zero2", "zero3", "fsdp2", "fsdp2_hsdp"], 5),
    "long answers, 3 processes": (["--stages", "dpo-full", *LONG, "--launch", "ddp", "zero3", "fsdp2"], 3),
    "long answers against float64": (["--stages", "dpo-full", *LONG, "--exact", "--launch", "zero2"], 2),
    "bf16": (["--stages", "dpo-full", "--processes", "2", "--steps", "3", "--bf16", "--launch", "ddp", "zero2", "zero3", "fsdp2"], 4),
}  # fmt: skip
FAST = "dpo"


@pytest.fixture
def scale_proof(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import scale_proof

    return scale_proof


def need_deepspeed():
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("the extra `deepspeed` is not installed")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++, with which DeepSpeed compiles what its processes on a CPU talk through")


@pytest.mark.parametrize(
    "name", [FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != FAST)]
)
def test_scale_proof(name, scale_proof, tiny_llama, llama_64, forks, monkeypatch, capsys):
    need_deepspeed()
    words, runs = CASES[name]
    model = [] if "long" in words else [*SHORT, "--model", llama_64 if "dpo-nf4" in words else tiny_llama]
    monkeypatch.setattr(sys, "argv", ["scale_proof.py", *model, *words])
    assert scale_proof.main() == 0
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if re.match(r"(short|long) +(sft|reward|dpo)", line)]
    assert len(rows) == runs and "equal" in shown.splitlines()[-1] and "NOT" not in shown


PLANT = """
import os
from rlhf.training.trainer import GlobalBatches

weighted = GlobalBatches._weighted

def planted(self, part, inputs, compute):
    bug = os.environ.get("PLANT") if self.accelerator.num_processes > 1 else None
    if bug == "divisor":  # the last, smaller batch is divided by the full batch size
        inputs = inputs | {"examples": self.global_batch.global_batch_size}
    if part is inputs["micro_batches"][0] and self.accelerator.is_main_process:
        part = part | {"examples": part["examples"] * {"weight": 0.999, "dropped": 0}.get(bug, 1)}
    return weighted(self, part, inputs, compute)

GlobalBatches._weighted = planted
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bf16", "bugs", "over"),
    [(False, {"": 2, "weight": 3, "divisor": 4}, 10), (True, {"": 2, "dropped": 3, "divisor": 4}, 1)],
    ids=["fp32", "bf16"],
)
def test_planted_bugs_are_over_the_bound(bf16, bugs, over, scale_proof, tiny_llama, forks, tmp_path, monkeypatch):
    """One micro-batch of one rank weighs 0.1% less, or (in bf16, which sees less) nothing; an uneven last batch has the
    wrong divisor. In fp32 that is ten times what is allowed."""
    (tmp_path / "sitecustomize.py").write_text(PLANT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    args = SimpleNamespace(steps=3, exact=False, bf16=bf16)
    shape = replace(scale_proof.SHAPES["short"], max_length=272)
    proof = scale_proof.Proof(args, tmp_path, tiny_llama, "embedded:sample", shape, "dpo", "short")
    for bug, processes in bugs.items():
        monkeypatch.setenv("PLANT", bug)
        found = proof.compare("ddp", processes)
        shares = found["loss_share"], found["gradient_share"]
        print(bug or "nothing planted", shares)
        assert min(shares) > over if bug else max(shares) <= 1


def test_bounds_by_hand(scale_proof):
    """e^8 tokens, 4 pairs in 8 rows of 100 tokens: 2 x 0.1 x 8 x sqrt(4 x 100) / sqrt(4) = 16 eps of a margin."""
    from scale_bounds import EPS, of_noise, of_step

    dpo = of_step("dpo-full", {"loss": 0.7}, examples=4, tokens=800, beta=0.1, vocabulary=2981)
    assert (dpo.loss / EPS, dpo.gradient / EPS) == (pytest.approx(16 + 4, rel=1e-4), pytest.approx(16 + 8, rel=1e-4))
    sft = of_step("sft", {"loss": 8.0}, examples=4, tokens=400, beta=0.1, vocabulary=2981)
    assert (sft.loss / EPS, sft.gradient / EPS) == (pytest.approx(2 * 8 / 20 + 4 * 8, rel=1e-4), pytest.approx(8))
    reward = of_step("reward", {"loss": 0.7, "min_reward": -3.0, "max_reward": 2.0}, 2, 400, 0.1, 2981)
    assert (reward.loss / EPS, reward.gradient / EPS) == (pytest.approx(6 + 4), pytest.approx(6 + 8))
    one, exact, nudged = ([{"loss": a, "grad_norm": b}] for a, b in ((1.0, 2.0), (1.25, 2.0), (1.0, 4.0)))
    assert (of_noise([one, exact, nudged]).loss, of_noise([one, exact, nudged]).gradient) == (1.0, 2.0)


def test_it_can_fail(scale_proof, tiny_llama, monkeypatch, capsys):
    """Runs that differ are told and end with exit code 1."""
    step = {"step": 2, "loss": 0.5, "grad_norm": 2.0, "logps/chosen": -100.0, "num_tokens": 1000}
    runs = {1: step, 2: step | {"loss": 0.50001, "grad_norm": 2.0002, "logps/chosen": -100.01}}
    weights = {number: {"w": torch.tensor([1.0 * number])} for number in runs}
    monkeypatch.setattr(scale_proof, "train", lambda recipe, out, launch, n, *more: ([runs[n]], weights[n]))
    words = ["--shapes", "short", "--stages", "dpo", "--launch", "ddp", "--processes", "2"]
    monkeypatch.setattr(sys, "argv", ["x", "--model", tiny_llama, *words])
    assert scale_proof.main() == 1
    shown = capsys.readouterr().out
    row = next(line.split() for line in shown.splitlines() if line.startswith("short"))
    assert (
        row[:5] == ["short", "dpo", "ddp", "2", "1.0e-05"] and row[6] == "1.0e-04" and row[8:] == ["1.0e-04", "1.0e+00"]
    )
    assert "NOT EQUAL" in shown
    runs[2] = step
    assert scale_proof.main() == 0
    assert "loss 0.00, gradient norm 0.00: equal" in capsys.readouterr().out


def test_answers_are_as_long_as_asked(scale_proof, tmp_path):
    """Each has 300 words at least, and no two of a pair are the same."""
    from scale_data import write_long_answers

    pairs = [
        json.loads(line) for line in Path(write_long_answers(tmp_path / "long.jsonl", 17, 300)).read_text().splitlines()
    ]
    answers = [[pair[side][0]["content"] for side in ("chosen", "rejected")] for pair in pairs]
    assert len(pairs) == 17 and all(300 <= len(answer.split()) < 500 for pair in answers for answer in pair)
    assert all(chosen != rejected for chosen, rejected in answers)
