"""What a command about data is given: a recipe, whose stage reads its data, or data alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config.recipe import Recipe, load_recipe, stage_of
from rlhf.config.recipe_checks import check_formats
from rlhf.config.stage_config import FORMATS, STAGES
from rlhf.config.yaml_reader import read_word
from rlhf.data.convert import Kind, first_rows
from rlhf.data.messages import RowError
from rlhf.data.recognise import converter
from rlhf.data.rows import StageData, format_options, read_data
from rlhf.data.sources import Source, load_source
from rlhf.data.store import Rows
from rlhf.data.unpaired import is_helpsteer, is_kto
from rlhf.errors import UserError, quote

ASKED = ("format", "columns", "roles")
GUESS_ROWS = 50


@dataclass(frozen=True)
class Target:
    """A recipe's data, or data alone.

    Attributes:
        name: as it was given.
        recipe: the recipe; for data alone, one that has its keys and no more.
        is_recipe: the name is a recipe's.
        kind: of rows.
        limit: only the first rows of the training data.
    """

    name: str
    recipe: Recipe
    is_recipe: bool
    kind: Kind
    limit: int | None = None

    @property
    def stage(self) -> str:
        return self.recipe.stage

    def source(self) -> Source:
        """The training data as it is in the file. Only for data alone."""
        return load_source(self.name, self.recipe.get("dataset_train_split")).head(self.limit)

    def read(self) -> StageData:
        """The rows as the stage reads them; rows that can't be used, which would end a run, are listed as skipped.

        Raises:
            UserError: nothing can be read.
        """
        try:
            return read_data(self.recipe, self.kind)
        except UserError:
            if self.recipe.ours.bad_rows == "skip" or self.recipe.get("chosen_dataset_name"):
                raise
        return read_data(self.recipe.replace("bad_rows", "skip"), self.kind)


def open_target(name: str, options: Any, rest: Sequence[str] = ()) -> Target:
    """The target of a command line.

    Args:
        options: with `kind`, `split`, `limit`, `format`, `columns`, `roles` and `model`, each None if not given.
        rest: keys of the recipe as `--key value`.

    Raises:
        UserError: no such recipe, an option that a recipe has itself, a wrong value.
    """
    given = {key: value for key in ASKED if (value := getattr(options, key, None)) is not None}
    if name.endswith((".yaml", ".yml")):
        return _recipe(name, options, given, rest)
    if rest:
        raise UserError(f"unknown argument {quote(rest[0])}; keys of a recipe need a recipe, and {quote(name)} is data")
    _reject_recipe_folder(name)
    values: dict[str, Any] = {"dataset_name": name}
    for key, word in given.items():
        values[key] = word if key == "format" else read_word(word, f"--{key}")
    if values.get("format") not in (None, *FORMATS):
        raise UserError(f"--format: there is no format {quote(values['format'])}; expected one of {', '.join(FORMATS)}")
    split, limit = getattr(options, "split", None), getattr(options, "limit", None)
    values |= {"dataset_train_split": split} if split else {}
    values |= {"max_train_examples": limit} if limit else {}
    values |= {"model_name_or_path": options.model} if getattr(options, "model", None) else {}
    lines: dict[str, int | None] = dict.fromkeys(ASKED)
    if getattr(options, "chat_template", None):
        values["chat_template"], lines["chat_template"] = options.chat_template, None
    elif values.get("format") == "plain":
        values["chat_template"] = "plain"
    check_formats(values, Recipe("", name, values, lines).where)
    drafted = Recipe("dpo", name, values, lines)
    kind = getattr(options, "kind", None) or guess_kind(drafted, load_source(name, split))
    stage = "sft" if kind == "sft" else "dpo"
    return Target(name, Recipe(stage, name, {"stage": stage, **values}, lines), False, kind, limit)


def _recipe(name: str, options: Any, given: dict[str, str], rest: Sequence[str]) -> Target:
    if getattr(options, "kind", None):
        raise UserError(f"--kind is for data alone; {name} is a recipe, and its stage decides")
    more = [word for key, value in given.items() for word in (f"--{key}", value)]
    for option, key in (
        ("model", "model_name_or_path"), ("split", "dataset_train_split"), ("limit", "max_train_examples"),
        ("chat_template", "chat_template"),
        ("max_length", "max_length"),
    ):  # fmt: skip
        if getattr(options, option, None) is not None:
            more += [f"--{key}", str(getattr(options, option))]
    stage = stage_of(name)
    if stage == "evaluate":
        raise UserError(
            f"{name} is an evaluation's recipe, which trains on nothing; name one for {', '.join(STAGES[:3])}, or its data"
        )
    recipe = load_recipe(name, stage, [*more, *rest])
    return Target(name, recipe, True, "sft" if stage == "sft" else "pairs", recipe.ours.max_train_examples)


def _reject_recipe_folder(name: str) -> None:
    found: list[str] = []
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no path at all: what reads it says so
        folder = Path(name).expanduser()
        found = [f"{stage}.yaml" for stage in STAGES if os.path.isfile(folder / f"{stage}.yaml")]
    if found:
        raise UserError(f"{name} is a folder of recipes; name one of them: {', '.join(found)}")


def guess_kind(recipe: Recipe, source: Source) -> Kind:
    """Whether rows are pairs or for SFT, by how many of the first can be read as either; if none can, by their columns.

    Raises:
        UserError: what reading them as pairs says, if they fit several formats.
    """
    rows = first_rows(source.stream())[:GUESS_ROWS]
    if is_judged(rows):
        return "pairs"  # which `rlhf data convert` makes of them, and what a refusal says
    fit = {}
    for kind in ("pairs", "sft"):
        try:
            convert = converter(kind, rows, format_options(recipe))
        except UserError:
            fit[kind] = 0
            continue
        fit[kind] = sum(_fits(convert, row) for row in rows)
    if not any(fit.values()):
        sides = ("rejected", "label", "completions", "response_j", "responses")
        return "pairs" if any(name in row for row in rows for name in sides) else "sft"
    return "pairs" if fit["pairs"] >= fit["sft"] else "sft"


def is_judged(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether most rows are one answer each, with a thumb up or down or a score."""
    return 2 * sum(is_kto(row) or is_helpsteer(row) for row in rows) > len(rows)


def _fits(convert: Any, row: dict[str, Any]) -> bool:
    try:
        convert(row, set())
    except RowError:
        return False
    return True


def in_file_order(rows: Rows) -> Rows:
    """Each row once, in the order of the sources: a mix may repeat rows, and shuffles them."""
    return rows if rows.indices is None else Rows(rows.parts, np.unique(rows.indices))
