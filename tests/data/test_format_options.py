"""`format`, `columns` and `roles`: what a user says about a file; and files that fit several formats."""

import json

import pytest
from canonical import Reading, join_chosen_rejected, preference_rows, sft_rows

from rlhf.config.stage_config import COLUMN_NAMES
from rlhf.data.format_options import VERSION, FormatOptions, at
from rlhf.data.prepare import plain_rows
from rlhf.data.recognise import converter
from rlhf.data.rows import read_data
from rlhf.data.sources import Source
from rlhf.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def source(*rows, name="f.jsonl"):
    return Source(name, list(rows), [7 * (n + 1) for n in range(len(rows))], "digest".ljust(64))


def options(**values):
    return FormatOptions.of(values, lambda key: f"r.yaml:{len(key)}")


PAIR = {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]}
SFT = {"prompt": [user("Q")], "completion": [assistant("A")]}
PKU = {"prompt": "Q", "response_0": "A", "response_1": "B", "better_response_id": 0, "safer_response_id": 1}


def error(convert, *rows, **more):
    with pytest.raises(UserError) as caught:
        convert(source(*rows), None, options(**more))
    return str(caught.value)


# --- ambiguous files -------------------------------------------------------------------------------------------------


def test_two_judgements_are_ambiguous_and_format_decides():
    assert error(preference_rows, PKU) == (
        "f.jsonl: the rows fit several formats: pku-saferlhf-better (the more helpful response, by better_response_id); "
        "pku-saferlhf-safer (the safer response, by safer_response_id). `format: pku-saferlhf-better`, or another of them, decides"
    )
    flipped = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    assert preference_rows(source(PKU), None, options(format="pku-saferlhf-better")) == [PAIR]
    assert preference_rows(source(PKU), None, options(format="pku-saferlhf-safer")) == [flipped]


def test_rows_of_two_formats_in_one_file_are_ambiguous():
    arena = {"conversation_a": [], "conversation_b": [], "winner": "model_a"}
    shp = {"history": "Q", "human_ref_A": "A", "human_ref_B": "B", "labels": 1}
    assert "the rows fit several formats: shp (" in error(preference_rows, shp, arena)


def test_few_rows_of_another_format_are_errors_of_their_own():
    shp = {"history": "Q", "human_ref_A": "A", "human_ref_B": "B", "labels": 1}
    message = error(preference_rows, *[shp] * 10, {"question": "Q", "response_j": "A", "response_k": "B"})
    assert message == "f.jsonl:77: 'labels' is missing; the first rows have it"


def test_chosen_and_rejected_decide_over_the_answers_they_were_made_from():
    row = {**PAIR, "generations": ["B", "A", "C"], "ratings": [5, 1, 2]}
    reading = Reading()
    assert preference_rows(source(row), reading) == [PAIR]
    assert reading.num_unused == {"generations": 1, "ratings": 1}


def test_sft_readings_that_differ_are_ambiguous():
    row = {"messages": [user("Q"), assistant("A")], "prompt": "Other", "completion": "A"}
    message = error(sft_rows, row)
    assert (
        message.startswith("f.jsonl: the rows fit several formats: messages (") and "; prompt-completion (" in message
    )
    assert sft_rows(source(row), None, options(format="messages")) == [SFT]
    other = sft_rows(source(row), None, options(format="prompt-completion"))
    assert other == [{**SFT, "prompt": [user("Other")]}]


def test_sft_readings_that_agree_are_not():
    system = {"role": "system", "content": "S"}
    row = {"messages": [system, user("Q"), assistant("A")], "prompt": "Q", "completion": "A"}
    assert sft_rows(source(row)) == [{**SFT, "prompt": [system, user("Q")]}]


def test_text_beside_a_prompt_and_an_answer_is_their_rendering():
    assert sft_rows(source({"instruction": "Q", "output": "A", "text": "### Q\n### A"})) == [SFT]


def test_two_prompts_that_differ():
    row = {"prompt": "Q", "question": "R", "chosen": "A", "rejected": "B"}
    assert error(preference_rows, row) == (
        "f.jsonl: 'prompt' and 'question' could both be the prompt, and they differ; `columns: {prompt: prompt}` or "
        "`{prompt: question}` decides"
    )
    assert preference_rows(source(row), None, options(columns={"prompt": "prompt"})) == [PAIR]
    assert preference_rows(source(row), None, options(columns={"prompt": "question"}))[0]["prompt"] == [user("R")]


