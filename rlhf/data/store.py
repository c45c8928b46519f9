"""Prepared rows: canonical rows as Arrow, in memory or memory-mapped from files that all processes of a machine share.

A part is a list of record batches with a record per row: the row as JSON, its line in the file (or its number from 1),
and its features (features.py) as columns of numbers, so that splits, summaries and checks of ten million rows are a few
NumPy operations and decode none of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from rlhf.data.features import features

if TYPE_CHECKING:  # takes a few tenths of a second
    import pyarrow

_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
BATCH_ROWS = 2048
BATCH_CHARS = 64 << 20  # a batch's texts are addressed by 32 bits


def schema() -> pyarrow.Schema:
    import pyarrow as pa

    return pa.schema([
        ("row", pa.string()), ("line", pa.int64()), ("chars", pa.int64()), ("flags", pa.uint16()), ("opening", pa.uint64()),
        ("own", pa.uint64()), ("flipped", pa.uint64()), ("prompts", pa.list_(pa.uint64())),
    ])  # fmt: skip


class PartWriter:
    """Writes one part, batch by batch, to a file or (without one) to `batches`."""

    def __init__(self, path: Path | None = None):
        self.batches: list[pyarrow.RecordBatch] = []
        self.num_rows = 0
        self._columns: list[list[Any]] = [[] for _ in range(8)]
        self._chars = 0
        self._writer: Any = None
        if path is not None:
            import pyarrow as pa

            self._writer = pa.ipc.new_file(str(path), schema())

    def add(self, row: dict[str, Any], line: int, flags: int = 0) -> None:
        """Add a canonical row.

        Args:
            flags: bits that the row alone does not show: those of its scores, and `repeats`.
        """
        found = features(row)
        values = (_ENCODE(row), line, found.chars, found.flags | flags,
                  found.opening, found.own, found.flipped, found.prompts)  # fmt: skip
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        self.num_rows += 1
        self._chars += found.chars
        if len(self._columns[0]) == BATCH_ROWS or self._chars > BATCH_CHARS:
            self._flush()

    def close(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        if not self._columns[0]:
            return
        import pyarrow as pa

        batch = pa.record_batch([pa.array(c, f.type) for c, f in zip(self._columns, schema(), strict=True)], schema())
        self._columns, self._chars = [[] for _ in range(8)], 0
        if self._writer is None:
            self.batches.append(batch)
        else:
            self._writer.write_batch(batch)


def read_part(path: Path) -> list[pyarrow.RecordBatch]:
    """The batches of a part's file, memory-mapped.

    Raises:
        OSError, pyarrow.ArrowException: missing or damaged.
    """
    import pyarrow as pa

    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


class Part(NamedTuple):
    """Record batches of one source.

    Attributes:
        name: the source, in messages.
        has_lines: `line` counts lines of a file, not rows.
        line_offset: to be added to `line`.
        path: the part's file; None in memory.
    """

    name: str
    has_lines: bool
    line_offset: int
    batches: list[pyarrow.RecordBatch]
    path: Path | None = None


class Rows(Sequence[dict[str, Any]]):
    """Canonical rows, decoded when asked for; each has its `place` (`file:line`, or `name, row N`).

    A selection or an order of them is an array of row numbers, 8 bytes a row.
    """

    def __init__(self, parts: list[Part], indices: np.ndarray | None = None):
        self.parts = parts
        self._batches = [(part, batch) for part in parts for batch in part.batches]
        sizes = [batch.num_rows for _, batch in self._batches]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self.indices = indices
        self._length = int(self._starts[-1]) if indices is None else len(indices)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | Rows:
        if isinstance(index, slice):
            return self.select(np.arange(len(self), dtype=np.int64)[index])
        part, batch, at = self._find(index)
        return _decode(part, batch, at)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.indices is not None:
            for index in range(len(self)):
                yield self[index]
            return
        for part, batch in self._batches:
            for at in range(batch.num_rows):
                yield _decode(part, batch, at)

    def texts(self) -> Iterator[tuple[str, str]]:
        """(place, the row as JSON on one line) of each row; none is decoded."""
        for index in range(len(self)):
            part, batch, at = self._find(index)
            yield _place(part, batch, at), batch.column(0)[at].as_py()

    def place(self, index: int) -> str:
        """`file:line` of a row, or `name, row N`."""
        part, batch, at = self._find(index)
        return _place(part, batch, at)

    def select(self, indices: np.ndarray) -> Rows:
        """The rows of these numbers, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        return Rows(self.parts, indices if self.indices is None else self.indices[indices])

    def head(self, count: int | None) -> Rows:
        """The first `count` rows (all of them for None)."""
        return self if count is None or count >= len(self) else self[:count]

    def distinct(self) -> Rows:
        """Each row once, in the order of the files: a mix may repeat rows."""
        return self if self.indices is None else Rows(self.parts, np.unique(self.indices))

    def column(self, name: str) -> np.ndarray:
        """A feature of all rows: `chars`, `flags`, `opening`, `own`, `flipped`, `line`."""
        found = [batch.column(name).to_numpy(zero_copy_only=False) for _, batch in self._batches]
        every = np.concatenate(found) if found else np.zeros(0, np.int64)
        return every if self.indices is None else every[self.indices]

    def prompts(self) -> tuple[np.ndarray, np.ndarray]:
        """(hashes of all rows' prompts, one after the other; where each row's begin, and the end of the last)"""
        values, offsets, end = [], [np.zeros(1, np.int64)], 0
        for _, batch in self._batches:
            column = batch.column("prompts")
            values.append(column.flatten().to_numpy(zero_copy_only=False))
            begins = column.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
            offsets.append(begins[1:] - begins[0] + end)
            end = int(offsets[-1][-1])
        flat = np.concatenate(values) if values else np.zeros(0, np.uint64)
        starts = np.concatenate(offsets)
        if self.indices is None:
            return flat, starts
        counts = np.diff(starts)[self.indices]
        ends = np.cumsum(counts)
        picked = np.repeat(starts[self.indices] - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
        return flat[picked], np.concatenate([[0], ends]).astype(np.int64)

    def last_prompts(self) -> np.ndarray:
        """The hash of each row's prompt; of a dialogue, that of its last answer."""
        values, starts = self.prompts()
        return values[np.maximum(starts[1:] - 1, 0)] if len(values) else np.zeros(len(self), np.uint64)

    def _find(self, index: int) -> tuple[Part, Any, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index = index % len(self)
        if self.indices is not None:
            index = int(self.indices[index])
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        part, batch = self._batches[number]
        return part, batch, index - int(self._starts[number])


def _decode(part: Part, batch: pyarrow.RecordBatch, at: int) -> dict[str, Any]:
    return {**json.loads(batch.column(0)[at].as_py()), "place": _place(part, batch, at)}


def _place(part: Part, batch: pyarrow.RecordBatch, at: int) -> str:
    line = batch.column(1)[at].as_py() + part.line_offset
    return f"{part.name}:{line}" if part.has_lines else f"{part.name}, row {line}"


def concatenate(rows: Sequence[Rows]) -> Rows:
    """All rows of several, one after the other."""
    if len(rows) == 1:
        return rows[0]
    parts = [part for one in rows for part in one.parts]
    if all(one.indices is None for one in rows):
        return Rows(parts)
    before, indices = 0, []
    for one in rows:
        total = sum(batch.num_rows for part in one.parts for batch in part.batches)
        own = np.arange(total, dtype=np.int64) if one.indices is None else one.indices
        indices.append(own + before)
        before += total
    return Rows(parts, np.concatenate(indices))
