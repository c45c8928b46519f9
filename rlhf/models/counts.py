"""How many parameters a model has and how many are trained, whatever they are packed or sharded into."""

from __future__ import annotations


def size_of(parameter) -> int:
    """Numbers that a parameter stands for: all of them under ZeRO-3, and unpacked where two are in a byte (4 bits)."""
    state = getattr(parameter, "quant_state", None)
    if state is not None and getattr(state, "shape", None) is not None:
        return state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def is_added(name: str) -> bool:
    """Whether PEFT has added a parameter to the model: LoRA's matrices, and the copies of modules that are trained whole."""
    return "lora_" in name or ".modules_to_save." in name


def count_parameters(model) -> tuple[int, int]:
    """(parameters of the model itself, without what PEFT has added to it; parameters that are trained)"""
    named = list(model.named_parameters())
    total = sum(size_of(parameter) for name, parameter in named if not is_added(name))
    return total, sum(size_of(parameter) for _, parameter in named if parameter.requires_grad)
