"""A file that is read row by row, in ranges, gives the same rows, places, digests and errors as one that is read at once."""

import bz2
import gzip
import io
import json
import lzma

import pytest
from cached import as_large, outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.data.json_reader import json_lines, list_items
from rlhf.data.prepare import prepare
from rlhf.data.sources import load_source
from rlhf.errors import UserError

BOM = b"\xef\xbb\xbf"


def pair(number, text="answer ä€😀", **more):
    return {"prompt": f"question {number}", "chosen": f"{text} {number}", "rejected": "no", **more}


def lines(*rows, end="\n", ascii=False):
    return "".join(json.dumps(row, ensure_ascii=ascii) + end for row in rows).encode()


PAIRS = [pair(n) for n in range(9)]


def both(path, range_bytes=(None, 40), kind="pairs", bad_rows="error", split=None):
    """What the file gives, which is the same read at once, row by row, and in ranges."""
    small = outcome(path, kind, bad_rows, split)
    for size in range_bytes:
        with as_large(range_bytes=size) as cache:
            assert outcome(path, kind, bad_rows, split) == small, f"ranges of {size} bytes"
            assert isinstance(small, str) or list(cache.glob("data/*/prepared.json")), "not read as a large one"
    return small


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


# --- JSON Lines ------------------------------------------------------------------------------------------------------

JSONL = {
    "plain": lines(*PAIRS),
    "BOM": BOM + lines(*PAIRS),
    "CRLF": lines(*PAIRS, end="\r\n"),
    "CRLF and BOM": BOM + lines(*PAIRS, end="\r\n"),
    "blank lines": b"\n \t\n" + lines(*PAIRS, end="\n\n\r\n") + b"\n\n",
    "no final newline": lines(*PAIRS)[:-1],
    "a long line": lines(PAIRS[0], pair(1, "long " * 300), *PAIRS[2:]),
    "one row": lines(PAIRS[0]),
    "a line separator in a text": lines(pair(0, "a\u2028b\x0b\x0c\x85c"), *PAIRS[1:]),
    "escapes": lines(*PAIRS, ascii=True),
    "unused columns": lines(pair(0, id=1), pair(1, source="web", id=None), *PAIRS[2:]),
    "margins and scores": lines(pair(0, margin=-1, score_chosen=1, score_rejected=2), pair(1, score_chosen=1, score_rejected=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", JSONL)
def test_json_lines(name, tmp_path):
    path = write(tmp_path, "a.jsonl", JSONL[name])
    found = both(path, (None, 11, 64, 200))
    expected = sum(1 for line in JSONL[name].removeprefix(BOM).split(b"\n") if line.strip())
    assert len(found["rows"]) == expected and found["rows"][0]["place"] == f"{path}:{3 if name == 'blank lines' else 1}"


@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "BOM"])
def test_a_boundary_at_every_byte(mark, tmp_path):
    """Two ranges that meet at any byte have all lines between them, each once, and count them."""
    content = mark + b'{"a": 1}\r\n\n{"a": "\xc3\xa4\xe2\x82\xac"}\n  \n{"a": 3}\n\n{"a": 4}'
    path = write(tmp_path, "a.jsonl", content)
    whole = list(json_lines(path))
    assert [(row["a"], line) for row, line in whole] == [(1, 1), ("ä€", 3), (3, 5), (4, 7)]

    class Counted:
        lines = 0

    for boundary in range(len(content) + 1):
        counts = [Counted(), Counted()]
        first = list(json_lines(path, 0, boundary, counts[0]))
        second = list(json_lines(path, boundary, len(content), counts[1]))
        assert first + [(row, line + counts[0].lines) for row, line in second] == whole, boundary
        assert counts[0].lines + counts[1].lines == 7, boundary


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=8),
    breaks=st.lists(st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]), min_size=8, max_size=8),
    mark=st.booleans(), ascii=st.booleans(), size=st.integers(5, 200), final=st.booleans(),
)  # fmt: skip
def test_any_lines_in_ranges_of_any_size(tmp_path, texts, breaks, mark, ascii, size, final):
    content = b"".join(lines(pair(n, text), end=breaks[n], ascii=ascii) for n, text in enumerate(texts))
    path = write(tmp_path, "a.jsonl", (BOM if mark else b"") + (content if final else content.rstrip(b"\r\n ")))
    found = both(path, (size,))
    assert isinstance(found, str) or len(found["rows"]) == len(texts)


