"""Overlap of an evaluation with its models' training data: prompts trained on are never called held out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.heldout import trained_on
from rlhf.data.store import Rows
from rlhf.files import read_json


@dataclass
class Overlap:
    """Which of an evaluation's pairs its models were trained on.

    Attributes:
        pairs: number of pairs in the evaluation's data.
        seen: how many of them have a prompt that a model was trained on.
        by_run: run folder -> how many of the prompts it was trained on.
        unknown: models, or models they started from, without a record of their training data.
        known: whether at least one model has a record of its training prompts.
        left_out: pairs not measured because a model was trained on them; 0 if that is all (then all are measured).
    """

    pairs: int
    seen: int = 0
    by_run: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    known: bool = False
    left_out: int = 0

    def record(self) -> dict[str, Any]:
        return asdict(self)


def find_overlap(rows: Rows, names: dict[str, str]) -> tuple[Overlap, np.ndarray]:
    """Look up the evaluation's prompts in the training data of its models, and of the models that these started from.

    Args:
        names: of the models, by key (`base_model`, `sft_model`, ...).

    Returns:
        (overlap, per row whether a model was trained on its prompt)
    """
    overlap, seen = Overlap(len(rows)), np.zeros(len(rows), bool)
    folders, waiting = set(), list(names.values())
    while waiting:
        name = waiting.pop(0)
        if name in folders:
            continue
        folders.add(name)
        if start := started_from(Path(name)):
            waiting.append(start)
        hits = trained_on(Path(name), rows)
        if hits is None:
            overlap.unknown.append(name)
            continue
        overlap.known = True
        if hits.any():
            overlap.by_run[name] = int(hits.sum())
            seen |= hits
    overlap.seen = int(seen.sum())
    overlap.left_out = overlap.seen if overlap.seen < len(rows) else 0
    return overlap, seen


def started_from(folder: Path) -> str | None:
    """The model that a run started from, from its provenance; None if unknown."""
    provenance = read_json(folder / "provenance.json") or {}
    arguments = provenance.get("arguments") if isinstance(provenance, dict) else None
    model = arguments.get("model") if isinstance(arguments, dict) else None
    name = model.get("model_name_or_path") if isinstance(model, dict) else None
    return name if isinstance(name, str) else None


def heading(results: dict[str, Any]) -> str:
    """How to describe the pairs of an evaluation: held out only if that is known.

    Example: "38 held-out pairs" if 12 of 50 were left out; "50 pairs that a model was trained on" if all were.
    """
    count, found = results["pairs"], results.get("overlap")
    if not found:
        return f"{count} pairs (not checked whether a model was trained on them)"
    if found["seen"] and not found["left_out"]:
        return f"{count} pairs that a model was trained on (not held out)"
    if not found["known"]:
        return f"{count} pairs (the models' training data is unknown)"
    return f"{count} held-out pairs"


def describe(overlap: Overlap) -> list[str]:
    """Sentences about the overlap for the screen."""
    said = []
    for folder, count in overlap.by_run.items():
        said.append(f"{count} of {overlap.pairs} evaluation prompts were in the training data of {folder}")
    if overlap.left_out:
        said.append(
            f"these {overlap.left_out} are left out: only the other {overlap.pairs - overlap.left_out} are held out"
        )
    elif overlap.seen:
        said.append(
            "all of them: the results are on training data. Hold out a part with `heldout: 0.1` in every recipe "
            "of the folder, or evaluate on other data"
        )
    if overlap.unknown:
        said.append(f"unknown: the training data of {', '.join(overlap.unknown)}")
    return said
