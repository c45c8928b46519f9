"""Reward model: this project against TRL's RewardTrainer, side by side.

python bench/reward.py --data pairs.jsonl          SmolLM2-135M with a score head, LoRA, fp32, 4 pairs a step
"""

import dataclasses

import compare

from rlhf.training.reward import REWARD as STAGE

VARIANTS = {
    "trl": "TRL's RewardTrainer",
    "packed": "this project without sharing prompts: one padding-free row",
    "shared": "this project: one padding-free row in which a pair shares its prompt",
}


MODES = {"trl": None, "packed": "rows", "shared": "pairs"}


def build(variant, plan, clock):
    # the stage builds TRL's trainer and packs it; what is left without packing is TRL's own
    return STAGE.build(dataclasses.replace(plan, packing_mode=MODES[variant]), None)


if __name__ == "__main__":
    compare.main(compare.Bench("reward", VARIANTS, MODES, build))
