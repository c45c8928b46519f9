"""Benchmarks through lm-evaluation-harness (`benchmarks: [ifeval, gsm8k]`): before and after, on the same items.

The harness builds the requests, filters the answers and computes the metrics; its numbers are therefore those of its own
command. Only the requests are answered here: batch by batch over all ranks, kept as they come (rlhf/evaluation/partial.py),
by models that are loaded as everywhere else. The harness is the extra `benchmarks`: nothing of it is imported without it.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.data.table_readers import first_line
from rlhf.errors import UserError, pip_install, quote
from rlhf.evaluation.partial import Measured
from rlhf.runs.intervals import Z_95

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

SEED = 1234  # the harness's own default, for few-shot examples
BATCHES_AT_ONCE = 8  # batches per unit of work: what a stopped evaluation computes again at most


@dataclass(frozen=True)
class Benchmarks:
    """The tasks of a recipe, found and with their data, before a model loads.

    Attributes:
        names: tasks, groups or tags, as the recipe has them.
        manager: the harness's index of tasks.
        limit: items per task; None for all.
        version: of the harness.
    """

    names: list[str]
    manager: TaskManager
    limit: int | None
    version: str


# --- before a model loads --------------------------------------------------------------------------------------------


def find_benchmarks(names: list[str], folder: str | None, limit: int | None, where: Callable[[str], str]) -> Benchmarks:
    """Find the tasks and read their data.

    Args:
        folder: of task files (YAML) of one's own, or None.
        where: of a recipe key, for messages.

    Raises:
        UserError: the harness is not installed; an unknown task; a task that would run code of a model; data that can't be read.
    """
    place = where("benchmarks")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"{place}: benchmarks need lm-evaluation-harness: {pip_install('rlhf-dpo[benchmarks]')}")
    if folder is not None and not Path(folder).is_dir():
        raise UserError(
            f"{where('benchmark_tasks')}: benchmark_tasks {quote(folder)} is no folder; it holds YAML files of tasks"
        )
    manager = _manager(names, folder)
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name[:100], sorted(known), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; `lm-eval ls tasks` lists those that it has"
            raise UserError(f"{place}: lm-evaluation-harness has no task {quote(name)}{hint}")
    for task in _load(names, manager, place).values():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"{place}: the task {task.config.task} runs code that the model has written, on this machine; it is not run "
                "here: use `lm-eval run` in a sandbox"
            )
    return Benchmarks(names, manager, limit, importlib.metadata.version("lm_eval"))


def _manager(names: list[str], folder: str | None) -> TaskManager:
    """The index of tasks: of one's own folder alone if it has them all, since reading the harness's own takes seconds."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=folder)


def _load(names: list[str], manager: TaskManager, place: str) -> dict[str, Any]:
    """The tasks by name, with their data."""
    import datasets

    datasets.disable_progress_bars()
    found: dict[str, Any] = {}
    for name in names:
        try:
            found |= manager.load([name])["tasks"]
        except Exception as error:  # the hub's client, datasets, YAML functions of the task: a dozen types
            raise UserError(f"{place}: the task {name} can't be loaded: {first_line(error)}") from None
    return found


def folder_digest(folder: str | None) -> str:
    """A digest of the files in a folder of tasks."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")) if folder else ():
        if path.is_file():
            digest.update(str(path.relative_to(folder or ".")).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


# --- one model -------------------------------------------------------------------------------------------------------


def measure_model(
    found: Benchmarks, short: str, load: Callable[[], Any], tokenizer: Any, batch_size: int,
    with_template: bool, measured: Measured,
) -> dict[str, Any]:  # fmt: skip
    """The results of one model, as the harness gives them. A collective; the results are on the main rank, {} elsewhere.

    Args:
        short: the model's name at the progress bar.
        load: the model, not packed (the harness pads its batches without an attention mask, which packing needs); called only
            if an answer is missing.
        with_template: prompts go through the chat template.
    """
    from lm_eval.evaluator import evaluate

    random.seed(0)
    np.random.seed(SEED)
    tasks = found.manager.load(found.names)
    for task in tasks["tasks"].values():  # as the harness's own `simple_evaluate` does
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    model = _model(short, load, tokenizer, batch_size, measured)
    results = evaluate(
        model, tasks, limit=found.limit, apply_chat_template=with_template, fewshot_as_multiturn=with_template,
        bootstrap_iters=1000,
    )  # fmt: skip
    return dict(results or {})


def _model(short: str, load: Callable[[], Any], tokenizer: Any, batch_size: int, measured: Measured):
    """The harness's model whose answers come from `measured`, and from the loaded model where they are missing."""
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM

    @functools.cache
    def loaded() -> HFLM:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        return HFLM(pretrained=load(), tokenizer=tokenizer, batch_size=batch_size)

    class Answers(LM):
        tokenizer_name = str(getattr(tokenizer, "name_or_path", "tokenizer"))

        def loglikelihood(self, requests):
            return [(float(value), bool(greedy)) for value, greedy in self._answer("loglikelihood", requests)]

        def loglikelihood_rolling(self, requests):
            return self._answer("loglikelihood_rolling", requests)

        def generate_until(self, requests):
            return self._answer("generate_until", requests)

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )  # fmt: skip

        def _answer(self, kind: str, requests: list) -> list[Any]:
            size = BATCHES_AT_ONCE * batch_size
            batches = [list(range(at, min(at + size, len(requests)))) for at in range(0, len(requests), size)]
            key = hashlib.sha256(json.dumps([r.args for r in requests], default=str).encode()).hexdigest()[:16]

            def work(batch: list[int]) -> list[Any]:
                from transformers import set_seed

                set_seed(SEED + batch[0])  # a task that samples gets the same answers on any number of ranks
                return list(getattr(loaded(), kind)([requests[i] for i in batch], disable_tqdm=True))

            shown = {"generate_until": "answers"}.get(kind, "likelihoods")
            found = measured.compute(f"{short}: {kind} {key}", batches, work, f"{short}: benchmarks, {shown}")
            return [found[i] for i in range(len(requests))]

    return Answers()


