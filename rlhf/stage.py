"""What a training stage is, and the rows that it is given."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import TRAINING_STAGES, Recipe, UserError
from rlhf.data.formats import join_chosen_rejected, prompt_key
from rlhf.data.sources import Source, load_source
from rlhf.progress import say
from rlhf.stop import Stopper


@dataclass
class StageData:
    """Canonical rows of a stage (a training row's `place` says where it stands), and the digests of where they came from."""

    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]] | None
    digests: dict[str, str]


@dataclass
class Stage:
    """How a stage differs from the others.

    Attributes:
        name: `sft`, `reward` or `dpo`.
        title: what it is called on the screen.
        to_rows: a Source to canonical rows.
        load: (context) to the model to train (a PeftModel where an adapter goes on) and its tokenizer.
        build: (context) to TRL's trainer.
        probe: the trainer's tokenised training set to a few rows of token ids.
    """

    name: str
    title: str
    to_rows: Callable[[Source], list[dict[str, Any]]]
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
    train_split, test_split = recipe.get("dataset_train_split"), recipe.get("dataset_test_split")
    digests = {}
    if recipe.get("chosen_dataset_name"):
        sides = [load_source(recipe.get(k), train_split, None, where(k)) for k in _SIDES]
        digests |= {k: s.digest for k, s in zip(_SIDES, sides, strict=True)}
        source = join_chosen_rejected(*sides)
    else:
        name, config = recipe.get("dataset_name"), recipe.get("dataset_config")
        source = load_source(name, train_split, config, where("dataset_name"))
        digests["dataset_name"] = source.digest
    heldout = None
    if recipe.get("eval_dataset_name"):
        heldout = load_source(recipe.get("eval_dataset_name"), test_split, None, where("eval_dataset_name"))
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
    source = source.head(recipe.get("max_train_examples"))
    train = [{**row, "place": source.where(index)} for index, row in enumerate(stage.to_rows(source))]
    heldout_rows = stage.to_rows(heldout.head(recipe.get("max_eval_examples"))) if heldout else None
    if heldout_rows:
        seen = {prompt_key(row) for row in train}
        leaks = sum(prompt_key(row) in seen for row in heldout_rows)
        if leaks:
            say(
                f"note: {leaks} of {len(heldout_rows)} held-out prompts are in the training data too; scores on them mean little"
            )
    return StageData(train, heldout_rows, digests)


_SIDES = ("chosen_dataset_name", "rejected_dataset_name")
