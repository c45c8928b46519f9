"""Split one global batch into micro-batches of at most `max_tokens` tokens, balanced over data-parallel ranks.

The examples of an optimizer step depend on the seed and the step alone. How they are split over ranks and micro-batches
depends on the hardware and does not change the step: each loss is weighted by its share of the *global* batch (pairs;
tokens for SFT). All ranks have the same number of micro-batches, because gradients are reduced in the last one, and
ZeRO-3 and FSDP2 gather weights in each.
"""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """How a global batch is split.

    Attributes:
        ranks: per rank its micro-batches, per micro-batch the indices into the global batch; an empty list for a rank
            without examples in that micro-batch.
        imbalance: tokens of the most loaded rank over the mean, minus 1; 0 is perfect.
    """

    ranks: list[list[list[int]]]
    imbalance: float


def split_batch(num_tokens: list[int], num_processes: int, max_tokens: int, padded: bool = False) -> Split:
    """Split a global batch over ranks and micro-batches.

    The number of micro-batches is the smallest that fits. Examples are placed longest first, each into the emptiest
    micro-batch (LPT, Graham 1969: at most 4/3 of the optimal maximum). Micro-batches of similar size run at the same
    time, and the larger ones rotate over the ranks.

    Args:
        num_tokens: per example; packed, or of its longest row if rows are padded.
        num_processes: world size.
        max_tokens: maximum per micro-batch.
        padded: a micro-batch takes (examples x longest) tokens instead of the sum.

    Raises:
        ValueError: an example is longer than `max_tokens` (its index is named), or there are no examples.

    Example:
        >>> split_batch([5, 9, 2, 4], num_processes=2, max_tokens=11).ranks  # 9 + 2 and 5 + 4 tokens
        [[[1, 2]], [[0, 3]]]
        >>> split_batch([5, 9, 2, 4], num_processes=1, max_tokens=11).ranks
        [[[1, 2], [0, 3]]]
    """
    if not num_tokens:
        raise ValueError("a global batch has no examples")
    longest = int(np.argmax(num_tokens))
    if num_tokens[longest] > max_tokens:
        raise ValueError(f"example {longest} has {num_tokens[longest]} tokens, more than max_tokens={max_tokens}")
    order = sorted(range(len(num_tokens)), key=lambda i: (-num_tokens[i], i))
    num_micro = max(1, -(-sum(num_tokens) // (num_processes * max_tokens)))
    while (bins := _fill(order, num_tokens, num_processes * num_micro, max_tokens, padded)) is None:
        num_micro += 1
    return _deal(bins, num_tokens, num_processes)


def _fill(order, num_tokens, num_bins: int, max_tokens: int, padded: bool) -> list[list[int]] | None:
    """Examples in `num_bins` bins by LPT; None if a bin exceeds `max_tokens`."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    emptiest = [(0, number) for number in range(num_bins)]
    for example in order:
        _, number = heapq.heappop(emptiest)
        bins[number].append(example)
        load = _load(bins[number], num_tokens, padded)
        if load > max_tokens:
            return None
        heapq.heappush(emptiest, (load, number))
    return bins


def _load(examples: list[int], num_tokens, padded: bool) -> int:
    lengths = [num_tokens[i] for i in examples]
    return len(lengths) * max(lengths, default=0) if padded else sum(lengths)


def _deal(bins: list[list[int]], num_tokens, num_processes: int) -> Split:
    """Bins of similar size run at the same time; in each round the largest goes to the least loaded rank so far."""
    bins = sorted(bins, key=lambda b: (-_load(b, num_tokens, False), b))
    ranks: list[list[list[int]]] = [[] for _ in range(num_processes)]
    loads = [0] * num_processes
    for start in range(0, len(bins), num_processes):
        order = sorted(range(num_processes), key=lambda rank: (loads[rank], rank))
        for rank, examples in zip(order, bins[start : start + num_processes], strict=True):
            ranks[rank].append(sorted(examples))
            loads[rank] += _load(examples, num_tokens, False)
    return Split(ranks, max(loads) * num_processes / sum(loads) - 1)


def step_examples(step: int, num_examples: int, global_batch_size: int, seed: int) -> list[int]:
    """The rows of an optimizer step (from 0): a new permutation per epoch; the last step of an epoch may be smaller.

    Example:
        >>> [len(step_examples(k, 10, 4, seed=1)) for k in range(4)]
        [4, 4, 2, 4]
    """
    steps_per_epoch = -(-num_examples // global_batch_size)
    epoch, place = divmod(step, steps_per_epoch)
    order = _epoch_order(seed, epoch, num_examples)
    return order[place * global_batch_size : (place + 1) * global_batch_size].tolist()


@functools.lru_cache(maxsize=1)  # 4 bytes a row; making it takes half a second for ten million
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return order.astype(np.uint32) if num_examples < 2**32 else order
