"""The cache of prepared data: what lies in its folders `data/` and `tokens/`, and how old parts are removed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rlhf.curation.screen import Screen, plural, shown, size
from rlhf.errors import UserError
from rlhf.files import cache_dir, lock_file, read_json

FOLDERS = ("data", "tokens")
# What rlhf/data/prepare.py and rlhf/training/tokens.py write there; nothing else is touched.
_FOLDER = re.compile(r"[0-9a-f]{32}(\.\d+\.partial)?")
_BESIDE = re.compile(r"[0-9a-f]{32}\.(lock|failed)")
DAY_S = 86400.0


@dataclass(frozen=True)
class Cached:
    """A folder of prepared rows or token ids.

    Attributes:
        kind: `data` or `tokens`.
        about: what it was made of.
        num_bytes: of its files.
        used: when it was last opened, in seconds since 1970.
        finished: no process is to go on with it.
    """

    folder: Path
    kind: str
    about: str
    num_bytes: int
    used: float
    finished: bool


def cached(kind: str) -> list[Cached]:
    """The folders of one kind, the one that was used last first."""
    found = []
    for folder in _own(cache_dir() / kind, _FOLDER):
        with contextlib.suppress(OSError):  # removed meanwhile
            if folder.is_dir():
                found.append(_describe(folder, kind))
    return sorted(found, key=lambda one: -one.used)


def _own(parent: Path, pattern: re.Pattern[str]) -> Iterator[Path]:
    """What has such a name in a folder and is no link."""
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(parent)):
            if pattern.fullmatch(name) and not (parent / name).is_symlink():
                yield parent / name


def _describe(folder: Path, kind: str) -> Cached:
    files = [path.stat() for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    if kind == "data":
        told = read_json(folder / "prepared.json")
        about = f"{told.get('rows', 0):,} rows of {told.get('source')}" if told else "not finished"
    else:
        chunks, told = sum(1 for _ in folder.glob("chunk-*.json")), {} if any(folder.glob("chunk-*.arrow")) else None
        job = read_json(folder / "job.json") or {}
        about = (
            f"{chunks:,} of {job['num_chunks']:,} chunks of {job.get('num_rows', 0):,} rows"
            if job
            else plural(chunks, "chunk")
        )
    used = max([folder.stat().st_mtime, *(status.st_mtime for status in files)])
    if kind == "data" and told:
        used = folder.stat().st_mtime  # its files are as old as the data's preparation
    return Cached(folder, kind, about, sum(status.st_size for status in files), used, told is not None)


def show_cache(options: Any) -> None:
    """List the cache; with `--clean DAYS` remove what was not used for so long."""
    if options.clean is not None:
        return _clean(options.clean, options.json)
    found = [one for kind in FOLDERS for one in cached(kind)]
    if options.json:
        keys = ("kind", "about", "num_bytes", "used", "finished")
        print(json.dumps([{"folder": str(one.folder)} | {k: getattr(one, k) for k in keys} for one in found], indent=1))
        return
    screen = Screen()
    screen.print(
        Text(f"{shown(str(cache_dir()))}: {size(sum(one.num_bytes for one in found))} of prepared data", "bold")
    )
    if not found:
        screen.print(
            "Data of more than a few MB is prepared there when a run reads it, or by `rlhf data prepare RECIPE`."
        )
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("", "size", "last used", "of"):
        table.add_column(title, justify="right" if title in ("size", "last used") else "left", overflow="fold")
    for one in found:
        table.add_row(
            f"  {one.kind}/{one.folder.name[:12]}…",
            size(one.num_bytes),
            ago(time.time() - one.used),
            shown(one.about, 160),
        )
    screen.print(table)
    screen.print("\nNext: rlhf data cache --clean 30   # removes what was not used for 30 days")


def ago(seconds: float) -> str:
    """Example: ago(7200) -> "2 hours ago"."""
    for unit, length in (("day", DAY_S), ("hour", 3600.0), ("minute", 60.0)):
        if seconds >= length:
            return f"{plural(int(seconds / length), unit)} ago"
    return "just now"


def _clean(days: float, as_json: bool) -> None:
    removed = clean(days)
    if as_json:
        print(json.dumps([{"folder": str(one.folder), "num_bytes": one.num_bytes} for one in removed], indent=1))
        return
    for one in removed:
        print(f"removed {one.folder}  ({size(one.num_bytes)}, {shown(one.about, 160)})")
    print(
        f"{plural(len(removed), 'folder')} removed, {size(sum(one.num_bytes for one in removed))}; unused for {days:g} days or more"
    )


def clean(days: float) -> list[Cached]:
    """Remove folders that were not used for so many days, unless a process writes to them.

    Raises:
        UserError: one can't be removed.
    """
    before, removed = time.time() - days * DAY_S, []
    for kind in FOLDERS:
        for one in cached(kind):
            if one.used <= before and _remove(one):
                removed.append(one)
        for file in _own(cache_dir() / kind, _BESIDE):
            with contextlib.suppress(OSError):
                old = file.stat().st_mtime <= before and not (file.parent / file.stem).exists()
                if old and (file.suffix != ".lock" or not is_locked(file)):
                    file.unlink()
    return removed


def _remove(one: Cached) -> bool:
    """Remove a folder, under the lock of those who would prepare it; whether it was removed."""
    key = one.folder.name.split(".")[0]
    with contextlib.ExitStack() as opened:
        try:
            if one.kind == "data":
                lock = opened.enter_context(open(one.folder.with_name(f"{key}.lock"), "a", encoding="utf-8"))
                if not lock_file(lock):
                    return False
            elif any(is_locked(lock) for lock in one.folder.glob("chunk-*.lock")):
                return False
            shutil.rmtree(one.folder)
        except OSError as error:
            raise UserError(f"{one.folder} can't be removed: {error.strerror or error}") from None
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock file."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            return not lock_file(file)
    except OSError:
        return False
