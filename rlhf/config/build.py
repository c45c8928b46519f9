"""Build TRL's config classes, ModelConfig and our StageConfig from a validated recipe (imports torch)."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from rlhf.config.recipe import Recipe, allowed_keys
from rlhf.errors import UserError


def build_configs(recipe: Recipe):
    """Build the stage's TRL config, TRL's ModelConfig and our StageConfig from a validated recipe.

    Returns:
        (SFTConfig | RewardConfig | DPOConfig, ModelConfig, StageConfig)

    Raises:
        UserError: TRL rejects a combination of values (its own message, prefixed with the recipe's path).
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
    _set_best_metric(training, recipe)
    try:
        args, model_args = config_class(**training), ModelConfig(**groups["ModelConfig"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{recipe.path}: {' '.join(str(error).split())}") from error
    if (plugin := getattr(args, "deepspeed_plugin", None)) is not None:
        complete_deepspeed(plugin.deepspeed_config)
    if dtype := default_dtype(recipe, on_cpu=bool(args.use_cpu), bf16=bool(args.bf16)):
        model_args.dtype = dtype
    named = recipe.get("lora_target_modules")
    if isinstance(named, list) and named != ["all-linear"]:
        model_args.lora_target_modules = (
            named  # TRL 1.16 turns a list of one into a pattern, which then matches no module
        )
    if is_flash(model_args.attn_implementation):
        model_args.attn_implementation = _flash_or_packed(recipe, bool(args.use_cpu))
    return args, model_args, recipe.ours


# What decides which checkpoint is the best, where the recipe does not say: transformers would take the loss everywhere.
BEST_METRIC = {"sft": "eval_loss", "reward": "eval_accuracy", "dpo": "eval_rewards/accuracies"}


def _set_best_metric(training: dict[str, Any], recipe: Recipe) -> None:
    """Held-out accuracy is what DPO and reward models are for; schedulers that follow a loss keep transformers' default."""
    wanted = recipe.get("load_best_model_at_end") or recipe.get("early_stopping_patience")
    if (wanted or recipe.get("save_strategy") == "best") and recipe.get("lr_scheduler_type") not in _FOLLOWS_LOSS:
        training.setdefault("metric_for_best_model", BEST_METRIC[recipe.stage])


_FOLLOWS_LOSS = ("reduce_lr_on_plateau", "greedy")


def complete_deepspeed(config: dict[str, Any]) -> None:
    """Set what accelerate's launch files can't say in a DeepSpeed config, unless a deepspeed_config_file says it.

    - Gradients are accumulated and reduced in fp32, as under DDP and FSDP2. DeepSpeed's default is the model's dtype: in
      bf16 the sum would be rounded with each micro-batch and rank. ZeRO-1 accumulates in the model's dtype, because fp32
      selects another optimizer there, without the state that portable checkpoints read.
    - Gradients are reduced in buckets of 0.2 GB instead of 2 GB: a rank holds one or two beside its share of the model.
    """
    zero = config["zero_optimization"]
    config.setdefault("communication_data_type", "fp32")
    if zero.get("stage") != 1:
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    zero.setdefault("reduce_bucket_size", 50_000_000)


def default_dtype(recipe: Recipe, on_cpu: bool, bf16: bool) -> str | None:
    """The dtype that weights load in where the recipe has no `dtype`; None leaves TRL's default, float32.

    With LoRA on a GPU the base is frozen, so it loads in the dtype of its checkpoint (8 B parameters in bfloat16: 16 GB
    instead of 32), and a 4- or 8-bit base computes in bfloat16. What is trained stays in float32: PEFT's adapters, a reward
    model's new head, and with full fine-tuning the whole model.
    """
    if "dtype" in recipe.values or not recipe.uses_lora or on_cpu or not bf16:
        return None
    return "bfloat16" if recipe.is_quantised else "auto"


def _set_precision(training: dict[str, Any], recipe: Recipe) -> None:
    """Choose bf16 or fp16: the recipe's, else the launch file's, else bf16 if the GPU supports it."""
    import torch

    on_cpu = training.get("use_cpu")
    precision = check_precision(recipe, os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), "the launch file")
    if precision:
        training |= {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    elif "bf16" not in training and not training.get("fp16"):
        # TRL's default is true; a CPU without AMX is slower in bf16, and so is a GPU before Ampere, which torch lets emulate it
        training["bf16"] = not on_cpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if on_cpu and training.get("fp16"):
        place = recipe.where("fp16") if recipe.get("fp16") else "the launch file's mixed_precision"
        raise UserError(f"{place}: fp16 needs a GPU, but this run is on the CPU; use bf16, or neither")


def check_precision(recipe: Recipe, launched: str, name: str) -> str:
    """The precision that a launch file's `mixed_precision` sets: `bf16`, `fp16`, or '' if it sets none.

    `no` counts as unset: accelerate writes it into every file, and assumes it if there is no file.

    Raises:
        UserError: the recipe sets another one.
    """
    if launched not in ("bf16", "fp16"):
        return ""
    decided = next((key for key in ("fp16", "bf16") if recipe.get(key)), None)
    if decided is None and recipe.get("bf16") is False:
        raise UserError(
            f"{recipe.where('bf16')}: the recipe sets `bf16: false`, but {name} sets `mixed_precision: {launched}`; remove one"
        )
    if decided not in (None, launched):
        raise UserError(
            f"{recipe.where(decided)}: the recipe sets `{decided}: true`, but {name} sets `mixed_precision: {launched}`; remove one"
        )
    return launched


def is_flash(attention: str | None) -> bool:
    """Whether an `attn_implementation` names a flash-attention package or kernel."""
    return "flash" in (attention or "").lower().replace("flex", "")


def _flash_or_packed(recipe: Recipe, on_cpu: bool) -> str | None:
    """The `attn_implementation` to load the model with if the recipe sets flash attention.

    Its purpose is to avoid padding, which packed attention does too, with a varlen kernel on GPUs
    (packing/attention.py). Packing replaces whatever the model is loaded with, so None then: transformers' default.
    """
    kernel, where = recipe.get("attn_implementation"), recipe.where("attn_implementation")
    if recipe.get("packing", True):
        return None
    if on_cpu:
        raise UserError(f"{where}: {kernel} needs a GPU, but this run is on the CPU; remove it")
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(kernel, "kernels")
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{where}: {kernel} needs the package {package}, which is not installed; or remove `packing: false`: packed "
            "attention uses PyTorch's own varlen kernel"
        )
    return kernel
