"""One self-contained HTML file about a run: lineage, results, curves, answers, data, environment, commands.

Nothing in it is loaded from anywhere and nothing runs: the plots are inline SVG, a content-security policy forbids
scripts, and all text of models and data is escaped by Jinja.
"""

from __future__ import annotations

import io
import math
import os
import shlex
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.config import STAGES, UserError
from rlhf.data.formats import preference_rows
from rlhf.data.sources import load_source
from rlhf.errors import quote
from rlhf.evaluate import read_answers, read_results, shown_answers, table_rows
from rlhf.progress import read_metrics, say
from rlhf.run_files import read_complete, read_json, read_recipe

TITLES = {"sft": "SFT", "reward": "Reward model", "dpo": "DPO", "evaluate": "Evaluation"}
SHORT = {"base": "base", "sft": "SFT", "dpo": "DPO"}

# What is drawn of each stage: a title, the unit, and the metrics with their labels.
PLOTS = {
    "sft": [
        ("Loss", "nats a token", {"loss": "training", "eval_loss": "held out"}),
        ("Token accuracy", "share", {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "held out"}),
    ],
    "reward": [
        ("Loss", "nats a pair", {"loss": "training", "eval_loss": "held out"}),
        ("Margin chosen over rejected", "reward", {"margin": "training", "eval_margin": "held out"}),
        ("Accuracy", "share of pairs", {"accuracy": "training", "eval_accuracy": "held out"}),
    ],
    "dpo": [
        ("Loss", "nats a pair", {"loss": "training", "eval_loss": "held out"}),
        ("Implicit rewards", "beta x log-ratio", {"rewards/chosen": "chosen", "rewards/rejected": "rejected",
                                                  "rewards/margins": "margin"}),
        ("Accuracy", "share of pairs", {"rewards/accuracies": "training", "eval_rewards/accuracies": "held out"}),
    ],
}  # fmt: skip


def write_report(target: str, output: str | None = None) -> Path:
    """Write report.html about the stages found in a run folder (or named by a recipe folder) and say what to do next.

    Args:
        target: a folder whose subfolders are stage outputs, or a recipe folder, whose recipes name them.
        output: the file; default `report.html` in the run folder.

    Raises:
        UserError: there is no such folder, or no stage in it has run.
    """
    stages = find_stages(Path(target))
    if not stages:
        raise UserError(
            f"{target} holds no run: expected folders with recipe.yaml and complete.json, or recipes that ran"
        )
    folders = [Path(s["folder"]) for s in stages.values()]
    home = folders[0].parent if len({f.parent for f in folders}) == 1 else Path(os.path.commonpath(folders))
    file = Path(output) if output else home / "report.html"
    text = render(stages, str(home))
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
    say(f"\nReport    {file}  (open it in a browser; it needs no network)")
    say("Next")
    for label, command in next_commands(stages, target):
        say(f"  {label:<22} {command}")
    return file


def find_stages(target: Path) -> dict[str, dict[str, Any]]:
    """The stages that have run, by name and in order, each with its folder, recipe, provenance, summary and metrics."""
    if not os.path.isdir(target):  # False too for a name that is too long
        raise UserError(f"no folder at {quote(str(target))[1:-1]}; give a run folder such as runs/quickstart")
    folders = []
    for stage in STAGES:
        recipe = target / f"{stage}.yaml"
        if recipe.is_file():
            output = (read_recipe(recipe) or {}).get("output_dir")
            folders.append(Path(output if isinstance(output, str) and output else "."))
    if not folders:
        folders = [target, *sorted(p for p in target.iterdir() if p.is_dir())]
    found = {}
    for folder in folders:
        if not all(os.path.isfile(folder / name) for name in ("recipe.yaml", "provenance.json")):
            continue
        provenance, recipe = read_json(folder / "provenance.json"), read_recipe(folder / "recipe.yaml")
        if recipe is None or not _is_provenance(provenance):
            damaged = "recipe.yaml" if recipe is None else "provenance.json"
            raise UserError(f"{folder / damaged} is damaged; the report needs it: restore it, or move {folder} away")
        stage = provenance["stage"]
        found[stage] = {
            "name": stage,
            "title": TITLES[stage],
            "folder": str(folder),
            "recipe": recipe,
            "provenance": provenance,
            "complete": read_complete(folder),
            "metrics": read_metrics(folder),
        }
    return {stage: found[stage] for stage in STAGES if stage in found}


def _is_provenance(found: dict[str, Any] | None) -> bool:
    """Whether provenance.json holds what the report shows of it."""
    shown = {"stage": str, "recipe": str, "command": list, "versions": dict, "hardware": dict}
    if found is None or not all(isinstance(found.get(key), kind) for key, kind in shown.items()):
        return False
    return (
        found["stage"] in STAGES and all(isinstance(word, str) for word in found["command"]) and "git_commit" in found
    )


def next_commands(stages: dict[str, dict], target: str) -> list[tuple[str, str]]:
    """(what for, command) to go on with after this run."""
    program = "rlhf" if shutil.which("rlhf") else os.path.relpath(Path(sys.executable).parent / "rlhf")
    commands = []
    policy = stages.get("dpo") or stages.get("sft")
    if policy and policy["complete"]:
        words = [program, "chat", policy["folder"]]
        if "dpo" in stages and "sft" in stages:
            words += ["--compare", stages["sft"]["folder"]]
        if "reward" in stages and stages["reward"]["complete"]:
            words += ["--reward", stages["reward"]["folder"]]
        commands.append(("talk to it", shlex.join(words)))
    recipes = Path(next(iter(stages.values()))["provenance"]["recipe"]).parent
    other = "configs/gpt2-alpaca" if recipes.name != "gpt2-alpaca" else "configs/quickstart"
    commands.append(("another recipe", f"launch/pipeline.sh {other}"))
    commands.append(("on 4 GPUs", f"launch/pipeline.sh {recipes} launch/ddp.yaml --num_processes 4"))
    return commands


