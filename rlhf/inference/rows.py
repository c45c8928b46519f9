"""The rows of a file that a model answers or scores, and the file's other columns, which stay with them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf.curation.screen import note, shown
from rlhf.curation.target import GUESS_ROWS, Target, is_judged, open_target
from rlhf.data.convert import Kind, first_rows
from rlhf.data.messages import RowError
from rlhf.data.prepare import Prepared, prepare
from rlhf.data.recognise import converter
from rlhf.data.rows import format_options
from rlhf.data.sources import PYTHON, Source
from rlhf.data.store import Rows
from rlhf.errors import UserError, quote

PLACE = "place"  # the column with a row's file and line
CANONICAL = frozenset(("prompt", "completion", "chosen", "rejected", "messages", "text", "tools", "chat_template_kwargs", PLACE))  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """Rows of a file in canonical form.

    Attributes:
        kind: pairs, single answers (`sft`; `unpaired` where each has a judgement), or `prompts` without answers.
        skipped: place and reason of each row that can't be used.
        kept: columns of the file that reading the rows does not use, and that hold texts, numbers, true or false.
        dropped: other columns that it does not use.
        identity: what decides the rows: the file's digest, which of its rows, and how they are read.
    """

    name: str
    source: Source
    rows: Rows
    kind: Kind
    skipped: list[dict[str, str]]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    identity: dict[str, Any]

    def with_columns(self) -> Iterator[tuple[Row, Row]]:
        """(canonical row with its place, the kept columns that it has) of all rows, in the order of the file."""
        if not self.kept:
            yield from ((row, {}) for row in self.rows)
            return
        raw = self.source.stream()
        for row, line in zip(self.rows, _lines(self.rows), strict=True):
            found = next(given for given, number in raw if number == line)
            yield row, {name: found[name] for name in self.kept if not _is_null(found.get(name))}

    @property
    def parts(self) -> tuple[str, ...]:
        """The answers of each row: `chosen` and `rejected`, `completion`, or `messages`."""
        if self.kind == "pairs":
            return ("chosen", "rejected")
        return ("messages",) if "messages" in self.rows[0] else ("completion",)


def read(options: Any, command: str, prompts_only: bool, given: Source | None = None) -> Data:
    """Read the rows of `options.file`.

    Args:
        options: with `file`, `kind`, `split`, `limit`, `format`, `columns`, `roles` and `skip`.
        prompts_only: rows need no answer.
        given: rows that Python code holds, instead of the file.

    Raises:
        UserError: nothing can be read, or a row can't be used and is not to be skipped.
    """
    if options.file.endswith((".yaml", ".yml")):
        raise UserError(
            f"rlhf {command} reads data, and {quote(options.file)} is a recipe; name the file that it reads"
        )
    if given is None:
        target = open_target(options.file, options)
        source = target.source()
    else:
        target, source = _python_target(options, given), given.head(options.limit)
    first = first_rows(source.stream())
    kind = _kind(target, first, prompts_only)
    found = _prepare(target, source, kind, options.skip)
    if "text" in found.rows[0]:
        raise UserError(
            f"{found.rows.place(0)}: a text has no prompt and no answer; rlhf {command} needs rows with them"
        )
    kept, dropped = _other_columns(target, kind, first)
    how = format_options(target.recipe)
    return Data(
        options.file, source, found.rows, kind, found.skipped, kept, dropped,
        {"sha256": source.digest, "part": source.part, "limit": options.limit, "kind": kind, "format": how.key(),
         "skip": bool(options.skip)},
    )  # fmt: skip


def _prepare(target: Target, source: Source, kind: Kind, skip: bool) -> Prepared:
    bad_rows = "skip" if skip else "error"
    return prepare(source, kind, format_options(target.recipe), bad_rows, "--skip leaves such rows out")


def _python_target(options: Any, given: Source) -> Target:
    """Rows without a file, as `open_target` has those of one."""
    from rlhf.config.recipe import Recipe
    from rlhf.curation.target import guess_kind

    draft = Recipe("dpo", given.name, {"stage": "dpo", "dataset_name": PYTHON + given.name}, {})
    return Target(given.name, draft, False, options.kind or guess_kind(draft, given), options.limit)


def _kind(target: Target, first: list[Row], prompts_only: bool) -> Kind:
    """Pairs or single answers, by content; prompts if that is enough, and most rows have no answer."""
    if is_judged(first):
        return "unpaired"
    if prompts_only and 2 * _fitting(target, target.kind, first) <= min(len(first), GUESS_ROWS):
        if _fitting(target, "prompts", first) > _fitting(target, target.kind, first):
            return "prompts"
    return target.kind


def _fitting(target: Target, kind: Kind, first: list[Row]) -> int:
    """How many of the first rows can be read as rows of a kind."""
    try:
        convert = converter(kind, first, format_options(target.recipe))
    except UserError:
        return 0
    return sum(_used(convert, row) is not None for row in first[:GUESS_ROWS])


def _used(convert: Any, row: Row) -> set[str] | None:
    """The columns that a row's conversion uses; None if it can't be converted."""
    used: set[str] = set()
    try:
        convert(row, used)
    except RowError:
        return None
    return used


def _other_columns(target: Target, kind: Kind, first: list[Row]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(plain columns that reading does not use, other such columns), by the first rows."""
    convert = converter(kind, first, format_options(target.recipe))
    used = {name.split(".")[0] for row in first for name in _used(convert, row) or ()} | CANONICAL
    names = dict.fromkeys(name for row in first for name in row if name not in used)
    plain = {n for n in names if all(_is_null(row.get(n)) or _is_plain(row[n]) for row in first)}
    ours = re.compile(r".+(:|, row )\d+")  # of a file that one of these commands has written; the new one has its own
    places = [PLACE] if any(PLACE in row and not ours.fullmatch(str(row[PLACE])) for row in first) else []
    return tuple(n for n in names if n in plain), (*(n for n in names if n not in plain), *places)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, bool, int, float))


def _is_null(value: Any) -> bool:
    return value is None or value != value  # NaN: a table's null


def _lines(rows: Rows) -> Iterator[int]:
    """The line, or number, of each row in its source."""
    assert rows.indices is None, "all rows of one source, in order"
    for part in rows.parts:
        for batch in part.batches:
            yield from (batch.column("line").to_numpy() + part.line_offset).tolist()


def check_names(data: Data, new: tuple[str, ...], option: str) -> Data:
    """The data, once it is sure that no column of the file has a name of the output's own.

    Args:
        new: columns that the command adds.
        option: what gives them another name; '': nothing does, and the file's columns give way.

    Raises:
        UserError: the file has such a column.
    """
    taken = [name for name in (*data.kept, *(data.rows[0] if option else ())) if name in new]
    if taken and option:
        raise UserError(
            f"{data.name} has a column {quote(taken[0])} already; {option} NAME gives the new one another name"
        )
    kept = tuple(name for name in data.kept if name not in new)
    return dataclasses.replace(data, kept=kept, dropped=(*data.dropped, *taken)) if taken else data


def note_columns(data: Data) -> None:
    """Name the columns of the file that are not in the output."""
    if data.dropped:
        note(f"columns of {shown(data.name, 200)} that are not kept: {shown(', '.join(data.dropped), 200)}")


def prompt_of(row: Row) -> list[dict[str, Any]]:
    """The messages before a row's answer."""
    return row["prompt"] if "prompt" in row else row["messages"][:-1]


def template_part(row: Row) -> Row:
    """What a row has for the chat template beside its messages."""
    return {key: row[key] for key in ("tools", "chat_template_kwargs", PLACE) if key in row}
