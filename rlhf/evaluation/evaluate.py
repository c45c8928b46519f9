"""Held-out evaluation of all stages of a run: losses, accuracies, win rate and answers side by side.

Every number is a sum over pairs or prompts whose terms are also written (pairs.jsonl, answers.jsonl), so that it can be
recomputed by hand. Each rank takes every n-th batch, and the batches are made of all rows, whatever the world size: so
results don't depend on it. What is measured is kept batch by batch: see rlhf/evaluation/partial.py.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config.evaluated import EndpointJudge, baseline_of, judges_of, model_keys, policies_of, recipe_key
from rlhf.config.recipe import Recipe, load_recipe
from rlhf.config.stage_config import EvaluateConfig
from rlhf.console import quiet_libraries
from rlhf.data.mix import data_name
from rlhf.data.prepare import Prepared, plain_rows, write_skipped
from rlhf.data.rows import named_rows, split_off
from rlhf.data.sources import ALL_ROWS, SAMPLE_NAME
from rlhf.data.store import Rows
from rlhf.data.summary import line, skipped_line
from rlhf.data.summary import summarise as summarise_data
from rlhf.distributed.processes import is_main, say
from rlhf.errors import UserError
from rlhf.evaluation.comparison import summarise_judges, summarise_judgments, summarise_samples
from rlhf.evaluation.exports import export_answers
from rlhf.evaluation.extras import Extras, read_extras
from rlhf.evaluation.judging import check_endpoints, endpoint_judges, judge_all, read_template
from rlhf.evaluation.measure import Found, Subject, check_room, measure, prepare
from rlhf.evaluation.overlap import describe as describe_overlap
from rlhf.evaluation.overlap import find_overlap, heading
from rlhf.evaluation.partial import Measured, key_of
from rlhf.evaluation.reward_measures import about_rewards
from rlhf.evaluation.screen import show
from rlhf.evaluation.statistics import summarise
from rlhf.files import read_json, read_json_lines, write_file
from rlhf.runs.card import refresh_cards
from rlhf.runs.folder import RunFolder, finish_run, open_run, start_run
from rlhf.runs.lineage import maker_of, waits_for
from rlhf.runs.provenance import model_digest
from rlhf.runs.results import POLICIES, describe_models, table_rows
from rlhf.runs.resume import lock_folder
from rlhf.runs.stop import Stopper
from rlhf.runs.verdict import verdicts
from rlhf.training.checks import on_cpu
from rlhf.training.plan_checks import check_finished_models


def evaluate(recipe_path: str, overrides: list[str], check_only: bool = False) -> dict[str, Any] | None:
    """Run an evaluate recipe, print its table, and return its results (None if only checked).

    Raises:
        UserError: with the place and the fix, before a model loads.
    """
    recipe = load_recipe(recipe_path, "evaluate", overrides)
    config = EvaluateConfig(**recipe.values)
    digest, found, rows = read_rows(recipe, config)
    names = model_keys(vars(config))
    overlap, seen = find_overlap(rows, names)
    if overlap.left_out:
        rows = rows.select(np.flatnonzero(~seen))
    summary = summarise_data(rows, found.num_unused, len(found.skipped), found.stripped)
    about = [line(summary)]
    if found.skipped:
        about.append(skipped_line(found.skipped, len(rows) + len(found.skipped)))
    about += describe_overlap(overlap)
    waiting = {key: waits_for(recipe, name) for key, name in names.items()}
    where_judge = recipe.where("judge")
    if check_only and any(waiting.values()):
        say(f"{recipe.path}: ok (waits for: {', '.join(w for w in waiting.values() if w)})")
        return None
    extras = read_extras(recipe, config)
    inputs = {"dataset_name": digest} | {key: model_digest(name) for key, name in names.items()} | extras.inputs
    run = open_run(recipe, inputs)
    if run.complete:
        say(f"{'Evaluation':<12} complete: {run.folder}")
        results = read_results(run.folder, describe_models(names, inputs))
        show(results, read_answers(run.folder, results["policies"]))
        return results
    if not check_only:
        say(f"\n=== Evaluation: {recipe.path}")
    for text in about:
        say(f"{data_name(config.dataset_name)}: {text}")
    extras.find_tasks()
    if check_only:
        check_finished_models(recipe, names, waiting)
        check_endpoints(config, where_judge, rows)
        say(f"{recipe.path}: ok ({heading({'pairs': len(rows), 'overlap': overlap.record()})})")
        return None
    quiet_libraries(len(rows))
    check_finished_models(recipe, names, {})
    check_endpoints(config, where_judge, rows)
    data = Data(plain_rows(rows), found.skipped, summary.record(), overlap.record())
    return run_evaluation(run, recipe, config, data, inputs, extras)


@dataclass(frozen=True)
class Data:
    """The pairs to evaluate on, and what is recorded about them."""

    rows: list[dict]
    skipped: list[dict[str, str]]
    summary: dict[str, Any]
    overlap: dict[str, Any]


def run_evaluation(
    run: RunFolder, recipe: Recipe, config: EvaluateConfig, data: Data, inputs: dict[str, str], extras: Extras
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

    given = model_keys(vars(config))
    places = {key: recipe.where(recipe_key(key, recipe.values)) for key in given}
    names = {key: locate(name, places[key], maker_of(recipe, name), say) for key, name in given.items()}
    device = PartialState(cpu=on_cpu(recipe) or None).device  # else accelerate starts unconnected processes on CPUs
    begin = functools.cache(lambda: _start(run, recipe, inputs, vars(config) | {"data": data.summary}, data.skipped))
    check_room(names, config)
    files = {key: weights_digest(name) for key, name in names.items()}  # a model may be written again under its name
    templates = [read_template(judge, recipe.where("judge")) for judge in endpoint_judges(config)]
    key = key_of(vars(config) | {"output_dir": None}, inputs, files, data.rows, device.type, *templates)
    with Stopper(run.folder) as stopper:
        subjects = prepare(data.rows, names, config)
        with locked(run.folder, recipe), Measured(run.folder, key, stopper, begin) as measured:
            found = measure(data.rows, subjects, config, measured)
            judgments = judge_all(config, found.answers, measured, recipe.where("judge"), "reward_model" in names)
            more = extras.measure(names, measured)
            if not is_main():
                return None
            begin()
            results = summarise(
                found.pairs, found.answers, read_beta(names.get("dpo_model")), policies_of(vars(config))
            )
            results.get("reward", {}).update(about_rewards(found.pairs))
            results |= more
            results |= {"models": describe_models(given, inputs, files), "max_new_tokens": config.max_new_tokens}
            results |= compare_answers(config, found, judgments, subjects)
            results |= {"overlap": data.overlap, "changes": [row._asdict() for row in table_rows(results)]}
            results["verdict"] = verdicts(results)
            write_results(run.folder, found, judgments, results)
            export_answers(run.folder, config, found, subjects)
            finish_run(run, {"stage": "evaluate", "pairs": len(found.pairs)})
            measured.remove()
    for reason in refresh_cards(given, inputs, results, run.folder):
        say(f"note: the results were not added to {reason}")
    show(results, found.answers)
    return results


def compare_answers(
    config: EvaluateConfig, found: Found, judgments: list[dict], subjects: list[Subject]
) -> dict[str, Any]:
    """The part of the results about the policies' answers to the same prompts: who wins, and how far from the baseline."""
    judges: dict[str, dict[str, Any]] = {}
    if any(subject.kind == "reward" for subject in subjects):
        judges["reward_model"] = {"kind": "reward", "key": "reward_model"}
    for judge in judges_of(vars(config)):
        if isinstance(judge, EndpointJudge):
            template = hashlib.sha256(read_template(judge, "").encode()).hexdigest()
            about = {"endpoint": judge.endpoint, "model": judge.model, "template_sha256": template}
            judges[judge.label] = {"kind": "endpoint", **about, "parameters": judge.parameters}
        else:
            judges[judge.label] = {"kind": "reward", "key": f"judge.{judge.label}"}
    baseline = baseline_of(vars(config))
    return {
        "baseline": baseline,
        "pairwise": summarise_judgments(judgments, found.answers, config.seed),
        "judges": summarise_judges(judges, judgments, found.pairs) if judgments else {},
        "kl": summarise_samples(found.samples, baseline),
        "kl_skipped": {s.short: s.why_no_samples for s in subjects if s.why_no_samples},
    }


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


