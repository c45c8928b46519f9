"""Damaged, disguised, packed and misplaced data: read right, or refused in one sentence that names the fix."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import pickle

import pytest
from canonical import preference_rows

from rlhf.data import folders, raw
from rlhf.data.pairs import FILES, write_pair_files
from rlhf.data.sources import SAMPLE_NAME, Source, load_source
from rlhf.errors import UserError

ROW = '{"a": "ä€😀"}\n'
ROWS = [{"a": "ä€😀"}]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    """What `datasets` writes while it reads a folder goes into the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))
    return datasets


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def error_of(name, split=None, **more):
    with pytest.raises(UserError) as caught:
        load_source(str(name), split, **more)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


# --- JSON ------------------------------------------------------------------------------------------------------------

LONG = "1" * 5000


@pytest.mark.parametrize(
    "line, column, words",
    [
        ('{"a": ' + "[" * 3000 + "]" * 3000 + "}", 1, "nested lists and objects"),
        ('{"a": ' + "[" * 150 + "]" * 150 + "}", 106, "more than 100 nested lists and objects"),  # 1 object + 99 lists are 100
        ('{"a": "1", "b": ' + LONG + "}", 17, "an integer of thousands of digits"),
        (r'{"a": "x\ud800y"}', 9, r"\ud800 is a lone surrogate"),
        (r'{"a": "\\ \udc00"}', 11, r"\udc00 is a lone surrogate"),
        (r'{"a": "\ud83d\ud83d\ude00"}', 8, r"\ud83d is a lone surrogate"),
        ('{"a": 1, "b": {"c": 2, "c": 3}}', 24, "key 'c' is set twice in one object"),
        ('{"a": "NaN", "b": NaN}', 19, "NaN is not JSON; write null"),
        ('{"a": -Infinity}', 7, "-Infinity is not JSON"),
        ("\x00\x00\x00\x00", 1, "only NUL characters"),
        ('{"a": 1} {"a": 2}', 10, "not valid JSON: Extra data"),
        ('{"a": 1', 8, "not valid JSON"),
    ],
    ids=["3000 deep", "150 deep", "digits", "surrogate", "lower half", "two upper", "key twice", "NaN", "infinity", "NUL",
         "two rows", "cut"],
)  # fmt: skip
def test_json_that_python_reads_or_trips_over(tmp_path, line, column, words):
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n' + line + "\n")
    message = error_of(path)
    assert message.startswith(f"{path}:2:{column}: ") and words in message
    path = write(tmp_path, "a.json", '[{"a": 1},\n' + line + "]")
    assert error_of(path).startswith(f"{path}:2:")


def test_both_halves_of_a_character_are_one(tmp_path):
    path = write(tmp_path, "a.jsonl", r'{"a": "\ud83d\ude00 \\ud800"}')
    assert load_source(path).rows == [{"a": "😀 \\ud800"}]


def test_a_hundred_lists_beside_each_other_are_not_deep(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps({"a": [[i] for i in range(200)], "b": "[" * 200}))
    assert len(load_source(path).rows[0]["a"]) == 200


def test_long_key_is_not_echoed(tmp_path):
    key = json.dumps("k" * 10**6)
    assert "set twice" in error_of(write(tmp_path, "a.jsonl", f"{{{key}: 1, {key}: 2}}"))


@pytest.mark.parametrize("text, rows", [("[]", None), ("[ ]\n", None), (' [{"a": 1} , {"a": 2}]\n', 2)])
def test_json_lists(tmp_path, text, rows):
    path = write(tmp_path, "a.json", text)
    assert len(load_source(path).rows) == rows if rows else "has no rows" in error_of(path)


@pytest.mark.parametrize("text", ["[", '[{"a": 1},]', '[{"a": 1}', '[{"a": 1} {"a": 2}]', '[{"a": 1}] x', "[,]"])
def test_json_list_cut_or_with_too_much(tmp_path, text):
    path = write(tmp_path, "a.json", text)
    assert error_of(path).startswith(f"{path}:1:") and "not valid JSON: " in error_of(path)


