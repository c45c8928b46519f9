"""`rlhf unbundle`: verify a bundle, and unpack it where nothing is yet."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from rlhf.bundle import wheels
from rlhf.bundle.archive import (
    BLOCK,
    FORMAT,
    HEADER,
    MAX_HEADER_BYTES,
    SUMS,
    Damaged,
    is_safe,
    read_members,
    read_sums,
    reading,
)  # fmt: skip
from rlhf.console import plain_bars
from rlhf.errors import UserError, quote
from rlhf.files import free_bytes, lock_file, sync_folder

MARK = ".unbundling"  # in a partial folder: whose it is, and locked while it is written
VERIFIED = ".verified"  # for setup.sh: the checksums have been compared


def unbundle(file: str, folder: str | None, overwrite: bool = False) -> None:
    """Verify a bundle's checksums and unpack it, all of it or nothing.

    Args:
        folder: a new one, or an empty one; default: the file's name without its suffix, here.
        overwrite: move an existing folder aside, to `FOLDER.old-1`.

    Raises:
        UserError: no bundle, a damaged one (with file, expected and found checksum), an unsafe one, or no room for it.
    """
    path = Path(file).expanduser()
    target = Path(os.path.abspath(Path(folder or path.name.split(".tar")[0] or "bundle").expanduser()))
    if not path.is_file():
        raise UserError(f"no bundle at {path}; `rlhf bundle RECIPE_DIR -o FILE` makes one")
    with open(path, "rb") as opened:
        members = read_members(opened, str(path))
        header = read_header(members, str(path))
        _check_target(target, overwrite)
        _check_room(target, header, str(path))
        with _partial_folder(target) as partial:
            with open(partial / HEADER, "w", encoding="utf-8") as copy:
                copy.write(header["text"])
            _extract(members, header, partial, str(path))
            (partial / VERIFIED).touch()
            aside = _move_aside(target) if overwrite else None
            try:
                os.rename(partial, target)  # onto an empty folder too, but onto nothing else
            except OSError:
                raise UserError(
                    f"{target} has been made by somebody else meanwhile; nothing of it was changed"
                ) from None
            (target / MARK).unlink()
            sync_folder(target.parent)
    _report(header, target, aside)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise UserError(f"no folder {target.parent} for {target.name}; make it first")
    if not os.path.lexists(target) or (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        return
    if not overwrite:
        raise UserError(
            f"{target} exists; give another folder, or --overwrite, which moves it to {target.name}.old-1 and deletes nothing"
        )


def _move_aside(target: Path) -> Path | None:
    if not os.path.lexists(target):
        return None
    aside = next(path for n in range(1, 100_000) if not os.path.lexists(path := Path(f"{target}.old-{n}")))
    os.rename(target, aside)
    return aside


Members = Iterator[tuple[str, tarfile.TarInfo, IO[bytes]]]


def read_header(members: Members, name: str) -> dict[str, Any]:
    """The first member, checked: bundle.json with `text`, what it was read from, and `sizes` by file name.

    Raises:
        UserError: no bundle, or one of another format.
    """
    first, info, opened = next(members, ("", tarfile.TarInfo(), None))
    if first != HEADER or opened is None or info.size > MAX_HEADER_BYTES:
        raise Damaged(f"{name} is not a bundle: it doesn't start with {HEADER}; `rlhf bundle` makes them")
    try:
        with reading(name):
            text = opened.read().decode("utf-8")
        values = json.loads(text)
        found = values["format"]
    except Damaged:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Damaged(f"{name}: {HEADER} is not the list of a bundle; the file is damaged: copy it again") from None
    if found != FORMAT:
        raise UserError(
            f"{name} has the bundle format {quote(found)}, and this version of rlhf reads format {FORMAT}; use the version that "
            f"made it ({quote(values.get('made_by'))}), or make it again"
        )
    values["text"], values["sizes"] = text, _sizes(values, name)
    return values


def _sizes(values: dict[str, Any], name: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    files, recipes = values.get("files"), values.get("recipes")
    for entry in files if isinstance(files, list) else [None]:
        file, size = (entry.get("name"), entry.get("size")) if isinstance(entry, dict) else (None, None)
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise Damaged(f"{name}: {HEADER} lists {quote(entry)}, which is no file with a size; copy the file again")
        _check_name(file, name)
        assert isinstance(file, str)
        if file in sizes or file in (HEADER, SUMS, MARK, VERIFIED):
            raise Damaged(f"{name}: {HEADER} lists {quote(file)} twice; it was not made by `rlhf bundle`")
        sizes[file] = size
    if inner := next(
        (file for file in sizes if any(str(parent) in sizes for parent in PurePosixPath(file).parents)), None
    ):
        raise Damaged(f"{name}: {HEADER} lists {quote(inner)} below a file; it was not made by `rlhf bundle`")
    if not isinstance(recipes, str) or not is_safe(recipes):
        raise Damaged(f"{name}: {HEADER} names no folder of recipes ({quote(recipes)}); copy the file again")
    return sizes


def _check_name(member: Any, name: str) -> None:
    if not is_safe(member):
        raise Damaged(
            f"{name}: member {quote(member)} would not be below the folder that it is unpacked in; it was not made by `rlhf "
            "bundle`, so nothing of it is used"
        )


def _check_room(target: Path, header: dict[str, Any], name: str) -> None:
    needed, free = sum(header["sizes"].values()), free_bytes(target.parent)
    needed += 4096 * len(header["sizes"])
    if free < needed:
        raise UserError(
            f"{target.parent} has {free / 1e9:.1f} GB free; {name} needs {needed / 1e9:.1f} GB: free some space, or give a "
            "folder on another disk"
        )


@contextlib.contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """A new folder `TARGET.partial`, for one process alone; one that a kill has left is replaced, anybody else's is not."""
    partial = target.with_name(f"{target.name}.partial")
    if os.path.lexists(partial):
        _remove_leftover(partial, target)
    try:
        partial.mkdir()
    except FileExistsError:
        raise _busy(target) from None
    with open(partial / MARK, "wb") as mark:
        lock_file(mark)
        try:
            yield partial
        finally:
            if partial.exists():
                shutil.rmtree(partial, ignore_errors=True)


