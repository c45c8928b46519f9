"""Reading the rows of a source: which are used and where they stand, which are left out, and what was found on the way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.data import columns
from rlhf.data.messages import RowError, text
from rlhf.data.sources import Source
from rlhf.errors import UserError

LONG_PROMPT = 16  # characters: an answer may begin with a shorter prompt by chance ("Hello" and "Hello there")


@dataclass
class Reading:
    """How rows are to be read, and what was found while they were: sft_rows and preference_rows fill it.

    Attributes:
        bad_rows: "error" raises at the first row that can't be used; "skip" leaves it out.
        places: where each row that is used stands.
        skipped: place and reason of each row that was left out.
        num_unused: column, or field of messages, that is not used -> number of rows in which it holds something.
        repeats: places of rows whose answer begins with the prompt.
        stripped: the repeated prompts were cut off, since every row has one.
        low_scores, equal_scores: places of pairs whose own scores say that chosen is worse, or as good.
    """

    bad_rows: str = "error"
    places: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    num_unused: Counter[str] = field(default_factory=Counter)
    repeats: list[str] = field(default_factory=list)
    stripped: bool = False
    low_scores: list[str] = field(default_factory=list)
    equal_scores: list[str] = field(default_factory=list)

    def reject(self, place: str, reason: str) -> None:
        if self.bad_rows != "skip":
            raise UserError(f"{place}: {reason}")
        self.skipped.append({"place": place, "reason": reason})

    def note(self, row: dict, used: set[str], place: str) -> None:
        self.places.append(place)
        self.num_unused.update(columns.unused(row, used))
        scores = columns.scores(row) if "rejected" in used else None
        if scores and scores[0] <= scores[1]:
            (self.equal_scores if scores[0] == scores[1] else self.low_scores).append(place)


def each(source: Source, convert: Callable[[dict, set[str]], dict], reading: Reading) -> list[dict[str, Any]]:
    rows = []
    for index, row in enumerate(source.rows):
        used: set[str] = set()
        try:
            columns.refuse_columns(row)
            new = convert(row, used)
        except RowError as error:
            reading.reject(source.where(index), str(error))
            continue
        reading.note(row, used, source.where(index))
        rows.append(new)
    if not rows and reading.skipped:
        first = reading.skipped[0]
        raise UserError(
            f"{source.name}: none of {len(source.rows):,} rows can be used; {first['place']}: {first['reason']}"
        )
    return rows


def without_repeated_prompts(rows: list[dict], sides: tuple[str, ...], reading: Reading) -> list[dict]:
    """Cut the prompt off the answers if all of them begin with it (whole texts, as for a base model); else note where."""
    repeated = [_repeats(row, sides) for row in rows]
    reading.repeats = [place for place, count in zip(reading.places, repeated, strict=True) if count]
    if not rows or min(repeated) < len(sides) or max(len(row["prompt"][-1]["content"]) for row in rows) < LONG_PROMPT:
        return rows
    reading.stripped = True
    for row in rows:
        for side in sides:
            content = row[side][0]["content"][len(row["prompt"][-1]["content"]) :]
            row[side] = [{"role": "assistant", "content": text(content, side)}]
    return rows


def _repeats(row: dict, sides: tuple[str, ...]) -> int:
    """How many of the answers begin with the prompt's last message and say more than that."""
    if "prompt" not in row:
        return 0
    asked = row["prompt"][-1]["content"]
    return sum(row[s][0]["content"].startswith(asked) and len(row[s][0]["content"]) > len(asked) for s in sides)


def write_skipped(folder: Path, skipped: list[dict[str, str]]) -> None:
    """Write skipped_rows.jsonl: place and reason of each row that was left out; nothing where there is none."""
    if skipped:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in skipped)
        (folder / "skipped_rows.jsonl").write_text(lines, encoding="utf-8")
