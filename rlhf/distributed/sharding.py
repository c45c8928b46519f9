"""Parameters sharded by ZeRO-3 or FSDP2: the one place that knows how either engine shards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def is_zero3(parameter) -> bool:
    return hasattr(parameter, "ds_id")


def is_sharded(parameter) -> bool:
    """Whether this rank holds only a shard of the parameter."""
    return is_zero3(parameter) or hasattr(parameter, "full_tensor")


def num_elements(parameter) -> int:
    """Number of elements of a parameter: unsharded under ZeRO-3, and unpacked if bitsandbytes stores two per byte."""
    if (number := getattr(parameter, "num_weights", None)) is not None:
        return number  # of four_bits.py
    state = getattr(parameter, "quant_state", None)
    if state is not None and getattr(state, "shape", None) is not None:
        return state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def unsharded_shape(parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3 the parameter itself has size 0


@contextlib.contextmanager
def unsharded(parameter):
    """The unsharded tensor of a parameter; a collective that all ranks must enter."""
    if is_zero3(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data
    else:
        yield full_tensor(parameter)


def reshard(model) -> None:
    """Free what FSDP2 keeps unsharded after a forward pass, in the compute dtype; other engines keep nothing."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.reshard()


@contextlib.contextmanager
def plain_class(model):
    """Inside the block the model is of its own class; FSDP2 makes another of it, in a module of torch's."""
    from torch.distributed.fsdp import FSDPModule

    found = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = found.__mro__[2]  # after (FSDPLlamaForCausalLM, FSDPModule)
    try:
        yield
    finally:
        model.__class__ = found


def full_tensor(tensor):
    """The unsharded tensor of a DTensor (a collective that all ranks must enter); any other tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextlib.contextmanager
def writable(parameter):
    """Unshard a ZeRO-3 parameter on all ranks inside the block; the value that rank 0 writes becomes its value."""
    if not is_zero3(parameter):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield


@contextlib.contextmanager
def loading_unsharded():
    """Load models inside the block as one process does, also under ZeRO-3 and FSDP."""
    from transformers.integrations import deepspeed

    config, fsdp = deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop("ACCELERATE_USE_FSDP", None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config
        if fsdp is not None:
            os.environ["ACCELERATE_USE_FSDP"] = fsdp


def sum_of_squares(tensors: Iterable[torch.Tensor]) -> float:
    """The sum of squares of tensors, added in float64; those that FSDP2 has sharded over all their ranks.

    A collective that all ranks must enter where one of them is sharded. No copy is larger than 8 MB.
    """
    import torch
    import torch.distributed as dist

    sums: dict[tuple[Any, ...], torch.Tensor] = {}  # by the groups of ranks that hold the shards
    for tensor in tensors:
        whole: Any = tensor.detach()
        groups: tuple[Any, ...] = ()
        if (mesh := getattr(whole, "device_mesh", None)) is not None:  # of fsdp2_hsdp's two dimensions one replicates
            groups = tuple(mesh.get_group(i) for i, placed in enumerate(whole.placements) if placed.is_shard())
            whole = whole.to_local()
        total = sums.setdefault(groups, torch.zeros((), dtype=torch.float64, device=whole.device))
        for piece in whole.reshape(-1).split(1 << 20):
            exact = piece.double()
            total += exact.dot(exact)
    for groups, total in sums.items():
        for group in groups:
            dist.all_reduce(total, group=group)
    return float(sum(sums.values()))