def _remove_leftover(partial: Path, target: Path) -> None:
    try:
        with open(partial / MARK, "rb") as mark:
            if not lock_file(mark):
                raise _busy(target)
        shutil.rmtree(partial)
    except OSError:
        try:
            partial.rmdir()  # empty: killed before it was marked
        except OSError:
            raise UserError(
                f"{partial} exists, and no `rlhf unbundle` has made it; move it, or give another folder"
            ) from None


def _busy(target: Path) -> UserError:
    return UserError(f"{target} is being written by another `rlhf unbundle`; wait for it, or give another folder")


def _extract(members: Members, header: dict[str, Any], folder: Path, name: str) -> None:
    """Unpack the members and compare their checksums with the list at the end."""
    plain_bars()
    from tqdm.auto import tqdm

    sizes, found = header["sizes"], {HEADER: hashlib.sha256(header["text"].encode()).hexdigest()}
    expected: dict[str, str] | None = None
    total = sum(sizes.values())
    with tqdm(total=total, desc="Unbundle", unit="B", unit_scale=True, disable=total < 500_000_000) as bar:
        for member, info, opened in members:
            _check_name(member, name)
            if expected is not None or member in found or (member not in sizes and member != SUMS):
                raise Damaged(f"{name}: member {quote(member)} is not in its list; it was not made by `rlhf bundle`")
            if info.size != sizes.get(member, min(info.size, MAX_HEADER_BYTES)):
                raise Damaged(
                    f"{name}: {member} has {info.size:,} bytes, expected {sizes.get(member, 0):,}; copy the bundle again"
                )
            digest = _copy(opened, folder / member, info.mode, name, bar.update)
            if member == SUMS:
                expected = read_sums((folder / SUMS).read_text(encoding="utf-8", errors="replace"))
            else:
                found[member] = digest
    _compare(found, expected, sizes, name)


def _copy(opened: IO[bytes], path: Path, mode: int, name: str, advance) -> str:
    """Write a member to a new file; returns its sha256 (hex)."""
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o755 if mode & 0o100 else 0o644), "wb") as copy:
        while True:
            with reading(name):
                block = opened.read(BLOCK)
            if not block:
                break
            digest.update(block)
            copy.write(block)
            advance(len(block))
        copy.flush()
        os.fsync(copy.fileno())
    return digest.hexdigest()


def _compare(found: dict[str, str], expected: dict[str, str] | None, sizes: dict[str, int], name: str) -> None:
    missing = [member for member in sizes if member not in found]
    if missing or expected is None:
        what = f"{missing[0]} is missing" if missing else f"{SUMS} is missing"
        more = f", and {len(missing) - 1} more of {len(sizes)} files" if len(missing) > 1 else ""
        raise Damaged(f"{name} is truncated or damaged: {what}{more}; copy it again, and compare its size")
    wrong = [member for member in found if expected.get(member) != found[member]]
    if wrong:
        member = wrong[0]
        more = f" (and {len(wrong) - 1} more of {len(found)} files)" if len(wrong) > 1 else ""
        raise Damaged(
            f"{name} is damaged: {member}{more} has sha256 {found[member]}, expected {expected.get(member, 'none listed')}; "
            "copy it again"
        )
    if set(expected) != set(found):
        raise Damaged(
            f"{name} is damaged: {SUMS} lists {sorted(set(expected) - set(found))[0]}, which it has not; copy it again"
        )


def _report(header: dict[str, Any], target: Path, aside: Path | None) -> None:
    if aside:
        print(f"{target} was moved to {aside}")
    for move in header.get("moved") or []:
        if isinstance(move, dict):
            print(
                f"rewritten: {move.get('file')}:{move.get('line')}: {move.get('key')}: {move.get('from')} -> {move.get('to')}"
            )
    for sentence in header.get("left_out") or []:
        print(f"not in the bundle: {sentence}")
    print(f"{target}: {len(header['sizes']) + 2} files, all checksums as expected")
    has_wheels = "setup.sh" in header["sizes"]
    here = wheels.target()
    different = [f"{key} {header.get(key)}" for key, value in here.items() if header.get(key) != value]
    if has_wheels and different:
        print(f"note: its wheels are for {', '.join(different)}, and this is {' '.join(here.values())}")
    setup = "./setup.sh && " if has_wheels else ""
    print(f"Run it: cd {shlex.quote(os.path.relpath(target))} && {setup}./run.sh")
