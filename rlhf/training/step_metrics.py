"""TRL's metrics of a global batch: collected per micro-batch without waiting for them, reduced to one value per step."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from typing import Any

import torch

from rlhf.training.deferred import MAX_PENDING, Deferred, Pending, deferring
from rlhf.training.step_means import StepMeans
from rlhf.training.steps import GlobalBatch
from rlhf.training.throughput import compute_dtype, flops_per_token, peak_flops, peak_memory_gib


class StepMetrics:
    """Mixin for TRL's trainers: the metrics of a step over all of its micro-batches and ranks."""

    global_batch: GlobalBatch | None = None
    _pending: Pending | None = None  # metrics that are not read yet
    _flops_per_token: float | None = None
    _peak_flops: float | None = None  # of one device; None if unknown
    # TRL's trainers have these
    accelerator: Any
    args: Any
    model: Any
    _metrics: Any
    _total_train_tokens: Any

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
        super().log(logs, start_time)  # type: ignore[misc]  # TRL's trainers

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
            if not weight and name.startswith("rewards/accuracies_"):
                continue  # there is no such pair: not the same as none that is right
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
