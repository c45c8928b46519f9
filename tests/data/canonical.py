"""Canonical rows as plain dicts, with what was noticed by place: what the tests compare, on top of `prepare`."""

from dataclasses import dataclass, field

from rlhf.data import joining, rows
from rlhf.data.features import BIT
from rlhf.data.format_options import DEFAULT, FormatOptions
from rlhf.data.prepare import plain_rows, prepare
from rlhf.data.sources import Source
from rlhf.data.store import Part, PartWriter, Rows


@dataclass
class Reading:
    """How rows are read, and what was found; sft_rows and preference_rows fill it in.

    Attributes:
        places: of the used rows, `file:line`.
        rows: the prepared rows (store.Rows), for `summarise`.
        repeats: places of rows whose answer starts with the prompt, also if it was removed from all of them.
    """

    bad_rows: str = "error"
    can_skip: bool = False
    places: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    num_unused: dict[str, int] = field(default_factory=dict)
    repeats: list[str] = field(default_factory=list)
    stripped: bool = False
    low_scores: list[str] = field(default_factory=list)
    equal_scores: list[str] = field(default_factory=list)
    rows: Rows | None = None

    def fill(self, prepared) -> None:
        self.rows, flags = prepared.rows, prepared.rows.column("flags")
        self.places = [prepared.rows.place(i) for i in range(len(flags))]
        having = lambda name: [place for place, bits in zip(self.places, flags, strict=True) if bits & BIT[name]]  # noqa: E731
        self.skipped, self.num_unused, self.stripped = prepared.skipped, prepared.num_unused, prepared.stripped
        self.repeats = list(self.places) if prepared.stripped else having("repeats")
        self.low_scores, self.equal_scores = having("low_scores"), having("equal_scores")


def sft_rows(source, reading=None, options=DEFAULT) -> list[dict]:
    """Canonical SFT rows of a source, without their places."""
    return _read(source, "sft", reading, options)


def preference_rows(source, reading=None, options=DEFAULT) -> list[dict]:
    """Canonical pairs of a source, without their places."""
    return _read(source, "pairs", reading, options)


def _read(source, kind, reading, options):
    reading = reading or Reading()
    prepared = prepare(source, kind, options or FormatOptions(), reading.bad_rows, reading.can_skip)
    reading.fill(prepared)
    return plain_rows(prepared.rows)


class Joined(Source):
    """Joined pairs, as the source that they are when they are read again.

    Attributes:
        rows, digest, where: the pairs without their places, the digest of both files, the place of a pair.
        num_unused: of both files.
    """

    def __init__(self, prepared, name, has_lines, digest):
        lines = prepared.rows.column("line").tolist() if has_lines else None
        super().__init__(name, plain_rows(prepared.rows), lines, digest)
        self.num_unused = prepared.num_unused


def join_chosen_rejected(chosen, rejected, reading=None, options=DEFAULT) -> Joined:
    """Pairs of accepted and rejected answers to the same prompt, in the order of the accepted ones."""
    prepared, digest = joining.join_chosen_rejected(chosen, rejected, options or FormatOptions())
    if reading is not None:
        reading.fill(prepared)
    return Joined(prepared, chosen.name, chosen.has_lines, digest)


def reject_margins_in_some_rows(pairs, places) -> None:
    """`rows.reject_margins_in_some_rows` of canonical pairs at these places (`file:line`)."""
    writer = PartWriter()
    for row, place in zip(pairs, places, strict=True):
        writer.add(row, int(place.rpartition(":")[2]))
    writer.close()
    rows.reject_margins_in_some_rows(Rows([Part(places[0].rpartition(":")[0], True, 0, writer.batches)]))
