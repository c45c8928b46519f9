"""What an evaluation's comparisons of answers say: one sentence per model, and the tables of comparisons and of models.

A win is claimed only where the interval lies above 50%, and with the judge's independence beside it: a reward model that
was trained on the policy's own pairs, or that labelled them, shows whether the policy follows it, not more.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from rlhf.runs.results import labels_of, short_name

MUCH_CUT = 0.1  # share of answers cut at max_new_tokens from which the verdict mentions it
FEW = 30  # prompts below which an interval from resampling is too narrow


class PairRow(NamedTuple):
    """A row of the table of comparisons."""

    compared: str
    judge: str
    wins: str
    interval: str
    won: str
    p: str
    words: str
    equal_length: str


PAIR_COLUMNS = PairRow(
    "models", "judge", "wins", "95%", "won, tied, lost", "p", "words", "at equal length (95%; coeff.)"
)


class ModelRow(NamedTuple):
    """A row of the table of models."""

    model: str
    chosen: str
    rejected: str
    words: str
    characters: str
    cut: str
    kl: str
    kl_per_token: str


MODEL_COLUMNS = ModelRow(
    "model", "logp chosen", "logp rejected", "words", "chars", "cut", "KL per answer", "KL per token"
)


def pair_rows(results: dict[str, Any]) -> list[PairRow]:
    """Every comparison of two models by a judge; empty for results of an older version."""
    labels = labels_of(results)
    rows = results.get("pairwise") or []
    return [_pair_row(row, labels, judge_name(results, row["judge"]).rsplit("/", 1)[-1]) for row in rows]


def _pair_row(row: dict[str, Any], labels: dict[str, str], judge: str) -> PairRow:
    compared = f"{labels[row['a']]} against {labels[row['b']]}"
    missing = sum(row["not_judged"].values())
    count = f"{row['count'] and row['wins']}, {row['count'] and row['ties']}, {row['count'] and row['losses']}"
    count += (
        f", {missing} not judged ({', '.join(f'{n} {why}' for why, n in row['not_judged'].items())})" if missing else ""
    )
    if not row["count"]:
        return PairRow(compared, judge, "", "", count, "", "", "")
    equal = row["length_controlled"]
    adjusted = row.get("p_adjusted", row["p"])
    return PairRow(
        compared, judge, f"{row['share']:.0%}", _interval(row), count, _p(row["p"]) + (f" ({_p(adjusted)})" if adjusted != row["p"] else ""),
        f"{row['a_words']:.0f}, {row['b_words']:.0f}",
        f"{equal['share']:.0%} ({_interval(equal)}; {equal['coefficient']:+.2f})",
    )  # fmt: skip


def _interval(found: dict[str, Any]) -> str:
    return f"{found['low']:.0%} to {found['high']:.0%}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else "<0.001"


def model_rows(results: dict[str, Any]) -> list[ModelRow]:
    """Every policy's log-probabilities, lengths, cut answers and divergence; empty for results of an older version."""
    labels, rows = labels_of(results), []
    for label, found in results["policies"].items():
        if "mean_words" not in found:
            return []
        kl = (results.get("kl") or {}).get(label)
        plus_minus = lambda key, kl=kl: f"{kl[key]:.3g} ± {kl[key + '_se']:.2g}" if kl else ""  # noqa: E731
        answered = bool(found["answers"])
        empty = f", {found['answers_empty']} empty" if found["answers_empty"] else ""
        rows.append(ModelRow(
            labels[label], f"{found['chosen_logp']:.1f}", f"{found['rejected_logp']:.1f}",
            f"{found['mean_words']:.0f}" if answered else "", f"{found['mean_characters']:.0f}" if answered else "",
            f"{found['answers_cut']} of {found['answers']}{empty}" if answered else "",
            plus_minus("sum"), plus_minus("per_token"),
        ))  # fmt: skip
    return rows


