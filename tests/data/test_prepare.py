"""Rows that are prepared in the cache: once, by one process, and never half."""

import json
import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cached import as_large, described, outcome, processes_that_stop
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data import prepare as preparing
from rlhf.data.format_options import FormatOptions
from rlhf.data.heldout import held_out
from rlhf.data.prepare import prepare
from rlhf.data.sources import Source, from_python, load_source
from rlhf.data.store import Part, PartWriter, Rows, concatenate
from rlhf.data.summary import line, summarise
from rlhf.errors import UserError

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
QUESTION = "What is the capital of France?"


def is_prepared(source, kind):
    """Whether the cache has the rows of a source."""
    return preparing._Job(source, kind, FormatOptions(), "error", False).open() is not None


def pair(number, **more):
    return {"prompt": f"question {number}", "chosen": f"yes {number}", "rejected": "no", **more}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "a.jsonl", [pair(n) for n in range(20)])


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def forbid_converting(monkeypatch):
    monkeypatch.setattr(preparing, "convert", lambda *_: pytest.fail("converted again"))


def folders(cache):
    """Names in the cache's folder of data, but for locks."""
    return sorted(path.name for path in (cache / "data").iterdir() if path.suffix != ".lock")


# --- when rows are prepared again ------------------------------------------------------------------------------------


def test_a_prepared_folder_is_used_again(pairs, cache, monkeypatch):
    with as_large(cache):
        source = load_source(str(pairs))
        assert not is_prepared(source, "pairs")
        first = prepare(source, "pairs")
        assert is_prepared(source, "pairs") and first.key in folders(cache)
        source = load_source(str(pairs))
        monkeypatch.setattr(Source, "stream", lambda self: pytest.fail("the rows were read again"))
        again = prepare(source, "pairs")
        assert (again.key, described(again)) == (first.key, described(first))


