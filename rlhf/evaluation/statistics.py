"""Statistics of an evaluation: losses, accuracies and win rates with intervals, from log-probabilities and scores.

Comparisons of two models are in rlhf/evaluation/paired.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from rlhf.runs.intervals import wilson_interval
from rlhf.runs.results import POLICIES


def share(wins: list[float]) -> dict[str, Any]:
    """A share of wins (1), ties (0.5) and losses (0) with its 95% interval and count."""
    low, high = wilson_interval(sum(wins), len(wins))
    return {"share": sum(wins) / len(wins), "low": low, "high": high, "count": len(wins)}


def logistic_loss(margin: float) -> float:
    """-log sigmoid(margin) = log(1 + e^-margin), without overflow for large negative margins."""
    return max(0.0, -margin) + math.log1p(math.exp(-abs(margin)))


def compare(a: float, b: float) -> float:
    """1 if a is larger, 0 if b is, 0.5 if they are equal."""
    return 0.5 if a == b else float(a > b)


def token_loss(pairs: list[dict], model: str, side: str = "chosen") -> float:
    """Mean negative log-likelihood per token (nats) of the chosen, or the rejected, answers."""
    return -sum(p[model][side] for p in pairs) / sum(p[model][f"{side}_tokens"] for p in pairs)


def lengths(texts: list[str]) -> dict[str, Any]:
    """Mean words and characters of answers, and how many are empty; NaN without answers."""
    return {
        "mean_words": _mean([len(text.split()) for text in texts]),
        "mean_characters": _mean([len(text) for text in texts]),
        "answers_empty": sum(not text for text in texts),
    }


def summarise(
    pairs: list[dict], answers: list[dict], beta: float, policies: Iterable[str] = POLICIES
) -> dict[str, Any]:
    """All results of the table, computed from the measured pairs and answers.

    Args:
        policies: the policies' keys in `pairs` and `answers`, in the order in which they are shown.
    """
    results: dict[str, Any] = {"pairs": len(pairs), "beta": beta, "policies": {}}
    for model in policies:
        if model in pairs[0]:
            given = [a for a in answers if f"{model}_cut" in a]
            results["policies"][model] = {
                "chosen_loss": token_loss(pairs, model),
                "rejected_loss": token_loss(pairs, model, "rejected"),
                "chosen_logp": _mean([p[model]["chosen"] for p in pairs]),
                "rejected_logp": _mean([p[model]["rejected"] for p in pairs]),
                "answers": len(given),
                "answers_cut": sum(a[f"{model}_cut"] for a in given),
                **lengths([a[model] for a in given]),
                "prefers_chosen": share([compare(p[model]["chosen"], p[model]["rejected"]) for p in pairs]),
                "prefers_chosen_per_token": share([compare(*_per_token(p[model])) for p in pairs]),
            }
    if "sft" in pairs[0] and "dpo" in pairs[0]:
        margins = [
            beta * ((p["dpo"]["chosen"] - p["sft"]["chosen"]) - (p["dpo"]["rejected"] - p["sft"]["rejected"]))
            for p in pairs
        ]
        results["dpo"] = {
            "loss_before": math.log(2),
            "loss_after": sum(map(logistic_loss, margins)) / len(margins),
            "margin": sum(margins) / len(margins),
            "accuracy": share([compare(m, 0.0) for m in margins]),
        }
    if "reward" in pairs[0]:
        gaps = [p["reward"]["chosen"] - p["reward"]["rejected"] for p in pairs]
        results["reward"] = {
            "accuracy": share([compare(g, 0.0) for g in gaps]),
            "loss_after": sum(map(logistic_loss, gaps)) / len(gaps),
        }
        judged = [a for a in answers if a.get("sft") and a.get("dpo")]
        if judged:
            results["win_rate"] = {
                **share([compare(a["dpo_reward"], a["sft_reward"]) for a in judged]),
                "same_answer": sum(a["sft"] == a["dpo"] for a in judged),
                **{f"{m}_mean_reward": _mean([a[f"{m}_reward"] for a in judged]) for m in ("sft", "dpo")},
                **{f"{m}_mean_words": _mean([len(a[m].split()) for a in judged]) for m in ("sft", "dpo")},
            }
    return results


def _per_token(logps: dict[str, float]) -> tuple[float, float]:
    return logps["chosen"] / logps["chosen_tokens"], logps["rejected"] / logps["rejected_tokens"]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
