"""Checks of a plan before any weight loads: what libraries would reject after minutes, and what a model can't do."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.config.evaluated import recipe_key
from rlhf.config.key_effects import without_effect
from rlhf.config.recipe import Recipe
from rlhf.distributed.processes import say
from rlhf.errors import UserError, quote, sentence
from rlhf.models.embedded import is_fetched
from rlhf.models.folder import base_of, commit_of
from rlhf.runs.lineage import maker_of
from rlhf.training.lengths import longest_row, too_long
from rlhf.training.model_checks import check_positions, model_config
from rlhf.training.stage import Plan

if TYPE_CHECKING:
    from rlhf.data.store import Rows
    from rlhf.training.stage import TrainingConfig
    from rlhf.training.tokenise import Counts, Settings

MOST_ROWS, MOST_LONG_ROWS = 2000, 200  # maximum number of rows tokenised before a start: about 3 s


def check_finished_models(recipe: Recipe, names: dict[str, str], waiting: dict[str, str]) -> None:
    """Check that an evaluation's models exist, are of the right kind and have a tokenizer; loads no weights.

    Args:
        names: of the models, by key (`rlhf.config.evaluated.model_keys`).
        waiting: by key, the command that still has to make the model, or ''.
    """
    from transformers import AutoTokenizer

    from rlhf.models.folder import is_reward_model, locate

    for key, name in names.items():
        where, judges = recipe.where(recipe_key(key, recipe.values)), key == "reward_model" or key.startswith("judge.")
        if waiting.get(key) or (name.startswith("embedded:") and not is_fetched()):
            continue
        located = locate(name, where, maker_of(recipe, name), say)
        if Path(located).is_dir() and is_reward_model(located) != judges:
            kinds = ("a policy", "a reward model")
            found, expected = kinds if judges else kinds[::-1]
            raise UserError(f"{where}: {name} holds {found}; '{key}' names {expected}")
        try:
            AutoTokenizer.from_pretrained(located)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"{where}: the tokenizer of {name} can't be loaded: {sentence(error)}") from None


def check_scheduler(plan: Plan) -> None:
    """Build the learning-rate scheduler over a dummy parameter: it rejects missing and unknown arguments."""
    import torch
    from transformers import get_scheduler

    args, recipe = plan.args, plan.recipe
    steps = args.max_steps if args.max_steps > 0 else 1000
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        kwargs: Any = args.lr_scheduler_kwargs or {}  # transformers' own annotation has a text too
        get_scheduler(args.lr_scheduler_type, dummy, args.get_warmup_steps(steps), steps, kwargs)
    except (TypeError, ValueError, KeyError) as error:
        key = "lr_scheduler_kwargs" if recipe.get("lr_scheduler_kwargs") else "lr_scheduler_type"
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise UserError(
            f"{recipe.where(key)}: the scheduler {name} can't be built with lr_scheduler_kwargs="
            f"{quote(args.lr_scheduler_kwargs)}: {sentence(error)}"
        ) from None


def check_optimizer(plan: Plan) -> None:
    """Check that the optimizer's package is installed and that its arguments are valid."""
    from transformers import Trainer

    args, recipe = plan.args, plan.recipe
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError, AssertionError, TypeError) as error:
        name = getattr(args.optim, "value", args.optim)
        if "model" in str(error).lower() and not isinstance(error, ImportError):
            return  # LOMO needs the model itself
        raise UserError(f"{recipe.where('optim')}: optim {name} can't be used: {sentence(error)}") from None


def check_reporters(plan: Plan) -> None:
    """Check that each reporter exists and its package is installed, by creating its callback."""
    from transformers.integrations import get_reporting_integration_callbacks

    recipe = plan.recipe
    try:
        for callback in get_reporting_integration_callbacks(plan.args.report_to):
            callback()
    except (ImportError, RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"{recipe.where('report_to')}: report_to {quote(recipe.get('report_to'))} can't be used: "
            + sentence(error).replace("pip install", f"{sys.executable} -m pip install")
        ) from None


def check_hub_login(plan: Plan) -> None:
    """`push_to_hub` needs a login and the network: check both before training, not after it."""
    if not plan.args.push_to_hub:
        return
    from huggingface_hub import whoami

    try:
        whoami()
    except Exception as error:  # as in models.locate: the hub's client raises a dozen types, from two HTTP libraries
        raise UserError(
            f"{plan.recipe.where('push_to_hub')}: push_to_hub can't reach the hub with a login: {sentence(error)} "
            "Log in with `hf auth login` (or set HF_TOKEN), or remove push_to_hub and upload the finished folder later"
        ) from None


