"""Rows from a file, a directory, a hub dataset or the embedded sample, each with its place of origin."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
import socket
import stat
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlhf.data.folders import data_files, is_data_name, open_folder, split_file
from rlhf.data.json_reader import json_rows
from rlhf.data.large_files import open_large
from rlhf.data.raw import COMPRESSED_TYPES, find, read_raw
from rlhf.data.table_readers import csv_rows, first_line, table_rows
from rlhf.errors import UserError, quote
from rlhf.files import file_digest, file_identity, kept_digest

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE_NAME = "embedded:sample"
JUDGE_NAME = "embedded:judge"  # pairs on other prompts than the sample's
PYTHON = "python:"  # before the name of an argument of `rlhf.train`: rows that no file holds
ALL_ROWS = "all"  # a split of the embedded sample, from which `heldout` holds rows out
SAMPLE_DIR = Path(__file__).parent / "sample"
EMBEDDED = {SAMPLE_NAME: SAMPLE_DIR, JUDGE_NAME: SAMPLE_DIR / "judge.jsonl"}
SMALL_BYTES = 8 << 20  # a smaller file is read into memory at once
FEW_ROWS = 5000
ROW_BYTES = 1500  # about, of a pair


class Source:
    """Rows of one split, held in memory or read from the disk as they are asked for.

    Attributes:
        name: the file or dataset, as named in messages.
        digest: sha256 (hex) of the input: the file's bytes, or the rows as JSON.
        has_lines: rows have a line in a file, not only a number.
        num_bytes: about how much there is to read; 0: little.
        lines_file: a file with one JSON object per line, of which ranges can be read at the same time.
        num_rows: None if it takes reading them all to know.
        part: which of the digest's rows these are; '' for all.
        file: the file that is read as rows are asked for, and its identity when its digest was taken; None if it was read.
    """

    def __init__(
        self, name: str, rows: list[dict[str, Any]] | None, lines: list[int] | None, digest: str, *,
        read: Callable[[], Iterator[tuple[dict[str, Any], int]]] | None = None, has_lines: bool = False, num_bytes: int = 0,
        lines_file: Path | None = None, num_rows: int | None = None, part: str = "", file: tuple[Path, str] | None = None,
    ):  # fmt: skip
        self.name, self.digest, self.num_bytes, self.lines_file = name, digest, num_bytes, lines_file
        self.has_lines = lines is not None or has_lines
        self.num_rows = num_rows if rows is None else len(rows)
        self._rows, self._lines, self._read, self.part, self.file = rows, lines, read, part, file

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, as read, in memory."""
        if self._rows is None:
            self._rows, numbers = [], []
            for row, number in self.stream():
                self._rows.append(row)
                numbers.append(number)
            self._lines = numbers if self.has_lines else None
        return self._rows

    @property
    def lines(self) -> list[int] | None:
        """The line of each row in its file, or None if rows have no lines."""
        return self._lines if self.rows is not None else None

    def stream(self) -> Iterator[tuple[dict[str, Any], int]]:
        """The rows, one at a time, each with its line in the file, or else its number from 1.

        Raises:
            UserError: an unreadable line or column, when it is reached.
        """
        if self._rows is not None:
            return zip(self._rows, self._lines or range(1, len(self._rows) + 1), strict=True)
        assert self._read is not None  # rows or read is given
        return self._read()

    def where(self, index: int) -> str:
        """`file:line` of a row, or `name, row N` (counted from 1)."""
        return place(self.name, self.lines[index] if self.lines else index + 1, self.has_lines)

    def head(self, count: int | None) -> Source:
        """The first `count` rows (all of them for None)."""
        if count is None:
            return self
        if self._rows is not None:
            return Source(self.name, self._rows[:count], self._lines and self._lines[:count], self.digest)
        size = min(self.num_bytes, ROW_BYTES * count)
        return Source(
            self.name, None, None, self.digest, read=lambda: itertools.islice(self.stream(), count),
            has_lines=self.has_lines, num_bytes=size, part=f"first {count}", file=self.file,
        )  # fmt: skip

    def check_unchanged(self) -> None:
        """Raise UserError if the file was written to since its digest was taken: the rows are not those of the digest."""
        if self.file is not None and file_identity(self.file[0]) != self.file[1]:
            raise UserError(f"{self.name} has changed while it was read; wait until it is written, and start again")


