"""Canonical rows as JSON Lines or Parquet: streamed, whole or not at all, never over another file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf.data.features import ANSWERS
from rlhf.data.store import Rows
from rlhf.errors import UserError, quote
from rlhf.files import new_file

SUFFIXES = (".jsonl", ".parquet")
BATCH_ROWS = 2_000
SOURCE = "source"  # the column with a row's place
_MESSAGES = ("prompt", "messages", *ANSWERS)

Row = dict[str, Any]


def output_file(name: str, option: str, suffixes: tuple[str, ...] = SUFFIXES) -> Path:
    """The path of a file to be written.

    Raises:
        UserError: it exists, its folder doesn't, or its ending is another.
    """
    path = Path(name).expanduser()
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.is_dir():
            raise UserError(f"{option}: the folder {quote(str(path.parent))} does not exist; create it first") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{option}: {quote(name)} can't be a file: {reason}; give another name") from None
    else:
        raise UserError(f"{option}: {quote(str(path))} already exists; move it away or give another name")
    if path.suffix not in suffixes:
        raise UserError(f"{option}: {quote(path.name)} must end with {' or '.join(suffixes)}")
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the disk into a sentence."""
    try:
        yield
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"{path} can't be written: {error.strerror or error}; give another name") from None


def write_rows(rows: Rows, path: Path, with_source: bool = False, plain: bool = False) -> int:
    """Write rows; those of a Parquet file are gone through twice.

    Args:
        with_source: add a column `source` with each row's file and line.
        plain: rows of `format: plain`, whose texts are written as texts.

    Returns:
        How many were written.
    """
    if path.suffix == ".jsonl" and not plain:
        with writing(path), new_file(path) as file:
            for place, text in rows.texts():
                file.write((_with_source(text, place) if with_source else text) + "\n")
        return len(rows)
    every = lambda: (_shaped(row, with_source, plain) for row in rows)  # noqa: E731
    if path.suffix == ".jsonl":
        return write_json_lines(every(), path)
    return write_parquet(every, path)


def _with_source(text: str, place: str) -> str:
    return f"{text[:-1]},{json.dumps(SOURCE)}:{json.dumps(place, ensure_ascii=False)}}}"


def _shaped(row: Row, with_source: bool, plain: bool) -> Row:
    place = row.pop("place")
    if plain:
        row = {key: value[0]["content"] if key in _MESSAGES else value for key, value in row.items()}
    return {**row, SOURCE: place} if with_source else row


def write_json_lines(rows: Iterable[Row], path: Path) -> int:
    """Write rows, one per line, as they come."""
    number = 0
    with writing(path), new_file(path) as file:
        for number, row in enumerate(rows, 1):  # noqa: B007
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
    return number


def write_parquet(every: Any, path: Path, schema: Any = None) -> int:
    """Write rows as Parquet.

    Args:
        every: gives an iterator of the rows, each time it is called.
        schema: of them, if it is known (`parquet_schema`).

    Raises:
        UserError: rows with fields that are neither texts nor numbers, such as tool calls.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = schema or parquet_schema(every(), path)
    partial, number = path.with_name(f".{os.getpid()}-{path.name}.partial"), 0
    try:
        with writing(path):
            with pq.ParquetWriter(partial, schema) as writer:
                for batch in _batches(every()):
                    number += len(batch)
                    writer.write_table(pa.Table.from_pylist(batch, schema))
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return number


def parquet_schema(rows: Iterable[Row], path: Path):
    """Of all rows: a message's fields are texts; a column that is missing in some rows is null there.

    Raises:
        UserError: a column has another form in each row, such as tool calls, or texts here and numbers there.
    """
    import pyarrow as pa

    fields: dict[str, dict[str, None]] = {}
    columns: dict[str, Any] = {}
    for row in rows:
        for key, value in row.items():
            if value is None:
                continue
            if isinstance(value, (str, bool, int, float)):
                kind = (
                    pa.string() if isinstance(value, str) else pa.bool_() if isinstance(value, bool) else pa.float64()
                )
                if columns.setdefault(key, kind) != kind:
                    raise _too_free(key, path)
            elif key in _MESSAGES:
                for message in value:
                    for name, content in message.items():
                        if content is not None and not isinstance(content, str):
                            raise _too_free(f"{key}[].{name}", path)
                        fields.setdefault(key, {})[name] = None
                columns.setdefault(key, None)
            else:
                raise _too_free(key, path)
    messages = {key: pa.list_(pa.struct([(name, pa.string()) for name in names])) for key, names in fields.items()}
    return pa.schema([(key, messages.get(key, found)) for key, found in columns.items()])


def _too_free(name: str, path: Path) -> UserError:
    return UserError(
        f"{path.name}: {quote(name)} has another form in each row, and a Parquet column has one; write a .jsonl file"
    )


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
