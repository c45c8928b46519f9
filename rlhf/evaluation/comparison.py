"""What the judges' comparisons add up to: win rates of every two models, with intervals, tests, lengths; divergences."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from rlhf.evaluation.paired import divergence, holm, length_controlled, permutation_test, win_rate
from rlhf.evaluation.statistics import compare, share


def summarise_judgments(judgments: list[dict], answers: list[dict], seed: int) -> list[dict[str, Any]]:
    """A row per judge and two models, over the prompts that it judged.

    Returns:
        {"judge", "a", "b", the fields of `win_rate` for a, "p_adjusted": for the judge's number of pairs, "not_judged":
        number by reason, "a_words", "b_words", "a_characters", "b_characters": means, "length_controlled": of
        `length_controlled`, and of a reward model "score_difference" with "score_p" of a permutation test}
    """
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for line in judgments:
        groups.setdefault((line["judge"], line["a"], line["b"]), []).append(line)
    rows = [_pairwise(key, lines, answers, seed) for key, lines in groups.items()]
    for judge in {row["judge"] for row in rows}:
        tested = [row for row in rows if row["judge"] == judge and row["count"]]
        for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row["p_adjusted"] = p
    return rows


def _pairwise(key: tuple[str, str, str], lines: list[dict], answers: list[dict], seed: int) -> dict[str, Any]:
    judge, a, b = key
    judged = [line for line in lines if line["win"] is not None]
    missing = Counter(line.get("why", "") for line in lines if line["win"] is None)
    row: dict[str, Any] = {"judge": judge, "a": a, "b": b, "count": len(judged), "not_judged": dict(missing)}
    if not judged:
        return row
    texts = [(answers[line["row"]][a], answers[line["row"]][b]) for line in judged]
    wins = [line["win"] for line in judged]
    for side, label in enumerate(("a", "b")):
        row[f"{label}_words"] = float(np.mean([len(pair[side].split()) for pair in texts]))
        row[f"{label}_characters"] = float(np.mean([len(pair[side]) for pair in texts]))
    row |= win_rate(wins, seed)
    lengths = [[len(pair[side]) for pair in texts] for side in range(2)]
    row["length_controlled"] = length_controlled(wins, lengths[0], lengths[1], seed)
    if scored := [line["a_score"] - line["b_score"] for line in judged if "a_score" in line]:
        row |= {"score_difference": float(np.mean(scored)), "score_p": permutation_test(scored, seed)}
    return row


def summarise_judges(judges: dict[str, dict[str, Any]], judgments: list[dict], pairs: list[dict]) -> dict[str, Any]:
    """What is known of each judge: how often it agrees with the pairs' labels, and of an endpoint with itself.

    Args:
        judges: by label: {"kind", "key" or "endpoint", ...}, recorded as they are.

    Returns:
        the same with "accuracy" on the pairs (reward models), or "orders_agree" and "prefers_first" (endpoints): shares of
        the comparisons that it judged, and of its verdicts other than ties that name the answer it reads first
    """
    found = {}
    for label, judge in judges.items():
        record = dict(judge)
        if judge["kind"] == "reward":
            scores = [pair["reward"] if label == "reward_model" else pair["judged"][label] for pair in pairs]
            record["accuracy"] = share([compare(score["chosen"], score["rejected"]) for score in scores])
        else:
            both = [x["verdicts"] for x in judgments if x["judge"] == label and None not in x.get("verdicts", [None])]
            decided = [verdict for verdicts in both for verdict in verdicts if verdict != "C"]
            if both:
                agree = [float(sorted(verdicts) in (["A", "B"], ["C", "C"])) for verdicts in both]
                record["orders_agree"] = share(agree)
            if decided:
                record["prefers_first"] = share([float(verdict == "A") for verdict in decided])
        found[label] = record
    return found


def summarise_samples(samples: dict[str, dict[int, dict]], reference: str) -> dict[str, dict[str, Any]]:
    """`divergence` of each policy that sampled, with its reference and how many samples were cut."""
    found = {}
    for label, by_row in samples.items():
        ones = list(by_row.values())
        ratios = [one["logp"] - one["reference_logp"] for one in ones]
        cut = sum(one["cut"] for one in ones)
        found[label] = {"reference": reference, **divergence(ratios, [len(one["ids"]) for one in ones]), "cut": cut}
    return found