def render(stages: dict[str, dict], home: str) -> str:
    """The report as HTML text."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("rlhf", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    results, answers = None, []
    if "evaluate" in stages and stages["evaluate"]["complete"]:
        folder = Path(stages["evaluate"]["folder"])
        results = read_results(folder)
        answers = read_answers(folder)
    last = list(stages.values())[-1]["provenance"]
    shown = shown_answers(answers)
    return environment.get_template("report.html.jinja").render(
        home=home,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        stages=stages,
        facts={name: stage_facts(stage) for name, stage in stages.items()},
        rows=table_rows(results) if results else [],
        results=results,
        plots={name: draw(stage) for name, stage in stages.items() if name in PLOTS and stage["metrics"]},
        shown=shown,
        more=[a for a in answers if a not in shown and "sft" in a and "dpo" in a],
        short=SHORT,
        data=data_statistics(stages),
        versions=last["versions"],
        hardware=last["hardware"],
        commit=last["git_commit"],
        commands=[(s["title"], shlex.join(s["provenance"]["command"])) for s in stages.values()],
    )


def stage_facts(stage: dict[str, Any]) -> list[tuple[str, str]]:
    """A few lines about a stage for its box in the lineage."""
    recipe, complete = stage["recipe"], stage["complete"]
    facts = [("folder", stage["folder"])]
    if stage["name"] == "evaluate":
        return [*facts, ("pairs", str(complete.get("pairs", "?")) if complete else "not complete")]
    facts.append(("starts from", str(recipe.get("model_name_or_path"))))
    facts.append(("data", str(recipe.get("dataset_name") or recipe.get("chosen_dataset_name"))))
    facts.append(("method", f"LoRA r={recipe.get('lora_r', 16)}" if recipe.get("use_peft") else "full fine-tuning"))
    if complete:
        facts.append(("examples", str(complete.get("train_examples", "?"))))
        facts.append(("steps", f"{complete.get('steps', '?')} in {complete.get('seconds', 0) / 60:.1f} min"))
        facts.append(("weights sha256", complete.get("weights_sha256", "?")[:16]))
    else:
        facts.append(("state", "not complete"))
    return facts


def data_statistics(stages: dict[str, dict]) -> list[dict[str, Any]]:
    """Counts and mean lengths (words) of the pairs that the run used, by split; empty if they can't be read any more."""
    stage = stages.get("dpo") or stages.get("reward")
    if stage is None or not stage["recipe"].get("dataset_name"):
        return []
    recipe, found = stage["recipe"], []
    for split in (recipe.get("dataset_train_split", "train"), recipe.get("dataset_test_split")):
        if not split:
            continue
        try:
            source = load_source(recipe["dataset_name"], split, recipe.get("dataset_config"))
            rows = preference_rows(source)
        except UserError:
            continue
        words = {
            k: [sum(len(m["content"].split()) for m in r[k]) for r in rows] for k in ("prompt", "chosen", "rejected")
        }
        tasks: dict[str, int] = {}
        for row in source.rows:
            if row.get("task"):
                tasks[str(row["task"])] = tasks.get(str(row["task"]), 0) + 1
        found.append(
            {
                "split": split,
                "pairs": len(rows),
                "several_turns": sum(len(r["prompt"]) > 1 for r in rows),
                "mean_words": {k: sum(v) / len(v) for k, v in words.items()},
                "rejected_shorter": sum(r < c for c, r in zip(words["chosen"], words["rejected"], strict=True))
                / len(rows),
                "tasks": tasks,
            }
        )
    return found


def draw(stage: dict[str, Any]) -> list[str]:
    """The curves of a stage as inline SVG, one small plot a quantity: each log as a dot, their running mean as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plots = []
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "rlhf"}
    ):
        for title, unit, metrics in PLOTS[stage["name"]]:
            figure, axes = plt.subplots(figsize=(3.6, 2.5), layout="constrained")
            drawn = 0
            for (metric, label), colour in zip(metrics.items(), ("#2563eb", "#d97706", "#059669"), strict=False):
                points = [(m["step"], m[metric]) for m in stage["metrics"] if isinstance(m.get(metric), (int, float))]
                if not points:
                    continue
                steps, values = zip(*points, strict=True)
                if metric.startswith("eval_"):
                    axes.plot(steps, values, color=colour, marker="o", markersize=4, linewidth=1, label=label)
                else:
                    axes.scatter(steps, values, color=colour, s=6, alpha=0.35, linewidths=0)
                    axes.plot(steps, running_mean(values), color=colour, linewidth=1.6, label=label)
                drawn += 1
            if stage["name"] in ("reward", "dpo") and title == "Loss":
                axes.axhline(math.log(2), color="#9ca3af", linewidth=0.8, linestyle="--", label="ln 2")
                drawn += 1
            axes.set_title(title, fontsize=10, loc="left")
            axes.set_xlabel("step")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_ylabel(unit)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.2)
            if drawn > 1:
                axes.legend(frameon=False, fontsize=8)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
            plt.close(figure)
            plots.append(buffer.getvalue()[buffer.getvalue().index("<svg") :])
    return plots


def running_mean(values: tuple[float, ...], window: int | None = None) -> list[float]:
    """Mean over the last `window` values (default: a tenth of them, at least 3), shorter at the beginning.

    Example: running_mean((1, 2, 3, 4), 2) -> [1, 1.5, 2.5, 3.5].
    """
    window = window or max(3, len(values) // 10)
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]
