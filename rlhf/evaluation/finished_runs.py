"""Which runs a report shows: those that one evaluation measured, or the only run of each stage; never a mixture.

A run is shown with an evaluation's results only if its weights are the measured ones. Several runs of one stage are
compared, and runs that are neither shown nor compared are listed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config.evaluated import EndpointJudge, judges_of, model_keys
from rlhf.config.recipe import HARMLESS
from rlhf.config.stage_config import STAGES, TRAINING_STAGES
from rlhf.config.yaml_reader import read_flat
from rlhf.errors import UserError, quote
from rlhf.files import read_json
from rlhf.runs.metrics import findings_of, read_metrics
from rlhf.runs.provenance import model_digest
from rlhf.runs.records import read_complete, read_recipe
from rlhf.runs.results import describe_models

TITLES = {"sft": "SFT", "reward": "Reward model", "dpo": "DPO", "evaluate": "Evaluation"}
DEPTH = 2  # levels below the given folder: runs/quickstart/sft in runs


@dataclass
class Selection:
    """What a report shows.

    Attributes:
        stages: the runs that belong together, by stage and in order.
        stale: why the evaluation's results are not shown; empty if they are.
        compared: by stage, the runs of stages with several runs.
        unshown: (folder, why) of runs that are neither shown nor compared.
        evaluations: all evaluations found.
    """

    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)
    compared: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    unshown: list[tuple[str, str]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)


def read_run(folder: Path) -> dict[str, Any] | None:
    """Recipe, provenance, summary and metrics of a run folder; None if the folder holds no run."""
    if not all(os.path.isfile(folder / name) for name in ("recipe.yaml", "provenance.json")):
        return None
    provenance, recipe = read_json(folder / "provenance.json"), read_recipe(folder / "recipe.yaml")
    if recipe is None or provenance is None or not _is_provenance(provenance):
        damaged = "recipe.yaml" if recipe is None else "provenance.json"
        raise UserError(f"{folder / damaged} is damaged, but the report needs it: restore it, or move {folder} away")
    return {
        "name": provenance["stage"],
        "title": TITLES[provenance["stage"]],
        "folder": str(folder),
        "recipe": recipe,
        "provenance": provenance,
        "complete": read_complete(folder),
        "metrics": (metrics := read_metrics(folder)),
        "findings": findings_of(metrics),
    }


def _is_provenance(found: dict[str, Any] | None) -> bool:
    """Whether provenance.json has all the fields that the report shows."""
    shown = {"stage": str, "recipe": str, "command": list, "versions": dict, "hardware": dict}
    if found is None or not all(isinstance(found.get(key), kind) for key, kind in shown.items()):
        return False
    return (
        found["stage"] in STAGES and all(isinstance(word, str) for word in found["command"]) and "git_commit" in found
    )


def select_runs(target: Path) -> Selection:
    """Select the runs to show from a run folder, a folder of run folders, or the outputs of a folder of recipes.

    Raises:
        UserError: there is no such folder.
    """
    if not os.path.isdir(target):  # False too for a name that is too long
        raise UserError(f"no folder at {quote(str(target))}; give a run folder such as runs/quickstart")
    folders = recipe_outputs(target) or [target, *_below(target, DEPTH)]
    selection = Selection()
    runs: dict[str, list[dict]] = {stage: [] for stage in STAGES}
    for folder in folders:
        run = read_run(folder)
        if run:
            runs[run["name"]].append(run)
        elif (folder / "provenance.json").is_file() or (folder / "recipe.yaml").is_file():
            selection.unshown.append((str(folder), "its recipe.yaml or provenance.json can't be read"))
    if len(runs["evaluate"]) == 1:
        follow_evaluation(selection, runs)
    else:
        selection.stages = {stage: found[0] for stage, found in runs.items() if len(found) == 1}
        _add_ancestors(selection, runs)
    selection.stages = {stage: selection.stages[stage] for stage in STAGES if stage in selection.stages}
    selection.evaluations = runs["evaluate"]
    fewest = 2 if len(runs["evaluate"]) < 2 else 1  # with two evaluations, a single run is compared too
    selection.compared = {stage: runs[stage] for stage in TRAINING_STAGES if len(runs[stage]) >= fewest}
    _list_unshown(selection, runs)
    return selection


def _list_unshown(selection: Selection, runs: dict[str, list[dict]]) -> None:
    known = {run["folder"] for run in selection.stages.values()}
    known |= {run["folder"] for found in selection.compared.values() for run in found}
    for run in (run for found in runs.values() for run in found if run["folder"] not in known):
        why = "the evaluation did not measure it"
        if run["name"] == "evaluate":
            why = f"one of several; `rlhf report {run['folder']}` shows it with the runs that it measured"
        selection.unshown.append((run["folder"], f"{run['title']}: {why}"))


def recipe_outputs(target: Path) -> list[Path]:
    """The output folders of a recipe folder's recipes."""
    folders = []
    for stage in STAGES:
        recipe = target / f"{stage}.yaml"
        if recipe.is_file():
            output = read_flat(str(recipe))[0].get("output_dir")
            if isinstance(output, str) and output:
                folders.append(Path(output).expanduser())
    return folders


