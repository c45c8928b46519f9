"""Rows that nearly equal an earlier one: MinHash by datasketch, bands in NumPy, and the true similarity of what these find.

The signatures, 256 bytes per row, are in a file that is memory-mapped; of the rows themselves two are in memory at a time.
"""

from __future__ import annotations

import re
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlhf.curation.batches import batches
from rlhf.curation.findings import Finding, Place, texts_of
from rlhf.data.store import Rows
from rlhf.errors import UserError, pip_install

NUM_PERM, BANDS = 64, 16  # 16 bands of 4: pairs of similarity 0.8 are found with 0.9998, of 0.5 with 0.64
SHINGLE_WORDS = 3
SIMILAR = 0.8  # Jaccard similarity of the shingles from which rows are nearly equal
NEAR = SIMILAR - 0.2  # estimated from signatures, below which it is not computed
DEFAULT_UP_TO = 100_000  # rows that are compared without being asked to
_WORDS = re.compile(r"\w+")


def is_installed() -> bool:
    import importlib.util

    return importlib.util.find_spec("datasketch") is not None


def require() -> None:
    """Raise UserError if datasketch is missing."""
    if not is_installed():
        raise UserError(f"--near-duplicates needs the package datasketch: {pip_install('rlhf-dpo[data]')}")


def near_duplicates(rows: Rows, most: int | None) -> list[Finding]:
    """Rows of a similarity of at least SIMILAR to an earlier one that they don't equal."""
    with tempfile.TemporaryFile() as file:
        signatures = _signatures(rows, file)
        partners = _partners(signatures, rows.column("own"))
    places, number = [], 0
    for index in np.flatnonzero(partners >= 0):
        earlier = int(partners[index])
        how = similarity(shingles(rows[int(index)]), shingles(rows[earlier]))
        if how >= SIMILAR:
            number += 1
            if most is None or number <= most:
                places.append(Place(rows.place(int(index)), f"{how:.0%} like {rows.place(earlier)}"))
    return [Finding("near_duplicates", number, tuple(places))] if number else []


def shingles(row: dict[str, Any]) -> set[bytes]:
    """The row's sequences of SHINGLE_WORDS words, without case and punctuation; all words if there are fewer."""
    words = [word for _, text in texts_of(row) for word in _WORDS.findall(text.casefold())]
    if len(words) <= SHINGLE_WORDS:
        return {" ".join(words).encode()}
    each = zip(*(words[n:] for n in range(SHINGLE_WORDS)), strict=False)
    return {" ".join(some).encode() for some in each}


def similarity(a: set[bytes], b: set[bytes]) -> float:
    """Jaccard's: shared shingles of all."""
    return len(a & b) / len(a | b)


def _signatures(rows: Rows, file: Any) -> np.ndarray:
    """uint32 [rows, NUM_PERM], in the file."""
    from datasketch import MinHash

    found = np.memmap(file, np.uint32, "w+", shape=(max(1, len(rows)), NUM_PERM))
    empty = MinHash(NUM_PERM, hashfunc=zlib.crc32)
    start = empty.hashvalues.copy()
    for first, batch in batches(rows, "Comparing"):
        for number, row in enumerate(batch, first):
            empty.hashvalues = start.copy()
            empty.update_batch(shingles(row))
            found[number] = empty.hashvalues
    return found[: len(rows)]


def _partners(signatures: np.ndarray, own: np.ndarray) -> np.ndarray:
    """For each row the earlier one that it is most like, as far as its signature tells; -1 if none comes near."""
    partners = np.full(len(own), -1, np.int64)
    repeats = np.ones(len(own), bool)  # rows that equal an earlier one, which is another finding
    repeats[np.unique(own, return_index=True)[1]] = False
    best = np.full(len(own), NEAR, np.float32)
    for keys in _bands(signatures):
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        new = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(order) else np.zeros(0, bool)
        first_of_group = order[np.flatnonzero(new)][np.cumsum(new) - 1] if len(order) else order
        before = np.concatenate([order[:1], order[:-1]])
        for earlier in (first_of_group, np.where(new, order, before)):
            _keep_better(signatures, repeats, order, earlier, partners, best)
    return partners


def _keep_better(signatures, repeats, later, earlier, partners, best) -> None:
    chosen = ~repeats[later] & (earlier < later)
    later, earlier = later[chosen], earlier[chosen]
    for at in range(0, len(later), 65536):
        some, others = later[at : at + 65536], earlier[at : at + 65536]
        equal = (signatures[some] == signatures[others]).mean(axis=1, dtype=np.float32)
        better = equal > best[some]
        partners[some[better]], best[some[better]] = others[better], equal[better]


def _bands(signatures: np.ndarray) -> Iterator[np.ndarray]:
    """uint64 [rows] of each band: rows with equal values are candidates."""
    width = NUM_PERM // BANDS
    for band in range(BANDS):
        key = np.full(len(signatures), 14695981039346656037, np.uint64)
        for column in range(band * width, (band + 1) * width):
            key = (key ^ signatures[:, column].astype(np.uint64)) * np.uint64(1099511628211)  # FNV-1a, by words
            key ^= key >> np.uint64(32)
        yield key
