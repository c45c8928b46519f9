"""Runs that are stopped and go on, on the same processes and on others, under every way to split them."""

import json
import shutil
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file

from rlhf.runs.metrics import read_metrics

slow = pytest.mark.slow


def start(launch_file, processes, recipe):
    """Exit code and what was shown."""
    done = forked.launch(processes, "dpo", recipe, launch_file=launch_file)
    return done.returncode, done.stdout + done.stderr


def result(out):
    losses = [(row["step"], row["loss"]) for row in read_metrics(out) if "loss" in row]
    return losses, load_file(next(out.glob("*model.safetensors")))


@pytest.fixture
def written(recipe, tiny_llama, few_pairs, tmp_path):
    def write(name, **more):
        file = Path(recipe("dpo", name=name, output_dir=str(tmp_path / name), model_name_or_path=tiny_llama, dataset_name=few_pairs,
                           **dict(use_peft=True, lora_r=4, lora_target_modules="all-linear", merge_adapter=False, max_steps=4,
                           global_batch_size=5, max_tokens_per_device=800) | more))  # fmt: skip
        file.write_text("".join(x for x in file.read_text().splitlines(True) if "per_device_train" not in x))
        return str(file)

    return write


def needs_deepspeed(launch_file):
    if launch_file.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
        if shutil.which("g++") is None:
            pytest.skip("there is no g++, with which DeepSpeed compiles what its processes on a CPU talk through")


@pytest.mark.parametrize(
    ("launch_file", "processes", "training"),
    [
        ("zero2.yaml", 2, "lora"),
        pytest.param("zero3.yaml", 2, "lora", marks=slow),
        pytest.param("fsdp2.yaml", 2, "lora", marks=slow),
        ("zero3.yaml", 2, "full"),
        pytest.param("ddp.yaml", 2, "full", marks=slow),
        pytest.param("zero1.yaml", 2, "full", marks=slow),
        pytest.param("zero2.yaml", 2, "full", marks=slow),
        pytest.param("zero3_offload.yaml", 2, "full", marks=slow),
        pytest.param("fsdp2.yaml", 2, "full", marks=slow),
        pytest.param("fsdp2_hsdp.yaml", 4, "full", marks=slow),
    ],
)
def test_stopped_and_gone_on(launch_file, processes, training, written, tmp_path):
    """A stop file that lies there already stops after the first step; the resumed run is the uninterrupted one, to the bit."""
    needs_deepspeed(launch_file)
    out, more = tmp_path / "stopped", WHOLE_MODEL if training == "full" else {}
    assert start(launch_file, processes, written("whole", **more))[0] == 0
    out.mkdir()
    (out / "stop").touch()
    code, shown = start(launch_file, processes, written("stopped", **more))
    assert code != 0 and "Stopped after step 1 of 4 (the file " in shown, shown[-6000:]
    assert not (out / "stop").exists() and json.loads((out / "stopped.json").read_text())["step"] == 1
    code, shown = start(launch_file, processes, written("stopped", **more))
    assert code == 0 and f"resuming from {out}/checkpoint-1" in shown, shown[-6000:]
    (losses, weights), (again, found) = result(tmp_path / "whole"), result(out)
    assert again == losses
    assert all(torch.equal(weights[name], found[name]) for name in weights)


@pytest.mark.parametrize(
    ("launch_file", "numbers"), [("ddp.yaml", (2, 1, 4)), pytest.param("fsdp2.yaml", (2, 4, 2), marks=slow)]
)
def test_on_other_numbers_of_processes(launch_file, numbers, written, tmp_path):
    """Two steps on each of them; the same losses and weights as without a break, to rounding."""
    out = tmp_path / "stopped"
    assert start("ddp.yaml", 1, written("whole"))[0] == 0
    out.mkdir()
    for number in numbers[:-1]:
        (out / "stop").touch()
        code, shown = start(launch_file, number, written("stopped"))
        assert code != 0 and "Stopped after step" in shown, shown[-6000:]
    code, shown = start(launch_file, numbers[-1], written("stopped"))
    assert code == 0, shown[-6000:]
    (losses, weights), (again, found) = result(tmp_path / "whole"), result(out)
    assert [step for step, _ in again] == [1, 2, 3, 4]
    for (_, loss), (_, other) in zip(losses, again, strict=True):
        assert other == pytest.approx(loss, abs=5e-6)
    for name in weights:
        torch.testing.assert_close(found[name], weights[name], rtol=1e-5, atol=2e-6)