def place(name: str, number: int, has_lines: bool) -> str:
    """`file:line` of a row, or `name, row N`."""
    return f"{name}:{number}" if has_lines else f"{name}, row {number}"


def load_source(
    name: str, split: str | None = None, config: str | None = None, where: str = "", default_split: str = "train"
) -> Source:
    """Read one split of a dataset.

    Args:
        name: `embedded:sample` or `embedded:judge`; a .jsonl, .json, .csv or .parquet file (or one of them as .gz, .bz2,
            .xz, .zst); a directory (made by `save_to_disk`, or with a file named after the split, such as train.jsonl); or
            a hub id.
        split: the split to read. A single file has one split, 'train': any other is rejected.
        config: the configuration name of a hub dataset.
        where: where the name was given (`recipe:line`), for messages.
        default_split: the split if `split` is None and there are several. A single file is read entirely.

    Raises:
        UserError: nothing found, no such split, an unreadable line (file, line and column), or no rows.
    """
    prefix = f"{where}: " if where else ""
    if name.startswith(PYTHON):
        raise UserError(
            f"{prefix}{quote(name)} stands for rows that Python code gave to rlhf.train; give them again, or name a file"
        )
    if (name, split) == (SAMPLE_NAME, ALL_ROWS):
        parts = [load_source(name, part) for part in ("train", "heldout")]
        rows = [row for part in parts for row in part.rows]
        return Source(SAMPLE_NAME, rows, None, hashlib.sha256("".join(p.digest for p in parts).encode()).hexdigest())
    path, status = find(str(EMBEDDED.get(name, name)), prefix)
    if status and stat.S_ISDIR(status.st_mode):
        source = _from_directory(path, split, default_split, prefix)
    elif status:
        if split not in (None, "train"):
            raise UserError(f"{prefix}{path} has no split {quote(split)}: {_ONE_SPLIT}")
        source = _from_file(path, status, prefix)
    elif is_data_name(path.name) or name.startswith((".", "/", "~")):
        raise UserError(f"{prefix}no data file at {name}{_near_files(path)}")
    else:
        source = _from_hub(name, split or default_split, config, prefix)
    if next(source.stream(), None) is None:
        raise UserError(f"{prefix}{source.name} has no rows; expected one example per line")
    return source


_ONE_SPLIT = (
    "a single file has one split; use `heldout: 0.05` to hold out a part of it, or eval_dataset_name for another file"
)


def _near_files(path: Path) -> str:
    if path.name in ("accepted_data.jsonl", "rejected_data.jsonl", "preference_data.jsonl"):
        return (
            f"; write it with `rlhf pairs DATASET --output_dir {path.parent}` (DATASET: embedded:sample, or your pairs)"
        )
    found = data_files(path.parent) if path.parent.is_dir() else []
    if found:
        return f"; {path.parent} has {', '.join(found[:6])}"
    return "" if path.parent.is_dir() else f"; the folder {path.parent} does not exist"


def _from_directory(path: Path, split: str | None, default_split: str, prefix: str) -> Source:
    file = split_file(path, split or default_split, prefix)
    if file:
        return _from_file(file, file.stat(), prefix)
    found, loaded = open_folder(path, split, default_split, prefix)
    return from_dataset(f"{path} ({found})", loaded)


