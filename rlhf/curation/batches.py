"""Going through rows: some of them, evenly spaced; in batches, with a progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf.data.store import Rows

BATCH_ROWS = 500


def spread(rows: Rows, at_most: int | None) -> Rows:
    """At most so many rows, evenly spaced; all for None."""
    return rows if at_most is None or len(rows) <= at_most else rows[:: -(-len(rows) // at_most)]


def batches(rows: Rows, words: str) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(number of the first row, rows) of each batch, with a progress bar if it takes long.

    Args:
        words: of the bar.
    """
    from tqdm import tqdm

    with tqdm(total=len(rows), desc=words, unit=" rows", unit_scale=True, delay=3, leave=False) as bar:
        for start in range(0, len(rows), BATCH_ROWS):
            yield start, [rows[i] for i in range(start, min(start + BATCH_ROWS, len(rows)))]
            bar.update(min(BATCH_ROWS, len(rows) - start))
