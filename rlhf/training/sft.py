"""Supervised fine-tuning: the model learns to give the chosen answers."""

from __future__ import annotations

from rlhf.data.formats import sft_rows
from rlhf.training.stage import Context, Stage
from rlhf.training.trainer import pack, use_global_batches
from rlhf.upstream import check_upstream


def load(context: Context):
    """(policy, tokenizer)"""
    from rlhf.models.loading import load_policy
    from rlhf.models.tokenizer import load_tokenizer

    args, model_args, stage_args = context.args, context.model_args, context.stage_args
    tokenizer = load_tokenizer(context.model_name, stage_args.chat_template, args.trust_remote_code)
    return load_policy(
        context.model_name, tokenizer, model_args, args.trust_remote_code, continue_adapter=continues_adapter(context)
    ), tokenizer


def continues_adapter(context: Context) -> bool:
    """Whether the policy is an adapter that is trained further."""
    from rlhf.models.folder import is_adapter

    return is_adapter(context.model_name) and context.stage_args.continue_adapter and context.model_args.use_peft


def build(context: Context):
    """TRL's SFTTrainer for this recipe."""
    from datasets import Dataset
    from trl import SFTTrainer, get_peft_config

    from rlhf.packing import lm_head
    from rlhf.training.trainer import GlobalBatches

    class Trainer(GlobalBatches, SFTTrainer):
        pass

    check_upstream("sft", context.model_args.load_in_4bit or context.model_args.load_in_8bit)
    if context.args.use_cpu:
        lm_head.install()
    model, tokenizer = load(context)
    trainer = Trainer(
        model=model,
        args=context.args,
        train_dataset=Dataset.from_list(context.data.train),
        eval_dataset=Dataset.from_list(context.data.heldout) if context.data.heldout else None,
        processing_class=tokenizer,
        peft_config=None if hasattr(model, "peft_config") else get_peft_config(context.model_args),
    )
    use_global_batches(trainer, context, pack(trainer, context, context.packing_mode or "rows"))
    return trainer


def probe(dataset) -> list[list[int]]:
    return [row["input_ids"] for row in dataset.select(range(min(2, len(dataset))))]


SFT = Stage("sft", "SFT", sft_rows, load, build, probe, continues_adapter=continues_adapter)
