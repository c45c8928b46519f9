"""Which rank holds and writes which elements: every element is written once, and any engine reads what another wrote."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import rlhf.runs.portable
from rlhf.distributed.ranges import Held, uncovered, written_by_this_rank
from rlhf.errors import UserError
from rlhf.runs.portable import PortableState, Share, Wanted, split_files, write_share
from rlhf.runs.portable_index import INDEX, join_index, rows_of
from rlhf.runs.trained_state import Part

# --- how each engine shards, one list of Held per rank --------------------------------------------------------------------


def whole(shapes, world):
    return [[Held(0, math.prod(shape), world, rank) for shape in shapes] for rank in range(world)]


def rows(shapes, world, copies=1):
    """FSDP2: torch.chunk of the first dimension; hybrid: each shard on `copies` ranks."""

    def of(shape, shard):
        chunk = -(-shape[0] // (world // copies))
        first, last = (min(n * chunk, shape[0]) * math.prod(shape[1:]) for n in (shard, shard + 1))
        return first, last

    shards = world // copies
    return [[Held(*of(shape, r % shards), copies, r // shards) for shape in shapes] for r in range(world)]


def hybrid(shapes, world):
    return rows(shapes, 2 * world, copies=2)


def parts(shapes, world):
    """ZeRO-3: as many elements of each parameter on all ranks, the last ones padded."""

    def of(shape, rank):
        size, part = math.prod(shape), -(-math.prod(shape) // world)
        return Held(min(rank * part, size), min((rank + 1) * part, size))

    return [[of(shape, rank) for shape in shapes] for rank in range(world)]


def line(shapes, world):
    """ZeRO-1 and 2: all parameters in one line, cut into equal partitions."""
    begins = np.cumsum([0, *map(math.prod, shapes)]).tolist()
    part = -(-begins[-1] // world)

    def of(begin, end, rank):
        low, high = max(begin, rank * part), min(end, (rank + 1) * part)
        return Held(low - begin, high - begin) if low < high else Held(0, 0)

    return [[of(b, e, rank) for b, e in zip(begins, begins[1:], strict=False)] for rank in range(world)]


ENGINES = (whole, rows, hybrid, parts, line)
shapes = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6)
engines = st.tuples(st.sampled_from(ENGINES), st.integers(1, 7))


def times_covered(shapes, ranges):
    """Of each parameter, how often each element is in a range."""
    count = [np.zeros(math.prod(shape), dtype=int) for shape in shapes]
    for number, start, stop in ranges:
        count[number][start:stop] += 1
    return count


@given(shapes, engines, st.integers(1, 50))
def test_every_element_is_written_once(shapes, engine, least):
    held = engine[0](shapes, engine[1])
    written = [written_by_this_rank(of, least) for of in held]
    for of, ranges in zip(held, written, strict=True):
        assert all(h.start <= start <= stop <= h.stop for h, (start, stop) in zip(of, ranges, strict=True))
    ranges = [(number, *each) for of in written for number, each in enumerate(of)]
    assert all((count == 1).all() for count in times_covered(shapes, ranges))
    assert uncovered([math.prod(shape) for shape in shapes], np.array(ranges)) is None


@given(
    shapes,
    st.integers(1, 5),
    st.sampled_from(["as it is", "gone", "twice", "shorter", "later", "longer"]),
    st.integers(0, 99),
)
def test_what_is_missing_or_there_twice_is_found(shapes, pieces, change, place):
    """Each parameter in pieces, in any order, one of them changed."""
    sizes = [math.prod(shape) for shape in shapes]
    ranges = []
    for number, size in enumerate(sizes):
        edges = [size * n // pieces for n in range(pieces + 1)]
        ranges += [[number, low, high] for low, high in zip(edges, edges[1:], strict=False)]
    place %= len(ranges)
    one = ranges.pop(place)
    _, low, high = one
    changed = {
        "as it is": [one], "gone": [], "twice": [one, one], "shorter": [[one[0], low, max(low, high - 1)]],
        "later": [[one[0], min(low + 1, high), high]], "longer": [[one[0], max(low - 1, 0), high]],
    }  # fmt: skip
    ranges = changed[change] + ranges[place:] + ranges[:place]
    wrong = [number for number, count in enumerate(times_covered(shapes, ranges)) if (count != 1).any()]
    assert uncovered(sizes, np.array(ranges, dtype=np.int64).reshape(-1, 3)) == min(wrong, default=None)


def test_ranks_write_about_as_much_as_each_other():
    """What all hold is cut into equal pieces, but none so small that a thousand ranks write a file of a few bytes."""
    held = whole([(1000,), (7, 100), (300,)], 4)
    assert [sum(b - a for a, b in written_by_this_rank(of, 1)) for of in held] == [500] * 4
    assert [sum(b - a for a, b in written_by_this_rank(of, 900)) for of in held] == [1000, 1000, 0, 0]
    assert [sum(b - a for a, b in written_by_this_rank(of)) for of in held] == [2000, 0, 0, 0]


# --- through files ---------------------------------------------------------------------------------------------------


def values(shapes):
    """Of each parameter its weight (bf16: two bytes, so that what follows could be misaligned) and two moments."""
    made = torch.Generator().manual_seed(1)
    return [
        {
            "weight": torch.randn(math.prod(shape), generator=made).bfloat16(),
            **{kind: torch.randn(math.prod(shape), generator=made) for kind in ("exp_avg", "exp_avg_sq")},
        }
        for shape in shapes
    ]


def write(folder, shapes, held, least):
    """What all ranks write, one after the other."""
    full = values(shapes)
    every, files = [], []
    for of in held:
        every.append([
            Part(f"p.{n}", shape, h, {k: t[h.start : h.stop] for k, t in full[n].items()}, {"step": torch.tensor(3.0)})
            for n, (shape, h) in enumerate(zip(shapes, of, strict=True))
        ])  # fmt: skip
        files.append(split_files(every[-1], written_by_this_rank(of, least)))
    index, names = join_index([rows_of(of) for of in files])
    written = {}
    for rank, (parts, of) in enumerate(zip(every, files, strict=True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(len(held)))
            trainer = SimpleNamespace(lr_scheduler=SimpleNamespace(last_epoch=3))
            written |= write_share(Share(parts, of, index, names), trainer, folder)
    assert sorted(written) == sorted(names) == sorted(p.name for p in folder.glob("portable-*-of-*"))
    return full


@settings(max_examples=60)
@given(shapes, engines, engines, st.integers(1, 50), st.integers(16, 400))
def test_any_engine_reads_what_another_wrote(tmp_path_factory, shapes, writer, reader, least, max_bytes):
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf.runs.portable, "MAX_FILE_BYTES", max_bytes)
        full = write(folder, shapes, writer[0](shapes, writer[1]), least)
    for path in folder.glob("portable-*-of-*"):
        with safe_open(path, "pt") as file:
            assert sum(file.get_tensor(key).nbytes for key in file.keys()) <= max(max_bytes, 10)
    state = PortableState(folder)
    assert state.last_epoch == 3
    for n, shape in enumerate(shapes):
        saved = state.parameters[f"p.{n}"]
        assert saved.shape == shape and saved.scalars == {"step": torch.tensor(3.0)}
        assert saved.kinds == {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    for of in reader[0](shapes, reader[1]):
        into = [{k: torch.full_like(t[h.start : h.stop], 7.0) for k, t in full[n].items()} for n, h in enumerate(of)]
        state.read([Wanted(f"p.{n}", h, into[n]) for n, h in enumerate(of)])
        for n, h in enumerate(of):
            assert all(torch.equal(into[n][kind], tensor[h.start : h.stop]) for kind, tensor in full[n].items())


def test_a_rank_opens_the_files_that_it_needs(tmp_path, monkeypatch):
    """As many ranks under the same engine: each its own."""
    held, opened = parts([(64, 3), (10,)], 5), []
    write(tmp_path, [(64, 3), (10,)], held, 1)
    state = PortableState(tmp_path)
    monkeypatch.setattr(
        rlhf.runs.portable, "safe_open", lambda path, *args: opened.append(path.name) or safe_open(path, *args)
    )
    state.read([Wanted(f"p.{n}", h, {"exp_avg": torch.zeros(h.stop - h.start)}) for n, h in enumerate(held[3])])
    assert opened == ["portable-00003-of-00005-00000.safetensors"]


def test_what_no_file_holds_is_not_left_as_it_was(tmp_path):
    write(tmp_path, [(6,)], whole([(6,)], 2), 1)
    wanted = Wanted("p.0", Held(0, 6), {"momentum": torch.zeros(6)})
    with pytest.raises(UserError, match=r"does not hold all of momentum of p\.0; start from scratch with --fresh"):
        PortableState(tmp_path).read([wanted])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format": 2', '"format": 3', "has format 3, expected 2: it was written by a later version of rlhf-dpo"),
        ('"shape": [6]', '"shape": [7]', "is not the index of a checkpoint"),
        ('"parameters"', '"p"', "is not the index of a checkpoint"),
        ('"float32"', '"float33"', "is not the index of a checkpoint"),
    ],
)
def test_an_index_of_something_else_is_refused(old, new, message, tmp_path):
    from safetensors.torch import save_file

    write(tmp_path, [(6,)], whole([(6,)], 2), 1)
    path = tmp_path / INDEX
    with safe_open(path, "pt") as file:
        ranges, state = file.get_tensor("ranges").clone(), file.metadata()["state"]
    assert old in state
    save_file({"ranges": ranges}, path, {"state": state.replace(old, new)})
    with pytest.raises(UserError, match=message):
        PortableState(tmp_path)
