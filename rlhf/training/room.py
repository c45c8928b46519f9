"""The memory that training needs at least on each device, worked out before anything loads."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rlhf.config.build import default_dtype
from rlhf.config.recipe import Recipe
from rlhf.distributed.processes import say, world_size
from rlhf.distributed.topology import Topology
from rlhf.errors import UserError
from rlhf.models.folder import base_of, weight_files

if TYPE_CHECKING:
    from rlhf.training.stage import Plan


class Room(NamedTuple):
    """Bytes on each device, without activations and what is gathered for a moment: a lower bound."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> int:
        return int(sum(self))


def count_weights(folder: Path) -> tuple[int, int]:
    """(parameters, their bytes) of a model on disk, from the headers of its safetensors files, without reading weights."""
    number = num_bytes = 0
    for path in weight_files(folder):
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
        number += sum(math.prod(tensor["shape"]) for tensor in tensors)
        num_bytes += sum(end - start for start, end in (tensor["data_offsets"] for tensor in tensors))
    return number, num_bytes


def training_room(
    parameters: int, bytes_on_disk: int, recipe: Recipe, topology: Topology, world: int, on_cpu: bool
) -> Room:
    """Weights, gradients and what the optimizer keeps on each device; of LoRA the base alone, which is most of it.

    fp32 weights take 4 bytes each (16-bit `dtype` 2, 8-bit 1, 4-bit 0.5, LoRA's base on a GPU what it takes on disk: see
    `default_dtype`); trained weights take as much again for the gradient and twice as much for Adam's moments (8-bit Adam: 2
    bytes; of other optimizers nothing is counted). Under DeepSpeed in 16 bits weights and gradients take 2, and the optimizer
    4 more for its fp32 weights. ZeRO-1 shards the optimizer's part over the ranks,
    ZeRO-2 also the gradients, ZeRO-3 and FSDP2 all three; of quantised weights FSDP2 those in 4 bits (four_bits.py).
    """
    one = 2.0 if recipe.get("dtype") in ("bfloat16", "float16") else 4.0
    if default_dtype(recipe, on_cpu, bf16=True) == "auto":
        one = bytes_on_disk / max(parameters, 1)
    optim = recipe.get("optim", "adamw_torch")
    moments = 2.0 if "8bit" in optim else 1.0 if "4bit" in optim else 0.0 if "adam" not in optim else None
    gradient, adam = one, 2 * one if moments is None else moments
    asked = any(recipe.get(key) for key in ("bf16", "fp16")) or topology.mixed_precision != "no"
    if topology.engine == "DeepSpeed" and (asked or not on_cpu and "bf16" not in recipe.values):
        one, gradient, adam = 2.0, 2.0, 4.0 + (8.0 if moments is None else moments)
    held = 0.5 if recipe.get("load_in_4bit") else 1.0 if recipe.get("load_in_8bit") else one
    if recipe.uses_lora:
        gradient = adam = 0.0
    stage = 3 if topology.engine == "FSDP" else topology.zero_stage
    if topology.offload:
        held, adam = held if stage < 3 else 0.0, 0.0
    share = [1.0 if stage < least else 1.0 / world for least in (3, 2, 1)]
    if recipe.is_quantised and not _shards_quantised(recipe, topology):
        share[0] = 1.0
    return Room(parameters * held * share[0], parameters * gradient * share[1], parameters * adam * share[2])


def _shards_quantised(recipe: Recipe, topology: Topology) -> bool:
    return topology.engine == "FSDP" and not recipe.get("load_in_8bit") and not recipe.get("use_dora")


def tell_replicated(plan: Plan) -> None:
    """Say what each process holds of quantised weights where the engine shards all others, and which key has no effect."""
    recipe, topology, folder = plan.recipe, plan.topology, base_of(plan.model_name)
    if not recipe.is_quantised or topology.engine != "FSDP" and topology.zero_stage != 3:
        return
    fsdp, key = topology.engine == "FSDP", "bnb_4bit_quant_storage"
    if fsdp and key in recipe.values:
        say(f"note: {recipe.where(key)}: {key} has no effect under FSDP2, which decides how 4-bit weights are stored")
    if not _shards_quantised(recipe, topology) and os.path.isdir(folder):  # a hub's model is counted once it is there
        held = _gb(count_weights(Path(folder))[0] * (0.5 if recipe.get("load_in_4bit") else 1.0))
        which = "FSDP2 shards no 4-bit weights of a model with DoRA" if fsdp else "ZeRO-3 shards no quantised weights"
        instead = "" if fsdp else "; launch/fsdp2.yaml shards those in 4 bits"
        say(f"note: {which}: each process holds all of them, at least {held}{instead}")


def check_memory(plan: Plan) -> None:
    """Refuse a run whose weights, gradients and optimizer alone are more than a GPU has.

    Raises:
        UserError: with the numbers, and what would fit.
    """
    folder = base_of(plan.model_name)
    if plan.args.device.type != "cuda" or not os.path.isdir(folder):  # a hub's model is counted once it is there
        return
    import torch

    counted, world = count_weights(Path(folder)), world_size()
    has = torch.cuda.get_device_properties(plan.args.device).total_memory
    needs = training_room(*counted, plan.recipe, plan.topology, world, False)
    if needs.total <= has:
        return
    parts = f"weights {_gb(needs.weights)}, gradients {_gb(needs.gradients)}, optimizer {_gb(needs.optimizer)}"
    fits = _what_fits(counted, plan.recipe, plan.topology, world, has)
    raise UserError(
        f"{plan.recipe.where('model_name_or_path')}: {counted[0] / 1e9:.1f} billion parameters need at least {_gb(needs.total)} on "
        f"each device ({parts}), and this one has {_gb(has)}; nothing was loaded. {fits}"
    )


def _what_fits(counted: tuple[int, int], recipe: Recipe, topology: Topology, world: int, has: int) -> str:
    sharded = Topology("FSDP", fsdp_version=2, mixed_precision=topology.mixed_precision)
    lora = dataclasses.replace(recipe, values=recipe.values | {"use_peft": True})
    qlora = dataclasses.replace(lora, values=lora.values | {"load_in_4bit": True})
    ways = [
        ("launch/fsdp2.yaml", recipe, sharded), ("`use_peft: true`", lora, topology),
        ("`use_peft: true` with launch/fsdp2.yaml", lora, sharded), ("`use_peft: true` and `load_in_4bit: true`", qlora, topology),
        ("`use_peft: true` and `load_in_4bit: true` with launch/fsdp2.yaml", qlora, sharded),
    ]  # fmt: skip
    if topology.engine == "FSDP":
        del ways[-1]
    rooms = [(way, training_room(*counted, other, where, world, False).total) for way, other, where in ways]
    fitting = [f"{way} ({_gb(room)})" for way, room in rooms if room <= 0.9 * has]
    if fitting:
        return f"This could fit: {' or '.join(fitting[:2])}"
    return f"Shard it over more GPUs with launch/fsdp2.yaml: here {_gb(rooms[0][1])} on each of {world}"


def _gb(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if 0 < size < 1e8 else f"{size / 1e9:.1f} GB"
