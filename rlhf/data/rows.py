"""A stage's training and held-out rows: read, validated, split, with the digests of their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.config.recipe import Recipe
from rlhf.data.format_options import DEFAULT, FormatOptions
from rlhf.data.formats import join_chosen_rejected, reject_margins_in_some_rows
from rlhf.data.heldout import check_heldout
from rlhf.data.reading import Reading
from rlhf.data.sources import ALL_ROWS, SAMPLE_NAME, Source, load_source
from rlhf.data.summary import DataSummary, line, skipped_line, summarise
from rlhf.errors import UserError


@dataclass(frozen=True)
class StageData:
    """Canonical rows of a stage (a training row's `place` is its file and line), and the digests of their sources.

    Attributes:
        name: the data as the recipe names it.
        summary: what was found in the training rows.
        skipped: place and reason of each row, including held-out rows, that could not be used (`bad_rows: skip`).
    """

    name: str
    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]] | None
    digests: dict[str, str]
    summary: DataSummary | None = None
    skipped: list[dict[str, str]] = field(default_factory=list)

    def describe(self) -> list[str]:
        """A summary of the rows, as lines for the screen."""
        if self.summary is None:
            return []
        lines, leaks = [line(self.summary)], self.summary.leaks
        if self.skipped:
            total = len(self.train) + len(self.heldout or ()) + len(self.skipped)
            lines.append(skipped_line(self.skipped, total))
        if leaks.rows:
            lines.append(
                f"{leaks.rows:,} of {len(self.heldout or ()):,} held-out prompts are also in the training data (first: "
                f"{leaks.first}); scores on them are not meaningful"
            )
        return [f"{self.name}: {text}" for text in lines]


def read_data(
    recipe: Recipe,
    to_rows: Callable[[Source, Reading, FormatOptions], list[dict[str, Any]]],
    given: Mapping[str, Source] | None = None,
) -> StageData:
    """Read, validate and convert the training rows and the held-out rows of a recipe.

    Args:
        to_rows: the stage's conversion of a Source to canonical rows; fills the Reading.
        given: rows that Python code holds, by the key (`dataset_name`, `eval_dataset_name`) that would name their file.
    """
    reading, heldout_reading = (Reading(recipe.ours.bad_rows, can_skip=True) for _ in range(2))
    given = given or {}
    options = FormatOptions.of(recipe.values, recipe.where)
    if "dataset_name" in given:
        source, digests = given["dataset_name"], {"dataset_name": given["dataset_name"].digest}
    else:
        source, digests = _training_source(recipe, reading, options)
    joined = DEFAULT if recipe.ours.chosen_dataset_name else options  # a join has canonical rows
    heldout = given["eval_dataset_name"] if "eval_dataset_name" in given else _heldout_source(recipe)
    limit, heldout_limit = recipe.ours.max_train_examples, recipe.ours.max_eval_examples
    heldout_rows = None
    if share := recipe.ours.heldout:
        rows = to_rows(source, reading, joined)
        heldout_rows, heldout_reading.places = _split_off(rows, reading, share, recipe, source.name)
        heldout_rows = heldout_rows[:heldout_limit]
        heldout_reading.places = heldout_reading.places[:heldout_limit]
        digests["heldout"] = f"{share:g} of {source.digest}"
        rows, reading.places = rows[:limit], reading.places[:limit]
    else:
        rows = to_rows(source.head(limit), reading, joined)
        if heldout:
            digests["heldout"] = heldout.digest
            heldout_rows = to_rows(heldout.head(heldout_limit), heldout_reading, options)
    if recipe.stage == "reward":
        reject_margins_in_some_rows(rows, reading.places)
    elif any("margin" in row for row in rows):
        reading.num_unused["margin"] = sum("margin" in row for row in rows)
    summary = summarise(rows, reading, heldout_rows or [], heldout_reading.places)
    train = [{**row, "place": place} for row, place in zip(rows, reading.places, strict=True)]
    name = recipe.ours.dataset_name or str(recipe.ours.chosen_dataset_name)
    return StageData(name, train, heldout_rows, digests, summary, reading.skipped + heldout_reading.skipped)


def _training_source(recipe: Recipe, reading: Reading, options: FormatOptions) -> tuple[Source, dict[str, str]]:
    """(source of the training rows, digests of its files by key)"""
    split = recipe.get("dataset_train_split")
    if split is None and recipe.ours.heldout and recipe.ours.dataset_name == SAMPLE_NAME:
        split = ALL_ROWS
    if recipe.ours.chosen_dataset_name:
        chosen, rejected = (load_source(recipe.get(k), split, None, recipe.where(k)) for k in _SIDES)
        digests = {_SIDES[0]: chosen.digest, _SIDES[1]: rejected.digest}
        return join_chosen_rejected(chosen, rejected, reading, options), digests
    name, config = recipe.values["dataset_name"], recipe.ours.dataset_config
    source = load_source(name, split, config, recipe.where("dataset_name"))
    return source, {"dataset_name": source.digest}


def _heldout_source(recipe: Recipe) -> Source | None:
    """The source of held-out rows that are not split off the training data."""
    split, where = recipe.ours.dataset_test_split, recipe.where
    if recipe.ours.eval_dataset_name:
        return load_source(recipe.ours.eval_dataset_name, split, None, where("eval_dataset_name"))
    if split:
        name = recipe.values["dataset_name"]
        return load_source(name, split, recipe.ours.dataset_config, where("dataset_test_split"))
    if recipe.get("eval_strategy", "no") != "no" and not recipe.ours.heldout:
        raise UserError(
            f"{where('eval_strategy')}: there is nothing to evaluate on; set heldout, dataset_test_split or eval_dataset_name"
        )
    return None


def _split_off(rows: list[dict], reading: Reading, share: float, recipe: Recipe, name: str) -> tuple[list, list[str]]:
    """Remove the held-out rows from `rows` and their places from `reading`; returns both."""
    sides = check_heldout(share, rows, recipe.where("heldout"), name)
    parts = [
        [(row, place) for row, place, side in zip(rows, reading.places, sides, strict=True) if side is wanted]
        for wanted in (True, False)
    ]
    (heldout, heldout_places), (rows[:], reading.places) = (
        [list(column) for column in zip(*part, strict=True)] for part in parts
    )
    kept = set(reading.places)
    for found in (reading.low_scores, reading.equal_scores, reading.repeats):
        found[:] = [place for place in found if place in kept]
    return heldout, heldout_places


_SIDES = ("chosen_dataset_name", "rejected_dataset_name")
