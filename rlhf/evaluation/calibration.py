"""Whether a reward model is as sure as it is right: reliability curve, expected calibration error, temperature.

A Bradley-Terry reward model says how sure it is: it prefers the answer of the higher score with probability
sigmoid(|margin|). All labels say "chosen", so a pair is looked at from the model's side: its confidence is
sigmoid(|margin|), from 0.5 to 1, and it is right if the margin is positive. Margins are scores of chosen minus rejected,
in nats. Pure functions of NumPy arrays.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rlhf.evaluation.resampling import SEED, estimate
from rlhf.runs.intervals import wilson_interval

BINS = 10  # of confidence, from 0.5 to 1, each 0.05 wide
FOLDS = 5
SIMULATED = 1000
FEW_PAIRS = 20  # below this many pairs there is no fit


def confidence(margins: np.ndarray) -> np.ndarray:
    """sigmoid(|margin|): the probability that the model gives the answer that it prefers."""
    return 1 / (1 + np.exp(-np.abs(margins)))


def right(margins: np.ndarray) -> np.ndarray:
    """1 where the chosen answer has the higher score, 0 where the rejected one has, 0.5 for equal scores."""
    return (np.sign(margins) + 1) / 2


def bin_numbers(sure: np.ndarray) -> np.ndarray:
    """The bin of each confidence: 0 for [0.5, 0.55), ..., 9 for [0.95, 1]."""
    return np.clip(np.floor((sure - 0.5) * 2 * BINS + 1e-9).astype(np.int64), 0, BINS - 1)


def calibration_error(sure: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error: |accuracy - mean confidence| of each bin, weighted by its share of the pairs.

    Args:
        sure, correct: (N,) confidence in [0.5, 1], and 0, 0.5 or 1.

    Example: two pairs of confidence 0.9, one of them right: |0.5 - 0.9| = 0.4.

    Source: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599, equation 3.
    """
    numbers = bin_numbers(sure)
    gaps = np.bincount(numbers, weights=correct - sure, minlength=BINS)
    return float(np.abs(gaps).sum() / len(sure))


def reliability(margins: np.ndarray) -> list[dict[str, float]]:
    """The reliability curve: of each bin with pairs its mean confidence, and its accuracy with Wilson's interval.

    Returns:
        [{"from", "to", "confidence", "share", "low", "high", "count"}, ...]
    """
    sure, correct = confidence(margins), right(margins)
    numbers, found = bin_numbers(sure), []
    for number in range(BINS):
        here = numbers == number
        count = int(here.sum())
        if count:
            low, high = wilson_interval(float(correct[here].sum()), count)
            found.append({
                "from": 0.5 + number / (2 * BINS), "to": 0.5 + (number + 1) / (2 * BINS),
                "confidence": float(sure[here].mean()), "share": float(correct[here].mean()),
                "low": low, "high": high, "count": count,
            })  # fmt: skip
    return found


def loss(margins: np.ndarray, temperature: float = 1.0) -> float:
    """Mean -log sigmoid(margin / temperature), in nats per pair: the reward model's loss."""
    return float(np.logaddexp(0.0, -margins / temperature).mean())


def fit_temperature(margins: np.ndarray) -> float | None:
    """The temperature that makes `loss` smallest (maximum likelihood, one parameter).

    The loss is convex in 1 / temperature; its derivative is bisected.

    Returns:
        None if there is none: every pair is right (any lower temperature is better), or the margins are negative on
        average (any higher one is).

    Example: margins of +2 three times and -2 once: sigmoid(2 / T) = 3/4, so T = 2 / ln 3 = 1.8205.
    """
    if not len(margins) or margins.min() >= 0 or margins.mean() <= 0:
        return None
    low, high = -20.0, 20.0  # log of 1 / temperature, relative to the mean margin
    scale = 1 / float(np.abs(margins).mean())
    for _ in range(60):
        middle = (low + high) / 2
        if _slope(margins, math.exp(middle) * scale) < 0:
            low = middle
        else:
            high = middle
    return 1 / (math.exp((low + high) / 2) * scale)


def _slope(margins: np.ndarray, inverse: float) -> float:
    """The derivative of the loss by 1 / temperature."""
    return float(-(margins * np.exp(-np.logaddexp(0.0, margins * inverse))).mean())


def temperature_interval(margins: np.ndarray, temperature: float) -> tuple[float, float | None]:
    """95% interval of a fitted temperature, by the sandwich variance of 1 / temperature; None: no upper bound."""
    inverse = 1 / temperature
    wrong = np.exp(-np.logaddexp(0.0, margins * inverse))  # sigmoid(-margin / T)
    bread = float((margins**2 * wrong * (1 - wrong)).mean())
    meat = float(((margins * wrong) ** 2).mean())
    half = 1.959964 * math.sqrt(meat / len(margins)) / bread if bread else math.inf
    return 1 / (inverse + half), 1 / (inverse - half) if inverse > half else None


def crossfitted_loss(margins: np.ndarray) -> float | None:
    """The loss at a fitted temperature, where the temperature of each fifth of the pairs is fitted on the other four."""
    folds, total = np.arange(len(margins)) % FOLDS, 0.0
    for fold in range(FOLDS):
        temperature = fit_temperature(margins[folds != fold])
        if temperature is None:
            return None
        held_out = margins[folds == fold]
        total += loss(held_out, temperature) * len(held_out)
    return total / len(margins)


def error_by_chance(sure: np.ndarray, seed: int = SEED) -> tuple[float, float]:
    """(mean, 95th percentile) of the expected calibration error that a calibrated model shows on so many pairs."""
    draw = np.random.default_rng(seed)
    found = [calibration_error(sure, (draw.random(len(sure)) < sure).astype(float)) for _ in range(SIMULATED)]
    return float(np.mean(found)), float(np.quantile(found, 0.95))


def calibration(margins: list[float] | np.ndarray) -> dict[str, Any]:
    """All about the calibration of a reward model on held-out pairs, as JSON values.

    Args:
        margins: (N,) scores of chosen minus rejected, N at least 1, finite.

    Returns:
        {"pairs", "error": {"value", "low", "high"} (expected calibration error; its interval is a bootstrap over pairs),
        "by_chance": [mean, 95th percentile] of the error of a calibrated model, "bins": `reliability`,
        "loss", "temperature", "temperature_low", "temperature_high" (None: unbounded), "loss_after" (cross-fitted),
        "no_temperature": why there is none, or ""}
    """
    margins = np.asarray(margins, dtype=float)
    sure, correct = confidence(margins), right(margins)
    temperature = fit_temperature(margins) if len(margins) >= FEW_PAIRS else None
    low, high = temperature_interval(margins, temperature) if temperature is not None else (None, None)
    return {
        "pairs": len(margins),
        "error": estimate(lambda rows: calibration_error(sure[rows], correct[rows]), len(margins)),
        "by_chance": list(error_by_chance(sure)),
        "bins": reliability(margins),
        "loss": loss(margins),
        "temperature": temperature,
        "temperature_low": low,
        "temperature_high": high,
        "loss_after": crossfitted_loss(margins) if temperature is not None else None,
        "no_temperature": "" if temperature is not None else _why_none(margins),
    }


def _why_none(margins: np.ndarray) -> str:
    if len(margins) < FEW_PAIRS:
        return f"fewer than {FEW_PAIRS} pairs"
    return "every pair is ranked right" if margins.min() >= 0 else "the mean margin is not positive"
