"""Rows from every kind of place and of every shape, and the exact sentence for those that can't be read."""

import json
import os

import pytest
from canonical import join_chosen_rejected, preference_rows, sft_rows
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlhf.data.messages import INVISIBLE
from rlhf.data.pair_rows import PREFERENCE_SHAPES
from rlhf.data.pairs import FILES, write_pair_files
from rlhf.data.sft_rows import SFT_SHAPES
from rlhf.data.sources import SAMPLE_DIR, SAMPLE_NAME, Source, load_source
from rlhf.errors import UserError


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def load_error(name, split="train", **more):
    with pytest.raises(UserError) as caught:
        load_source(str(name), split, **more)
    return str(caught.value)


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """What `datasets` writes while it reads a folder goes into the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    return datasets


# --- sources: files --------------------------------------------------------------------------------------------------


def test_jsonl_skips_blank_lines_and_a_byte_order_mark(tmp_path):
    path = write(tmp_path, "a.jsonl", '\ufeff{"a": 1}\n\n  \n{"a": 2}\r\n')
    source = load_source(path)
    assert (source.rows, source.lines) == ([{"a": 1}, {"a": 2}], [1, 4])


def test_jsonl_row_may_hold_unicode_line_separators(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": "x\u2028y\x85z"}\n{"a": 2}\n')
    source = load_source(path)
    assert (source.rows, source.lines) == ([{"a": "x\u2028y\x85z"}, {"a": 2}], [1, 2])


def test_where_is_file_and_line(tmp_path):
    path = write(tmp_path, "a.jsonl", '\n{"a": 1}\n')
    assert load_source(path).where(0) == f"{path}:2"


def test_json_list_counts_rows_from_1(tmp_path):
    path = write(tmp_path, "a.json", '\n[{"a": 1},\n {"a": 2}]')
    source = load_source(path)
    assert (source.rows, source.where(1)) == ([{"a": 1}, {"a": 2}], f"{path}, row 2")


def test_json_file_may_have_an_object_a_line(tmp_path):
    assert load_source(write(tmp_path, "a.json", '{"a": 1}\n{"a": 2}\n')).rows == [{"a": 1}, {"a": 2}]


def test_csv_with_commas_quotes_and_line_breaks_in_fields(tmp_path):
    path = write(tmp_path, "a.csv", 'prompt,chosen\n"a, ""b""\nc",d\ne,f\n')
    source = load_source(path)
    assert source.rows == [{"prompt": 'a, "b"\nc', "chosen": "d"}, {"prompt": "e", "chosen": "f"}]
    assert source.where(1) == f"{path}:4"  # the row before takes lines 2 and 3


def test_csv_with_byte_order_mark(tmp_path):
    assert load_source(write(tmp_path, "a.csv", "\ufeffprompt,chosen\na,b\n")).rows == [{"prompt": "a", "chosen": "b"}]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"], ids=ascii)
def test_csv_field_may_hold_unicode_line_separators(tmp_path, separator):
    """str.splitlines cuts there, a CSV file does not."""
    path = write(tmp_path, "a.csv", f"prompt,chosen\na{separator}b,c\n")
    assert load_source(path).rows == [{"prompt": f"a{separator}b", "chosen": "c"}]


def test_csv_field_may_be_long(tmp_path):
    text = "x" * 140_000  # the csv module stops at 131072 unless told otherwise
    assert load_source(write(tmp_path, "a.csv", f"prompt,chosen\n{text},c\n")).rows[0]["prompt"] == text


@pytest.mark.parametrize("line", ["Hello, you,c", "Hello"], ids=["too many fields", "too few fields"])
def test_csv_row_of_another_length_than_the_header(tmp_path, line):
    """An unquoted comma would otherwise move half of the prompt into the answer, in silence."""
    path = write(tmp_path, "a.csv", f"prompt,chosen\na,b\n{line}\n")
    assert load_error(path).startswith(f"{path}:3:")


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2], "b": [["x"], None]}), path)
    source = load_source(path)
    assert (source.rows, source.where(1)) == ([{"a": 1, "b": ["x"]}, {"a": 2, "b": None}], f"{path}, row 2")


def test_file_that_is_no_parquet(tmp_path):
    path = write(tmp_path, "a.parquet", "nope")
    assert load_error(path, where="r.yaml:4").startswith(f"r.yaml:4: {path} is not a readable parquet file: ")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(tmp_path, name, content):
    path = write(tmp_path, name, content)
    assert load_error(path) == f"{path} has no rows; expected one example per line"


@pytest.mark.parametrize("name, content", [("a.json", "[]"), ("a.csv", "prompt,chosen\n"), ("a.csv", "")])
def test_file_without_rows(tmp_path, name, content):
    path = write(tmp_path, name, content)
    assert load_error(path, where="r.yaml:4") == f"r.yaml:4: {path} has no rows; expected one example per line"


def test_broken_json_line_names_line_and_column(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n\n{"a" 2}\n')  # the 2 stands in column 6
    assert load_error(path) == f"{path}:3:6: not valid JSON: Expecting ':' delimiter"


def test_broken_json_list_names_line_and_column(tmp_path):
    path = write(tmp_path, "a.json", '[{"a": 1},\n {"a" 2}]')
    assert load_error(path) == f"{path}:2:7: not valid JSON: Expecting ':' delimiter"


def test_line_that_is_no_object(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n"text"\n')
    assert load_error(path) == f"{path}:2: expected a JSON object, found str"


def test_list_item_that_is_no_object(tmp_path):
    path = write(tmp_path, "a.json", '[{"a": 1}, 3]')
    assert load_error(path) == f"{path}, row 2: expected a JSON object, found int"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with byte order mark"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_not_utf8_names_the_line(tmp_path, name, mark):
    path = write(tmp_path, name, mark + b'{"a": 1}\n\xff\n')  # 9 bytes in the first line
    assert load_error(path).startswith(f"{path}:2: byte {len(mark) + 9} is not UTF-8; save the file as UTF-8 (")


def test_missing_file_lists_the_near_ones(tmp_path):
    for name in ("b.csv", "a.jsonl", "notes.txt"):
        write(tmp_path, name, "x")
    path = tmp_path / "c.jsonl"
    assert load_error(path) == f"no data file at {path}; {tmp_path} has a.jsonl, b.csv"


def test_missing_file_in_a_folder_without_data(tmp_path):
    assert load_error(tmp_path / "c.jsonl") == f"no data file at {tmp_path / 'c.jsonl'}"


def test_missing_folder(tmp_path):
    path = tmp_path / "none" / "c.jsonl"
    assert load_error(path) == f"no data file at {path}; the folder {tmp_path / 'none'} does not exist"


@pytest.mark.parametrize("name", FILES)
def test_missing_pair_file_says_how_to_write_it(tmp_path, name):
    expected = f"; write it with `rlhf pairs DATASET --output_dir {tmp_path}` (DATASET: embedded:sample, or your pairs)"
    assert load_error(tmp_path / name) == f"no data file at {tmp_path / name}{expected}"


def test_missing_file_names_who_asked(tmp_path):
    assert load_error(tmp_path / "c.jsonl", where="r.yaml:4").startswith("r.yaml:4: no data file at ")


def test_digest_is_that_of_the_file(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n')
    # printf '{"a": 1}\n' | sha256sum
    assert load_source(path).digest == "e8c628edc9968ef0c668f54e0ba2636b35503357eb1aca0ddc828aeace432f67"


def test_head_takes_the_first_rows_with_their_lines():
    source = Source("f", [{"a": 1}, {"a": 2}], [3, 5], "d").head(1)
    assert (source.rows, source.where(0)) == ([{"a": 1}], "f:3")


def test_head_of_none_is_everything():
    assert len(Source("f", [{"a": 1}, {"a": 2}], None, "d").head(None).rows) == 2


# --- sources: folders and the hub ------------------------------------------------------------------------------------


def test_embedded_sample_is_the_file_of_its_split():
    assert load_source(SAMPLE_NAME, "heldout").name == str(SAMPLE_DIR / "heldout.jsonl")


def test_folder_with_a_file_a_split(tmp_path):
    write(tmp_path, "d/train.jsonl", '{"a": 1}\n')
    write(tmp_path, "d/test.csv", "a\n2\n")
    assert load_source(str(tmp_path / "d"), "test").rows == [{"a": "2"}]


def test_folder_without_the_split(tmp_path, datasets_cache):
    write(tmp_path, "d/train.jsonl", '{"a": 1}\n')
    assert load_error(tmp_path / "d", "heldout") == f"{tmp_path / 'd'} has no split 'heldout'; it has train"


def test_folder_without_data(tmp_path, datasets_cache):
    (tmp_path / "d").mkdir()
    message = load_error(tmp_path / "d", where="r.yaml:4")
    assert message.startswith(f"r.yaml:4: {tmp_path / 'd'} has no readable dataset: ")


def test_saved_dataset(tmp_path, datasets_cache):
    datasets_cache.Dataset.from_list([{"a": 1}, {"a": 2}]).save_to_disk(tmp_path / "d")
    source = load_source(str(tmp_path / "d"))
    assert (source.rows, source.where(1)) == ([{"a": 1}, {"a": 2}], f"{tmp_path / 'd'} (train), row 2")


def test_saved_dataset_dict(tmp_path, datasets_cache):
    parts = {split: datasets_cache.Dataset.from_list([{"a": split}]) for split in ("train", "test")}
    datasets_cache.DatasetDict(parts).save_to_disk(tmp_path / "d")
    assert load_source(str(tmp_path / "d"), "test").rows == [{"a": "test"}]


def test_saved_dataset_dict_without_the_split(tmp_path, datasets_cache):
    parts = {split: datasets_cache.Dataset.from_list([{"a": split}]) for split in ("train", "test")}
    datasets_cache.DatasetDict(parts).save_to_disk(tmp_path / "d")
    message = load_error(tmp_path / "d", "dev", where="r.yaml:4")
    assert message == f"r.yaml:4: {tmp_path / 'd'} has no split 'dev'; it has train, test"


def test_digest_of_rows_without_a_file_follows_their_content(tmp_path, datasets_cache):
    digests = []
    for number in (1, 2, 1):
        folder = tmp_path / f"d{len(digests)}"
        datasets_cache.Dataset.from_list([{"a": number}]).save_to_disk(folder)
        digests.append(load_source(str(folder)).digest)
    assert (digests[0] == digests[2], digests[0] == digests[1]) == (True, False)


def test_hub_data_set_without_a_network_is_one_sentence(datasets_cache):
    message = load_error("some-org/some-data", where="r.yaml:4")
    start = "r.yaml:4: 'some-org/some-data' is not a local file or directory and could not be loaded from the hub: "
    assert message.startswith(start) and "\n" not in message


@pytest.mark.parametrize("name", ["two words", "a/b/c", "s3://bucket/data"])
def test_name_that_can_be_nothing(name):
    assert load_error(name) == f"'{name}' is neither a file, nor a directory, nor the id of a dataset on the hub"


# --- formats: SFT ----------------------------------------------------------------------------------------------------

LINE = 7  # of the one row in `one`


def one(row):
    return Source("f.jsonl", [row], [LINE], "digest")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "S"}
Q, A = [user("Q")], [assistant("A")]
SFT_CASES = {
    "prompt + completion": {"prompt": "Q", "completion": "A"},
    "prompt + completion, messages": {"prompt": Q, "completion": A},
    "prompt + chosen": {"prompt": "Q", "chosen": "A"},
    "prompt + chosen (+ rejected)": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "prompt + response": {"prompt": "Q", "response": "A"},
    "messages": {"messages": [*Q, *A]},
    "conversations": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "instruction + output": {"instruction": "Q", "output": "A"},
    "instruction + empty input + output": {"instruction": "Q", "input": "", "output": "A"},
    "question + answer": {"question": "Q", "answer": "A"},
    "spaces around": {"prompt": " Q\n", "completion": "\n \n A \n"},
    "one message as answer": {"prompt": "Q", "completion": {"role": "assistant", "content": "A"}},
    "whole dialogues": {"chosen": [*Q, *A], "rejected": [*Q, assistant("B")]},
    "other columns and nulls": {"id": 3, "messages": None, "prompt": "Q", "completion": "A"},
}


@pytest.mark.parametrize("row", SFT_CASES.values(), ids=SFT_CASES)
def test_sft_shape(row):
    assert sft_rows(one(row)) == [{"prompt": Q, "completion": A}]


def test_alpaca_input_follows_the_instruction():
    row = {"instruction": "Translate.", "input": " Guten Tag ", "output": "Good day"}
    assert sft_rows(one(row))[0]["prompt"] == [user("Translate.\n\nGuten Tag")]


def test_text_stays_text():
    assert sft_rows(one({"text": " once \n"})) == [{"text": "once"}]


def test_dialogue_of_several_answers_stays_messages():
    messages = [SYSTEM, *Q, *A, user("Q2"), assistant("A2")]
    assert sft_rows(one({"messages": messages})) == [{"messages": messages}]


def test_system_message_belongs_to_the_prompt():
    assert sft_rows(one({"messages": [SYSTEM, *Q, *A]})) == [{"prompt": [SYSTEM, *Q], "completion": A}]


def test_message_keeps_what_templates_read_only():
    row = {"messages": [{**user("Q"), "id": 1, "name": "Ann"}, {**assistant("A"), "time": "x"}]}
    assert sft_rows(one(row)) == [{"prompt": [{**user("Q"), "name": "Ann"}], "completion": A}]


@pytest.mark.parametrize(
    "name", ["prompt + completion", "prompt + chosen", "messages", "conversations", "question + answer", "text"]
)
def test_every_named_shape_has_a_test(name):
    assert name in SFT_SHAPES.split("; ") and (name in SFT_CASES or name == "text")


def sft_error(row):
    with pytest.raises(UserError) as caught:
        sft_rows(one(row))
    return str(caught.value)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"a": 1, "b": 2}, f"found columns a, b; expected one of: {SFT_SHAPES}"),
        ({}, f"found columns none; expected one of: {SFT_SHAPES}"),
        ({"prompt": "Q"}, f"found columns prompt; expected one of: {SFT_SHAPES}"),
        ({"prompt": "Q", "completion": None}, f"found columns prompt, completion; expected one of: {SFT_SHAPES}"),
        ({"prompt": " ", "completion": "A"}, "'prompt' is empty"),
        ({"prompt": "Q", "completion": "\n"}, "'completion' is empty"),
        ({"instruction": "", "output": "A"}, "'instruction' is empty"),
        ({"text": ""}, "'text' is empty"),
        ({"text": 5}, "'text' is int '5'; expected a string"),
        ({"prompt": 5, "completion": "A"}, "'prompt' is int '5'; expected a string or a list of messages"),
        ({"prompt": [], "completion": "A"}, "'prompt' is list '[]'; expected a string or a list of messages"),
        ({"prompt": "Q", "completion": 5}, "'completion' is int '5'; expected a string or a list of messages"),
        ({"messages": "hello"}, "'messages' is str 'hello'; expected a string or a list of messages"),
        ({"messages": Q}, "'messages' ends with a user message; the last one must be the assistant's"),
        ({"messages": [*Q, assistant("")]}, "'messages, message 2' is empty"),
        (
            {"messages": [*Q, {"role": "assistant"}]},
            "'messages', message 2: expected {'role': …, 'content': …}, found dict ",
        ),
        ({"messages": ["hi"]}, "'messages', message 1: expected {'role': …, 'content': …}, found str 'hi'"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "'messages', message 1: role 'bot'; expected one of system, developer, user, assistant, tool; `roles: {bot: assist",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "'messages, message 1' is int '3'; expected a string"),
        (
            {"prompt": [*Q, *A], "completion": "A"},
            "'prompt' ends with an assistant message; it must end with the user's",
        ),
        (
            {"prompt": "Q", "completion": [*A, *A]},
            "'completion' has roles ['assistant', 'assistant']; expected one assistant",
        ),
        ({"prompt": "Q", "completion": Q}, "'completion' has roles ['user']; expected one assistant message"),
    ],
)
def test_sft_row_error(row, message):
    assert sft_error(row).startswith(f"f.jsonl:{LINE}: {message}")


def test_answer_without_a_prompt():
    """`{"messages": [assistant]}` has nothing that is answered."""
    assert sft_error({"messages": A}) == f"f.jsonl:{LINE}: the prompt is empty"


def test_rows_of_two_shapes():
    source = Source("f.jsonl", [{"prompt": "Q", "completion": "A"}, {"text": "T"}], [1, 4], "d")
    with pytest.raises(UserError) as caught:
        sft_rows(source)
    assert str(caught.value) == (
        "f.jsonl:4: this row gives ['text'], but the first row gives ['completion', 'prompt']; use one format"
    )


# --- formats: preferences --------------------------------------------------------------------------------------------

PAIR = {"prompt": Q, "chosen": A, "rejected": [assistant("B")]}
HH = (
    "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A joke of this kind:\nHuman: why?\nAssistant: why not?\n\nAssistant: "
)
NO_PROMPT = "there is no 'prompt', and 'chosen'"
PREFERENCE_CASES = {
    "prompt + chosen + rejected": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "messages": PAIR,
    "instruction + chosen + rejected": {"instruction": "Q", "chosen": "A", "rejected": "B"},
    "question + chosen + rejected": {"question": "Q", "chosen": "A", "rejected": "B"},
    "chosen + rejected (full dialogues)": {"chosen": [*Q, *A], "rejected": [*Q, assistant("B")]},
    "UltraFeedback: prompt and whole dialogues": {"prompt": "Q", "chosen": [*Q, *A], "rejected": [*Q, assistant("B")]},
    "conversations + chosen + rejected": {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": A[0],
        "rejected": {"from": "gpt", "value": "B"},
    },
    "HH-RLHF": {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
    "HH-RLHF without leading breaks": {"chosen": "Human: Q\n\nAssistant: A", "rejected": "Human: Q\n\nAssistant: B"},
}


@pytest.mark.parametrize("row", PREFERENCE_CASES.values(), ids=PREFERENCE_CASES)
def test_preference_shape(row):
    assert preference_rows(one(row)) == [PAIR]


@pytest.mark.parametrize("name", PREFERENCE_SHAPES.split("; "))
def test_every_named_preference_shape_has_a_test(name):
    assert name in PREFERENCE_CASES


def test_hh_dialogue_of_several_turns():
    """`Human:` in a line that follows no empty line is text."""
    pair = preference_rows(one({"chosen": HH + "Yes.\n\nTwice yes.", "rejected": HH + "No."}))[0]
    assert pair == {
        "prompt": [user("Hi"), assistant("Hello."), user("A joke of this kind:\nHuman: why?\nAssistant: why not?")],
        "chosen": [assistant("Yes.\n\nTwice yes.")],
        "rejected": [assistant("No.")],
    }


def test_alpaca_preference_row_with_input():
    row = {"instruction": "Translate.", "input": "Guten Tag", "chosen": "Good day", "rejected": "Bad day"}
    assert preference_rows(one(row))[0]["prompt"] == [user("Translate.\n\nGuten Tag")]


def test_margin_is_kept_as_a_number():
    assert preference_rows(one({**PAIR, "margin": 2})) == [{**PAIR, "margin": 2.0}]


def test_canonical_pairs_stay_as_they_are():
    rows = preference_rows(one({**PAIR, "margin": 0.5}))
    assert preference_rows(Source("f", rows, None, "d")) == rows


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "Q", "chosen": "A"}, f"found columns prompt, chosen; expected one of: {PREFERENCE_SHAPES}"),
        ({**PAIR, "rejected": None}, f"found columns prompt, chosen, rejected; expected one of: {PREFERENCE_SHAPES}"),
        ({"chosen": "A", "rejected": "B"}, f"{NO_PROMPT} is not a dialogue of Human: and Assistant: turns"),
        ({"chosen": f"Hm\n\n{HH}A", "rejected": f"{HH}B"}, f"{NO_PROMPT} is not a dialogue of Human:"),
        ({"chosen": [*Q, *A], "rejected": [user("R"), *A]}, "'chosen' and 'rejected' differ before the last answer"),
        (
            {"chosen": f"{HH}A\n\nHuman: x", "rejected": f"{HH}B"},
            "'chosen' must end with the assistant's answer, found",
        ),
        ({"chosen": HH, "rejected": f"{HH}B"}, "'chosen, message 4' is empty"),
        ({"prompt": "Q", "chosen": "A", "rejected": " A "}, "'chosen' and 'rejected' are equal, so there is nothing"),
        ({"prompt": "Q", "chosen": "", "rejected": "B"}, "'chosen' is empty"),
        (
            {"prompt": "Q", "chosen": "A", "rejected": 7},
            "'rejected' is int '7'; expected a string or a list of messages",
        ),
        ({"prompt": "R", "chosen": [*Q, *A], "rejected": "B"}, "'chosen' has roles ['user', 'assistant']; expected"),
        ({"prompt": [*Q, *A], "chosen": "A", "rejected": "B"}, "'prompt' ends with an assistant message; it must"),
        ({"chosen": A, "rejected": [assistant("B")]}, "the prompt is empty"),
    ],
)
def test_preference_row_error(row, message):
    with pytest.raises(UserError) as caught:
        preference_rows(one(row))
    assert str(caught.value).startswith(f"f.jsonl:{LINE}: {message}")


@pytest.mark.parametrize(
    "row", [{**PAIR, "prompt": [SYSTEM]}, {"chosen": [SYSTEM, *A], "rejected": [SYSTEM, assistant("B")]}]
)
def test_prompt_without_a_user(row):
    with pytest.raises(UserError, match=f"^f.jsonl:{LINE}: .*user"):
        preference_rows(one(row))


def test_error_names_the_row_where_there_are_no_lines():
    with pytest.raises(UserError, match=r"^some/data \(train\), row 2: 'chosen' is empty$"):
        preference_rows(Source("some/data (train)", [PAIR, {**PAIR, "chosen": ""}], None, "d"))


# --- joining accepted and rejected answers ---------------------------------------------------------------------------


def answers(name, *prompts_and_responses):
    rows = [{"prompt": p, "response": r} for p, r in prompts_and_responses]
    return Source(name, rows, list(range(1, len(rows) + 1)), f"digest of {name}".ljust(64))


def texts(pairs):
    return [(p["prompt"][-1]["content"], p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs]


def test_join_is_by_prompt_in_the_order_of_the_accepted():
    joined = join_chosen_rejected(answers("yes", ("p", "1"), ("q", "2")), answers("no", ("q", "3"), ("p", "4")))
    assert texts(joined.rows) == [("p", "1", "4"), ("q", "2", "3")]


def test_join_pairs_several_answers_to_one_prompt_in_order():
    joined = join_chosen_rejected(
        answers("yes", ("p", "1"), ("q", "2"), ("p", "3")), answers("no", ("p", "4"), ("p", "5"), ("q", "6"))
    )
    assert texts(joined.rows) == [("p", "1", "4"), ("q", "2", "6"), ("p", "3", "5")]


def test_join_matches_alpaca_rows_with_prompts():
    yes = Source("yes", [{"instruction": "p", "input": "x", "output": "1"}], [1], "y" * 64)
    assert texts(join_chosen_rejected(yes, answers("no", ("p\n\nx", "2"))).rows) == [("p\n\nx", "1", "2")]


@pytest.mark.parametrize(
    "yes, no, message",
    [
        (
            [("p", "1"), ("q", "2")],
            [("p", "3")],
            "yes:2: no answer to this prompt in no; each prompt needs one in both",
        ),
        (
            [("p", "1"), ("p", "2")],
            [("p", "3")],
            "yes:2: no answer to this prompt in no; each prompt needs one in both",
        ),
        (
            [("p", "1")],
            [("p", "2"), ("q", "3")],
            "no:2: no answer to this prompt in yes; each prompt needs one in both",
        ),
        (
            [("p", "1")],
            [("p", "2"), ("p", "3")],
            "no:2: no answer to this prompt in yes; each prompt needs one in both",
        ),
        ([("p", " ")], [("p", "2")], "yes:1: 'response' is empty"),
    ],
)
def test_join_error(yes, no, message):
    with pytest.raises(UserError) as caught:
        join_chosen_rejected(answers("yes", *yes), answers("no", *no))
    assert str(caught.value) == message


def test_join_needs_prompts():
    yes = Source("yes", [{"text": "once upon a time"}], [1], "y" * 64)
    with pytest.raises(
        UserError, match="^yes:1: expected prompt [+] response, to be joined with the rejected answers$"
    ):
        join_chosen_rejected(yes, answers("no", ("p", "1")))


def test_equal_answers_in_both_files_are_found_with_the_accepted_line():
    with pytest.raises(UserError, match="^yes:2: 'chosen' and 'rejected' are equal"):
        join_chosen_rejected(answers("yes", ("p", "1"), ("q", "2")), answers("no", ("p", "3"), ("q", "2")))


def test_digest_of_a_join_follows_both_files():
    def digest(yes, no):
        sides = [Source(name, [{"prompt": "p", "response": name}], [1], name * 64) for name in (yes, no)]
        return join_chosen_rejected(*sides).digest

    assert len({digest("a", "b"), digest("a", "c"), digest("d", "b")}) == 3


# --- the three files of the classic ----------------------------------------------------------------------------------


def read_back(folder):
    """The pairs in preference_data.jsonl, and those joined from the other two files."""
    accepted, rejected, preferences = (load_source(str(folder / name)) for name in FILES)
    return preference_rows(preferences), preference_rows(join_chosen_rejected(accepted, rejected))


def test_pair_files_read_back_to_the_same_pairs(tmp_path):
    assert write_pair_files(SAMPLE_NAME, str(tmp_path / "out"), "heldout") == len(
        load_source(SAMPLE_NAME, "heldout").rows
    )
    expected = preference_rows(load_source(SAMPLE_NAME, "heldout"))
    assert read_back(tmp_path / "out") == (expected, expected)


def test_pair_files_hold_prompt_and_response(tmp_path):
    write(tmp_path, "in.jsonl", json.dumps({"prompt": "Q", "chosen": "Ä", "rejected": "B"}))
    write_pair_files(str(tmp_path / "in.jsonl"), str(tmp_path / "out"))
    lines = {name: (tmp_path / "out" / name).read_text(encoding="utf-8") for name in FILES}
    assert lines == {
        "accepted_data.jsonl": json.dumps({"prompt": Q, "response": [assistant("Ä")]}, ensure_ascii=False) + "\n",
        "rejected_data.jsonl": json.dumps({"prompt": Q, "response": [assistant("B")]}) + "\n",
        "preference_data.jsonl": json.dumps(
            {"prompt": Q, "chosen": [assistant("Ä")], "rejected": [assistant("B")]}, ensure_ascii=False
        )
        + "\n",
    }


def test_pair_files_of_the_first_few(tmp_path):
    write_pair_files(SAMPLE_NAME, str(tmp_path), limit=3)
    assert read_back(tmp_path)[0] == preference_rows(load_source(SAMPLE_NAME))[:3]


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_that_is_no_number_of_pairs(tmp_path, limit):
    with pytest.raises(UserError, match="limit"):
        write_pair_files(SAMPLE_NAME, str(tmp_path / "out"), limit=limit)


@pytest.mark.parametrize("name", FILES)
def test_pair_files_overwrite_nothing(tmp_path, name):
    write(tmp_path, name, "mine")
    with pytest.raises(UserError) as caught:
        write_pair_files(SAMPLE_NAME, str(tmp_path))
    assert str(caught.value) == f"{tmp_path / name} already exists; move it away or give another --output_dir"
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: "mine"}


def test_pair_files_into_a_file(tmp_path):
    path = write(tmp_path, "out", "mine")
    with pytest.raises(UserError, match="is a file"):
        write_pair_files(SAMPLE_NAME, path)


SEPARATORS = st.text(alphabet='ab\u2028\u2029\x85\x0b\x0c\x1c\x00\r\n\t \ufeff"\\,{}😀ä', min_size=1, max_size=12)
TEXTS = (
    (st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20) | SEPARATORS)
    .map(str.strip)
    .filter(lambda text: text.strip(INVISIBLE))
)


@given(pairs=st.lists(st.tuples(TEXTS | st.just("same prompt"), TEXTS, TEXTS), min_size=1, max_size=6))
@settings(deadline=None)
def test_any_pairs_survive_writing_and_reading(tmp_path_factory, pairs):
    assume(all(chosen != rejected for _, chosen, rejected in pairs))
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
    write(folder, "in.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert write_pair_files(str(folder / "in.jsonl"), str(folder)) == len(pairs)
    read, joined = read_back(folder)
    assert (texts(read), texts(joined)) == (pairs, pairs)


@pytest.mark.parametrize(
    ("environment", "resolves", "offline"),
    [
        ({}, False, "1"),
        ({}, True, None),
        ({"HTTPS_PROXY": "http://proxy:1"}, False, None),
        ({"HF_HUB_OFFLINE": "0"}, False, "0"),
    ],
)
def test_without_network_the_hub_client_goes_to_its_cache(environment, resolves, offline, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_OFFLINE", environment.get("HF_HUB_OFFLINE", ""))  # so that it is restored afterwards

    def getaddrinfo(host, port):
        assert host == "huggingface.co"
        if not resolves:
            raise OSError("no such name")

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    from rlhf.data.sources import use_cache_without_network

    use_cache_without_network()
    assert os.environ["HF_HUB_OFFLINE"] == (offline or "")
