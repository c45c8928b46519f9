"""Compare models by their logits."""

from __future__ import annotations

import torch


def probe_logits(model, token_ids: list[list[int]], device=None) -> list[torch.Tensor]:
    """Logits of a few rows, one row at a time (no padding), in eval mode; returned as fp32 on the CPU.

    Args:
        device: of the computation, if it is not that of the weights.
    """
    was_training = model.training
    model.eval()
    device = device or next(model.parameters()).device
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([ids], device=device)).logits.float().cpu() for ids in token_ids]
    model.train(was_training)
    return found


def is_quantised(model) -> bool:
    """Whether a model's (or a PeftModel's base's) weights are in 4 or 8 bits."""
    return getattr(model.config, "quantization_config", None) is not None
