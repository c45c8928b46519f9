"""Held-out evaluation of all stages of a run: losses, accuracies, win rate and answers side by side.

Every number is a sum over pairs or prompts whose terms are also written (pairs.jsonl, answers.jsonl), so that it can be
recomputed by hand. Each rank takes every n-th batch, and the batches are made of all rows, whatever the world size: so
results don't depend on it. What is measured is kept batch by batch: see rlhf/evaluation/partial.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.recipe import Recipe, load_recipe
from rlhf.config.stage_config import EvaluateConfig
from rlhf.console import quiet_libraries
from rlhf.data.format_options import FormatOptions
from rlhf.data.formats import preference_rows
from rlhf.data.heldout import check_heldout
from rlhf.data.reading import Reading, write_skipped
from rlhf.data.sources import ALL_ROWS, SAMPLE_NAME, Source, load_source
from rlhf.data.summary import line, skipped_line
from rlhf.data.summary import summarise as summarise_data
from rlhf.distributed.processes import is_main, say
from rlhf.errors import UserError
from rlhf.evaluation.measure import check_room, measure, prepare
from rlhf.evaluation.overlap import describe as describe_overlap
from rlhf.evaluation.overlap import find_overlap, heading
from rlhf.evaluation.partial import Measured, key_of
from rlhf.evaluation.statistics import summarise
from rlhf.files import read_json, read_json_lines, write_file
from rlhf.runs.card import refresh_cards
from rlhf.runs.folder import RunFolder, finish_run, open_run, start_run
from rlhf.runs.lineage import maker_of, waits_for
from rlhf.runs.provenance import model_digest
from rlhf.runs.results import COLUMNS, POLICIES, describe_models, labels_of, sentences, shown_text, table_rows
from rlhf.runs.resume import lock_folder
from rlhf.runs.stop import Stopper
from rlhf.training.checks import on_cpu
from rlhf.training.plan_checks import check_finished_models

MODEL_KEYS = ("base_model", "sft_model", "reward_model", "dpo_model")


def evaluate(recipe_path: str, overrides: list[str], check_only: bool = False) -> dict[str, Any] | None:
    """Run an evaluate recipe, print its table, and return its results (None if only checked).

    Raises:
        UserError: with the place and the fix, before a model loads.
    """
    recipe = load_recipe(recipe_path, "evaluate", overrides)
    config = EvaluateConfig(**recipe.values)
    source, rows, reading = read_rows(recipe, config)
    names = {key: getattr(config, key) for key in MODEL_KEYS if getattr(config, key)}
    overlap, seen = find_overlap(rows, names)
    if overlap.left_out:
        kept = [number for number, was_seen in enumerate(seen) if not was_seen]
        rows, reading.places = [rows[i] for i in kept], [reading.places[i] for i in kept]
    summary = summarise_data(rows, reading)
    about = [line(summary)]
    if reading.skipped:
        about.append(skipped_line(reading.skipped, len(rows) + len(reading.skipped)))
    about += describe_overlap(overlap)
    waiting = {key: waits_for(recipe, name) for key, name in names.items()}
    if check_only and any(waiting.values()):
        say(f"{recipe.path}: ok (waits for: {', '.join(w for w in waiting.values() if w)})")
        return None
    inputs = {"dataset_name": source.digest} | {key: model_digest(name) for key, name in names.items()}
    run = open_run(recipe, inputs)
    if run.complete:
        say(f"{'Evaluation':<12} complete: {run.folder}")
        results = read_results(run.folder, describe_models(names, inputs))
        show(results, read_answers(run.folder))
        return results
    if not check_only:
        say(f"\n=== Evaluation: {recipe.path}")
    for text in about:
        say(f"{config.dataset_name}: {text}")
    if check_only:
        check_finished_models(recipe, names, waiting)
        say(f"{recipe.path}: ok ({heading({'pairs': len(rows), 'overlap': overlap.record()})})")
        return None
    quiet_libraries(len(rows))
    return run_evaluation(run, recipe, config, Data(rows, reading, summary.record(), overlap.record()), inputs)


@dataclass(frozen=True)
class Data:
    """The pairs to evaluate on, and what is recorded about them."""

    rows: list[dict]
    reading: Reading
    summary: dict[str, Any]
    overlap: dict[str, Any]


def run_evaluation(
    run: RunFolder, recipe: Recipe, config: EvaluateConfig, data: Data, inputs: dict[str, str]
) -> dict[str, Any] | None:
    """Measure the models, or what an earlier start has left of them; write and print the results.

    Returns:
        The results on the main rank, None on the others.

    Raises:
        Stopped: a stop was requested; the same command resumes.
    """
    from accelerate import PartialState

    from rlhf.models.digests import weights_digest
    from rlhf.models.folder import locate

    given = {key: getattr(config, key) for key in MODEL_KEYS if getattr(config, key)}
    names = {key: locate(name, recipe.where(key), maker_of(recipe, name), say) for key, name in given.items()}
    device = PartialState(cpu=on_cpu(recipe) or None).device  # else accelerate starts unconnected processes on CPUs
    begin = functools.cache(lambda: _start(run, recipe, inputs, vars(config) | {"data": data.summary}, data.reading))
    check_room(names, config)
    files = {key: weights_digest(name) for key, name in names.items()}  # a model may be written again under its name
    key = key_of(vars(config) | {"output_dir": None}, inputs, files, data.rows, device.type)
    with Stopper(run.folder) as stopper:
        subjects = prepare(data.rows, names, config)
        with locked(run.folder, recipe), Measured(run.folder, key, stopper, begin) as measured:
            pairs, answers = measure(data.rows, subjects, config, measured)
            if not is_main():
                return None
            begin()
            results = summarise(pairs, answers, beta=read_beta(names.get("dpo_model")))
            results |= {"models": describe_models(given, inputs), "max_new_tokens": config.max_new_tokens}
            results |= {"overlap": data.overlap, "changes": [row._asdict() for row in table_rows(results)]}
            write_results(run.folder, pairs, answers, results)
            finish_run(run, {"stage": "evaluate", "pairs": len(pairs)})
            measured.remove()
    for reason in refresh_cards(given, inputs, results, run.folder):
        say(f"note: the results were not added to {reason}")
    show(results, answers)
    return results


@contextlib.contextmanager
def locked(folder: Path, recipe: Recipe) -> Iterator[None]:
    """Hold the lock of the run folder; a folder that is still empty in the end is removed.

    Raises:
        UserError: another evaluation writes there.
    """
    lock = lock_folder(folder, recipe.where("output_dir"))
    try:
        if lock:
            (folder / "stopped.json").unlink(missing_ok=True)
        yield
    finally:
        if lock:
            lock.release()


def _start(run: RunFolder, recipe: Recipe, inputs: dict[str, str], arguments: dict[str, Any], reading: Reading) -> None:
    start_run(run, recipe, inputs, arguments)
    write_skipped(run.folder, reading.skipped)


def write_results(folder: Path, pairs: list[dict], answers: list[dict], results: dict[str, Any]) -> None:
    """Write pairs.jsonl, answers.jsonl and results.json."""
    for name, lines in (("pairs.jsonl", pairs), ("answers.jsonl", answers)):
        write_file(folder / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_file(folder / "results.json", json.dumps(results, indent=2) + "\n")


def read_rows(recipe: Recipe, config: EvaluateConfig) -> tuple[Source, list[dict], Reading]:
    """(source, canonical pairs to evaluate on, the record of reading them)"""
    reading = Reading(config.bad_rows, can_skip=True)
    split = config.dataset_train_split if config.heldout else config.dataset_test_split
    if split is None and config.heldout and config.dataset_name == SAMPLE_NAME:
        split = ALL_ROWS
    options = FormatOptions.of(recipe.values, recipe.where)
    where = recipe.where("dataset_test_split" if config.dataset_test_split else "dataset_name")
    default = "train" if config.heldout else "test"
    source = load_source(recipe.values["dataset_name"], split, config.dataset_config, where, default)
    if not config.heldout:
        return source, preference_rows(source.head(config.max_eval_examples), reading, options), reading
    rows = preference_rows(source, reading, options)
    sides = check_heldout(config.heldout, rows, recipe.where("heldout"), source.name)
    kept = [number for number, side in enumerate(sides) if side][: config.max_eval_examples]
    rows, reading.places = [rows[i] for i in kept], [reading.places[i] for i in kept]
    return source, rows, reading


def read_beta(dpo_model: str | None) -> float:
    """The beta that the DPO run was trained with; TRL's default 0.1 if it is unknown."""
    arguments = (read_json(Path(dpo_model) / "provenance.json") or {}).get("arguments") if dpo_model else None
    beta = arguments.get("beta") if isinstance(arguments, dict) else None
    return float(beta) if isinstance(beta, (int, float)) and math.isfinite(beta) else 0.1


