"""`rlhf bundle`: a recipe folder and all that it needs into one file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rlhf import __version__
from rlhf.bundle import scripts, wheels
from rlhf.bundle.archive import FORMAT, HEADER, Item, Writer, compression_of
from rlhf.bundle.contents import Contents, collect, project_folder
from rlhf.console import plain_bars
from rlhf.errors import UserError
from rlhf.files import free_bytes, lock_file, sync_file, sync_folder

KINDS = {"recipe": "recipes", "data": "data", "model": "models", "launch": "scripts", "wheel": "wheels"}
MIN_BAR_BYTES = 500_000_000  # a bar from this size on


def bundle(
    folder: str, output: str | None, with_wheels: bool = True, with_models: bool = True, dry_run: bool = False,
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Write a bundle, or list what would be in it.

    Args:
        output: the file; compressed if its name ends in .gz or .zst; default: the folder's name with .tar, here.

    Raises:
        UserError: something is missing or damaged, the file exists, or the disk is too small; no file is left then.
    """
    file = Path(output or f"{Path(folder).resolve().name}.tar").expanduser()
    if not dry_run:
        _check_target(file, overwrite)
    contents = collect(Path(folder), with_models)
    number, size = wheels.estimate() if with_wheels else (0, 0)
    if dry_run:
        _list_items(contents, number, size)
        return
    _check_room(file, contents.size + size)
    partial = file.with_name(f"{file.name}.partial")
    with _locked(partial, file) as opened, _work_folder(partial) as work:
        if with_wheels:
            print(f"Fetching the wheels of {wheels.requirement()} with pip ...", flush=True)
            for path in wheels.build(project_folder(), work):
                contents.add(Item.copy(f"wheels/{path.name}", "wheel", path))
            text = scripts.setup(**wheels.target(), requirement=wheels.requirement())
            contents.add(Item.text("setup.sh", "launch", text, executable=True))
        _check_room(file, contents.size)
        _write(contents, opened, file)
        sync_file(partial)
        if file.exists() and not overwrite:
            raise UserError(f"{file} has been made by somebody else meanwhile; nothing of it was changed")
        os.replace(partial, file)
        sync_folder(file.parent)
    _report(contents, file, with_wheels)


def header(contents: Contents) -> str:
    """The text of bundle.json."""
    files = [{"name": item.name, "kind": item.kind, "size": item.size} for item in contents.items.values()]
    values = {
        "format": FORMAT, "made_by": f"rlhf-dpo {__version__}", **wheels.target(), "recipes": contents.folder,
        "stages": contents.stages, "moved": contents.moved, "left_out": contents.left_out, "files": files,
    }  # fmt: skip
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def _check_target(file: Path, overwrite: bool) -> None:
    if not file.parent.is_dir():
        raise UserError(f"no folder {file.parent} for {file.name}; make it first")
    if os.path.lexists(file):
        if not stat.S_ISREG(file.stat().st_mode if file.exists() else 0):
            raise UserError(f"{file} exists and is not a regular file; give -o another name")
        if not overwrite:
            raise UserError(f"{file} exists; give -o another name, or --overwrite")


def _check_room(file: Path, needed: int) -> None:
    free = free_bytes(file.resolve().parent)
    needed += needed // 50 + 10_000_000  # tar's headers
    if free < needed:
        raise UserError(
            f"{file.resolve().parent} has {free / 1e9:.1f} GB free; the bundle needs up to {needed / 1e9:.1f} GB: free some "
            "space, or give -o a file on another disk (--dry-run lists the sizes)"
        )


@contextlib.contextmanager
def _locked(partial: Path, file: Path) -> Iterator[IO[bytes]]:
    """The partial file, empty, for one process alone; removed unless it has been renamed."""
    try:
        number = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise UserError(f"{partial} can't be written: {error.strerror}; give -o another name") from None
    with open(number, "wb") as opened:
        if not lock_file(opened):
            raise UserError(f"{file} is being written by another `rlhf bundle`; wait for it, or give -o another name")
        opened.truncate(0)
        try:
            yield opened
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(opened.fileno()), os.stat(partial)):
                    partial.unlink()


@contextlib.contextmanager
def _work_folder(partial: Path) -> Iterator[Path]:
    """An empty folder for wheels beside the partial file; one that a kill has left is replaced."""
    folder = partial.with_name(f"{partial.name}.wheels")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(contents: Contents, opened: IO[bytes], file: Path) -> None:
    plain_bars()
    from tqdm.auto import tqdm

    size = contents.size
    with tqdm(total=size, desc="Bundle", unit="B", unit_scale=True, disable=size < MIN_BAR_BYTES) as bar:
        writer = Writer(opened, compression_of(file.name), bar.update)
        writer.add(Item.text(HEADER, "launch", header(contents)))
        for item in sorted(contents.items.values(), key=lambda item: list(KINDS).index(item.kind)):
            writer.add(item)
            if item.kind == "wheel" and item.path:
                item.path.unlink()  # it is in the file now, and the disk need not hold it twice
        writer.close()
        opened.flush()


def size_text(size: int) -> str:
    """A size in bytes for people: `538 MB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def _list_items(contents: Contents, number: int, size: int) -> None:
    for kind, title in KINDS.items():
        items = sorted((item for item in contents.items.values() if item.kind == kind), key=lambda item: item.name)
        if items:
            print(f"{title}: {size_text(sum(item.size for item in items))}")
        for item in items:
            came = f"  <- {item.path}" if item.path and str(item.path) != item.name else ""
            print(f"  {size_text(item.size):>8}  {item.name}{came}")
    if number:
        print(f"wheels: of {number} packages for {wheels.requirement()}, at most {size_text(size)}; pip fetches them")
    _tell(contents)
    print(f"together: at most {size_text(contents.size + size)}; nothing has been written")


def _tell(contents: Contents) -> None:
    for move in contents.moved:
        print(f"rewritten: {move['file']}:{move['line']}: {move['key']}: {move['from']} -> {move['to']}")
    for sentence in contents.left_out:
        print(f"not bundled: {sentence}")
    print("not bundled: outputs of runs, caches, hidden files, .env, tokens and the settings of pip")


def _report(contents: Contents, file: Path, with_wheels: bool) -> None:
    _tell(contents)
    parts = []
    for kind, title in KINDS.items():
        sizes = [item.size for item in contents.items.values() if item.kind == kind]
        if sizes:
            parts.append(f"{title} {size_text(sum(sizes))}")
    print(f"{file}: {size_text(file.stat().st_size)} ({', '.join(parts)}), {len(contents.items) + 2} files")
    setup = "./setup.sh && " if with_wheels else ""
    name = file.name.split(".tar")[0] or "bundle"
    print(f"There: rlhf unbundle {file.name} {name} && cd {name} && {setup}./run.sh")
    print(f"       or without rlhf: mkdir {name} && tar -xf {file.name} -C {name} && cd {name} && {setup}./run.sh")
