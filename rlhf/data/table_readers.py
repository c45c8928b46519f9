"""Rows of CSV, Parquet and Arrow files."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

from rlhf.data.json_reader import JsonError, parse
from rlhf.data.raw import Raw, text_of
from rlhf.errors import UserError, quote

# Columns that formats.py uses; any other unreadable column doesn't stop a run.
TEXT_COLUMNS = ("messages", "prompt", "question", "instruction", "input", "completion", "chosen", "rejected",
                "response", "output", "answer", "text")  # fmt: skip
USED_COLUMNS = (*TEXT_COLUMNS, "margin")
_PYTHON_MESSAGES = re.compile(r"\s*\[\s*\{\s*'(?:role|content)'\s*:")


def csv_rows(raw: Raw) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows of a CSV file and the line at which each ends; a field with a JSON list of messages becomes that list."""
    csv.field_size_limit(2**31 - 1)
    # strict: otherwise an unclosed quote would silently make the rest of the file one field
    reader = csv.reader(io.StringIO(text_of(raw), newline=""), strict=True)
    rows, lines = [], []
    try:
        header = next(reader, [])
        twice = next((name for i, name in enumerate(header) if name in header[:i]), None)
        if twice is not None:
            raise UserError(f"{raw.path}:1: column {quote(twice)} is twice in the header; rename or remove one")
        for fields in reader:
            if fields and len(fields) != len(header):
                raise UserError(
                    f"{raw.path}:{reader.line_num}: {len(fields)} fields, but the header has {len(header)}; "
                    "put strings with commas or line breaks in double quotes"
                )
            if fields:
                where = f"{raw.path}:{reader.line_num}"
                rows.append({k: _field(k, v, where) for k, v in zip(header, fields, strict=True)})
                lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(
            f"{raw.path}:{reader.line_num}: not valid CSV: {error}; double the quotes inside a string"
        ) from None
    return rows, lines


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

    kind = "parquet" if raw.data.startswith(b"PAR1") or raw.suffix == ".parquet" else "Arrow"
    try:
        table = _parquet(raw) if kind == "parquet" else _arrow(raw)
        names = table.column_names
        columns = [_values(name, table.column(i), raw.path, prefix) for i, name in enumerate(names)]
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError, TypeError) as error:
        raise UserError(
            f"{prefix}{raw.path} is not a readable {kind} file: {first_line(error)}; download or write it again"
        ) from None
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UserError(f"{prefix}{raw.path}: column {quote(twice)} exists twice; rename or remove one")
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _parquet(raw: Raw):
    import pyarrow
    import pyarrow.parquet

    return pyarrow.parquet.read_table(pyarrow.BufferReader(raw.data))


def _arrow(raw: Raw):
    import pyarrow

    reader = pyarrow.ipc.open_file if raw.data.startswith(b"ARROW1") else pyarrow.ipc.open_stream
    return reader(pyarrow.BufferReader(raw.data)).read_all()


def _values(name: str, column, path: Path, prefix: str) -> list[Any]:
    import pyarrow

    bad = (pyarrow.ArrowException, ValueError, OverflowError)
    try:
        column.validate(full=True)  # offsets that to_pylist would follow out of bounds
        return column.to_pylist()
    except bad as error:
        if name not in USED_COLUMNS:
            return [None] * len(column)
        row = _first_bad_row(column, bad)
        raise UserError(
            f"{prefix}{path}{row}: column '{name}' can't be read: {first_line(error)}; write the file again, in UTF-8"
        ) from None


def _first_bad_row(column, bad: tuple[type[Exception], ...]) -> str:
    for index in range(len(column)):
        try:
            column.slice(index, 1).validate(full=True)
            column.slice(index, 1).to_pylist()
        except bad:
            return f", row {index + 1}"
    return ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
