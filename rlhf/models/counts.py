"""How many parameters a model has and how many are trained, whatever they are packed or sharded into."""

from __future__ import annotations

from rlhf.distributed.sharding import num_elements


def is_added(name: str) -> bool:
    """Whether PEFT has added a parameter to the model: LoRA's matrices, and the copies of modules that are trained whole."""
    return "lora_" in name or ".modules_to_save." in name


def count_parameters(model) -> tuple[int, int]:
    """(parameters of the model itself, without what PEFT has added to it; parameters that are trained)"""
    named = list(model.named_parameters())
    total = sum(num_elements(parameter) for name, parameter in named if not is_added(name))
    return total, sum(num_elements(parameter) for _, parameter in named if parameter.requires_grad)
