"""What a launch file sets up, and which recipes can't be trained with it. Reads YAML, JSON and the environment, no torch."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from typing import Any

from rlhf.config.build import check_precision
from rlhf.config.recipe import Recipe
from rlhf.config.yaml_reader import quote_path, read_flat, read_text
from rlhf.distributed.processes import world_size
from rlhf.errors import UserError, pip_install, quote

KINDS = frozenset(
    "NO False DEEPSPEED FSDP MULTI_GPU MULTI_CPU MULTI_XPU MULTI_NPU MULTI_MLU MULTI_SDAA MULTI_MUSA MULTI_HPU MULTI_NEURON".split()
)
# Parallelism within layers or sequences, which accelerate has, but packing and TRL's losses don't support.
NOT_SUPPORTED = {"tp_size": "tensor", "cp_size": "context", "sp_size": "sequence"}
# What accelerate refuses beside `deepspeed_config_file`, once the processes have started.
NOT_BESIDE_JSON = (
    "zero_stage", "offload_optimizer_device", "offload_param_device", "offload_optimizer_nvme_path",
    "offload_param_nvme_path", "zero3_save_16bit_model", "gradient_accumulation_steps", "gradient_clipping",
)  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """How a run is distributed over its processes.

    Attributes:
        engine: `one process`, `DDP`, `DeepSpeed` or `FSDP`.
        zero_stage: DeepSpeed's, 0 to 3.
        offload: whether DeepSpeed or FSDP keeps weights or optimizer in CPU memory.
        fsdp_version: 1 or 2; 0 without FSDP.
        name: the launch file, as named in messages.
        mixed_precision: the file's value; `no` leaves it to the recipe.
        parallel: kinds of parallelism that the file sets and that are not supported here.
        wraps_layers: FSDP's own activation checkpointing is on.
        started: True if this process was launched with it, False if read from a file for a later launch.
    """

    engine: str
    zero_stage: int = 0
    offload: bool = False
    fsdp_version: int = 0
    name: str = "the launch file"
    mixed_precision: str = "no"
    parallel: tuple[str, ...] = ()
    wraps_layers: bool = False
    started: bool = False

    def record(self, processes: int) -> dict[str, Any]:
        """For a checkpoint's manifest: the engine, whether and how it shards checkpoints, and the world size."""
        engine = f"{self.engine} ZeRO-{self.zero_stage}" if self.engine == "DeepSpeed" else self.engine
        split = {"DeepSpeed": engine, "FSDP": "FSDP"}.get(self.engine, "no")
        return {"engine": engine, "split": split, "processes": processes}


