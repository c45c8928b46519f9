"""Columns and fields of the field's formats: used rightly, refused by name with place and fix, or listed as not used."""

import pytest
from canonical import Reading, join_chosen_rejected, preference_rows, reject_margins_in_some_rows, sft_rows

from rlhf.data.sources import Source
from rlhf.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "S"}
QA = {"prompt": "Q", "completion": "A"}
PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}
LONG = "What is the capital of France?"


def source(*rows):
    return Source("f.jsonl", list(rows), [7 * (n + 1) for n in range(len(rows))], "digest")


def error(convert, *rows):
    with pytest.raises(UserError) as caught:
        convert(source(*rows))
    return str(caught.value)


# --- used ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [QA, {"prompt": [user("Q")], "completion": "A"}, {"prompt": [SYSTEM, user("Q")], "completion": "A"},
     {"instruction": "Q", "output": "A"}, {"question": "Q", "answer": "A"}, {"messages": [user("Q"), assistant("A")]}],
    ids=["texts", "messages", "said twice", "alpaca", "question", "dialogue"],
)  # fmt: skip
def test_system_column_becomes_the_system_message(key, row):
    assert sft_rows(source({**row, key: "S"})) == [{"prompt": [SYSTEM, user("Q")], "completion": [assistant("A")]}]


@pytest.mark.parametrize(
    "row",
    [PAIR, {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
     {"prompt": "Q", "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]}],
    ids=["texts", "dialogues", "prompt and dialogues"],
)  # fmt: skip
def test_system_column_of_a_pair(row):
    expected = {"prompt": [SYSTEM, user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]}
    assert preference_rows(source({**row, "system": "S"})) == [expected]


@pytest.mark.parametrize("empty", ["", " ", None])
def test_empty_system_column_is_none(empty):
    assert sft_rows(source({**QA, "system": empty}))[0]["prompt"] == [user("Q")]


def test_two_system_messages_that_differ():
    row = {"prompt": [SYSTEM, user("Q")], "completion": "A", "system": "T"}
    assert error(sft_rows, row) == "f.jsonl:7: 'system' ('T') differs from the other system message ('S'); keep one"


def test_alpaca_history_stands_between_system_and_instruction():
    row = {"instruction": "Q", "input": "", "output": "A", "system": "S", "history": [["q1", "a1"], ["q2", "a2"]]}
    expected = [SYSTEM, user("q1"), assistant("a1"), user("q2"), assistant("a2"), user("Q")]
    assert sft_rows(source(row)) == [{"prompt": expected, "completion": [assistant("A")]}]
    pair = {"instruction": "Q", "chosen": "A", "rejected": "B", "history": [["q1", "a1"]]}
    assert preference_rows(source(pair))[0]["prompt"] == [user("q1"), assistant("a1"), user("Q")]


@pytest.mark.parametrize(
    "more, message",
    [
        ({"history": "q1"}, "'history' is str 'q1'; expected a list of [user, assistant] pairs"),
        ({"history": [["q1"]]}, "'history', turn 1 is list \"['q1']\"; expected [user, assistant]"),
        ({"history": [["q1", ""]]}, "'history, turn 1' is empty"),
        (
            {"history": [["q", "a"]], "prompt": [user("q"), assistant("a"), user("Q")]},
            "'history' is set, but the dialogue",
        ),
    ],
)
def test_history_that_cannot_be_used(more, message):
    assert error(sft_rows, {**QA, **more}).startswith(f"f.jsonl:7: {message}")


def test_system_message_in_the_answers_alone_becomes_the_prompts():
    """UltraFeedback as some tools write it: the prompt as text, whole dialogues with a system message beside it."""
    row = {
        "prompt": "Q",
        "chosen": [SYSTEM, user("Q"), assistant("A")],
        "rejected": [SYSTEM, user("Q"), assistant("B")],
    }
    assert preference_rows(source(row))[0] == {
        "prompt": [SYSTEM, user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]
    }  # fmt: skip


def test_system_message_in_one_answer_only_is_named():
    row = {"prompt": "Q", "chosen": [SYSTEM, user("Q"), assistant("A")], "rejected": "B"}
    assert error(preference_rows, row) == (
        "f.jsonl:7: 'chosen' and 'rejected' differ before the last answer, in message 1 (system); expected equal "
        "dialogues before the last answer"
    )


def test_one_message_as_answer():
    row = {"prompt": user("Q"), "chosen": assistant("A"), "rejected": assistant("B")}
    assert preference_rows(source(row)) == preference_rows(source(PAIR))


def test_single_text_part_is_its_text():
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, assistant("A")]}
    assert sft_rows(source(row))[0]["prompt"] == [user("Q")]


# --- white space -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, kept",
    [
        ("    return x\n", "    return x"),
        ("\n\n    return x", "    return x"),
        ("\tif x:\n\t\ty", "\tif x:\n\t\ty"),
        (" blue.", "blue."),  # a word of a plain text
        (" - a\n - b", " - a\n - b"),
    ],
)
def test_indentation_of_answers_survives(given, kept):
    assert sft_rows(source({"prompt": "Q", "completion": given}))[0]["completion"] == [assistant(kept)]
    messages = [user("Q"), assistant(given)]
    assert sft_rows(source({"messages": messages}))[0]["completion"] == [assistant(kept)]
    assert preference_rows(source({**PAIR, "chosen": given}))[0]["chosen"] == [assistant(kept)]
    assert sft_rows(source({"instruction": "Q", "input": given, "output": "A"}))[0]["prompt"] == [user(f"Q\n\n{kept}")]


