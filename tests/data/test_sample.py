"""The embedded preference pairs by their properties: enough, varied, clean, no leak between splits."""

import difflib
import itertools
import json
import re
from collections import Counter

import pytest
from canonical import preference_rows, sft_rows

from rlhf.data.heldout import held_out
from rlhf.data.prepare import prepare
from rlhf.data.sources import JUDGE_NAME, SAMPLE_DIR, SAMPLE_NAME, load_source

SPLITS = ("train", "heldout", "judge")


def source(split):
    return load_source(JUDGE_NAME) if split == "judge" else load_source(SAMPLE_NAME, split)


ROWS = {split: source(split).rows for split in SPLITS}
ALL = [(row["id"], row) for split in SPLITS for row in ROWS[split]]


def question(row):
    """The last user message."""
    return row["prompt"][-1]["content"]


def answer(row, side):
    return row[side][0]["content"]


def normal(text):
    """Words only, in lower case: what is left when two texts are compared for copies."""
    return " ".join(re.findall(r"\w+", text.lower()))


def words(text):
    return len(text.split())


def similarity(a, b, floor):
    """difflib's ratio of two texts, or 0 where its cheap upper bounds are below `floor` already."""
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    if matcher.real_quick_ratio() < floor or matcher.quick_ratio() < floor:
        return 0.0
    return matcher.ratio()


def test_similarity_of_a_near_copy():
    # 9 of 10 characters are shared in order: 2 * 9 / 20
    assert similarity("abcdefghij", "abcdefghix", 0.8) == pytest.approx(0.9)


def test_size():
    assert {split: len(rows) for split, rows in ROWS.items()} == {"train": 200, "heldout": 50, "judge": 122}


@pytest.mark.parametrize("split", SPLITS)
def test_eight_tasks_or_more(split):
    assert len({row["task"] for row in ROWS[split]}) >= 8


def test_the_same_tasks_in_all_splits():
    assert len({frozenset(row["task"] for row in ROWS[split]) for split in SPLITS}) == 1


def test_no_task_is_a_quarter_of_a_split():
    shares = {s: Counter(row["task"] for row in ROWS[s]).most_common(1)[0][1] / len(ROWS[s]) for s in SPLITS}
    assert max(shares.values()) <= 0.25, shares


def test_forty_pairs_or_more_have_several_turns():
    assert sum(len(row["prompt"]) >= 3 for _, row in ALL) >= 40


def test_turns_alternate_from_user_to_user():
    wrong = [
        name
        for name, row in ALL
        if [m["role"] for m in row["prompt"]] != (["user", "assistant"] * len(row["prompt"]))[: len(row["prompt"])]
        or row["prompt"][-1]["role"] != "user"
    ]
    assert wrong == []


def test_ids_are_unique():
    assert [name for name, count in Counter(name for name, _ in ALL).items() if count > 1] == []


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_in_canonical_format_already(split):
    canonical = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS[split]]
    assert preference_rows(source(split)) == canonical


@pytest.mark.parametrize("split", SPLITS)
def test_sft_trains_on_the_chosen_answers(split):
    expected = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS[split]]
    assert sft_rows(source(split)) == expected


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_has_the_same_columns(split):
    columns = {tuple(row) for row in ROWS[split]}
    assert columns == {("id", "task", "failure", "prompt", "chosen", "rejected")}


