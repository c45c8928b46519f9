"""Tables of an evaluation beside its main one, for the screen, the report and the model cards: the reward model's
calibration and length bias, accuracy by subset, RewardBench, benchmarks before and after."""

from __future__ import annotations

from typing import Any, NamedTuple

from rlhf.runs.results import labels_of

MOST_ROWS = 12  # of subsets on the screen; results.json has all


class Table(NamedTuple):
    """A table in words.

    Attributes:
        stages: whose model cards have it.
        kind: `calibration`, `subsets`, `reward_benchmarks` or `benchmarks`.
        sentence: below it; '' for none.
    """

    kind: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    sentence: str
    stages: tuple[str, ...]


def tables(results: dict[str, Any]) -> list[Table]:
    """All tables that the results have something for."""
    found = [*_reward_tables(results.get("reward") or {})]
    found += [_reward_bench_table(entry) for entry in results.get("reward_benchmarks") or ()]
    if results.get("benchmarks"):
        found.append(_benchmark_table(results["benchmarks"], labels_of(results)))
    return [table for table in found if table.rows]


# --- the reward model on the held-out pairs --------------------------------------------------------------------------


def _reward_tables(reward: dict[str, Any]) -> list[Table]:
    found = []
    columns = ("measure", "value", "95%", "meaning")
    calibration, length = reward.get("calibration"), reward.get("length")
    if calibration:
        rows = [*_calibration_rows(calibration), *(_length_rows(length) if length else ())]
        title = f"The reward model's scores, on {_counted(calibration['pairs'], 'pair')}"
        said = " ".join(filter(None, (_calibration_sentence(calibration), _length_sentence(length) if length else "")))
        found.append(Table("calibration", title, columns, rows, said, ("reward",)))
    subsets = reward.get("subsets") or []
    if subsets:
        largest = sorted(subsets, key=lambda entry: -entry["count"])[:MOST_ROWS]
        rows = [(entry["subset"], *_shares(entry)) for entry in subsets if entry in largest]
        rest = len(subsets) - len(rows)
        said = f"{rest} smaller subset{'s are' if rest > 1 else ' is'} in results.json." if rest else ""
        found.append(Table("subsets", "The reward model's accuracy by subset", _SHARES, rows, said, ("reward",)))
    return found


def _calibration_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    if error := found["error"]:
        chance = found["by_chance"]
        rows.append((
            "calibration error (ECE)", f"{error['value']:.3f}", _interval(error, ".3f"),
            f"chance: up to {chance[1]:.3f}",
        ))  # fmt: skip
    if (temperature := found["temperature"]) is not None:
        high = found["temperature_high"]
        interval = f"{found['temperature_low']:.2f} to {f'{high:.2f}' if high is not None else 'any'}"
        rows.append(("fitted temperature", f"{temperature:.2f}", interval, "above 1: too sure"))
    else:
        rows.append(("fitted temperature", "none", "", found["no_temperature"]))
    if found["loss_after"] is not None:
        text = f"{found['loss']:.3f} → {found['loss_after']:.3f}"
        rows.append(("loss before → after", text, "", "nats/pair, cross-fitted"))
    return rows


def _calibration_sentence(found: dict[str, Any]) -> str:
    error, chance, temperature = found["error"], found["by_chance"], found["temperature"]
    if not error:
        return ""
    low, high = found["temperature_low"], found["temperature_high"]
    if temperature is not None and (low > 1 or (high is not None and high < 1)):
        surer = "Surer" if low > 1 else "Less sure"
        return (
            f"{surer} than it is right: divide its margins by {temperature:.2g} before they are read as probabilities."
        )
    if error["value"] > chance[1]:
        return "Its calibration error is more than chance shows."
    return "Calibrated as far as so many pairs can tell: its calibration error is within what chance shows."


def _length_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    if found["prefers_longer"]:
        labels = found["labels_prefer_longer"]
        rows.append(("prefers the longer", *_share(found["prefers_longer"]),
                     f"the labels: {labels['share']:.0%}"))  # fmt: skip
    for key, measure in (
        ("chosen_longer", "accuracy, chosen longer"),
        ("chosen_shorter", "accuracy, chosen shorter"),
    ):
        if found[key]:
            rows.append((measure, *_share(found[key]), _counted(found[key]["count"], "pair")))
    if found["explained"] and found["per_token"]:
        slope = found["per_token"]
        rows.append((
            "margin by length (R²)", f"{found['explained']['value']:.0%}", _interval(found["explained"], ".0%"),
            f"{slope['value']:+.2g} a token",
        ))  # fmt: skip
    return rows