def test_answers_that_differ_in_outer_white_space_are_the_same():
    assert "are equal" in error(preference_rows, {**PAIR, "chosen": "    x", "rejected": "x\n"})


@pytest.mark.parametrize("blank", ["\u200b", "\ufeff \n", "\x00", "\u2800\u200d"], ids=ascii)
def test_invisible_answer_is_empty(blank):
    expected = "f.jsonl:7: 'completion' is empty (it has only invisible characters)"
    assert error(sft_rows, {**QA, "completion": blank}) == expected


def test_half_a_character_is_named():
    """JSON can write it, Arrow and every tokenizer stop at it later, with a traceback."""
    assert error(sft_rows, {**QA, "completion": "ab\ud800"}).startswith(
        "f.jsonl:7: 'completion' has a lone surrogate (\\ud800)"
    )


# --- refused by name -------------------------------------------------------------------------------------------------

OLD_TOOLS = "this is OpenAI's old form: write `tools`, `tool_calls` and the role 'tool' instead"
CALL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
REFUSED = {
    "functions": (
        {"functions": [{"name": "f"}]},
        f"'functions' is set (list \"[{{'name': 'f'}}]\") and would be dropped; {OLD_TOOLS}",
    ),
    "tool calls": ({"tool_calls": CALL}, "'tool_calls' is set (list "),
    "images": (
        {"images": ["a.png"]},
        "'images' is set (list \"['a.png']\") and would be dropped; only text is trained",
    ),
    "thoughts": (
        {"reasoning_content": "hm"},
        "'reasoning_content' is set (str 'hm') and would be dropped; put it into the answer's message",
    ),
    "train": ({"train": False}, "'train' is false, but every row is trained; remove the row"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("convert, row", [(sft_rows, QA), (preference_rows, PAIR)], ids=["sft", "pairs"])
def test_column_that_would_be_dropped(name, convert, row):
    more, message = REFUSED[name]
    assert error(convert, {**row, **more}).startswith(f"f.jsonl:7: {message}")


@pytest.mark.parametrize("empty", [None, "", [], "[]", {}, {"enable_thinking": None}, float("nan")], ids=str)
@pytest.mark.parametrize("key", ["tools", "images", "chat_template_kwargs", "thinking", "history"])
def test_empty_column_is_no_column(key, empty):
    reading = Reading()
    assert sft_rows(source({**QA, key: empty}), reading) == sft_rows(source(QA))
    assert not reading.num_unused


def test_flag_that_is_off_drops_nothing():
    assert sft_rows(source({**QA, "thinking": False})) == sft_rows(source(QA))


@pytest.mark.parametrize("content", ["A", "", None], ids=["content", "empty content", "null content"])
@pytest.mark.parametrize("field", ["function_call", "images", "train_detail"])
def test_field_of_a_message_that_would_be_dropped(content, field):
    row = {"prompt": "Q", "chosen": [assistant(content, **{field: CALL})], "rejected": "B"}
    assert error(preference_rows, row).startswith(f"f.jsonl:7: 'chosen', message 1: '{field}' is set (list ")


def test_role_of_old_says_what_to_do():
    row = {"messages": [user("Q"), {"role": "ipython", "content": "5"}, assistant("A")]}
    start = (
        "f.jsonl:7: 'messages', message 2: role 'ipython'; expected one of system, developer, user, assistant, tool; "
    )
    assert error(sft_rows, row) == f"{start}`roles: {{ipython: tool}}` maps it"


def test_parts_of_a_content():
    image = [{"type": "image"}, {"type": "text", "text": "Q"}]
    row = {"messages": [{"role": "user", "content": image}, assistant("A")]}
    assert error(sft_rows, row).startswith(
        "f.jsonl:7: 'messages', message 1: the content has parts of type image; only text"
    )


@pytest.mark.parametrize("label", [False, "False"])
def test_kto_row_with_a_bad_answer_is_not_imitated(label):
    assert error(sft_rows, {**QA, "label": label}) == (
        "f.jsonl:7: 'label' is false: SFT would imitate a bad answer; remove the row"
    )
    assert sft_rows(source({**QA, "label": True})) == sft_rows(source(QA))


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"training": False}], ids=str)
class TestAnswersNotToBeLearnt:
    def test_last_one_is_refused(self, mark):
        message = error(sft_rows, {"messages": [user("Q"), assistant("A", **mark)]})
        assert message.startswith("f.jsonl:7: the last answer is excluded from training")
        assert "excluded from training" in error(preference_rows, {**PAIR, "chosen": [assistant("A", **mark)]})

    def test_all_but_the_last_belong_to_the_prompt(self, mark):
        row = {"messages": [user("Q"), assistant("A", **mark), user("R"), assistant("B", weight=1)]}
        assert sft_rows(source(row)) == [
            {"prompt": [user("Q"), assistant("A"), user("R")], "completion": [assistant("B")]}
        ]

    def test_some_of_the_earlier_ones_are_refused(self, mark):
        row = {"messages": [user("1"), assistant("A", **mark), user("2"), assistant("B"), user("3"), assistant("C")]}
        assert error(sft_rows, row).startswith(
            "f.jsonl:7: some, but not all, of the earlier answers are excluded from training"
        )


