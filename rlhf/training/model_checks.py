"""Checks of keys that reach into the model: where activations are kept, its experts, positions that depend on the batch."""

from __future__ import annotations

import inspect
import os
from typing import Any

from rlhf.config.recipe import Recipe
from rlhf.distributed.processes import say
from rlhf.errors import UserError, quote
from rlhf.models.folder import base_of, revision_of
from rlhf.training.stage import Plan


def model_config(plan: Plan) -> Any:
    """The configuration of the input model; of an adapter that of its base."""
    from transformers import AutoConfig

    revision = revision_of(plan.model_name, plan.model_args.model_revision)
    return AutoConfig.from_pretrained(
        base_of(plan.model_name), revision=revision, trust_remote_code=plan.args.trust_remote_code
    )


# --- where activations are kept --------------------------------------------------------------------------------------

# What transformers takes out of the arguments before it passes the rest to torch.utils.checkpoint.
OWN_ARGUMENTS = ("every_n_layers", "offload")


def checkpointing_key(recipe: Recipe) -> str:
    """The name of the key of checkpointing's arguments beside the recipe's own name of checkpointing."""
    old = "activation_checkpointing" not in recipe.values and "activation_checkpointing_kwargs" not in recipe.values
    return "gradient_checkpointing_kwargs" if old else "activation_checkpointing_kwargs"


def can_offload_checkpoints() -> bool:
    """Whether this release of transformers can hold checkpointed activations in host memory."""
    from transformers import PreTrainedModel

    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", PreTrainedModel.gradient_checkpointing_enable)
    return "offload" in inspect.signature(enable).parameters


def less_activations(plan: Plan) -> str:
    """What would take less memory for activations than the recipe, in a list of remedies; '' if nothing is left."""
    key = checkpointing_key(plan.recipe)
    if not getattr(plan.args, "activation_checkpointing", plan.args.gradient_checkpointing):
        return "set `gradient_checkpointing: true`, "
    given = plan.recipe.get(key) or {}
    if isinstance(given, dict) and (given.get("offload") or not can_offload_checkpoints()):
        return ""
    return f"set `{key}: {{offload: true}}` (activations wait in host memory: slower), "


def check_offloading(plan: Plan) -> None:
    """Reject keys that move activations to host memory in a run that computes there: both libraries end in a traceback.

    Raises:
        UserError: the run is on the CPU.
    """
    if plan.args.device.type == "cuda":
        return
    key = checkpointing_key(plan.recipe)
    given = plan.recipe.get(key)
    for name, asked in (("activation_offloading", plan.recipe.get("activation_offloading")),
                        (key, isinstance(given, dict) and given.get("offload"))):  # fmt: skip
        if asked:
            what = name if name == "activation_offloading" else f"{name}.offload"
            raise UserError(
                f"{plan.recipe.where(name)}: {what} moves activations from the GPU to host memory, but this run is on the "
                f"{plan.args.device.type.upper()}; remove it"
            )


def check_checkpointing(plan: Plan) -> None:
    """Check the arguments of checkpointing, which are only looked at in the first forward pass.

    Raises:
        UserError: an unknown argument, or a wrong number of layers.
    """
    import torch.utils.checkpoint

    key = checkpointing_key(plan.recipe)
    given = plan.recipe.get(key)
    if not isinstance(given, dict):
        return
    known = [
        *inspect.signature(torch.utils.checkpoint.checkpoint).parameters,
        *(OWN_ARGUMENTS if can_offload_checkpoints() else ()),
    ]
    known = [name for name in known if name not in ("function", "args", "kwargs", "context_fn")]
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{plan.recipe.where(key)}: {key} has {quote(name)}; expected {', '.join(known)}")
        if name == "every_n_layers" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(
                f"{plan.recipe.where(key)}: {key}.every_n_layers is {quote(value)}; expected an integer from 1"
            )


