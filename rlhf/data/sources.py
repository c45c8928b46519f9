"""Rows from a file, a directory, a hub data set or the embedded sample, each row with the place it came from."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import socket
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import UserError, quote

SAMPLE_NAME = "embedded:sample"
SAMPLE_DIR = Path(__file__).parent / "sample"
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass
class Source:
    """Rows of one split.

    Attributes:
        name: the file or data set, as it is named in messages.
        rows: one dict a row, as read.
        lines: the line of each row in its file, or None where rows have no lines.
        digest: sha256 (hex) of what was read: the file's bytes, or the rows as JSON.
    """

    name: str
    rows: list[dict[str, Any]]
    lines: list[int] | None
    digest: str

    def where(self, index: int) -> str:
        """`file:line` of a row, or `name, row N` (counted from 1)."""
        return f"{self.name}:{self.lines[index]}" if self.lines else f"{self.name}, row {index + 1}"

    def head(self, count: int | None) -> Source:
        """The first `count` rows (all of them for None)."""
        return self if count is None else Source(self.name, self.rows[:count], self.lines, self.digest)


def load_source(
    name: str, split: str | None = "train", config: str | None = None, asked_by: str = "", default: str = "train"
) -> Source:
    """Read one split of a data set.

    Args:
        name: `embedded:sample`; a .jsonl, .json, .csv or .parquet file; a directory (made by `save_to_disk`, or with a
            file named after the split, such as train.jsonl); or a hub id.
        split: which split, where there are several; a file has one, named `train`. None: all of a file or of the embedded
            sample, else `default`.
        config: the configuration's name of a hub data set.
        asked_by: where the name was given (`recipe:line`), for messages.

    Raises:
        UserError: nothing there, no such split, a line that can't be read (file, line and column), or no rows.
    """
    prefix = f"{asked_by}: " if asked_by else ""
    if name == SAMPLE_NAME and split is None:
        parts = [load_source(name, part) for part in ("train", "heldout")]
        return Source(
            SAMPLE_NAME, [row for part in parts for row in part.rows], None, parts[0].digest[:32] + parts[1].digest[:32]
        )
    if name == SAMPLE_NAME:
        name = str(SAMPLE_DIR)
    path = Path(name).expanduser()
    if path.is_dir():
        source = _from_directory(path, split or default, prefix)
    elif path.is_file():
        if split not in (None, "train"):
            raise UserError(
                f"{prefix}{name} is a single file and has no split {quote(split)}; use `heldout: 0.05` to hold out a part of it in "
                "every stage, or name another file with eval_dataset_name (or, to evaluate, with dataset_name alone)"
            )
        source = _from_file(path, prefix)
    elif path.suffix in FILE_TYPES or name.startswith((".", "/", "~")):
        raise UserError(f"{prefix}no data file at {name}{_near_files(path)}")
    else:
        source = _from_hub(name, split or default, config, prefix)
    if not source.rows:
        raise UserError(f"{prefix}{source.name} has no rows; expected one example a line")
    return source


def _near_files(path: Path) -> str:
    if path.name in ("accepted_data.jsonl", "rejected_data.jsonl", "preference_data.jsonl"):
        return (
            f"; write it with `rlhf pairs DATASET --output_dir {path.parent}` (DATASET: embedded:sample, or your pairs)"
        )
    found = sorted(p.name for p in path.parent.glob("*") if p.suffix in FILE_TYPES) if path.parent.is_dir() else []
    if found:
        return f"; {path.parent} has {', '.join(found[:6])}"
    return "" if path.parent.is_dir() else f"; the folder {path.parent} does not exist"


def _from_directory(path: Path, split: str, prefix: str) -> Source:
    for suffix in FILE_TYPES:
        if (path / f"{split}{suffix}").is_file():
            return _from_file(path / f"{split}{suffix}", prefix)
    import datasets

    try:
        if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{prefix}{path} holds no data set that can be read: {_first_line(error)}") from None
    if isinstance(loaded, dict):
        if split not in loaded:
            raise UserError(f"{prefix}{path} has no split '{split}'; it has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    return _from_rows(f"{path} ({split})", loaded.to_list())


def use_cache_without_network() -> None:
    """Where the hub's name can't be resolved, tell its client so, before it is imported: it then looks into its cache at
    once, instead of trying again for half a minute. Behind a proxy the name need not resolve: nothing is done."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE")):
        return
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _from_hub(name: str, split: str, config: str | None, prefix: str) -> Source:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{prefix}'{name}' is neither a file, nor a directory, nor a data set's id on the hub")
    use_cache_without_network()
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub's client raises a dozen kinds: offline, 404, gated, bad split, bad config
        raise UserError(
            f"{prefix}'{name}' is no local file or directory, and could not be loaded from the hub: {_first_line(error)}"
        ) from None
    return _from_rows(f"{name} ({split})", loaded.to_list())


def _from_rows(name: str, rows: list[dict]) -> Source:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return Source(name, rows, None, digest.hexdigest())


def _from_file(path: Path, prefix: str) -> Source:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return Source(str(path), pyarrow.parquet.read_table(path).to_pylist(), None, digest)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{prefix}{path} is not a readable parquet file: {_first_line(error)}") from None
    try:
        text = path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    if path.suffix == ".csv":
        return _csv_rows(path, text, digest)
    if path.suffix == ".json" and text.lstrip().startswith("{") and "\n" in text.strip().split("}")[0]:
        raise UserError(f"{path}:1: one JSON object over several lines; expected a list of rows, or one row a line")
    if text.lstrip().startswith("["):
        return Source(str(path), _json_list(path, text), None, digest)
    return _json_lines(path, text, digest)


def _csv_rows(path: Path, text: str, digest: str) -> Source:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""))
    header, rows, lines = next(reader, []), [], []
    for fields in reader:
        if fields and len(fields) != len(header):
            raise UserError(
                f"{path}:{reader.line_num}: {len(fields)} fields, but the header has {len(header)}; "
                "put a text with commas or line breaks in double quotes"
            )
        if fields:
            rows.append(dict(zip(header, fields, strict=True)))
            lines.append(reader.line_num)
    return Source(str(path), rows, lines, digest)


def _json_list(path: Path, text: str) -> list[dict]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {index + 1}: expected a JSON object, found {type(row).__name__}")
    return rows


def _json_lines(path: Path, text: str, digest: str) -> Source:
    rows, lines = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}:{error.colno}: not valid JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
        lines.append(number)
    return Source(str(path), rows, lines, digest)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
