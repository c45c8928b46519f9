"""A stage's training and held-out rows: prepared, split, with the digests of their files."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf.config.recipe import Recipe
from rlhf.data.convert import Kind
from rlhf.data.format_options import FormatOptions
from rlhf.data.heldout import check_heldout
from rlhf.data.joining import join_chosen_rejected
from rlhf.data.mix import Entry, amounts, choose, data_name, mix_lines, read_mix, shuffle
from rlhf.data.prepare import Prepared, prepare
from rlhf.data.sources import ALL_ROWS, SAMPLE_NAME, Source, load_source
from rlhf.data.store import Rows, concatenate
from rlhf.data.summary import DataSummary, has_margin, line, skipped_line, summarise
from rlhf.errors import UserError


@dataclass(frozen=True)
class StageData:
    """Canonical rows of a stage, and the digests of their sources.

    Attributes:
        name: the data as the recipe names it.
        summary: what was found in the training rows; None on other ranks than the main one.
        skipped: place and reason of each row, including held-out rows, that could not be used (`bad_rows: skip`).
        num_read: rows that were read and could be used, of which `train` and `heldout` were selected.
        about: what is taken of each data set of a mix.
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
    about: list[str] = field(default_factory=list)
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
        return [*self.about, *(f"{self.name}: {text}" for text in lines)]


def read_data(recipe: Recipe, kind: Kind, given: Mapping[str, Source] | None = None) -> StageData:
    """Read, validate and convert the training rows and the held-out rows of a recipe.

    Args:
        kind: of rows that the stage trains on.
        given: rows that Python code holds, by the key (`dataset_name`, `eval_dataset_name`) that would name their file.
    """
    given, ours = given or {}, recipe.ours
    whole = _training_rows(recipe, kind, given.get("dataset_name"))
    digests, held, heldout, held_key = dict(whole.digests), None, None, ""
    rows, key, share = whole.rows, whole.key, ours.heldout
    if share:
        rows, heldout = split_off(whole, share, recipe)
        held_key, key = (key and f"{key} {side} {share:g}" for side in ("heldout", "train"))
        heldout = heldout.head(ours.max_eval_examples)
        digests["heldout"] = f"{share:g} of {whole.digest}"
    else:
        rows = whole.mixed(np.arange(len(rows), dtype=np.int64), recipe)
        if source := given.get("eval_dataset_name") or _heldout_source(recipe):
            held = prepare(source.head(ours.max_eval_examples), kind, format_options(recipe), ours.bad_rows, True)
            heldout, held_key, digests["heldout"] = held.rows, held.key, source.digest
    rows = rows.head(ours.max_train_examples)
    unused = dict(whole.num_unused)
    if recipe.stage == "reward":
        reject_margins_in_some_rows(rows)
    elif has_margin(rows).any():
        unused["margin"] = 1
    return StageData(
        data_name(ours.dataset_name or ours.chosen_dataset_name), rows, heldout, digests,
        _summary(rows, unused, whole, heldout), whole.skipped + (held.skipped if held else []),
        len(whole.rows) + len(held.rows if held else ()), whole.describe(rows, recipe),
        {"train": key and f"{key} first {ours.max_train_examples}", "heldout": held_key and f"{held_key} first {ours.max_eval_examples}"},
    )  # fmt: skip


def _summary(rows: Rows, unused: dict[str, int], whole: Whole, heldout: Rows | None) -> DataSummary | None:
    """Of the training rows, each once, on the rank that shows and records it: seconds for ten million."""
    if int(os.environ.get("RANK", 0)):
        return None
    return summarise(rows.distinct(), unused, len(whole.skipped), whole.stripped, heldout)


@dataclass(frozen=True)
class Whole(Prepared):
    """All rows of the training data, before a part is held out or a mix is made of them.

    Attributes:
        digest: of all sources.
        digests: of the files, by recipe key.
        entries: the data sets of a mix; [] if there is one source.
        sizes: rows of each.
    """

    digest: str = ""
    digests: dict[str, str] = field(default_factory=dict)
    entries: Sequence[Entry] = ()
    sizes: Sequence[int] = ()

    def mixed(self, kept: np.ndarray, recipe: Recipe, repeat: bool = True) -> Rows:
        """The mix of the rows with these numbers.

        Args:
            repeat: rows may occur more than once, as `epochs` says.
        """
        if not self.entries:
            return self.rows if len(kept) == len(self.rows) else self.rows.select(kept)
        seed = mix_seed(recipe)
        often = amounts(list(self.entries), list(self.sizes), recipe.where("dataset_name"))
        bounds = np.cumsum([0, *self.sizes])
        parts = [
            choose(kept[(kept >= start) & (kept < end)], amount if repeat else min(amount, 1.0), seed, number)
            for number, (amount, start, end) in enumerate(zip(often, bounds[:-1], bounds[1:], strict=True))
        ]
        return self.rows.select(shuffle(np.concatenate(parts), seed))

    def describe(self, rows: Rows, recipe: Recipe) -> list[str]:
        """What is taken of each data set of a mix."""
        if not self.entries:
            return []
        bounds = np.cumsum([0, *self.sizes])
        taken = np.arange(len(rows)) if rows.indices is None else rows.indices
        used, distinct = (np.histogram(numbers, bounds)[0].tolist() for numbers in (taken, np.unique(taken)))
        return mix_lines(list(self.entries), list(self.sizes), used, distinct)