def _below(folder: Path, depth: int) -> list[Path]:
    """The folders below a folder, without checkpoints and hidden folders."""
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "checkpoint-")))
    return [found for p in inside for found in [p, *(_below(p, depth - 1) if depth > 1 else [])]]


# --- what belongs together -------------------------------------------------------------------------------------------


def follow_evaluation(selection: Selection, runs: dict[str, list[dict]]) -> None:
    """Select the runs that the one evaluation measured; record those whose weights have changed since."""
    evaluation = runs["evaluate"][0]
    selection.stages["evaluate"] = evaluation
    measured = evaluation["provenance"].get("inputs") or {}
    for key, name in evaluated_models(evaluation["recipe"]).items():
        run = find_run(name, runs, measured.get(key))
        if run is not None and run["name"] in TRAINING_STAGES:
            shown = selection.stages.setdefault(run["name"], run)
            if shown["folder"] != run["folder"]:
                selection.unshown.append(
                    (run["folder"], f"{run['title']}: measured as {key}, beside {shown['folder']}")
                )
        if reason := why_stale(name, run, measured.get(key)):
            selection.stale.append(f"{key}: {reason}")
    _add_ancestors(selection, runs)


def evaluated_models(recipe: dict[str, Any]) -> dict[str, str]:
    """The models of a recorded evaluation by key, as `rlhf.config.evaluated.model_keys`; {} if its keys are damaged."""
    try:
        return model_keys(recipe)
    except UserError:
        return {}


def endpoints_of(recipe: dict[str, Any]) -> list[EndpointJudge]:
    """The endpoints that judged a recorded evaluation."""
    try:
        return [judge for judge in judges_of(recipe) if isinstance(judge, EndpointJudge)]
    except UserError:
        return []


def why_stale(name: str, run: dict[str, Any] | None, measured: str | None) -> str:
    """Why an evaluation's results don't apply to the weights now found under a model's name; '' if they do."""
    folder = run["folder"] if run else name
    if measured is None:
        return f"the evaluation did not record which weights of {folder} it measured"
    if run is None and not Path(name).is_dir():
        return "" if measured == model_digest(name) else f"{name} no longer exists"
    if run is not None and not run["complete"]:
        return f"{folder} was evaluated before, but is now being trained again"
    now = model_digest(folder)
    if now != measured:
        return (
            f"{folder} was trained again after it was evaluated (its weights are {now[:16]}; {measured[:16]} were "
            "measured)"
        )
    return ""


def find_run(name: str, runs: dict[str, list[dict]], digest: str | None) -> dict[str, Any] | None:
    """The run that a recipe names: found by its folder or, if that was moved, by its weights."""
    known = [run for found in runs.values() for run in found]
    for run in known:
        if _same(run["folder"], name):
            return run
    if Path(name).is_dir():
        return read_run(Path(name))
    return next((run for run in known if digest and (run["complete"] or {}).get("weights_sha256") == digest), None)


def _same(folder: str, name: str) -> bool:
    return os.path.realpath(folder) == os.path.realpath(os.path.expanduser(name))


def _add_ancestors(selection: Selection, runs: dict[str, list[dict]]) -> None:
    """Add the runs that the selected ones were trained from, unless their stage already has a run."""
    for _ in TRAINING_STAGES:
        for run in list(selection.stages.values()):
            parent = parent_of(run, runs)
            if run["name"] != "evaluate" and parent is not None and parent["name"] in TRAINING_STAGES:
                selection.stages.setdefault(parent["name"], parent)


def parent_of(run: dict[str, Any], runs: dict[str, list[dict]]) -> dict[str, Any] | None:
    """The run whose model a run was trained from; None if that model is not from a run."""
    name = run["recipe"].get("model_name_or_path")
    if not isinstance(name, str):
        return None
    return find_run(name, runs, (run["provenance"].get("inputs") or {}).get("model_name_or_path"))


