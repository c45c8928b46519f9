"""Count the parameters of a model and the trainable ones, also if they are 4-bit or sharded."""

from __future__ import annotations

from rlhf.distributed.sharding import num_elements


def is_added(name: str) -> bool:
    """Whether PEFT has added a parameter to the model: LoRA matrices and copies of fully trained modules."""
    return "lora_" in name or ".modules_to_save." in name


def count_parameters(model) -> tuple[int, int]:
    """(parameters of the model, without those that PEFT added; trainable parameters)"""
    named = list(model.named_parameters())
    total = sum(num_elements(parameter) for name, parameter in named if not is_added(name))
    return total, sum(num_elements(parameter) for _, parameter in named if parameter.requires_grad)
