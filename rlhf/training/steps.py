"""The data of global batches: each step's examples, split over ranks and micro-batches, one step at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from rlhf.training.batching import split_batch
from rlhf.training.tokenise import count_tokens


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


def tokens_of(dataset: Any, max_length: int | None, padded: bool) -> np.ndarray:
    """For each tokenised row the tokens that it takes, packed or padded (int32): from its column, or counted."""
    column = "padded" if padded else "packed"
    if column in dataset.column_names:
        return np.asarray(dataset.with_format("numpy")[column][:], dtype=np.int32)
    return np.array([count_tokens(row, max_length, padded) for row in dataset], dtype=np.int32)
