"""Reward model: a score head on any backbone learns which of two answers people prefer (Bradley-Terry)."""

from __future__ import annotations

from rlhf.data.formats import preference_rows
from rlhf.training.stage import Context, Stage
from rlhf.training.trainer import pack, use_global_batches
from rlhf.upstream import check_upstream


def load(context: Context):
    """(reward model, tokenizer); notes the new head's modules, which LoRA trains and saves whole."""
    from transformers import set_seed

    from rlhf.models.loading import load_reward_model
    from rlhf.models.tokenizer import load_tokenizer

    args, model_args, stage_args = context.args, context.model_args, context.stage_args
    tokenizer = load_tokenizer(context.model_name, stage_args.chat_template, args.trust_remote_code, encoder=True)
    set_seed(args.seed)  # transformers draws the new head's weights while it loads: two runs of one seed start alike
    model, new_modules = load_reward_model(context.model_name, tokenizer, model_args, args.trust_remote_code)
    model_args.lora_task_type = "SEQ_CLS"
    model_args.lora_modules_to_save = sorted({*(model_args.lora_modules_to_save or []), *new_modules}) or None
    return model, tokenizer


def build(context: Context):
    """TRL's RewardTrainer for this recipe."""
    from datasets import Dataset
    from trl import RewardTrainer, get_peft_config

    from rlhf.training.trainer import GlobalBatches

    class Trainer(GlobalBatches, RewardTrainer):
        pass

    check_upstream("reward", context.model_args.load_in_4bit or context.model_args.load_in_8bit)
    model, tokenizer = load(context)
    trainer = Trainer(
        model=model,
        args=context.args,
        train_dataset=Dataset.from_list(context.data.train),
        eval_dataset=Dataset.from_list(context.data.heldout) if context.data.heldout else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(context.model_args),
    )
    use_global_batches(trainer, context, pack(trainer, context, context.packing_mode or "pairs"))
    return trainer


def probe(dataset) -> list[list[int]]:
    return [row[side] for row in dataset.select(range(min(2, len(dataset)))) for side in ("chosen_ids", "rejected_ids")]


REWARD = Stage("reward", "Reward model", preference_rows, load, build, probe)
