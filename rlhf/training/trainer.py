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
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from rlhf.config.build import is_flash
from rlhf.distributed.processes import say
from rlhf.packing import PackedCollator, known_inputs, move_batch
from rlhf.runs.checkpointing import CheckpointMixin
from rlhf.training.batching import split_batch, step_examples
from rlhf.training.deferred import MAX_PENDING, Deferred, Pending, deferring
from rlhf.training.lengths import longest_row, too_long
from rlhf.training.precision import AccurateNorm
from rlhf.training.stage import Loaded, Plan
from rlhf.training.step_means import StepMeans
from rlhf.training.throughput import compute_dtype, flops_per_token, peak_flops, peak_memory_gib
from rlhf.training.tokenise import count_tokens
from rlhf.training.tokens import with_tokens


class Steps(Dataset):
    """Item k: this rank's collated micro-batches of step k.

    Attributes:
        rows: tokenised examples.
        num_tokens: per example, for the split.
    """

    def __init__(
        self, rows, num_tokens: np.ndarray, collate: Callable, order: Callable[[int], list[int]], **split: Any
    ):
        self.rows, self.num_tokens, self.collate, self.order = rows, num_tokens, collate, order
        self.rank, self.split = split.pop("rank"), split

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> dict[str, Any]:
        examples = self.order(step)
        split = split_batch(self.num_tokens[examples].tolist(), **self.split)
        shortest = min(examples, key=lambda i: self.num_tokens[i])
        micro_batches = []
        for places in split.ranks[self.rank]:
            chosen = [examples[place] for place in places]
            # a rank without examples runs a dummy micro-batch with weight 0, to take part in the collectives
            batch = self.collate([self.rows[i] for i in chosen or [shortest]])
            micro_batches.append({"batch": batch, "examples": len(chosen)})
        tokens = int(self.num_tokens[examples].sum())
        return {
            "micro_batches": micro_batches,
            "examples": len(examples),
            "tokens": tokens,
            "imbalance": split.imbalance,
        }


class StepLoader(DataLoader):
    """The steps of an epoch, one at a time; `set_epoch` selects the epoch."""

    def __init__(self, steps: Steps, steps_per_epoch: int, **options):
        self.epoch_steps = EpochSteps(steps_per_epoch)
        super().__init__(steps, batch_sampler=self.epoch_steps, collate_fn=_first, **options)

    def set_epoch(self, epoch: int) -> None:
        self.epoch_steps.set_epoch(epoch)


class EpochSteps:
    """Yields `[k]` for each step k of an epoch: a batch sampler, so that accelerate can skip steps on resume."""

    def __init__(self, steps_per_epoch: int):
        self.steps_per_epoch, self.epoch = steps_per_epoch, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        first = self.epoch * self.steps_per_epoch
        return iter([k] for k in range(first, first + self.steps_per_epoch))

    def __len__(self) -> int:
        return self.steps_per_epoch


def _first(items):
    return items[0]


@dataclasses.dataclass(frozen=True)
class GlobalBatch:
    """How a step's examples are chosen and split.

    Attributes:
        global_batch_size: examples per optimizer step, over all ranks.
        max_tokens_per_device: maximum tokens per micro-batch on one rank.
        padded: rows are padded, not packed.
        num_tokens: per training example, from `count_tokens`.
    """

    global_batch_size: int
    max_tokens_per_device: int
    padded: bool
    num_tokens: np.ndarray


