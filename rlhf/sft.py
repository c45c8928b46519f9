"""Supervised fine-tuning: the model learns to give the chosen answers."""

from __future__ import annotations

from rlhf.data.formats import sft_rows
from rlhf.run import Context, Stage, pack, use_global_batches


def build(context: Context):
    """TRL's SFTTrainer for this recipe."""
    from datasets import Dataset
    from trl import SFTTrainer, get_peft_config

    from rlhf.models import load_policy, load_tokenizer
    from rlhf.packing import head
    from rlhf.trainer import GlobalBatches

    class Trainer(GlobalBatches, SFTTrainer):
        pass

    args, stage_args = context.args, context.stage_args
    if args.use_cpu:
        head.install()
    tokenizer = load_tokenizer(context.model_name, stage_args.chat_template, args.trust_remote_code)
    model = load_policy(
        context.model_name, tokenizer, context.model_args, args.trust_remote_code,
        continue_adapter=stage_args.continue_adapter and context.model_args.use_peft,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(context.data.train),
        eval_dataset=Dataset.from_list(context.data.heldout) if context.data.heldout else None,
        processing_class=tokenizer,
        peft_config=None if hasattr(model, "peft_config") else get_peft_config(context.model_args),
    )
    use_global_batches(trainer, context, pack(trainer, context, "rows"))
    return trainer


def probe(dataset) -> list[list[int]]:
    return [row["input_ids"] for row in dataset.select(range(min(2, len(dataset))))]


SFT = Stage("sft", "SFT", sft_rows, build, probe)
