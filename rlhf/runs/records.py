"""Reading what a run folder records (recipe, checkpoints, complete.json), damaged or not. Imports no torch.

Only `read_complete` raises for a file's content: it protects a finished model, which must not be taken for unfinished.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from rlhf.console import duration
from rlhf.errors import UserError, quote
from rlhf.files import YAML_ERRORS

CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,15})")  # str.isdigit takes '²' too, which int() does not read


def read_recipe(path: Path | str) -> dict[str, Any] | None:
    """The mapping in a recipe file; None if the file does not exist or holds no readable mapping."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, *YAML_ERRORS):
        return None
    return found if isinstance(found, dict) else None


def checkpoints(folder: Path) -> dict[int, Path]:
    """The folders `checkpoint-N` of a run folder, by N, complete or not."""
    try:
        names = os.listdir(folder)
    except (OSError, ValueError):
        return {}
    steps = {name: CHECKPOINT.fullmatch(name) for name in sorted(names)}
    return {int(m[1]): folder / name for name, m in steps.items() if m and os.path.isdir(folder / name)}


_NUMBER = (int, float)


_TYPES: dict[str, Any] = {"steps": int, "pairs": int, "train_examples": int, "seconds": _NUMBER, "weights_sha256": str,
          "first_loss": (*_NUMBER, type(None)), "last_loss": (*_NUMBER, type(None)), "files": dict}  # fmt: skip


def complete_damage(summary: Any) -> str:
    """What is wrong with the content of a complete.json; '' if nothing is."""
    if not isinstance(summary, dict):
        return f"it holds {quote(summary)}, expected a JSON object"
    for key, kind in _TYPES.items():
        if key in summary and (not isinstance(summary[key], kind) or isinstance(summary[key], bool)):
            return f"'{key}' is {quote(summary[key])}"
    if "seconds" in summary and not 0 <= summary["seconds"] < 1e10:  # NaN and Infinity are numbers to Python's JSON
        return f"'seconds' is {quote(summary['seconds'])}"
    if not {"steps", "pairs", "weights_sha256"} & set(summary):
        return f"it holds {quote(summary)}, and neither 'steps' nor 'pairs'"
    return ""


def look_at_complete(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """(content of complete.json, ''); (None, what is wrong with it); or (None, '') if there is none."""
    path = folder / "complete.json"
    if not os.path.lexists(path):
        return None, ""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return None, error.strerror or type(error).__name__
    except UnicodeDecodeError as error:
        return None, f"byte {error.start} is not UTF-8"
    except (ValueError, RecursionError) as error:  # no JSON; a number of 5,000 digits; 1,000 levels
        return None, f"not valid JSON: {' '.join(str(error).split())[:80]}"
    damage = complete_damage(found)
    return (None, damage) if damage else (found, "")


def read_complete(folder: Path) -> dict[str, Any] | None:
    """The content of complete.json; None if the run is not finished.

    Raises:
        UserError: the file exists and is damaged. If it counted as absent, the run would overwrite its finished model.
    """
    summary, damage = look_at_complete(folder)
    if not damage:
        return summary
    found = checkpoints(folder)
    resume = "the same command train again, as there is no checkpoint"
    if found:
        resume = f"the same command resume from {folder / f'checkpoint-{max(found)}'}"
    raise UserError(
        f"{folder / 'complete.json'} is damaged ({damage}), so it is unknown whether the model beside it is finished; "
        f"nothing was changed: move the file away to let {resume}, or give --fresh to train in a new folder"
    )


def describe_best(summary: dict[str, Any]) -> str:
    """Which weights a run has written, where they are not simply those of its last step; '' if they are.

    Example: `the weights of step 20, the best by eval_accuracy (0.75); stopped early, after step 50 of 100`.
    """
    best, total = summary.get("best"), summary.get("stopped_early_of")
    parts = []
    if isinstance(best, dict) and isinstance(best.get("step"), int):
        value = f" ({best['value']:.4g})" if isinstance(best.get("value"), (int, float)) else ""
        parts.append(f"the weights of step {best['step']}, the best by {best.get('metric')}{value}")
    if isinstance(total, int):
        parts.append(f"stopped early, after step {summary.get('steps', '?')} of {total}")
    return "; ".join(parts)


def describe_complete(summary: dict[str, Any]) -> str:
    """Steps, losses and time of a finished run, on one line."""
    losses = [summary.get("first_loss"), summary.get("last_loss")]
    arrow = " -> ".join(f"{float(x):.3f}" for x in losses if x is not None)
    parts = [
        f"{(steps := summary.get('steps', '?'))} step{'' if steps == 1 else 's'}",
        f"training loss {arrow}" if arrow else "",
        duration(summary.get("seconds", 0)),
    ]
    return ", ".join(filter(None, parts))
