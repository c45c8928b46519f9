"""Two models on the same prompts: win rates with bootstrap intervals, paired tests, length-controlled win rates.

Pure functions of arrays with one entry per prompt (NumPy; legend of suffixes: N prompts, B resamples). All that is random
is seeded and drawn here, so a result depends on its inputs and the seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.evaluation.resampling import AT_ONCE, MANY_RESAMPLES, bootstrap_interval
from rlhf.runs.intervals import wilson_interval

EXACT_SIGNS = 14  # prompts up to which all 2^n signs of a permutation test are counted
RIDGE = 1e-4  # keeps the fit finite where length, or nothing, decides every prompt; moves those 57 models by 0.01 points at most


def win_rate(wins: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """The share of wins (a tie counts half) with its 95% bootstrap interval over prompts and the exact sign test.

    If all prompts ended alike, resampling them shows no spread: the interval is Wilson's then.

    Args:
        wins: per prompt 1 (won), 0.5 (tie), 0 (lost); or a judge's probability that it was won.

    Returns:
        {"share", "low", "high", "count", "wins", "ties", "losses", "p": of `sign_test`}

    Example: win_rate([1, 1, 0.5, 0]) -> share 0.625, wins 2, ties 1, losses 1, p 1.0.
    """
    wins_N = np.asarray(wins, float)
    won, lost = int((wins_N > 0.5).sum()), int((wins_N < 0.5).sum())
    if np.ptp(wins_N) == 0:
        low, high = wilson_interval(float(wins_N.sum()), len(wins_N))
    else:
        low, high = bootstrap_interval(lambda draws_BN: wins_N[draws_BN].mean(-1), len(wins_N), seed)
    return {
        "share": float(wins_N.mean()), "low": low, "high": high, "count": len(wins_N), "wins": won,
        "ties": len(wins_N) - won - lost, "losses": lost, "p": sign_test(won, lost),
    }  # fmt: skip


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value that wins and losses are equally likely; ties say nothing and are left out.

    The same as McNemar's exact test, whose discordant pairs are the wins and losses.

    Example: 8 wins and 2 losses -> 2 * (1 + 10 + 45) / 2^10 = 0.109375.
    """
    count, fewer = wins + losses, min(wins, losses)
    if 2 * fewer >= count:
        return 1.0
    log = lambda k: math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)  # noqa: E731
    return min(1.0, 2 * math.fsum(math.exp(log(k)) for k in range(fewer + 1)))