def test_processes_convert_the_ranges_and_their_count_of_rows_is_shown(tmp_path):
    path = write(tmp_path, "a.jsonl", JSONL["blank lines"])
    small = outcome(path)
    with as_large(range_bytes=300, processes=True) as cache:
        assert outcome(path) == small
        assert len(list(cache.glob("data/*/part-*.arrow"))) == -(-len(JSONL["blank lines"]) // 300) > 2
        assert not list(cache.glob("data/*/report-*"))


BAD = {
    "not JSON": b'{"prompt": "q", "chosen": \n',
    "extra data": b'{"a": 1} {"a": 2}\n',
    "a list": b"[1, 2]\n",
    "a key twice": b'{"prompt": "a", "prompt": "b"}\n',
    "NaN": b'{"prompt": NaN}\n',
    "NUL": b"\x00\x00\x00\n",
    "not UTF-8": b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}\n',
    "UTF-8 cut short": b'{"prompt": "\xe2\x82", "chosen": "a", "rejected": "b"}\n',
    "a lone surrogate": b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}\n',
}


@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "BOM"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_in_the_middle(name, mark, tmp_path):
    """Its line, column and (of a byte that is not UTF-8) offset in the file, whatever range it is in."""
    before, after = lines(*PAIRS[:4]) + b"\n", lines(*PAIRS[4:])
    path = write(tmp_path, "a.jsonl", mark + before + BAD[name] + after)
    message = both(path, (None, 17, 333))
    assert message.startswith(f"{path}:6:")
    if "UTF-8" in name:
        at = len(mark + before) + (15 if name == "not UTF-8" else 12)
        assert f":6: byte {at} is not UTF-8" in message


UNUSABLE = [PAIRS[0], pair(1, chosen=""), PAIRS[2], pair(3, rejected=" "), *PAIRS[4:], pair(9, tools="x")]


def test_rows_that_cannot_be_used(tmp_path):
    path = write(tmp_path, "a.jsonl", lines(*UNUSABLE))
    message = both(path, (None, 17, 60, 333))
    assert message.startswith(f"{path}:2: 'chosen' is empty") and "2 more rows can't be used (next: " in message
    assert f"(next: {path}:4)" in message and "`bad_rows: skip`" in message
    found = both(path, (None, 17, 60, 333), bad_rows="skip")
    assert [row["place"] for row in found["skipped"]] == [f"{path}:{n}" for n in (2, 4, 10)]
    assert found["places"] == [f"{path}:{n}" for n in (1, 3, 5, 6, 7, 8, 9)]


def test_no_row_that_can_be_used(tmp_path):
    path = write(tmp_path, "a.jsonl", lines(*[pair(n, rejected="") for n in range(5)]))
    assert both(path, (None, 60)).startswith(f"{path}:1: 'rejected' is empty; 4 more rows can't be used")
    assert both(path, (None, 60), bad_rows="skip").startswith(f"{path}: none of 5 rows can be used; {path}:1: ")


def sft(number):
    return {"prompt": f"q {number}", "completion": "a"}


@pytest.mark.parametrize(
    "rows",
    [
        [sft(0), sft(1), {"text": "T"}, sft(3), sft(4)],
        [{"text": "T"}, *map(sft, range(4))],
        [sft(0), {"text": "T"}, {"text": "U"}, {"text": "V"}, sft(4), {"prompt": "q", "completion": ""}],
        [{"prompt": "q", "completion": ""}, {"text": "T"}, sft(2), {"text": "V"}],
    ],
    ids=["one other", "the first is other", "ranges of others", "the first is unusable"],
)
@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_rows_of_mixed_shapes_are_measured_by_the_first_of_the_file(rows, bad_rows, tmp_path):
    """Not by the first of a range, which would refuse the others, or the whole file."""
    path = write(tmp_path, "a.jsonl", lines(*rows))
    found = both(path, (None, 9, 25, 40, 60), "sft", bad_rows)
    assert isinstance(found, str) == (bad_rows == "error")
    if bad_rows == "skip":
        assert len(found["rows"]) + len(found["skipped"]) == len(rows)


# --- other files -----------------------------------------------------------------------------------------------------

SPACED = "[\n {},\r\n\t{} , {}\n]\n "


def packed_zstd(data):
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": packed_zstd}


def csv_of(rows, end="\r\n"):
    import csv

    file = io.StringIO()
    table = csv.DictWriter(file, list(rows[0]), lineterminator=end)
    table.writeheader()
    table.writerows(rows)
    return file.getvalue().encode()


def table_of(rows, kind, chunk=4):
    import pyarrow
    import pyarrow.parquet

    table, sink = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, sink, row_group_size=chunk)
    else:
        with (pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=chunk)
    return sink.getvalue().to_pybytes()


