"""A template that leaves out what the rows have is refused, or says so; a run never drops tools in silence."""

import json

import pytest

from rlhf.__main__ import main
from rlhf.config.recipe import Recipe
from rlhf.errors import UserError
from rlhf.models.tokenizer import load_tokenizer, render, tokenize_pair
from rlhf.training.template_check import check_template

RECIPE = Recipe("dpo", "r.yaml", {"chat_template": "chatml"}, {"chat_template": 4})
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def pair(**more):
    row = {"prompt": [{"role": "user", "content": "Q"}], "chosen": [{"role": "assistant", "content": "A"}],
           "rejected": [{"role": "assistant", "content": "B"}], "place": "f.jsonl:7"}  # fmt: skip
    return {**row, **more}


@pytest.fixture
def tokenizer(tiny_llama):
    return load_tokenizer(tiny_llama)


@pytest.mark.parametrize(
    "more, what",
    [
        ({"tools": TOOLS}, "tools"),
        (
            {"chosen": [{"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": TOOLS},
            "tools and tool_calls",
        ),
    ],
)
def test_tools_that_the_template_leaves_out_are_refused(tokenizer, more, what):
    with pytest.raises(UserError) as caught:
        check_template([pair(), pair(**more)], tokenizer, RECIPE)
    assert str(caught.value).startswith(
        f"r.yaml:4: the chat template renders f.jsonl:7 without its {what}: set `chat_template`"
    )


def test_other_parts_are_named_once(tokenizer, capsys):
    rows = [pair(chat_template_kwargs={"tone": "kind"}), pair(chat_template_kwargs={"tone": "rude"})]
    reasoning = [{"role": "assistant", "content": "A", "reasoning_content": "hm"}]
    check_template([*rows, pair(chosen=reasoning)], tokenizer, RECIPE)
    assert capsys.readouterr().out.splitlines() == [
        "note: the chat template leaves out 'chat_template_kwargs.tone' (first: f.jsonl:7)",
        "note: the chat template leaves out 'reasoning_content' (first: f.jsonl:7)",
    ]


def test_rows_without_such_parts_are_not_rendered(capsys):
    check_template([pair(), pair()], None, RECIPE)
    assert capsys.readouterr().out == ""


def test_row_that_the_template_cannot_render(tiny_gpt2):
    """alpaca.jinja strips contents, and null is none."""
    tokenizer = load_tokenizer(tiny_gpt2)
    row = pair(chosen=[{"role": "assistant", "content": None, "tool_calls": [CALL]}])
    with pytest.raises(UserError, match="^f.jsonl:7: the chat template can't render this row: "):
        check_template([row], tokenizer, RECIPE)
    with pytest.raises(UserError, match="^f.jsonl:7: the chat template can't render this row: "):
        tokenize_pair(tokenizer, row)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="^the chat template can't render this row: no$"):
        render(tokenizer, {}, row["prompt"])


def test_check_refuses_tools_that_the_models_template_leaves_out(tiny_llama, recipe, tmp_path, capsys):
    data = tmp_path / "d.jsonl"
    row = {key: value for key, value in pair(tools=TOOLS).items() if key != "place"}
    data.write_text(json.dumps(row) + "\n")
    path = recipe(
        "dpo", model_name_or_path=tiny_llama, dataset_name=str(data), output_dir=str(tmp_path / "out"), use_cpu=True
    )
    assert main(["dpo", path, "--check"]) == 2
    assert f"the chat template renders {data}:1 without its tools: set `chat_template`" in capsys.readouterr().err
