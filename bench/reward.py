"""Reward model: this project against TRL's RewardTrainer, side by side.

python bench/reward.py --data pairs.jsonl          SmolLM2-135M with a score head, LoRA, fp32, 4 pairs a step
"""

import compare

from rlhf.reward import REWARD as STAGE

VARIANTS = {
    "trl": "TRL's RewardTrainer",
    "packed": "this project without sharing prompts: one padding-free row",
    "shared": "this project: one padding-free row in which a pair shares its prompt",
}


def build(variant, context, clock):
    import rlhf.reward

    pack = rlhf.reward.pack
    if variant == "trl":  # the stage builds TRL's trainer and packs it; what is left without packing is TRL's own
        context.stage_args.packing = False
    elif variant == "packed":
        rlhf.reward.pack = lambda trainer, context, mode: pack(trainer, context, "rows")
    return STAGE.build(context)


if __name__ == "__main__":
    compare.main(compare.Bench("reward", VARIANTS, build))
