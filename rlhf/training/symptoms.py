"""What the metrics of a run say about it: pure functions of the logs, each of which finds one symptom or nothing.

A threshold stands where it is used, with its reason. All are far from what healthy runs do, because a watcher that cries
wolf is ignored: held-out accuracies are compared by their standard error, training metrics only as means of `WINDOW` logs.

`log-ratio` below is the mean of log p(answer | policy) - log p(answer | reference) over the pairs' own answers, in nats per
answer: TRL logs it times beta as `rewards/chosen` and `rewards/rejected`. It is not the KL divergence, which is a mean over
answers that the policy itself writes; `rlhf evaluate` measures that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rlhf.training.metric_history import LATER, WINDOW, Finding, History, Settings

LN2 = math.log(2)


def find(history: History, settings: Settings) -> list[Finding]:
    """All symptoms that the logs show now."""
    found = (check(history, settings) for check in CHECKS if settings.stage in STAGES_OF[check.__name__])
    return [finding for finding in found if finding is not None]


# --- DPO --------------------------------------------------------------------------------------------------------------


def log_ratios(history: History, settings: Settings) -> tuple[dict[str, float], str] | None:
    """(log-ratio of each side and the chosen answers' log-probability under the reference, where from): held out if possible."""
    if history.heldout and {"eval_rewards/chosen", "eval_rewards/rejected"} <= history.heldout[-1].keys():
        row, where = history.heldout[-1], "held-out"
        values = {side: row[f"eval_rewards/{side}"] / settings.beta for side in ("chosen", "rejected")}
        logps = row.get("eval_logps/chosen")
    else:
        rewards = {side: history.smoothed(f"rewards/{side}") for side in ("chosen", "rejected")}
        if rewards["chosen"] is None or rewards["rejected"] is None:
            return None
        where = "training"
        values = {side: value / settings.beta for side, value in rewards.items() if value is not None}
        logps = history.smoothed("logps/chosen")
    if logps is None or not all(map(math.isfinite, [logps, *values.values()])):
        return None
    return values | {"reference": logps - values["chosen"]}, where


FALLS = (
    0.10  # of the chosen answers' log-probability. DPO lowers it a little in many healthy runs (arXiv:2404.12358): the
)
# quickstart by 0.08. At 0.10 an answer of 50 nats has become e^5 = 150 times as unlikely.


def chosen_falls(history: History, settings: Settings) -> Finding | None:
    """The chosen answers become unlikely too (likelihood displacement, arXiv:2410.08847)."""
    if (found := log_ratios(history, settings)) is None:
        return None
    ratios, where = found
    if ratios["reference"] >= -1:  # of an empty or a memorised answer
        return None
    share = ratios["chosen"] / ratios["reference"]
    if share < FALLS:
        return None
    now = ratios["reference"] + ratios["chosen"]
    beta = f"raise beta (it is {settings.beta:g})"
    rate = f"lower learning_rate (it is {settings.learning_rate:g})"
    step = history.heldout[-1]["step"] if where == "held-out" else history.step
    return Finding(
        "chosen_falls", step,
        f"the chosen {where} answers are losing probability: {ratios['reference']:.1f} -> {now:.1f} nats per answer, "
        f"log-ratio to the reference {ratios['chosen']:+.1f} (rejected {ratios['rejected']:+.1f}). A small fall is normal in "
        "DPO; at this size the policy forgets how to write good answers, whatever the margin says",
        (*((beta, rate) if settings.beta < 0.05 else (rate, beta)),
         "add an SFT term: loss_type: [sigmoid, sft], loss_weights: [1, 0.2]"),
        share,
    )  # fmt: skip


MOVED = 0.1  # nats per answer: at 10% of a run, so little extrapolates to 1 nat at its end: a reward of 0.1 at beta 0.1


def nothing_moves(history: History, settings: Settings) -> Finding | None:
    """The policy is still the reference although the learning rate has been up for a while."""
    if not _had_time(history, settings):
        return None
    rewards = [
        abs(row.get(f"rewards/{side}", math.inf)) for row in history.last[-WINDOW:] for side in ("chosen", "rejected")
    ]
    largest = max(rewards) / settings.beta  # of any batch: means over several would cancel
    if not largest < MOVED:
        return None
    loss = f"; the loss is {history.last[-1]['loss']:.4f}" + (", where it started: ln 2" if settings.log_two else "")
    times = "10 to 100 times as high" if largest < MOVED / 3 else "3 to 10 times as high"
    return Finding(
        "nothing_moves", history.step,
        f"the policy has hardly moved in {history.step} of {settings.total_steps} steps: no batch's answers are more than "
        f"{largest:.2g} nats per answer from the reference{loss}. Such a learning rate changes nothing",
        (f"raise learning_rate (it is {settings.learning_rate:g}): {times}; LoRA wants 10 to 100 times the rate of full "
         "fine-tuning",),
        1.0,
    )  # fmt: skip


def small_beta(history: History, settings: Settings) -> Finding | None:
    """The policy moves, but beta counts it so little that the loss stays where it was."""
    if settings.beta >= 0.05 or not settings.log_two or not _had_time(history, settings):
        return None
    found, loss = log_ratios(history, settings), history.smoothed("loss")
    if found is None or loss is None:
        return None
    largest = max(abs(found[0]["chosen"]), abs(found[0]["rejected"]))
    # more than 1 nat away, and a loss within 0.02 of ln 2: a mean reward margin below 0.04, by which all pairs weigh alike, right or wrong
    if largest < 1 or abs(loss - LN2) > 0.02:
        return None
    return Finding(
        "small_beta", history.step,
        f"the loss is still {loss:.3f} (ln 2 = 0.693), though {found[1]} answers are up to {largest:.1f} nats from the reference: "
        f"at beta {settings.beta:g} that is a reward of {largest * settings.beta:.2g}, so that nothing holds the policy near the "
        "reference, and pairs that are right already are pushed on",
        (f"raise beta (it is {settings.beta:g}; 0.1 is usual)",), largest,
    )  # fmt: skip


def margin_without_accuracy(history: History, settings: Settings) -> Finding | None:
    """The held-out margin grows, while neither accuracy nor loss get better: pairs that are right become more right."""
    names = ("eval_margin", "eval_accuracy") if settings.stage == "reward" else ("eval_rewards/margins", ACCURACY)
    rows = [row for row in history.heldout if all(name in row for name in names) and row["step"] > 0]
    if len(rows) < 4:
        return None
    before, now = rows[-4], rows[-1]  # over three evaluations: one can be luck
    grown, better = now[names[0]] - before[names[0]], now[names[1]] - before[names[1]]
    if grown < max(0.1, abs(before[names[0]]) / 2) or better > 0.5 * _noise(before[names[1]], settings):
        return None
    if now[names[1]] > 0.95 or now["eval_loss"] <= before["eval_loss"]:  # nothing left to win; or it still learns
        return None
    return Finding(
        "margin_without_accuracy", history.step,
        f"since step {before['step']} the held-out margin has grown from {before[names[0]]:.2f} to {now[names[0]]:.2f}, but not "
        f"the accuracy ({before[names[1]]:.0%} -> {now[names[1]]:.0%}), and the loss rises ({before['eval_loss']:.3f} -> "
        f"{now['eval_loss']:.3f}): the model only becomes surer of what it knew, and of its mistakes",
        _STOP_EARLIER + (("raise beta",) if settings.stage == "dpo" else ("set center_rewards_coefficient",)), now[names[0]],
    )  # fmt: skip


def follows_length(history: History, settings: Settings) -> Finding | None:
    """The policy prefers the longer answer (or the shorter one) whatever it says: its own answers will follow."""
    row = next((row for row in reversed(history.heldout) if LONGER in row and SHORTER in row), None)
    if row is None or row["step"] == 0 or settings.heldout < 40:
        return None
    high, low = max(row[LONGER], row[SHORTER]), min(row[LONGER], row[SHORTER])
    # two groups of about half the pairs: 3 standard errors of their difference, and 0.3, as answers do differ in length
    if low >= 0.5 or high <= 0.5 or high - low < max(0.3, 3 * math.sqrt(2 * 0.25 / (settings.heldout / 2))):
        return None
    long = row[LONGER] > row[SHORTER]
    return Finding(
        "follows_length", history.step,
        f"on held-out pairs whose chosen answer is the longer one the policy is right in {row[LONGER]:.0%}, where it is the "
        f"shorter one in {row[SHORTER]:.0%}: it goes by length, and its own answers will get {'longer' if long else 'shorter'}",
        ("set loss_type: sigmoid_norm (log-probabilities per token), or ld_alpha: 0.5 for long answers",
         "balance the data: `rlhf data stats` shows lengths"),
        high - low,
    )  # fmt: skip


# --- all stages -------------------------------------------------------------------------------------------------------

ACCURACY = "eval_rewards/accuracies"
LONGER, SHORTER = "eval_rewards/accuracies_longer", "eval_rewards/accuracies_shorter"
_STOP_EARLIER = ("load_best_model_at_end: true writes the best checkpoint, early_stopping_patience: 3 stops by itself",)


def accuracy_turns(history: History, settings: Settings) -> Finding | None:
    """The held-out accuracy has been falling since its best."""
    name = ACCURACY if settings.stage == "dpo" else "eval_accuracy"
    rows = [row for row in history.heldout if name in row and row["step"] > 0]
    if len(rows) < 4:
        return None
    best = max(range(len(rows) - 2), key=lambda i: rows[i][name])
    recent = (rows[-1][name] + rows[-2][name]) / 2
    fall = rows[best][name] - recent
    # two standard errors, although the pairs are the same each time: the best of many is too good by luck
    least = max(0.03, _noise(rows[best][name], settings))
    if (
        fall <= least or rows[best][name] - max(rows[-1][name], rows[-2][name]) < least / 2
    ):  # one bad evaluation is not enough
        return None
    return Finding(
        "accuracy_turns", history.step,
        f"the held-out accuracy was {rows[best][name]:.0%} at step {rows[best]['step']} and is {rows[-1][name]:.0%} now, beyond "
        "what chance explains: the model fits its training pairs and unlearns the rest",
        (*_STOP_EARLIER, f"fewer num_train_epochs, or lower learning_rate (it is {settings.learning_rate:g})"), fall,
    )  # fmt: skip


def loss_turns(history: History, settings: Settings) -> Finding | None:
    """The held-out loss has been rising since its lowest."""
    rows = history.heldout
    if len(rows) < 3:
        return None
    best = min(rows[:-2], key=lambda row: row["eval_loss"])
    lowest, last = best["eval_loss"], rows[-2:]
    # 5%, and both of the last two above: the same rows each time, so that its noise is far below
    if lowest <= 0 or min(row["eval_loss"] for row in last) < 1.02 * lowest or last[-1]["eval_loss"] < 1.05 * lowest:
        return None
    return Finding(
        "loss_turns", history.step,
        f"the held-out loss was {lowest:.3f} at step {best['step']} and is {last[-1]['eval_loss']:.3f} now: what the model learns "
        "does not carry over to other data any more",
        (*_STOP_EARLIER, f"fewer num_train_epochs, lower learning_rate (it is {settings.learning_rate:g}), or more data"),
        last[-1]["eval_loss"] / lowest - 1,
    )  # fmt: skip


def memorises(history: History, settings: Settings) -> Finding | None:
    """Training pairs that were seen before are right, held-out ones are not."""
    names = ("rewards/accuracies", ACCURACY) if settings.stage == "dpo" else ("accuracy", "eval_accuracy")
    training = history.smoothed(names[0])
    if training is None or not history.heldout or names[1] not in history.heldout[-1]:
        return None
    if history.last[-WINDOW].get("epoch", 0) < 1:  # in the first epoch no pair was seen before
        return None
    heldout = history.heldout[-1][names[1]]
    if training - heldout < max(0.25, 1.5 * _noise(heldout, settings)):
        return None
    return Finding(
        "memorises", history.step,
        f"{training:.0%} of the training pairs are right, and {heldout:.0%} of the held-out ones: since the second epoch the model "
        "learns its pairs by heart",
        ("num_train_epochs: 1, or more data", *_STOP_EARLIER), training - heldout,
    )  # fmt: skip


def loss_rises(history: History, settings: Settings) -> Finding | None:
    """Training makes the training loss itself worse."""
    now = history.smoothed("loss")
    if now is None or not history.first or len(history.last) < LATER:
        return None
    start = (
        LN2
        if settings.log_two and settings.stage != "sft"
        else sum(r["loss"] for r in history.first) / len(history.first)
    )
    # 20%: the mean of 10 batches varies by less in all stages
    if start <= 0 or now < 1.2 * start:
        return None
    return Finding(
        "loss_rises", history.step,
        f"the training loss has risen from {start:.3f} to {now:.3f} (mean of {WINDOW} logs): the steps are too large",
        (f"lower learning_rate (it is {settings.learning_rate:g}), or more warmup_steps",), now / start - 1,
    )  # fmt: skip


def reward_learns_nothing(history: History, settings: Settings) -> Finding | None:
    """A reward model whose scores of chosen and rejected answers do not part."""
    loss, margin = history.smoothed("loss"), history.smoothed("margin")
    if loss is None or margin is None or not _had_time(history, settings):
        return None
    # a mean margin of 0.02 is worth 0.01 of loss, less than the noise of any batch
    if abs(margin) > 0.02 or abs(loss - LN2) > 0.01:
        return None
    return Finding(
        "nothing_moves", history.step,
        f"after {history.step} of {settings.total_steps} steps the loss is {loss:.4f} (ln 2 = 0.6931, a coin toss) and the margin "
        f"{margin:+.3f}: the reward model tells chosen from rejected answers no better than at the start",
        (f"raise learning_rate (it is {settings.learning_rate:g}): 10 to 100 times as high",), 1.0,
    )  # fmt: skip


def sft_learns_nothing(history: History, settings: Settings) -> Finding | None:
    """The held-out loss of SFT is where it was at the first evaluation."""
    if len(history.heldout) < 3 or not _had_time(history, settings):
        return None
    first, now = history.heldout[0], history.heldout[-1]
    # 0.1% of the loss of the same rows: a step that is felt at all moves it more
    if abs(now["eval_loss"] - first["eval_loss"]) >= 0.001 * abs(first["eval_loss"]):
        return None
    return Finding(
        "nothing_moves", history.step,
        f"the held-out loss has not moved between step {first['step']} and {now['step']}: {first['eval_loss']:.4f} -> "
        f"{now['eval_loss']:.4f}",
        (f"raise learning_rate (it is {settings.learning_rate:g}); LoRA wants 10 to 100 times the rate of full fine-tuning",), 1.0,
    )  # fmt: skip


def _had_time(history: History, settings: Settings) -> bool:
    """Whether the learning rate has been up for 10 steps and 10% of the run, and for `WINDOW` logs."""
    since = history.top_rate_since
    needed = max(10, settings.total_steps // 10)
    return since is not None and history.step - since >= needed and len(history.last) >= WINDOW


def _noise(accuracy: float, settings: Settings) -> float:
    """Two standard errors of an accuracy on the held-out pairs."""
    p = min(max(accuracy, 0.1), 0.9)
    return 2 * math.sqrt(p * (1 - p) / settings.heldout) if settings.heldout else 0.1


CHECKS: Sequence[Callable[[History, Settings], Finding | None]] = (
    nothing_moves, reward_learns_nothing, sft_learns_nothing, small_beta, chosen_falls, loss_rises, accuracy_turns, loss_turns,
    memorises, margin_without_accuracy, follows_length,
)  # fmt: skip
_DPO, _PAIRS, _ALL = ("dpo",), ("dpo", "reward"), ("dpo", "reward", "sft")
STAGES_OF = {
    "nothing_moves": _DPO, "reward_learns_nothing": ("reward",), "sft_learns_nothing": ("sft",), "small_beta": _DPO,
    "chosen_falls": _DPO, "loss_rises": _ALL, "accuracy_turns": _PAIRS, "loss_turns": _ALL, "memorises": _PAIRS,
    "margin_without_accuracy": _PAIRS, "follows_length": _DPO,
}  # fmt: skip
