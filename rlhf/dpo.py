"""Direct Preference Optimization: the policy moves towards chosen and away from rejected answers, held by its reference.

The reference is exactly the policy before its first update. Where that policy is
    a whole model, trained by LoRA       the reference is the model with the new adapter switched off
    an SFT adapter that goes on          the reference is a frozen copy of that adapter, named `ref` (TRL makes it);
                                         with the adapter off it would be the model before SFT
    a whole model, fully fine-tuned      the reference is a second copy of it
and the first thing the run does is to check this: at step 0 the loss must be ln 2.
"""

from __future__ import annotations

import math

from rlhf.config import UserError
from rlhf.data.formats import preference_rows
from rlhf.run import Context, Stage, pack, score_labelled_positions_only


def build(context: Context):
    """TRL's DPOTrainer for this recipe, with the check of step 0."""
    from datasets import Dataset
    from trl import get_peft_config

    from rlhf.models import is_adapter, load_policy, load_tokenizer

    args, model_args, stage_args = context.args, context.model_args, context.stage_args
    if args.use_cpu:
        score_labelled_positions_only()
    goes_on = is_adapter(context.model_name) and stage_args.continue_adapter and model_args.use_peft
    if goes_on:
        check_same_adapter(context)
    tokenizer = load_tokenizer(context.model_name, stage_args.chat_template, args.trust_remote_code)
    model = load_policy(context.model_name, tokenizer, model_args, args.trust_remote_code, continue_adapter=goes_on)
    reference = None
    if not model_args.use_peft and not args.precompute_ref_log_probs:
        reference = load_policy(
            context.model_name, tokenizer, model_args, args.trust_remote_code, continue_adapter=False
        )
    trainer = guarded_trainer_class()(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(context.data.train),
        eval_dataset=Dataset.from_list(context.data.heldout) if context.data.heldout else None,
        processing_class=tokenizer,
        peft_config=None if goes_on else get_peft_config(model_args),
    )
    pack(trainer, context, "pairs")
    return trainer


def check_same_adapter(context: Context) -> None:
    """An adapter that goes on keeps its own shape: a recipe that names another shape is told so."""
    from peft import PeftConfig

    adapter = PeftConfig.from_pretrained(context.model_name)
    for key, attribute in (("lora_r", "r"), ("lora_alpha", "lora_alpha")):
        wanted, found = context.recipe.get(key), getattr(adapter, attribute)
        if wanted is not None and wanted != found:
            raise UserError(
                f"{context.recipe.where(key)}: {key}={wanted}, but the adapter that goes on has {found}; set {found}, or "
                "`continue_adapter: false` to merge it and train a new one"
            )


def guarded_trainer_class():
    """DPOTrainer that checks, before its first step, that the policy is its own reference."""
    from trl import DPOTrainer

    class GuardedDPOTrainer(DPOTrainer):
        _start_checked = False

        def training_step(self, model, inputs, *args, **kwargs):
            if not self._start_checked and self.state.global_step == 0:
                self.check_start(model, inputs)
            self._start_checked = True
            return super().training_step(model, inputs, *args, **kwargs)

        def check_start(self, model, inputs) -> None:
            import torch

            was_training = model.training
            model.eval()
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = float(
                    self.accelerator.gather(self.compute_loss(model, self._prepare_inputs(dict(inputs)))).mean()
                )
            model.train(was_training)
            found = {side: self._metrics["eval"][f"rewards/{side}"][-1] for side in ("chosen", "rejected")}
            self._metrics["eval"].clear()
            # under QLoRA TRL trains the adapter in bf16 beside a reference in fp32
            trained = [p.dtype for p in model.parameters() if p.requires_grad]
            exact = not (self.args.bf16 or self.args.fp16) and all(dtype == torch.float32 for dtype in trained)
            refuse_wrong_start(loss, found["chosen"], found["rejected"], 1e-3 if exact else 2e-2, self.loss_types)

    return GuardedDPOTrainer


def refuse_wrong_start(loss: float, chosen: float, rejected: float, tolerance: float, loss_types: list[str]) -> None:
    """Raise unless DPO starts at its reference: implicit rewards 0 and, for the sigmoid loss, -log sigmoid(0) = ln 2.

    Args:
        loss, chosen, rejected: the loss and the mean implicit rewards (beta times log-ratio) of the first batch.
        tolerance: allowed distance of the loss from ln 2; the rewards may be off by twice that (d loss = d margin / 2).

    Raises:
        UserError: with what was found and the likely causes.
    """
    wrong_loss = loss_types == ["sigmoid"] and not abs(loss - math.log(2)) <= tolerance
    wrong_rewards = not max(abs(chosen), abs(rejected)) <= 2 * tolerance
    if wrong_loss or wrong_rewards:
        raise UserError(
            f"DPO does not start from its reference: before the first update the loss is {loss:.4f} (expected ln 2 = "
            f"0.6931) and the implicit rewards are {chosen:+.4f} for chosen and {rejected:+.4f} for rejected (expected 0). "
            "The policy and the reference are different models: the reference log-probabilities come from another "
            "model, adapter, precision or template than the policy. Nothing was trained"
        )


def probe(dataset) -> list[list[int]]:
    return [row["prompt_ids"] + row["chosen_ids"] for row in dataset.select(range(min(2, len(dataset))))]


DPO = Stage("dpo", "DPO", preference_rows, build, probe)
