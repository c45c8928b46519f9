"""Supervised fine-tuning (SFT) on the chosen answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.runs.stop import Stopper
from rlhf.training.model_checks import use_experts
from rlhf.training.stage import Loaded, Plan, Stage
from rlhf.upstream import check_upstream

if TYPE_CHECKING:
    from rlhf.runs.checkpointing import CheckpointMixin


def load(plan: Plan) -> Loaded:
    """The policy to train, for SFT and DPO."""
    from trl import get_peft_config

    from rlhf.models.loading import load_policy
    from rlhf.models.tokenizer import load_tokenizer

    trust = plan.args.trust_remote_code
    revision = plan.model_args.model_revision
    tokenizer = load_tokenizer(plan.model_name, plan.stage_args.chat_template, trust, revision=revision)
    model = load_policy(
        plan.model_name, tokenizer, plan.model_args, trust, plan.continues_adapter, merged=plan.merged_start
    )
    use_experts(model, plan)
    return Loaded(model, tokenizer, None if plan.continues_adapter else get_peft_config(plan.model_args))


def build(plan: Plan, stopper: Stopper | None = None) -> CheckpointMixin:
    """TRL's SFTTrainer for this plan."""
    from trl import SFTTrainer

    from rlhf.packing import lm_head
    from rlhf.training.precision import train_adapter_in_float32
    from rlhf.training.trainer import GlobalBatches
    from rlhf.training.trainer_setup import pack, trainer_arguments, use_global_batches

    class Trainer(GlobalBatches, SFTTrainer):
        pass

    check_upstream("sft", plan.recipe.is_quantised)
    if plan.args.use_cpu:
        lm_head.install()
    trainer = Trainer(**trainer_arguments(plan, load(plan)))
    train_adapter_in_float32(trainer.model)
    trainer.shard()
    use_global_batches(trainer, plan, pack(trainer, plan))
    return trainer


def probe(dataset) -> list[list[int]]:
    return [row["input_ids"] for row in dataset.select(range(min(2, len(dataset))))]


SFT = Stage("sft", "SFT", "sft", load, build, probe, packing_mode="rows")
