"""bench/scale_proof.py: launch files that split the model give what one process gives. `make scale-proof` runs all of it."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CASES = [
    (["--stages", "dpo", "--processes", "2", "--launch", "zero3", "fsdp2"], 2),
    pytest.param(["--stages", "sft", "reward", "--processes", "2", "--launch", "zero1", "zero2", "zero3", "fsdp2"], 8, marks=pytest.mark.slow),
    pytest.param(["--stages", "dpo-qlora", "--processes", "2", "--steps", "3", "--launch", "ddp", "zero2", "zero3", "fsdp2"], 4, marks=pytest.mark.slow),
    pytest.param(["--stages", "dpo-full", "--processes", "2", "--steps", "3", "--launch", "zero3_offload"], 1, marks=pytest.mark.slow),
    pytest.param(["--stages", "dpo-nf4", "--processes", "2", "--steps", "3", "--launch", "ddp", "zero1", "zero2", "zero3", "fsdp2"], 5, marks=pytest.mark.slow),
    pytest.param(["--stages", "dpo-full", "--processes", "4", "--launch", "ddp", "zero2", "zero3", "fsdp2", "fsdp2_hsdp"], 5, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "runs"), CASES, ids=["dpo", "sft and reward", "qlora", "offload", "4-bit reference", "full, 4 processes"]
)
def test_scale_proof(words, runs, tiny_llama, llama_64, forks, monkeypatch, capsys):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("the extra `deepspeed` is not installed")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++, with which DeepSpeed compiles what its processes on a CPU talk through")
    model = llama_64 if "dpo-nf4" in words else tiny_llama  # as wide as bitsandbytes' blocks
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import scale_proof

    monkeypatch.setattr(sys, "argv", ["scale_proof.py", "--model", model, *words])
    assert scale_proof.main() == 0
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if re.match(r"(sft|reward|dpo)", line)]
    assert len(rows) == runs and "equal" in shown.splitlines()[-1] and "NOT" not in shown


def test_it_can_fail(monkeypatch, capsys):
    """Runs that differ are told and end with exit code 1."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import scale_proof
    import torch

    step = {"step": 2, "loss": 0.5, "grad_norm": 2.0, "logps/chosen": -100.0}
    runs = {1: step, 2: step | {"loss": 0.50001, "grad_norm": 2.0002, "logps/chosen": -100.01}}
    monkeypatch.setattr(scale_proof, "train", lambda *a: ([runs[a[-1]]], {"w": torch.tensor([1.0 * a[-1]])}))
    monkeypatch.setattr(sys, "argv", ["x", "--model", "m", "--stages", "dpo", "--launch", "ddp", "--processes", "2"])
    assert scale_proof.main() == 1
    shown = capsys.readouterr().out
    assert (
        "dpo       ddp                   2   1.0e-05        1.0e-04   1.0e-04   1.0e+00" in shown
        and "NOT EQUAL" in shown
    )