def read_results(folder: Path, models: dict[str, Any]) -> dict[str, Any]:
    """The results of a finished evaluation; `models` is used if an older version did not record them.

    Raises:
        UserError: results.json is missing or damaged.
    """
    results: Any = read_json(folder / "results.json")
    try:
        results.setdefault("models", models)
        table_rows(results)
        if results["pairs"] >= 0:
            return results
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise UserError(
        f"{folder / 'results.json'} is missing or damaged, but complete.json beside it marks the evaluation as "
        "finished; remove complete.json and run the same command to evaluate again"
    )


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """The answers of a finished evaluation, without unreadable lines."""
    return [answer for answer in read_json_lines(folder / "answers.jsonl") if _is_answer(answer)]


def _is_answer(answer: dict[str, Any]) -> bool:
    prompt = answer.get("prompt")
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    texts = [answer[p] for p in ("base", "sft", "dpo") if p in answer]
    rewards = [answer[f"{p}_reward"] for p in ("base", "sft", "dpo") if f"{p}_reward" in answer]
    return (
        isinstance(last, dict)
        and isinstance(last.get("content"), str)
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(reward, (int, float)) for reward in rewards)
    )


def shown_answers(answers: list[dict]) -> list[dict]:
    """The prompts that every policy answered (base answers the first few only)."""
    return [a for a in answers if "base" in a] or answers[:3]


def show(results: dict[str, Any], answers: list[dict]) -> None:
    """Print the table and the answers side by side."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not is_main():
        return
    console = Console()
    table = Table(title=f"On {heading(results)}", box=box.SIMPLE_HEAD, title_justify="left")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if number in (1, 2) else "left")
    for row in table_rows(results):
        table.add_row(*map(Text, row), style="bold" if row.change == "worse" else None)
    console.print(table)
    for sentence in sentences(results):
        console.print(Text(f"  {sentence}"), style="dim")
    console.print()
    labels = labels_of(results)
    for answer in shown_answers(answers):
        policies = [p for p in POLICIES if p in answer]
        side = Table(
            box=box.SIMPLE_HEAD, title=Text(f"> {answer['prompt'][-1]['content']}"), title_justify="left", expand=True
        )
        for policy in policies:
            reward = f" (reward {answer[f'{policy}_reward']:+.2f})" if f"{policy}_reward" in answer else ""
            side.add_column(Text(f"{labels[policy]}{reward}"), ratio=1)
        side.add_row(*(Text(shown_text(answer, p)) for p in policies))
        console.print(side)
