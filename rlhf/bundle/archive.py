"""The file format of a bundle: a tar archive, perhaps compressed, that is written and read in one pass.

Its first member, `bundle.json`, lists the others with their sizes; its last, `SHA256SUMS`, has the sha256 of each in the form
that `sha256sum --check` reads. Members are regular files and nothing else, so that a bundle can also be unpacked by `tar`.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlhf.errors import UserError, quote

FORMAT = 1
HEADER, SUMS = "bundle.json", "SHA256SUMS"
BLOCK = 2**20  # bytes read and written at a time
MAX_HEADER_BYTES = 100_000_000  # a member's entry has about 100 bytes
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Item:
    """One file of a bundle.

    Attributes:
        name: its path in the bundle, with `/`.
        kind: `recipe`, `data`, `model`, `launch` or `wheel`.
        size: in bytes.
        path: the file that it is copied from; None if it is `content`.
    """

    name: str
    kind: str
    size: int
    path: Path | None = None
    content: bytes = b""
    executable: bool = False

    @classmethod
    def copy(cls, name: str, kind: str, path: Path) -> Item:
        """A file as it is."""
        status = path.stat()
        return cls(name, kind, status.st_size, path, executable=bool(status.st_mode & 0o100))

    @classmethod
    def text(cls, name: str, kind: str, text: str, executable: bool = False) -> Item:
        """A file with this text."""
        content = text.encode()
        return cls(name, kind, len(content), None, content, executable)


class Damaged(UserError):
    """A bundle that can't be read as one."""


def is_safe(name: Any) -> bool:
    """Whether a member's name is that of a file below the folder it is unpacked in, on any system, and in SHA256SUMS."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name or len(name.encode()) > 4000:
        return False
    parts = name.split("/")
    return all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in parts)


class Writer:
    """Writes items into an open file, and remembers their checksums."""

    def __init__(self, file: IO[bytes], compression: str, advance: Callable[[int], Any] = lambda count: None):
        self.stream, self.advance = _compressor(file, compression), advance
        self.tar = tarfile.open(fileobj=self.stream, mode="w", format=tarfile.PAX_FORMAT)
        self.tar.copybufsize = BLOCK  # type: ignore[attr-defined]  # 16 kB by default
        self.sums: dict[str, str] = {}

    def add(self, item: Item) -> None:
        """Copy an item, block by block.

        Raises:
            UserError: its file has another size than when the items were listed.
        """
        assert is_safe(item.name) and item.name not in self.sums, item.name
        info = tarfile.TarInfo(item.name)  # of user 0 and group 0, without names
        info.size, info.mode = item.size, 0o755 if item.executable else 0o644
        with open(item.path, "rb") if item.path else io.BytesIO(item.content) as source:
            reader = _Hashing(source, self.advance)
            with contextlib.suppress(OSError):
                info.mtime = int(item.path.stat().st_mtime) if item.path else 0
            try:
                self.tar.addfile(info, reader)
            except OSError as error:
                if error.errno is not None:
                    raise
                raise _changed(item) from None  # "unexpected end of data"
            if item.path and source.read(1):
                raise _changed(item)
        self.sums[item.name] = reader.digest.hexdigest()

    def close(self) -> None:
        """Write the checksums and the end of the archive."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in self.sums.items())
        self.add(Item.text(SUMS, "launch", lines))
        self.tar.close()
        self.stream.close()


def _changed(item: Item) -> UserError:
    return UserError(f"{item.path} has changed its size while it was copied; let what writes it finish, and try again")


class _Hashing:
    """A file that is read once, and hashed on the way."""

    def __init__(self, source: IO[bytes], advance: Callable[[int], Any]):
        self.source, self.advance, self.digest = source, advance, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self.source.read(size)
        self.digest.update(block)
        self.advance(len(block))
        return block


def compression_of(name: str) -> str:
    """The compression that a file's name asks for: `gzip` (.gz, .tgz), `zstd` (.zst), or ''."""
    suffix = Path(name).suffix.lower()
    return {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}.get(suffix, "")


class _Uncompressed(io.RawIOBase):
    """A file whose `close` leaves it open, as that of the compressors does."""

    def __init__(self, file: IO[bytes]):
        self.file = file

    def writable(self) -> bool:
        return True

    def write(self, block) -> int:
        return self.file.write(block)

    def tell(self) -> int:
        return self.file.tell()


def _compressor(file: IO[bytes], compression: str) -> Any:
    if compression == "gzip":  # level 1: weights hardly get smaller at any
        return gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0)
    if compression == "zstd":
        import pyarrow  # comes with `datasets`; Python itself writes zstd from 3.14 on

        return pyarrow.CompressedOutputStream(_Uncompressed(file), "zstd")
    return _Uncompressed(file)


def read_members(file: IO[bytes], name: str) -> Iterator[tuple[str, tarfile.TarInfo, IO[bytes]]]:
    """The members of a bundle in their order, each to be read before the next is asked for.

    Args:
        file: open at its start.
        name: of the file, for messages.

    Yields:
        (name, what tar says of it, a file to read it from)

    Raises:
        Damaged: not an archive, or one that is damaged or truncated; also while a member is read inside of `reading`.
    """
    magic = file.read(4)
    file.seek(0)
    compression = next((kind for start, kind in MAGIC.items() if magic.startswith(start)), "")
    with reading(name):
        with tarfile.open(fileobj=_decompressor(file, compression), mode="r|", bufsize=BLOCK) as tar:
            for member in tar:
                if not member.isreg() or member.sparse is not None:
                    kind = "a link" if member.issym() or member.islnk() else "not a regular file"
                    raise Damaged(
                        f"{name}: member {quote(member.name)} is {kind}, and a bundle holds files only; it was not made by "
                        "`rlhf bundle`, so nothing of it is used"
                    )
                opened = tar.extractfile(member)
                assert opened is not None
                yield member.name, member, opened


def _decompressor(file: IO[bytes], compression: str) -> Any:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=file, mode="rb")
    if compression == "zstd":
        import pyarrow

        return pyarrow.CompressedInputStream(file, "zstd")
    return file


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what tarfile and the decompressors raise for a damaged file into one sentence."""
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError, KeyError, OSError) as error:
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise Damaged(
            f"{name} is not a bundle, or is damaged or truncated ({quote(str(error))}); copy it again, and compare its size"
        ) from None


def read_sums(text: str) -> dict[str, str]:
    """SHA256SUMS: digest (hex) by name; a line of another form is left out."""
    lines = (re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in text.split("\n"))
    return {found[2]: found[1] for found in lines if found}
