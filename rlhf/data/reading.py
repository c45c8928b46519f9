"""Read the rows of a source, and record which are used, where they are, which are skipped and what was noticed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.data import columns
from rlhf.data.messages import INVISIBLE, RowError, text
from rlhf.data.sources import Source
from rlhf.errors import UserError

LONG_PROMPT = 16  # characters: an answer may start with a shorter prompt by chance ("Hello" and "Hello there")


@dataclass
class Reading:
    """Options for reading rows, and what was found; sft_rows and preference_rows fill it in.

    Attributes:
        bad_rows: "error" raises if a row can't be used; "skip" skips it.
        can_skip: whether the user can choose, by the recipe key `bad_rows`.
        places: the place of each used row.
        skipped: place and reason of each skipped row.
        num_unused: unused column or message field -> number of rows in which it is not empty.
        repeats: places of rows whose answer starts with the prompt.
        stripped: whether the repeated prompts were removed, because every row has one.
        low_scores, equal_scores: places of pairs whose scores rate chosen lower than rejected, or equal.
    """

    bad_rows: str = "error"
    can_skip: bool = False
    places: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    num_unused: Counter[str] = field(default_factory=Counter)
    repeats: list[str] = field(default_factory=list)
    stripped: bool = False
    low_scores: list[str] = field(default_factory=list)
    equal_scores: list[str] = field(default_factory=list)

    def check(self, source: Source) -> None:
        """Raise UserError if a row can't be used and must not be skipped, or if no row is left."""
        if not self.skipped:
            return
        num_bad, num_rows = len(self.skipped), len(source.rows)
        message = f"{self.skipped[0]['place']}: {self.skipped[0]['reason']}"
        if self.bad_rows == "skip" and num_bad == num_rows:
            raise UserError(f"{source.name}: none of {num_rows:,} rows can be used; {message}")
        if self.bad_rows != "skip":
            rows = f"{num_bad - 1:,} more row{'s' if num_bad > 2 else ''}"
            more = f"; {rows} can't be used (next: {self.skipped[1]['place']})" if num_bad > 1 else ""
            fix = "; `bad_rows: skip` skips such rows" if self.can_skip and num_bad < num_rows else ""
            raise UserError(message + more + fix)

    def note(self, row: dict, used: set[str], place: str) -> None:
        self.places.append(place)
        self.num_unused.update(columns.unused(row, used))
        scores = None if used.isdisjoint(("rejected", "rejected_response")) else columns.scores(row)
        if scores and scores[0] <= scores[1]:
            (self.equal_scores if scores[0] == scores[1] else self.low_scores).append(place)


def each(source: Source, convert: Callable[[dict, set[str]], dict], reading: Reading) -> list[dict[str, Any]]:
    """Convert the rows of a source; `convert` takes a row and records the columns that it uses, or raises RowError.

    Raises:
        UserError: a row can't be used, with its place and the reason.
    """
    rows = []
    for index, row in enumerate(source.rows):
        used: set[str] = set()
        try:
            new = convert(row, used)
        except RowError as error:
            reading.skipped.append({"place": source.where(index), "reason": str(error)})
            continue
        reading.note(row, used, source.where(index))
        rows.append(new)
    reading.check(source)
    return rows


def without_repeated_prompts(rows: list[dict], sides: tuple[str, ...], reading: Reading) -> list[dict]:
    """Remove the prompt from the answers if all start with it (full texts, as for a base model); else record which do."""
    repeated = [_repeats(row, sides) for row in rows]
    reading.repeats = [place for place, count in zip(reading.places, repeated, strict=True) if count]
    if not rows or min(repeated) < len(sides) or max(len(prompt_end(row)) for row in rows) < LONG_PROMPT:
        return rows
    reading.stripped = True
    for row in rows:
        for side in sides:
            first = row[side][0]
            row[side] = [{**first, "content": text(first["content"][len(prompt_end(row)) :], side)}, *row[side][1:]]
    return rows


def _repeats(row: dict, sides: tuple[str, ...]) -> int:
    """How many of the answers start with the prompt's last message and continue it."""
    if "prompt" not in row or not (last := prompt_end(row)):
        return 0
    answers = (row[side][0]["content"] or "" for side in sides)
    return sum(answer.startswith(last) and bool(answer[len(last) :].strip(INVISIBLE)) for answer in answers)


def prompt_end(row: dict) -> str:
    """The text of the prompt's last message."""
    return row["prompt"][-1]["content"] or ""


def write_skipped(folder: Path, skipped: list[dict[str, str]]) -> None:
    """Write skipped_rows.jsonl: place and reason of each skipped row; no file if there is none."""
    if skipped:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in skipped)
        (folder / "skipped_rows.jsonl").write_text(lines, encoding="utf-8")
