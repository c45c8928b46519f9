"""Distributions of lengths: exact, in memory that grows with the number of different lengths, not of rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any


class Lengths:
    """Lengths of one part of the rows."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, length: int) -> None:
        self.counts[length] += 1

    def __len__(self) -> int:
        return self.counts.total()

    @property
    def mean(self) -> float:
        return sum(length * number for length, number in self.counts.items()) / max(1, len(self))

    def quantile(self, share: float) -> int:
        """The smallest length that at least this share of the rows does not exceed.

        Example: of 1, 2, 3, 10 the quantile 0.5 is 2.
        """
        wanted, passed = math.ceil(share * len(self)), 0
        for length in sorted(self.counts):
            passed += self.counts[length]
            if passed >= wanted:
                return length
        return 0

    def above(self, limit: int) -> int:
        """How many are longer."""
        return sum(number for length, number in self.counts.items() if length > limit)

    def histogram(self) -> dict[int, int]:
        """Rows by the power of two that their length does not exceed; empty ones in between are there.

        Example: of 1, 3, 4, 17 -> {1: 1, 2: 0, 4: 2, 8: 0, 16: 0, 32: 1}.
        """
        found: Counter[int] = Counter()
        for length, number in self.counts.items():
            found[bucket(length)] += number
        if not found:
            return {}
        first, last = (edge.bit_length() - 1 for edge in (min(found), max(found)))
        return {1 << power: found[1 << power] for power in range(first, last + 1)}

    def record(self) -> dict[str, Any]:
        return {
            "mean": round(self.mean, 2), "median": self.quantile(0.5), "p95": self.quantile(0.95), "max": max(self.counts, default=0),
            "histogram": self.histogram(),
        }  # fmt: skip


def bucket(length: int) -> int:
    """The power of two that a length does not exceed; 1 for 0."""
    return 1 << max(length - 1, 0).bit_length()


def bars(histogram: Mapping[int, int], width: int = 40, full: str = "█") -> list[tuple[str, int, str]]:
    """(range of lengths, rows, bar) of each bucket; a bucket with any row has a bar.

    Example: bars({4: 2, 8: 1}, 4, "#") -> [("3-4", 2, "####"), ("5-8", 1, "##")].
    """
    most = max(histogram.values(), default=0) or 1
    return [
        (f"{edge // 2 + 1:,}-{edge:,}" if edge > 2 else f"{'0-' if edge == 1 else ''}{edge}", number,
         full * max(round(width * number / most), number > 0))
        for edge, number in histogram.items()
    ]  # fmt: skip
