"""An evaluation's results in words: the table, what got worse, which models were measured and which one judged.

Nothing here is fixed text about a run: a model is called SFT or DPO only if its own provenance says so, and the judge
is described by its recorded training data.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.files import read_json

POLICIES = ("base", "sft", "dpo")
STAGE_LABELS = {"sft": "SFT", "dpo": "DPO"}
BETTER, WORSE, UNCLEAR = "better", "worse", "unclear"


class Row(NamedTuple):
    """A row of the table; `change` is `better`, `worse`, `unclear` (the interval contains the value before) or ''."""

    measure: str
    before: str
    after: str
    change: str
    note: str


COLUMNS = Row("measure", "before", "after", "change", "unit or 95%")


# --- who was measured ------------------------------------------------------------------------------------------------


def describe_models(
    names: dict[str, str], digests: dict[str, str], weights: dict[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """The recorded facts about each measured model, by recipe key.

    Args:
        names: as the recipe names them (folder, hub id or `embedded:...`), by key (`sft_model`, ...).
        digests: of their weights when they were measured, by key.
        weights: digests of the files of their weights (`rlhf.models.digests.weights_digest`), by key.

    Returns:
        {key: {"name", "digest", "weights", "stage": of its run or None, "data": digests of its training data, "labelled_by": `weights`
        of the reward models that chose its pairs (`rlhf label`), "starts_from": digest of the model that it
        was trained from, or None, "beta": of a DPO run, or None}}
    """
    found = {}
    for key, name in names.items():
        provenance = read_json(Path(name) / "provenance.json") or {}
        inputs = provenance.get("inputs") or {}
        beta = (provenance.get("arguments") or {}).get("beta") if provenance.get("stage") == "dpo" else None
        found[key] = {
            "name": name,
            "digest": digests.get(key),
            "weights": (weights or {}).get(key),
            "stage": provenance.get("stage"),
            "data": sorted(v for k, v in inputs.items() if k.endswith("dataset_name")),
            "labelled_by": sorted(map(str, provenance.get("labelled_by") or ())),
            "starts_from": inputs.get("model_name_or_path"),
            "beta": beta,
        }
    return found


def labels_of(results: dict[str, Any]) -> dict[str, str]:
    """The label of each policy: `SFT` and `DPO` for runs of those stages, `base` for the model SFT started from.

    Any other model of the stages' keys is labelled by its name, one of `models` as there. Results without `models` are from
    an older version and labelled by key.
    """
    models = results.get("models")
    if models is None:
        return {"base": "base_model", "sft": "sft_model", "dpo": "dpo_model"}
    labels = {}
    for policy in POLICIES:
        model = models.get(f"{policy}_model")
        if model is None:  # not recorded
            labels[policy] = f"{policy}_model"
            continue
        is_base = model["digest"] is not None and model["digest"] == models.get("sft_model", {}).get("starts_from")
        if policy == "base":
            labels[policy] = "base" if is_base else short_name(model["name"])
        else:
            labels[policy] = STAGE_LABELS[policy] if model["stage"] == policy else short_name(model["name"])
    for policy, label in list(labels.items()):
        if list(labels.values()).count(label) > 1:
            labels[policy] = f"{label} ({policy}_model)"
    return labels | {policy: policy for policy in results["policies"] if policy not in POLICIES}


def short_name(name: str, most: int = 40) -> str:
    """A model's name; a long one loses its first part."""
    return name if len(name) <= most else "…" + name[-most + 1 :]


def models_line(results: dict[str, Any]) -> str:
    """One sentence that says which model each label stands for."""
    models, labels = results.get("models") or {}, labels_of(results)
    parts = [
        f"{labels[policy]} is {models[f'{policy}_model']['name']}"
        for policy in POLICIES
        if f"{policy}_model" in models and labels[policy] != models[f"{policy}_model"]["name"]
    ]
    parts += [f"{key.removeprefix('models.')} is {models[key]['name']}" for key in models if key.startswith("models.")
              and key.removeprefix("models.") != models[key]["name"]]  # fmt: skip
    if "reward_model" in models:
        name = f"he reward model is {models['reward_model']['name']}"
        parts.append(f"{'t' if parts else 'T'}{name}")
    return f"{'; '.join(parts)}." if parts else ""


