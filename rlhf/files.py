"""Read files that may be damaged (nothing here raises for a file's content), write them atomically, lock a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import yaml

from rlhf.errors import UserError

# What PyYAML's constructors raise for a value that doesn't match its tag or apparent type, and for 1,000 levels.
YAML_ERRORS = (
    yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError, RecursionError
)  # fmt: skip


def cache_dir() -> Path:
    """RLHF_CACHE, else the user's cache folder."""
    if os.environ.get("RLHF_CACHE"):
        return Path(os.environ["RLHF_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf"


def read_json(path: Path | str) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is missing or holds anything else."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_json_lines(path: Path | str) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; invalid lines (a kill can truncate the last one) are skipped."""
    rows = []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except (OSError, ValueError):
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def non_negative_int(value: Any) -> int | None:
    """The value if it is an integer of at least 0, else None (`"two"`, NaN, true)."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def sync_file(path: Path) -> None:
    """Flush a file's content to disk (fsync)."""
    with open(path, "rb") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:  # some file systems can't sync folders
        pass
    finally:
        os.close(opened)


def is_disk_error(error: BaseException) -> bool:
    """Whether an error, of any library, means that a disk is full or can't be written to."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        return True
    words = (
        "No space left on device",
        "Read-only file system",
        "Disk quota exceeded",
        "file write failed",
        "unexpected pos",
    )
    return any(word in str(error) for word in words)  # safetensors' errors, and those of torch's zip writer


def lock_file(file: IO, shared: bool = False) -> bool:
    """Try to lock an open file, without waiting. The kernel releases it when the file is closed or the process exits.

    Returns whether it is locked; always true on a file system without locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


class Lock:
    """Lets one run at a time write to an output folder."""

    def __init__(self, folder: Path, where: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / ".lock"
        self.file = open(self.path, "a+", encoding="utf-8")
        if not self._take():
            self.file.seek(0)
            holder = self.file.read().strip()
            self.file.close()
            raise UserError(
                f"{where}: output_dir {folder} is being written by another run ({holder}); wait for it, stop it, or give "
                "--output_dir another folder"
            )
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {platform.node()}, since {now}")
        self.file.flush()

    def _take(self) -> bool:
        for _ in range(3):  # `rlhf status` tests the lock by taking it for a moment
            if lock_file(self.file):
                return True
            time.sleep(0.1)
        return False

    def release(self) -> None:
        """Release the lock, and remove the folder if it is otherwise empty."""
        if not any(p.name != ".lock" for p in self.path.parent.iterdir()):
            self.path.unlink()
            self.path.parent.rmdir()
        self.file.close()


def free_bytes(folder: Path) -> int:
    """Free space on the disk where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically: at any time the old content or the new is there."""
    partial = path.with_name(f".{os.getpid()}-{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[str]]:
    """A text file to be written bit by bit; it appears, whole and on the disk, when the block ends without an error."""
    partial = path.with_name(f".{os.getpid()}-{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """A name beside `path` for what this process is writing; no process of another machine has the same."""
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.partial")


def remove_partials(path: Path) -> None:
    """Remove what processes of this machine that no longer run have left under `partial_path(path)`."""
    for left in path.parent.glob(f"{path.name}.{platform.node()}.*.partial"):
        number = left.name.split(".")[-2]
        if number.isdecimal() and not Path(f"/proc/{number}").exists():
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The sha256 (hex) of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file. The hub's cache names large files by it; others are read when their inode or times change."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name
    return kept_digest(file_identity(real), lambda: sha256_of(real))


def kept_digest(identity: str, compute: Callable[[], str]) -> str:
    """A sha256 (hex), computed unless the cache has it for something of this identity."""
    kept = cache_dir() / "digests" / hashlib.sha256(identity.encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{64}", found := kept.read_text(encoding="ascii")):
            return found
    digest = compute()
    with contextlib.suppress(OSError):  # without a cache it is computed again the next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_file(kept, digest)
    return digest


def file_identity(path: Path) -> str:
    """A text that changes when a file is replaced or written: its path, inode, size and times."""
    stat = path.stat()
    return f"{path} {stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
