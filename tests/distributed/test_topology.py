"""Launch files and the environment they make are understood; what can't work under them is refused with a way out."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from faults import environment_of

from rlhf.__main__ import main
from rlhf.config.recipe import Recipe
from rlhf.distributed import topology
from rlhf.distributed.topology import (
    Topology,
    check_quantised,
    check_topology,
    topology_of_environment,
    topology_of_file,
)
from rlhf.errors import UserError

ROOT = Path(__file__).parent.parent.parent


def recipe_with(**values):
    return Recipe("dpo", "r.yaml", values, {key: line for line, key in enumerate(values, 1)})


@pytest.mark.parametrize(
    ("file", "engine", "zero_stage", "offload", "fsdp_version"),
    [
        ("cpu", "one process", 0, False, 0),
        ("single", "one process", 0, False, 0),
        ("ddp", "DDP", 0, False, 0),
        ("zero1", "DeepSpeed", 1, False, 0),
        ("zero2", "DeepSpeed", 2, False, 0),
        ("zero3", "DeepSpeed", 3, False, 0),
        ("zero3_offload", "DeepSpeed", 3, True, 0),
        ("fsdp2", "FSDP", 0, False, 2),
        ("fsdp2_hsdp", "FSDP", 0, False, 2),
    ],
)
def test_the_file_and_what_accelerate_makes_of_it_say_the_same(file, engine, zero_stage, offload, fsdp_version, monkeypatch):  # fmt: skip
    path = str(ROOT / "launch" / f"{file}.yaml")
    assert topology_of_file(path) == Topology(engine, zero_stage, offload, fsdp_version, path)
    for name, value in environment_of(path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", {"one process": "1"}.get(engine, "4" if file == "fsdp2_hsdp" else "2"))
    assert topology_of_environment() == Topology(engine, zero_stage, offload, fsdp_version, started=True)


def launch_file(folder, engine, *lines):
    """A copy of launch/zero3.yaml or fsdp2.yaml with other lines in its section."""
    text = (ROOT / "launch" / f"{engine}.yaml").read_text()
    section = {"zero3": "  zero_stage: 3\n", "fsdp2": "  fsdp_reshard_after_forward: true\n"}[engine]
    assert section in text
    path = folder / "launch.yaml"
    path.write_text(text.replace(section, "".join(f"  {line}\n" for line in lines)))
    return str(path)


@pytest.mark.parametrize(
    ("zero", "found"),
    [
        ({"stage": 2}, (2, False)),
        ({"stage": 3, "zero_hpz_partition_size": 8, "offload_param": {"device": "none"}}, (3, False)),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, (3, True)),
        ({}, (0, False)),
    ],
)
def test_a_deepspeed_config_file_and_what_accelerate_makes_of_it(zero, found, tmp_path, monkeypatch):
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    path = launch_file(tmp_path, "zero3", f"deepspeed_config_file: {file}")
    assert topology_of_file(path) == Topology("DeepSpeed", *found, name=path)
    for name, value in environment_of(path).items():
        monkeypatch.setenv(name, value)
    assert topology_of_environment() == Topology("DeepSpeed", *found, started=True)


@pytest.mark.parametrize(
    ("text", "lines", "sentence"),
    [
        (None, (), r"launch.yaml:5: deepspeed_config_file: no DeepSpeed config at .*deepspeed.json.* \(paths in it start from the current folder\)"),
        ('{\n"zero_optimization": }', (), r"deepspeed.json:2: not valid JSON"),
        ("[]", (), "deepspeed.json: not a DeepSpeed config with a section `zero_optimization`"),
        ('{\n"zero_optimization": {\n"stage": "three"}}', (), "deepspeed.json:3: zero_optimization.stage is 'three'; expected an integer from 0 to 3"),
        ("{}", ("zero_stage: 3",), "launch.yaml:5: zero_stage is not read beside deepspeed_config_file; set it in .*deepspeed.json"),
    ],
)  # fmt: skip
def test_wrong_deepspeed_config_files(text, lines, sentence, tmp_path):
    file = tmp_path / "deepspeed.json"
    if text is not None:
        file.write_text(text)
    path = launch_file(tmp_path, "zero3", f"deepspeed_config_file: {file}", *lines)
    with pytest.raises(UserError, match=sentence):
        topology_of_file(path)


def test_mixed_precision_beside_a_deepspeed_config_file(tmp_path):
    path = Path(launch_file(tmp_path, "zero3", "deepspeed_config_file: d.json"))
    path.write_text(path.read_text() + "mixed_precision: bf16\n")
    with pytest.raises(UserError, match=r"launch.yaml:\d+: mixed_precision is not read beside deepspeed_config_file"):
        topology_of_file(str(path))


def test_hybrid_sharding_of_another_number_of_processes(monkeypatch):
    for name, value in environment_of(ROOT / "launch" / "fsdp2_hsdp.yaml").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(
        UserError, match="sets 2 copies of the model with 2 shards each .* but there are 8 processes; pass"
    ):
        topology_of_environment()


def test_activation_checkpointing_of_fsdp_is_found(tmp_path, monkeypatch):
    path = launch_file(tmp_path, "fsdp2", "fsdp_activation_checkpointing: true")
    assert topology_of_file(path).wraps_layers
    for name, value in environment_of(path).items():
        monkeypatch.setenv(name, value)
    assert topology_of_environment().wraps_layers


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "no launch file at "),
        ("{", r"x.yaml:1:2: not valid YAML"),
        ("- a", "x.yaml:1: a launch file is a list of `key: value` lines"),
        ("num_processes: 2", "not a launch file of accelerate"),
    ],
)
def test_files_that_are_none(text, sentence, tmp_path):
    file = tmp_path / "x.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=sentence):
        topology_of_file(str(file))


@pytest.mark.parametrize(
    ("topology", "values", "cpu", "sentence"),
    [
        (Topology("FSDP", fsdp_version=1), {}, False, "`fsdp_version: 2`, or use launch/fsdp2.yaml"),
        (Topology("FSDP", fsdp_version=2, wraps_layers=True), {}, False, "sets `fsdp_activation_checkpointing`, which renames .* set `gradient_checkpointing: true` in the recipe"),
        (Topology("FSDP", fsdp_version=2, offload=True), {}, True, "already on the CPU; use launch/fsdp2.yaml"),
        (Topology("FSDP", fsdp_version=2), {"load_in_8bit": True}, False, r"r.yaml:1: FSDP can't shard 8-bit weights; use `load_in_4bit: true`, or launch/ddp.yaml"),
        (Topology("DeepSpeed", 3, True), {"optim": "paged_adamw_8bit"}, False, "replace `optim: paged_adamw_8bit` by DeepSpeed's Adam; remove `optim`, or use launch/zero3.yaml"),
        (Topology("DeepSpeed", 3, True), {"optim": "sgd"}, False, "would replace `optim: sgd`"),
    ],
)  # fmt: skip
def test_what_cannot_work(topology, values, cpu, sentence, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/" + name)
    with pytest.raises(UserError, match=sentence):
        check_topology(recipe_with(**values), topology, cpu)


@pytest.mark.parametrize("topology", [Topology("one process"), Topology("DDP"), Topology("DeepSpeed", 2), Topology("DeepSpeed", 3, True), Topology("FSDP", fsdp_version=2)])  # fmt: skip
def test_what_can(topology, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/" + name)
    check_topology(recipe_with(load_in_4bit=True, use_peft=True), topology, True)


def test_deepspeed_and_its_compiler(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs DeepSpeed.*'rlhf-dpo\[deepspeed\]', or use launch/ddp.yaml"):
        check_topology(recipe_with(), Topology("DeepSpeed", 2), False)
    with pytest.raises(UserError, match=r"or use launch/fsdp2.yaml"):
        check_topology(recipe_with(), Topology("DeepSpeed", 3, True), False)
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(topology.shutil, "which", lambda name: None)
    check_topology(recipe_with(), Topology("DeepSpeed", 2), False)  # a GPU's processes talk through NCCL
    with pytest.raises(UserError, match=r"there is no C\+\+ compiler; install g\+\+"):
        check_topology(recipe_with(), Topology("DeepSpeed", 2), True)
    with pytest.raises(UserError, match=r"compile its CPU Adam"):
        check_topology(recipe_with(), Topology("DeepSpeed", 3, True), False)


@pytest.mark.parametrize(
    ("values", "device", "capability", "sentence"),
    [
        ({"load_in_4bit": True}, "mps", None, "r.yaml:1: load_in_4bit is not supported here: bitsandbytes has no kernels for mps; remove load_in_4bit"),
        ({"load_in_4bit": True}, "cuda", (5, 2), "compute capability 5.2, but bitsandbytes needs 6.0"),
        ({"load_in_8bit": True}, "cuda", (7, 0), "compute capability 7.0, but bitsandbytes needs 7.5"),
        ({"reference": "nf4"}, "mps", None, "use `reference: cached`, or set `use_cpu: true`"),
    ],
)  # fmt: skip
def test_devices_without_kernels(values, device, capability, sentence):
    with pytest.raises(UserError, match=sentence):
        check_quantised(recipe_with(**values), device, capability)


def test_devices_with_kernels():
    for device, capability in (("cpu", None), ("cuda", (8, 0)), ("xpu", None)):
        check_quantised(recipe_with(load_in_4bit=True, reference="nf4"), device, capability)
    check_quantised(recipe_with(reference="cached"), "mps", None)


def test_check_takes_a_launch_file(recipe, tiny_llama, few_pairs, tmp_path, capsys):
    file = recipe("dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "o"), optim="sgd")  # fmt: skip
    words = ["--launch", str(ROOT / "launch" / "zero3_offload.yaml")]
    assert main(["dpo", file, "--check", *words]) == 2
    assert "zero3_offload.yaml offloads the optimizer to CPU memory" in capsys.readouterr().err
    assert main(["dpo", file, *words]) == 2
    assert "--launch needs --check; to train: accelerate launch --config_file" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_what_is_missing_is_installed_for_the_python_in_use(monkeypatch):
    from rlhf.errors import pip_install
    from rlhf.training.checks import check_extras

    monkeypatch.setattr(sys, "executable", "/my env/bin/python")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert pip_install("a", "b[c]") == "'/my env/bin/python' -m pip install a 'b[c]'"
    with pytest.raises(UserError, match=r"run: '/my env/bin/python' -m pip install 'rlhf-dpo\[deepspeed\]', or use"):
        check_topology(recipe_with(), Topology("DeepSpeed", 2), False)
    for key, value in (("load_in_4bit", True), ("load_in_8bit", True), ("reference", "nf4"), ("report_to", ["wandb"])):
        package = "wandb" if key == "report_to" else "bitsandbytes"
        with pytest.raises(UserError, match=f"run: '/my env/bin/python' -m pip install {package}$"):
            check_extras(recipe_with(**{key: value}))


def test_no_message_tells_a_bare_pip():
    for file in (ROOT / "rlhf").rglob("*.py"):
        assert not re.search(r"(?<!-m )\bpip install ", file.read_text(encoding="utf-8")), file
