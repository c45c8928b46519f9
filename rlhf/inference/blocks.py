"""Long work over numbered items, shared out over ranks in blocks, kept batch by batch, so that the same command resumes.

A block is a range of items, and a file `TASK-000012.jsonl` with a line `[item, value]` for each of them. The blocks, and the
batches that are made of one, depend on the items alone, so values depend neither on the number of processes nor on how
often the work was interrupted. A rank takes the next block that nobody has, appends the values of each batch once they
are computed (`….started`), and renames the file once all are there. Nothing is held in memory but a block, and no
rank waits in a collective while another one works.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from rlhf.distributed.processes import is_main, on_main, rank, say, shared_count, wait_for_ranks, world_size
from rlhf.errors import UserError
from rlhf.files import lock_file, sync_folder
from rlhf.runs.stop import STOP_FILE, Stopped, Stopper

SHARES, FEWEST, MOST = 32, 16, 512  # blocks of small work, and the sizes between which that gives way
_RUNS = itertools.count()  # the same number on all ranks: names of counters are used once in a process group
SEEN_S = 60.0  # how long a file may take to be seen by another host of a shared disk


class Batch(NamedTuple):
    """Items that are computed together, and what computes a JSON value for each of them, in their order."""

    items: list[int]
    work: Callable[[], list[Any]]


class Blocks:
    """The values of `num_items` items, by task.

    Attributes:
        folder: where they are kept; all ranks must see it.
        size: items per block.
    """

    def __init__(
        self, folder: Path, num_items: int, stopper: Stopper, group: int = 1, like: tuple[Blocks, int] | None = None
    ):
        """
        Args:
            group: so many items in a row stay in one block.
            like: (others, number): each item here is so many of theirs, and the blocks are cut at the same places.
        """
        self.folder, self.num_items, self.stopper, self.run = folder, num_items, stopper, next(_RUNS)
        size = min(max(-(-num_items // SHARES), FEWEST), MOST)
        self.size: int = like[0].size // like[1] if like else max(1, size // group) * group

    def __len__(self) -> int:
        return -(-self.num_items // self.size)

    def items(self, block: int) -> range:
        return range(block * self.size, min(self.num_items, (block + 1) * self.size))

    def file(self, task: str, block: int) -> Path:
        return self.folder / f"{task}-{block:06d}.jsonl"

    def compute(self, task: str, title: str, unit: str, batches: Callable[[range], Iterable[Batch]]) -> None:
        """Compute the values of all items that are missing. A collective.

        Args:
            task: a word, unique in this work.
            title: at the progress bar.
            unit: what an item is, in the plural.
            batches: of a block's items; made once per block, so here is where rows are tokenised.

        Raises:
            Stopped: a stop was requested; what has been computed is kept.
        """
        from tqdm import tqdm

        missing = self._missing(task)
        left = sum(len(self.items(block)) for block in missing)
        with tqdm(total=self.num_items, initial=self.num_items - left, desc=title, unit=f" {unit}",
                  disable=not is_main(), dynamic_ncols=True) as bar:  # fmt: skip
            count = _Count(f"{self.run}/{task}", bar)
            for block in _shared_out(f"{self.run}/{task}", missing):
                if self.stopper.heard() or not self._compute(task, block, batches, count):
                    break
            if world_size() > 1:
                wait_for_ranks(f"{self.run}/{task}/waiting", count.show)
            count.show()
        if by := self.stopper.agree():
            say(f"\nStopped ({by}); what has been computed is kept in {self.folder}. Run the same command to resume.")
            raise Stopped

    def values(self, task: str, block: int) -> list[Any]:
        """The values of a block that is complete, in the order of its items."""
        found = _read(self.file(task, block))
        return [found[item] for item in self.items(block)]

    def all_values(self, task: str) -> Iterator[Any]:
        """The values of all items, in order; a block at a time is in memory."""
        for block in range(len(self)):
            yield from self.values(task, block)

    def _missing(self, task: str) -> list[int]:
        there = set(os.listdir(self.folder)) if is_main() else set()
        missing = [block for block in range(len(self)) if self.file(task, block).name not in there]
        if world_size() > 1:  # a disk may show ranks different things for a while
            from accelerate.utils import broadcast_object_list

            missing = broadcast_object_list([missing])[0]
        return missing

    def _compute(self, task: str, block: int, batches: Callable[[range], Iterable[Batch]], count: _Count) -> bool:
        """Compute a block; returns False if it was left because of a request to stop."""
        file = self.file(task, block)
        started = file.with_name(f"{file.name}.started")
        known = _read(started)
        wanted = self.items(block)
        known = {item: known[item] for item in wanted if item in known}
        count.add(len(known))
        with open(started, "ab") as out:
            out.write(b"\n")  # a kill may have cut the last line
            for batch in batches(wanted) if len(known) < len(wanted) else ():
                if all(item in known for item in batch.items):
                    continue
                if self.stopper.heard():
                    return False
                values = batch.work()
                _append(out, zip(batch.items, values, strict=True))
                count.add(sum(item not in known for item in batch.items))
        os.replace(started, file)
        sync_folder(self.folder)
        return True


class _Count:
    """Items that all ranks have computed, at the main rank's bar."""

    def __init__(self, name: str, bar: Any):
        self.name, self.bar, self.own = f"{name}/done", bar, 0
        self.start = bar.n

    def add(self, number: int) -> None:
        self.own += number
        if world_size() > 1:
            shared_count(self.name, number)
        self.show()

    def show(self) -> None:
        if is_main():
            done = shared_count(self.name) if world_size() > 1 else self.own
            self.bar.update(self.start + done - self.bar.n)