def topology_of_environment() -> Topology:
    """The topology that `accelerate launch` has set in the environment.

    Raises:
        UserError: a variable has a value that accelerate never sets.
    """
    env = os.environ
    more: dict[str, Any] = {"started": True, "mixed_precision": env.get("ACCELERATE_MIXED_PRECISION", "no").lower()}
    if env.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
        more["parallel"] = tuple(
            kind
            for size, kind in NOT_SUPPORTED.items()
            if _from_environment(f"PARALLELISM_CONFIG_{size.upper()}", 1) > 1
        )
        _check_mesh()
    if env.get("ACCELERATE_USE_DEEPSPEED") == "true":
        if file := env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
            return Topology("DeepSpeed", *read_deepspeed_json(file, "the launch file's deepspeed_config_file"), **more)
        devices = {env.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none") for what in ("OPTIMIZER", "PARAM")}
        stage = _from_environment("ACCELERATE_DEEPSPEED_ZERO_STAGE", 0)
        return Topology("DeepSpeed", stage, bool(devices - {"none"}), **more)
    if env.get("ACCELERATE_USE_FSDP") == "true":
        version = _from_environment("FSDP_VERSION", 1)
        more["wraps_layers"] = env.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true"
        return Topology("FSDP", 0, env.get("FSDP_OFFLOAD_PARAMS") == "true", version, **more)
    return Topology("DDP" if _from_environment("WORLD_SIZE", 1) > 1 else "one process", **more)


def _check_mesh() -> None:
    """Reject a hybrid-sharded launch file that was written for another number of processes."""
    copies = _from_environment("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", 1)
    shards = _from_environment("PARALLELISM_CONFIG_DP_SHARD_SIZE", 1)
    if copies * shards not in (1, world_size()):
        raise UserError(
            f"the launch file sets {copies} copies of the model with {shards} shards each (dp_replicate_size and "
            f"dp_shard_size of its parallelism_config), but there are {world_size()} processes; pass "
            "--parallelism_config_dp_replicate_size and --parallelism_config_dp_shard_size to accelerate launch so that "
            "their product is the number of processes"
        )


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.strip().isdecimal():
        raise UserError(
            f"the environment's {name} is {quote(value)}; expected an integer, as accelerate launch sets it"
        )
    return int(value)


def topology_of_file(path: str) -> Topology:
    """The topology that a launch file will set up.

    Raises:
        UserError: no such file, not a launch file of accelerate, or an invalid value; with file and line.
    """
    found, lines = read_flat(path, "launch file")
    name = quote_path(path)
    kind = found.get("distributed_type")
    if not isinstance(kind, (str, bool)):
        raise UserError(f"{name}: not a launch file of accelerate (`distributed_type:` is missing)")
    if str(kind) not in KINDS:
        raise UserError(
            f"{name}:{lines['distributed_type']}: 'distributed_type' is {quote(kind)}; expected NO, MULTI_GPU, MULTI_CPU, "
            "DEEPSPEED or FSDP"
        )
    file = _File(name, found, lines)
    parallel = file.section("parallelism_config")
    sizes = {kind: file.number("parallelism_config", parallel, f"parallelism_config_{size}", 1, 1, 2**20)
             for size, kind in NOT_SUPPORTED.items()}  # fmt: skip
    more: dict[str, Any] = {
        "name": path, "mixed_precision": file.precision(),
        "parallel": tuple(kind for kind, size in sizes.items() if size > 1),
    }  # fmt: skip
    if kind == "DEEPSPEED":
        config = file.section("deepspeed_config")
        if config.get("deepspeed_config_file") is not None:
            return Topology("DeepSpeed", *file.deepspeed_json(config), **more)
        devices = {config.get(f"offload_{what}_device") or "none" for what in ("optimizer", "param")}
        stage = file.number("deepspeed_config", config, "zero_stage", 0, 0, 3)
        return Topology("DeepSpeed", stage, bool(devices - {"none"}), **more)
    if kind == "FSDP":
        config = file.section("fsdp_config")
        version = file.number("fsdp_config", config, "fsdp_version", 1, 1, 2)
        more["wraps_layers"] = bool(config.get("fsdp_activation_checkpointing"))
        return Topology("FSDP", 0, bool(config.get("fsdp_offload_params")), version, **more)
    return Topology("one process" if str(kind) in ("NO", "False") else "DDP", **more)


def read_deepspeed_json(path: str, where: str) -> tuple[int, bool]:
    """(ZeRO stage, whether it offloads) of a DeepSpeed config file.

    Args:
        path: absolute, or from the current folder, as DeepSpeed's own config files are found.
        where: what names the file, for messages.

    Raises:
        UserError: there is no such file, or it is not a DeepSpeed config; with its line where it has one.
    """
    try:
        text = read_text(path, "DeepSpeed config")
    except UserError as error:
        raise UserError(f"{where}: {error} (paths in it start from the current folder)") from None
    name = quote_path(path)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{name}{line}: not valid JSON ({error})") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict):
        raise UserError(f"{name}: not a DeepSpeed config with a section `zero_optimization`, which accelerate needs")
    stage = zero.get("stage", 0)
    if not isinstance(stage, int) or isinstance(stage, bool) or not 0 <= stage <= 3:
        raise UserError(
            f"{name}{_line_of(text, 'stage')}: zero_optimization.stage is {quote(stage)}; expected an integer from 0 to 3"
        )
    parts = [zero.get(f"offload_{what}") for what in ("optimizer", "param")]
    devices = {part.get("device") or "none" for part in parts if isinstance(part, dict)}
    return stage, bool(devices - {"none"})


def _line_of(text: str, key: str) -> str:
    """`:LINE` of a key's first place in a JSON text."""
    before, found, _ = text.partition(f'"{key}"')
    return f":{before.count(chr(10)) + 1}" if found else ""


@dataclass(frozen=True)
class _File:
    """A launch file's values, read with checks."""

    name: str
    values: dict[str, Any]
    lines: dict[str, int | None]

    def section(self, key: str) -> dict[str, Any]:
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise UserError(
                f"{self.name}:{self.lines[key]}: '{key}' is {quote(value)}; expected `key: value` lines below it"
            )
        for inner, part in value.items():
            if not isinstance(part, (str, int, float, bool, type(None))):
                raise UserError(f"{self.name}:{self.lines[key]}: {key}.{inner} is {quote(part)}; expected one value")
        return value

    def number(self, key: str, section: dict[str, Any], inner: str, default: int, low: int, high: int) -> int:
        value = section.get(inner, default)
        if isinstance(value, str) and value.strip().isdecimal() and len(value) < 10:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise UserError(
                f"{self.name}:{self.lines[key]}: {key}.{inner} is {quote(value)}; expected an integer from {low} to {high}"
            )
        return value

    def deepspeed_json(self, section: dict[str, Any]) -> tuple[int, bool]:
        """`read_deepspeed_json` of the file that the section names."""
        where, path = f"{self.name}:{self.lines['deepspeed_config']}", section["deepspeed_config_file"]
        if not isinstance(path, str):
            raise UserError(f"{where}: deepspeed_config.deepspeed_config_file is {quote(path)}; expected a path")
        twice = [key for key in NOT_BESIDE_JSON if key in section]
        if twice or "mixed_precision" in self.values:
            where = where if twice else f"{self.name}:{self.lines['mixed_precision']}"
            raise UserError(
                f"{where}: {(twice or ['mixed_precision'])[0]} is not read beside deepspeed_config_file; set it in {quote_path(path)}"
            )
        return read_deepspeed_json(path, f"{where}: deepspeed_config_file")

    def precision(self) -> str:
        value = self.values.get("mixed_precision")
        value = "no" if value is None or value is False else value  # YAML reads a bare no as false
        if value not in ("no", "bf16", "fp16", "fp8"):
            raise UserError(
                f"{self.name}:{self.lines['mixed_precision']}: 'mixed_precision' is {quote(value)}; expected no, bf16 or fp16"
            )
        return value


def check_topology(recipe: Recipe, topology: Topology, on_cpu: bool) -> None:
    """Reject combinations that can't work, and suggest the closest launch file that can.

    Raises:
        UserError: with the reason and the fix, before a model loads.
    """
    if topology.mixed_precision == "fp8":
        raise UserError(
            f"{topology.name} sets `mixed_precision: fp8`, which has not been verified with packed batches and this "
            "project's losses; use bf16"
        )
    if topology.parallel:
        raise UserError(
            f"{topology.name} sets {' and '.join(topology.parallel)} parallelism, which is not supported: shard the model with "
            "launch/fsdp2.yaml or launch/zero3.yaml, and use `gradient_checkpointing: true` for long rows"
        )
    check_precision(recipe, topology.mixed_precision, topology.name)
    if topology.engine == "DeepSpeed":
        _check_deepspeed(topology, on_cpu)
    if topology.engine == "FSDP" and topology.fsdp_version != 2:
        raise UserError(
            f"{topology.name} sets FSDP {topology.fsdp_version}, whose flattened parameters can't be saved as a model; "
            "set `fsdp_version: 2`, or use launch/fsdp2.yaml"
        )
    if topology.wraps_layers:
        raise UserError(
            f"{topology.name} sets `fsdp_activation_checkpointing`, which renames the model's parameters (PyTorch's checkpoint "
            "wrapper), so that the trained model couldn't be saved; remove it, and set `gradient_checkpointing: true` in the recipe"
        )
    if topology.engine == "FSDP" and topology.offload and on_cpu:
        raise UserError(
            f"{topology.name} offloads to CPU memory, but this run is already on the CPU; use launch/fsdp2.yaml"
        )
    if topology.engine == "FSDP" and recipe.get("load_in_8bit"):
        raise UserError(
            f"{recipe.where('load_in_8bit')}: FSDP can't shard 8-bit weights; use `load_in_4bit: true`, or "
            "launch/ddp.yaml"
        )
    optimizer = recipe.get("optim", "adamw_torch")
    if topology.engine == "DeepSpeed" and topology.offload and optimizer not in ("adamw_torch", "adamw_torch_fused"):
        raise UserError(
            f"{recipe.where('optim')}: {topology.name} offloads the optimizer to CPU memory, where accelerate would replace "
            f"`optim: {optimizer}` by DeepSpeed's Adam; remove `optim`, or use launch/zero3.yaml"
        )


def _check_deepspeed(topology: Topology, on_cpu: bool) -> None:
    instead = "launch/fsdp2.yaml" if topology.zero_stage == 3 else "launch/ddp.yaml"
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"{topology.name} needs DeepSpeed, which is not installed; run: {pip_install('rlhf-dpo[deepspeed]')}, or use "
            f"{instead}, which doesn't need it"
        )
    if (topology.offload or on_cpu) and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            f"{topology.name} makes DeepSpeed compile {'its CPU Adam' if topology.offload else 'a part of itself'}, "
            f"but there is no C++ compiler; install g++ (apt-get install g++), or use {instead}"
        )


