"""The bytes of a data file: read once, decompressed, as UTF-8; or an error that says what the file is instead."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import UserError, quote

TABLES = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")
ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
COMPRESSED_TYPES = (".gz", ".bz2", ".xz", ".zst")
# Text compresses 3 to 20 times, gzip at most 1032 times, xz and bzip2 up to a million times. Reject above both limits.
MAX_RATIO, ALWAYS_ALLOWED_BYTES = 300, 256 * 2**20

AGAIN = "download it again, and inspect it before you use it"
EXPORT = "save the rows as .jsonl, .csv or .parquet"
KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "fetch the data with `git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer, not the data", "fetch the data with `git annex get`"),
    (b"%PDF-", "a PDF", EXPORT),
    (b"\xd0\xcf\x11\xe0", "an Office document (such as .xls)", EXPORT),
    (b"SQLite format 3\x00", "an SQLite database", EXPORT),
    (b"\x89HDF\r\n", "an HDF5 file", EXPORT),
    (b"\x93NUMPY", "a NumPy array", EXPORT),
    (b"\x89PNG", "a PNG image", EXPORT),
    (b"\xff\xd8\xff", "a JPEG image", EXPORT),
    (b"Rar!", "a RAR archive", "unpack it and give the file in it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it and give the file in it"),
)


@dataclass
class Raw:
    """A file's content, decompressed (text: as UTF-8 without a byte order mark; tables unchanged).

    Attributes:
        suffix: the type by name, without the compression: `.jsonl` of `train.jsonl.gz`.
        digest: sha256 (hex) of the file on disk.
        mark: length in bytes of the removed byte order mark.
    """

    path: Path
    suffix: str
    data: bytes
    digest: str
    mark: int = 0

    @property
    def is_table(self) -> bool:
        return self.suffix == ".parquet" or self.data.startswith(TABLES)


def find(name: str, prefix: str = "") -> tuple[Path, os.stat_result | None]:
    """The path of a name (with `~` expanded) and its stat result; None if nothing is there.

    Raises:
        UserError: a name that can't be a path (too long, contains NUL), or no permission.
    """
    try:
        path = Path(name).expanduser()
        return path, path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f"{prefix}{_dangling(path)}") from None
        return path, None
    except NotADirectoryError:
        return path, None
    except (ValueError, RuntimeError):  # contains NUL; `~nobody`
        raise UserError(f"{prefix}{quote(name)} can't be a path; give a file, a folder or a dataset") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{prefix}{quote(name)} is too long for a path ({len(name)} characters)") from None
        raise UserError(f"{prefix}{quote(name)} can't be read: {error.strerror}") from None


def _dangling(path: Path) -> str:
    target = os.readlink(path)
    if "annex/objects" in target:
        return f"{path} is a git-annex link, and its data is not on this machine; fetch it with `git annex get`"
    return f"{path} is a link to {quote(target)}, which doesn't exist; give the data file itself"


def read_raw(path: Path, status: os.stat_result, prefix: str = "") -> Raw:
    """Read a file once, decompress it and convert its text to UTF-8.

    Raises:
        UserError: a pipe or device, no permission, a damaged archive, bytes that are not text, or another kind of file.
    """
    check_regular(path, status, prefix)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{prefix}{path} can't be read: {error.strerror}") from None
    raw = Raw(path, path.suffix.lower(), data, hashlib.sha256(data).hexdigest())
    archive = next((name for magic, name in ARCHIVES.items() if data.startswith(magic)), None)
    if archive:
        raw.data = _unpack(path, data, archive, prefix)
    if raw.suffix in COMPRESSED_TYPES:
        raw.suffix = Path(path.stem).suffix.lower()
    if raw.is_table and raw.data.startswith(TABLES):
        return raw
    reject_other_kinds(raw, prefix)
    return raw if raw.is_table else _as_utf8(raw)


def check_regular(path: Path, status: os.stat_result, prefix: str) -> None:
    """Raise UserError for a pipe, a device or a file of the kernel, which could block or never end."""
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{prefix}{path} is {_special(status.st_mode)}; expected a regular file: save the data to one")
    if os.path.realpath(path).startswith(("/proc/", "/sys/")):
        raise UserError(f"{prefix}{path} is a kernel file, not data; give a data file")
    try:
        open(path, "rb").close()
    except OSError as error:
        raise UserError(f"{prefix}{path} can't be read: {error.strerror}") from None


def _special(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in kinds if test(mode)), "a device")


def _unpack(path: Path, data: bytes, archive: str, prefix: str) -> bytes:
    allowed = max(ALWAYS_ALLOWED_BYTES, MAX_RATIO * len(data))
    parts, size = [], 0
    with archive_errors(path, archive, prefix), open_archive(io.BytesIO(data), archive) as stream:
        while part := stream.read(2**20):
            parts.append(part)
            size += len(part)
            if size > allowed:
                raise UserError(
                    f"{prefix}{path} decompresses to more than {size // 2**20} MiB from {len(data)} bytes of {archive}, unlike"
                    f" real data; if it is correct, decompress it yourself and give the decompressed file"
                )
    return b"".join(parts)


@contextlib.contextmanager
def archive_errors(path: Path, archive: str, prefix: str) -> Iterator[None]:
    """Turn what decompressors raise into a UserError."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, MemoryError) as error:
        raise UserError(
            f"{prefix}{path}: this {archive} archive is damaged or truncated ({quote(str(error))}); download it again"
        ) from None