def _length_sentence(found: dict[str, Any]) -> str:
    excess = found["excess"]
    if not excess:
        return ""
    own, labels = found["prefers_longer"]["share"], found["labels_prefer_longer"]["share"]
    points = f"{100 * excess['value']:+.0f} points, {100 * excess['low']:+.0f} to {100 * excess['high']:+.0f}"
    said = f"it prefers the longer one in {own:.0%} of the pairs, the labels in {labels:.0%} ({points})."
    if excess["low"] > 0:
        return f"Biased to long answers: {said}"
    if excess["high"] < 0:
        return f"Biased to short answers: {said}"
    return "No bias to longer or shorter answers beyond the labels' own shows in so many pairs."


# --- benchmarks ------------------------------------------------------------------------------------------------------

_SHARES = ("subset", "accuracy", "95%", "pairs")


def _reward_bench_table(found: dict[str, Any]) -> Table:
    version = found["version"]
    rows: list[tuple[str, ...]] = [(section["name"], *_shares(section)) for section in found["sections"]]
    if found["average"]:
        rows.append(("average", *_shares(found["average"])))
    parts = []
    if found["missing"]:
        parts.append(f"Not in the file, and not in the average: {', '.join(found['missing'])}.")
    if found["unknown"]:
        parts.append(f"Not part of RewardBench {version}{', counted in no section' if version == 1 else ''}: "
                     f"{', '.join(sorted(found['unknown'])[:5])}.")  # fmt: skip
    if found.get("cut"):
        parts.append(f"{_counted(found['cut'], 'answer')} cut at the tokenizer's limit.")
    columns = ("section", "score", "95%", "prompts")
    title = f"RewardBench{' 2' if version == 2 else ''} ({_file(found['name'])})"
    return Table("reward_benchmarks", title, columns, rows, " ".join(parts), ("reward",))


def _benchmark_table(found: dict[str, Any], labels: dict[str, str]) -> Table:
    models = found["models"]
    rows: list[tuple[str, ...]] = []
    for row in found["rows"]:
        filter_name = f" ({row['filter']})" if row["filter"] != "none" else ""
        cells = [row["task"], f"{row['metric']}{filter_name}"]
        for model in models:
            entry = row["values"][model]
            error = f" ± {entry['stderr']:.3f}" if entry["stderr"] is not None else ""
            cells.append(f"{entry['value']:.3f}{error}" if entry["value"] is not None else "none")
        for before, after in zip(models[:-1], models[1:], strict=True):
            cells.append(_difference(row, before, after))
        rows.append((*cells, str(row["count"])))
    names = [labels.get(model, model) for model in models]
    differences = [f"{b} − {a}, 95%" for a, b in zip(names[:-1], names[1:], strict=True)]
    columns = ("task", "metric", *names, *differences, "items")
    some = f"the first {found['limit']} items of each task" if found["limit"] else "all items"
    template = "with" if found["chat_template"] else "without"
    said = f"{found['harness']}, {some}, {template} the chat template; ± is the standard error, differences are paired by item."
    return Table("benchmarks", "Benchmarks", columns, rows, said, ("sft", "dpo"))


def _difference(row: dict[str, Any], before: str, after: str) -> str:
    found = next((d for d in row["differences"] if (d["before"], d["after"]) == (before, after)), None)
    if found is None or not found["count"]:
        return "not paired"
    if not found["changed"]:
        return f"no item of {found['count']} changed"
    return f"{found['value']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def _file(name: str) -> str:
    """A hub id as it is, a path without its folders: cards are published."""
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return name if is_hub_id else name.rstrip("/").rpartition("/")[2]


def _share(found: dict[str, Any]) -> tuple[str, str]:
    return f"{found['share']:.0%}", _interval(found, ".0%")


def _shares(found: dict[str, Any]) -> tuple[str, str, str]:
    return f"{found['share']:.1%}", _interval(found, ".1%"), f"{found['count']:,}"


def _interval(found: dict[str, Any], form: str) -> str:
    if found["low"] is None:
        return "too few prompts"
    return f"{found['low']:{form}} to {found['high']:{form}}"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