def split_off(whole: Whole, share: float, recipe: Recipe) -> tuple[Rows, Rows]:
    """(training rows, held-out rows), each mixed in the same way; no held-out row is repeated."""
    sides = check_heldout(share, whole.rows, recipe.where("heldout"), data_name(recipe.values.get("dataset_name")))
    return whole.mixed(np.flatnonzero(~sides), recipe), whole.mixed(np.flatnonzero(sides), recipe, repeat=False)


def mix_seed(recipe: Recipe) -> int:
    """The seed by which rows are chosen for a mix."""
    return int(next((recipe.get(key) for key in ("data_seed", "seed") if recipe.get(key) is not None), 42))


def format_options(recipe: Recipe, of: Entry | None = None) -> FormatOptions:
    """What the recipe, or an entry of its mix, says of the data's format."""
    return FormatOptions.of({**recipe.values, **((of.format if of else None) or {})}, recipe.where)


def _training_rows(recipe: Recipe, kind: Kind, given: Source | None) -> Whole:
    """The rows of the training data."""
    ours = recipe.ours
    # without `heldout`, rows beyond the first ones are not read
    most = None if ours.heldout else ours.max_train_examples
    if given is not None:
        found = prepare(given.head(most), kind, format_options(recipe), ours.bad_rows, True)
        return Whole(**vars(found), digest=given.digest, digests={"dataset_name": given.digest})
    split = recipe.get("dataset_train_split")
    if ours.chosen_dataset_name:
        chosen, rejected = (load_source(recipe.get(k), split, None, recipe.where(k)) for k in _SIDES)
        joined, digest = join_chosen_rejected(chosen, rejected, format_options(recipe))
        return Whole(**vars(joined), digest=digest, digests={_SIDES[0]: chosen.digest, _SIDES[1]: rejected.digest})
    if split is None and ours.heldout and ours.dataset_name == SAMPLE_NAME:
        split = ALL_ROWS
    return named_rows(recipe, kind, split, most, ours.bad_rows, "dataset_name")


def named_rows(
    recipe: Recipe, kind: Kind, split: str | None, most: int | None, bad_rows: str, where: str, default: str = "train"
) -> Whole:
    """The rows of the recipe's `dataset_name`: one data set, or several that are to be mixed.

    Args:
        most: rows to read of a single one.
        where: the key by which messages name the place.
    """
    name, config, place = recipe.values["dataset_name"], recipe.get("dataset_config"), recipe.where(where)
    if not isinstance(name, list):
        source = load_source(name, split, config, place, default)
        found = prepare(source.head(most), kind, format_options(recipe), bad_rows, True)
        return Whole(**vars(found), digest=source.digest, digests={"dataset_name": source.digest})
    entries = read_mix(name, recipe.where("dataset_name"))
    sources = [load_source(e.name, e.split or split, e.config or config, place, default) for e in entries]
    parts = [
        prepare(source, kind, format_options(recipe, entry), bad_rows, True)
        for source, entry in zip(sources, entries, strict=True)
    ]
    asked = [
        [source.digest, e.fraction, e.rows, e.epochs, e.weight] for source, e in zip(sources, entries, strict=True)
    ]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    unused: Counter[str] = Counter()
    for part in parts:
        unused.update(part.num_unused)
    return Whole(
        concatenate([part.rows for part in parts]), [row for part in parts for row in part.skipped], dict(unused),
        any(part.stripped for part in parts),
        f"mix {digest} {mix_seed(recipe)} {[part.key for part in parts]}" if all(part.key for part in parts) else "",
        digest, {"dataset_name": digest}, entries, [len(part.rows) for part in parts],
    )  # fmt: skip


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