def open_archive(source: Path | io.BytesIO, archive: str):
    """A file or bytes, to be read decompressed."""
    file = open(source, "rb") if isinstance(source, Path) else source
    if archive == "gzip":
        return gzip.GzipFile(fileobj=file)
    if archive == "bzip2":
        return bz2.BZ2File(file)
    if archive == "xz":
        return lzma.LZMAFile(file)
    import pyarrow  # comes with `datasets`; Python itself reads zstd from 3.14 on

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")


def reject_other_kinds(raw: Raw, prefix: str) -> None:
    """Raise UserError for a file that is none of the readable kinds, by how it starts."""
    start, path = raw.data[:2048], raw.path
    found = next(((kind, fix) for magic, kind, fix in KINDS if start.startswith(magic)), None)
    text = start.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        found = "an HTML page (perhaps an error or a login), not the data", AGAIN
    elif text.startswith((b"<?xml", b"<!doctype", b"<error")):
        found = "an XML file (perhaps an object store's error message)", AGAIN
    elif start.startswith(b"PK\x03\x04"):
        kind = "an Excel workbook" if b"xl/" in raw.data or b"[Content_Types]" in start else "a zip archive"
        kind = "a PyTorch file" if b"data.pkl" in raw.data[:4096] else kind
        found = kind, "unpack it and give the file in it" if kind == "a zip archive" else EXPORT
    elif len(start) > 2 and start[0] == 0x80 and start[1] in range(2, 6):
        found = "a pickle (of Python, pandas or PyTorch), which could run code", EXPORT
    elif start[257:262] == b"ustar":
        found = "a tar archive", "unpack it and give the file in it"
    if found:
        raise UserError(f"{prefix}{path} is {found[0]}; {found[1]}")


def _as_utf8(raw: Raw) -> Raw:
    """Remove a byte order mark; convert UTF-16 and UTF-32 to UTF-8."""
    encoding = json.detect_encoding(raw.data)  # by the mark, or by which of the first four bytes are zero
    if encoding.startswith("utf-8"):
        plain = raw.data.removeprefix(codecs.BOM_UTF8)
        raw.mark, raw.data = len(raw.data) - len(plain), plain
        return raw
    if not raw.data.strip(b"\x00"):
        raise UserError(f"{raw.path} contains only zeros; a crash or a full disk damaged it: write it again")
    try:
        raw.data = raw.data.decode(encoding).removeprefix("\ufeff").encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{raw.path}: starts as {encoding.upper()}, but byte {error.start} is not valid; save the file as UTF-8"
        ) from None
    return raw


def text_of(raw: Raw) -> str:
    """The file's text.

    Raises:
        UserError: line and offset of the first byte that is not UTF-8.
    """
    try:
        return raw.data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{raw.path}:{line}: {not_utf8(raw.mark + error.start)}") from None


def not_utf8(offset: int) -> str:
    """The message for a byte that is not UTF-8."""
    return f"byte {offset} is not UTF-8; save the file as UTF-8 (from latin-1: `iconv -f latin1 -t utf-8 FILE > NEW`)"
