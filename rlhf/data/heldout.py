"""Which rows are held out, decided by their prompt alone, so that all stages and evaluations of the same data agree.

Also the prompts that a run was trained on, saved with its model, so that an evaluation can find contaminated prompts.
"""

from __future__ import annotations

import bisect
import mmap
from pathlib import Path

import numpy as np

from rlhf.data.store import Rows
from rlhf.errors import UserError, quote
from rlhf.files import write_file

TRAIN_PROMPTS = "prompts.hashes"  # 8 bytes per prompt, sorted: 80 MB for ten million
BYTES = 8


def held_out(openings: np.ndarray, heldout: float) -> np.ndarray:
    """For each row, whether it is held out.

    Args:
        openings: uint64, per row: the hash of its first message (`Features.opening`).
        heldout: a fraction between 0 and 1: about that fraction of the prompts, at least one; a prompt stays on its
            side when rows are added. Or a number of prompts, from 1 on: exactly that many, if there are more; which ones
            depends on all prompts present. Neither depends on the order of the rows or on their answers.

    Example: held_out(np.array([5, 2**63, 5], np.uint64), 1) -> [True, False, True].
    """
    if heldout >= 1:
        return np.isin(openings, np.unique(openings)[: int(heldout)])
    if not len(openings):
        return np.zeros(0, bool)
    limit = max(int(heldout * 2**64), int(openings.min()) + 1)
    return openings < np.uint64(limit) if limit < 2**64 else np.ones(len(openings), bool)


def check_heldout(heldout: float, rows: Rows, where: str, name: str) -> np.ndarray:
    """`held_out` of prepared rows, rejecting a split that leaves one side empty.

    Raises:
        UserError: with the numbers of rows and prompts.
    """
    openings = rows.column("opening")
    sides = held_out(openings, heldout)
    if len(sides) and not sides.all():
        return sides
    raise UserError(
        f"{where}: heldout: {heldout:g} leaves no row of {name} to train on: its {len(rows):,} rows have "
        f"{len(np.unique(openings)):,} different prompts (first messages); use a smaller fraction or number, or more data"
    )


# --- what a run was trained on ---------------------------------------------------------------------------------------


def write_train_prompts(folder: Path, rows: Rows) -> None:
    """Write the prompts of the training rows into a run folder, hashed and sorted (main rank only)."""
    write_file(folder / TRAIN_PROMPTS, np.unique(rows.prompts()[0]).astype(">u8").tobytes())


def trained_on(folder: Path, rows: Rows) -> np.ndarray | None:
    """For each row, whether the run in `folder` was trained on its prompt; None if the run has not saved its prompts.

    The file is memory-mapped and searched, not loaded.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / TRAIN_PROMPTS
    if not file.is_file():
        return None
    size = file.stat().st_size
    if size % BYTES:
        raise UserError(
            f"{quote(str(file))} has {size} bytes, not a multiple of {BYTES}: it is damaged, so the trained prompts are "
            "unknown; remove it to continue without"
        )
    if not size:
        return np.zeros(len(rows), bool)
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as known:
        return np.array(
            [_is_in(known, int(prompt).to_bytes(BYTES, "big"), size // BYTES) for prompt in rows.last_prompts()], bool
        )


def _is_in(known, wanted: bytes, count: int) -> bool:
    at = lambda i: known[i * BYTES : (i + 1) * BYTES]  # noqa: E731
    found = bisect.bisect_left(range(count), wanted, key=at)
    return found < count and at(found) == wanted