def judge_sentence(results: dict[str, Any]) -> str:
    """Which model judged the answers and how far to trust it; '' if none did."""
    if "win_rate" not in results:
        return ""
    models, labels = results.get("models") or {}, labels_of(results)
    judge, policy = models.get("reward_model"), models.get("dpo_model")
    if judge is None:
        return "The judge of the win rate is the recipe's reward model; an older version did not record which."
    who = f"The judge of the win rate is {judge['name']}"
    if judge["stage"] != "reward":
        return f"{who}, which has no record of its training here."
    if not judge["data"] or not (policy and policy["data"]):
        return f"{who}; whether it was trained on the data of {labels['dpo']} is not recorded."
    if judge["data"] == policy["data"]:
        return (
            f"{who}, trained on the same data as {labels['dpo']}: it shows whether {labels['dpo']} follows the "
            "preferences in those pairs, not what an independent judge would prefer."
        )
    return f"{who}, trained on other data than {labels['dpo']}."


def reference_note(results: dict[str, Any]) -> str:
    """A warning if the DPO rows compare with another model than DPO's own reference model, else ''."""
    models, labels = results.get("models") or {}, labels_of(results)
    sft, dpo = models.get("sft_model"), models.get("dpo_model")
    if "dpo" not in results or not sft or not dpo or dpo["stage"] != "dpo":
        return ""
    if None in (dpo["starts_from"], sft["digest"]) or dpo["starts_from"] == sft["digest"]:
        return ""
    return (
        f"{labels['dpo']} was not trained from {sft['name']}: its implicit rewards here are not those of its training."
    )


# --- the table -------------------------------------------------------------------------------------------------------


def table_rows(results: dict[str, Any]) -> list[Row]:
    """The table for the screen, the report and the model card."""
    labels, policies = labels_of(results), results["policies"]
    rows = []
    if "base" in policies and "sft" in policies:
        base, sft = (policies[policy]["chosen_loss"] for policy in ("base", "sft"))
        rows.append(_number(f"{labels['sft']} loss on chosen answers", base, sft, "nats/token"))
    if "reward" in results:
        reward = results["reward"]
        rows.append(_number("Reward model loss", math.log(2), reward["loss_after"], "nats/pair"))
        rows.append(_share("Reward model accuracy", 0.5, reward["accuracy"]))
    if "dpo" in results:
        dpo, name = results["dpo"], labels["dpo"]
        beta = f"beta {results['beta']:g}{'' if _beta_is_known(results) else ', assumed'}"
        rows.append(_number(f"{name} loss ({beta})", dpo["loss_before"], dpo["loss_after"], "nats/pair"))
        rows.append(_share(f"{name} implicit-reward accuracy", 0.5, dpo["accuracy"]))
        rows += _policy_rows(results)
    if "win_rate" in results:
        measure = f"{labels['dpo']} answer beats {labels['sft']} answer"
        rows.append(_share(measure, 0.5, results["win_rate"]))
    return rows


def part_about(results: dict[str, Any], stage: str) -> dict[str, Any]:
    """The part of the results that is about the model of this stage."""
    kept = {"sft": ("base", "sft"), "reward": (), "dpo": ("sft", "dpo")}[stage]
    others = {"sft": ("reward", "dpo", "win_rate"), "reward": ("dpo", "win_rate"), "dpo": ("reward",)}[stage]
    policies = {policy: found for policy, found in results["policies"].items() if policy in kept}
    return {key: value for key, value in results.items() if key not in others} | {"policies": policies}