def permutation_test(differences: Sequence[float], seed: int = 0, permutations: int = 10_000) -> float:
    """Two-sided p-value that paired differences are as often positive as negative: of their mean under random signs.

    All 2^n signs are counted up to EXACT_SIGNS prompts; else `permutations` are drawn, and p = (1 + as large) / (1 + drawn).

    Example: [1, 2, 3] -> all 8 signs; |sum| >= 6 for 2 of them -> 0.25.
    """
    differences_N = np.asarray(differences, float)
    count = len(differences_N)
    limit = abs(differences_N.sum()) * (1 - 1e-12) - 1e-300
    if count <= EXACT_SIGNS:
        bits = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float((np.abs((2 * bits - 1) @ differences_N) >= limit).mean())
    random, reached = np.random.default_rng(seed), 0
    at_once = max(1, AT_ONCE // count)
    for start in range(0, permutations, at_once):
        signs_BN = 2.0 * random.integers(0, 2, (min(at_once, permutations - start), count)) - 1
        reached += int((np.abs(signs_BN @ differences_N) >= limit).sum())
    return (1 + reached) / (1 + permutations)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the same order.

    Example: [0.01, 0.04, 0.03] -> [0.03, 0.06, 0.06].
    """
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


# --- length-controlled win rate --------------------------------------------------------------------------------------


def length_controlled(
    wins: Sequence[float], lengths: Sequence[float], other_lengths: Sequence[float], seed: int = 0
) -> dict[str, Any]:
    """The win rate at equal length: AlpacaEval's `length_controlled_minimal`.

    A logistic regression of the preference on tanh(d / sd(d)), d the difference of the two answers' lengths and sd its
    sample standard deviation, and a constant; the win rate is the prediction for d = 0. AlpacaEval fits it with an L1
    penalty chosen by cross-validation, here it is maximum likelihood: on the annotations of 57 models of its leaderboard
    the two differ by 0.03 points in the median and by 0.99 at most. The leaderboard's own column
    (`length_controlled_v1`) also uses the difficulty of its 805 instructions, which other prompts don't have.

    Args:
        wins: per prompt 1, 0.5 or 0, or a probability.
        lengths, other_lengths: of the answers, in characters as in AlpacaEval.

    Returns:
        {"share", "low", "high": by bootstrap over prompts with the fit repeated, "coefficient": of tanh(d / sd(d)), above
        0 if longer answers win, "sd": of d}. Where all lengths are equal: the plain win rate, coefficient 0.

    Source: arXiv:2404.04475, and `glm_winrate.py` of https://github.com/tatsu-lab/alpaca_eval at cd543a1.
    """
    wins_N = np.asarray(wins, float)
    differences_N = np.asarray(lengths, float) - np.asarray(other_lengths, float)
    sd = float(np.std(differences_N, ddof=1)) if len(wins_N) > 1 else 0.0
    coefficient, constant = _fit(_squashed(differences_N[None]), wins_N[None])

    def statistic(draws_BN: np.ndarray) -> np.ndarray:
        return _logistic(_fit(_squashed(differences_N[draws_BN]), wins_N[draws_BN])[1])

    share = float(_logistic(constant)[0])
    if np.ptp(wins_N) == 0:
        low, high = wilson_interval(float(wins_N.sum()), len(wins_N))
        low, high = min(low, share), max(high, share)
    else:
        low, high = bootstrap_interval(statistic, len(wins_N), seed, MANY_RESAMPLES // 2)
    return {"share": share, "low": low, "high": high, "coefficient": float(coefficient[0]), "sd": sd}


def _squashed(differences_BN: np.ndarray) -> np.ndarray:
    """tanh(d / sd(d)) per row; 0 where all differences of a row are equal."""
    if differences_BN.shape[1] < 2:
        return np.zeros_like(differences_BN)
    sd_B1 = np.std(differences_BN, axis=1, ddof=1, keepdims=True)
    return np.where(sd_B1 > 0, np.tanh(differences_BN / np.where(sd_B1 > 0, sd_B1, 1)), 0.0)


def _fit(x_BN: np.ndarray, y_BN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(coefficient of x, constant), [B] each, of a logistic regression per row, by damped Newton steps."""
    slope, constant = np.zeros(len(x_BN)), np.zeros(len(x_BN))
    for _ in range(100):
        p_BN = _logistic(slope[:, None] * x_BN + constant[:, None])
        w_BN, r_BN = p_BN * (1 - p_BN), y_BN - p_BN
        gradient = (r_BN * x_BN).sum(1) - RIDGE * slope, r_BN.sum(1) - RIDGE * constant
        a, b, c = (w_BN * x_BN**2).sum(1) + RIDGE, (w_BN * x_BN).sum(1), w_BN.sum(1) + RIDGE
        determinant = a * c - b * b
        steps = (c * gradient[0] - b * gradient[1]) / determinant, (a * gradient[1] - b * gradient[0]) / determinant
        damped = np.minimum(1, 4 / np.maximum(np.maximum(np.abs(steps[0]), np.abs(steps[1])), 1e-300))
        slope, constant = slope + damped * steps[0], constant + damped * steps[1]
        if max(np.abs(steps[0]).max(), np.abs(steps[1]).max()) < 1e-9:
            break
    return slope, constant


def _logistic(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


# --- divergence from a reference -------------------------------------------------------------------------------------


def divergence(log_ratios: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    """KL(policy || reference) from answers that the policy sampled, with standard errors over answers.

    Args:
        log_ratios: log policy(answer) - log reference(answer) per answer, in nats.
        tokens: of each answer.

    Returns:
        {"sum", "sum_se": nats per answer, "per_token", "per_token_se": the sum over all answers by all their tokens
        (linearised standard error of a ratio), "answers", "tokens"}

    Example: [2, 4] of [2, 2] tokens -> sum 3 ± 1, per token 1.5 ± 0.5.
    """
    r_N, t_N = np.asarray(log_ratios, float), np.asarray(tokens, float)
    count, ratio = len(r_N), float(r_N.sum() / t_N.sum())
    spread = lambda x_N: float(np.sqrt((x_N**2).sum() / (count * (count - 1)))) if count > 1 else float("nan")  # noqa: E731
    return {
        "sum": float(r_N.mean()), "sum_se": spread(r_N - r_N.mean()), "per_token": ratio,
        "per_token_se": spread(r_N - ratio * t_N) / float(t_N.mean()), "answers": count, "tokens": int(t_N.sum()),
    }  # fmt: skip
