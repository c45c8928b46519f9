"""One self-contained HTML file about a run: lineage, results, curves, answers, data, environment, commands.

It loads nothing and runs no scripts: the plots are inline SVG, a content-security policy forbids scripts, and Jinja
escapes all text of models and data. finished_runs.py decides which runs are shown together; each statement about them
comes from their own records.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.config.recipe import Recipe
from rlhf.console import duration
from rlhf.curation.lengths import bucket
from rlhf.data.format_options import FormatOptions
from rlhf.data.messages import answer_text
from rlhf.data.mix import data_name
from rlhf.data.prepare import prepare
from rlhf.data.rows import read_data
from rlhf.data.sources import ALL_ROWS, SAMPLE_NAME, Source, load_source
from rlhf.data.store import Rows
from rlhf.distributed.processes import say
from rlhf.errors import UserError, quote
from rlhf.evaluation.evaluate import read_answers
from rlhf.evaluation.finished_runs import (
    TITLES,
    Selection,
    comparison,
    endpoints_of,
    evaluated_models,
    levels,
    recipe_outputs,
    results_with_models,
    select_runs,
    start_of,
)
from rlhf.evaluation.overlap import heading
from rlhf.evaluation.plots import PLOTS, draw, draw_length_bias, draw_lengths, draw_reliability, ties_note
from rlhf.evaluation.screen import shown_answers
from rlhf.files import read_json_lines, write_file
from rlhf.runs.card import hyper_parameters
from rlhf.runs.command import is_complete, shell_line
from rlhf.runs.measure_tables import tables
from rlhf.runs.records import describe_best
from rlhf.runs.results import COLUMNS, WORSE, labels_of, sentences, shown_text, table_rows
from rlhf.runs.verdict import MODEL_COLUMNS, PAIR_COLUMNS, model_note, model_rows, pair_note, pair_rows


def write_report(target: str, output: str | None = None) -> Path:
    """Write report.html about the stages in a run folder (or named by a recipe folder), and print the next commands.

    Args:
        target: a run, a folder whose subfolders are runs, or a folder of recipes that name the runs.
        output: the file; default `report.html` in the run folder.

    Raises:
        UserError: there is no such folder, or no stage in it has run.
    """
    selection = select_runs(Path(target))
    if not selection.stages and not selection.compared:
        unread = "".join(f"; {folder}: {why}" for folder, why in selection.unshown[:3])
        raise UserError(
            f"{quote(target)} holds no run: expected folders with recipe.yaml and provenance.json, or recipes that "
            f"have been run{unread}"
        )
    home = home_of(Path(target), selection)
    file = Path(output) if output else home / "report.html"
    text = render(selection, str(home))
    write_file(file, text)
    for reason in selection.stale:
        say(f"warning: the results are not shown: {reason}")
    for stage, runs in selection.compared.items():
        say(f"note: {len(runs)} {TITLES[stage]} run{'s are' if len(runs) > 1 else ' is'} in the comparison")
    for folder, why in selection.unshown:
        say(f"note: not shown: {folder} ({why})")
    say(f"\nReport    {file}  (open it in a browser; it needs no network)")
    say("Next")
    for label, command in next_commands(selection, target):
        say(f"  {label:<22} {command}")
    return file


def home_of(target: Path, selection: Selection) -> Path:
    """The folder for the report: the given one or, for recipes, the common parent of their runs."""
    if not recipe_outputs(target):
        return target
    folders = [Path(run["folder"]) for run in _all_runs(selection)]
    return folders[0].parent if len({f.parent for f in folders}) == 1 else Path(os.path.commonpath(folders))


def _all_runs(selection: Selection) -> list[dict[str, Any]]:
    runs = [*selection.stages.values(), *(run for found in selection.compared.values() for run in found)]
    return list({run["folder"]: run for run in runs}.values())


def next_commands(selection: Selection, target: str) -> list[tuple[str, str]]:
    """(purpose, command) of the next commands after this run."""
    program = "rlhf" if shutil.which("rlhf") else os.path.relpath(Path(sys.executable).parent / "rlhf")
    commands, stages = [], selection.stages
    policy = stages.get("dpo") or stages.get("sft")
    if policy and policy["complete"]:
        words = [program, "chat", policy["folder"]]
        if "dpo" in stages and "sft" in stages:
            words += ["--compare", stages["sft"]["folder"]]
        if "reward" in stages and stages["reward"]["complete"]:
            words += ["--reward", stages["reward"]["folder"]]
        commands.append(("talk to it", shlex.join(words)))
    recipes = Path(_all_runs(selection)[0]["provenance"]["recipe"]).parent
    other = "configs/gpt2-alpaca" if recipes.name != "gpt2-alpaca" else "configs/quickstart"
    commands.append(("another recipe", f"launch/pipeline.sh {other}"))
    commands.append(("on 4 GPUs", f"launch/pipeline.sh {shlex.quote(str(recipes))} launch/ddp.yaml --num_processes 4"))
    return commands


def render(selection: Selection, home: str) -> str:
    """The report as HTML text."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("rlhf.evaluation", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    stages, results, answers = selection.stages, {}, []
    drawn: list[str] = []
    evaluation = stages.get("evaluate")
    if evaluation and evaluation["complete"] and not selection.stale:
        results = results_with_models(evaluation)
        answers = read_answers(Path(evaluation["folder"]), results.get("policies") or ())
        drawn = reward_plots(results, Path(evaluation["folder"]))
    shown = shown_answers(answers)
    return environment.get_template("report.html.jinja").render(
        home=home,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        stages=stages,
        columns=[[(name, stage_facts(stages[name], stages)) for name in level] for level in levels(stages)],
        rows=table_rows(results) if results else [],
        column_names=COLUMNS,
        worse=WORSE,
        sentences=sentences(results) if results else [],
        results=results,
        models=model_rows(results) if results else [],
        model_columns=MODEL_COLUMNS,
        model_note=model_note(results) if results else "",
        pairs=pair_rows(results) if results else [],
        pair_columns=PAIR_COLUMNS,
        pair_note=pair_note(results) if results else "",
        verdict=results.get("verdict") or [],
        heading=heading(results) if results else "",
        tables=tables(results),
        reward_plots=drawn,
        stale=selection.stale,
        compared=[
            (TITLES[stage], comparison(stage, runs, selection.evaluations))
            for stage, runs in selection.compared.items()
        ],
        unshown=selection.unshown,
        plots={name: draw(stage) for name, stage in stages.items() if name in PLOTS and stage["metrics"]},
        best={name: describe_best(stage["complete"] or {}) for name, stage in stages.items()},
        ties=ties_note(stages["dpo"]) if "dpo" in stages else "",
        shown=shown,
        more=[a for a in answers if a not in shown and sum(label in a for label in results["policies"]) > 1],
        labels=labels_of(results) if results else {},
        shown_text=shown_text,
        data=data_statistics(stages),
        environments=environments(stages),
        commands=[(s["title"], shell_line(s["provenance"]), is_complete(s["provenance"])) for s in stages.values()],
    )


