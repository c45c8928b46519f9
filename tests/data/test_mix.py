"""Several data sets as one: amounts by hand, the same rows for a seed, held-out prompts in none of the training rows."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.__main__ import main
from rlhf.config.recipe import load_recipe
from rlhf.data.mix import Entry, amounts, choose, data_name, mix_lines, read_mix, shuffle
from rlhf.data.rows import read_data
from rlhf.errors import UserError


def test_entries():
    value = ["a.jsonl", {"name": "b", "fraction": 0.5, "split": "test", "columns": {"prompt": "q"}}]
    assert read_mix(value, "r:1") == [
        Entry("a.jsonl"),
        Entry("b", split="test", fraction=0.5, format={"columns": {"prompt": "q"}}),
    ]
    assert data_name(value) == "a.jsonl + b"


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([], "dataset_name is an empty list; name at least one data set"),
        ([5], "entry 1 is 5; expected a name, or a mapping with `name`"),
        ([{"fraction": 0.5}], "expected a name, or a mapping with `name`"),
        ([{"name": "a", "part": 1}], "entry 1: unknown key 'part'; expected name, split"),
        (["a", {"name": "b", "fraction": 0.5, "rows": 3}], "entry 2 has both fraction and rows; keep one"),
        (
            [{"name": "a", "fraction": 1.5}],
            "fraction is 1.5; expected a number above 0 and at most 1 (more than once: `epochs`)",
        ),
        ([{"name": "a", "rows": 2.5}], "rows is 2.5; expected a whole number of at least 1"),
        ([{"name": "a", "epochs": 0}], "epochs is 0; expected a number above 0"),
        ([{"name": "a", "weight": True}], "weight is True; expected a number above 0"),
        ([{"name": "a", "columns": "q"}], "'columns' is 'q'; expected names, as in `columns: {prompt: question}`"),
        ([{"name": "a", "roles": {"x": "boss"}}], "expected one of system"),
        ([{"name": "a", "format": "pair"}], "there is no format 'pair'; expected one of"),
        ([{"name": "a", "format": ["pairs"]}], "there is no format ['pairs']"),
        ([{"name": "a", "split": 3}], "split is 3; expected a name"),
        ([{"name": "a", "weight": 1}, "b"], "entry 2 (b) has no weight, but others have one"),
    ],
)
def test_wrong_entries(value, sentence):
    with pytest.raises(UserError) as caught:
        read_mix(value, "r:7")
    assert str(caught.value).startswith("r:7: ") and sentence in str(caught.value)


def test_amounts_by_hand():
    """Weights 3 and 1 of 600 and 1,000 rows: all 600, and a third as many, 200 of the 1,000."""
    assert amounts([Entry("a", weight=3), Entry("b", weight=1)], [600, 1000], "") == [1.0, 0.2]
    entries = [Entry("a"), Entry("b", fraction=0.25), Entry("c", rows=30), Entry("d", epochs=2.5)]
    assert amounts(entries, [7, 8, 60, 9], "") == [1.0, 0.25, 0.5, 2.5]
    with pytest.raises(
        UserError, match="asks for 61 rows of c, which has 60; ask for fewer, or set `epochs: 1.02` to repeat them"
    ):
        amounts([Entry("c", rows=61)], [60], "r:1")


@given(st.integers(1, 50), st.floats(0.01, 4), st.integers(0, 9))
def test_each_row_is_chosen_as_often_as_said(size, amount, seed):
    numbers = np.arange(size) * 3
    chosen = choose(numbers, amount, seed, 0)
    counts = [int((chosen == number).sum()) for number in numbers]
    assert len(chosen) == int(amount) * size + round(amount % 1 * size)
    assert set(counts) <= {int(amount), int(amount) + 1}
    assert (choose(numbers, amount, seed, 0) == chosen).all()
    assert sorted(shuffle(chosen, seed)) == sorted(chosen)


def test_lines():
    lines = mix_lines([Entry("a"), Entry("b")], [600, 100], [300, 200], [300, 100])
    assert lines == ["mix: 300 of the 600 rows of a (60.0%)", "mix: all 100 rows of b, each 2.00 times (40.0%)"]
    (line,) = mix_lines([Entry("b")], [100], [120], [60])  # 40 are held out
    assert line == "mix: 60 of the 100 rows of b, each 2.00 times (100.0%)"


@pytest.fixture
def files(tmp_path):
    found = []
    for name, count in (("a", 40), ("b", 20)):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"{name} {n}", "chosen": "yes", "rejected": "no"} for n in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(str(path))
    return found


def rows_of(recipe, **values):
    path = recipe("dpo", model_name_or_path="m", output_dir="o", **values)
    found = read_data(load_recipe(path, "dpo"), "pairs")
    texts = lambda rows: [row["prompt"][0]["content"] for row in rows or ()]  # noqa: E731
    return found, texts(found.train), texts(found.heldout)


def test_in_a_recipe(recipe, files):
    mix = [{"name": files[0], "fraction": 0.5}, {"name": files[1], "epochs": 2}]
    found, train, _ = rows_of(recipe, dataset_name=mix)
    assert len(train) == 20 + 40 and sorted(train.count(f"b {n}") for n in range(20)) == [2] * 20
    assert found.describe()[0] == f"mix: 20 of the 40 rows of {files[0]} (33.3%)"
    assert found.describe()[2].startswith(
        f"{files[0]} + {files[1]}: 40 pairs: 0 duplicates, "
    )  # those of `epochs` are none
    assert rows_of(recipe, dataset_name=mix)[1] == train
    other = rows_of(recipe, dataset_name=mix, seed=7)[1]
    assert other != train and len(other) == 60
    assert {text[0] for text in rows_of(recipe, dataset_name=mix, max_train_examples=12)[1]} == {"a", "b"}
    assert rows_of(recipe, dataset_name=mix)[0].digests == found.digests
    assert rows_of(recipe, dataset_name=[mix[0], files[1]])[0].digests != found.digests


def test_held_out_prompts_are_not_trained_on_and_not_repeated(recipe, files):
    mix = [{"name": files[0], "fraction": 0.5}, {"name": files[1], "epochs": 2}]
    _, train, heldout = rows_of(recipe, dataset_name=mix, heldout=12)
    assert heldout and not set(train) & set(heldout) and len(set(heldout)) == len(heldout)


def test_a_mistake_ends_with_its_place(recipe, files, capsys):
    path = recipe(
        "dpo", model_name_or_path="m", output_dir="o", dataset_name=[files[0], {"name": files[1], "rows": 21}]
    )
    assert main(["dpo", path, "--check"]) == 2
    error = capsys.readouterr().err
    assert "dataset_name asks for 21 rows of" in error and error.count("\n") == 1 and "dpo.yaml:" in error
