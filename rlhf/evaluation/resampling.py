"""Bootstrap intervals: of anything that can be computed from a sample of rows, seeded, so that they can be recomputed."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

RESAMPLES = 1000
MANY_ROWS = 100_000  # from here on fewer resamples do: their interval's own error falls with the rows
FEW_RESAMPLES = 200
SEED = 20240613
MANY_RESAMPLES = 2000  # of a statistic that takes many at once
AT_ONCE = 4_000_000  # drawn numbers in memory at once


def bootstrap(statistic: Callable[[np.ndarray], float], strata: list[np.ndarray], seed: int = SEED) -> dict[str, float]:
    """95% percentile interval of a statistic, rows drawn with replacement within each stratum.

    Args:
        statistic: of an array of row numbers; NaN where it is undefined (such resamples are left out).
        strata: the row numbers of each group that is resampled for itself; one array if there are no groups.

    Returns:
        {"low", "high"}; both NaN if the statistic is undefined in more than half of the resamples.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    return bootstraps(lambda rows: {"": statistic(rows)}, strata, seed)[""]


def bootstraps(
    statistics: Callable[[np.ndarray], dict[str, float]], strata: list[np.ndarray], seed: int = SEED
) -> dict[str, dict[str, float]]:
    """`bootstrap` of several statistics by name, all from the same resamples."""
    draw = np.random.default_rng(seed)
    count = RESAMPLES if sum(map(len, strata)) < MANY_ROWS else FEW_RESAMPLES
    found: dict[str, list[float]] = {}
    for _ in range(count):
        rows = np.concatenate([stratum[draw.integers(0, len(stratum), len(stratum))] for stratum in strata])
        for name, value in statistics(rows).items():
            found.setdefault(name, []).append(value)
    return {name: _interval(np.array(values)) for name, values in found.items()}


def _interval(values: np.ndarray) -> dict[str, float]:
    defined = values[np.isfinite(values)]
    if 2 * len(defined) < len(values):
        return {"low": math.nan, "high": math.nan}
    low, high = np.quantile(defined, (0.025, 0.975))
    return {"low": float(low), "high": float(high)}


def bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray], count: int, seed: int, resamples: int = MANY_RESAMPLES
) -> tuple[float, float]:
    """95% percentile interval of a statistic that takes many resamples at once (NumPy; N rows, B resamples).

    Args:
        statistic: takes row numbers [B, N] and returns its value per resample [B].

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
    """
    random, values = np.random.default_rng(seed), []
    at_once = max(1, AT_ONCE // count)
    for start in range(0, resamples, at_once):
        draws_BN = random.integers(0, count, (min(at_once, resamples - start), count))
        values.append(statistic(draws_BN))
    low, high = np.percentile(np.concatenate(values), (2.5, 97.5))
    return float(low), float(high)


def estimate(statistic: Callable[[np.ndarray], float], count: int, seed: int = SEED) -> dict[str, float] | None:
    """A statistic of `count` rows with its bootstrap interval: {"value", "low", "high"}; None if it is undefined."""
    rows = np.arange(count)
    value = float(statistic(rows)) if count else math.nan
    if not math.isfinite(value):
        return None
    found = {"value": value, **bootstrap(statistic, [rows], seed)}
    return found if all(map(math.isfinite, found.values())) else None