def reward_plots(results: dict[str, Any], folder: Path) -> list[str]:
    """The reliability curve and the length bias of the reward model, as far as they were measured."""
    reward, found = results.get("reward") or {}, []
    if reward.get("calibration"):
        found.append(draw_reliability(reward["calibration"]))
    if reward.get("length"):
        scores = [
            line["reward"] for line in read_json_lines(folder / "pairs.jsonl") if isinstance(line.get("reward"), dict)
        ]
        numbers = [
            (s["longer"], s["chosen"] - s["rejected"]) for s in scores if {"longer", "chosen", "rejected"} <= set(s)
        ]
        found.append(draw_length_bias([n for n, _ in numbers], [m for _, m in numbers]))
    return [svg for svg in found if svg]


def stage_facts(stage: dict[str, Any], stages: dict[str, dict]) -> list[tuple[str, str]]:
    """(name, value) of the main facts about a stage, for its box in the lineage."""
    recipe, complete = stage["recipe"], stage["complete"]
    inputs = stage["provenance"].get("inputs") or {}
    facts = [("folder", stage["folder"])]
    if stage["name"] == "evaluate":
        facts += [(key.removesuffix("_model"), str(name)) for key, name in evaluated_models(recipe).items()]
        facts += [("judge", f"{judge.model} at {judge.endpoint}") for judge in endpoints_of(recipe)]
    else:
        facts.append(("starts from", start_of(stage, stages)[1]))
    facts.append(("data", str(recipe.get("dataset_name") or recipe.get("chosen_dataset_name"))))
    digest = inputs.get("dataset_name") or inputs.get("chosen_dataset_name")
    facts.append(("data sha256", digest[:16] if digest else "not recorded"))
    if stage["name"] == "evaluate":
        return [*facts, ("pairs", str(complete.get("pairs", "not recorded")) if complete else "not complete")]
    facts += hyper_parameters(recipe, stage["provenance"])
    if complete:
        facts.append(("examples", str(complete.get("train_examples", "not recorded"))))
        took = f" in {duration(complete['seconds'])}" if "seconds" in complete else ""
        facts.append(("steps", f"{complete.get('steps', 'not recorded')}{took}"))
        if peaks := [m["peak_memory_gib"] for m in stage["metrics"] if isinstance(m.get("peak_memory_gib"), float)]:
            facts.append(("peak GPU memory", f"{max(peaks):.1f} GiB"))
        facts.append(("weights sha256", complete.get("weights_sha256", "not recorded")[:16]))
    else:
        facts.append(("state", "not complete"))
    return facts


