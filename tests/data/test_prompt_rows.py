"""Rows that have a prompt and no answer."""

import pytest

from rlhf.data.messages import RowError
from rlhf.data.prepare import prepare
from rlhf.data.prompt_rows import prompt_row
from rlhf.data.sources import from_python

HI = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    "row, messages, used",
    [
        ({"prompt": "Hi"}, [HI], {"prompt"}),
        ({"prompt": [HI]}, [HI], {"prompt"}),
        ({"query": "Hi", "n": 1}, [HI], {"query"}),
        ({"instruction": "Hi", "input": ""}, [HI], {"instruction", "input"}),
        ({"messages": [HI]}, [HI], {"messages"}),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, [HI], {"conversations"}),
        (
            {"system": "Be brief.", "prompt": "Hi"},
            [{"role": "system", "content": "Be brief."}, HI],
            {"system", "prompt"},
        ),
    ],
)
def test_prompts(row, messages, used):
    found = set()
    assert prompt_row(row, found) == {"prompt": messages} and found == used


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "once"}, "found columns text; expected a prompt"),
        ({"messages": [HI, {"role": "assistant", "content": "a"}]}, "'messages' ends with an assistant message"),
        ({"prompt": [{"role": "tool", "content": "x"}]}, "the prompt has no user message"),
    ],
)
def test_what_is_none(row, message):
    with pytest.raises(RowError) as caught:
        prompt_row(row, set())
    assert message in str(caught.value)


def test_they_are_prepared_as_other_rows_are():
    found = prepare(from_python("data", [{"prompt": "Hi"}, {"prompt": ""}]), "prompts", bad_rows="skip")
    assert [dict(row) for row in found.rows] == [{"prompt": [HI], "place": "data, row 1"}]
    assert [row["place"] for row in found.skipped] == ["data, row 2"]
