"""Checkpoints that all ranks write: a kill, a full disk or a damaged byte on one of them costs the work since the one before."""

import json
import re
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file
from test_resume import needs_deepspeed

from rlhf.runs.metrics import read_metrics

WORKER = str(Path(__file__).parent / "saving_worker.py")
RANK_1 = "portable-00001-of-00002-00000.safetensors"
slow = pytest.mark.slow


@pytest.fixture
def start(recipe, tiny_llama, few_pairs, tmp_path):
    def run(name, fault, launch_file, **more):
        file = recipe("sft", name=name, model_name_or_path=tiny_llama, dataset_name=few_pairs, max_steps=3,
                      save_strategy="steps", save_steps=1, save_total_limit=3, output_dir=str(tmp_path / name), **more)  # fmt: skip
        done = forked.launch(2, fault, "sft", file, launch_file=launch_file, program=(WORKER,))
        return done.returncode, done.stdout + done.stderr

    return run


def result(out):
    losses = [(row["step"], row["loss"]) for row in read_metrics(out) if "loss" in row]
    return losses, load_file(out / "model.safetensors")


def same(one, other):
    return one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.parametrize("launch_file", ["ddp.yaml", pytest.param("zero3.yaml", marks=slow), pytest.param("fsdp2.yaml", marks=slow)])  # fmt: skip
def test_one_rank_fails_while_all_write(launch_file, start, tmp_path):
    """Killed; then its disk is full; then a byte of its file changes: each time the others neither hang nor trust it."""
    needs_deepspeed(launch_file)
    code, shown = start("straight", "none", launch_file)
    assert code == 0, shown[-3000:]
    straight = result(tmp_path / "straight")

    out = tmp_path / "out"
    code, shown = start("out", "killed", launch_file)
    assert code != 0
    assert (out / "checkpoint-1" / RANK_1).is_file() and not (out / "checkpoint-2").exists()

    code, shown = start("out", "full", launch_file)
    assert code == 0, shown[-3000:]
    assert f"resuming from {out}/checkpoint-1" in shown
    assert (
        "warning: no checkpoint of step 2: [Errno 28] No space left on device; checkpoint-1 is kept, and training"
        in shown
    )
    assert (out / "checkpoint-3" / RANK_1).is_file() and not (out / "checkpoint-2").exists()
    assert same(straight, result(out))

    files = json.loads((out / "checkpoint-3" / "manifest.json").read_text())["files"]
    read = [set(re.findall(rf"rank {rank} reads checkpoint-1/(\S+)", shown)) for rank in (0, 1)]
    assert read[0] | read[1] == set(files) and not read[0] & read[1]  # each file by one rank
    sizes = [sum(files[name][0] for name in names) for names in read]
    assert max(sizes) - min(sizes) <= max(size for size, _ in files.values())

    for name in ("complete.json", "model.safetensors", "config.json"):
        (out / name).unlink()
    damaged = out / "checkpoint-3" / RANK_1
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    code, shown = start("out", "none", launch_file)
    assert code == 0, shown[-3000:]
    assert (
        f"warning: {out}/checkpoint-3 is damaged and not used: the content of {RANK_1} differs from what was" in shown
    )
    assert f"resuming from {out}/checkpoint-1" in shown
    assert same(straight, result(out))