def check_modules(plan: Plan) -> float:
    """Build the architecture on the meta device (no memory) and add LoRA: checks module names, attention and sizes.

    Returns:
        The longest row, in tokens, with which its batches are packed: 0 if they never are, its sliding window, or infinity.

    Raises:
        UserError: the model lacks LoRA's target modules, or can't be built with this attention.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl import get_peft_config

    from rlhf.distributed.sharding import loading_unsharded
    from rlhf.packing import attention_window, why_not

    recipe, args, model_args = plan.recipe, plan.args, plan.model_args
    options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    config = model_config(plan)
    auto: Any = AutoModelForCausalLM
    if recipe.stage == "reward":
        auto, config.num_labels = AutoModelForSequenceClassification, 1
    if attention := packed_attention(model_args.attn_implementation):
        options["attn_implementation"] = attention
    try:
        with loading_unsharded(), torch.device("meta"):
            model = auto.from_config(config, **options)
    except (ValueError, ImportError) as error:
        key = "attn_implementation" if recipe.get("attn_implementation") else "model_name_or_path"
        raise UserError(f"{recipe.where(key)}: {plan.model_name} can't be built: {sentence(error)}") from None
    can_pack = plan.packing_mode is not None and why_not(model, longest=0) is None
    packs_up_to = (attention_window(model.base_model) or math.inf) if can_pack else 0
    if not model_args.use_peft or plan.continues_adapter:
        return packs_up_to
    named, linear = model_args.lora_target_modules, _linear_layers(model)
    missing = [n for n in named if not _matches(model, n)] if isinstance(named, list) else []
    reason = f"the model has no module {', '.join(map(quote, missing))}" if missing else ""
    adapter: Any = get_peft_config(model_args)  # a LoraConfig; TRL annotates what all methods of PEFT share
    if recipe.stage == "reward":  # as in reward.load: the new head is trained and saved, not adapted
        heads = [
            n
            for n, m in model.named_children()
            if n != model.base_model_prefix and next(m.parameters(), None) is not None
        ]
        adapter.task_type, adapter.modules_to_save = "SEQ_CLS", [*(adapter.modules_to_save or []), *heads]
    try:
        with torch.device("meta"):
            get_peft_model(model, adapter)
    except ValueError as error:  # PEFT's NoMatchingPeftModuleError is one
        reason = reason or sentence(error)
    if reason:
        key = "lora_target_modules" if recipe.get("lora_target_modules") else "use_peft"
        raise UserError(
            f"{recipe.where(key)}: {reason.removesuffix('.')}; its linear layers are {', '.join(linear)}. "
            "With lora_target_modules `all-linear` is right for any model"
        )
    return packs_up_to


def _matches(model, name: str) -> bool:
    """Whether PEFT would match this list entry: a module's full name or its last parts."""
    return any(module == name or module.endswith(f".{name}") for module, _ in model.named_modules())


def _linear_layers(model) -> list[str]:
    kinds = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if type(module).__name__ in kinds})


def packed_attention(name: str | None) -> str | None:
    """The attention to build the model with; None for flash attention, which here means packing's own kernels."""
    return None if name is None or "flash" in name or "/" in name else name


def check_examples(plan: Plan, tokenizer, packs_up_to: float) -> None:
    """Report what max_length cuts, and reject what the start would reject once all rows are tokenised.

    Of a large data set it inspects every n-th row and the rows with the longest texts: a few seconds for any size.

    Args:
        packs_up_to: batches are packed if no row has more tokens.

    Raises:
        UserError: no example is left, or one (of a run that evaluates also a held-out one) is longer than max_tokens_per_device.
    """
    from rlhf.training.lengths import answers_cut, cut_report, line
    from rlhf.training.template_check import check_template
    from rlhf.training.tokens import known_counts, settings_of

    args, stage_args, recipe, rows = plan.args, plan.stage_args, plan.recipe, plan.data.train
    check_template(rows, tokenizer, recipe)
    settings = settings_of(plan)
    counts = known_counts(plan, tokenizer)
    if counts is not None:
        report, train = cut_report(counts, settings, rows.place), _Longest(rows, counts)
    else:
        report, counts = answers_cut(rows, tokenizer, settings, MOST_ROWS)
        train = _Longest.of(rows, tokenizer, settings)
    sides = [train]
    if plan.data.heldout and (args.eval_strategy != "no" or args.eval_on_start):
        sides.append(_Longest.of(plan.data.heldout, tokenizer, settings))
    longest = longest_row(plan, *(side.counts for side in sides))
    check_positions(plan, longest)
    if report.left_out.rows == report.rows:
        raise UserError(
            f"{recipe.where('max_length')}: max_length={args.max_length} leaves no training example; raise it ({line(report)})"
        )
    if text := line(report):
        say(f"note: {text}")
    if counts.unequal[0]:
        say(
            f"note: the chat template renders {counts.unequal[0]:,} of {counts.rows:,} prompts otherwise alone than before an "
            "answer; the end of those prompts is left out, so training and inference differ there"
        )
    if stage_args.global_batch_size is None:
        return
    for side in sides:
        tokens, place = side.most(padded=longest > packs_up_to)
        if tokens > stage_args.max_tokens_per_device:
            raise too_long(recipe, place, tokens, stage_args.max_tokens_per_device)


