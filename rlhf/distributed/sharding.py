"""Parameters that ZeRO-3 or FSDP2 has sharded: the one place that knows how either engine does it."""

from __future__ import annotations

import contextlib


def is_zero3(parameter) -> bool:
    return hasattr(parameter, "ds_id")


def is_sharded(parameter) -> bool:
    """Whether this rank holds a shard of the parameter alone."""
    return is_zero3(parameter) or hasattr(parameter, "full_tensor")


def num_elements(parameter) -> int:
    """Numbers that a parameter stands for: unsharded under ZeRO-3, and unpacked where bitsandbytes has two in a byte."""
    state = getattr(parameter, "quant_state", None)
    if state is not None and getattr(state, "shape", None) is not None:
        return state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def unsharded_shape(parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves a parameter of no size


@contextlib.contextmanager
def unsharded(parameter):
    """The unsharded tensor of a parameter; all ranks must ask for it at once."""
    if is_zero3(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data
    else:
        yield full_tensor(parameter)


def full_tensor(tensor):
    """The unsharded tensor of a DTensor, on all ranks, all of which must ask; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextlib.contextmanager
def writable(parameter):
    """Within it a parameter of ZeRO-3 is unsharded on all ranks, and what rank 0 writes is its new value."""
    if not is_zero3(parameter):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield


def shard_like(value, parameter):
    """This rank's shard of an unsharded tensor, sharded as `parameter` is by FSDP2; else the tensor itself."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.to_local().device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


@contextlib.contextmanager
def loading_unsharded():
    """Models that load within it are unsharded on each rank under ZeRO-3 too, and are sharded when training starts."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config