def test_two_prompts_of_which_one_holds_the_other():
    row = {"prompt": "User: Q", "instruction": "Q", "chosen": "A", "rejected": "B"}
    assert preference_rows(source(row))[0]["prompt"] == [user("User: Q")]


def test_two_completions_that_differ():
    row = {"question": "Q", "response": "A", "output": "other"}
    assert "'response' and 'output' could both be the completion" in error(sft_rows, row)
    assert sft_rows(source(row), None, options(columns={"completion": "response"})) == [SFT]


# --- format ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert, name, kind", [(preference_rows, "text", "pairs"), (preference_rows, "messages", "pairs"),
                                                 ])  # fmt: skip
def test_format_of_another_stage(convert, name, kind):
    message = error(convert, PAIR, format=name)
    assert message.startswith(f"f.jsonl: r.yaml:6: format: {name} gives no {kind}; expected one of pairs, plain, ")


def test_named_format_without_its_columns_is_named_by_row():
    assert error(preference_rows, PAIR, format="shp") == "f.jsonl:7: 'labels' is missing; the first rows have it"
    assert error(sft_rows, PAIR, format="text") == "f.jsonl:7: 'text' is NoneType 'None'; expected a string"


def test_ultrafeedback_by_either_score():
    items = [
        {"response": "A", "overall_score": 2, "fine-grained_score": 5},
        {"response": "B", "overall_score": 9, "fine-grained_score": 1},
    ]
    row = {"instruction": "Q", "completions": items}
    assert preference_rows(source(row)) == [PAIR]
    assert preference_rows(source(row), None, options(format="ultrafeedback-overall"))[0]["chosen"] == [assistant("B")]


# --- columns ---------------------------------------------------------------------------------------------------------


