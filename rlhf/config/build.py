"""From a validated recipe to TRL's config classes, ModelConfig and our StageConfig (imports torch)."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from rlhf.config.recipe import Recipe, allowed_keys
from rlhf.errors import UserError


def build_configs(recipe: Recipe):
    """Make TRL's config of the stage, TRL's ModelConfig and our StageConfig from a validated recipe.

    Returns:
        (SFTConfig | RewardConfig | DPOConfig, ModelConfig, StageConfig)

    Raises:
        UserError: TRL refuses a combination of values (its own sentence, with the recipe's name).
    """
    import torch
    from trl import DPOConfig, ModelConfig, RewardConfig, SFTConfig

    config_class = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig}[recipe.stage]
    keys = allowed_keys(recipe.stage)
    groups: dict[str, dict[str, Any]] = {config_class.__name__: {}, "ModelConfig": {}, "StageConfig": {}}
    for key, value in recipe.values.items():
        groups[keys[key].owner][key] = value
    training = groups[config_class.__name__]
    if not torch.cuda.is_available():
        training.setdefault("use_cpu", True)
    _set_precision(training, recipe)
    if training.get("use_cpu"):
        training.setdefault("dataloader_pin_memory", False)
    training.setdefault("report_to", "none")
    try:
        args, model_args = config_class(**training), ModelConfig(**groups["ModelConfig"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{recipe.path}: {' '.join(str(error).split())}") from error
    named = recipe.get("lora_target_modules")
    if isinstance(named, list) and named != ["all-linear"]:
        model_args.lora_target_modules = named  # TRL 1.16 makes a list of one a pattern, which then matches no module
    if is_flash(model_args.attn_implementation):
        model_args.attn_implementation = _flash_or_packed(recipe, bool(args.use_cpu))
    return args, model_args, recipe.ours


def _set_precision(training: dict[str, Any], recipe: Recipe) -> None:
    """bf16 or fp16: the recipe's, else the launch file's, else bf16 where a GPU has it."""
    import torch

    on_cpu = training.get("use_cpu")
    asked = check_precision(recipe, os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), "the launch file")
    if asked:
        training |= {"bf16": asked == "bf16", "fp16": asked == "fp16"}
    elif "bf16" not in training and not training.get("fp16"):
        # TRL's default is true; a CPU without AMX is slower in bf16
        training["bf16"] = not on_cpu and torch.cuda.is_bf16_supported()
    if on_cpu and training.get("fp16"):
        place = recipe.where("fp16") if recipe.get("fp16") else "the launch file's mixed_precision"
        raise UserError(f"{place}: fp16 needs a GPU, and this run is on the CPU; use bf16, or neither")


def check_precision(recipe: Recipe, asked: str, name: str) -> str:
    """What a launch file's `mixed_precision` adds to a recipe: `bf16`, `fp16`, or '' where it says nothing.

    `no` says nothing: accelerate writes it into every file, and sets it where there is none.

    Raises:
        UserError: the recipe says something else.
    """
    if asked not in ("bf16", "fp16"):
        return ""
    decided = next((key for key in ("fp16", "bf16") if recipe.get(key)), None)
    if decided is None and recipe.get("bf16") is False:
        raise UserError(
            f"{recipe.where('bf16')}: the recipe says `bf16: false`, and {name} `mixed_precision: {asked}`; remove one"
        )
    if decided not in (None, asked):
        raise UserError(
            f"{recipe.where(decided)}: the recipe says `{decided}: true`, and {name} `mixed_precision: {asked}`; remove one"
        )
    return asked


def is_flash(attention: str | None) -> bool:
    """Whether an `attn_implementation` names a flash-attention package or kernel."""
    return "flash" in (attention or "").lower().replace("flex", "")


def _flash_or_packed(recipe: Recipe, on_cpu: bool) -> str | None:
    """What the model is loaded with where the recipe asks for flash attention.

    Who asks for it wants rows without padding, and no more: packed attention is that, on a varlen kernel on GPUs
    (packing/attention.py), and is put in the place of what the model has loaded with (None: transformers' choice).
    """
    asked, where = recipe.get("attn_implementation"), recipe.where("attn_implementation")
    if recipe.get("packing", True):
        return None
    if on_cpu:
        raise UserError(f"{where}: {asked} needs a GPU, and this run is on the CPU; remove it")
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(asked, "kernels")
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{where}: {asked} needs the package {package}, which is not installed; remove `packing: false`, and packed "
            "attention uses PyTorch's own varlen kernel"
        )
    return asked