@pytest.mark.parametrize("margin", [int("1" * 400), float("nan"), float("inf")], ids=["400 digits", "nan", "inf"])
def test_margin_that_is_no_finite_number(margin):
    with pytest.raises(UserError, match="f:3: 'margin' is .{1,80}; expected a finite number"):
        preference_rows(Source("f", [{"prompt": "q", "chosen": "a", "rejected": "b", "margin": margin}], [3], "d"))


# --- packed and other encodings --------------------------------------------------------------------------------------


def zstd(data):
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files(tmp_path, suffix):
    for name, text in (("a.jsonl", ROW), ("a.json", f"[{ROW}]"), ("a.csv", "a\nä€😀\n")):
        assert load_source(write(tmp_path, name + suffix, PACKERS[suffix](text.encode()))).rows == ROWS


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_file_that_is_cut_or_damaged(tmp_path, suffix):
    data = PACKERS[suffix]("".join(json.dumps({"a": str(i**7)}) + "\n" for i in range(3000)).encode())
    path = write(tmp_path, f"a.jsonl{suffix}", data[: len(data) // 2])
    assert error_of(path).startswith(f"{path}: this ")
    path = write(tmp_path, f"a.jsonl{suffix}", data[:500] + bytes(100) + data[600:])
    assert error_of(path).startswith(path)


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_bomb(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(raw, "ALWAYS_ALLOWED_BYTES", 2**20)
    path = write(tmp_path, f"a.jsonl{suffix}", PACKERS[suffix](bytes(20 * 2**20)))
    assert "unlike real data" in error_of(path)


def test_missing_packed_file_is_a_file(tmp_path):
    assert error_of("none.jsonl.gz").startswith("no data file at none.jsonl.gz")


@pytest.mark.parametrize("name, text", [("a.jsonl", ROW), ("a.csv", "a\nä€😀\n")])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_encodings(tmp_path, name, text, encoding):
    assert load_source(write(tmp_path, name, text.encode(encoding))).rows == ROWS


def test_utf16_cut_in_a_character(tmp_path):
    path = write(tmp_path, "a.jsonl", codecs.BOM_UTF16_LE + ROW.encode("utf-16-le")[:-1])
    assert "UTF-16" in error_of(path)


def test_latin1_names_line_offset_and_command(tmp_path):
    path = write(tmp_path, "a.jsonl", b'{"a": "x"}\n{"a": "\xe4"}\n')
    assert error_of(path).startswith(f"{path}:2: byte 18 is not UTF-8; ") and "iconv -f latin1" in error_of(path)


# --- files of another kind -------------------------------------------------------------------------------------------

DISGUISED = {
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "git-annex pointer": (b"/annex/objects/SHA256E-s1--0.jsonl\n", "git annex get"),
    "HTML page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "download it again"),
    "XML file": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "download it again"),
    "a PDF": (b"%PDF-1.7\n", "save the rows"),
    "zip archive": (b"PK\x03\x04" + bytes(60), "unpack it"),
    "Excel workbook": (b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml", "save the rows"),
    "PyTorch file": (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl", "save the rows"),
    "a pickle": (pickle.dumps([{"a": 1}]), "save the rows"),
    "tar archive": (b"x" * 257 + b"ustar" + bytes(100), "unpack it"),
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.parquet", "a.jsonl.gz"])
@pytest.mark.parametrize("kind", DISGUISED)
def test_other_kinds_are_named_with_the_fix(tmp_path, kind, name):
    content, fix = DISGUISED[kind]
    path = write(tmp_path, name, gzip.compress(content) if name.endswith(".gz") else content)
    message = error_of(path, where="r.yaml:3")
    assert message.startswith(f"r.yaml:3: {path} is a") and kind.removeprefix("a ") in message and fix in message


def test_annex_link_without_its_data(tmp_path):
    (tmp_path / "a.jsonl").symlink_to(".git/annex/objects/x/y")
    assert "git annex get" in error_of(tmp_path / "a.jsonl")


# --- CSV -------------------------------------------------------------------------------------------------------------


def test_csv_column_twice(tmp_path):
    path = write(tmp_path, "a.csv", "prompt,chosen,prompt\na,b,c\n")
    assert error_of(path) == f"{path}:1: column 'prompt' is twice in the header; rename or remove one"


def test_csv_quote_that_is_never_closed(tmp_path):
    path = write(tmp_path, "a.csv", 'prompt,chosen\na,"b\nc,d\ne,f\n')
    assert error_of(path).startswith(f"{path}:4: not valid CSV: unexpected end of data")


MESSAGES = [{"role": "user", "content": 'say "hi", it\'s me'}]


def test_csv_messages_as_json(tmp_path):
    field = '"' + json.dumps(MESSAGES).replace('"', '""') + '"'
    path = write(tmp_path, "a.csv", f"prompt,other\n{field},{field}\n[{{x}}] is a text,b\n[1],c\n")
    rows = load_source(path).rows
    assert [r["prompt"] for r in rows] == [MESSAGES, "[{x}] is a text", "[1]"] and isinstance(rows[0]["other"], str)


def test_csv_messages_as_python(tmp_path):
    field = '"' + repr(MESSAGES).replace('"', '""') + '"'
    path = write(tmp_path, "a.csv", f"prompt,chosen\na,b\n{field},x\n")
    message = error_of(path)
    assert message.startswith(f"{path}:3: column 'prompt' has messages in Python syntax") and "json.dumps" in message


# --- Parquet and Arrow -----------------------------------------------------------------------------------------------


def parquet(folder, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    return str(folder / "a.parquet")


def test_parquet_bytes_that_are_no_utf8(tmp_path):
    import pyarrow

    binary = pyarrow.array([b"ok", b"\xff\xfe"])
    text = pyarrow.StringArray.from_buffers(2, *binary.buffers()[1:])
    path = parquet(tmp_path, prompt=text)
    assert error_of(path).startswith(f"{path}, row 2: column 'prompt' can't be read: ")
    assert load_source(parquet(tmp_path, prompt=["a", "b"], note=text)).rows[0] == {"prompt": "a", "note": None}


def test_parquet_date_beyond_python(tmp_path):
    import pyarrow

    path = parquet(tmp_path, prompt=["a"], day=pyarrow.array([2**30], pyarrow.int32()).cast(pyarrow.date32()))
    assert load_source(path).rows == [{"prompt": "a", "day": None}]


def test_arrow_files(tmp_path):
    import pyarrow

    table = pyarrow.table({"a": ["ä€😀"]})
    for name, make in (("a.arrow", pyarrow.ipc.new_file), ("b.arrow", pyarrow.ipc.new_stream)):
        with make(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert load_source(str(tmp_path / name)).rows == ROWS
        data = (tmp_path / name).read_bytes()
        path = write(tmp_path, name, data[: len(data) // 3])
        assert error_of(path).startswith(f"{path} is not a readable Arrow file: ")


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [None, "train"])
def test_single_file_has_one_split(tmp_path, split):
    path = write(tmp_path, "a.jsonl", ROW)
    assert load_source(path, split).rows == ROWS
    assert load_source(path, None, default_split="test").rows == ROWS  # what `rlhf evaluate` asks for


def test_single_file_has_no_other_split(tmp_path):
    path = write(tmp_path, "a.jsonl", ROW)
    message = error_of(path, "heldout", where="r.yaml:9")
    assert message.startswith(
        f"r.yaml:9: {path} has no split 'heldout': a single file has one split; use `heldout: 0.05`"
    )


def test_recipe_with_a_split_that_its_file_does_not_have(tmp_path, recipe, capsys):
    from rlhf.__main__ import main

    path = write(tmp_path, "a.jsonl", json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}))
    values = dict(dataset_name=path, model_name_or_path="m", output_dir=str(tmp_path / "out"))
    assert main(["dpo", recipe("dpo", dataset_test_split="hello", **values), "--check"]) == 2
    assert "has no split 'hello': a single file has one split" in capsys.readouterr().err
    other = write(tmp_path, "b.jsonl", json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}))
    assert main(["dpo", recipe("dpo", eval_dataset_name=other, **values), "--check"]) == 2
    assert "'m' is not a local folder" in capsys.readouterr().err  # the data is right; the model isn't there
    evaluation = dict(dataset_name=path, sft_model="m", dpo_model="d", output_dir=str(tmp_path / "e"))
    main(["evaluate", recipe("evaluate", **evaluation), "--check"])
    assert "has no split" not in capsys.readouterr().err


def test_saved_set_has_one_split(tmp_path, datasets_cache):
    datasets_cache.Dataset.from_list([{"a": 1}]).save_to_disk(tmp_path / "d")
    assert load_source(str(tmp_path / "d"), default_split="test").rows == [{"a": 1}]
    assert error_of(tmp_path / "d", "heldout") == f"{tmp_path / 'd'} has no split 'heldout'; it has train"


# --- folders ---------------------------------------------------------------------------------------------------------


def test_folder_with_two_files_for_a_split(tmp_path):
    for name in ("train.jsonl", "train.csv", "train.json.gz"):
        write(tmp_path, name, ROW)
    expected = f"{tmp_path} has several files for the split 'train': train.jsonl, train.json.gz, train.csv; name one"
    assert error_of(tmp_path) == expected


def test_folder_with_packed_split(tmp_path):
    write(tmp_path, "train.jsonl.gz", gzip.compress(ROW.encode()))
    assert load_source(str(tmp_path)).rows == ROWS


def never(*args, **kwargs):
    raise AssertionError("datasets must not be asked")


@pytest.mark.parametrize("circle", [False, True])
def test_large_folder_is_not_walked(tmp_path, monkeypatch, datasets_cache, circle):
    monkeypatch.setattr(datasets_cache, "load_dataset", never)
    monkeypatch.setattr(folders, "MAX_ENTRIES", 30)
    for i in range(8):
        write(tmp_path, f"{i}/x.jsonl", ROW)
    if circle:
        (tmp_path / "0" / "up").symlink_to(tmp_path)
    else:
        for i in range(30):
            write(tmp_path, f"7/{i}.csv", "a\n1\n")
    message = error_of(tmp_path)
    assert "more than 30 files and folders" in message and "expected a file named after the split" in message


def test_folder_with_a_link_that_can_not_be_followed(tmp_path):
    """As /proc/1/cwd is for a user; asking whether it is a folder raises."""
    (tmp_path / "a").symlink_to("a")
    assert "found 1 no suffix; expected" in error_of(tmp_path)


def test_folder_of_other_files_is_not_walked(tmp_path, monkeypatch, datasets_cache):
    monkeypatch.setattr(datasets_cache, "load_dataset", never)
    write(tmp_path, "a.py", "raise SystemExit(9)")
    write(tmp_path, "b/c.png", b"")
    assert "found 1 .py, 1 .png; expected a file named after the split" in error_of(tmp_path)


def test_script_of_a_data_set_is_refused_by_name(tmp_path, monkeypatch, datasets_cache):
    monkeypatch.setattr(datasets_cache, "load_dataset", never)
    write(tmp_path, "d/d.py", f"open({str(tmp_path / 'run')!r}, 'w')")
    write(tmp_path, "d/x.jsonl", ROW)
    assert error_of(tmp_path / "d").startswith(f"{tmp_path / 'd' / 'd.py'} is a dataset script, and dataset code")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["dataset_info.json", "state.json", "dataset_dict.json"])
@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[1]",
        "",
        "nope",
        "[" * 3000,
        '{"splits": 3, "_data_files": 3}',
        '{"splits": [1], "_data_files": [1]}',
        None,
    ],
)
def test_damaged_saved_folder(tmp_path, datasets_cache, file, content):
    datasets_cache.DatasetDict(train=datasets_cache.Dataset.from_list([{"a": 1}])).save_to_disk(tmp_path / "d")
    path = tmp_path / "d" / ("" if file == "dataset_dict.json" else "train") / file
    path.unlink() if content is None else path.write_text(content)
    try:
        assert load_source(str(tmp_path / "d")).rows == [{"a": 1}]
    except UserError as error:
        assert "\n" not in str(error) and str(tmp_path / "d") in str(error)
    else:
        assert file != "state.json" and (content or "{").startswith("{")


def test_reading_a_folder_writes_nothing_into_it(tmp_path):
    write(tmp_path, "d/x.jsonl", ROW)
    load_source(str(tmp_path / "d"))
    assert os.listdir(tmp_path / "d") == ["x.jsonl"]


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".jsonl", "a/" * 3000, "~/" + "b" * 5000, "a\0b.jsonl", "\0"])
def test_name_that_can_be_no_path(name):
    message = error_of(name, where="r.yaml:2")
    assert message.startswith("r.yaml:2: '") and ("too long" in message or "can't be a path" in message)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "/proc/self/mem", "/proc/self/environ"])