def model_note(results: dict[str, Any]) -> str:
    """What the table of models means."""
    if not model_rows(results):
        return ""
    text = "Log-probabilities are means per answer of the pairs, in nats; words and characters of the models' own greedy answers."
    kl = results.get("kl") or {}
    if kl:
        one, labels = next(iter(kl.values())), labels_of(results)
        text += (
            f" KL is the divergence from {labels[one['reference']]} in nats (± standard error), on {one['answers']} answers "
            f"sampled at temperature 1, of their first {results.get('max_new_tokens', '')} tokens".rstrip()
            + "."
        )
    for label, why in (results.get("kl_skipped") or {}).items():
        text += f" No KL of {labels_of(results)[label]}: {why}."
    return text


def pair_note(results: dict[str, Any]) -> str:
    """What the table of comparisons means."""
    rows = results.get("pairwise") or []
    if not rows:
        return ""
    text = (
        "Wins: ties count half; 95% by bootstrap over prompts; p of the exact sign test"
        + (", in brackets adjusted for the number of comparisons (Holm)" if any(r.get("p_adjusted", 0) != r.get("p", 0) for r in rows) else "")
        + ". At equal length: AlpacaEval's minimal length control; a coefficient above 0 means that longer answers win."
    )  # fmt: skip
    for label, judge in (results.get("judges") or {}).items():
        if judge.get("kind") == "endpoint":
            text += f" {label} is {judge.get('model')} at {judge.get('endpoint')}."
        if "accuracy" in judge:
            text += (
                f" {judge_name(results, label)} agrees with {judge['accuracy']['share']:.0%} of the pairs' own labels."
            )
        if "orders_agree" in judge:
            first = f", and names the answer that it reads first in {judge['prefers_first']['share']:.0%} of its decisions" if "prefers_first" in judge else ""  # fmt: skip
            text += f" {judge_name(results, label)} says the same in both orders for {judge['orders_agree']['share']:.0%} of the prompts{first}."
    return text


def compared_with_others(results: dict[str, Any], key: str) -> dict[str, Any]:
    """The part of the results about one model's answers: its comparisons, and the models in them.

    Args:
        key: of the model in `results["models"]`; of a reward model nothing is left.
    """
    label = key.removesuffix("_model") if not key.startswith("models.") else key.removeprefix("models.")
    rows = [row for row in results.get("pairwise") or [] if label in (row["a"], row["b"])]
    others = {label, *(name for row in rows for name in (row["a"], row["b"]))}
    policies = {
        name: found for name, found in results["policies"].items() if name in others and label in results["policies"]
    }
    kl = {name: found for name, found in (results.get("kl") or {}).items() if name == label}
    return {**results, "pairwise": rows, "policies": policies, "kl": kl, "kl_skipped": {}}


# --- the verdict -----------------------------------------------------------------------------------------------------


def judge_name(results: dict[str, Any], label: str) -> str:
    """How a judge is called: by its label, or reward_model by its folder."""
    if label == "reward_model":
        return short_name(((results.get("models") or {}).get("reward_model") or {}).get("name") or "the reward model")
    return label


def dependence(results: dict[str, Any], judge: str, policy: str) -> tuple[bool | None, str]:
    """(whether a judge is independent of a policy's training, None if that is unknown; how to say it)."""
    record = (results.get("judges") or {}).get(judge) or {}
    models, name = results.get("models") or {}, labels_of(results)[policy]
    if record.get("kind") == "endpoint":
        return True, "an outside judge"  # who labelled a data set that was found somewhere is not recorded
    found, trained = models.get(record.get("key", "")), models.get(_key(policy))
    if found is None or trained is None:
        return None, f"whether {name} was trained against it is not recorded"
    if found.get("weights") and found["weights"] in (trained.get("labelled_by") or ()):
        return False, f"which labelled the pairs that {name} was trained on"
    if set(found["data"]) & set(trained["data"]):
        return False, f"trained on the same pairs as {name}"
    if found["stage"] != "reward" or not found["data"] or not trained["data"]:
        return None, f"whether {name} was trained against it is not recorded"
    return True, f"trained on other data than {name}"


def _key(policy: str) -> str:
    return f"{policy}_model" if policy in ("base", "sft", "dpo") else f"models.{policy}"


