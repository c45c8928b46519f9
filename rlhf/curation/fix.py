"""Rows without what is safe to remove: what adds nothing, or contradicts the measurement; never what needs a decision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf.curation.screen import plural
from rlhf.curation.target import in_file_order
from rlhf.data.features import BIT
from rlhf.data.rows import StageData
from rlhf.data.store import Rows


@dataclass(frozen=True)
class Fixed:
    """Rows that are left, and how many were removed, by why."""

    rows: Rows
    removed: dict[str, int]

    def lines(self) -> list[str]:
        return [f"removed {plural(number, 'row')}: {why}" for why, number in self.removed.items() if number]


def fixed(data: StageData, from_same_file: bool, drop_leaks: bool) -> Fixed:
    """The rows without exact duplicates, and without pairs that differ only in white space.

    Args:
        from_same_file: the held-out rows are split off the training data by `heldout`, so both are kept together.
        drop_leaks: also remove training rows whose prompt is held out.
    """
    rows = in_file_order(data.train)
    if from_same_file and data.heldout is not None:
        both = [np.arange(len(side), dtype=np.int64) if side.indices is None else side.indices
                for side in (data.train, data.heldout)]  # fmt: skip
        rows = Rows(data.train.parts, np.unique(np.concatenate(both)))
    keep = np.ones(len(rows), bool)
    removed = {"can't be used": len(data.skipped)}

    def drop(hits: np.ndarray, why: str) -> None:
        removed[why] = int((keep & hits).sum())
        keep[hits] = False

    drop(rows.column("flags") & BIT["blanks_only"] != 0, "the answers differ only in white space")
    if drop_leaks and data.heldout is not None and not from_same_file:
        drop(np.isin(rows.last_prompts(), data.heldout.last_prompts()), "the prompt is held out")
    first = np.zeros(len(rows), bool)
    left = np.flatnonzero(keep)
    first[left[np.unique(rows.column("own")[left], return_index=True)[1]]] = True
    drop(~first, "equal to an earlier row")
    return Fixed(rows.select(np.flatnonzero(keep)), removed)
