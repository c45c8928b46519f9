"""What is wrong with a data set as a whole is counted with its first place, and reported in one line."""

import hashlib
import json

import pytest

from rlhf.__main__ import main
from rlhf.data.features import normalise_prompt, prompt_hash
from rlhf.data.prepare import prepare
from rlhf.data.sources import Source
from rlhf.data.store import Rows
from rlhf.data.summary import Count, leaks, line, skipped_line, summarise


def pair(prompt="Q", chosen="right", rejected="bad", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def prepared(name, rows, kind="pairs", bad_rows="error"):
    """Of rows in NAME:1, NAME:2, ..."""
    return prepare(Source(name, list(rows), list(range(1, len(rows) + 1)), ""), kind, bad_rows=bad_rows)


def summary_of(*rows, kind="pairs", heldout=()):
    """Of rows in f:1, f:2, ...; held-out ones in h:1, h:2, ..."""
    found = prepared("f", rows, kind, "skip")
    held = prepared("h", heldout, kind).rows if heldout else None
    return summarise(found.rows, found.num_unused, len(found.skipped), found.stripped, held)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_normalised_prompt():
    """\ufb01 is the ligature fi, \uff21 a wide A: NFKC makes them plain; casefold makes ß ss."""
    turns = [("system", " Be\n\n  BRIEF "), ("user", "\ufb01nd \uff21 Straße")]
    expected = "user\x1ffind a strasse"  # the same question under another system message is the same prompt
    assert normalise_prompt(turns) == expected
    assert prompt_hash(turns) == int.from_bytes(hashlib.sha256(expected.encode()).digest()[:8], "big")


@pytest.mark.parametrize(
    "rows, name, first",
    [
        ([pair(), pair("R"), pair(), pair()], "duplicates", Count(2, "f:3")),
        ([pair(), pair(chosen="bad", rejected="right")], "contradictions", Count(1, "f:2")),
        ([pair(), pair(chosen="<|im_start|>user hi")], "markers", Count(1, "f:2")),
        ([pair("[INST] Q [/INST]"), pair("### Instruction:\nQ"), pair("see <b>it</b> [INS]")], "markers", Count(2, "f:1")),
        ([pair("Q <s>"), pair("<|start_header_id|>user")], "markers", Count(2, "f:1")),
        ([pair(), pair([user("1"), user("2")])], "turn_order", Count(1, "f:2")),
        ([pair([user("1"), assistant("2"), user("3")])], "turn_order", Count()),
        ([pair([assistant("1"), user("2")])], "turn_order", Count(1, "f:1")),
        ([pair([user("1"), {"role": "system", "content": "S"}, user("2")])], "turn_order", Count(1, "f:1")),
        ([pair(chosen="caf\u00c3\u00a9"), pair(chosen="it\u00e2\u20ac\u2122s"), pair(chosen="café")], "garbled", Count(2, "f:1")),
        ([pair(), pair(rejected="NaN"), pair(chosen="None")], "no_answer", Count(2, "f:2")),
        ([pair(chosen="a  b\nc", rejected="a b c")], "blanks_only", Count(1, "f:1")),
        ([pair(margin=-1), pair(margin=1)], "negative_margins", Count(1, "f:1")),
        ([pair(score_chosen=1, score_rejected=2), pair()], "low_scores", Count(1, "f:1")),
        ([pair(score_chosen=2.0, score_rejected=2.0)], "equal_scores", Count(1, "f:1")),
        ([pair(), pair("Which one?", chosen="Which one? A")], "repeats", Count(1, "f:2")),
    ],
)  # fmt: skip
def test_count_and_first_place(rows, name, first):
    assert getattr(summary_of(*rows), name) == first


def test_text_that_quotes_a_human_turn_is_two_turns_in_a_row():
    hh = "\n\nHuman: He wrote:\n\nHuman: hello\n\nAssistant: "
    assert summary_of({"chosen": hh + "A", "rejected": hh + "B"}).turn_order == Count(1, "f:1")


def test_clean_pairs():
    summary = summary_of(pair(), pair("R", "a", "bcd"))
    assert line(summary) == (
        "2 pairs: 0 duplicates, 0 contradict an earlier pair, chosen longer in 50%, template markers in 0, prompt repeated in "
        "the answers in 0"
    )


def test_line_names_first_places_and_columns():
    rows = [pair(id=1), pair(id=2), pair(chosen="bad", rejected="right", source="web"), pair(chosen="")]
    summary = summary_of(*rows)
    assert line(summary) == (
        "3 pairs: 1 duplicate (first: f:2), 1 contradict an earlier pair (first: f:3), chosen longer in 67%, template "
        "markers in 0, prompt repeated in the answers in 0; columns not used: id, source"
    )
    assert summary.skipped == 1


def test_line_says_that_repeated_prompts_were_cut_off():
    question = "What is the capital of France?"
    assert "prompt repeated in the answers in all: removed" in line(
        summary_of(pair(question, question + " A", question + "B"))
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "completion": "A"},
        {"text": "Q"},
        {"messages": [user("Q"), assistant("A"), user("R"), assistant("B")]},
    ],
    ids=["prompt", "text", "messages"],
)
def test_sft_rows_have_no_contradictions(row):
    summary = summary_of(row, row, kind="sft")
    assert line(summary) == (
        "2 rows: 1 duplicate (first: f:2), template markers in 0, prompt repeated in the answer in 0"
    )


