"""Parameters that ZeRO-3 or FSDP2 has sharded: their unsharded values, and how to change them."""

from __future__ import annotations

import contextlib


@contextlib.contextmanager
def loading_unsharded():
    """What is loaded here is whole on each process under ZeRO-3 too, and is split when training starts."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def writable(parameter):
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


@contextlib.contextmanager
def unsharded(parameter):
    """The whole of a parameter that ZeRO-3 or FSDP2 has split over processes, all of which must ask; else itself."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data
    elif hasattr(parameter, "full_tensor"):
        yield parameter.full_tensor()
    else:
        yield parameter
