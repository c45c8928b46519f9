"""Work in blocks: every item once and in order, whatever interrupts it."""

import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import UserError
from rlhf.inference import blocks
from rlhf.inference.blocks import MOST, Batch, Blocks, Folder
from rlhf.runs.stop import Stopped, Stopper

_FOLDERS = itertools.count()


class Killed(BaseException):
    pass


class Work:
    """Values of items (its square, as text), in batches of `width`; dies, or is asked to stop, after `batches` of them."""

    def __init__(self, folder, num_items, width=3, batches=None, how="kill", group=1):
        self.folder, self.num_items, self.width, self.group = folder, num_items, width, group
        self.left, self.how, self.computed = batches, how, []
        folder.mkdir(parents=True, exist_ok=True)

    def run(self):
        with Stopper(self.folder) as self.stopper:
            self.blocks = Blocks(self.folder, self.num_items, self.stopper, self.group)
            self.blocks.compute("squares", "Squares", "items", self.batches)
        return list(self.blocks.all_values("squares"))

    def batches(self, items):
        order = sorted(items, key=lambda item: (item * 7919) % 101)  # as by length
        for start in range(0, len(order), self.width):
            batch = order[start : start + self.width]
            yield Batch(batch, lambda batch=batch: self.compute(batch))

    def compute(self, batch):
        if self.left == 0 and self.how == "kill":
            raise Killed
        self.computed.append(batch)
        if self.left is not None:
            self.left -= 1
            if self.left == 0 and self.how == "stop":
                self.stopper.asked_by = "SIGTERM"
        return [f"{item**2}" for item in batch]


@given(st.integers(1, 3000), st.integers(1, 9), st.integers(1, 600))
def test_blocks_hold_every_item_once_and_keep_groups_together(num_groups, group, other):
    found = Blocks(Path("."), num_groups * group, None, group)
    items = [item for block in range(len(found)) for item in found.items(block)]
    assert items == list(range(num_groups * group))
    assert found.size % group == 0 and found.size <= max(MOST, group)
    assert all(len(found.items(block)) for block in range(len(found)))
    rows = Blocks(Path("."), num_groups, None, like=(found, group))
    assert len(rows) == len(found)
    assert all(rows.items(b).start * group == found.items(b).start for b in range(len(rows)))


@given(num_items=st.integers(1, 120), width=st.integers(1, 20), stops=st.lists(st.integers(0, 6), max_size=6), how=st.sampled_from(["kill", "stop"]))  # fmt: skip
def test_interrupted_work_ends_with_the_same_values_and_computes_nothing_twice(
    tmp_path_factory, num_items, width, stops, how
):
    folder = tmp_path_factory.getbasetemp() / f"blocks-{next(_FOLDERS)}"
    computed = []
    for batches in stops:
        work = Work(folder, num_items, width, batches if how == "kill" else max(1, batches), how)
        try:
            work.run()
        except (Killed, Stopped):
            pass
        computed += work.computed
    last = Work(folder, num_items, width)
    assert last.run() == [f"{item**2}" for item in range(num_items)]
    computed += last.computed
    assert sorted(item for batch in computed for item in batch) == list(range(num_items))
    assert not list(folder.glob("*.started"))


def test_a_line_that_a_kill_has_cut_is_computed_again(tmp_path):
    work = Work(tmp_path / "w", 10, width=2, batches=3)
    with pytest.raises(Killed):
        work.run()
    started = next((tmp_path / "w").glob("*.started"))
    started.write_bytes(started.read_bytes()[:-4])
    again = Work(tmp_path / "w", 10, width=2)
    assert again.run() == [f"{item**2}" for item in range(10)]
    assert [sorted(batch) for batch in again.computed][0] == sorted(work.computed[-1])


def test_what_other_ranks_have_left_is_taken_over(tmp_path):
    """Rank 1 of two had finished the second block and started the third."""
    folder = tmp_path / "w"
    folder.mkdir()
    size = Blocks(folder, 60, None).size
    (folder / "squares-000001.jsonl").write_text("".join(json.dumps([i, "kept"]) + "\n" for i in range(size, 2 * size)))
    (folder / "squares-000002.jsonl.started").write_text(json.dumps([2 * size, "begun"]) + "\n")
    values = Work(folder, 60, width=1).run()
    assert values[size : 2 * size] == ["kept"] * size and values[2 * size] == "begun" and values[0] == "0"


def test_two_commands_do_not_write_one_file(tmp_path):
    first = Folder(tmp_path / "parts" / "key", tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="out.jsonl is being written by another process"):
        Folder(tmp_path / "parts" / "key", tmp_path / "out.jsonl")
    first.close()
    again = Folder(tmp_path / "parts" / "key", tmp_path / "out.jsonl")
    again.remove()
    again.close()
    assert not (tmp_path / "parts").exists()


def test_an_open_block_is_all_that_is_read_into_memory(tmp_path, monkeypatch):
    """However many items there are."""
    Work(tmp_path / "w", 2000, width=100).run()
    held, read = [], blocks._read
    monkeypatch.setattr(blocks, "_read", lambda path: held.append(len(read(path))) or read(path))
    work = Blocks(tmp_path / "w", 2000, None)
    assert sum(1 for _ in work.all_values("squares")) == 2000 and max(held) == work.size == 63
    assert os.path.exists(work.file("squares", 0))