def check_compiled(plan: Plan) -> None:
    """Reject a launch file that compiles the model behind the recipe's back: packed rows and metrics must know.

    Raises:
        UserError: accelerate's `dynamo_config`.
    """
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("", "no"):
        raise UserError(
            f"{plan.recipe.path}: the launch file's dynamo_config (ACCELERATE_DYNAMO_BACKEND={quote(backend)[1:-1]}) compiles "
            "the model; remove it, and set `torch_compile: true` and `packing: false` in the recipe instead"
        )


# --- experts, positions ----------------------------------------------------------------------------------------------


def check_experts(plan: Plan) -> None:
    """Reject what a model's experts, or a model without experts, would only answer with a traceback or nothing.

    Raises:
        UserError: `experts_implementation` of a model without experts; TRL can't compute the loss that balances them.
    """
    recipe, asked = plan.recipe, plan.stage_args.experts_implementation
    coefficient = getattr(plan.args, "router_aux_loss_coef", None)
    config = model_config(plan).get_text_config()
    if asked and not has_experts(config):
        raise UserError(
            f"{recipe.where('experts_implementation')}: 'experts_implementation' has no effect on {plan.model_name}, whose "
            f"model type {config.model_type} has no experts; remove it"
        )
    if recipe.stage == "reward" or not hasattr(config, "output_router_logits"):
        return
    if coefficient is None:
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if coefficient and not hasattr(config, "num_experts"):  # trl/trainer/utils.py (1.16), add_fused_lm_head
        raise UserError(
            f"{recipe.where('router_aux_loss_coef')}: TRL can't compute the loss that balances the experts of "
            f"{config.model_type} (it looks for `num_experts` in the model's config, which has another name for it); set "
            "`router_aux_loss_coef: 0`"
        )
    if coefficient:
        say(
            f"note: router_aux_loss_coef is {coefficient:g}: the loss that balances the experts is computed per micro-batch and "
            "is not a sum over tokens, so it changes slightly with the number of ranks and max_tokens_per_device; "
            "`router_aux_loss_coef: 0` turns it off"
        )


def has_experts(config: Any) -> bool:
    """Whether a text model's config counts experts, under one of the names that transformers 5.23's configs have for it."""
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "moe_num_experts"))


def use_experts(model, plan: Plan):
    """The model, with the recipe's `experts_implementation`; a reference without experts as it is."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if plan.stage_args.experts_implementation and has_experts(base.config.get_text_config()):
        base.set_experts_implementation(plan.stage_args.experts_implementation)
    return model


def check_positions(plan: Plan, longest: int) -> None:
    """Name a model that reads its rows' positions by the longest row of a batch, where rows come on both sides of the limit.

    LongRoPE (Phi-3 with 128k positions) takes other frequencies for a whole batch as soon as one row is longer than the
    model's first training was: a row's log-probabilities depend on the rows beside it. For DPO the cached reference, which is
    computed in other batches, would not be the policy's.

    Raises:
        UserError: of DPO.
    """
    config = model_config(plan).get_text_config()
    scaling = getattr(config, "rope_parameters", None) or {}
    kinds = [scaling, *(part for part in scaling.values() if isinstance(part, dict))]
    limits = [part.get("original_max_position_embeddings") for part in kinds if part.get("rope_type") == "longrope"]
    limit = min((limit for limit in limits if limit), default=None)
    if limit is None or longest <= limit:
        return
    text = (
        f"{plan.model_name} (LongRoPE) computes all rows of a batch with other positions if one of them exceeds {limit:,} tokens, "
        f"and the longest has {longest:,}: a row's results depend on the batch that it is in"
    )
    if plan.recipe.stage == "dpo":
        raise UserError(
            f"{plan.recipe.where('max_length')}: {text}, and DPO compares two of them; set `max_length: {limit}` or less"
        )
    say(f"note: {text}; `max_length: {limit}` avoids it")
