"""Several data sets as one: which rows of each, chosen by seed, whatever the number of processes."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.config.recipe_checks import check_formats
from rlhf.config.stage_config import FORMATS
from rlhf.errors import UserError, quote

AMOUNTS = ("fraction", "rows", "epochs", "weight")
KEYS = ("name", "split", "config", "format", "columns", "roles", *AMOUNTS)


@dataclass(frozen=True)
class Entry:
    """One data set of a mix.

    Attributes:
        name, split, config: as in a recipe.
        format: `format`, `columns` and `roles`, as far as the entry has them; else the recipe's.
        fraction: of its rows, at most 1.
        rows: how many of its rows.
        epochs: how often each row occurs in the mix; 2.5: twice, and half of them once more.
        weight: its share of the mix, relative to the other weights; the mix is as large as it can be without repeating a
            row.
    """

    name: str
    split: str | None = None
    config: str | None = None
    format: dict[str, Any] | None = None
    fraction: float | None = None
    rows: int | None = None
    epochs: float | None = None
    weight: float | None = None


def read_mix(value: list[Any], where: str) -> list[Entry]:
    """The entries of a list of data sets: names, or mappings with a name and an amount.

    Raises:
        UserError: an unknown key, a wrong value, or weights for some only.

    Example: read_mix(["a.jsonl", {"name": "b.jsonl", "fraction": 0.5}], "r:1") -> [Entry("a.jsonl"), Entry("b.jsonl", fraction=0.5)].
    """
    entries = [_entry(item, f"{where}: dataset_name, entry {number}") for number, item in enumerate(value, 1)]
    if not entries:
        raise UserError(f"{where}: dataset_name is an empty list; name at least one data set")
    weighted = [entry.weight is not None for entry in entries]
    if any(weighted) and not all(weighted):
        raise UserError(
            f"{where}: dataset_name, entry {weighted.index(False) + 1} ({entries[weighted.index(False)].name}) has no weight, but "
            "others have one; give all of them a weight, or none"
        )
    return entries


def _entry(item: Any, where: str) -> Entry:
    if isinstance(item, str):
        return Entry(item)
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise UserError(
            f"{where} is {quote(item)}; expected a name, or a mapping with `name` and an amount such as `fraction: 0.5`"
        )
    for key in item:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {quote(key)}; expected {', '.join(KEYS)}")
    amounts = [key for key in AMOUNTS if item.get(key) is not None]
    if len(amounts) > 1:
        raise UserError(f"{where} has both {amounts[0]} and {amounts[1]}; keep one")
    for key in amounts:
        _check_amount(key, item[key], where)
    formats = {key: item[key] for key in ("format", "columns", "roles") if item.get(key) is not None}
    check_formats({**formats, "format": None}, lambda key: where)
    if "format" in formats and formats["format"] not in FORMATS:
        near = difflib.get_close_matches(str(formats["format"])[:100], FORMATS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(
            f"{where}: there is no format {quote(formats['format'])}; expected one of {', '.join(FORMATS)}{hint}"
        )
    for key in ("split", "config"):
        if item.get(key) is not None and not isinstance(item[key], str):
            raise UserError(f"{where}: {key} is {quote(item[key])}; expected a name")
    plain = {key: item[key] for key in ("name", "split", "config", *AMOUNTS) if item.get(key) is not None}
    return Entry(**plain, format=formats or None)


def _check_amount(key: str, value: Any, where: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if key == "rows":
        number = number and isinstance(value, int)
    if not number or (key == "fraction" and value > 1):
        expected = {
            "fraction": "a number above 0 and at most 1 (more than once: `epochs`)",
            "rows": "a whole number of at least 1",
        }
        raise UserError(f"{where}: {key} is {quote(value)}; expected {expected.get(key, 'a number above 0')}")


def amounts(entries: list[Entry], sizes: list[int], where: str) -> list[float]:
    """For each data set how often its rows occur in the mix (0.5: half of them), from its number of rows.

    Raises:
        UserError: more rows than a data set has.

    Example: amounts([Entry("a", weight=3), Entry("b", weight=1)], [600, 1000], "") -> [1.0, 0.2].
    """
    if entries[0].weight is not None:
        # the largest mix of these shares in which no row is repeated
        weights = [entry.weight or 0.0 for entry in entries]
        total = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        return [total * weight / size for size, weight in zip(sizes, weights, strict=True)]
    found = []
    for entry, size in zip(entries, sizes, strict=True):
        if entry.rows is not None and entry.rows > size:
            raise UserError(
                f"{where}: dataset_name asks for {entry.rows:,} rows of {entry.name}, which has {size:,}; ask for fewer, or set "
                f"`epochs: {entry.rows / size:.2f}` to repeat them"
            )
        found.append(entry.rows / size if entry.rows is not None else entry.epochs or entry.fraction or 1.0)
    return found


def choose(numbers: np.ndarray, amount: float, seed: int, entry: int) -> np.ndarray:
    """Rows of one data set, as often as `amount` says: whole copies, and a part chosen by the seed.

    Args:
        numbers: row numbers.
        entry: number of the data set, so that two of them are not chosen alike.
    """
    whole, part = divmod(amount, 1.0)
    count = round(part * len(numbers))
    order = np.random.default_rng([seed, entry]).permutation(len(numbers))[:count]
    return np.concatenate([numbers] * int(whole) + [numbers[np.sort(order)]]).astype(np.int64)


def shuffle(numbers: np.ndarray, seed: int) -> np.ndarray:
    """The rows of all data sets in one order, so that the first N are a mix too."""
    return numbers[np.random.default_rng([seed, len(numbers)]).permutation(len(numbers))]


def mix_lines(entries: list[Entry], sizes: list[int], used: list[int], distinct: list[int]) -> list[str]:
    """What is taken of each data set, for the screen.

    Args:
        used: rows of the mix that are the data set's.
        distinct: as many different ones; without those that are held out.

    Example: "mix: 300 of the 600 rows of a.jsonl (37.5%)", "mix: all 20 rows of b.jsonl, each 2.50 times (62.5%)".
    """
    total = sum(used) or 1
    found = []
    for entry, size, count, different in zip(entries, sizes, used, distinct, strict=True):
        part = f"{different:,} of the {size:,}" if different < size else f"all {size:,}"
        often = f", each {count / different:.2f} times" if count > different else ""
        found.append(f"mix: {part} rows of {entry.name}{often} ({count / total:.1%})")
    return found


def data_name(value: Any) -> str:
    """A recipe's `dataset_name` as text: that of a mix is the names of its parts.

    Example: data_name(["a.jsonl", {"name": "b.jsonl", "fraction": 0.5}]) -> "a.jsonl + b.jsonl".
    """
    if isinstance(value, list):
        return " + ".join(str(item.get("name")) if isinstance(item, dict) else str(item) for item in value)
    return str(value)