def test_devices_and_kernel_files(name):
    assert f"{name} is a " in error_of(name)


def test_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    assert "is a pipe" in error_of(tmp_path / "a.jsonl")


def test_file_without_permission(tmp_path, monkeypatch):
    path = write(tmp_path, "a.jsonl", ROW)

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refused)  # root may read everything
    assert error_of(path) == f"{path} can't be read: Permission denied"


def test_link_to_itself(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("a.jsonl")
    assert "can't be read" in error_of(tmp_path / "a.jsonl")


def test_folder_where_a_file_is_expected(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    assert "a.jsonl has no readable dataset: found no files" in error_of(tmp_path / "a.jsonl")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a.jsonl", ROW)
    assert load_source("~/a.jsonl").rows == ROWS
    write_pair_files(SAMPLE_NAME, "~/out", limit=1)
    assert (tmp_path / "out" / FILES[0]).is_file()


@pytest.mark.parametrize("output", ["in.jsonl/sub", "x" * 300, "a\0b", "in.jsonl"])
def test_pairs_into_what_can_be_no_folder(tmp_path, output):
    path = write(tmp_path, "in.jsonl", json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}))
    with pytest.raises(UserError) as caught:
        write_pair_files(path, str(tmp_path / output) if "\0" not in output else output)
    assert len(str(caught.value)) < 600 and os.listdir(tmp_path) == ["in.jsonl"]


def test_file_is_read_once(tmp_path, monkeypatch):
    from pathlib import Path

    path, reads, read = write(tmp_path, "a.jsonl", ROW), [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self) or read(self))
    load_source(path)
    assert len(reads) == 1


def test_a_damaged_arrow_file_is_refused_before_arrow_aborts(tmp_path, datasets_cache):
    """Bytes in the middle of a saved file: `datasets` would read past the buffers, which ends the process."""
    datasets_cache.Dataset.from_list([{"prompt": f"q{i}", "chosen": "a" * 50} for i in range(50)]).save_to_disk(
        tmp_path / "d"
    )
    file = next((tmp_path / "d").glob("*.arrow"))
    whole = file.read_bytes()
    told = set()
    for start in range(0, len(whole), max(1, len(whole) // 40)):
        file.write_bytes(whole[:start] + b"\xff" * 8 + whole[start + 8 :])
        try:
            load_source(str(tmp_path / "d"))
        except UserError as error:
            told.add(str(error).split(":")[0])
    assert any("is not a readable Arrow file" in text for text in told)
