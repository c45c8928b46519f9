"""Accuracy of a reward model by subset of the data: the column `subset` or `task` of a file."""

from __future__ import annotations

from typing import Any

from rlhf.evaluation.statistics import share

NO_SUBSET = "(none)"
MOST = 200  # subsets: a column of more values names rows, not subsets


def by_subset(names: list[str | None], correct: list[float]) -> list[dict[str, Any]]:
    """Accuracy with Wilson's interval per subset, by name.

    Args:
        names: the subset of each pair; None if its row has none.
        correct: 1, 0.5 (equal scores) or 0 for each pair.

    Returns:
        [{"subset", "share", "low", "high", "count"}, ...]; [] if no row has a subset, or there are more than MOST.

    Example: by_subset(["a", "b", "a"], [1, 0, 0]) -> a: 0.5 of 2, b: 0 of 1.
    """
    groups: dict[str | None, list[float]] = {}
    for name, value in zip(names, correct, strict=True):
        groups.setdefault(name, []).append(value)
    if set(groups) <= {None} or len(groups) > MOST:
        return []
    order = sorted(groups, key=lambda name: (name is None, name))
    return [{"subset": NO_SUBSET if name is None else name, **share(groups[name])} for name in order]