class GlobalBatches(AccurateNorm, CheckpointMixin):
    """Mixin for SFTTrainer, RewardTrainer and DPOTrainer: makes a step process one global batch.

    Before `use_global_batches` is called it only corrects FSDP's mixed precision.
    """

    _step_weight: float | None = None  # of the current micro-batch; None outside a step
    _balance_divisor = 1.0  # SFT: TRL divides by it the micro-batch's loss that balances experts, which is a mean
    global_batch: GlobalBatch | None = None
    _pending: Pending | None = None  # metrics that are not read yet
    _flops_per_token: float | None = None
    _peak_flops: float | None = None  # of one device; None if unknown

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

    def _note_throughput(self, inputs, tokens: int, seconds: float) -> None:
        """Over all ranks. Tokens as TRL counts them (a shared prompt twice); MFU by the tokens computed (once)."""
        found = self._metrics["train"]
        found["tokens_per_second"].append(tokens / seconds)
        found["examples_per_second"].append(inputs["examples"] / seconds)
        if self._flops_per_token is None:
            model = self.accelerator.unwrap_model(self.model)
            self._flops_per_token = flops_per_token(model)
            if self.args.device.type == "cuda":
                name = torch.cuda.get_device_name(self.args.device)
                self._peak_flops = peak_flops(name, compute_dtype(self.args, model))
        if self._peak_flops and self.global_batch:
            computed = tokens if self.global_batch.padded else inputs["tokens"]
            peak = self._peak_flops * self.accelerator.num_processes
            found["mfu"].append(self._flops_per_token * computed / seconds / peak)

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
            found: Any = super().compute_loss(model, known_inputs(inputs), return_outputs, num_items_in_batch)
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

    # --- metrics

    @contextlib.contextmanager
    def _metrics_later(self):
        """While TRL computes a loss: its metrics are noted, and read when they are logged, or when too many wait."""
        if self._pending is None:  # TRL's own batches; in a step of ours `_step_metrics` has made one
            gather = self.accelerator.gather if self.accelerator.num_processes > 1 else None
            self._pending = Pending(gather, copies=self.args.torch_compile)
        with deferring(self.accelerator, self._pending):
            yield
        if self._pending.num_added > MAX_PENDING:
            self._read_metrics()

    def _read_metrics(self) -> None:
        """Replace metrics that wait by their numbers. A collective, if the ranks' values are gathered."""
        for found in self._metrics.values():
            for name, values in found.items():
                found[name] = [x.value if isinstance(x, Deferred) else x for x in values]
        if isinstance(self._total_train_tokens, Deferred):
            self._total_train_tokens = self._total_train_tokens.value

    def log(self, logs, start_time=None):
        self._read_metrics()
        super().log(logs, start_time)

    @contextlib.contextmanager
    def _step_metrics(self, mode: str):
        """Collect TRL's metrics per micro-batch without communication; at the end reduce each to one value per step."""
        outer, self._metrics[mode] = self._metrics[mode], defaultdict(list)
        tokens_before, self._total_train_tokens = self._total_train_tokens, 0
        pending_before, self._pending = self._pending, Pending(copies=self.args.torch_compile)
        means = StepMeans()
        positions = [0, 0]  # computed positions, and how many of them are padding

        def note(part) -> None:
            inner, self._metrics[mode] = self._metrics[mode], defaultdict(list)
            means.note(inner, part)
            mask = part["batch"]["attention_mask"]
            positions[0] += mask.numel()
            positions[1] += mask.numel() - int(mask.sum()) if self.global_batch and self.global_batch.padded else 0
            if mode == "train" and not part["examples"]:
                self._total_train_tokens -= int(mask.sum())
            if len(means.noted) > MAX_PENDING:  # an evaluation
                means.add_up()

        try:
            yield note
        finally:
            self._metrics[mode], tokens = outer, self._total_train_tokens
            self._total_train_tokens, self._pending = tokens_before, pending_before
        means.add_up()
        if mode == "train" and (memory := peak_memory_gib(self.args.device)) is not None:
            means.extremes["peak_memory_gib"] = memory  # of the fullest rank
        tokens = int(tokens)
        names = sorted(means.sums)
        sums_and_weights = [[means.sums[n], means.weights[n]] for n in names] + [[tokens, 0.0], positions]
        both = self._over_ranks(sums_and_weights, "sum")
        for name, (total, weight) in zip(names, both, strict=False):
            outer[name].append(total / weight if weight else 0.0)
        if extremes := sorted(means.extremes):
            found = self._over_ranks([means.extremes[name] for name in extremes], "max")
            for name, largest in zip(extremes, found, strict=True):
                outer[name].append(-largest if name == "min_reward" else largest)
        self._total_train_tokens += int(both[-2][0])
        if mode == "train":
            outer["padding"].append(both[-1][1] / both[-1][0])  # fraction of the computed positions
        outer["num_tokens"] = [self._total_train_tokens]

    def _over_ranks(self, values: list, reduction: str) -> list:
        """The sums or maxima over all ranks, elementwise: a collective, and on GPUs the host waits for it."""
        if self.accelerator.num_processes == 1:
            return values
        here = torch.tensor(values, dtype=torch.float64).to(self.args.device, non_blocking=True)
        if reduction == "sum":
            return self.accelerator.reduce(here).tolist()
        return self.accelerator.gather(here[None]).max(dim=0).values.tolist()