def test_columns_name_the_parts():
    row = {"q": "Q", "good": "A", "bad": "B", "who": "me"}
    reading = Reading()
    named = options(columns={"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert preference_rows(source(row), reading, named) == [PAIR]
    assert reading.num_unused == {"who": 1}


def test_columns_enter_mappings_and_lists():
    row = {"input": {"messages": [user("Q")], "id": 3}, "answers": [{"t": "A"}, {"t": "B"}]}
    reading = Reading()
    named = options(columns={"prompt": "input.messages", "chosen": "answers.0.t", "rejected": "answers.1.t"})
    assert preference_rows(source(row), reading, named) == [PAIR]
    assert reading.num_unused == {"input.id": 1}


def test_a_column_with_a_dot_in_its_name():
    assert at({"a.b": 1, "a": {"b": 2}}, "a.b") == 1


def test_named_column_replaces_one_of_that_name():
    row = {"prompt": "an id", "question": "Q", "chosen": "A", "rejected": "B"}
    reading = Reading()
    assert preference_rows(source(row), reading, options(columns={"prompt": "question"})) == [PAIR]
    assert reading.num_unused == {"prompt": 1}


def test_columns_and_format_together():
    row = {"q": "Q", "a": "A", "b": "B", "vote": 1}
    named = {"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": "vote"}
    assert preference_rows(source(row), None, options(columns=named)) == [PAIR]


@pytest.mark.parametrize(
    "path, hint",
    [("responce_j", "did you mean 'response_j' or 'response_k'?"), ("input.mesages", "did you mean 'input.messages'?"),
     ("zzz", "it has input, input.messages, response_j, response_k")],
)  # fmt: skip
def test_column_that_does_not_exist(path, hint):
    row = {"input": {"messages": [user("Q")]}, "response_j": "A", "response_k": "B"}
    assert error(preference_rows, row, columns={"prompt": path}) == (
        f"f.jsonl: r.yaml:7: columns: prompt: there is no column '{path}'; {hint}"
    )


def test_error_of_a_named_column_says_the_name_in_the_file():
    row = {"q": "Q", "good": "", "bad": "B"}
    message = error(preference_rows, row, columns={"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert message == "f.jsonl:7: 'chosen' is empty ('chosen' is the column 'good')"


def test_margin_is_the_difference_of_scores_only_if_asked_for():
    rated = {"prompt": "Q", "responses": ["A", "B"], "ratings": [5, 1]}
    scored = {"prompt": "Q", "chosen": "A", "rejected": "B", "score_chosen": 8.0, "score_rejected": 6.5}
    for row, margin in ((rated, 4.0), (scored, 1.5)):
        assert preference_rows(source(row)) == [PAIR]
        assert preference_rows(source(row), None, options(columns={"margin": "scores"})) == [{**PAIR, "margin": margin}]
    assert "needs the scores of both answers; this row has none" in error(
        preference_rows, PAIR, columns={"margin": "scores"}
    )


def test_a_numeric_column_called_scores_is_a_margin_as_any_other():
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "scores": 0.25, "strength": 3}
    assert preference_rows(source(row), None, options(columns={"margin": "scores"}))[0]["margin"] == 0.25
    assert preference_rows(source(row), None, options(columns={"margin": "strength"}))[0]["margin"] == 3.0


def test_columns_of_two_files_that_are_joined():
    named = options(columns={"prompt": "q", "completion": "a"})
    joined = join_chosen_rejected(source({"q": "Q", "a": "A"}), source({"q": "Q", "a": "B"}), None, named)
    assert joined.rows == [PAIR]


def test_every_column_that_a_format_reads_can_be_named():
    """What a converter takes out of a row, found in the rows of tests/data/test_formats.py."""
    from test_formats import PAIRS, SFTS

    taken = set()
    for kind, rows in (("pairs", PAIRS), ("sft", SFTS)):
        for row, _ in rows.values():
            used = set()
            converter(kind, [row])(row, used)
            taken |= {name.split(".")[0] for name in used} & row.keys()
    assert taken <= COLUMN_NAMES


# --- roles -----------------------------------------------------------------------------------------------------------


def test_roles_are_mapped():
    row = {"messages": [{"role": "customer", "content": "Q"}, {"role": "agent", "content": "A"}]}
    assert sft_rows(source(row), None, options(roles={"customer": "user", "agent": "assistant"})) == [SFT]
    shared = {"conversations": [{"from": "customer", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    assert sft_rows(source(shared), None, options(roles={"customer": "user"})) == [SFT]


def test_roles_in_a_mapping():
    row = {
        "input": {"messages": [{"role": "customer", "content": "Q"}]},
        "preferred_output": [assistant("A")],
        "non_preferred_output": [assistant("B")],
    }
    assert preference_rows(source(row), None, options(roles={"customer": "user"})) == [PAIR]


# --- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_follows_what_is_read_and_nothing_else():
    named = [
        {}, {"format": "pairs"}, {"columns": {"prompt": "q"}}, {"columns": {"prompt": "r"}}, {"roles": {"x": "user"}},
        {"columns": {"prompt": "q", "chosen": "a"}},
    ]  # fmt: skip
    assert len({options(**values).key() for values in named}) == len(named)
    one = options(columns={"prompt": "q", "chosen": "a"})
    other = FormatOptions.of({"columns": {"chosen": "a", "prompt": "q"}}, lambda key: "elsewhere")
    assert one.key() == other.key()
    assert json.loads(FormatOptions().key()) == [VERSION, None, {}, {}]


# --- in a recipe -----------------------------------------------------------------------------------------------------


def test_a_recipe_reads_its_data_so(tmp_path, recipe):
    data = tmp_path / "d.jsonl"
    rows = [{"q": f"Q{n}", "good": "A", "bad": "B", "strength": n} for n in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from rlhf.config.recipe import load_recipe

    columns = {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": "strength"}
    more = {"model_name_or_path": "m", "output_dir": "o", "dataset_name": str(data), "eval_dataset_name": str(data)}
    path = recipe("reward", columns=columns, eval_strategy="steps", **more)
    found = read_data(load_recipe(path, "reward"), "pairs")
    assert [row["prompt"][0]["content"] for row in found.train] == ["Q0", "Q1", "Q2"]
    assert plain_rows(found.heldout)[1] == {**PAIR, "prompt": [user("Q1")], "margin": 1.0}


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"columns": {"promt": "q"}},
            "columns: 'promt': no format reads a column of that name; did you mean 'prompt'?",
        ),
        ({"columns": ["prompt"]}, "'columns' is ['prompt']; expected "),
        ({"columns": {"prompt": 3}}, "'columns' is {'prompt': 3}; expected names, as in `columns: {prompt: question}`"),
        (
            {"roles": {"human": "usr"}},
            "roles: 'usr': expected one of system, developer, user, assistant, tool; did you mean 'user'?",
        ),
        ({"format": "share-gpt"}, "'format' is 'share-gpt'; expected one of messages, sharegpt, "),
        ({"format": "plain"}, "`format: plain` keeps prompts and answers as plain texts, "),
    ],
)
def test_recipe_key_that_cannot_be_used(recipe, values, message):
    from rlhf.config.recipe import load_recipe

    with pytest.raises(UserError) as caught:
        load_recipe(recipe("dpo", model_name_or_path="m", output_dir="o", dataset_name="d.jsonl", **values), "dpo")
    assert message in str(caught.value)
