"""Data folders: one file per split, the output of `save_to_disk`, or data files that `datasets` assigns to splits."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.raw import COMPRESSED_TYPES
from rlhf.data.table_readers import first_line
from rlhf.errors import UserError, quote

if TYPE_CHECKING:
    from datasets import Dataset

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
FOLDER_TYPES = (*FILE_TYPES, ".arrow", ".txt")  # that `datasets` reads from a folder
MAX_ENTRIES = 5000  # files and folders; a dataset of more shards must be named itself
EXPECTED = "expected a file named after the split, such as train.jsonl, or the output of `save_to_disk`"


def is_data_name(name: str) -> bool:
    """Whether a name is a data file's: `a.jsonl`, `a.csv.gz`."""
    path = Path(name)
    return Path(path.stem if path.suffix in COMPRESSED_TYPES else name).suffix in FILE_TYPES


def data_files(folder: Path) -> list[str]:
    """Names of the data files directly in a folder; empty if it can't be listed."""
    try:
        return sorted(name for name in os.listdir(folder) if is_data_name(name))
    except OSError:
        return []


def split_file(folder: Path, split: str, prefix: str) -> Path | None:
    """The file named after the split.

    Raises:
        UserError: there are several (lists them).
    """
    names = [f"{split}{suffix}{packed}" for suffix in FILE_TYPES for packed in ("", *COMPRESSED_TYPES)]
    found = [name for name in names if "/" not in split and os.path.isfile(folder / name)]
    if len(found) > 1:
        raise UserError(f"{prefix}{folder} has several files for the split '{split}': {', '.join(found)}; name one")
    return folder / found[0] if found else None


def open_folder(folder: Path, split: str | None, default: str, prefix: str) -> tuple[str, Dataset]:
    """The split to read (`split`, else the default or the only one) and its rows.

    Raises:
        UserError: no data, damaged, more than MAX_ENTRIES files, a script, or no such split (lists the existing ones).
    """
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))
    if saved:
        _check_saved(folder, prefix)
    else:
        _survey(folder, prefix)
    import datasets
    import pyarrow
    import yaml

    kinds = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError,
             datasets.exceptions.DatasetsError, pyarrow.ArrowException, yaml.YAMLError)  # fmt: skip
    try:
        datasets.disable_progress_bars()  # a check prints one line, and so does an error
        logging.getLogger("datasets").setLevel(logging.CRITICAL)
        loaded = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
        if not isinstance(loaded, dict):
            loaded = {str(loaded.split or "train"): loaded}
        chosen = split or (default if default in loaded or len(loaded) != 1 else next(iter(loaded)))
        if chosen not in loaded:
            have = ", ".join(map(str, loaded)) or "none"
            raise UserError(f"{prefix}{folder} has no split {quote(str(chosen))}; it has {have}")
        return chosen, loaded[chosen]
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{prefix}{folder} has no readable dataset: {first_line(error)}") from None


def _check_saved(folder: Path, prefix: str) -> None:
    """Check the metadata of `save_to_disk`; `datasets` raises KeyError or TypeError if it is damaged."""
    if (folder / "dataset_dict.json").is_file():
        splits = _read_dict(folder / "dataset_dict.json", prefix).get("splits")
        if not isinstance(splits, list) or not all(isinstance(s, str) and s and "/" not in s for s in splits):
            raise UserError(f"{prefix}{folder / 'dataset_dict.json'} lists no splits; {_SAVE_AGAIN}")
        for name in splits:
            _check_saved_split(folder / name, prefix)
    else:
        _check_saved_split(folder, prefix)


def _check_saved_split(folder: Path, prefix: str) -> None:
    for name in ("dataset_info.json", "state.json"):
        if not (folder / name).is_file():
            raise UserError(f"{prefix}{folder / name} is missing; {_SAVE_AGAIN}")
    _read_dict(folder / "dataset_info.json", prefix)
    files = _read_dict(folder / "state.json", prefix).get("_data_files")
    if not isinstance(files, list) or not all(
        isinstance(f, dict) and isinstance(f.get("filename"), str) for f in files
    ):
        raise UserError(f"{prefix}{folder / 'state.json'} lists no data files; {_SAVE_AGAIN}")
    for file in files:
        if not (folder / file["filename"]).is_file():
            raise UserError(f"{prefix}{folder / quote(file['filename'])[1:-1]} is missing; {_SAVE_AGAIN}")
        _check_arrow(folder / file["filename"], prefix)


def _check_arrow(path: Path, prefix: str) -> None:
    """Reject a damaged Arrow file: `datasets` slices without checking lengths, and Arrow then aborts the process."""
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as reader:
            for batch in reader:
                batch.validate(full=True)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{prefix}{path} is not a readable Arrow file: {first_line(error)}; {_SAVE_AGAIN}") from None


_SAVE_AGAIN = "the folder is damaged: copy it again, or recreate it with `save_to_disk`"


def _read_dict(path: Path, prefix: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{prefix}{path} is not a JSON object; {_SAVE_AGAIN}")
    return found


def _survey(folder: Path, prefix: str) -> None:
    """Reject a folder without data before `datasets` walks it (minutes for a home folder)."""
    types: Counter[str] = Counter()
    entries, folders = 0, [folder]
    while folders:
        for entry in _entries(folders.pop(0)):
            entries += 1
            if entries > MAX_ENTRIES:
                raise UserError(
                    f"{prefix}{folder} has more than {MAX_ENTRIES} files and folders ({_most(types)}); {EXPECTED}: "
                    "give the dataset's own folder"
                )
            if _is_folder(entry):
                folders.append(Path(entry.path))
            else:
                types[_type(entry.name)] += 1
    script = folder / f"{folder.resolve().name}.py"
    if script.is_file():
        raise UserError(f"{prefix}{script} is a dataset script, and dataset code is never run; {EXPECTED}")
    if not any(types[kind] for kind in FOLDER_TYPES):
        raise UserError(f"{prefix}{folder} has no readable dataset: found {_most(types)}; {EXPECTED}")


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as found:
            return [entry for entry, _ in zip(found, range(MAX_ENTRIES + 1), strict=False)]
    except OSError:  # no permission: `datasets` skips it too
        return []


def _is_folder(entry: os.DirEntry) -> bool:
    """Follows links, as `datasets` does; MAX_ENTRIES stops cycles."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to a place without permission
        return False


def _type(name: str) -> str:
    path = Path(name)
    return (Path(path.stem).suffix if path.suffix in COMPRESSED_TYPES else path.suffix) or "no suffix"


def _most(types: Counter[str]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in types.most_common(4)) or "no files"
