"""Summarise a dataset in one pass and one line: duplicates, contradictions, leaks, unused columns."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.heldout import prompt_messages
from rlhf.data.messages import answer_text, message_text
from rlhf.data.prompts import prompt_hash
from rlhf.data.reading import Reading
from rlhf.errors import one_line

# Markers that chat templates write around turns; inside a text, tokenizers read them as real ones.
MARKERS = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|begin_of_text|end_of_text|endoftext|user|assistant|system|"
    r"end|START_OF_TURN_TOKEN|END_OF_TURN_TOKEN)\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</?s>|"
    r"^### (?:Instruction|Response):",
    re.MULTILINE,
)
# U+FFFD, and UTF-8 that was read as Latin-1 ("Ã©", "â€™").
GARBLED = re.compile(
    "\ufffd|[\u00c3\u00c2][\u0080-\u00bf]|\u00e2[\u0080\u20ac][\u0080-\u00bf\u2018-\u201d\u0153\u02dc\u2122]"
)
NO_ANSWER = {"nan", "none", "null", "n/a"}  # what tables write for an empty field


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
    rows: list[dict[str, Any]], reading: Reading, heldout: Sequence[dict] = (), heldout_places: Sequence[str] = ()
) -> DataSummary:
    """Summarise canonical rows in one pass (16 bytes of memory per row); `reading` has their places.

    Args:
        heldout, heldout_places: canonical held-out rows, among which leaks are counted.
    """
    pairs = bool(rows) and "chosen" in rows[0]
    found: dict[str, Count] = {}
    seen: set[bytes] = set()
    longer = 0
    for row, place in zip(rows, reading.places, strict=True):
        own, flipped = _hashes(row)
        names = [name for name, present in _looks(row) if present]
        names += ["duplicates"] * (own in seen) + ["contradictions"] * (flipped in seen)
        seen.add(own)
        for name in names:
            before = found.get(name, Count())
            found[name] = Count(before.rows + 1, before.first or place)
        longer += pairs and len(answer_text(row["chosen"])) > len(answer_text(row["rejected"]))
    for name in ("low_scores", "equal_scores", "repeats"):
        places = getattr(reading, name)
        found[name] = Count(len(places), places[0]) if places else Count()
    if reading.stripped:
        found["repeats"] = Count()
    return DataSummary(
        "pairs" if pairs else "rows", len(rows), longer / len(rows) if pairs else None, leaks=leaks(rows, heldout, heldout_places),
        repeats_removed=reading.stripped, unused=tuple(sorted(reading.num_unused)), skipped=len(reading.skipped), **found,
    )  # fmt: skip


def leaks(rows: Iterable[dict], heldout: Sequence[dict], places: Sequence[str]) -> Count:
    """Held-out rows whose prompt is also in `rows`, ignoring case, character width and white space."""
    if not heldout:
        return Count()
    known = {prompt_hash(prompt_messages(row)) for row in rows}
    hits = [place for row, place in zip(heldout, places, strict=True) if prompt_hash(prompt_messages(row)) in known]
    return Count(len(hits), hits[0]) if hits else Count()


def _hashes(row: dict[str, Any]) -> tuple[bytes, bytes | None]:
    """16 bytes of the row, and of the row with the answers swapped (None if it is not a pair)."""
    base = hashlib.blake2b(repr(row.get("prompt") or row.get("messages") or row.get("text")).encode(), digest_size=16)
    if "chosen" not in row:
        base.update(repr(row.get("completion")).encode())
        return base.digest(), None
    flipped = base.copy()
    for hashed, sides in ((base, ("chosen", "rejected")), (flipped, ("rejected", "chosen"))):
        hashed.update("\x1f".join(repr(answer_text(row[side])) for side in sides).encode())
    return base.digest(), flipped.digest()


def _looks(row: dict[str, Any]) -> Iterable[tuple[str, bool]]:
    """Findings in a single row, by the summary's field name."""
    answers = [answer_text(row[side]) for side in ("completion", "chosen", "rejected") if side in row]
    turns = prompt_messages(row) if "messages" not in row else row["messages"]
    texts = answers + [message_text(m) for m in turns]
    yield "markers", any(MARKERS.search(text) for text in texts)
    yield "garbled", any(not text.isascii() and GARBLED.search(text) for text in texts)
    yield "turn_order", "text" not in row and _is_odd([m["role"] for m in turns])
    yield "no_answer", any(answer.lower() in NO_ANSWER for answer in answers)
    yield "negative_margins", row.get("margin", 0) < 0
    yield "blanks_only", len(answers) == 2 and answers[0].split() == answers[1].split()


def _is_odd(roles: list[str]) -> bool:
    spoken = [role for role in roles if role not in ("system", "developer")]
    return (
        "system" in roles[1:]
        or spoken[:1] == ["assistant"]
        or any(
            a == b != "tool" for a, b in zip(spoken, spoken[1:], strict=False)
        )  # several tools may be called at once
    )


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
