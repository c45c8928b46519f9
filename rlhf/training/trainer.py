"""TRL's trainers with one *global* batch per optimizer step: the same losses and metrics for any world size.

The trainer's loop sees one batch per step (gradient_accumulation_steps is 1). `training_step` does the gradient
accumulation over this rank's micro-batches (batching.py): it weights each loss by its share of the global batch and
reduces gradients in the last one. TRL's metrics are collected per micro-batch without communication and without reading
them (deferred.py), and read and reduced once per step, weighted by the pairs or tokens that they are means over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from typing import Any

import numpy as np
import torch

from rlhf.packing import known_inputs, move_batch
from rlhf.runs.checkpointing import CheckpointMixin
from rlhf.training.batching import step_examples
from rlhf.training.precision import AccurateNorm
from rlhf.training.step_means import add_accuracies_by_length
from rlhf.training.step_metrics import StepMetrics
from rlhf.training.steps import GlobalBatch, StepLoader, Steps, tokens_of


class GlobalBatches(AccurateNorm, StepMetrics, CheckpointMixin):
    """Mixin for SFTTrainer, RewardTrainer and DPOTrainer: makes a step process one global batch.

    Before `use_global_batches` is called it only corrects FSDP's mixed precision.
    """

    _step_weight: float | None = None  # of the current micro-batch; None outside a step
    _balance_divisor = 1.0  # SFT: TRL divides by it the micro-batch's loss that balances experts, which is a mean

    def use_global_batches(self, batch: GlobalBatch) -> None:
        """From now on a step takes `batch.global_batch_size` examples over all ranks."""
        self.args.gradient_accumulation_steps = 1
        self.global_batch = batch

    def create_accelerator_and_postprocess(self):
        """Under FSDP2 with bf16: reduce gradients in fp32 and don't cast the model's outputs.

        accelerate 1.15 has FSDP2 cast them to bf16: log-probabilities, whose sums were off by several nats.
        """
        super().create_accelerator_and_postprocess()
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        if (policy := getattr(plugin, "mixed_precision_policy", None)) is not None:
            exact = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
            plugin.mixed_precision_policy = exact
        config = self.accelerator.dataloader_config  # of TRL's own batches: the host need not wait for what is pinned
        config.non_blocking = config.non_blocking or (
            self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        )

    def shard(self) -> None:
        """Under FSDP2: shard the model now. TRL and transformers would only when training starts, after the reference pass."""
        from torch.distributed.fsdp import FSDPModule

        from rlhf.models.on_disk import shard_model

        if self.is_fsdp_enabled and not isinstance(self.model, FSDPModule):
            shard_model(self.model, self.accelerator)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        with self._prepared_already():
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    @contextlib.contextmanager
    def _prepared_already(self):
        """A sharded model is not wrapped again: its optimizer was made from the shards."""
        from torch.distributed.fsdp import FSDPModule

        if not isinstance(self.model, FSDPModule):
            yield
            return

        def prepare(model, optimizer):
            self.accelerator._models.append(model)
            return model, self.accelerator.prepare_optimizer(optimizer)

        vars(self.accelerator)["prepare"] = prepare
        try:
            yield
        finally:
            del vars(self.accelerator)["prepare"]

    # --- data

    def _prepare_dataset(self, dataset, processing_class, args, *more):
        """TRL's own tokenisation, in a collective and by one rank first, is skipped for rows that are tokenised."""
        if "example" not in dataset.column_names:
            return super()._prepare_dataset(dataset, processing_class, args, *more)  # type: ignore[misc]  # TRL's trainers
        return dataset.shuffle(seed=args.seed) if getattr(args, "shuffle_dataset", False) else dataset

    def get_train_dataloader(self):
        if self.global_batch is None:
            return super().get_train_dataloader()
        size, seed = (
            self.global_batch.global_batch_size,
            self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )
        number = len(self.train_dataset)
        order = functools.partial(step_examples, num_examples=number, global_batch_size=size, seed=seed)
        steps = self._steps(self.train_dataset, self.global_batch.num_tokens, order)
        return StepLoader(
            steps, -(-number // size), num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )  # fmt: skip

    def _steps(self, rows, num_tokens: np.ndarray, order) -> Steps:
        self._set_signature_columns_if_needed()
        assert self.global_batch is not None and self._signature_columns is not None
        rows = rows.select_columns([c for c in rows.column_names if c in self._signature_columns])
        return Steps(
            rows, num_tokens, self.data_collator, order, rank=self.accelerator.process_index, num_processes=self.accelerator.num_processes,
            max_tokens=self.global_batch.max_tokens_per_device, padded=self.global_batch.padded,
        )  # fmt: skip

    # --- training

    def training_step(self, model, inputs, num_items_in_batch=None):
        if "micro_batches" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        started = time.perf_counter()
        micro_batches, total = inputs["micro_batches"], torch.zeros((), device=self.args.device)
        tokens = self._global_tokens(micro_batches)
        self.current_gradient_accumulation_steps = 1
        tokens_before = self._total_train_tokens
        with self._step_metrics("train") as note:
            for number, part in enumerate(micro_batches):
                last = number == len(micro_batches) - 1
                self.accelerator.gradient_state._set_sync_gradients(last)
                with self._exchange_gradients(model, last):
                    loss = self._weighted(
                        part, inputs, lambda b: super(GlobalBatches, self).training_step(model, b, tokens)
                    )
                total += loss
                note(part)
        found = self._metrics["train"]
        found["imbalance"].append(inputs["imbalance"])
        found["micro_batches"].append(len(micro_batches))
        self._note_throughput(inputs, self._total_train_tokens - tokens_before, time.perf_counter() - started)
        return total

    def _weighted(self, part, inputs, compute):
        """Run `compute` on a micro-batch with the weight of its loss set."""
        world = self.accelerator.num_processes  # gradients and losses are averaged over ranks
        share = part["examples"] * world / inputs["examples"]
        by_tokens = "labels" in part["batch"]  # TRL divides by the global number of tokens itself
        self._step_weight = float(part["examples"] > 0) if by_tokens else share
        self._balance_divisor = 1 / share if by_tokens and share else 1.0
        try:
            return compute(part["batch"])
        finally:
            self._step_weight = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._step_weight is not None:
            self.current_gradient_accumulation_steps = self._balance_divisor  # type: ignore[assignment]  # else a count
        with self._metrics_later():
            known = known_inputs(inputs)
            found: Any = super().compute_loss(model, known, return_outputs, num_items_in_batch)
            if self._step_weight is not None and not self.model.training:
                add_accuracies_by_length(self._metrics["eval"], known)
        if self._step_weight is None:
            return found
        self.current_gradient_accumulation_steps = 1
        return (found[0] * self._step_weight, found[1]) if return_outputs else found * self._step_weight

    def _prepare_inputs(self, inputs):
        """Move a batch with its layout to the device, without waiting for it."""
        return super()._prepare_inputs(move_batch(inputs, self.args.device) if isinstance(inputs, dict) else inputs)

    def _exchange_gradients(self, model, last: bool):
        """Reduce gradients after the last micro-batch of a step; under FSDP2 with full fine-tuning after each one.

        FSDP2 keeps gradients that are not yet reduced unsharded, in fp32: 4 bytes per parameter on every rank, whatever
        the world size. LoRA has few parameters, so there the saved communication is worth it.
        """
        if last or self.is_deepspeed_enabled:  # DeepSpeed's engine reads sync_gradients itself
            return contextlib.nullcontext()
        if self.is_fsdp_enabled and not hasattr(self.model, "peft_config"):
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model=model)

    def _global_tokens(self, micro_batches) -> torch.Tensor | None:
        """Labelled tokens of the global batch (SFT)."""
        if "labels" not in micro_batches[0]["batch"]:
            return None
        count = sum(int((p["batch"]["labels"][:, 1:] != -100).sum()) for p in micro_batches if p["examples"])
        return self.accelerator.reduce(torch.full((), float(count), device=self.args.device))

    def floating_point_ops(self, inputs) -> int:
        return 0 if "micro_batches" in inputs else super().floating_point_ops(inputs)

    # --- evaluation

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):  # fmt: skip
        """Evaluate every row exactly once, whatever the world size."""
        if self.global_batch is None:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        from transformers.trainer_utils import EvalLoopOutput

        rows = dataloader.dataset
        size, number = self.global_batch.global_batch_size, len(rows)
        whole: Any = self.eval_dataset  # the same rows with all columns: transformers drops those that no model takes
        counted = whole if isinstance(whole, type(rows)) and len(whole) == number else rows
        num_tokens = tokens_of(counted, self.args.max_length, self.global_batch.padded)
        steps = self._steps(rows, num_tokens, lambda step: list(range(step * size, min(number, (step + 1) * size))))
        model = self._wrap_model(self.model, training=False)
        model.eval()
        total, weight = 0.0, 0.0
        with self._step_metrics("eval") as note:
            for number_of_step in range(-(-number // size)):
                step = steps[number_of_step]
                tokens = self._global_tokens(step["micro_batches"])
                mass, losses = step["examples"] if tokens is None else float(tokens), []
                for part in step["micro_batches"]:
                    batch = self._prepare_inputs(part["batch"])
                    with torch.no_grad(), self.compute_loss_context_manager():
                        loss = self._weighted(
                            {**part, "batch": batch}, step,
                            lambda b, tokens=tokens: self.compute_loss(model, b, num_items_in_batch=tokens),
                        )  # fmt: skip
                    losses.append(loss.detach())
                    note(part)
                for each in torch.stack(losses).tolist():  # read once per step
                    total += each * mass
                weight += mass
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss = float(self.accelerator.reduce(torch.tensor(total / weight, device=self.args.device), "mean"))
        nothing: Any = None  # TRL's predictions are not asked for
        return EvalLoopOutput(nothing, None, {f"{metric_key_prefix}_loss": loss}, number)
