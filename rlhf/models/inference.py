"""Load finished models for inference: on one device, or spread over a process's GPUs where one is too small.

An adapter stays unmerged on its base: merging would round it to the base's dtype, and can't be done in 4 bits.
"""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.errors import UserError, pip_install
from rlhf.files import read_json
from rlhf.models.folder import base_of, is_adapter
from rlhf.models.loading import keep_4bit_layout
from rlhf.models.tokenizer import fit_tokenizer, load_tokenizer

GIB = 1 << 30
# Beside the weights: 1 GiB of logits, and the cache of 16 prompts of 1,120 tokens (2.2 GiB in a Llama of 8B)
ROOM = 4 * GIB
LEAST_ROOM = GIB // 2  # short prompts work with that; the CUDA context is part of what is not free
UNEVEN = 1.05  # layers are not cut in two, so several GPUs are never filled to the brim
BYTES_4BIT = 0.5 + 4 / 64  # two weights per byte, and an fp32 scale per block of 64


def load_finished(
    name: str,
    reward: bool = False,
    dtype: str | None = None,
    device: str | torch.device = "cpu",
    load_in_4bit: bool = False,
):
    """Load a finished model for inference: a full model, or an adapter on its base.

    Args:
        dtype: default: the checkpoint's.
        device: of this process; a model that does not fit on a GPU is spread over those that this process has.
        load_in_4bit: quantise the model, or an adapter's base: as in training, if `name` is the output of a QLoRA run,
            else as TRL does by default.

    Returns:
        (model in eval mode, tokenizer)

    Raises:
        UserError: the weights don't fit on the GPUs; nothing was loaded.
    """
    device = torch.device(device)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype) if dtype else "auto", "use_safetensors": True}
    if load_in_4bit:
        options["quantization_config"] = quantisation_of(name, dtype, device)
    if reward and is_adapter(name):
        options["num_labels"] = 1
    options |= placement(name, dtype, device, load_in_4bit)
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    tokenizer = load_tokenizer(name, encoder=reward)
    model = fit_tokenizer(keep_4bit_layout(auto.from_pretrained(base_of(name), **options)), tokenizer)
    if is_adapter(name):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, name)
    if "device_map" not in options:
        model = model.to(device)
    elif outside := {str(part) for part in getattr(model, "hf_device_map", {}).values()} & {"cpu", "disk"}:
        raise UserError(
            f"{name} does not fit on the GPUs layer by layer: a part of it would be on the {' and '.join(sorted(outside))}; "
            "give it one more GPU, or load_in_4bit"
        )
    return model.eval(), tokenizer


def quantisation_of(name: str, dtype: str | None, device: torch.device):
    """The 4-bit quantisation that a run was trained with, if `name` is its folder, else TRL's default (NF4)."""
    from transformers import BitsAndBytesConfig

    check_bitsandbytes()
    arguments = (read_json(Path(name) / "provenance.json") or {}).get("arguments")
    trained = arguments.get("model") if isinstance(arguments, dict) else None
    trained = trained if isinstance(trained, dict) and trained.get("load_in_4bit") is True else {}
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=trained.get("bnb_4bit_quant_type", "nf4"),
        bnb_4bit_use_double_quant=trained.get("use_bnb_nested_quant", False),
        bnb_4bit_compute_dtype=getattr(torch, dtype) if dtype else default,
    )


def check_bitsandbytes() -> None:
    """Raise UserError if bitsandbytes, which 4-bit weights need, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"load_in_4bit needs bitsandbytes; run: {pip_install('bitsandbytes')}")


# --- which devices ---------------------------------------------------------------------------------------------------


def placement(name: str, dtype: str | None, device: torch.device, in_4bit: bool) -> dict[str, Any]:
    """`device_map` and `max_memory` for transformers; {} on CPUs.

    Raises:
        UserError: with what is needed, what is free, and what would fit.
    """
    if device.type != "cuda":
        return {}
    free = free_memory(own_gpus(device))
    tensors = stored_tensors(base_of(name))
    adapter = Path(name) / "adapter_model.safetensors"
    extra = adapter.stat().st_size if adapter.is_file() else 0
    needed = num_bytes(tensors, dtype, in_4bit) + extra
    room = memory_to_use(needed, free)
    if room is None:
        raise UserError(_refusal(name, dtype, needed, tensors, free, in_4bit))
    if len(room) == 1:
        return {"device_map": {"": next(iter(room))}}
    return {"device_map": "auto", "max_memory": room}


def own_gpus(device: torch.device) -> list[int]:
    """The GPUs of this process, its own one first: of G visible and L processes on this host, every L-th."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    own = torch.cuda.current_device() if device.index is None else device.index
    return [own, *(i for i in range(torch.cuda.device_count()) if i != own and i % processes == own % processes)]