# --- several models on the same items --------------------------------------------------------------------------------


def compare(results: dict[str, dict[str, Any]], found: Benchmarks, with_template: bool) -> dict[str, Any]:
    """The metrics of all models, and the difference of each to the one before it, item by item.

    Args:
        results: `measure_model` by model, in the order of training (base, sft, dpo).

    Returns:
        {"harness", "limit", "chat_template", "models", "rows": [{"task", "metric", "filter", "higher_is_better", "count",
        "values": {model: {"value", "stderr"}}, "differences": [`paired_difference` with "before" and "after"]}]}
    """
    models, rows = list(results), []
    for task, metric, filter_name in _metrics(next(iter(results.values()))):
        values, samples = {}, {}
        for model, result in results.items():
            entry = result["results"][task]
            values[model] = {"value": _number(entry[f"{metric},{filter_name}"]),
                             "stderr": _number(entry.get(f"{metric}_stderr,{filter_name}"))}  # fmt: skip
            samples[model] = item_values(result, task, metric, filter_name)
        differences = []
        for before, after in zip(models[:-1], models[1:], strict=True):
            if all(_is_mean(samples[m], values[m]["value"]) for m in (before, after)):
                found_difference = paired_difference(samples[before], samples[after])
                differences.append({"before": before, "after": after, **found_difference})
        first = results[models[0]]
        rows.append({
            "task": task, "metric": metric, "filter": filter_name,
            "higher_is_better": (first.get("higher_is_better", {}).get(task) or {}).get(metric),
            "count": len(samples[models[0]]), "values": values, "differences": differences,
        })  # fmt: skip
    return {
        "harness": f"lm_eval {found.version}", "limit": found.limit, "chat_template": with_template, "models": models,
        "rows": rows,
    }  # fmt: skip


def paired_difference(before: dict[Any, float], after: dict[Any, float]) -> dict[str, Any]:
    """Mean difference after - before over the items that both have, its standard error and 95% interval.

    The standard error is that of the mean of the differences: items that are hard for both models cancel out, so it is
    smaller than that of two independent scores.

    Example: before 0, 0, 1, 1 and after 1, 0, 1, 1: differences 1, 0, 0, 0; mean 0.25, standard deviation 0.5 (n - 1), standard
    error 0.5 / 2 = 0.25.

    Source: Miller, Adding Error Bars to Evals, arXiv:2411.00640, section 4.2.
    """
    changes = np.array([after[item] - before[item] for item in before if item in after])
    value = float(changes.mean()) if len(changes) else math.nan
    error = float(changes.std(ddof=1) / math.sqrt(len(changes))) if len(changes) > 1 else math.nan
    return {"value": value, "stderr": error, "low": value - Z_95 * error, "high": value + Z_95 * error,
            "count": len(changes), "changed": int((changes != 0).sum())}  # fmt: skip


def item_values(result: dict[str, Any], task: str, metric: str, filter_name: str) -> dict[Any, float]:
    """The metric of each item: (task, number of the item) -> number; of a group, the items of all its tasks."""
    found = {}
    for leaf in _leaves(result, task):
        for sample in result["samples"].get(leaf, ()):
            value = sample.get(metric)
            if sample["filter"] == filter_name and isinstance(value, (bool, int, float, np.number)):
                found[leaf, sample["doc_id"]] = float(value)
    return found


def item_lines(results: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Per task, metric and item the value of each model: what the differences are computed from."""
    for task, metric, filter_name in _metrics(next(iter(results.values())), leaves=True):
        values = {model: item_values(result, task, metric, filter_name) for model, result in results.items()}
        for item in next(iter(values.values())):
            own = {model: found.get(item) for model, found in values.items()}
            yield {"task": task, "metric": metric, "filter": filter_name, "item": item[1], **own}


def _metrics(result: dict[str, Any], leaves: bool = False) -> Iterator[tuple[str, str, str]]:
    """(task, metric, filter) of the tasks, or groups, to be shown: no task of a group that is shown itself."""
    groups = result.get("groups") or {}
    inner = {leaf for group in groups for leaf in _leaves(result, group) if leaf != group}
    inner |= {child for group in groups for child in (result.get("group_subtasks") or {}).get(group, ())}
    for task, entry in result["results"].items():
        if (task in groups) if leaves else (task in inner):
            continue
        for key, value in entry.items():
            metric, comma, filter_name = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, (int, float, np.number)):
                yield task, metric, filter_name


def _leaves(result: dict[str, Any], task: str) -> list[str]:
    children = (result.get("group_subtasks") or {}).get(task) or []
    return [leaf for child in children for leaf in _leaves(result, child)] if children else [task]


def _is_mean(samples: dict[Any, float], value: float | None) -> bool:
    """Whether a metric is the mean of its items: only then does a difference of items say something of it."""
    return (
        value is not None and bool(samples) and math.isclose(sum(samples.values()) / len(samples), value, abs_tol=1e-9)
    )


def _number(value: Any) -> float | None:
    """A finite number; None for the harness's "N/A" and for NaN."""
    is_number = isinstance(value, (int, float, np.number)) and math.isfinite(value)
    return float(value) if is_number else None
