"""What TRL's three trainers have in common: their arguments, packing, and global batches."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from rlhf.config.build import is_flash
from rlhf.data.store import Rows
from rlhf.distributed.processes import say
from rlhf.packing import PackedCollator
from rlhf.training.lengths import longest_row, too_long
from rlhf.training.stage import Loaded, Plan
from rlhf.training.steps import GlobalBatch, tokens_of
from rlhf.training.tokens import with_tokens
from rlhf.training.trainer import GlobalBatches


def trainer_arguments(plan: Plan, loaded: Loaded) -> dict[str, Any]:
    """The constructor arguments that TRL's three trainers have in common."""
    tokens = plan.tokens or with_tokens(plan, loaded.tokenizer).tokens
    # without an evaluation DPO would compute the reference of the held-out rows for nothing
    heldout = tokens["heldout"].dataset if evaluates(plan.args) and "heldout" in tokens else None
    return {
        "model": loaded.model, "args": plan.args, "processing_class": loaded.tokenizer, "peft_config": loaded.peft_config,
        "train_dataset": tokens["train"].dataset, "eval_dataset": heldout if heldout is not None and len(heldout) else None,
    }  # fmt: skip


def evaluates(args: Any) -> bool:
    """Whether a run looks at its held-out rows."""
    return args.eval_strategy != "no" or bool(args.eval_on_start)


def pack(trainer: GlobalBatches, plan: Plan) -> bool:
    """Make the trainer's models compute on one padding-free row, or report why they can't (never a silent change).

    Returns:
        Whether batches are packed.
    """
    if plan.packing_mode is None:
        return False
    from rlhf.packing import kernel_name, pack_backbone, why_not

    asked = plan.recipe.get("attn_implementation")
    models = [trainer.model]
    if (reference := getattr(trainer, "ref_model", None)) is not None:
        models.append(trainer.accelerator.unwrap_model(reference))
    longest = known_longest(plan)
    for reason in filter(None, (why_not(model, longest) for model in models)):
        say(f"note: batches are padded, not packed: {reason}")
        if is_flash(asked):
            found = trainer.model.config._attn_implementation
            say(
                f"note: attention is {found}: {asked} applies to packed rows; `packing: false` passes it to "
                "transformers"
            )
        return False
    for model in models:
        pack_backbone(model, plan.packing_mode, longest)
    if not trainer.args.torch_compile:  # which may not follow tensors that know their values
        cuda = trainer.args.device.type == "cuda"
        trainer.data_collator = PackedCollator(trainer.data_collator, plan.packing_mode, varlen=cuda)
    if asked not in (None, "sdpa"):  # flash attention, eager
        device = trainer.args.device
        say(f"note: {asked} selects packed attention; on {device.type} the kernel is {kernel_name(device)}")
    return True


def known_longest(plan: Plan) -> int | None:
    """Tokens of the longest row that a model will be given: of the token ids if they are there, else max_length."""
    counted = [tokens.counts for tokens in plan.tokens.values()]
    return longest_row(plan, *counted) if counted else plan.args.max_length


def use_global_batches(trainer: GlobalBatches, plan: Plan, packed: bool) -> None:
    """Set the recipe's global batch size on the trainer, if it has one, after checking the longest example.

    Raises:
        UserError: a single example has more tokens than max_tokens_per_device.
    """
    stage_args = plan.stage_args
    if stage_args.global_batch_size is None:
        return
    num_tokens = tokens_of(trainer.train_dataset, plan.args.max_length, not packed)
    _check_longest(plan, trainer.train_dataset, num_tokens, plan.data.train)
    if trainer.eval_dataset is not None:
        heldout = tokens_of(trainer.eval_dataset, plan.args.max_length, not packed)
        _check_longest(plan, trainer.eval_dataset, heldout, cast("Rows", plan.data.heldout))
    trainer.use_global_batches(
        GlobalBatch(stage_args.global_batch_size, stage_args.max_tokens_per_device, not packed, num_tokens)
    )


def _check_longest(plan: Plan, dataset: Any, num_tokens: np.ndarray, rows: Rows) -> None:
    longest, most = int(num_tokens.max(initial=0)), plan.stage_args.max_tokens_per_device
    if longest > most:
        raise too_long(plan.recipe, rows.place(dataset[int(num_tokens.argmax())]["example"]), longest, most)