def test_what_makes_another_preparation(pairs, cache, monkeypatch):
    """The file's content, what the recipe says of its format, the kind of rows, bad_rows, and the code that reads them."""
    with as_large(cache):
        key = lambda path=pairs, kind="pairs", *rest: prepare(load_source(str(path)), kind, *rest).key  # noqa: E731
        keys = [
            key(), key(pairs, "sft"), key(pairs, "pairs", FormatOptions(roles={"human": "user"})), key(pairs, "pairs", FormatOptions(), "skip"),
        ]  # fmt: skip
        before = pairs.stat()
        pairs.write_text(pairs.read_text().replace("yes 7", "yes 8"))
        os.utime(pairs, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size and time
        keys.append(key())
        monkeypatch.setattr(preparing, "code_digest", lambda: "another")
        keys.append(key())
        assert len(set(keys)) == len(keys) == len(folders(cache))
        copy = write(pairs.with_name("copy.jsonl"), [json.loads(row) for row in pairs.read_text().splitlines()])
        found = prepare(load_source(str(copy)), "pairs")  # the same content is the same rows, at another place
        assert found.key == keys[-1] and found.rows[4]["place"] == f"{copy}:5"


def test_every_file_of_the_reading_code_is_in_its_digest(tmp_path, monkeypatch):
    for path in (ROOT / "rlhf" / "data").glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    digest = preparing.code_digest.__wrapped__
    monkeypatch.setattr(preparing, "__file__", str(tmp_path / "prepare.py"))
    digests = {digest()}
    assert digests == {preparing.code_digest()}
    for name in ("features.py", "json_reader.py", "store.py", "messages.py"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
        digests.add(digest())
    assert len(digests) == 5


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "a part cut in half": lambda folder: cut_in_half(sorted(folder.glob("part-*"))[-1]),
    "a part empty": lambda folder: sorted(folder.glob("part-*"))[0].write_bytes(b""),
    "a part gone": lambda folder: sorted(folder.glob("part-*"))[0].unlink(),
    "a part of others": lambda folder: sorted(folder.glob("part-*"))[0].write_bytes(sorted(folder.glob("part-*"))[-1].read_bytes()),
    "skipped.json gone": lambda folder: (folder / "skipped.json").unlink(),
    "prepared.json cut in half": lambda folder: cut_in_half(folder / "prepared.json"),
    "prepared.json without parts": lambda folder: (folder / "prepared.json").write_text('{"rows": 20}'),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_preparation_is_made_again(name, pairs, cache):
    pairs.write_text(pairs.read_text() + json.dumps(pair(20)))  # 21 rows: the last range has fewer
    small = outcome(pairs)
    with as_large(cache, range_bytes=500):
        assert outcome(pairs) == small
        (folder,) = (cache / "data").glob("*/")
        DAMAGE[name](folder)
        assert not is_prepared(load_source(str(pairs)), "pairs")
        assert outcome(pairs) == small and is_prepared(load_source(str(pairs)), "pairs")


# --- processes -------------------------------------------------------------------------------------------------------

HELD = """
import json, sys
from cached import as_large, outcome
from rlhf.data import prepare as preparing
real = preparing.convert

def held(stream, *rest):
    def until_told():
        for number, item in enumerate(stream):
            if number == 5:
                print("half", flush=True)
                sys.stdin.readline()
            yield item
    return real(until_told(), *rest)

preparing.convert = held
with as_large(sys.argv[1]):
    print(json.dumps(outcome(sys.argv[2])))
"""


@pytest.fixture
def other(cache):
    """Starts a process that prepares a file, and stops in the middle until it is told to go on."""
    with processes_that_stop() as start:
        yield lambda path: start("-c", HELD, cache, path, PYTHONPATH=f"{ROOT}{os.pathsep}{HERE}")


def when_waiting(monkeypatch, do):
    """Calls `do` when this process finds that it must wait."""
    called = []

    def sleep(seconds):
        if not called:
            called.append(do())
        time.sleep(seconds)

    monkeypatch.setattr(preparing, "time", SimpleNamespace(time=time.time, sleep=sleep))


def test_a_killed_preparation_leaves_nothing_that_is_used(pairs, cache, other):
    small, process = outcome(pairs), other(pairs)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = folders(cache)
    assert left.endswith(".partial") and not (cache / "data" / left / "prepared.json").exists()
    with as_large(cache):
        assert not is_prepared(load_source(str(pairs)), "pairs")
        assert outcome(pairs) == small
    (folder,) = folders(cache)
    assert not folder.endswith(".partial")


def test_a_process_of_the_same_number_as_a_killed_one(pairs, cache, monkeypatch):
    """In a container each start may have it."""
    small, folder = outcome(pairs), {}
    with as_large(cache):
        job = preparing._Job(load_source(str(pairs)), "pairs", FormatOptions(), "error", True)
        folder = job.folder.with_name(f"{job.key}.{os.getpid()}.partial")
        folder.mkdir(parents=True)
        (folder / "part-00000.arrow").write_bytes(b"half")
        assert outcome(pairs) == small


def test_one_process_prepares_and_the_other_waits(pairs, cache, other, monkeypatch):
    small, process = outcome(pairs), other(pairs)
    when_waiting(monkeypatch, lambda: (process.stdin.write("\n"), process.stdin.flush()))
    forbid_converting(monkeypatch)
    with as_large(cache):
        assert outcome(pairs) == small
    assert json.loads(process.stdout.read())["places"] == small["places"]


def test_what_fails_for_one_process_fails_for_the_waiting_one_at_once(pairs, cache, other, monkeypatch):
    pairs.write_text(pairs.read_text() + json.dumps(pair(20, chosen="")) + "\n")
    small, process = outcome(pairs), other(pairs)
    assert small.startswith(f"{pairs}:21: 'chosen' is empty")
    when_waiting(monkeypatch, lambda: (process.stdin.write("\n"), process.stdin.flush()))
    with monkeypatch.context() as patch, as_large(cache):
        forbid_converting(patch)
        assert outcome(pairs) == small
    assert json.loads(process.stdout.read()) == small
    with as_large(cache):  # a later start doesn't take an old failure for its own
        real, converted = preparing.convert, []
        monkeypatch.setattr(preparing, "convert", lambda *rest: (converted.append(1), real(*rest))[1])
        assert outcome(pairs) == small and converted == [1]


def test_a_killed_process_lets_the_waiting_one_prepare(pairs, cache, other, monkeypatch):
    small, process = outcome(pairs), other(pairs)
    when_waiting(monkeypatch, process.kill)
    with as_large(cache):
        assert outcome(pairs) == small


def test_a_process_of_a_range_that_dies_is_an_error(pairs, cache, monkeypatch):
    with as_large(cache, range_bytes=300, processes=True):
        monkeypatch.setenv("PYTHONHASHSEED", "no number")  # Python itself refuses to start
        message = outcome(pairs)
    assert message.startswith(f"{pairs}: ") and "a process that converts" in message and "\n" not in message
    assert not list(cache.glob("data/*.partial"))


# --- the disk --------------------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written(pairs, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/no such folder")):
        with as_large(folder):
            message = outcome(pairs)
        assert "can't be written (" in message and "set RLHF_CACHE to a folder" in message and "\n" not in message


def test_a_disk_that_is_too_small(pairs, cache, monkeypatch):
    monkeypatch.setattr(preparing, "free_bytes", lambda folder: 100)
    with as_large(cache):
        message = outcome(pairs)
    assert message == (
        f"{pairs}: its prepared rows need about 0.0 GB, and {cache / 'data'} has 0.0 GB free; set RLHF_CACHE to a folder on a "
        "larger disk"
    )
    assert not list(cache.glob("data/*.partial"))


@pytest.mark.parametrize("range_bytes", [None, 30_000])
def test_a_disk_that_is_full_in_the_middle(range_bytes, tmp_path, cache):
    """As a full disk: no file may grow beyond 20 kB."""
    path = write(tmp_path / "a.jsonl", [pair(n, chosen="long " * 40) for n in range(400)])
    with as_large(cache, range_bytes):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            message = outcome(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert message.startswith(f"{path}: the prepared rows can't be written to {cache / 'data'}: ")
        assert "too large" in message and "set RLHF_CACHE to another folder" in message and "\n" not in message
        assert not [name for name in folders(cache) if not name.endswith(".failed")]
        assert len(outcome(path)["rows"]) == 400  # with room it is prepared after all


# --- the same as in memory -------------------------------------------------------------------------------------------

REPEATED = {
    "all": [pair(n, prompt=QUESTION, chosen=f"{QUESTION} Paris {n}", rejected=f"{QUESTION} Rome") for n in range(6)],
    "all but one answer": [pair(n, prompt=QUESTION, chosen=f"{QUESTION} Paris {n}", rejected=f"{QUESTION if n else ''} Rome") for n in range(6)],
    "short": [pair(n, prompt="Hi", chosen=f"Hi there {n}", rejected="Hi you") for n in range(6)],
    "with scores": [
        pair(n, prompt=QUESTION, chosen=f"{QUESTION} {QUESTION} A", rejected=f"{QUESTION} B", score_chosen=n, score_rejected=3)
        for n in range(6)
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", REPEATED)
def test_a_prompt_repeated_in_all_answers_is_removed_as_in_memory(name, tmp_path):
    path = write(tmp_path / "a.jsonl", [*REPEATED[name][:3], pair(9, rejected=""), *REPEATED[name][3:]])
    small = outcome(path, bad_rows="skip")
    assert small["stripped"] == (name in ("all", "with scores"))
    for size in (None, 60, 250):
        with as_large(range_bytes=size):
            assert outcome(path, bad_rows="skip") == small


MESSY = [
    pair(1), pair(2), pair(1), pair(3, chosen="no", rejected="yes 3"), pair(3), pair(4, chosen="<|im_end|>"), pair(5, margin=-1),
    pair(6, rejected="nan"), pair(7, chosen="caf\u00c3\u00a9"), pair(8, score_chosen=1, score_rejected=2), pair(9, chosen="a  b", rejected="a b"),
    pair(10, prompt=[{"role": "user", "content": "1"}, {"role": "user", "content": "2"}]), pair(11, source="web"), pair(12, rejected=""),
    *[pair(n) for n in range(13, 40)],
]  # fmt: skip


def test_summary_and_split_are_as_in_memory(tmp_path):
    path = write(tmp_path / "a.jsonl", MESSY)

    def told():
        found = prepare(load_source(str(path)), "pairs", bad_rows="skip")
        sides = held_out(found.rows.column("opening"), 0.3)
        parts = [found.rows.select(np.flatnonzero(sides == side)) for side in (False, True)]
        summary = summarise(parts[0], found.num_unused, len(found.skipped), found.stripped, parts[1])
        whole = summarise(found.rows, found.num_unused, len(found.skipped), found.stripped, parts[1])
        return sides.tolist(), summary, line(whole), whole

    small = told()
    assert 0 < sum(small[0]) < len(small[0]) and small[3].duplicates.rows == 1 and small[3].leaks.rows
    for size in (None, 90, 400):
        with as_large(range_bytes=size):
            assert told() == small


def test_rows_that_python_holds(cache, monkeypatch):
    """Many of them go through the cache like a file's, and are read from there the next time."""
    from rlhf.data import sources

    rows = [pair(n) for n in range(50)]
    small = described(prepare(from_python("train_dataset", rows), "pairs"))
    assert small["places"][1] == "train_dataset, row 2"
    monkeypatch.setattr(sources, "FEW_ROWS", 10)
    with as_large(cache):
        found = prepare(from_python("train_dataset", rows), "pairs")
        assert found.key and described(found) == small
        forbid_converting(monkeypatch)
        assert described(prepare(from_python("train_dataset", rows), "pairs")) == small


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=5), min_size=1, max_size=4), st.data())
def test_rows_of_several_parts_behave_as_a_list(parts, data):
    """Of rows and of a selection of a selection: items, places, columns, prompts."""
    made, plain = [], []
    for number, values in enumerate(parts):
        writer = PartWriter()
        for at, value in enumerate(values, 1):
            messages = [{"role": "user", "content": f"q{value}"}] + [{"role": "assistant", "content": "a"}] * (
                value % 3
            )
            writer.add({"messages": messages}, at)
            plain.append({"messages": messages, "place": f"f{number}:{at + 100 * number}"})
        writer.close()
        made.append(Rows([Part(f"f{number}", True, 100 * number, writer.batches)]))
    rows, expected = concatenate(made), plain
    for _ in range(2):
        assert list(rows) == expected == [rows[i] for i in range(len(rows))] and len(rows) == len(expected)
        assert [rows.place(i) for i in range(len(rows))] == [row["place"] for row in expected]
        flat, starts = rows.prompts()
        assert np.diff(starts).tolist() == [sum(m["role"] == "assistant" for m in row["messages"]) for row in expected]
        assert len(flat) == starts[-1] and starts[0] == 0
        assert rows.column("chars").tolist() == [sum(len(m["content"]) for m in row["messages"]) for row in expected]
        if not expected:
            break
        chosen = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=6))
        rows, expected = rows.select(np.array(chosen, np.int64)), [expected[i] for i in chosen]
    with pytest.raises(IndexError):
        rows[len(expected)]