def test_weight_between_0_and_1():
    row = {"messages": [user("Q"), assistant("A", weight=0.5)]}
    assert error(sft_rows, row) == "f.jsonl:7: 'messages', message 2: weight 0.5; expected 0 or 1"


@pytest.mark.parametrize(
    "margin", [float("nan"), float("inf"), "much", True, 10**400], ids=["nan", "inf", "word", "bool", "huge"]
)
def test_margin_that_is_no_finite_number(margin):
    assert error(preference_rows, {**PAIR, "margin": margin}).startswith("f.jsonl:7: 'margin' is ")


@pytest.mark.parametrize("margin", ["0.5", 0.5])
def test_margin_of_a_csv_file_is_a_number(margin):
    assert preference_rows(source({**PAIR, "margin": margin}))[0]["margin"] == 0.5


def test_margin_in_some_rows_only():
    rows = preference_rows(source({**PAIR, "margin": 1}, PAIR, {**PAIR, "margin": 2}))
    with pytest.raises(UserError, match="^f:2: no 'margin', but 2 of 3 rows have one .first: f:1.; set it in all rows"):
        reject_margins_in_some_rows(rows, ["f:1", "f:2", "f:3"])
    reject_margins_in_some_rows(rows[1:2], ["f:2"])
    reject_margins_in_some_rows(rows[::2], ["f:1", "f:3"])


def test_input_that_is_a_list():
    row = {"instruction": "Do", "input": ["a", "b"], "output": "A"}
    assert error(sft_rows, row) == "f.jsonl:7: 'input' is list \"['a', 'b']\"; expected a string"


@pytest.mark.parametrize("text", ["[{'role': 'user', 'content': 'Q'}]", '[{"role": "user", "content": "Q"}]'])
def test_messages_written_as_a_text(text):
    """What a CSV file makes of a list."""
    assert "'prompt' is a list of messages written as a string" in error(sft_rows, {**QA, "prompt": text})


@pytest.mark.parametrize(
    "row, hint",
    [
        ({"prompt": "Q", "completion": "A", "label": True}, "a KTO row"),
        ({"prompt": "Q", "response_0": "A", "response_1": "B", "preferred": 0}, "a row with two responses"),
        ({"prompt": "Q", "response_a": "A", "response_b": "B"}, "a row with two responses"),
    ],
)
def test_other_formats_are_named(row, hint):
    assert f"; this looks like {hint}" in error(preference_rows, row)


# --- prompts in the answers ------------------------------------------------------------------------------------------


def repeated(prompt=LONG):
    return {"prompt": prompt, "chosen": f"{prompt} Paris.", "rejected": f"{prompt}\n\n    Rome."}


def test_prompt_that_all_answers_repeat_is_cut_off():
    reading = Reading()
    pair = preference_rows(source(repeated(), repeated("And the capital of Spain?")), reading)[0]
    assert pair == {"prompt": [user(LONG)], "chosen": [assistant("Paris.")], "rejected": [assistant("    Rome.")]}
    assert (reading.stripped, len(reading.repeats)) == (True, 2)


def test_prompt_that_some_answers_repeat_stays_and_is_noted():
    reading = Reading()
    rows = preference_rows(source({**PAIR, "prompt": LONG}, repeated()), reading)
    assert (rows[1]["chosen"], reading.stripped, reading.repeats) == (
        [assistant(f"{LONG} Paris.")], False, ["f.jsonl:14"]
    )  # fmt: skip


def test_short_prompt_may_begin_an_answer_by_chance():
    row = {"prompt": "Hello", "completion": "Hello there"}
    assert sft_rows(source(row))[0]["completion"] == [assistant("Hello there")]