def free_memory(gpus: list[int]) -> dict[int, int]:
    """Free bytes by GPU."""
    return {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in gpus}


def memory_to_use(needed: int, free: dict[int, int]) -> dict[int, int] | None:
    """Bytes by GPU that weights of `needed` bytes may take; None if they don't fit.

    Args:
        free: by GPU, this process's own one first, which is used alone where the weights fit with ROOM to work in.

    Example: 30 GiB on {0: 24 GiB, 1: 24 GiB} -> {0: 20 GiB, 1: 20 GiB}.
    """
    own = next(iter(free))
    if needed + ROOM <= free[own]:
        return {own: free[own]}
    for room in (ROOM, LEAST_ROOM):
        usable = {gpu: there - room for gpu, there in free.items() if there > room}
        if len(usable) > 1 and needed * UNEVEN <= sum(usable.values()):
            return usable
        if needed + room <= free[own]:
            return {own: free[own]}
    return None


def _refusal(
    name: str, dtype: str | None, needed: int, tensors: list[Stored], free: dict[int, int], in_4bit: bool
) -> str:
    import psutil

    would_fit = []
    small = num_bytes(tensors, dtype, in_4bit=True)
    if not in_4bit and memory_to_use(small, free):
        would_fit.append(f"load_in_4bit (about {small / GIB:.1f} GiB)")
    largest = max(free.values()) - ROOM
    if largest > 0:
        would_fit.append(f"{max(2, math.ceil(needed * UNEVEN / largest))} such GPUs for this process")
    host = psutil.virtual_memory().available
    for precision in ("float32", "bfloat16"):
        on_cpu = num_bytes(tensors, dtype or precision, in_4bit=False)
        if on_cpu < host and not in_4bit:
            how = "" if dtype or precision == "float32" else " and dtype: bfloat16"
            would_fit.append(
                f"the CPU with {host / GIB:.1f} GiB free (`use_cpu: true`{how} in a recipe, CUDA_VISIBLE_DEVICES= for a chat; "
                f"{on_cpu / GIB:.1f} GiB)"
            )
            break
    there = ", ".join(f"{there / GIB:.1f}" for there in free.values())
    gpus = "the GPU of this process has" if len(free) == 1 else f"the {len(free)} GPUs of this process have"
    return (
        f"{name} does not fit: its weights take {needed / GIB:.1f} GiB{' in 4 bits' if in_4bit else ''}, and {gpus} {there} "
        f"GiB free; what would fit: {'; '.join(would_fit) or 'GPUs with more memory'}"
    )


# --- how many bytes --------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor of a checkpoint, or several: elements, bytes per element, whether bitsandbytes quantises it."""

    elements: int
    itemsize: float
    is_linear: bool


def num_bytes(tensors: list[Stored], dtype: str | None, in_4bit: bool) -> int:
    """Bytes of a checkpoint's weights when loaded in `dtype` (None: as stored)."""
    size = getattr(torch, dtype).itemsize if dtype else None
    return math.ceil(sum(t.elements * (BYTES_4BIT if in_4bit and t.is_linear else size or t.itemsize) for t in tensors))


def stored_tensors(name: str) -> list[Stored]:
    """The tensors of a model, from the headers of its safetensors files; of a sharded one on the hub, from its index.

    Args:
        name: a model that `locate` returned.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    folder = Path(name)
    if folder.is_dir():
        index = read_json(folder / SAFE_WEIGHTS_INDEX_NAME)
        files = sorted(set(index["weight_map"].values())) if index else [SAFE_WEIGHTS_NAME]
        return [tensor for file in files for tensor in _headers(folder / file)]
    try:
        found = cached_file(name, SAFE_WEIGHTS_INDEX_NAME)
    except OSError:  # there is none: one file, which is fetched now instead of when it loads
        return _headers(Path(str(cached_file(name, SAFE_WEIGHTS_NAME))))
    stored = (getattr(AutoConfig.from_pretrained(name), "dtype", None) or torch.float32).itemsize
    total = (read_json(str(found)) or {}).get("metadata", {}).get("total_size", 0)
    return [Stored(int(total / stored), stored, True)]


def _headers(file: Path) -> list[Stored]:
    from safetensors import safe_open

    tensors = []
    with safe_open(file, "pt") as opened:
        for name in opened.keys():
            part = opened.get_slice(name)
            shape = part.get_shape()
            outside = any(word in name for word in ("embed", "wte", "wpe", "lm_head", "score", "classifier"))
            itemsize = _ITEMSIZES.get(part.get_dtype(), 4)
            tensors.append(Stored(math.prod(shape), itemsize, len(shape) == 2 and not outside))
    return tensors


_ITEMSIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
              "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
