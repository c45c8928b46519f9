"""SFT: this project against TRL's SFTTrainer, padded and padding-free, side by side.

python bench/sft.py --data pairs.jsonl             SmolLM2-135M, LoRA, fp32, the chosen answers, 4 a step
"""

import compare

from rlhf.training.sft import SFT as STAGE

VARIANTS = {
    "trl": "TRL's SFTTrainer, padded batches",
    "trl-padding-free": "TRL's SFTTrainer with padding_free (meant for flash attention; on other devices sdpa with a mask)",
    "packed": "this project: one padding-free row",
}


MODES = {"trl": None, "trl-padding-free": None, "packed": "rows"}


def build(variant, context, clock):
    if variant == "packed":
        return STAGE.build(context)
    from datasets import Dataset
    from trl import SFTTrainer, get_peft_config

    from rlhf.models.loading import load_policy
    from rlhf.models.tokenizer import load_tokenizer

    max_length, context.args.packing = context.args.max_length, False
    if variant == "trl-padding-free":  # which wants rows that are short enough already
        context.args.padding_free, context.args.max_length = True, None
    tokenizer = load_tokenizer(context.model_name)
    trainer = SFTTrainer(
        model=load_policy(context.model_name, tokenizer, context.model_args),
        args=context.args,
        train_dataset=Dataset.from_list(context.data.train),
        processing_class=tokenizer,
        peft_config=get_peft_config(context.model_args),
    )
    if longer := sum(len(row["input_ids"]) > max_length for row in trainer.train_dataset):
        raise SystemExit(
            f"TRL's padding_free does not cut rows, and {longer} are longer than {max_length} tokens; raise --max-length, or "
            "leave it out with --variants trl packed"
        )
    return trainer


if __name__ == "__main__":
    compare.main(compare.Bench("sft", VARIANTS, MODES, build))
