"""A training state for any engine: written in ranges, read by a run that is sharded in another way, refused where it can't be."""

import json
import math

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rlhf.runs.portable
from rlhf.__main__ import main
from rlhf.files import sha256_of
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
def test_goes_on_from_ranges_to_the_bit(stage, written, tmp_path, monkeypatch, capsys):
    """In several files, as of a large model; nothing but them, the schedule and the step is read."""
    monkeypatch.setattr(rlhf.runs.portable, "MAX_FILE_BYTES", 4000)
    assert main([stage, written(stage, "whole")]) == 0
    file, out = File(stage, written(stage, "moved")), tmp_path / "moved"
    checkpoint = stop_after_one_step(file, out)
    sizes = [path.stat().st_size for path in checkpoint.glob("portable-*-of-*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 2 * 4000  # their headers are as long
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
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    with safe_open(checkpoint / "portable-00000-of-00001-00000.safetensors", "pt") as state:
        names = {key.split(":")[1].split("[")[0] for key in state.keys()}
        assert len(names) == len(adapter) and all("lora_" in name for name in names)
        for name in names:
            weight = adapter[name.replace(".default", "")].flatten()
            assert torch.equal(state.get_tensor(f"weight:{name}[0:{len(weight)}]"), weight)
            first, second = (state.get_tensor(f"{kind}:{name}[0:{len(weight)}]") for kind in ("exp_avg", "exp_avg_sq"))
            assert (
                first.square() * 0.001 - second * 0.01
            ).abs().max() < 1e-12  # (0.1 g)^2 and 0.001 g^2 of the same gradient
        assert len(list(state.keys())) == 3 * len(names)
    saved = rlhf.runs.portable.PortableState(checkpoint)
    assert set(saved.parameters) == names and saved.last_epoch == 1
    assert all(each.scalars == {"step": torch.tensor(1.0)} for each in saved.parameters.values())
    assert not (checkpoint / "optimizer.pt").exists() and not (checkpoint / "scheduler.pt").exists()  # it is there once


def to_format_1(checkpoint):
    """Write the state as it was written before: unsharded tensors, in files that hold a few of them."""
    found = rlhf.runs.portable.PortableState(checkpoint)
    tensors = {"schedule:last_epoch": torch.tensor(found.last_epoch)}
    for name, saved in found.parameters.items():
        held = rlhf.runs.portable.Held(0, math.prod(saved.shape))
        for kind in ("weight", *saved.kinds):
            tensors[f"{kind}:{name}"] = torch.zeros(saved.shape)
            found.read([rlhf.runs.portable.Wanted(name, held, {kind: tensors[f"{kind}:{name}"].view(-1)})])
        tensors |= {f"{kind}:{name}": value for kind, value in saved.scalars.items()}
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for path in checkpoint.glob("portable-*"):
        path.unlink()
        del manifest["files"][path.name]
    keys = list(tensors)
    for number in range(3):
        path = checkpoint / f"portable-{number:05d}.safetensors"
        save_file({key: tensors[key] for key in keys[number::3]}, path)
        manifest["files"][path.name] = [path.stat().st_size, sha256_of(path)]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_the_format_before_is_read(written, tmp_path):
    assert main(["sft", written("sft", "whole")]) == 0
    file, out = File("sft", written("sft", "moved")), tmp_path / "moved"
    checkpoint = stop_after_one_step(file, out)
    to_format_1(checkpoint)
    assert main(["sft", file.path]) == 0
    weights, found = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "moved"))
    assert all(torch.equal(weights[name], found[name]) for name in weights)


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


def test_an_adapter_of_another_rank_is_refused(written, tmp_path, capsys):
    checkpoint = stop_after_one_step(File("dpo", written("dpo", "run")), tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"lora_r": 8}))
    assert main(["dpo", written("dpo", "run", lora_r=8)]) == 2
    shown = capsys.readouterr().err
    assert f"{checkpoint} is from a run that trains other parameters than this one (such as " in shown
    assert ", which has another shape); start from scratch with --fresh" in shown


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


def test_full_fine_tuning_saves_weights_once(written, tmp_path):
    for name, more in (("default", {}), ("own", {"portable_checkpoints": False})):
        file = File("sft", written("sft", name, use_peft=False, merge_adapter=None, **more))
        checkpoint = stop_after_one_step(file, tmp_path / name)
        names = {path.name for path in checkpoint.iterdir()}
        assert ("model.safetensors" in names) == ("optimizer.pt" in names) == bool(more)
        assert ("portable-index.safetensors" in names) == (not more)
        assert {"config.json", "tokenizer.json"} <= names
