"""What a training stage is, and the rows that it is given."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import TRAINING_STAGES, Recipe, UserError
from rlhf.data.formats import join_chosen_rejected, refuse_margins_in_some_rows
from rlhf.data.reading import Reading
from rlhf.data.sources import Source, load_source
from rlhf.data.summary import DataSummary, line, skipped_line, summarise
from rlhf.stop import Stopper


@dataclass
class StageData:
    """Canonical rows of a stage (a training row's `place` says where it stands), and the digests of where they came from.

    Attributes:
        summary: what was found in the training rows.
        skipped: place and reason of each row, also held-out, that could not be used (`bad_rows: skip`).
    """

    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]] | None
    digests: dict[str, str]
    summary: DataSummary | None = None
    skipped: list[dict[str, str]] = field(default_factory=list)

    def describe(self) -> list[str]:
        """What the rows are like, as lines for the screen."""
        if self.summary is None:
            return []
        lines, leaks = [line(self.summary)], self.summary.leaks
        if self.skipped:
            total = len(self.train) + len(self.heldout or ()) + len(self.skipped)
            lines.append(skipped_line(self.skipped, total))
        if leaks.rows:
            lines.append(
                f"{leaks.rows:,} of {len(self.heldout):,} held-out prompts are in the training data too (first: {leaks.first}); "
                "scores on them mean little"
            )
        return lines


@dataclass
class Stage:
    """How a stage differs from the others.

    Attributes:
        name: `sft`, `reward` or `dpo`.
        title: what it is called on the screen.
        to_rows: a Source to canonical rows; fills the Reading.
        load: (context) to the model to train (a PeftModel where an adapter goes on) and its tokenizer.
        build: (context) to TRL's trainer.
        probe: the trainer's tokenised training set to a few rows of token ids.
    """

    name: str
    title: str
    to_rows: Callable[[Source, Reading], list[dict[str, Any]]]
    load: Callable[[Any], tuple[Any, Any]]
    build: Callable[[Any], Any]
    probe: Callable[[Any], list[list[int]]]


@dataclass
class Context:
    """What a stage's `build` gets: configs, rows, the located input model, and who is asked to stop."""

    recipe: Recipe
    args: Any
    model_args: Any
    stage_args: Any
    data: StageData
    model_name: str
    stopper: Stopper | None = None


def maker_of(recipe: Recipe, name: str | None) -> str:
    """The command that makes this model, if a recipe of the same folder has it as output_dir; else ''."""
    if not name:
        return ""
    import yaml

    for stage in TRAINING_STAGES:
        sibling = Path(recipe.path).parent / f"{stage}.yaml"
        if stage == recipe.stage or not sibling.is_file():
            continue
        try:
            output = (yaml.safe_load(sibling.read_text(encoding="utf-8")) or {}).get("output_dir")
        except (yaml.YAMLError, AttributeError):
            continue
        if output and os.path.normpath(output) == os.path.normpath(name):
            return f"rlhf {stage} {sibling}"
    return ""


def waits_for(recipe: Recipe, name: str) -> str:
    """The command that has yet to make (or finish) this model; '' if it is there or comes from elsewhere."""
    return "" if (Path(name) / "complete.json").is_file() else maker_of(recipe, name)


def read_data(stage: Stage, recipe: Recipe) -> StageData:
    """Read, validate and convert the training rows and the held-out rows of a recipe."""
    where = recipe.where
    train_split, test_split = recipe.get("dataset_train_split", "train"), recipe.get("dataset_test_split")
    digests = {}
    reading, heldout_reading = (Reading(recipe.get("bad_rows", "error"), can_skip=True) for _ in range(2))
    if recipe.get("chosen_dataset_name"):
        sides = [load_source(recipe.get(k), train_split, None, where(k)) for k in _SIDES]
        digests |= {k: s.digest for k, s in zip(_SIDES, sides, strict=True)}
        source = join_chosen_rejected(*sides, reading)
    else:
        name, config = recipe.get("dataset_name"), recipe.get("dataset_config")
        source = load_source(name, train_split, config, where("dataset_name"))
        digests["dataset_name"] = source.digest
    heldout = None
    if recipe.get("eval_dataset_name"):
        heldout = load_source(recipe.get("eval_dataset_name"), test_split or "train", None, where("eval_dataset_name"))
    elif test_split:
        heldout = load_source(
            recipe.get("dataset_name"), test_split, recipe.get("dataset_config"), where("dataset_test_split")
        )
    elif recipe.get("eval_strategy", "no") != "no":
        raise UserError(
            f"{where('eval_strategy')}: there is nothing to evaluate on; set dataset_test_split or eval_dataset_name"
        )
    if heldout:
        digests["heldout"] = heldout.digest
    rows = stage.to_rows(source.head(recipe.get("max_train_examples")), reading)
    if stage.name == "reward":
        refuse_margins_in_some_rows(rows, reading.places)
    elif any("margin" in row for row in rows):
        reading.num_unused["margin"] = sum("margin" in row for row in rows)
    heldout_rows = None
    if heldout:
        heldout_rows = stage.to_rows(heldout.head(recipe.get("max_eval_examples")), heldout_reading)
    summary = summarise(rows, reading, heldout_rows or [], heldout_reading.places)
    train = [{**row, "place": place} for row, place in zip(rows, reading.places, strict=True)]
    return StageData(train, heldout_rows, digests, summary, reading.skipped + heldout_reading.skipped)


_SIDES = ("chosen_dataset_name", "rejected_dataset_name")
