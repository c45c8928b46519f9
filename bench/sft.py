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


def build(variant, plan, clock):
    if variant == "packed":
        return STAGE.build(plan, None)
    from datasets import Dataset
    from trl import SFTTrainer, get_peft_config

    from rlhf.models.loading import load_policy
    from rlhf.models.tokenizer import load_tokenizer

    max_length, plan.args.packing = plan.args.max_length, False
    if variant == "trl-padding-free":  # which wants rows that are short enough already
        plan.args.padding_free, plan.args.max_length = True, None
    tokenizer = load_tokenizer(plan.model_name)
    trainer = SFTTrainer(
        model=load_policy(plan.model_name, tokenizer, plan.model_args),
        args=plan.args,
        train_dataset=Dataset.from_list(plan.data.train),
        processing_class=tokenizer,
        peft_config=get_peft_config(plan.model_args),
    )
    if longer := sum(len(row["input_ids"]) > max_length for row in trainer.train_dataset):
        raise SystemExit(
            f"TRL's padding_free does not cut rows, and {longer} are longer than {max_length} tokens; raise --max-length, or "
            "leave it out with --variants trl packed"
        )
    return trainer


if __name__ == "__main__":
    compare.main(compare.Bench("sft", VARIANTS, MODES, build))
