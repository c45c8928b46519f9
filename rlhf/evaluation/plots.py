"""The curves of a stage as inline SVG for the report."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

# The plots of each stage: a title, the unit, and the metrics with their labels.
PLOTS = {
    "sft": [
        ("Loss", "nats per token", {"loss": "training", "eval_loss": "held out"}),
        ("Token accuracy", "share", {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "held out"}),
    ],
    "reward": [
        ("Loss", "nats per pair", {"loss": "training", "eval_loss": "held out"}),
        ("Margin chosen over rejected", "reward", {"margin": "training", "eval_margin": "held out"}),
        ("Accuracy", "share of pairs", {"accuracy": "training", "eval_accuracy": "held out"}),
    ],
    "dpo": [
        ("Loss", "nats per pair", {"loss": "training", "eval_loss": "held out"}),
        ("Implicit rewards", "beta x log-ratio", {"rewards/chosen": "chosen", "rewards/rejected": "rejected",
                                                  "rewards/margins": "margin", "eval_rewards/margins": "margin, held out"}),
        ("Log-probabilities", "nats per answer", {
            "logps/chosen": "chosen", "logps/rejected": "rejected",
            "eval_logps/chosen": "chosen, held out", "eval_logps/rejected": "rejected, held out"}),
        ("Accuracy", "share of pairs", {"rewards/accuracies": "training", "eval_rewards/accuracies": "held out"}),
    ],
}  # fmt: skip
COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#b91c1c")
MARK = "#b91c1c"  # where the run said something about itself
# The findings (rlhf/training/symptoms.py) that a plot shows, by its title; those of no plot stand in the list only.
MARKS = {
    "Loss": ("loss_turns", "loss_rises", "nothing_moves", "small_beta"), "Log-probabilities": ("chosen_falls",),
    "Accuracy": ("accuracy_turns", "memorises", "follows_length"), "Implicit rewards": ("margin_without_accuracy",),
    "Margin chosen over rejected": ("margin_without_accuracy",),
}  # fmt: skip
TIES = "rewards/accuracies"


def points_of(stage: dict[str, Any], metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric.

    DPO's accuracy is left out while the policy still equals its reference (at step 1, and as long as a warm-up keeps
    the learning rate at 0): all pairs are ties; TRL 1.16 counts exact ties as losses, and rounding decides the others.
    """
    rows = [m for m in stage["metrics"] if isinstance(m.get(metric), (int, float))]
    return [(m["step"], m[metric]) for m in rows if metric != TIES or not all_ties(m)]


def all_ties(row: dict[str, Any]) -> bool:
    """Whether DPO's policy still equals its reference in this line of metrics: implicit rewards of 0 up to rounding."""
    rewards = [row[key] for key in ("rewards/chosen", "rewards/rejected", "rewards/margins") if key in row]
    return bool(rewards) and all(abs(value) < 1e-4 for value in rewards)


def ties_note(stage: dict[str, Any]) -> str:
    """A sentence on how the plot treats the ties of the first steps; '' if there is no accuracy curve."""
    rows = [m for m in stage["metrics"] if TIES in m]
    if not rows:
        return ""
    why = "while the policy still equals its reference, every pair is a tie, which TRL counts as a loss"
    if all_ties(rows[0]):
        drawn = next((m["step"] for m in rows if not all_ties(m)), None)
        return f"DPO's accuracy is {f'drawn from step {drawn}' if drawn else 'not drawn'}: {why}."
    if rows[0]["step"] > 1:
        return f"DPO's first accuracy, over steps 1 to {rows[0]['step']}, is too low because of step 1: {why}."
    return ""


def draw(stage: dict[str, Any]) -> list[str]:
    """One small plot per quantity: a dot per log, their running mean as a line; none for a quantity without logs."""
    with _style():
        plots = [_draw_one(stage, *plot) for plot in PLOTS[stage["name"]]]
    return [svg for svg in plots if svg]


def draw_lengths(lengths: Mapping[str, Mapping[int, int]], unit: str) -> str:
    """A histogram: per part of a row the share of rows by length.

    Args:
        lengths: part -> power of two that the length does not exceed -> rows.
    """
    edges = sorted({edge for histogram in lengths.values() for edge in histogram})
    if not edges:
        return ""
    with _style():
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(3.6, 2.5), layout="constrained")
        width = 0.8 / len(lengths)
        for number, (part, histogram) in enumerate(lengths.items()):
            total = sum(histogram.values()) or 1
            at = [place + (number - (len(lengths) - 1) / 2) * width for place in range(len(edges))]
            axes.bar(
                at, [histogram.get(edge, 0) / total for edge in edges], width, color=COLOURS[number % 3], label=part
            )
        axes.set_xticks(range(len(edges)), [f"{edge:,}" for edge in edges], rotation=45 if len(edges) > 6 else 0)
        axes.set_title("Lengths", fontsize=10, loc="left")
        axes.set_xlabel(f"at most so many {unit}")
        axes.set_ylabel("share of pairs")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, axis="y")
        axes.legend(frameon=False, fontsize=8)
        return _svg(figure)


