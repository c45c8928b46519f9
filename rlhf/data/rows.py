"""A stage's training and held-out rows: prepared, split, with the digests of their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rlhf.config.recipe import Recipe
from rlhf.data.convert import Kind
from rlhf.data.formats import FormatOptions
from rlhf.data.heldout import check_heldout
from rlhf.data.joining import join_chosen_rejected
from rlhf.data.prepare import Prepared, prepare
from rlhf.data.sources import ALL_ROWS, SAMPLE_NAME, Source, load_source
from rlhf.data.store import Rows
from rlhf.data.summary import DataSummary, has_margin, line, skipped_line, summarise
from rlhf.errors import UserError


@dataclass(frozen=True)
class StageData:
    """Canonical rows of a stage, and the digests of their sources.

    Attributes:
        name: the data as the recipe names it.
        summary: what was found in the training rows.
        skipped: place and reason of each row, including held-out rows, that could not be used (`bad_rows: skip`).
        num_read: rows that were read and could be used, of which `train` and `heldout` were selected.
        keys: by side (`train`, `heldout`), what identifies its rows: their prepared sources and how they were selected; ''
            if they are in memory only.
    """

    name: str
    train: Rows
    heldout: Rows | None
    digests: dict[str, str]
    summary: DataSummary | None = None
    skipped: list[dict[str, str]] = field(default_factory=list)
    num_read: int = 0
    keys: dict[str, str] = field(default_factory=dict)

    def describe(self) -> list[str]:
        """A summary of the rows, as lines for the screen."""
        if self.summary is None:
            return []
        lines, leaks = [line(self.summary)], self.summary.leaks
        if self.skipped:
            total = self.num_read + len(self.skipped)
            lines.append(skipped_line(self.skipped, total))
        if leaks.rows:
            lines.append(
                f"{leaks.rows:,} of {len(self.heldout or ()):,} held-out prompts are also in the training data (first: "
                f"{leaks.first}); scores on them are not meaningful"
            )
        return [f"{self.name}: {text}" for text in lines]


def read_data(recipe: Recipe, kind: Kind, given: Mapping[str, Source] | None = None) -> StageData:
    """Read, validate and convert the training rows and the held-out rows of a recipe.

    Args:
        kind: of rows that the stage trains on.
        given: rows that Python code holds, by the key (`dataset_name`, `eval_dataset_name`) that would name their file.
    """
    given, ours = given or {}, recipe.ours
    whole, digests = _training_rows(recipe, kind, given.get("dataset_name"))
    rows, limit = whole.rows, f"first {ours.max_train_examples}"
    keys = {"train": f"{whole.key} {limit}" if whole.key else ""}
    heldout, held = None, None
    if share := ours.heldout:
        sides = check_heldout(share, rows, recipe.where("heldout"), str(recipe.values.get("dataset_name")))
        heldout = rows.select(np.flatnonzero(sides)).head(ours.max_eval_examples)
        rows = rows.select(np.flatnonzero(~sides))
        digests["heldout"] = f"{share:g} of {whole.digest}"
        keys = {
            side: key and f"{whole.key} {side} {share:g} {limit}"
            for side, key in (("train", keys["train"]), ("heldout", keys["train"]))
        }
        keys["heldout"] = keys["heldout"] and f"{whole.key} heldout {share:g} first {ours.max_eval_examples}"
    elif source := given.get("eval_dataset_name") or _heldout_source(recipe):
        held = prepare(source.head(ours.max_eval_examples), kind, format_options(recipe), ours.bad_rows, True)
        heldout, digests["heldout"] = held.rows, source.digest
        keys["heldout"] = held.key and f"{held.key} first {ours.max_eval_examples}"
    rows = rows.head(ours.max_train_examples)
    unused = dict(whole.num_unused)
    if recipe.stage == "reward":
        reject_margins_in_some_rows(rows)
    elif has_margin(rows).any():
        unused["margin"] = 1
    skipped = whole.skipped + (held.skipped if held else [])
    summary = summarise(rows, unused, len(whole.skipped), whole.stripped, heldout)
    num_read = len(whole.rows) + len(held.rows if held else ())
    name = recipe.ours.dataset_name or str(recipe.ours.chosen_dataset_name)
    return StageData(name, rows, heldout, digests, summary, skipped, num_read, keys)


@dataclass(frozen=True)
class _Whole(Prepared):
    """All rows of the training source, and its digest."""

    digest: str = ""


def format_options(recipe: Recipe) -> FormatOptions:
    """What the recipe says of its data's format."""
    return FormatOptions()


def _training_rows(recipe: Recipe, kind: Kind, given: Source | None) -> tuple[_Whole, dict[str, str]]:
    """(the rows of the training source, digests of its files by key)"""
    ours, options = recipe.ours, format_options(recipe)
    # without `heldout`, rows beyond the first ones are not read
    most = None if ours.heldout else ours.max_train_examples
    if given is not None:
        digests = {"dataset_name": given.digest}
        found = prepare(given.head(most), kind, options, ours.bad_rows, True)
        return _Whole(**vars(found), digest=given.digest), digests
    split = recipe.get("dataset_train_split")
    if split is None and ours.heldout and ours.dataset_name == SAMPLE_NAME:
        split = ALL_ROWS
    if ours.chosen_dataset_name:
        chosen, rejected = (load_source(recipe.get(k), split, None, recipe.where(k)) for k in _SIDES)
        joined, digest = join_chosen_rejected(chosen, rejected, options)
        return _Whole(**vars(joined), digest=digest), {_SIDES[0]: chosen.digest, _SIDES[1]: rejected.digest}
    name, config = recipe.values["dataset_name"], ours.dataset_config
    source = load_source(name, split, config, recipe.where("dataset_name"))
    found = prepare(source.head(most), kind, options, ours.bad_rows, True)
    return _Whole(**vars(found), digest=source.digest), {"dataset_name": source.digest}


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


def reject_margins_in_some_rows(rows: Rows) -> None:
    """Raise UserError if only some rows have a margin: the reward model's loss needs all or none."""
    have = has_margin(rows)
    if have.any() and not have.all():
        raise UserError(
            f"{rows.place(int((~have).argmax()))}: no 'margin', but {have.sum():,} of {len(rows):,} rows have one (first: "
            f"{rows.place(int(have.argmax()))}); set it in all rows or in none"
        )


_SIDES = ("chosen_dataset_name", "rejected_dataset_name")
