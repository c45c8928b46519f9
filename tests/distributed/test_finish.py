"""The end of a run: all ranks write the model, and a kill in the middle of it loses nothing."""

import json
import re
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file
from test_resume import needs_deepspeed

WORKER = str(Path(__file__).parent / "failing_worker.py")
slow = pytest.mark.slow


def weights(folder):
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def opened(done):
    return re.findall(r"opens (model-\S+)", done.stdout)


@pytest.mark.parametrize(
    ("launch_file", "values"),
    [
        ("zero3.yaml", {"use_peft": True}),
        pytest.param("zero3.yaml", {}, marks=slow),
        pytest.param("fsdp2.yaml", {"use_peft": True}, marks=slow),
        pytest.param("fsdp2.yaml", {}, marks=slow),
        pytest.param("zero2.yaml", {}, marks=slow),
        pytest.param("ddp.yaml", {"use_peft": True}, marks=slow),
    ],
)
def test_killed_while_it_writes(launch_file, values, recipe, tiny_llama, few_pairs, tmp_path):
    """Both ranks write files; after a kill only those that are missing are written, and the model is the same."""
    needs_deepspeed(launch_file)

    def start(name, fault):
        lora = {"lora_r": 4, "lora_target_modules": "all-linear"} if values else {}
        file = recipe("sft", name=name, model_name_or_path=tiny_llama, dataset_name=few_pairs, max_steps=2,
                      save_strategy="steps", save_steps=1, output_dir=str(tmp_path / name), **values, **lora)  # fmt: skip
        return forked.launch(2, fault, "sft", file, launch_file=launch_file, program=(WORKER,))

    whole = start("straight", "many_files")
    assert whole.returncode == 0, whole.stderr[-3000:]
    files = opened(whole)
    assert len(files) == len(set(files)) == 6

    if launch_file.startswith("zero") and not values:  # one state, by both ranks, and nothing beside it
        names = {path.name for path in (tmp_path / "straight" / "checkpoint-2").iterdir()}
        assert {f"portable-0000{rank}-of-00002-00000.safetensors" for rank in (0, 1)} <= names
        assert "writes the engine's state" not in whole.stdout and "model.safetensors" not in names

    out = tmp_path / "killed"
    assert start("killed", "killed").returncode != 0
    assert not list(out.glob("model*")) and not (out / "complete.json").exists()
    again = start("killed", "many_files")
    assert again.returncode == 0, again.stderr[-3000:]
    assert len(opened(again)) == len(files) - 4 and set(opened(again)) < set(files)
    complete, straight = (
        json.loads((tmp_path / name / "complete.json").read_text()) for name in ("killed", "straight")
    )
    assert complete["weights_sha256"] == straight["weights_sha256"] and complete["max_logit_difference"] < 1e-5
    assert not list(out.glob(".partial*"))
    found, expected = weights(out), weights(tmp_path / "straight")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(found) and set(index.values()) == set(files)


@pytest.mark.parametrize(
    ("launch_file", "values"),
    [
        ("zero2.yaml", {"use_peft": True}),
        pytest.param("fsdp2.yaml", {"use_peft": True}, marks=slow),
        pytest.param("zero3.yaml", {}, marks=slow),
        pytest.param("ddp.yaml", {}, marks=slow),
    ],
)
def test_the_best_model_killed_while_it_is_written(launch_file, values, recipe, tiny_llama, few_pairs, tmp_path):
    """The one with the highest loss here, which is the first: no file of it may be taken for one of the last."""
    needs_deepspeed(launch_file)
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
        "learning_rate": 1e-2,
    }

    def start(name, fault, **more):
        lora = {"lora_r": 4, "lora_target_modules": "all-linear"} if values else {}
        file = recipe("sft", name=name, model_name_or_path=tiny_llama, dataset_name=few_pairs, heldout=0.3,
                      max_steps=3, output_dir=str(tmp_path / name), **{**values, **lora, **every, **best, **more})  # fmt: skip
        return forked.launch(2, fault, "sft", file, launch_file=launch_file, program=(WORKER,))

    straight = start("straight", "many_files")
    assert straight.returncode == 0, straight.stderr[-3000:]
    assert start("last", "many_files", load_best_model_at_end=False).returncode == 0
    assert start("killed", "killed").returncode != 0
    again = start("killed", "many_files")
    assert again.returncode == 0, again.stderr[-3000:]
    assert len(opened(again)) == len(opened(straight)) - 4
    sha = {
        name: json.loads((tmp_path / name / "complete.json").read_text())["weights_sha256"]
        for name in ("straight", "last", "killed")
    }
    assert sha["killed"] == sha["straight"] != sha["last"]