def environments(stages: dict[str, dict]) -> list[dict[str, Any]]:
    """Versions, hardware and commit, each with the stages that ran with them."""
    found: list[dict[str, Any]] = []
    for stage in stages.values():
        here = {key: stage["provenance"].get(key) for key in ("versions", "hardware", "git_commit")}
        same = next((e for e in found if {k: e[k] for k in here} == here), None)
        if same:
            same["titles"].append(stage["title"])
        else:
            found.append(here | {"titles": [stage["title"]]})
    return found


def data_statistics(stages: dict[str, dict]) -> list[dict[str, Any]]:
    """Counts and mean lengths (words) of the run's pairs, by split.

    A split that can no longer be read, or whose digest differs from the run's, has a reason in `gone` and no counts.
    """
    stage = stages.get("dpo") or stages.get("reward")
    if stage is None or not stage["recipe"].get("dataset_name"):
        return []
    recipe, found = stage["recipe"], []
    inputs = stage.get("provenance", {}).get("inputs") or {}
    train = recipe.get("dataset_train_split", "train")
    if recipe.get("heldout") and recipe["dataset_name"] == SAMPLE_NAME:
        train = ALL_ROWS
    if isinstance(recipe["dataset_name"], list):
        return _mix_statistics(recipe, inputs)
    splits = [(train, "dataset_name", None if recipe.get("heldout") else "max_train_examples")]
    if recipe.get("dataset_test_split") and not recipe.get("eval_dataset_name"):
        splits.append((recipe["dataset_test_split"], "heldout", "max_eval_examples"))
    for split, key, most in splits:
        try:
            source = load_source(recipe["dataset_name"], split, recipe.get("dataset_config"))
            options = FormatOptions.of(recipe, lambda key: "")
            rows = prepare(source.head(recipe.get(most or "")), "pairs", options, recipe.get("bad_rows", "error")).rows
        except UserError:
            found.append({"split": split, "gone": "can no longer be read"})
            continue
        if inputs.get(key) not in (None, source.digest):
            found.append({"split": split, "gone": "has changed since the run read it"})
            continue
        found.append(
            {"split": split, "gone": "", "digest": source.digest}
            | _count(rows)
            | {"tasks": _tasks(source.head(recipe.get(most or "")), len(rows))}
        )
    return found


def _mix_statistics(recipe: dict[str, Any], inputs: dict[str, str]) -> list[dict[str, Any]]:
    """The same of a mix and of what is held out of it; `about` says what is taken of each data set."""
    name = data_name(recipe["dataset_name"])
    try:
        data = read_data(Recipe("dpo", "", recipe, {}), "pairs")
    except UserError:
        return [{"split": name, "gone": "can no longer be read"}]
    found: list[dict[str, Any]] = []
    for split, rows, key in ((name, data.train, "dataset_name"), ("held out", data.heldout, "heldout")):
        if rows is None:
            continue
        if inputs.get(key) not in (None, data.digests[key]):
            found.append({"split": split, "gone": "has changed since the run read it"})
            continue
        found.append({"split": split, "gone": "", "digest": data.digests[key], "tasks": {}} | _count(rows))
    if not found[0]["gone"]:
        found[0]["about"] = data.about
    return found


MOST_COUNTED = 20_000  # rows: a report of ten million takes seconds, not minutes


def _count(rows: Rows) -> dict[str, Any]:
    """Counts of the pairs; the words of every n-th if there are more than MOST_COUNTED."""
    words: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": []}
    turns, counted = 0, rows[:: max(1, -(-len(rows) // MOST_COUNTED))]
    for row in counted:
        turns += len(row["prompt"]) > 1
        for side, counts in words.items():
            counts.append(len(answer_text(row[side]).split()))
    shorter = sum(r < c for c, r in zip(words["chosen"], words["rejected"], strict=True))
    return {
        "pairs": len(rows),
        "several_turns": round(turns * len(rows) / len(counted)),
        "mean_words": {k: sum(v) / len(v) for k, v in words.items()},
        "rejected_shorter": shorter / len(counted),
        "plot": draw_lengths({side: Counter(map(bucket, counts)) for side, counts in words.items()}, "words"),
    }


def _tasks(source: Source, num_rows: int) -> dict[str, int]:
    """Rows by their `task` column; {} if there are more than MOST_COUNTED."""
    if num_rows > MOST_COUNTED:
        return {}
    return dict(Counter(str(row["task"]) for row, _ in source.stream() if row.get("task")))
