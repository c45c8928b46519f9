"""Files too large to be held in memory: checked at their start, then read row by row.

The same rows and the same errors as raw.py, json_reader.py and table_readers.py give for small ones.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from rlhf.data.json_reader import LineError, json_lines, list_items, parse_lines
from rlhf.data.raw import (  # fmt: skip
    ALWAYS_ALLOWED_BYTES,
    ARCHIVES,
    COMPRESSED_TYPES,
    MAX_RATIO,
    TABLES,
    Raw,
    archive_errors,
    check_regular,
    open_archive,
    read_raw,
    reject_other_kinds,
    text_of,
)
from rlhf.data.table_readers import csv_stream, table_stream
from rlhf.errors import UserError, quote

START = 1 << 16  # bytes that tell what a file is


class Large(NamedTuple):
    """How a large file is read.

    Attributes:
        read: starts from the first row; each row comes with its line, or its number from 1.
        lines_file: ranges of the file can be read by `json_lines`.
    """

    read: Callable[[], Iterator[tuple[dict[str, Any], int]]]
    has_lines: bool
    lines_file: Path | None = None


def open_large(path: Path, status: os.stat_result, prefix: str) -> Large | None:
    """How to read a file row by row; None if it must be read whole (UTF-16, a compressed table).

    Raises:
        UserError: not a regular file, a damaged archive, or a file of another kind.
    """
    check_regular(path, status, prefix)
    with open(path, "rb") as file:
        start = file.read(START)
    archive = next((name for magic, name in ARCHIVES.items() if start.startswith(magic)), None)
    suffix = path.suffix.lower()
    if suffix in COMPRESSED_TYPES:
        suffix = Path(path.stem).suffix.lower()
    if archive:
        start = Unpacked(path, archive, prefix).read(START)
    if start.startswith(TABLES) or suffix == ".parquet":
        return None if archive else Large(lambda: table_stream(path, start, prefix), False)
    reject_other_kinds(Raw(path, suffix, start, ""), prefix)
    if not json.detect_encoding(start).startswith("utf-8"):
        return None

    def opened() -> IO[bytes]:
        return io.BufferedReader(Unpacked(path, archive, prefix)) if archive else open(path, "rb")

    return _text_reader(path, suffix, start.removeprefix(codecs.BOM_UTF8), opened, bool(archive))


def _text_reader(path: Path, suffix: str, start: bytes, opened: Callable[[], IO[bytes]], packed: bool) -> Large:
    if suffix == ".csv":
        return Large(lambda: _located(csv_stream(path, _text(opened)), path), True)
    if start.lstrip().startswith(b"["):
        return Large(lambda: _located(list_items(path, _text(opened)), path), False)
    if suffix == ".json" and start.lstrip().startswith(b"{") and b"\n" in start.strip().split(b"}", 1)[0]:
        raise UserError(f"{path}:1: one JSON object over several lines; expected a list of rows, or one row per line")

    def lines() -> Iterator[tuple[dict[str, Any], int]]:
        try:
            if not packed:
                yield from json_lines(path)
                return
            with opened() as file:
                mark = len(codecs.BOM_UTF8) if file.peek(3)[:3] == codecs.BOM_UTF8 else 0  # type: ignore[attr-defined]
                file.read(mark)
                yield from parse_lines(file, mark)
        except LineError as error:
            raise error.at(path) from None

    return Large(lines, True, None if packed else path)


def _text(opened: Callable[[], IO[bytes]]) -> io.TextIOWrapper:
    return io.TextIOWrapper(opened(), "utf-8-sig", newline="")


def _located(rows: Iterator[tuple[dict[str, Any], int]], path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The rows; for a byte that is not UTF-8 the file is read once more, whole, to name its line."""
    try:
        yield from rows
    except UnicodeDecodeError:
        text_of(read_raw(path, path.stat()))  # raises
        raise
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV: {error}; double the quotes inside a string") from None


class Unpacked(io.RawIOBase):
    """The decompressed bytes of an archive; an error of its content is the user's."""

    def __init__(self, path: Path, archive: str, prefix: str):
        self.path, self.archive, self.prefix = path, archive, prefix
        self.packed = path.stat().st_size
        self.stream = open_archive(path, archive)
        self.size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def _read(self, count: int) -> bytes:
        with archive_errors(self.path, self.archive, self.prefix):
            found = self.stream.read(count)
        self.size += len(found)
        if self.size > max(ALWAYS_ALLOWED_BYTES, MAX_RATIO * self.packed):
            raise UserError(
                f"{self.prefix}{quote(str(self.path))[1:-1]} decompresses to more than {self.size // 2**20} MiB from {self.packed} "
                f"bytes of {self.archive}, unlike real data; if it is correct, decompress it yourself and give the decompressed file"
            )
        return found
