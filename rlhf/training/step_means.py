"""The metrics of an optimizer step: sums over micro-batches, each value weighted by what it is a mean over."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import torch

from rlhf.training.deferred import Deferred

# What TRL's metrics are means over; all others are means over pairs (DPO, reward) or labelled tokens (SFT).
MEANS_OF = {
    "entropy": "scored", "logits/chosen": "chosen", "logits/rejected": "rejected", "mean_token_accuracy": "chosen",
    "rewards/accuracies_longer": "longer", "rewards/accuracies_shorter": "shorter",
}  # fmt: skip


class StepMeans:
    """This rank's sums of what its micro-batches log, each value weighted by the pairs or tokens that it is a mean over.

    Attributes:
        noted: (metric, value, weight) that are not added up yet: their values may be `Deferred`.
        sums, weights: of each metric.
        extremes: the largest of each `max_reward`, and of each negated `min_reward`.
    """

    def __init__(self) -> None:
        self.noted: list[tuple[str, Any, float]] = []
        self.sums: dict[str, float] = defaultdict(float)
        self.weights: dict[str, float] = defaultdict(float)
        self.extremes: dict[str, float] = {}

    def note(self, metrics: dict[str, list], part: dict[str, Any]) -> None:
        """The metrics that TRL has logged for one micro-batch."""
        counts = count_means(part["batch"], part["examples"])
        for name, values in metrics.items():
            if name in ("min_reward", "max_reward"):
                self.noted.append((name, values[-1], part["examples"]))
            elif name != "num_tokens":
                weight = counts[MEANS_OF.get(name, "examples") if "labels" not in counts else "labels"]
                self.noted.append((name, values[-1], weight))

    def add_up(self) -> None:
        """Read what is noted: at the end of a step, so that the GPU is waited for once."""
        noted, self.noted = self.noted, []
        for name, value, weight in noted:
            value = value.value if isinstance(value, Deferred) else value
            if name in ("min_reward", "max_reward"):
                sign = -1 if name == "min_reward" else 1
                value = sign * value if weight else -float("inf")
                self.extremes[name] = max(self.extremes.get(name, -float("inf")), value)
            else:
                self.sums[name] += value * weight if weight else 0.0
                self.weights[name] += weight


def by_length(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The pairs whose chosen answer has more tokens than the rejected one (`longer`), and fewer (`shorter`): bool, per pair."""
    mask: Any = batch["completion_mask"]
    chosen, rejected = getattr(mask, "host", mask).cpu().sum(dim=1).chunk(2)
    return {"longer": chosen > rejected, "shorter": chosen < rejected}


def add_accuracies_by_length(metrics: dict[str, list], batch: dict[str, torch.Tensor]) -> None:
    """DPO's accuracy where the chosen answer is the longer one, and where it is the shorter one.

    TRL logs the mean margin; the margins that it is the mean of are what that value was computed from.
    """
    logged = metrics.get("rewards/margins")
    if not logged or not isinstance(logged[-1], Deferred):
        return
    margins = logged[-1].origin()
    for name, pairs in by_length(batch).items():
        metrics[f"rewards/accuracies_{name}"] = [margins.then(functools.partial(_share_above_0, pairs))]


def _share_above_0(pairs: torch.Tensor, margins: torch.Tensor) -> float:
    return float((margins[pairs] > 0).double().mean()) if pairs.any() else 0.0


def count_means(batch: dict[str, torch.Tensor], examples: int) -> dict[str, int]:
    """How many pairs and tokens a micro-batch's metrics are means over; all 0 for a dummy micro-batch."""
    counts = {"examples": examples}
    if "completion_mask" in batch:
        mask = batch["completion_mask"][:, 1:]
        chosen, rejected = (int(half.sum()) for half in mask.chunk(2))
        counts |= {"chosen": chosen, "rejected": rejected, "scored": chosen + rejected}
        counts |= {name: int(pairs.sum()) for name, pairs in by_length(batch).items()}
    if "labels" in batch:
        counts["labels"] = int((batch["labels"][:, 1:] != -100).sum())
    return counts if examples else dict.fromkeys(counts, 0)