OTHERS = {
    "a.json": json.dumps(PAIRS, indent=1).encode(),
    "spaced.json": SPACED.format(*map(json.dumps, PAIRS[:3])).encode(),
    "mark.json": BOM + json.dumps(PAIRS).encode(),
    "list.jsonl": json.dumps(PAIRS).encode(),
    "a.csv": csv_of([pair(n, 'two\nlines, "quoted"') for n in range(5)]),
    "mark.csv": BOM + csv_of(PAIRS, "\n"),
    "messages.csv": csv_of([{**p, "prompt": json.dumps([{"role": "user", "content": p["prompt"]}])} for p in PAIRS]),
    "a.parquet": table_of(PAIRS, "parquet"),
    "a.arrow": table_of(PAIRS, "file"),
    "stream.arrow": table_of(PAIRS, "stream"),
    **{f"a.jsonl{suffix}": pack(BOM + lines(*PAIRS)) for suffix, pack in PACKERS.items()},
    **{f"a.csv{suffix}": pack(csv_of(PAIRS)) for suffix, pack in PACKERS.items()},
    **{f"a.json{suffix}": pack(json.dumps(PAIRS).encode()) for suffix, pack in PACKERS.items()},
    "utf16.jsonl": lines(*PAIRS).decode().encode("utf-16"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_files(name, tmp_path, monkeypatch):
    path = write(tmp_path, name, OTHERS[name])
    whole = name.startswith("utf16")  # held in memory, whatever its size
    found = outcome(path)
    assert len(found["rows"]) in (len(PAIRS), 5, 3) and found["rows"][0]["place"].startswith(str(path))
    for window in (1, 7, 1 << 20):
        monkeypatch.setattr(list_items, "__defaults__", (window,))
        with as_large(range_bytes=40) as cache:
            assert outcome(path) == found
            assert bool(list(cache.glob("data/*/prepared.json"))) != whole


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("at", [0.4, 0.9], ids=["early", "late"])
def test_a_truncated_archive(suffix, at, tmp_path):
    texts = [pair(n, "".join(map(chr, range(200 + n, 600 + n)))) for n in range(300)]  # several blocks of each format
    content = PACKERS[suffix](lines(*texts))
    path = write(tmp_path, f"a.jsonl{suffix}", content[: int(at * len(content))])
    message = both(path, (None,))
    assert message.startswith(f"{path}: this ") and "archive is damaged or truncated" in message


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", json.dumps(PAIRS).encode()[:-30]),
        ("a.json", json.dumps(PAIRS, indent=1).encode().replace(b'"question 5",', b'"question 5"')),
        ("a.json", json.dumps([*PAIRS, 7]).encode()),
        ("a.json", json.dumps(PAIRS).encode() + b" x"),
        ("a.json", json.dumps(PAIRS, ensure_ascii=False).replace("question 6", "caf\xe9").encode("latin-1", "replace")),
        ("a.json", b'{"prompt": "a",\n "chosen": "b"}'),
        ("a.csv", csv_of(PAIRS) + b"a,b\r\n"),
        ("a.csv", csv_of(PAIRS) + b'"a,b,c\r\n'),
        ("a.csv", csv_of(PAIRS) + b'"a"x,b,c\r\n'),
        ("a.csv", csv_of(PAIRS) + "caf\xe9,b,c\r\n".encode("latin-1")),
        ("a.csv", b"prompt,prompt\r\na,b\r\n"),
        ("a.csv", csv_of([{**PAIRS[0], "prompt": "[{'role': 'user', 'content': 'x'}]"}])),
        ("a.parquet", table_of(PAIRS, "parquet")[:-40]),
        ("a.parquet", table_of(PAIRS, "parquet")[:100] + b"\x55" * 60 + table_of(PAIRS, "parquet")[160:]),
        ("a.jsonl", b"%PDF-1.4 " + b"x" * 200),
        ("a.jsonl", b"<!DOCTYPE html><html>" + b"x" * 200),
        ("a.jsonl", b"\n\n"),
    ],
    ids=["list cut", "comma missing", "number in list", "rest after list", "list not UTF-8", "object over lines", "fields",
         "open quote", "quote inside", "csv not UTF-8", "header twice", "Python syntax", "parquet cut", "parquet damaged", "PDF",
         "HTML", "no rows"],
)  # fmt: skip
def test_damaged_files(name, content, tmp_path):
    path = write(tmp_path, name, content)
    message = both(path, (None, 40))
    assert isinstance(message, str) and message.startswith(str(path)) and "\n" not in message


def test_a_file_is_not_read_into_memory(tmp_path, monkeypatch):
    """No reader of a large file asks for all of its bytes."""
    from rlhf.data import raw

    for name in ("a.json", "a.csv", "a.jsonl.gz", "a.parquet"):
        path = write(tmp_path, name, OTHERS[name])
        with as_large(range_bytes=40):
            monkeypatch.setattr(raw.Path, "read_bytes", lambda self: pytest.fail(f"{self} was read whole"))
            assert len(prepare(load_source(str(path)), "pairs").rows) in (len(PAIRS), 5)
            monkeypatch.undo()


def test_a_format_that_is_unknown_is_told_before_processes_start(tmp_path):
    path = write(tmp_path, "a.jsonl", b"not JSON\n" * 50)
    with as_large(range_bytes=60, processes=True), pytest.raises(UserError, match=":1:1: not valid JSON"):
        prepare(load_source(str(path)), "pairs")