def _shared_out(name: str, missing: list[int]) -> Iterator[int]:
    """The blocks that this rank takes, each once no other rank has it."""
    if world_size() == 1:
        yield from missing
        return
    while (number := shared_count(f"{name}/taken", 1) - 1) < len(missing):
        yield missing[number]


def _append(file: IO[bytes], lines: Iterable[tuple[int, Any]]) -> None:
    file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())


def _read(path: Path) -> dict[int, Any]:
    """Values by item; lines that a kill has cut are left out."""
    found: dict[int, Any] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return found
    for line in lines:
        try:
            item, value = json.loads(line)
        except (ValueError, TypeError):
            continue
        found[item] = value
    return found


# --- the folder ------------------------------------------------------------------------------------------------------


class Folder:
    """A folder for unfinished work, locked by the main rank and seen by all of them. A collective."""

    def __init__(self, path: Path, output: Path):
        self.path, self.output = path, output
        self.lock: IO[str] | None = None
        on_main(self._take)
        if world_size() > 1:
            self._check_shared()

    def _take(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path} can't be written: {error.strerror or error}; give another --output") from None
        (self.path / STOP_FILE).unlink(missing_ok=True)
        if not lock_file(self.lock):
            raise UserError(
                f"{self.output} is being written by another process; wait for it, stop it, or give another name"
            )

    def _check_shared(self) -> None:
        from accelerate.utils import broadcast_object_list

        mark = self.path / f".seen-{os.getpid()}-{next(_RUNS)}"
        if is_main():
            mark.touch()
        mark = Path(broadcast_object_list([str(mark)])[0])
        started = time.monotonic()
        while not mark.exists():
            if time.monotonic() - started > SEEN_S:
                raise UserError(
                    f"rank {rank()} does not see {self.path}, which the main rank has made; write to a disk that all hosts share"
                )
            time.sleep(0.1)
            os.listdir(mark.parent.parent)  # makes a network disk look again
        wait_for_ranks(f"seen/{mark}")
        if is_main():
            mark.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove it, and the folder around it if that is empty (main rank only)."""
        shutil.rmtree(self.path, ignore_errors=True)
        if not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()