def start_of(run: dict[str, Any], stages: dict[str, dict]) -> tuple[str | None, str]:
    """(the shown stage that a run was trained from, or None; the text for it)."""
    name = str(run["recipe"].get("model_name_or_path"))
    digest = (run["provenance"].get("inputs") or {}).get("model_name_or_path")
    parent = parent_of(run, {stage: [found] for stage, found in stages.items()})
    if parent is None or parent["folder"] not in {s["folder"] for s in stages.values()}:
        return None, name
    now = (parent["complete"] or {}).get("weights_sha256")
    if digest and now != digest:
        return None, f"{name}, which has been trained again since"
    return parent["name"], f"{parent['title']} ({name})"


def levels(stages: dict[str, dict]) -> list[list[str]]:
    """The shown stages in columns: each to the right of the stage it was trained from, the evaluation last.

    Example: SFT, then a reward model and DPO both from it -> [["sft"], ["reward", "dpo"], ["evaluate"]].
    """
    depth: dict[str, int] = {}
    for stage in stages:  # in the order of STAGES, but a parent may come later
        seen, at = [stage], stage
        while at != "evaluate" and (parent := start_of(stages[at], stages)[0]) and parent not in seen:
            seen.append(parent)
            at = parent
        depth[stage] = len(seen) - 1
    if "evaluate" in depth:
        depth["evaluate"] = max([depth[s] for s in stages if s != "evaluate"], default=-1) + 1
    return [[s for s in stages if depth[s] == level] for level in sorted(set(depth.values()))]


# --- several runs of a stage -----------------------------------------------------------------------------------------


def comparison(stage: str, runs: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """A table of several runs of a stage: differences of their recipes, progress, and evaluation results.

    Returns:
        {"keys": the differing recipe keys, "rows": [{"folder", "values", "steps", "loss", "results"}, ...]}
    """
    keys = sorted({key for run in runs for key in run["recipe"]} - HARMLESS)
    keys = [key for key in keys if len({repr(run["recipe"].get(key)) for run in runs}) > 1]
    rows = []
    for run in runs:
        logged = [m for m in run["metrics"] if "loss" in m]
        rows.append({
            "folder": run["folder"],
            "values": [str(run["recipe"].get(key, "default")) for key in keys],
            "steps": str(run["complete"]["steps"]) if run["complete"] else f"{logged[-1]['step'] if logged else 0}, not complete",
            "loss": f"{logged[-1]['loss']:.3f}" if logged else "",
            "results": results_of(stage, run, evaluations),
        })  # fmt: skip
    return {"keys": keys, "rows": rows}


def results_of(stage: str, run: dict[str, Any], evaluations: list[dict[str, Any]]) -> str:
    """The results of the evaluations that measured exactly these weights."""
    key, said = f"{stage}_model", []
    for evaluation in evaluations:
        name = evaluation["recipe"].get(key)
        results = read_json(Path(evaluation["folder"]) / "results.json")
        if not name or not _same(run["folder"], name) or not results:
            continue
        measured = (evaluation["provenance"].get("inputs") or {}).get(key)
        if not run["complete"] or measured != run["complete"].get("weights_sha256"):
            said.append(f"trained again after {evaluation['folder']}")
            continue
        said.append(f"{_in_short(stage, results)} ({results['pairs']} pairs, {evaluation['folder']})")
    return "; ".join(said) or "not evaluated"


def _in_short(stage: str, results: dict[str, Any]) -> str:
    share = lambda found: f"{found['share']:.0%} ({found['low']:.0%} to {found['high']:.0%})"  # noqa: E731
    parts = []
    policy = results["policies"].get(stage)
    if policy:
        parts.append(f"loss on chosen answers {policy['chosen_loss']:.3f}")
    if stage in ("reward", "dpo") and stage in results:
        parts.append(f"accuracy {share(results[stage]['accuracy'])}")
    if stage == "dpo" and "win_rate" in results:
        parts.append(f"wins {share(results['win_rate'])}")
    return ", ".join(parts)


def results_with_models(evaluation: dict[str, Any]) -> dict[str, Any]:
    """results.json, with the description of the models added if an older version did not write it."""
    results = read_json(Path(evaluation["folder"]) / "results.json") or {}
    if results and "models" not in results:
        results["models"] = describe_models(
            evaluated_models(evaluation["recipe"]), evaluation["provenance"].get("inputs") or {}
        )
    return results