LORA = [("ddp.yaml", 1), ("zero2.yaml", 2), ("fsdp2.yaml", 1), ("zero3.yaml", 2)]
MORE = [("ddp.yaml", 2), ("zero3.yaml", 4), ("zero1.yaml", 1), ("fsdp2.yaml", 4), ("zero2.yaml", 2), ("zero3_offload.yaml", 1),
        ("ddp.yaml", 4), ("fsdp2.yaml", 2), ("fsdp2_hsdp.yaml", 4), ("zero3.yaml", 1)]  # fmt: skip
FULL = [("zero3.yaml", 2), ("fsdp2.yaml", 2), ("zero2.yaml", 2), ("ddp.yaml", 1)]
WHOLE_MODEL = {"use_peft": False, "merge_adapter": None}


@pytest.mark.parametrize(
    ("layouts", "more"),
    [
        (LORA, {}),
        pytest.param(FULL, WHOLE_MODEL, marks=slow),
        pytest.param(MORE, WHOLE_MODEL, marks=slow),
    ],
)
def test_under_other_launch_files(layouts, more, written, tmp_path):
    """A step under each of them, weight decay and warm-up at work: the same losses and weights as without a break.

    AdamW's epsilon is 1e-6: with 1e-8 it divides gradients of nearly 0 by nearly 0, and makes steps of their rounding.
    """
    for launch_file, _ in layouts:
        needs_deepspeed(launch_file)
    out, steps = tmp_path / "moved", len(layouts)
    more = more | {"max_steps": steps, "warmup_steps": 2, "weight_decay": 0.1, "learning_rate": 1e-3}
    more |= {"adam_epsilon": 1e-6}
    assert start("ddp.yaml", 1, written("whole", **more))[0] == 0
    out.mkdir()
    for number, (launch_file, processes) in enumerate(layouts, 1):
        if number < steps:
            (out / "stop").touch()
        code, shown = start(launch_file, processes, written("moved", **more))
        if number < steps:
            assert code != 0 and f"Stopped after step {number} of {steps}" in shown, shown[-6000:]
        else:
            assert code == 0, shown[-6000:]
    (losses, weights), (again, found) = result(tmp_path / "whole"), result(out)
    assert [step for step, _ in again] == list(range(1, steps + 1))
    for (_, loss), (_, other) in zip(losses, again, strict=True):
        assert other == pytest.approx(loss, abs=5e-6)
    for name in weights:
        torch.testing.assert_close(found[name], weights[name], rtol=1e-5, atol=2e-6)


def test_what_was_not_saved_in_one_piece_needs_its_layout(written, tmp_path):
    needs_deepspeed("zero2.yaml")
    out = tmp_path / "zero"
    out.mkdir()
    (out / "stop").touch()
    assert start("ddp.yaml", 1, written("whole"))[0] == 0  # the reference is in the cache
    code, shown = start("zero2.yaml", 2, written("zero", portable_checkpoints=False))
    assert code != 0 and "Stopped after step 1 of 4" in shown, shown[-6000:]
    code, shown = start("zero2.yaml", 1, written("zero"))
    assert (
        code != 0
        and (
            f"{out}/checkpoint-1 was written by 2 processes under DeepSpeed ZeRO-2, and can't be read by 1 under DeepSpeed ZeRO-2: it "
            "was saved with `portable_checkpoints: false`, or its optimizer keeps a state of its own shape. Resume as before"
        )
        in shown
    ), shown[-6000:]


@slow
def test_fsdp2_saves_after_an_evaluation_that_leaves_weights_unsharded(written, tmp_path):
    """With fsdp_reshard_after_forward off, the parameters are then not those that the optimizer knows."""
    launch_file = tmp_path / "fsdp2.yaml"
    text = (Path(__file__).parent.parent.parent / "launch" / "fsdp2.yaml").read_text()
    launch_file.write_text(text.replace("fsdp_reshard_after_forward: true", "fsdp_reshard_after_forward: false"))
    every = {"eval_strategy": "steps", "eval_steps": 1, "heldout": 0.3, "save_strategy": "steps", "save_steps": 1}
    more = WHOLE_MODEL | every | {"max_steps": 3}
    assert start(launch_file, 2, written("whole", **more))[0] == 0
    out = tmp_path / "whole"
    losses, weights = result(out)
    shutil.rmtree(out / "checkpoint-3")
    for name in ("complete.json", "model.safetensors", "config.json"):
        (out / name).unlink()
    code, shown = start(launch_file, 2, written("whole", **more))
    assert code == 0 and f"resuming from {out}/checkpoint-2" in shown, shown[-6000:]
    again, found = result(out)
    assert again == losses and all(torch.equal(weights[name], found[name]) for name in weights)
