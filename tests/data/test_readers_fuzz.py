"""Random damage to valid data files: rows, or one sentence; never a traceback."""

import gzip
import io
import json
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.data.sources import load_source
from rlhf.errors import UserError

ROWS = [{"prompt": f"q{i} ä😀", "chosen": [{"role": "assistant", "content": "a\n"}], "margin": i} for i in range(4)]


@cache
def valid(kind):
    """The bytes of a valid file of this kind."""
    lines = "".join(json.dumps(row, ensure_ascii=bool(i % 2)) + "\n" for i, row in enumerate(ROWS))
    if kind == "jsonl":
        return lines.encode()
    if kind == "json":
        return json.dumps(ROWS, indent=1).encode()
    if kind == "jsonl.gz":
        return gzip.compress(lines.encode())
    if kind == "csv":
        return 'prompt,chosen\n"a, ""b""\nc","[{""role"": ""assistant"", ""content"": ""x""}]"\nä,f\n'.encode()
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    return file.getvalue()


KINDS = ("jsonl", "json", "jsonl.gz", "csv", "parquet")
DAMAGE = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(("flip", "cut", "insert", "delete")), st.binary(max_size=4)),
    min_size=1, max_size=4,
)  # fmt: skip


def damaged(data, changes):
    for where, how, piece in changes:
        at = int(where * len(data))
        if how == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (piece or b"\x01")[0]]) + data[at + 1 :]
        elif how == "cut":
            data = data[:at]
        elif how == "insert":
            data = data[:at] + piece + data[at:]
        elif how == "delete":
            data = data[:at] + data[at + len(piece) :]
    return data


def check(folder, kind, changes):
    path = folder / f"a.{kind}"
    path.write_bytes(damaged(valid(kind), changes))
    try:
        rows = load_source(str(path)).rows
    except UserError as error:
        assert str(error).startswith(str(path)) and len(str(error)) < 700
    else:
        json.dumps(rows, ensure_ascii=False, default=repr).encode("utf-8")  # can be written: no lone surrogate


@pytest.mark.parametrize("kind", KINDS)
def test_valid_file(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(valid(kind))
    assert len(load_source(str(path)).rows) == (2 if kind == "csv" else len(ROWS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


FAST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@given(kind=st.sampled_from(KINDS), changes=DAMAGE)
@FAST
def test_damaged_file_is_read_or_refused(folder, kind, changes):
    check(folder, kind, changes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(changes=DAMAGE)
@settings(FAST, max_examples=2000)
def test_damaged_file_is_read_or_refused_long(folder, kind, changes):
    check(folder, kind, changes)


def test_every_byte_of_a_parquet_file_may_flip(folder):
    """200 single flips, spread evenly over the file."""
    for i in range(200):
        check(folder, "parquet", [(i / 200, "flip", bytes([1 << i % 8]))])
