"""Finished models: load them for inference."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.models.folder import is_adapter
from rlhf.models.loading import fit_tokenizer, keep_4bit_layout
from rlhf.models.tokenizer import load_tokenizer


def load_finished(
    name: str,
    reward: bool = False,
    dtype: str | None = None,
    device: str | torch.device = "cpu",
    quantization_config=None,
):
    """Load a finished model for inference: a full model, or an adapter merged into its base.

    With `quantization_config` an adapter is not merged, and its base is quantised as in training.

    Returns:
        (model in eval mode on `device`, tokenizer)
    """
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": getattr(torch, dtype) if dtype else "auto", "use_safetensors": True}
    if is_adapter(name):
        from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

        peft_auto = AutoPeftModelForSequenceClassification if reward else AutoPeftModelForCausalLM
        extra: dict[str, Any] = {"num_labels": 1} if reward else {}
        if quantization_config is not None:
            extra["quantization_config"] = quantization_config
        model = peft_auto.from_pretrained(name, **options, **extra)
        model = model if quantization_config is not None else model.merge_and_unload()
    else:
        model = auto.from_pretrained(name, **options)
    tokenizer = load_tokenizer(name, encoder=reward)
    return fit_tokenizer(keep_4bit_layout(model), tokenizer).to(device).eval(), tokenizer


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
