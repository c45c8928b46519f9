"""The index of a checkpoint that any engine can read: which range of which parameter is in which file (see portable.py)."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlhf.distributed.ranges import uncovered
from rlhf.errors import UserError
from rlhf.runs.trained_state import Part, Scalars

INDEX = "portable-index.safetensors"
DATA = "portable-{:05d}-of-{:05d}-{:05d}.safetensors"  # rank, world size, number
UNSHARDED = "portable-{:05d}.safetensors"  # of format 1
IS_DATA = re.compile(r"portable-\d+-of-\d+-\d+\.safetensors")
FORMAT = 2

Files = list[list[tuple[int, int, int]]]  # of each file the ranges in it: number of the parameter, start, stop


def is_portable(files) -> bool:
    """Whether a checkpoint with these file names can be read by any engine."""
    return INDEX in files or UNSHARDED.format(0) in files


# --- writing ---------------------------------------------------------------------------------------------------------


def rows_of(files: Files) -> np.ndarray:
    """int64 (R, 4): parameter, start, stop, number of the file."""
    rows = [(*place, number) for number, ranges in enumerate(files) for place in ranges]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def join_index(found: list[np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """The index of all ranks' ranges, and the names of their files.

    Args:
        found: per rank, from `rows_of`.
    """
    names, joined = list[str](), []
    for of, theirs in enumerate(found):
        joined.append(theirs + [0, 0, 0, len(names)])
        names += [DATA.format(of, len(found), number) for number in sorted(set(theirs[:, 3].tolist()))]
    return np.concatenate(joined), names


def write_index(folder: Path, ranges: np.ndarray, names: list[str], parts: list[Part], last_epoch: int) -> None:
    """Write the index.

    Args:
        ranges, names: from `join_index`.
        parts: of any rank.
        last_epoch: the position of the learning-rate schedule.
    """
    parameters = [
        {
            "name": part.name, "shape": part.shape,
            "kinds": {kind: str(tensor.dtype).removeprefix("torch.") for kind, tensor in part.tensors.items()},
            "scalars": {key: _to_json(value) for key, value in part.scalars.items()},
        }
        for part in parts
    ]  # fmt: skip
    state = {"format": FORMAT, "parameters": parameters, "files": names, "last_epoch": last_epoch}
    save_file({"ranges": torch.from_numpy(ranges)}, folder / INDEX, {"state": json.dumps(state)})


def _to_json(value: int | float | torch.Tensor) -> int | float | list:
    return [str(value.dtype).removeprefix("torch."), value.item()] if torch.is_tensor(value) else value


# --- reading ---------------------------------------------------------------------------------------------------------


class Saved(NamedTuple):
    """A parameter in a checkpoint: as of Part, with the dtype of each kind (without `weight`)."""

    shape: tuple[int, ...]
    kinds: dict[str, torch.dtype]
    scalars: Scalars


class Index(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        parameters: by name; their order is that of their numbers in `ranges`.
        files: names.
        ranges: int64 (R, 4): parameter, start, stop, file.
        last_epoch: the position of the learning-rate schedule.
    """

    parameters: dict[str, Saved]
    files: list[str]
    ranges: np.ndarray
    last_epoch: int


def read_index(folder: Path) -> Index:
    """The index of a checkpoint of either format.

    Raises:
        UserError: it is none that this version can read.
    """
    if not (folder / INDEX).is_file():
        return _index_unsharded(folder)
    path = folder / INDEX
    try:
        with safe_open(path, "pt") as file:
            ranges, state = file.get_tensor("ranges").numpy(), json.loads(file.metadata()["state"])
        found = _parse_index(ranges, state) if state["format"] == FORMAT else None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path} is not the index of a checkpoint; start from scratch with --fresh") from None
    if found is None:
        raise UserError(
            f"{path} has format {state['format']!r}, expected {FORMAT}: it was written by a later version of rlhf-dpo; install "
            "that one, or start from scratch with --fresh"
        )
    return found


def _parse_index(ranges: np.ndarray, state: dict[str, Any]) -> Index:
    """Raises ValueError, KeyError, TypeError, AttributeError or IndexError for what is no index."""
    parameters = {
        each["name"]: Saved(
            tuple(each["shape"]),
            {kind: getattr(torch, dtype) for kind, dtype in each["kinds"].items() if kind != "weight"},
            {key: _from_json(value) for key, value in each["scalars"].items()},
        )
        for each in state["parameters"]
    }
    sizes = [math.prod(saved.shape) for saved in parameters.values()]
    if uncovered(sizes, ranges[:, :3]) is not None or not set(ranges[:, 3].tolist()) <= set(range(len(state["files"]))):
        raise ValueError("not every element is in one range of a file")
    return Index(parameters, list(state["files"]), ranges, int(state["last_epoch"]))


def _from_json(value: int | float | list) -> int | float | torch.Tensor:
    return torch.tensor(value[1], dtype=getattr(torch, value[0])) if isinstance(value, list) else value


def _index_unsharded(folder: Path) -> Index:
    """An index of format 1, from the headers of its files: one range per parameter and file."""
    files = sorted(path.name for path in folder.glob("portable-*.safetensors"))
    shapes, kinds, scalars = dict[str, tuple](), dict[str, dict](), dict[str, Scalars]()
    places, last_epoch = list[tuple[str, int]](), 0
    for number, name in enumerate(files):
        with safe_open(folder / name, "pt") as file:
            for kind, _, parameter in (key.partition(":") for key in file.keys()):
                value = file.get_tensor(f"{kind}:{parameter}")  # a view of the file
                if kind == "schedule":
                    last_epoch = int(value)
                elif kind == "weight":
                    shapes[parameter] = tuple(value.shape)
                    places.append((parameter, number))
                elif value.dim():
                    kinds.setdefault(parameter, {})[kind] = value.dtype
                    places.append((parameter, number))
                else:
                    scalars.setdefault(parameter, {})[kind] = value.clone()
    saved = {name: Saved(shapes[name], kinds.get(name, {}), scalars.get(name, {})) for name in shapes}
    number_of = {name: number for number, name in enumerate(saved)}
    rows = [(number_of[name], 0, math.prod(shapes[name]), file) for name, file in dict.fromkeys(places)]
    return Index(saved, files, np.array(rows, dtype=np.int64).reshape(-1, 4), last_epoch)
