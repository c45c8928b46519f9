"""What a launch file sets up, and which recipes can't be trained under it. Reads YAML and the environment, no torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.config import Recipe, UserError
from rlhf.errors import pip_install


@dataclass(frozen=True)
class Layout:
    """How a run is spread over its processes.

    Attributes:
        engine: `one process`, `DDP`, `DeepSpeed` or `FSDP`.
        zero_stage: 0 to 3; of DeepSpeed.
        offload: whether DeepSpeed or FSDP keeps weights or optimizer in the machine's memory.
        fsdp_version: 1 or 2; 0 without FSDP.
        name: the launch file, or what is known of it.
    """

    engine: str
    zero_stage: int = 0
    offload: bool = False
    fsdp_version: int = 0
    name: str = "the launch file"

    def record(self, processes: int) -> dict[str, Any]:
        """For a checkpoint's manifest: the engine, whether and how it splits what it saves, and over how many processes."""
        engine = f"{self.engine} ZeRO-{self.zero_stage}" if self.engine == "DeepSpeed" else self.engine
        split = {"DeepSpeed": engine, "FSDP": "FSDP"}.get(self.engine, "no")
        return {"engine": engine, "split": split, "processes": processes}


def layout_of_environment() -> Layout:
    """What `accelerate launch` has told this process."""
    env = os.environ
    if env.get("ACCELERATE_USE_DEEPSPEED") == "true":
        devices = {env.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none") for what in ("OPTIMIZER", "PARAM")}
        return Layout("DeepSpeed", int(env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 0)), bool(devices - {"none"}))
    if env.get("ACCELERATE_USE_FSDP") == "true":
        return Layout("FSDP", 0, env.get("FSDP_OFFLOAD_PARAMS") == "true", int(env.get("FSDP_VERSION", 1)))
    return Layout("DDP" if int(env.get("WORLD_SIZE", 1)) > 1 else "one process")


def layout_of_file(path: str) -> Layout:
    """What a launch file will set up.

    Raises:
        UserError: no such file, or none that accelerate reads.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no launch file at {path}; the project's own are in launch/")
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        kind = found["distributed_type"]
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError):
        raise UserError(f"{path}: no launch file of accelerate's (a `distributed_type:` is missing)") from None
    if kind == "DEEPSPEED":
        config = found.get("deepspeed_config") or {}
        devices = {config.get(f"offload_{what}_device", "none") for what in ("optimizer", "param")}
        return Layout("DeepSpeed", int(config.get("zero_stage", 0)), bool(devices - {"none"}), name=path)
    if kind == "FSDP":
        config = found.get("fsdp_config") or {}
        return Layout("FSDP", 0, bool(config.get("fsdp_offload_params")), int(config.get("fsdp_version", 1)), path)
    return Layout("one process" if str(kind) in ("NO", "False") else "DDP", name=path)


def check_layout(recipe: Recipe, layout: Layout, on_cpu: bool) -> None:
    """Refuse what can't work, with the nearest launch file that does.

    Raises:
        UserError: with the reason and the fix; nothing has been loaded by then.
    """
    if layout.engine == "DeepSpeed":
        _check_deepspeed(layout, on_cpu)
    if layout.engine == "FSDP" and layout.fsdp_version != 2:
        raise UserError(
            f"{layout.name} asks for FSDP {layout.fsdp_version}, whose flattened parameters can't be written as a model; "
            "set `fsdp_version: 2`, or use launch/fsdp2.yaml"
        )
    if layout.engine == "FSDP" and layout.offload and on_cpu:
        raise UserError(
            f"{layout.name} offloads to the CPU's memory, and this run is on the CPU already; use launch/fsdp2.yaml"
        )
    if layout.engine == "FSDP" and recipe.get("load_in_8bit"):
        raise UserError(
            f"{recipe.where('load_in_8bit')}: FSDP can't split 8-bit weights; use `load_in_4bit: true`, or "
            "launch/ddp.yaml"
        )
    optimizer = recipe.get("optim", "adamw_torch")
    if layout.engine == "DeepSpeed" and layout.offload and optimizer not in ("adamw_torch", "adamw_torch_fused"):
        raise UserError(
            f"{recipe.where('optim')}: {layout.name} keeps the optimizer in the machine's memory, where accelerate would put "
            f"DeepSpeed's Adam in the place of `optim: {optimizer}`; remove `optim`, or use launch/zero3.yaml"
        )


def _check_deepspeed(layout: Layout, on_cpu: bool) -> None:
    instead = "launch/fsdp2.yaml" if layout.zero_stage == 3 else "launch/ddp.yaml"
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"{layout.name} needs DeepSpeed, which is not installed; run: {pip_install('rlhf-dpo[deepspeed]')}, or use "
            f"{instead}, which needs nothing more"
        )
    if (layout.offload or on_cpu) and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            f"{layout.name} makes DeepSpeed compile {'its Adam for the CPU' if layout.offload else 'a part of itself'}, "
            f"and there is no C++ compiler; install g++ (apt-get install g++), or use {instead}"
        )


def check_quantised(recipe: Recipe, device: str, capability: tuple[int, int] | None) -> None:
    """Refuse 4- and 8-bit weights where bitsandbytes has no kernels for them.

    Args:
        device: `cpu`, `cuda`, `mps`, ...
        capability: CUDA's compute capability of the device, or None.

    Raises:
        UserError: with the device and what to do.
    """
    asked = [key for key in ("load_in_4bit", "load_in_8bit") if recipe.get(key)]
    asked += ["reference"] if recipe.get("reference") == "nf4" else []
    for key in asked:
        needed = (7, 5) if key == "load_in_8bit" else (6, 0)  # bitsandbytes' own table
        if device not in ("cpu", "cuda", "xpu", "hpu"):
            reason = f"bitsandbytes has no kernels for {device}"
        elif capability is not None and capability < needed:
            found, least = (".".join(map(str, c)) for c in (capability, needed))
            reason = f"this GPU's compute capability is {found}, and bitsandbytes needs {least}"
        else:
            continue
        fix = "use `reference: cached`" if key == "reference" else f"remove {key}"
        raise UserError(f"{recipe.where(key)}: {key} can't be computed here: {reason}; {fix}, or set `use_cpu: true`")
