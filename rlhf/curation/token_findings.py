"""What is wrong once rows are token ids: what max_length cuts, and what the chat template makes of the messages."""

from __future__ import annotations

from rlhf.curation.batches import spread
from rlhf.curation.encoder import Encoder, Noted, count_cuts
from rlhf.curation.findings import Finding, Place
from rlhf.data.store import Rows
from rlhf.errors import UserError, one_line
from rlhf.models.tokenizer import template_drops

MOST_RENDERED = 2_000
_COUNTED = {"cut": "cut", "same": "same_tokens", "left_out": "left_out", "unequal": "unequal"}


def token_findings(rows: Rows, encoder: Encoder, most: int | None, at_most: int | None) -> tuple[list[Finding], Noted]:
    """What the tokenizer shows of rows.

    Args:
        most: places of each kind; None: all.
        at_most: rows to be tokenised, evenly spaced; None: all.

    Returns:
        (findings, counts of the tokenised rows)
    """
    part = spread(rows, at_most)
    of = None if len(part) == len(rows) else len(part)
    try:
        counts = count_cuts(part, encoder, most)
    except UserError as error:  # a row that the template can't render
        return [Finding("template", 0, (), one_line(error, 400))], Noted()
    found = []
    for name, kind in _COUNTED.items():
        number = getattr(counts, name)[0]
        if number:
            places = tuple(Place(part.place(i)) for i in counts.found[name])
            found.append(Finding(kind, number, places, _words(kind, encoder), of))
    return [*found, *_dropped(rows, encoder, most)], counts


def _words(kind: str, encoder: Encoder) -> str:
    limit = encoder.settings.max_length
    if limit is None:
        return ""
    return {
        "cut": f"rows with an answer that max_length={limit} cuts",
        "left_out": f"rows that are left out, since max_length={limit} has no room for them",
    }.get(kind, "")


def _dropped(rows: Rows, encoder: Encoder, most: int | None) -> list[Finding]:
    """Parts of messages without which the template renders the same, as far as rows have them."""
    part = spread(rows, MOST_RENDERED)
    found: dict[str, list[int]] = {}
    for index, row in enumerate(part):
        if "text" in row:
            continue
        try:
            dropped = template_drops(encoder.tokenizer, row)
        except UserError as error:
            return [Finding("template", 1, (Place(part.place(index), one_line(error, 300)),))]
        for name in dropped:
            found.setdefault(name, []).append(index)
    of = None if len(part) == len(rows) else len(part)
    return [
        Finding("dropped", len(at), tuple(Place(part.place(i)) for i in at[:most]), f"{name}: left out by the chat template", of)
        for name, at in found.items()
    ]  # fmt: skip
