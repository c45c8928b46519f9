"""What an evaluation has measured so far: written batch by batch, so that the same command resumes after any end.

A rank appends the values of a batch to `RUN_DIR/.partial/KEY-RANK.jsonl` once it has computed them, and starts by reading
what all ranks have written before. KEY covers recipe, data and models, so nothing is taken from another evaluation. The
folder is removed once `complete.json` is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from rlhf.distributed.processes import is_main, rank, say, world_size
from rlhf.files import read_json_lines
from rlhf.runs.stop import Stopped, Stopper

FOLDER = ".partial"
FORMAT = 2  # part of every key: increment it when the computation changes
Batch = tuple[int, ...]


def key_of(*inputs: Any) -> str:
    """16 hex digits that identify an evaluation: of all that its values depend on."""
    text = json.dumps([FORMAT, *inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Measured:
    """The values of an evaluation by task and batch, shared by all ranks.

    Attributes:
        folder: the run folder.
        known: values by (task, batch): one per row of the batch.
    """

    def __init__(self, folder: Path, key: str, stopper: Stopper, begin: Callable[[], None]):
        """Read what earlier starts have left. A collective.

        Args:
            begin: called on the main rank before it writes its first batch.
        """
        self.folder, self.stopper, self.begin = folder, stopper, begin
        self.path = folder / FOLDER / f"{key}-{rank()}.jsonl"
        self.file: IO[bytes] | None = None
        self.known: dict[tuple[str, Batch], list[Any]] = {}
        found: dict[tuple[str, Batch], list[Any]] = {}
        for path in sorted((folder / FOLDER).glob(f"{key}-*.jsonl")):
            found |= dict(filter(None, map(_entry, read_json_lines(path))))
        self._share(found)

    def compute(
        self, task: str, batches: list[list[int]], work: Callable[[list[int]], list[Any]], shown: str = ""
    ) -> dict[int, Any]:
        """The value of every row of `batches`, on all ranks; each computes every n-th of the batches that are missing.

        Args:
            task: a name, unique in the evaluation.
            batches: rows by batch, the same on all ranks.
            work: computes one value per row of a batch; JSON values.
            shown: what stands at the progress bar; default: the task.

        Raises:
            Stopped: a stop was requested; what has been computed is kept.

        A collective.
        """
        from tqdm import tqdm

        missing = [tuple(batch) for batch in batches if (task, tuple(batch)) not in self.known]
        total = sum(map(len, batches))
        new: dict[tuple[str, Batch], list[Any]] = {}
        with tqdm(total=total, initial=total - sum(map(len, missing)), desc=f"{shown or task:<22}", disable=not is_main(),
                  dynamic_ncols=True) as bar:  # fmt: skip
            for start in range(0, len(missing), world_size()):
                turn = missing[start : start + world_size()]
                if by := self.stopper.agree():
                    self._stop(by)
                if rank() < len(turn):
                    batch = turn[rank()]
                    new[task, batch] = work(list(batch))
                    self._write(task, batch, new[task, batch])
                bar.update(sum(map(len, turn)))
        self._share(new)
        values = ((tuple(batch), self.known[task, tuple(batch)]) for batch in batches)
        return {row: value for batch, found in values for row, value in zip(batch, found, strict=True)}

    def remove(self) -> None:
        """Remove the files, which results.json has replaced (main rank only)."""
        shutil.rmtree(self.folder / FOLDER, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        if self.file is not None:
            self.file.close()

    def _write(self, task: str, batch: Batch, values: list[Any]) -> None:
        if self.file is None:
            if is_main():
                self.begin()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab")
            self.file.write(b"\n")  # a kill may have cut the last line
        self.file.write(json.dumps({"task": task, "rows": batch, "values": values}).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def _share(self, new: dict[tuple[str, Batch], list[Any]]) -> None:
        """Add the new entries of all ranks to `known`: hosts may not share a disk."""
        found = [new]
        if world_size() > 1:
            from accelerate.utils import gather_object

            found = gather_object(found)
        for entries in found:
            self.known |= entries

    def _stop(self, by: str) -> None:
        from rlhf.runs.checkpointing import note_stop  # imports torch

        if is_main():
            note_stop(self.folder, by)
        say(f"\nStopped ({by}); what has been measured is kept. Run the same command to resume.")
        raise Stopped


def _entry(line: dict[str, Any]) -> tuple[tuple[str, Batch], list[Any]] | None:
    """A line as an entry of `known`; None if it is damaged."""
    task, rows, values = line.get("task"), line.get("rows"), line.get("values")
    if not isinstance(task, str) or not isinstance(rows, list) or not isinstance(values, list):
        return None
    if len(rows) != len(values) or not all(type(row) is int for row in rows):
        return None
    return (task, tuple(rows)), values
