"""The dtype in which a model computes, whatever the recipe's flags: it decides how exactly results can agree."""

from __future__ import annotations

import torch


def compute_dtype(model, mixed_precision: str | None = None) -> torch.dtype:
    """The least precise dtype in which a model computes: of its weights (except LoRA), of 4-bit layers, of autocast.

    Args:
        mixed_precision: accelerate's `no`, `bf16` or `fp16`.
    """
    found = [p.dtype for name, p in model.named_parameters() if p.is_floating_point() and "lora_" not in name]
    found += [m.compute_dtype for m in model.modules() if isinstance(getattr(m, "compute_dtype", None), torch.dtype)]
    found += [{"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision or "no", torch.float32)]
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)
