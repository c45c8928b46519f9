"""Rows of CSV, Parquet and Arrow files."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rlhf.data.json_reader import JsonError, parse
from rlhf.data.raw import TABLES, Raw, text_of
from rlhf.errors import UserError, quote

# Columns that formats.py uses; any other unreadable column doesn't stop a run.
TEXT_COLUMNS = ("messages", "prompt", "question", "instruction", "input", "completion", "chosen", "rejected",
                "response", "output", "answer", "text")  # fmt: skip
USED_COLUMNS = (*TEXT_COLUMNS, "margin")
_PYTHON_MESSAGES = re.compile(r"\s*\[\s*\{\s*'(?:role|content)'\s*:")


def csv_rows(raw: Raw) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows of a CSV file and the line at which each ends."""
    found = list(csv_stream(raw.path, io.StringIO(text_of(raw), newline="")))
    return [row for row, _ in found], [line for _, line in found]


def csv_stream(path: Path, file: IO[str]) -> Iterator[tuple[dict[str, Any], int]]:
    """Rows of a CSV file and the line at which each ends; a field with a JSON list of messages becomes that list."""
    csv.field_size_limit(2**31 - 1)
    # strict: otherwise an unclosed quote would silently make the rest of the file one field
    reader = csv.reader(file, strict=True)
    try:
        header = next(reader, [])
        twice = next((name for i, name in enumerate(header) if name in header[:i]), None)
        if twice is not None:
            raise UserError(f"{path}:1: column {quote(twice)} is twice in the header; rename or remove one")
        for fields in reader:
            if fields and len(fields) != len(header):
                raise UserError(
                    f"{path}:{reader.line_num}: {len(fields)} fields, but the header has {len(header)}; "
                    "put strings with commas or line breaks in double quotes"
                )
            if fields:
                where = f"{path}:{reader.line_num}"
                yield {k: _field(k, v, where) for k, v in zip(header, fields, strict=True)}, reader.line_num
    except csv.Error as error:
        raise UserError(
            f"{path}:{reader.line_num}: not valid CSV: {error}; double the quotes inside a string"
        ) from None


def _field(column: str, value: str, where: str) -> Any:
    if column not in TEXT_COLUMNS or not value.lstrip().startswith("["):
        return value
    if _PYTHON_MESSAGES.match(value):
        raise UserError(
            f"{where}: column '{column}' has messages in Python syntax ({quote(value, 40)}); save the data as "
            ".jsonl, or write the column with json.dumps"
        )
    try:
        found, end = parse(value.strip())
    except JsonError:
        return value
    is_complete = end == len(value.strip()) and isinstance(found, list) and found
    return found if is_complete and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in found) else value


def table_rows(raw: Raw, prefix: str) -> list[dict[str, Any]]:
    """Rows of a Parquet or Arrow file. An unused column that can't be converted is None.

    Raises:
        UserError: damaged, or a used column has a value that can't be converted (names column and row).
    """
    import pyarrow

    def batches():
        buffer = pyarrow.BufferReader(raw.data)
        yield _parquet(buffer).read() if is_parquet(raw.path, raw.data) else _arrow(buffer, raw.data).read_all()

    return [row for row, _ in _rows(raw.path, raw.data, batches, prefix)]


def table_stream(path: Path, start: bytes, prefix: str) -> Iterator[tuple[dict[str, Any], int]]:
    """Rows of a Parquet or Arrow file, a batch at a time, with their number from 1.

    Args:
        start: the file's first bytes.
    """
    import pyarrow

    def batches():
        file = pyarrow.memory_map(str(path))
        if is_parquet(path, start):
            yield from _parquet(file).iter_batches(batch_size=1024)
            return
        reader = _arrow(file, start)
        count = getattr(reader, "num_record_batches", None)  # a file has a count, a stream has not
        yield from reader if count is None else map(reader.get_batch, range(count))

    yield from _rows(path, start, batches, prefix)


def is_parquet(path: Path, start: bytes) -> bool:
    return start.startswith(b"PAR1") or not start.startswith(TABLES) and ".parquet" in path.suffixes


def _rows(path: Path, start: bytes, batches: Callable[[], Iterator[Any]], prefix: str) -> Iterator[tuple[dict, int]]:
    import pyarrow

    kind = "parquet" if is_parquet(path, start) else "Arrow"
    errors = (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError, TypeError)
    number, opened = 0, batches()
    while True:
        try:
            batch = next(opened, None)
            if batch is None:
                return
            names = batch.schema.names
            columns = [_values(name, batch.column(i), path, prefix, number) for i, name in enumerate(names)]
        except UserError:
            raise
        except errors as error:
            raise UserError(
                f"{prefix}{path} is not a readable {kind} file: {first_line(error)}; download or write it again"
            ) from None
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise UserError(f"{prefix}{path}: column {quote(twice)} exists twice; rename or remove one")
        for values in zip(*columns, strict=True):
            number += 1
            yield dict(zip(names, values, strict=True)), number


def _parquet(file):
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file)


def _arrow(file, start: bytes):
    import pyarrow

    return (pyarrow.ipc.open_file if start.startswith(b"ARROW1") else pyarrow.ipc.open_stream)(file)


def _values(name: str, column, path: Path, prefix: str, before: int) -> list[Any]:
    import pyarrow

    bad = (pyarrow.ArrowException, ValueError, OverflowError)
    try:
        column.validate(full=True)  # offsets that to_pylist would follow out of bounds
        return column.to_pylist()
    except bad as error:
        if name not in USED_COLUMNS:
            return [None] * len(column)
        row = _first_bad_row(column, bad, before)
        raise UserError(
            f"{prefix}{path}{row}: column '{name}' can't be read: {first_line(error)}; write the file again, in UTF-8"
        ) from None


def _first_bad_row(column, bad: tuple[type[Exception], ...], before: int) -> str:
    for index in range(len(column)):
        try:
            column.slice(index, 1).validate(full=True)
            column.slice(index, 1).to_pylist()
        except bad:
            return f", row {before + index + 1}"
    return ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
