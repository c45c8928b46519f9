"""Summarise a dataset in one pass and one line: duplicates, contradictions, leaks, unused columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.data.features import BIT
from rlhf.data.store import Rows
from rlhf.errors import one_line


@dataclass(frozen=True)
class Count:
    """Number of rows, and the place of the first."""

    rows: int = 0
    first: str | None = None

    def __str__(self) -> str:
        return f"{self.rows:,} (first: {self.first})" if self.rows else "0"


@dataclass(frozen=True)
class DataSummary:
    """What was found in the rows of one split.

    Attributes:
        kind: "pairs" or "rows" (SFT).
        rows: number of used rows.
        chosen_longer: fraction of pairs whose chosen answer has more characters.
        duplicates: rows equal to an earlier one.
        contradictions: pairs that an earlier row has with chosen and rejected swapped.
        markers: rows with a chat template's markers in a text.
        repeats: rows whose answer starts with the prompt, which is not removed.
        repeats_removed: whether all answers started with the prompt, which was removed.
        turn_order: rows with two consecutive turns of one role, the assistant first, or a late system message.
        garbled: rows with characters that were lost or read in the wrong encoding.
        no_answer: rows with an answer of "nan", "None" or similar.
        blanks_only: pairs whose answers differ only in white space.
        low_scores, equal_scores: pairs whose scores rate chosen lower than rejected, or equal.
        negative_margins: pairs with a margin below 0.
        leaks: held-out rows whose prompt is in the training data, ignoring case and white space.
        unused: columns and message fields that are not empty and not used.
        skipped: number of rows that could not be used.
    """

    kind: str
    rows: int
    chosen_longer: float | None = None
    duplicates: Count = Count()
    contradictions: Count = Count()
    markers: Count = Count()
    repeats: Count = Count()
    repeats_removed: bool = False
    turn_order: Count = Count()
    garbled: Count = Count()
    no_answer: Count = Count()
    blanks_only: Count = Count()
    low_scores: Count = Count()
    equal_scores: Count = Count()
    negative_margins: Count = Count()
    leaks: Count = Count()
    unused: tuple[str, ...] = ()
    skipped: int = 0

    def record(self) -> dict[str, Any]:
        """The record for provenance.json."""
        return dataclasses.asdict(self)


def summarise(
    rows: Rows,
    num_unused: Iterable[str] = (),
    num_skipped: int = 0,
    stripped: bool = False,
    heldout: Rows | None = None,
) -> DataSummary:
    """Summarise prepared rows by their features; none is decoded.

    Args:
        num_unused: unused columns and message fields.
        stripped: all answers started with the prompt, which was removed.
        heldout: held-out rows, among which leaks are counted.
    """
    flags, own, flipped = (rows.column(name) for name in ("flags", "own", "flipped"))
    pairs = bool(flipped.any())
    found = {name: _count(rows, flags & BIT[name] != 0) for name in _FLAGGED}
    if stripped:
        found["repeats"] = Count()
    first = _first_rows(own)
    number = np.arange(len(rows))
    found["duplicates"] = _count(rows, _lookup(first, own, len(rows)) < number)
    found["contradictions"] = _count(rows, (flipped != 0) & (_lookup(first, flipped, len(rows)) < number))
    longer = float((flags & BIT["chosen_longer"] != 0).mean()) if pairs else None
    leaked = leaks(rows, heldout) if heldout is not None else Count()
    return DataSummary(
        "pairs" if pairs else "rows", len(rows), longer, leaks=leaked, repeats_removed=stripped,
        unused=tuple(sorted(num_unused)), skipped=num_skipped, **found,
    )  # fmt: skip


_FLAGGED = ("markers", "garbled", "turn_order", "no_answer", "negative_margins", "blanks_only", "low_scores", "equal_scores",
            "repeats")  # fmt: skip


def _count(rows: Rows, present: np.ndarray) -> Count:
    number = int(present.sum())
    return Count(number, rows.place(int(present.argmax()))) if number else Count()


def _first_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the different values, sorted; the first row of each)"""
    return np.unique(values, return_index=True)


def _lookup(first: tuple[np.ndarray, np.ndarray], wanted: np.ndarray, absent: int) -> np.ndarray:
    """The first row of each wanted value; `absent` if there is none."""
    values, rows = first
    if not len(values):
        return np.full(len(wanted), absent)
    at = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return np.where(values[at] == wanted, rows[at], absent)


def leaks(rows: Rows, heldout: Rows) -> Count:
    """Held-out rows whose prompt is also in `rows`, ignoring case, character width and white space."""
    return _count(heldout, np.isin(heldout.last_prompts(), rows.last_prompts()))


_RARE = {
    "turn_order": "turns in an odd order (two consecutive ones of one role, the assistant first, a late system message) in",
    "garbled": "garbled characters in",
    "no_answer": "'nan' or 'None' as an answer in",
    "blanks_only": "answers that differ only in white space in",
    "low_scores": "chosen scored lower than rejected in",
    "equal_scores": "equal scores in",
    "negative_margins": "margin below 0 in",
}


def line(summary: DataSummary) -> str:
    """The summary as one line.

    Example: "1,000 pairs: 12 duplicates (first: a.jsonl:9), 3 contradict an earlier pair (first: a.jsonl:40), chosen longer
    in 93%, template markers in 0, prompt repeated in the answers in 0; columns not used: source".
    """
    pairs = summary.kind == "pairs"
    first = lambda count: f" (first: {count.first})" if count.rows else ""  # noqa: E731
    parts = [f"{summary.duplicates.rows:,} duplicate{'s' * (summary.duplicates.rows != 1)}{first(summary.duplicates)}"]
    if pairs:
        parts.append(f"{summary.contradictions.rows:,} contradict an earlier pair{first(summary.contradictions)}")
        parts.append(f"chosen longer in {summary.chosen_longer:.0%}")
    parts.append(f"template markers in {summary.markers}")
    repeats = "all: removed" if summary.repeats_removed else str(summary.repeats)
    parts.append(f"prompt repeated in the answer{'s' if pairs else ''} in {repeats}")
    parts += [f"{words} {count}" for name, words in _RARE.items() if (count := getattr(summary, name)).rows]
    names = [name if len(name) <= 40 else f"{name[:39]}…" for name in map(one_line, summary.unused[:20])]
    more = f" and {len(summary.unused) - 20} more" if len(summary.unused) > 20 else ""
    unused = f"; columns not used: {', '.join(names)}{more}" if names else ""
    return f"{summary.rows:,} {summary.kind}: {', '.join(parts)}{unused}"


def skipped_line(skipped: list[dict[str, str]], total: int) -> str:
    """How many rows were skipped, with the first three.

    Example: "2 of 10 rows skipped: a.jsonl:4 ('chosen' is empty), a.jsonl:7 (the prompt is empty)".
    """
    shown = [f"{row['place']} ({row['reason']})" for row in skipped[:3]]
    return f"{len(skipped):,} of {total:,} rows skipped: {', '.join(shown)}{', …' if len(skipped) > 3 else ''}"


def has_margin(rows: Rows) -> np.ndarray:
    """For each row, whether it has a margin."""
    return rows.column("flags") & BIT["has_margin"] != 0