def tokens_of(dataset: Any, max_length: int | None, padded: bool) -> np.ndarray:
    """For each tokenised row the tokens that it takes, packed or padded (int32): from its column, or counted."""
    column = "padded" if padded else "packed"
    if column in dataset.column_names:
        return np.asarray(dataset.with_format("numpy")[column][:], dtype=np.int32)
    return np.array([count_tokens(row, max_length, padded) for row in dataset], dtype=np.int32)


def trainer_arguments(plan: Plan, loaded: Loaded) -> dict[str, Any]:
    """The constructor arguments that TRL's three trainers have in common."""
    tokens = plan.tokens or with_tokens(plan, loaded.tokenizer).tokens
    # without an evaluation DPO would compute the reference of the held-out rows for nothing
    evaluates = plan.args.eval_strategy != "no" or plan.args.eval_on_start
    heldout = tokens["heldout"].dataset if evaluates and "heldout" in tokens else None
    return {
        "model": loaded.model, "args": plan.args, "processing_class": loaded.tokenizer, "peft_config": loaded.peft_config,
        "train_dataset": tokens["train"].dataset, "eval_dataset": heldout if heldout is not None and len(heldout) else None,
    }  # fmt: skip


def pack(trainer: GlobalBatches, plan: Plan) -> bool:
    """Make the trainer's models compute on one padding-free row, or report why they can't (never a silent change).

    Returns:
        Whether batches are packed.
    """
    if plan.packing_mode is None:
        return False
    from rlhf.packing import kernel_name, pack_backbone, why_not

    asked = plan.recipe.get("attn_implementation")
    models = [trainer.model]
    if (reference := getattr(trainer, "ref_model", None)) is not None:
        models.append(trainer.accelerator.unwrap_model(reference))
    longest = known_longest(plan)
    for reason in filter(None, (why_not(model, longest) for model in models)):
        say(f"note: batches are padded, not packed: {reason}")
        if is_flash(asked):
            found = trainer.model.config._attn_implementation
            say(
                f"note: attention is {found}: {asked} applies to packed rows; `packing: false` passes it to "
                "transformers"
            )
        return False
    for model in models:
        pack_backbone(model, plan.packing_mode, longest)
    if not trainer.args.torch_compile:  # which may not follow tensors that know their values
        cuda = trainer.args.device.type == "cuda"
        trainer.data_collator = PackedCollator(trainer.data_collator, plan.packing_mode, varlen=cuda)
    if asked not in (None, "sdpa"):  # flash attention, eager
        device = trainer.args.device
        say(f"note: {asked} selects packed attention; on {device.type} the kernel is {kernel_name(device)}")
    return True


def known_longest(plan: Plan) -> int | None:
    """Tokens of the longest row that a model will be given: of the token ids if they are there, else max_length."""
    counted = [tokens.counts for tokens in plan.tokens.values()]
    return longest_row(plan, *counted) if counted else plan.args.max_length


def use_global_batches(trainer: GlobalBatches, plan: Plan, packed: bool) -> None:
    """Set the recipe's global batch size on the trainer, if it has one, after checking the longest example.

    Raises:
        UserError: a single example has more tokens than max_tokens_per_device.
    """
    stage_args, recipe = plan.stage_args, plan.recipe
    if stage_args.global_batch_size is None:
        return
    num_tokens = tokens_of(trainer.train_dataset, plan.args.max_length, not packed)
    longest = int(num_tokens.max(initial=0))
    if longest > stage_args.max_tokens_per_device:
        place = plan.data.train.place(trainer.train_dataset[int(num_tokens.argmax())]["example"])
        raise too_long(recipe, place, longest, stage_args.max_tokens_per_device)
    trainer.use_global_batches(
        GlobalBatch(stage_args.global_batch_size, stage_args.max_tokens_per_device, not packed, num_tokens)
    )