def verdicts(results: dict[str, Any]) -> list[str]:
    """One sentence per model that was compared with the baseline; empty if no judge compared any."""
    rows, baseline = results.get("pairwise") or [], results.get("baseline")
    against: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["b"] == baseline:
            against.setdefault(row["a"], []).append(row)
    return [_verdict(results, found) for found in against.values()]


def _verdict(results: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The sentence about one model, by the most independent judge; the other judges after it."""
    labels = labels_of(results)
    a, b = labels[rows[0]["a"]], labels[rows[0]["b"]]
    judged = [row for row in rows if row["count"]]
    if not judged:
        return f"No verdict on {a} against {b}: {judge_name(results, rows[0]['judge'])} judged none of the answers."
    rank = {True: 0, None: 1, False: 2}
    judged.sort(key=lambda row: rank[dependence(results, row["judge"], row["a"])[0]])
    main, *others = judged
    independent, about = dependence(results, main["judge"], main["a"])
    text = (
        f"{outcome(main, a, b)}: {'' if _side(main) > 0 else f'{a} wins '}{_share(main)} of {main['count']} prompts by "
        f"{judge_name(results, main['judge'])} ({about}), {a}'s answers {_longer(main)}; length-controlled "
        f"{_share(main['length_controlled'])}"
    )
    if _side(main) and _side(main["length_controlled"]) != _side(main):
        text += (
            ", where no difference is shown" if not _side(main["length_controlled"]) else ", where it is the other way"
        )
    for row in others:
        text += (
            f"; {judge_name(results, row['judge'])} ({dependence(results, row['judge'], row['a'])[1]}): {_share(row)}"
        )
    if any(_side(row) * _side(main) < 0 for row in others):
        text += "; the judges disagree"
    text += "." + _caveats(results, main, independent)
    return text


def _caveats(results: dict[str, Any], row: dict[str, Any], independent: bool | None) -> str:
    labels, text = labels_of(results), ""
    a = labels[row["a"]]
    if independent is False and _side(row) > 0:
        text += f" No independent judge was asked: it shows that {a} follows these preferences, not that its answers are better."
    elif independent is False:
        text += " No independent judge was asked."
    if row["count"] < FEW:
        text += f" {row['count']} prompts are few: the interval is too narrow."
    missing = sum(row["not_judged"].values())
    if missing:
        text += f" {missing} more prompt{'s were' if missing > 1 else ' was'} not judged."
    cut = []
    for label in (row["a"], row["b"]):
        found = results["policies"][label]
        if found["answers"] and found["answers_cut"] / found["answers"] >= MUCH_CUT:
            cut.append(f"{found['answers_cut']} of {found['answers']} answers of {labels[label]}")
    if cut:
        text += f" {' and '.join(cut)} were cut at max_new_tokens={results.get('max_new_tokens')}."
    return text


def outcome(row: dict[str, Any], a: str, b: str) -> str:
    """What the interval shows: `a beats b`, `b beats a` or `no difference shown between a and b`."""
    side = _side(row)
    return (
        f"{a} beats {b}" if side > 0 else f"{b} beats {a}" if side < 0 else f"No difference shown between {a} and {b}"
    )


def _side(found: dict[str, Any]) -> int:
    """1 if the interval of a share lies above 50%, -1 below, else 0."""
    return int(found["low"] > 0.5) - int(found["high"] < 0.5)


def _share(found: dict[str, Any]) -> str:
    """`58% [52, 64]`, with a decimal where an end that decides would be rounded to 50."""
    low, high = 100 * found["low"], 100 * found["high"]
    decimals = int(bool(_side(found)) and 50 in (round(low), round(high)))
    return f"{found['share']:.0%} [{low:.{decimals}f}, {high:.{decimals}f}]"


def _longer(row: dict[str, Any]) -> str:
    """How much longer a's answers are, in words."""
    if not row["b_words"] or math.isnan(row["b_words"]):
        return "longer, as the other's are empty"
    change = row["a_words"] / row["b_words"] - 1
    if abs(change) < 0.005:
        return "of the same length"
    return f"{abs(change):.0%} {'longer' if change > 0 else 'shorter'}"