def test_an_unreadable_line_far_below(tmp_path, cache):
    """Beyond the rows that tell the format, in a range of its own."""
    path = write(tmp_path / "a.jsonl", [pair(n) for n in range(300)])
    path.write_text(path.read_text() + "{\n")
    with as_large(cache, range_bytes=4000), pytest.raises(UserError, match=f"^{path}:301:2: not valid JSON"):
        prepare(load_source(str(path)), "pairs")


def test_the_first_rows_of_a_large_source_are_another_preparation(tmp_path, monkeypatch):
    """`max_train_examples` of a source that is read row by row: nothing beyond is read, and the whole is not taken for it."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    read = []

    def rows():
        for number in range(1, 31):
            read.append(number)
            yield {"prompt": f"q{number}", "chosen": "yes", "rejected": "no"}, number

    source = Source("f", None, None, "digest", read=rows, has_lines=True, num_bytes=10**9)
    monkeypatch.setattr(preparing, "SMALL_BYTES", 0)
    monkeypatch.setattr(preparing, "free_bytes", lambda folder: 10**12)
    first = prepare(source.head(5), "pairs")
    assert len(first.rows) == 5 and max(read) == 5 and first.rows.place(4) == "f:5"
    assert len(prepare(source, "pairs").rows) == 30
    assert prepare(source.head(5), "pairs").key == first.key


def test_a_file_that_changes_while_it_is_read_ends_the_start(tmp_path, monkeypatch):
    """The rows would be kept under the digest of others."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{n}", "chosen": "y", "rejected": "n"}) + "\n" for n in range(9)))
    with as_large(tmp_path / "cache"):
        source = load_source(str(path))
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"prompt": "late", "chosen": "y", "rejected": "n"}) + "\n")
        with pytest.raises(UserError, match="a.jsonl has changed while it was read; wait until it is written"):
            prepare(source, "pairs")
        assert len(prepare(load_source(str(path)), "pairs").rows) == 10
