"""A training state in one piece: written in parts, read by a run that is split in another way, refused where it can't be."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

import rlhf.runs.portable
from rlhf.__main__ import main
from rlhf.runs.metrics import read_metrics
from rlhf.runs.stop import EXIT_STOPPED


@pytest.fixture
def written(recipe, tiny_llama, few_pairs, tmp_path):
    def write(stage, name, **more):
        lora = dict(use_peft=True, lora_r=4, lora_target_modules="all-linear", merge_adapter=False)
        values = lora | dict(max_steps=4, warmup_steps=2, weight_decay=0.1, learning_rate=1e-3) | more
        return recipe(stage, name=name, output_dir=str(tmp_path / name), model_name_or_path=tiny_llama, dataset_name=few_pairs, **values)  # fmt: skip

    return write


def stop_after_one_step(file, out):
    out.mkdir()
    while not (out / "checkpoint-1").is_dir():  # the first may stop DPO at its reference
        (out / "stop").touch()
        assert main([file.stage, file.path]) == EXIT_STOPPED
    return out / "checkpoint-1"


class File:
    def __init__(self, stage, path):
        self.stage, self.path = stage, path


def pretend_other_engine(checkpoint):
    """The manifest tells of another engine, and its own files are not there."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["layout"] = {"engine": "DeepSpeed ZeRO-3", "split": "DeepSpeed ZeRO-3", "processes": 8}
    (checkpoint / "adapter_model.safetensors").unlink()
    del manifest["files"]["adapter_model.safetensors"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_goes_on_from_one_piece_to_the_bit(stage, written, tmp_path, monkeypatch, capsys):
    """In several files, as of a large model; nothing but them, the schedule and the step is read."""
    monkeypatch.setattr(rlhf.runs.portable, "SHARD_BYTES", 4000)
    assert main([stage, written(stage, "whole")]) == 0
    file, out = File(stage, written(stage, "moved")), tmp_path / "moved"
    checkpoint = stop_after_one_step(file, out)
    assert len(list(checkpoint.glob("portable-*.safetensors"))) > 2
    pretend_other_engine(checkpoint)
    capsys.readouterr()
    assert main([stage, file.path]) == 0
    assert f"resuming from {checkpoint} (of 8 processes, DeepSpeed ZeRO-3)" in capsys.readouterr().out
    losses, again = (
        [(m["step"], m["loss"]) for m in read_metrics(tmp_path / n) if "loss" in m] for n in ("whole", "moved")
    )
    assert again == losses
    weights, found = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "moved"))
    assert weights.keys() == found.keys() and all(torch.equal(weights[name], found[name]) for name in weights)


def test_what_is_in_it(written, tmp_path):
    """Of each trained parameter the weight and Adam's state after one step, of no other anything."""
    checkpoint = stop_after_one_step(File("dpo", written("dpo", "run")), tmp_path / "run")
    with safe_open(checkpoint / "portable-00000.safetensors", "pt") as state:
        keys = set(state.keys())
        names = {key.removeprefix("weight:") for key in keys if key.startswith("weight:")}
        assert names and all("lora_" in name for name in names)
        kinds = ("weight", "exp_avg", "exp_avg_sq", "step")
        assert keys == {f"{kind}:{name}" for name in names for kind in kinds} | {"schedule:last_epoch"}
        assert all(state.get_tensor(f"step:{name}") == 1 for name in names)
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert len(names) == len(adapter)
    assert not (checkpoint / "optimizer.pt").exists()  # it is there once


def test_another_adapter_is_refused(written, tmp_path, capsys):
    file = File("dpo", written("dpo", "run"))
    checkpoint = stop_after_one_step(file, tmp_path / "run")
    pretend_other_engine(checkpoint)
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"lora_target_modules": ["q_proj"]}))
    changed = written("dpo", "run", lora_target_modules=["q_proj"])
    capsys.readouterr()
    assert main(["dpo", changed]) == 2
    assert f"{checkpoint} is from a run that trains other parameters than this one (such as " in capsys.readouterr().err


def test_an_optimizer_with_a_state_of_its_own_shape_says_so(written, tmp_path, capsys):
    file = File("sft", written("sft", "run", optim="adafactor"))
    checkpoint = stop_after_one_step(file, tmp_path / "run")
    assert not list(checkpoint.glob("portable-*"))
    note = "note: checkpoints can be resumed under this engine only, not with other launch files: Adafactor keeps "
    assert note in capsys.readouterr().out
    pretend = json.loads((checkpoint / "manifest.json").read_text())
    pretend["layout"] = {"engine": "FSDP", "split": "FSDP", "processes": 2}
    (checkpoint / "manifest.json").write_text(json.dumps(pretend))
    assert main(["sft", file.path]) == 2
    assert "was written by 2 processes under FSDP, and can't be read by 1 under one process" in capsys.readouterr().err


def test_full_fine_tuning_saves_it_when_asked(written, tmp_path):
    for name, more in (("plain", {}), ("asked", {"portable_checkpoints": True})):
        file = File("sft", written("sft", name, use_peft=False, merge_adapter=None, **more))
        checkpoint = stop_after_one_step(file, tmp_path / name)
        assert bool(list(Path(checkpoint).glob("portable-*"))) == bool(more)