def draw_reliability(calibration: dict[str, Any]) -> str:
    """The reliability curve of a reward model: accuracy by confidence, its intervals, and how many pairs are where.

    Args:
        calibration: of rlhf/evaluation/calibration.py.
    """
    bins = calibration["bins"]
    with _style():
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(3.6, 2.5), layout="constrained")
        axes.plot((0.5, 1), (0.5, 1), color="#9ca3af", linewidth=0.8, linestyle="--", label="calibrated")
        sure, right = [b["confidence"] for b in bins], [b["share"] for b in bins]
        errors = [[b["share"] - b["low"] for b in bins], [b["high"] - b["share"] for b in bins]]
        axes.errorbar(sure, right, yerr=errors, color=COLOURS[0], marker="o", markersize=4, linewidth=1.2,
                      elinewidth=0.8, capsize=2, label="reward model, 95%")  # fmt: skip
        most = max(b["count"] for b in bins)
        middles = [(b["from"] + b["to"]) / 2 for b in bins]
        axes.bar(middles, [0.2 * b["count"] / most for b in bins], 0.045, color="#cbd5e1", zorder=0)
        axes.set_xlim(0.49, 1.01)
        axes.set_ylim(0, 1.02)
        axes.set_title("Is it as sure as it is right?", fontsize=10, loc="left")
        axes.set_xlabel("confidence, sigmoid(|margin|); bars: share of pairs")
        axes.set_ylabel("share ranked right")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.2), facecolor="white", edgecolor="none")
        return _svg(figure)


MOST_POINTS = 2000


def draw_length_bias(longer: Sequence[float], margins: Sequence[float]) -> str:
    """Margin against length difference, a dot per pair (the first MOST_POINTS), with the least-squares line of all.

    Args:
        longer: tokens of chosen minus those of rejected, by pair.
        margins: scores of chosen minus those of rejected.
    """
    if len(longer) < 2:
        return ""
    with _style():
        import matplotlib.pyplot as plt
        import numpy as np

        figure, axes = plt.subplots(figsize=(3.6, 2.5), layout="constrained")
        axes.axhline(0, color="#9ca3af", linewidth=0.8)
        axes.axvline(0, color="#9ca3af", linewidth=0.8)
        axes.scatter(longer[:MOST_POINTS], margins[:MOST_POINTS], color=COLOURS[0], s=8, alpha=0.5, linewidths=0)
        if np.ptp(longer) > 0:
            per_token, start = np.polyfit(longer, margins, 1)
            ends = np.array([min(longer), max(longer)])
            axes.plot(ends, start + per_token * ends, color=COLOURS[1], linewidth=1.6, label="least squares")
            axes.legend(frameon=False, fontsize=8)
        axes.set_title("Does it go by length?", fontsize=10, loc="left")
        axes.set_xlabel("tokens: chosen − rejected")
        axes.set_ylabel("score: chosen − rejected")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        return _svg(figure)


def _style() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "svg.hashsalt": "rlhf",
    }
    return matplotlib.rc_context(style)


def _svg(figure: Any) -> str:
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _draw_one(stage: dict[str, Any], title: str, unit: str, metrics: dict[str, str]) -> str:
    import matplotlib.pyplot as plt

    curves = {metric: points for metric in metrics if (points := points_of(stage, metric))}
    if not curves:
        return ""
    figure, axes = plt.subplots(figsize=(3.6, 2.5), layout="constrained")
    for finding in stage.get("findings") or []:
        if finding["finding"] in MARKS.get(title, ()):
            axes.axvline(finding["since"], color=MARK, linewidth=0.8, linestyle=":")
    for metric, colour in zip(metrics, COLOURS, strict=False):
        if metric not in curves:
            continue
        steps, values = zip(*curves[metric], strict=True)
        if metric.startswith("eval_"):
            axes.plot(steps, values, color=colour, marker="o", markersize=4, linewidth=1, label=metrics[metric])
        else:
            axes.scatter(steps, values, color=colour, s=6, alpha=0.35, linewidths=0)
            axes.plot(steps, running_mean(values), color=colour, linewidth=1.6, label=metrics[metric])
    guess = stage["name"] in ("reward", "dpo") and title == "Loss"
    if guess:
        axes.axhline(math.log(2), color="#9ca3af", linewidth=0.8, linestyle="--", label="ln 2")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # a MaxNLocator
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    if len(curves) + guess > 1:
        axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def running_mean(values: tuple[float, ...], window: int | None = None) -> list[float]:
    """Mean over the last `window` values (default: a tenth of them, at least 3); over fewer at the start.

    Example: running_mean((1, 2, 3, 4), 2) -> [1, 1.5, 2.5, 3.5].
    """
    window = window or max(3, len(values) // 10)
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]