def _start(run: RunFolder, recipe: Recipe, inputs: dict[str, str], arguments: dict[str, Any], skipped: list) -> None:
    start_run(run, recipe, inputs, arguments)
    write_skipped(run.folder, skipped)


def write_results(folder: Path, found: Found, judgments: list[dict], results: dict[str, Any]) -> None:
    """Write pairs.jsonl, answers.jsonl, judgments.jsonl, samples.jsonl and results.json."""
    samples = [
        {"row": row, "policy": label, **one} for label, by_row in found.samples.items() for row, one in by_row.items()
    ]
    files = {"pairs": found.pairs, "answers": found.answers, "judgments": judgments, "samples": samples}
    for name, lines in ((f"{name}.jsonl", lines) for name, lines in files.items() if lines):
        write_file(folder / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_file(folder / "results.json", json.dumps(results, indent=2) + "\n")


def read_rows(recipe: Recipe, config: EvaluateConfig) -> tuple[str, Prepared, Rows]:
    """(digest of the data, what was prepared of it, the pairs to evaluate on)"""
    split = config.dataset_train_split if config.heldout else config.dataset_test_split
    if split is None and config.heldout and config.dataset_name == SAMPLE_NAME:
        split = ALL_ROWS
    where = "dataset_test_split" if config.dataset_test_split else "dataset_name"
    most, default = (None, "train") if config.heldout else (config.max_eval_examples, "test")
    found = named_rows(recipe, "pairs", split, most, config.bad_rows, where, default)
    if not config.heldout:
        rows = found.mixed(np.arange(len(found.rows), dtype=np.int64), recipe, repeat=False)
        return found.digest, found, rows.head(config.max_eval_examples)
    return found.digest, found, split_off(found, config.heldout, recipe)[1].head(config.max_eval_examples)


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


def read_answers(folder: Path, labels: Iterable[str] = POLICIES) -> list[dict[str, Any]]:
    """The answers of a finished evaluation by the policies of these labels, without unreadable lines."""
    known = set(labels)
    return [answer for answer in read_json_lines(folder / "answers.jsonl") if _is_answer(answer, known)]


def _is_answer(answer: dict[str, Any], labels: set[str]) -> bool:
    prompt = answer.get("prompt")
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    texts = [answer[p] for p in labels if p in answer]
    rewards = [answer[f"{p}_reward"] for p in labels if f"{p}_reward" in answer]
    return (
        isinstance(last, dict)
        and isinstance(last.get("content"), str)
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(reward, (int, float)) for reward in rewards)
    )
