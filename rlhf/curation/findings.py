"""What is wrong in prepared rows, each with its places: what DataSummary counts, in full."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from rlhf.curation.target import in_file_order
from rlhf.data.features import ANSWERS, BIT, GARBLED, MARKERS, NO_ANSWER
from rlhf.data.messages import message_text
from rlhf.data.rows import StageData
from rlhf.data.store import Rows
from rlhf.errors import one_line, quote

BIAS = 0.8  # share of pairs from which one answer's greater length is a bias
FEWEST_FOR_BIAS = 20
EXCERPT = 24  # characters before and after what was found


class Kind(NamedTuple):
    """A kind of finding: how grave it is, what it is, and what to do."""

    level: str
    title: str
    fix: str


KINDS = {
    "unusable": Kind("error", "rows that can't be used; a run ends at the first", "correct them, or set `bad_rows: skip`, which leaves them out"),
    "skipped": Kind("warning", "rows that can't be used and are left out", "correct them"),
    "template": Kind("error", "the chat template doesn't fit", "set `chat_template` to one that does"),
    "secrets": Kind("error", "texts that look like a secret", "remove them, and revoke what is still valid"),
    "contradictions": Kind(
        "warning", "pairs that contradict an earlier one: chosen and rejected are swapped", "keep the right one of both"
    ),
    "leaks": Kind(
        "warning", "held-out prompts that are also trained on, so that scores on them mean nothing",
        "--fix OUT --drop-leaks writes the training rows without them",
    ),
    "duplicates": Kind("warning", "rows equal to an earlier one", "--fix OUT writes the data without them"),
    "near_duplicates": Kind("warning", "rows nearly equal to an earlier one", "keep one of each, if they add nothing"),
    "low_scores": Kind("warning", "pairs whose chosen answer has the lower score", "swap the answers, or drop the pair"),
    "equal_scores": Kind("warning", "pairs whose answers have the same score", "drop them: the score prefers neither"),
    "negative_margins": Kind("warning", "pairs with a margin below 0", "swap the answers, or drop the pair"),
    "blanks_only": Kind(
        "warning", "pairs whose answers differ only in white space", "--fix OUT writes the data without them"
    ),
    "same_tokens": Kind("warning", "pairs whose answers have the same tokens", "raise `max_length`, or drop them"),
    "left_out": Kind("warning", "rows that are left out since max_length has no room", "raise `max_length`"),
    "cut": Kind("warning", "rows with an answer that max_length cuts", "raise `max_length`, or set `too_long: drop`"),
    "unequal": Kind(
        "warning", "prompts that the chat template renders otherwise alone than before an answer: their end is left out",
        "set a `chat_template` that renders both alike",
    ),
    "dropped": Kind("warning", "parts that the chat template leaves out", "set a `chat_template` that knows them"),
    "length_bias": Kind("warning", "one side is longer in most pairs", "check that length is not all that is learnt"),
    "markers": Kind(
        "warning", "rows with a chat template's markers in a text, which become special tokens",
        "give the messages without the template",
    ),
    "repeats": Kind("warning", "rows whose answer starts with the prompt", "remove the prompt from the answer"),
    "turn_order": Kind(
        "warning", "rows with turns in an odd order (two of one role, the assistant first, a late system message)",
        "check how the turns were split",
    ),
    "no_answer": Kind("warning", "rows with 'nan', 'None' or the like as an answer", "drop them"),
    "garbled": Kind("warning", "rows with characters that were lost or read in the wrong encoding", "export them as UTF-8"),
    "unused": Kind("note", "columns and fields that are not used", "`columns:` gives a column another name"),
}  # fmt: skip
FLAGGED = ("markers", "garbled", "turn_order", "no_answer", "negative_margins", "blanks_only", "low_scores", "equal_scores",
           "repeats")  # fmt: skip
QUOTING = ("unusable", "skipped", "markers", "garbled", "no_answer")  # findings that show a part of a row


class Place(NamedTuple):
    """Where something is: `file:line` or `name, row N`; and what is there, on one line."""

    place: str
    about: str = ""


@dataclass(frozen=True)
class Finding:
    """All of one kind.

    Attributes:
        rows: how many; 0 if it is of the data as a whole.
        places: of the first ones.
        text: replaces the kind's title.
        of: rows that were looked at, if not all.
    """

    kind: str
    rows: int
    places: tuple[Place, ...] = ()
    text: str = ""
    of: int | None = None

    @property
    def level(self) -> str:
        return KINDS[self.kind].level

    @property
    def title(self) -> str:
        return self.text or KINDS[self.kind].title

    def record(self) -> dict[str, Any]:
        found = {**asdict(self), "places": [place._asdict() for place in self.places], "text": self.title}
        return {"kind": self.kind, "level": self.level, **found, "fix": KINDS[self.kind].fix}


def data_findings(data: StageData, most: int | None, skips: bool) -> list[Finding]:
    """What the rows show without a tokenizer.

    Args:
        most: places of each kind; None: all.
        skips: unusable rows are left out by the recipe (`bad_rows: skip`), so no run ends at them.
    """
    rows, heldout = in_file_order(data.train), data.heldout
    found = [_unusable(data, most, skips)] if data.skipped else []
    found += _doubles(rows, most)
    found += _leaks(rows, heldout, most) if heldout is not None else []
    sides = [rows] if heldout is None else [rows, in_file_order(heldout)]
    for kind in FLAGGED:
        if kind == "repeats" and data.summary is not None and data.summary.repeats_removed:
            continue
        hits = [(side, np.flatnonzero(side.column("flags") & BIT[kind])) for side in sides]
        if number := sum(len(at) for _, at in hits):
            every = ((side, int(index)) for side, at in hits for index in at)
            found.append(Finding(kind, number, tuple(_places(every, most, ABOUT.get(kind)))))
    found += _bias(rows)
    if data.summary is not None and data.summary.unused:
        names = [one_line(name, 60) for name in data.summary.unused]
        shown = ", ".join(names if most is None else names[:20]) + (
            ", …" if most is not None and len(names) > 20 else ""
        )
        found.append(Finding("unused", 0, (), f"columns and fields that are not used: {shown}"))
    return found


def in_order(found: list[Finding]) -> list[Finding]:
    """The gravest first."""
    order = list(KINDS)
    return sorted(found, key=lambda finding: order.index(finding.kind))


def _places(
    every: Iterator[tuple[Rows, int]], most: int | None, about: Callable[[dict[str, Any]], str] | None
) -> Iterator[Place]:
    for number, (rows, index) in enumerate(every):
        if number == most:
            return
        yield Place(rows.place(index), about(rows[index]) if about else "")


def _unusable(data: StageData, most: int | None, skips: bool) -> Finding:
    places = tuple(Place(row["place"], one_line(row["reason"], 300)) for row in data.skipped[:most])
    return Finding("skipped" if skips else "unusable", len(data.skipped), places)


def _doubles(rows: Rows, most: int | None) -> list[Finding]:
    """Duplicates and contradictions, each with the earlier row."""
    own, flipped = rows.column("own"), rows.column("flipped")
    values, first = np.unique(own, return_index=True)
    if not len(values):
        return []
    found, number = [], np.arange(len(rows))
    for kind, wanted, words in (("duplicates", own, "equal to"), ("contradictions", flipped, "swapped in")):
        at = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
        earlier = np.where(values[at] == wanted, first[at], len(rows))
        hits = np.flatnonzero((earlier < number) & ((kind == "duplicates") | (wanted != 0)))
        if len(hits):
            places = tuple(Place(rows.place(int(i)), f"{words} {rows.place(int(earlier[i]))}") for i in hits[:most])
            found.append(Finding(kind, len(hits), places))
    return found


def _leaks(rows: Rows, heldout: Rows, most: int | None) -> list[Finding]:
    values, first = np.unique(rows.last_prompts(), return_index=True)
    wanted = heldout.last_prompts()
    if not len(values) or not len(wanted):
        return []
    at = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    hits = np.flatnonzero(values[at] == wanted)
    places = tuple(Place(heldout.place(int(i)), f"trained on in {rows.place(int(first[at[i]]))}") for i in hits[:most])
    return [Finding("leaks", len(hits), places)] if len(hits) else []


def _bias(rows: Rows) -> list[Finding]:
    pairs = rows.column("flipped") != 0
    number = int(pairs.sum())
    if number < FEWEST_FOR_BIAS:
        return []
    share = float((rows.column("flags") & BIT["chosen_longer"] != 0).sum() / number)
    if 1 - BIAS < share < BIAS:
        return []
    which = "longer" if share >= BIAS else "shorter or equal"
    return [Finding("length_bias", 0, (), f"the chosen answer is {which} in {max(share, 1 - share):.0%} of the pairs")]


# --- what is there, in a row -----------------------------------------------------------------------------------------


def texts_of(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(where in the row, text) of each text: ("prompt[2]", "Hello"); the second message is number 2."""
    for key in ("text", "prompt", "messages", *ANSWERS):
        if isinstance(row.get(key), str):
            yield key, row[key]
        elif key in row:
            for number, message in enumerate(row[key], 1):
                yield key if len(row[key]) == 1 else f"{key}[{number}]", message_text(message)


def _matched(pattern) -> Callable[[dict[str, Any]], str]:
    def about(row: dict[str, Any]) -> str:
        for where, text in texts_of(row):
            if match := pattern.search(text):
                start, end = max(0, match.start() - EXCERPT), match.end() + EXCERPT
                return f"{where}, character {match.start() + 1}: {quote(text[start:end])}"
        return ""

    return about


def _no_answer(row: dict[str, Any]) -> str:
    found = [(side, row[side][0].get("content") or "") for side in ANSWERS if side in row]
    return ", ".join(f"{side} is {quote(text)}" for side, text in found if text.strip().lower() in NO_ANSWER)


def _roles(row: dict[str, Any]) -> str:
    turns = row["messages"] if "messages" in row else row.get("prompt", ())
    return one_line(", ".join(str(message["role"]) for message in turns), 120)


ABOUT: dict[str, Callable[[dict[str, Any]], str]] = {
    "markers": _matched(MARKERS), "garbled": _matched(GARBLED), "no_answer": _no_answer, "turn_order": _roles,
    "negative_margins": lambda row: f"margin {row['margin']:g}",
}  # fmt: skip