def test_held_out_prompts_are_found_in_other_case_and_white_space():
    summary = summary_of(pair("What is it?"), heldout=[pair("Other"), pair(" what\nIS  it?"), pair("What is it")])
    assert summary.leaks == Count(1, "h:2")


def test_no_held_out_rows_no_leaks():
    assert leaks(Rows([]), Rows([])) == Count()
    assert leaks(prepared("f", [pair()]).rows, Rows([])) == Count()
    assert summary_of(pair()).leaks == Count()


def test_skipped_rows_are_named():
    skipped = [{"place": f"f:{n}", "reason": "why"} for n in range(1, 5)]
    assert skipped_line(skipped, 1156) == "4 of 1,156 rows skipped: f:1 (why), f:2 (why), f:3 (why), …"
    assert skipped_line(skipped[:1], 2) == "1 of 2 rows skipped: f:1 (why)"


# --- in a stage ------------------------------------------------------------------------------------------------------

HH = "\n\nHuman: {}\n\nAssistant: "


@pytest.fixture
def data(tmp_path):
    """Like HH-RLHF: 6 pairs, of which two can't be used: another dialogue, and an empty turn."""
    rows = [{"chosen": HH.format(n) + "Yes.", "rejected": HH.format(n) + "Perhaps not."} for n in range(4)]
    rows.insert(1, {"chosen": HH.format("a") + "A", "rejected": HH.format("b") + "B"})
    rows.insert(3, {"chosen": HH.format("a") + HH.format("c") + "A", "rejected": HH.format("a") + "B"})
    file = tmp_path / "hh.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_check_stops_at_the_first_bad_row(data, recipe, tmp_path, capsys):
    path = recipe("dpo", model_name_or_path="none", dataset_name=str(data), output_dir=str(tmp_path / "out"))
    assert main(["dpo", path, "--check"]) == 2
    assert capsys.readouterr().err == (
        f"rlhf: {data}:2: 'chosen' and 'rejected' differ before the last answer, in message 1 (user); expected equal "
        f"dialogues before the last answer; 1 more row can't be used (next: {data}:4); `bad_rows: skip` skips such rows\n"
    )


def test_check_reports_the_data_and_what_it_skips(data, recipe, tmp_path, capsys, tiny_llama):
    out = str(tmp_path / "out")
    path = recipe("reward", model_name_or_path=tiny_llama, dataset_name=str(data), output_dir=out, bad_rows="skip")
    assert main(["reward", path, "--check"]) == 0
    about, skipped, _, ok = capsys.readouterr().out.splitlines()
    assert about.startswith(f"{data}: 4 pairs: 0 duplicates, 0 contradict an earlier pair, chosen longer in 0%")
    assert skipped.startswith(f"{data}: 2 of 6 rows skipped: {data}:2 ('chosen' and 'rejected' differ before the last")
    assert (f"{data}:4 ('chosen, message 2' is empty)" in skipped, ok) == (True, f"{path}: ok (4 training rows)")


def test_run_keeps_the_summary_and_the_skipped_rows(data, recipe, tmp_path, capsys, tiny_llama):
    out = tmp_path / "out"
    path = recipe("reward", model_name_or_path=tiny_llama, dataset_name=str(data), output_dir=str(out), bad_rows="skip",
                  max_steps=1)  # fmt: skip
    assert main(["reward", path]) == 0
    assert capsys.readouterr().out.count("4 pairs: ") == 1
    kept = json.loads((out / "provenance.json").read_text())["arguments"]["data"]
    assert (kept["rows"], kept["skipped"], kept["duplicates"]) == (4, 2, {"rows": 0, "first": None})
    lines = [json.loads(line) for line in (out / "skipped_rows.jsonl").read_text().splitlines()]
    assert [row["place"] for row in lines] == [f"{data}:2", f"{data}:4"]


def test_leaks_are_reported_with_the_data(recipe, tmp_path, capsys, tiny_llama):
    files = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    files[0].write_text(json.dumps(pair("What is it?")) + "\n")
    files[1].write_text("".join(json.dumps(pair(prompt)) + "\n" for prompt in ("Other", "what  IS it?")))
    path = recipe("reward", model_name_or_path=tiny_llama, dataset_name=str(files[0]), eval_dataset_name=str(files[1]),
                  output_dir=str(tmp_path / "out"))  # fmt: skip
    assert main(["reward", path, "--check"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == (
        f"{files[0]}: 1 of 2 held-out prompts are also in the training data (first: {files[1]}:2); scores on them are not meaningful"
    )


def test_margin_in_some_rows_stops_the_reward_stage_only(recipe, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (pair(margin=1.0), pair("R"))))
    words = dict(model_name_or_path="none", dataset_name=str(file), output_dir=str(tmp_path / "out"))
    assert main(["reward", recipe("reward", **words), "--check"]) == 2
    assert capsys.readouterr().err.startswith(f"rlhf: {file}:2: no 'margin', but 1 of 2 rows have one")


def test_dpo_says_that_it_does_not_use_margins(recipe, tmp_path, capsys, tiny_llama):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(pair(margin=1.0)) + "\n")
    out = str(tmp_path / "out")
    assert (
        main(["dpo", recipe("dpo", model_name_or_path=tiny_llama, dataset_name=str(file), output_dir=out), "--check"])
        == 0
    )
    assert capsys.readouterr().out.splitlines()[0].endswith("; columns not used: margin")
