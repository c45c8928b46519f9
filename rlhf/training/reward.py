"""Reward model: trains a score head on any backbone to predict which of two answers is preferred (Bradley-Terry)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf.distributed.sharding import is_zero3
from rlhf.runs.stop import Stopper
from rlhf.training.model_checks import use_experts
from rlhf.training.stage import Loaded, Plan, Stage
from rlhf.upstream import check_upstream

if TYPE_CHECKING:
    from rlhf.runs.checkpointing import CheckpointMixin


def load(plan: Plan) -> Loaded:
    """The reward model; with LoRA, the modules of a new head are trained and saved in full (`modules_to_save`)."""
    from transformers import set_seed
    from trl import get_peft_config

    from rlhf.models.loading import load_reward_model
    from rlhf.models.tokenizer import load_tokenizer

    args, model_args = plan.args, plan.model_args
    tokenizer = load_tokenizer(
        plan.model_name,
        plan.stage_args.chat_template,
        args.trust_remote_code,
        encoder=True,
        revision=model_args.model_revision,
    )
    set_seed(args.seed)  # loading initialises the new head: the same seed must give the same weights
    model, new_modules = load_reward_model(
        plan.model_name, tokenizer, model_args, args.trust_remote_code, plan.merged_start
    )
    use_experts(model, plan)
    adapter: Any = get_peft_config(model_args)  # a LoraConfig; TRL annotates what all methods of PEFT share
    if adapter is not None:
        adapter.task_type = "SEQ_CLS"
        adapter.modules_to_save = sorted({*(adapter.modules_to_save or []), *new_modules}) or None
    return Loaded(model, tokenizer, adapter)


def build(plan: Plan, stopper: Stopper | None = None) -> CheckpointMixin:
    """TRL's RewardTrainer for this plan."""
    from trl import RewardTrainer

    from rlhf.training.precision import train_adapter_in_float32
    from rlhf.training.trainer import GlobalBatches
    from rlhf.training.trainer_setup import pack, trainer_arguments, use_global_batches

    class Trainer(GlobalBatches, RewardTrainer):
        pass

    check_upstream("reward", plan.recipe.is_quantised)
    trainer = Trainer(**trainer_arguments(plan, load(plan)))
    if plan.args.bf16 or plan.args.fp16:  # autocast feeds it in 16 bits
        train_head_in_float32(trainer.model)
    train_adapter_in_float32(trainer.model)
    trainer.shard()
    use_global_batches(trainer, plan, pack(trainer, plan))
    return trainer


def train_head_in_float32(model: Any) -> None:
    """Hold a head that LoRA trains beside its adapters in float32, as PEFT holds the adapters.

    PEFT copies it in the base's dtype; in bfloat16 most of Adam's small updates would be rounded away. Under ZeRO-3
    DeepSpeed has its own float32 copy.
    """
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name and parameter.requires_grad and not is_zero3(parameter):
            parameter.data = parameter.data.float()


def probe(dataset) -> list[list[int]]:
    return [row[side] for row in dataset.select(range(min(2, len(dataset)))) for side in ("chosen_ids", "rejected_ids")]


REWARD = Stage("reward", "Reward model", "pairs", load, build, probe, packing_mode="pairs")