def use_cache_without_network() -> None:
    """If the hub's host name can't be resolved, set its client offline before it is imported: it then uses its cache at
    once instead of retrying for half a minute. Does nothing behind a proxy, where the name need not resolve."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE")):
        return
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _from_hub(name: str, split: str, config: str | None, prefix: str) -> Source:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{prefix}{quote(name)} is neither a file, nor a directory, nor the id of a dataset on the hub")
    use_cache_without_network()
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub's client raises a dozen types: offline, 404, gated, bad split, bad config
        raise UserError(
            f"{prefix}'{name}' is not a local file or directory and could not be loaded from the hub: {first_line(error)}"
        ) from None
    return from_dataset(f"{name} ({split})", loaded)


def from_python(name: str, rows: list[dict[str, Any]] | Dataset) -> Source:
    """Rows that Python code holds.

    Args:
        name: what messages call them.

    Raises:
        UserError: no rows, or one that is no dict with texts as its keys.
    """
    if not isinstance(rows, list) and len(rows):
        return from_dataset(name, rows)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
            raise UserError(f"{name}, row {number}: expected a dict of column names and values, found {quote(row)}")
    if not rows:
        raise UserError(f"{name} has no rows; expected one example a row")
    return _from_rows(name, cast("list[dict[str, Any]]", rows))


def source_of(name: str, given: Any) -> Source:
    """Rows that Python code holds, as a source.

    Raises:
        UserError: neither a `datasets.Dataset` nor a list of dicts, or none at all.
    """
    if isinstance(given, list):
        return from_python(name, given)
    from datasets import Dataset, DatasetDict

    if isinstance(given, Dataset):
        return from_python(name, given)
    if isinstance(given, DatasetDict):
        raise UserError(
            f"{name} has the splits {', '.join(given)}; give one of them, as in {name}=dataset[{next(iter(given))!r}]"
        )
    raise UserError(
        f"{name} is of type {type(given).__name__}; expected a datasets.Dataset or a list of dicts, one a row"
    )


def from_dataset(name: str, loaded: Dataset) -> Source:
    """Rows of `datasets`, which stay in its memory-mapped files if there are many."""
    if len(loaded) <= FEW_ROWS:
        return _from_rows(name, loaded.to_list())

    def read() -> Iterator[tuple[dict[str, Any], int]]:
        number = 0
        for table in loaded.with_format("arrow").iter(batch_size=1000):
            for row in table.to_pylist():
                number += 1
                yield row, number

    files = [file_identity(Path(file["filename"])) for file in loaded.cache_files]
    digest = functools.partial(_digest_rows, (row for row, _ in read()))
    # rows in memory have a fingerprint that says nothing of their content
    known = digest() if not files else kept_digest(f"{loaded._fingerprint} {len(loaded)} {files}", digest)
    return Source(
        name, None, None, known, read=read, num_bytes=max(loaded.data.nbytes, SMALL_BYTES + 1), num_rows=len(loaded)
    )


def _from_rows(name: str, rows: list[dict]) -> Source:
    return Source(name, rows, None, _digest_rows(rows), num_bytes=0 if len(rows) <= FEW_ROWS else SMALL_BYTES + 1)


def _digest_rows(rows: Iterable[dict]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _from_file(path: Path, status: os.stat_result, prefix: str) -> Source:
    if status.st_size > SMALL_BYTES // (8 if path.suffix in COMPRESSED_TYPES else 1):
        opened = open_large(path, status, prefix)
        if opened is not None:
            before = path, file_identity(path)
            return Source(
                str(path), None, None, file_digest(path), read=opened.read, has_lines=opened.has_lines,
                num_bytes=status.st_size, lines_file=opened.lines_file, file=before,
            )  # fmt: skip
    raw = read_raw(path, status, prefix)
    if raw.is_table:
        return Source(str(path), table_rows(raw, prefix), None, raw.digest)
    rows, lines = csv_rows(raw) if raw.suffix == ".csv" else json_rows(raw)
    return Source(str(path), rows, lines, raw.digest)
