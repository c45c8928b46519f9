"""DPO: this project against TRL's DPOTrainer at its own best settings, side by side.

python bench/dpo.py --data pairs.jsonl             SmolLM2-135M, LoRA, fp32, 4 pairs a step
python bench/dpo.py --data completion-heavy        a short prompt, long answers
python bench/dpo.py --model llama-1b --dtype bfloat16 --examples 16     random weights in a known shape, on a GPU
"""

import dataclasses

import compare

from rlhf.training.dpo import DPO as STAGE

VARIANTS = {
    "trl": "TRL's DPOTrainer as people run it, a reference pass in every step",
    "trl-precomputed": "TRL with precompute_ref_log_probs",
    "packed": "this project without sharing prompts: one padding-free row, cached reference",
    "shared": "this project: one padding-free row in which a pair shares its prompt, cached reference",
}


MODES = {"trl": None, "trl-precomputed": None, "packed": "rows", "shared": "pairs"}


def build(variant, plan, clock):
    if variant.startswith("trl"):
        return build_trl(variant, plan, clock)
    trainer = STAGE.build(dataclasses.replace(plan, packing_mode=MODES[variant]), None)
    if not trainer.reference_seconds > 0:
        raise SystemExit(
            f"{variant}: the cached reference took no time: it was not computed, or its time was not taken"
        )
    clock.seconds.append(trainer.reference_seconds)
    return trainer


def build_trl(variant, plan, clock):
    from datasets import Dataset
    from trl import DPOTrainer, get_peft_config

    from rlhf.models.loading import load_policy
    from rlhf.models.tokenizer import load_tokenizer

    class Clocked(DPOTrainer):
        _precompute_ref_logps = clock(DPOTrainer._precompute_ref_logps)

    plan.args.precompute_ref_log_probs = variant == "trl-precomputed"
    tokenizer = load_tokenizer(plan.model_name)
    return Clocked(
        model=load_policy(plan.model_name, tokenizer, plan.model_args),
        args=plan.args,
        train_dataset=Dataset.from_list(plan.data.train),
        processing_class=tokenizer,
        peft_config=get_peft_config(plan.model_args),
    )


if __name__ == "__main__":
    compare.main(compare.Bench("dpo", VARIANTS, MODES, build))