def check_quantised(recipe: Recipe, device: str, capability: tuple[int, int] | None) -> None:
    """Reject 4- and 8-bit weights if bitsandbytes has no kernels for the device.

    Args:
        device: `cpu`, `cuda`, `mps`, ...
        capability: CUDA's compute capability of the device, or None.

    Raises:
        UserError: with the device and what to do.
    """
    quantised = [key for key in ("load_in_4bit", "load_in_8bit") if recipe.get(key)]
    quantised += ["reference"] if recipe.get("reference") == "nf4" else []
    for key in quantised:
        needed = (7, 5) if key == "load_in_8bit" else (6, 0)  # bitsandbytes' own table
        if device not in ("cpu", "cuda", "xpu", "hpu"):
            reason = f"bitsandbytes has no kernels for {device}"
        elif capability is not None and capability < needed:
            found, least = (".".join(map(str, c)) for c in (capability, needed))
            reason = f"this GPU has compute capability {found}, but bitsandbytes needs {least}"
        else:
            continue
        fix = "use `reference: cached`" if key == "reference" else f"remove {key}"
        raise UserError(f"{recipe.where(key)}: {key} is not supported here: {reason}; {fix}, or set `use_cpu: true`")


def check_devices(args, recipe: Recipe) -> None:
    """Refuse quantisation that this device can't compute, and several GPUs that one process would leave idle.

    Raises:
        UserError: with what to do.
    """
    import torch

    capability = torch.cuda.get_device_capability() if args.device.type == "cuda" else None
    check_quantised(recipe, args.device.type, capability)
    if not args.use_cpu and torch.cuda.device_count() > 1 and world_size() == 1:
        count = torch.cuda.device_count()
        raise UserError(
            f"{count} GPUs are visible to one process; use them all with `accelerate launch --config_file "
            f"launch/ddp.yaml --num_processes {count} -m rlhf {recipe.stage} {recipe.path}`, or one with "
            "CUDA_VISIBLE_DEVICES=0"
        )