def _policy_rows(results: dict[str, Any]) -> list[Row]:
    """How DPO changed the likelihood of the chosen and of the rejected answers."""
    labels, policies = labels_of(results), results["policies"]
    name, a, b = labels["dpo"], policies["sft"], policies["dpo"]
    rows = [
        _number(f"{name} loss on chosen answers", a["chosen_loss"], b["chosen_loss"], "nats/token"),
    ]
    for key, measure, unit, lower in (
        ("rejected_loss", "loss on rejected answers", "nats/token", False),
        ("chosen_logp", "log-prob. of a chosen answer", "nats/answer", False),
        ("rejected_logp", "log-prob. of a rejected answer", "nats/answer", True),
    ):
        if key in a and key in b:  # results of an older version lack them
            rows.append(_number(f"{name} {measure}", a[key], b[key], unit, lower_is_better=lower))
    for key, measure in (
        ("prefers_chosen", "finds chosen likelier"),
        ("prefers_chosen_per_token", "finds chosen likelier per token"),
    ):
        rows.append(_share(f"{name} {measure}", a[key]["share"], b[key]))
    return rows


def _number(measure: str, before: float, after: float, note: str, lower_is_better: bool = True) -> Row:
    texts = f"{before:.3f}", f"{after:.3f}"
    if texts[0] == texts[1] or math.isnan(before) or math.isnan(after):
        change = ""
    else:
        change = BETTER if (after < before) == lower_is_better else WORSE
    return Row(measure, *texts, change, note)


def _share(measure: str, before: float, found: dict[str, Any]) -> Row:
    interval = f"{found['low']:.0%} to {found['high']:.0%}"
    if found["low"] <= before <= found["high"]:
        change = UNCLEAR
    else:
        change = BETTER if found["share"] > before else WORSE
    return Row(measure, f"{before:.0%}", f"{found['share']:.0%}", change, interval)


def _beta_is_known(results: dict[str, Any]) -> bool:
    models = results.get("models")
    return models is None or models.get("dpo_model", {}).get("beta") is not None


def what_got_worse(rows: list[Row]) -> str:
    """One sentence that lists the rows that got worse, or says that none did."""
    worse = [f"{row.measure} ({row.before} → {row.after})" for row in rows if row.change == WORSE]
    unclear = sum(row.change == UNCLEAR for row in rows)
    rest = f" {unclear} of {len(rows)} changes are within their 95% interval and are marked unclear." if unclear else ""
    if worse:
        return f"What got worse: {'; '.join(worse)}.{rest}"
    return f"Nothing in this table got worse.{rest}"


def cut_sentence(results: dict[str, Any]) -> str:
    """How many answers were cut at max_new_tokens instead of ending with EOS; '' if unknown."""
    labels = labels_of(results)
    counted = [
        f"{p['answers_cut']} of {p['answers']} of {labels[policy]}"
        for policy, p in results["policies"].items()
        if p.get("answers")
    ]
    limit = results.get("max_new_tokens")
    at = f"max_new_tokens={limit}" if limit else "max_new_tokens"
    return f"Answers cut at {at} and marked with …: {', '.join(counted)}." if counted else ""


def how_to_read(results: dict[str, Any]) -> str:
    """What the table's columns mean, for the models in it."""
    labels, policies = labels_of(results), results["policies"]
    before = [f"{labels['base']} for {labels['sft']}"] if {"base", "sft"} <= set(policies) else []
    if "dpo" in results:
        before.append(f"{labels['sft']} for the effect of {labels['dpo']} on answers")
    aim = f" {labels['dpo']} should make rejected answers less likely, not chosen ones." if "dpo" in results else ""
    guessing = f"guessing (ln 2, 50%){' elsewhere' if before else ''}"
    likelier = " Likelier means likelier than the rejected answer." if policies else ""
    return f"Before is {', '.join([*before, guessing])}.{likelier}{aim}"


def sentences(results: dict[str, Any]) -> list[str]:
    """The sentences below the table, on the screen and in the report."""
    rows = table_rows(results)
    about = [what_got_worse(rows), how_to_read(results)] if rows else []
    about += [models_line(results), judge_sentence(results), reference_note(results), cut_sentence(results)]
    return [sentence for sentence in about if sentence]


def shown_text(answer: dict[str, Any], policy: str) -> str:
    """A policy's answer for display, with `…` if it was cut."""
    return (answer[policy] or "(nothing)") + (" …" if answer.get(f"{policy}_cut") else "")
