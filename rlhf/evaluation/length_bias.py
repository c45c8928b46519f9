"""How far a reward model goes by length: whether it prefers longer answers more often than the labels do.

Lengths are tokens of the reward model's tokenizer; `longer` is the length of the chosen answer minus that of the rejected
one, `margin` the score of the chosen answer minus that of the rejected one. Pure functions of NumPy arrays.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rlhf.evaluation.calibration import right
from rlhf.evaluation.resampling import estimate
from rlhf.evaluation.statistics import share


def slope(margins: np.ndarray, longer: np.ndarray) -> float:
    """Least squares with intercept: by how much a token more of the chosen answer raises the margin; NaN if it is undefined.

    Example: margins 1, 2, 3 at 0, 10, 20 tokens more -> 0.1.
    """
    spread = longer - longer.mean()
    total = float((spread**2).sum())
    return float((spread * (margins - margins.mean())).sum() / total) if total else math.nan


def correlation(margins: np.ndarray, longer: np.ndarray) -> float:
    """Pearson's correlation of margin and length difference; NaN if one of them is constant."""
    a, b = margins - margins.mean(), longer - longer.mean()
    scale = math.sqrt(float((a**2).sum()) * float((b**2).sum()))
    return float((a * b).sum()) / scale if scale > 0 else math.nan


def length_bias(margins: list[float] | np.ndarray, longer: list[float] | np.ndarray) -> dict[str, Any]:
    """All about the length bias of a reward model on held-out pairs, as JSON values.

    Args:
        margins: (N,) scores of chosen minus rejected, finite.
        longer: (N,) tokens of chosen minus rejected.

    Returns:
        {"prefers_longer", "labels_prefer_longer": shares of the pairs of unequal length, "excess": the first minus the second,
        "chosen_longer", "chosen_shorter", "equal_length": accuracy there (None without such pairs),
        "accuracy_gap": the first minus the second, "correlation", "explained": its square, the share of the margins' variance
        that the length difference explains, "per_token": `slope`}. Shares have Wilson's intervals
        ({"share", "low", "high", "count"}), the others bootstrap intervals over pairs ({"value", "low", "high"}, None where
        the number is undefined).
    """
    margins, longer = np.asarray(margins, dtype=float), np.asarray(longer, dtype=float)
    correct, sides = right(margins), np.sign(longer)
    unequal = sides != 0
    prefers = np.where(sides > 0, correct, 1 - correct)[unequal]  # the model prefers the longer answer
    labelled = (sides[unequal] > 0).astype(float)  # the labels do
    return {
        "prefers_longer": _share(prefers),
        "labels_prefer_longer": _share(labelled),
        "excess": estimate(lambda rows: float((prefers - labelled)[rows].mean()), len(prefers)),
        "chosen_longer": _share(correct[sides > 0]),
        "chosen_shorter": _share(correct[sides < 0]),
        "equal_length": _share(correct[~unequal]),
        "accuracy_gap": estimate(lambda rows: _gap(correct[rows], sides[rows]), len(margins)),
        "correlation": estimate(lambda rows: correlation(margins[rows], longer[rows]), len(margins)),
        "explained": estimate(lambda rows: correlation(margins[rows], longer[rows]) ** 2, len(margins)),
        "per_token": estimate(lambda rows: slope(margins[rows], longer[rows]), len(margins)),
    }


def _gap(correct: np.ndarray, sides: np.ndarray) -> float:
    """Accuracy where chosen is longer minus accuracy where it is shorter."""
    more, less = correct[sides > 0], correct[sides < 0]
    return float(more.mean() - less.mean()) if len(more) and len(less) else math.nan


def _share(values: np.ndarray) -> dict[str, Any] | None:
    return share(values.tolist()) if len(values) else None