@dataclasses.dataclass(frozen=True)
class _Longest:
    """The longest of `rows`: of all of them, or of those with the longest texts.

    Attributes:
        numbers: of the rows that `counts` is of; None if of all.
    """

    rows: Rows
    counts: Counts
    numbers: np.ndarray | None = None

    @classmethod
    def of(cls, rows: Rows, tokenizer, settings: Settings) -> _Longest:
        from rlhf.training.lengths import cost

        numbers = np.argsort(rows.column("chars"))[-MOST_LONG_ROWS:]
        return cls(rows, cost(tokenizer, [rows[int(i)] for i in numbers], settings), numbers)

    def most(self, padded: bool) -> tuple[int, str]:
        """(tokens of the longest example, its place)"""
        tokens, number = self.counts.longest_padded if padded else self.counts.longest
        if number < 0:
            return 0, ""
        return tokens, self.rows.place(number if self.numbers is None else int(self.numbers[number]))


def note_disabled(recipe: Recipe) -> None:
    """Name the keys of the file that the command line has switched off; load_recipe refuses all others without effect."""
    for key in recipe.values:
        if why := without_effect(key, recipe.stage, recipe.values, set()):
            say(f"note: {recipe.where(key)}: '{key}' has no effect {why.partition(';')[0]}")


def check_merge(plan: Plan) -> None:
    """Reject an adapter whose base would not exist on disk, or that would be rounded away in quantised weights."""
    from rlhf.models.folder import is_adapter

    recipe = plan.recipe
    if plan.merge and recipe.is_quantised and plan.model_args.use_dora:
        raise UserError(
            f"{recipe.where('use_dora')}: DoRA's adapter scales whole columns of the weights, which can't be merged exactly into a "
            "dequantised base; set `merge_adapter: false`, or remove `use_dora`"
        )
    if plan.continues_adapter or not is_adapter(plan.model_name):
        return
    for key in ("load_in_4bit", "load_in_8bit"):
        if recipe.get(key):
            raise UserError(
                f"{recipe.where(key)}: the adapter in {recipe.get('model_name_or_path')} would be merged into quantised "
                "weights and rounded away; set `merge_adapter: true` in the recipe that makes it, which dequantises first"
            )
    if os.path.isdir(base_of(plan.model_name)):  # a hub's files may not be here yet
        from rlhf.models.merge import open_adapter

        try:
            open_adapter(plan.model_name, plan.args.trust_remote_code)
        except UserError as error:
            raise UserError(f"{recipe.where('model_name_or_path')}: {error}") from None
    if plan.model_args.use_peft and not plan.merge:
        raise UserError(
            f"{recipe.where('merge_adapter')}: the base of the new adapter would be {recipe.get('model_name_or_path')} "
            "merged into its own base, a model that is not on disk; set `merge_adapter: true` here, or in the recipe "
            "of that stage"
        )


def decide_max_length(
    recipe: Recipe, args: TrainingConfig, model_name: str, revision: str
) -> tuple[int | None, str | None]:
    """The recipe's max_length, or TRL's default capped at the model's positions; and the commit of a hub model.

    Beyond its positions a model fails with an index error deep in an embedding.

    Raises:
        UserError: the recipe's own max_length exceeds the model's positions.
    """
    from transformers import AutoConfig

    given = {"trust_remote_code": args.trust_remote_code, "revision": revision}
    model_config = AutoConfig.from_pretrained(base_of(model_name), **given)
    config = model_config.get_text_config()
    commit = commit_of(base_of(model_name), revision)
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    wanted = args.max_length
    if not positions or (wanted is not None and wanted <= positions):
        return wanted, commit
    if recipe.get("max_length"):
        raise UserError(
            f"{recipe.where('max_length')}: max_length={wanted} is more than the {positions} positions of "
            f"{recipe.get('model_name_or_path')}; use at most {positions}"
        )
    found = min(positions, wanted or positions)
    say(f"note: max_length is {found}, the number of positions of this model")
    return found, commit
