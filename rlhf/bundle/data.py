"""The data of a bundle: files, folders, and hub data sets as `datasets` has prepared them in its local cache."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf.bundle.archive import Item
from rlhf.data.folders import FOLDER_TYPES, MAX_ENTRIES, is_data_name
from rlhf.data.raw import COMPRESSED_TYPES, find
from rlhf.data.sources import EMBEDDED, PYTHON
from rlhf.errors import UserError, quote

HUB = "hub/datasets"  # HF_DATASETS_CACHE of a bundle


def is_packaged(name: str) -> bool:
    """Whether the rows come with this package."""
    return name in EMBEDDED


def is_local(name: str, where: str) -> bool:
    """Whether data is a file or a folder here; false for a hub data set.

    Raises:
        UserError: it looks like a path, and nothing is there; or rows that only Python code has.
    """
    if name.startswith(PYTHON):
        raise UserError(f"{where}: {quote(name)} stands for rows of Python code; save them to a file, and name that")
    path, status = find(name, f"{where}: ")
    if status is None and (is_data_name(path.name) or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{where}: no data file at {name}")
    return status is not None


def local_items(path: Path, place: str, where: str) -> tuple[list[Item], list[str]]:
    """A data file, or the data files of a folder and what `datasets` reads beside them.

    Returns:
        (items, names of the files that are left out)

    Raises:
        UserError: not a regular file, or a folder of more than MAX_ENTRIES files.
    """
    if path.is_file():
        return [Item.copy(place, "data", path)], []
    if not path.is_dir():
        raise UserError(f"{where}: {path} is neither a file nor a folder")
    items, left = [], []
    for parent, folders, files in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file = Path(parent) / name
            inner = file.relative_to(path).as_posix()
            if not name.startswith(".") and file.is_file() and _is_read(name):
                items.append(Item.copy(f"{place}/{inner}", "data", file))
            else:
                left.append(str(file))
        if len(items) + len(left) > MAX_ENTRIES:  # links can make a cycle
            raise UserError(f"{where}: {path} has more than {MAX_ENTRIES} files; give the data set's own folder")
    if not items:
        raise UserError(f"{where}: {path} has no data files")
    return items, left


def task_items(path: Path, place: str, where: str) -> list[Item]:
    """The files of a folder with tasks of one's own for lm-evaluation-harness.

    Raises:
        UserError: no folder, or one of more than MAX_ENTRIES files.
    """
    if not path.is_dir():
        raise UserError(f"{where}: {path} is no folder; it holds YAML files of tasks")
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and "__pycache__" not in file.parts]
    if len(files) > MAX_ENTRIES:
        raise UserError(f"{where}: {path} has more than {MAX_ENTRIES} files; give the folder of the tasks alone")
    return [Item.copy(f"{place}/{file.relative_to(path).as_posix()}", "data", file) for file in files]


def _is_read(name: str) -> bool:
    path = Path(name)
    return Path(path.stem if path.suffix in COMPRESSED_TYPES else name).suffix in (*FOLDER_TYPES, ".md")


def hub_items(name: str, config: str | None, where: str) -> list[Item]:
    """A hub data set as it is prepared in the local cache: what `datasets` loads where there is no hub.

    Raises:
        UserError: not there, with the command that fetches it.
    """
    import datasets
    from datasets.naming import camelcase_to_snakecase

    *owner, last = name.split("/")
    root = Path(datasets.config.HF_DATASETS_CACHE) / "___".join((*owner, camelcase_to_snakecase(last)))
    found = [path for path in root.glob(f"{config or '*'}/*/*") if (path / "dataset_info.json").is_file()]
    if not found:
        arguments = ", ".join(repr(word) for word in (name, config) if word)
        raise UserError(
            f"{where}: '{name}' is neither a file or folder nor in the local cache of `datasets`; fetch it with: "
            f'python -c "import datasets; datasets.load_dataset({arguments})"'
        )
    newest = max(found, key=lambda path: path.stat().st_mtime)  # as `datasets` chooses
    files = [p for p in sorted(newest.iterdir()) if p.is_file() and not p.name.startswith(("cache-", ".", "tmp"))]
    place = f"{HUB}/{newest.relative_to(root.parent).as_posix()}"
    return [Item.copy(f"{place}/{path.name}", "data", path) for path in files if path.suffix != ".lock"]
