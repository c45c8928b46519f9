"""Answers judged one per row -> pairs: in the order in which they come, what is left over counted and named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.recognise import converter
from rlhf.data.unpaired import Leftovers, pair_unpaired


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def canonical(prompt, answer, label):
    return {"prompt": [user(prompt)], "completion": [assistant(answer)], "label": label}


def pair(prompt, good, bad, **more):
    return {"prompt": [user(prompt)], "chosen": [assistant(good)], "rejected": [assistant(bad)], **more}


def paired(*rows):
    leftovers = Leftovers()
    return list(pair_unpaired([(f"f:{n}", row) for n, row in enumerate(rows, 1)], leftovers)), leftovers


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": [user("Q")], "completion": [assistant("A")], "label": True}, canonical("Q", "A", True)),
        ({"prompt": "Q", "completion": "A", "label": "false"}, canonical("Q", "A", False)),
        ({"prompt": "Q", "completion": "A", "label": 1}, canonical("Q", "A", True)),
        ({"instruction": "Q", "input": "", "output": "A", "kto_tag": False}, canonical("Q", "A", False)),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "kto_tag": True},
         canonical("Q", "A", True)),
        ({"messages": [user("Q"), assistant("A")], "label": True, "tools": [{"name": "f"}]},
         {**canonical("Q", "A", True), "tools": [{"name": "f"}]}),
        ({"prompt": "Q", "response": "A", "helpfulness": 3, "verbosity": 1},
         {"prompt": [user("Q")], "completion": [assistant("A")], "score": 3.0}),
    ],
)  # fmt: skip
def test_rows_that_can_be_paired(row, expected):
    used = set()
    assert converter("unpaired", [row])(row, used) == expected


def test_thumbs_pair_in_order():
    pairs, leftovers = paired(
        canonical("p", "a", True), canonical("p", "b", True), canonical("q", "x", False), canonical("p", "c", False),
        canonical("p", "d", False), canonical("q", "y", True),
    )  # fmt: skip
    assert pairs == [("f:1", pair("p", "a", "c")), ("f:2", pair("p", "b", "d")), ("f:6", pair("q", "y", "x"))]
    assert str(leftovers) == "3 pairs"


def test_what_is_left_over_is_counted_and_named():
    rows = [canonical("p", "a", True), canonical("q", "b", False), canonical("q", "c", False), canonical("r", "d", True),
            canonical("r", " d ", False)]  # fmt: skip
    pairs, leftovers = paired(*rows)
    assert pairs == []
    assert str(leftovers) == (
        "0 pairs; left out: 1 good answers without a bad one to the same prompt (first: f:1), 2 bad answers without a good one "
        "(first: f:2), 2 answers equal to, or judged like, their counterpart (first: f:5)"
    )


def test_scores_pair_two_by_two():
    """HelpSteer2: two rows for each prompt."""
    scored = [{"prompt": [user(p)], "completion": [assistant(a)], "score": s}
              for p, a, s in (("p", "a", 1.0), ("p", "b", 4.0), ("q", "c", 2.0), ("q", "d", 2.0))]  # fmt: skip
    pairs, leftovers = paired(*scored)
    assert pairs == [("f:2", pair("p", "b", "a"))]
    assert (leftovers.pairs, leftovers.equal) == (1, 2)


def test_answers_with_other_tools_are_to_another_prompt():
    pairs, leftovers = paired({**canonical("p", "a", True), "tools": [{"name": "f"}]}, canonical("p", "b", False))
    assert (pairs, leftovers.better, leftovers.worse) == ([], 1, 1)
    both = [{**canonical("p", a, label), "tools": [{"name": "f"}]} for a, label in (("a", True), ("b", False))]
    assert paired(*both)[0] == [("f:1", pair("p", "a", "b", tools=[{"name": "f"}]))]


@given(st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from("abcd"), st.booleans()), max_size=30))
def test_every_answer_is_in_a_pair_or_left_over(rows):
    pairs, leftovers = paired(*(canonical(*row) for row in rows))
    assert 2 * len(pairs) + leftovers.better + leftovers.worse + leftovers.equal == len(rows)
    good = {(p, a) for p, a, label in rows if label}
    for _, found in pairs:
        prompt = found["prompt"][0]["content"]
        assert (prompt, found["chosen"][0]["content"]) in good
        assert (prompt, found["rejected"][0]["content"], False) in rows
    json.dumps(pairs)