HH = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: Q\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": HH, "chosen": " A", "rejected": " B"},
        {"prompt": HH, "chosen": f"{HH} A", "rejected": f"{HH} B"},
        {"prompt": [user("q1"), assistant("a1"), user("Q")], "chosen": f"{HH} A", "rejected": f"{HH} B"},
        {"chosen": f"{HH} A", "rejected": f"{HH} B"},
    ],
    ids=["prompt is a dialogue", "both are", "answers are", "no prompt"],
)
def test_hh_strings_beside_a_prompt(row):
    assert preference_rows(source(row)) == [
        {"prompt": [user("q1"), assistant("a1"), user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]}
    ]


def test_hh_answer_keeps_the_indentation_of_a_line_of_its_own():
    row = {"chosen": f"{HH}\n    x = 1", "rejected": f"{HH}   B"}
    pair = preference_rows(source(row))[0]
    assert (pair["chosen"], pair["rejected"]) == ([assistant("    x = 1")], [assistant("B")])


def test_hh_answer_of_another_prompt():
    row = {"prompt": "Something else", "chosen": f"{HH} A", "rejected": f"{HH} B"}
    assert "optionally preceded by exactly the prompt's messages" in error(preference_rows, row)


def test_hh_answer_of_one_turn_beside_its_prompt():
    row = {"prompt": "Q", "chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}
    assert preference_rows(source(row)) == preference_rows(source(PAIR))


# --- listed, skipped -------------------------------------------------------------------------------------------------


def test_columns_not_used_are_listed_once():
    reading = Reading()
    row = {**PAIR, "id": 3, "source": "web", "note": None, "messages": [user("Q")]}
    preference_rows(source(row, row), reading)
    assert reading.num_unused == {"id": 2, "source": 2, "messages": 2}


def test_prompt_beside_a_text_is_not_used():
    reading = Reading()
    assert sft_rows(source({"prompt": "Q", "text": "T"}), reading) == [{"text": "T"}]
    assert reading.num_unused == {"prompt": 1}


def test_rejected_file_may_label_its_answers_as_bad():
    rejected = source({**QA, "label": False})
    pairs = join_chosen_rejected(
        source({**QA, "completion": "good", "label": True, "id": 1}), rejected, reading := Reading()
    )
    assert (pairs.rows[0]["rejected"], reading.num_unused) == ([assistant("A")], {"id": 1})


def test_fields_of_messages_not_used_are_listed():
    reading = Reading()
    sft_rows(source({"messages": [user("Q") | {"name": "Ann", "time": 3}, assistant("A", weight=1, id=None)]}), reading)
    assert reading.num_unused == {"messages[].time": 1}


def test_scores_that_contradict_the_choice_are_noted():
    reading = Reading()
    scores = [(1.0, 2.0), (2, 2), (3, 1)]
    rows = [{**PAIR, "score_chosen": c, "score_rejected": r} for c, r in scores]
    preference_rows(source(*rows), reading)
    assert (reading.low_scores, reading.equal_scores) == (["f.jsonl:7"], ["f.jsonl:14"])
    assert not reading.num_unused


def test_rows_that_cannot_be_used_are_left_out():
    reading = Reading("skip")
    rows = preference_rows(source({**PAIR, "chosen": ""}, PAIR, {**PAIR, "images": "x"}), reading)
    assert (rows, reading.places) == (preference_rows(source(PAIR)), ["f.jsonl:14"])
    assert [(s["place"], s["reason"][:19]) for s in reading.skipped] == [
        ("f.jsonl:7", "'chosen' is empty"), ("f.jsonl:21", "'images' is set (st")
    ]  # fmt: skip


def test_sft_rows_of_another_shape_are_left_out():
    reading = Reading("skip")
    assert (len(sft_rows(source(QA, {"text": "T"}), reading)), reading.skipped[0]["place"]) == (1, "f.jsonl:14")


@pytest.mark.parametrize("count", [1, 2])
def test_all_rows_left_out(count):
    with pytest.raises(UserError, match=f"^f.jsonl: none of {count} rows can be used; f.jsonl:7: 'chosen' is empty$"):
        preference_rows(source(*[{**PAIR, "chosen": ""}] * count), Reading("skip"))


def test_how_many_more_rows_are_bad():
    bad = {**PAIR, "chosen": ""}
    assert error(preference_rows, PAIR, bad) == "f.jsonl:14: 'chosen' is empty"
    assert error(preference_rows, bad, PAIR, bad, bad) == (
        "f.jsonl:7: 'chosen' is empty; 2 more rows can't be used (next: f.jsonl:21)"
    )


def test_repeated_prompt_with_an_invisible_answer_is_no_answer():
    row = {"prompt": LONG, "completion": LONG + "\u200b"}
    assert sft_rows(source(row))[0]["completion"] == [assistant(LONG + "\u200b")]