@pytest.mark.parametrize("split", SPLITS)
def test_one_row_a_line_and_no_blank_lines(split):
    lines = (SAMPLE_DIR / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
    assert (lines[-1], [json.loads(line) for line in lines[:-1]]) == ("", ROWS[split])


def test_no_prompt_in_two_splits():
    prompts = {split: {normal(repr(row["prompt"])) for row in ROWS[split]} for split in SPLITS}
    assert [pair for pair in itertools.combinations(SPLITS, 2) if prompts[pair[0]] & prompts[pair[1]]] == []


def test_no_prompt_twice_in_a_split():
    counts = Counter((split, normal(repr(row["prompt"]))) for split in SPLITS for row in ROWS[split])
    assert [prompt for prompt, count in counts.items() if count > 1] == []


def test_no_held_out_question_is_nearly_a_training_question():
    train = [(row["id"], normal(question(row))) for row in ROWS["train"]]
    near = [
        (row["id"], name)
        for row in ROWS["heldout"]
        for name, text in train
        if similarity(normal(question(row)), text, 0.8) >= 0.8
    ]
    assert near == []


def test_no_question_that_the_quickstart_holds_out_is_nearly_one_that_it_trains_on():
    """Its recipes divide both files by the hash of the prompt (`heldout: 0.4`): 113 and 137 pairs, all tasks in both."""
    sample = load_source(SAMPLE_NAME, "all")
    sides = held_out(prepare(sample, "pairs").rows.column("opening"), 0.4).tolist()
    held, train = ([row for row, side in zip(sample.rows, sides, strict=True) if side is s] for s in (True, False))
    assert [len(held), len(train)] == [137, 113]
    assert {row["task"] for row in held} == {row["task"] for row in train}
    seen = [(row["id"], normal(question(row))) for row in [*train, *ROWS["judge"]]]
    heldout = [(row["id"], normal(question(row))) for row in held]
    assert [(a, b) for a, mine in heldout for b, other in seen if similarity(mine, other, 0.8) >= 0.8] == []


def test_the_quickstarts_heldout_leaves_the_judge_its_pairs():
    """A recipe folder holds out the same fraction everywhere, so that one can name its own data in all four files."""
    sides = held_out(prepare(load_source(JUDGE_NAME), "pairs").rows.column("opening"), 0.4)
    assert (len(sides), sides.sum()) == (122, 1)  # at least one, always


def test_no_answer_twice():
    """Neither within chosen or rejected answers nor between them."""
    counts = Counter(normal(answer(row, side)) for _, row in ALL for side in ("chosen", "rejected"))
    assert [text for text, count in counts.items() if count > 1] == []


def test_no_held_out_answer_shares_most_words_with_a_training_answer():
    """At most 60% of the words of both are common to both (a difflib ratio of all pairs would take seconds)."""
    train = [(row["id"], set(normal(answer(row, "chosen")).split())) for row in ROWS["train"]]
    held_out = [(row["id"], set(normal(answer(row, "chosen")).split())) for row in ROWS["heldout"]]
    assert [(a, b) for a, mine in held_out for b, other in train if len(mine & other) > 0.6 * len(mine | other)] == []


@pytest.mark.parametrize("measure", [len, words], ids=["characters", "words"])
@pytest.mark.parametrize("split", SPLITS)
def test_length_does_not_give_the_answer_away(split, measure):
    """A reward model that always takes the longer answer would have to guess."""
    shorter = sum(measure(answer(row, "rejected")) < measure(answer(row, "chosen")) for row in ROWS[split])
    assert 0.4 <= shorter / len(ROWS[split]) <= 0.6


def test_chosen_answers_fit_the_tokens_of_the_evaluation():
    """configs/quickstart/evaluate.yaml generates 80 tokens: about 60 English words."""
    assert [name for name, row in ALL if not 10 <= words(answer(row, "chosen")) <= 60] == []


def test_rejected_answers_are_neither_empty_nor_endless():
    assert [name for name, row in ALL if not 10 <= words(answer(row, "rejected")) <= 90] == []


def test_prompts_are_short():
    """With the longest answer under 220 words, so that no row of the quickstart (max_length 512) is cut."""
    lengths = {name: sum(words(m["content"]) for m in row["prompt"]) for name, row in ALL}
    assert {name: length for name, length in lengths.items() if not 3 <= length <= 130} == {}


@pytest.mark.parametrize("split", SPLITS)
def test_texts_are_stripped_and_hold_no_control_characters(split):
    texts = [(row["id"], m["content"]) for row in ROWS[split] for m in row["prompt"] + row["chosen"] + row["rejected"]]
    assert [
        name for name, text in texts if text != text.strip() or re.search(r"[^\S \n]|[\x00-\x09\x0b-\x1f\x7f]", text)
    ] == []
