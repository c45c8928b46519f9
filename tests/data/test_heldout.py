"""Held-out means held out: one split by prompt for all stages, and an evaluation that knows what its models have seen."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.__main__ import main
from rlhf.data.heldout import held_out, trained_on, write_train_prompts
from rlhf.data.prepare import prepare
from rlhf.data.sources import Source, load_source
from rlhf.errors import UserError
from rlhf.evaluation.overlap import find_overlap, heading

ROOT = Path(__file__).parent.parent.parent


def prepared(rows, kind="pairs"):
    return prepare(Source("rows", rows, None, "0" * 64), kind).rows


def sides(rows, share, kind="pairs"):
    """For each row, whether it is held out."""
    return held_out(prepared(rows, kind).column("opening"), share).tolist()


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


words = st.text("abcdefg hijkl", min_size=1, max_size=12).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(words, min_size=3, max_size=40, unique_by=lambda t: " ".join(t.casefold().split())),
    st.randoms(),
    st.floats(0.05, 0.9),
)
def test_all_stages_agree_whatever_the_order_and_the_columns(prompts, dice, share):
    pairs = [{"prompt": p, "chosen": "yes", "rejected": "no"} for p in prompts]
    alpaca = [{"instruction": p.upper(), "output": "yes"} for p in prompts]
    chats = [{"messages": user(f"  {p} ") + assistant("yes")} for p in prompts]
    systems = [{"prompt": p, "system": "be brief", "chosen": "a", "rejected": "b"} for p in prompts]
    for rows in (pairs, alpaca, chats, systems):
        dice.shuffle(rows)
    first = {}
    for rows, kind, name in (
        (pairs, "pairs", "prompt"), (alpaca, "sft", "instruction"), (chats, "sft", "messages"),
        (systems, "pairs", "prompt"),
    ):  # fmt: skip
        found = sides(rows, share, kind)
        asked = [row[name] if isinstance(row[name], str) else row[name][0]["content"] for row in rows]
        normal = [" ".join(text.casefold().split()) for text in asked]
        assert any(found)
        assert first.setdefault("sides", dict(zip(normal, found, strict=True))) == dict(zip(normal, found, strict=True))


def test_a_dialogue_and_its_continuation_stay_together():
    """10 dialogues, each also one turn shorter: the longer one's prompt holds the shorter one's, so they share a side."""
    long = [{"messages": user(f"q{i}") + assistant("a") + user("and?") + assistant("b")} for i in range(10)]
    short = [{"prompt": f"q{i}", "completion": "a"} for i in range(10)]
    assert sides(long, 0.5, "sft") == sides(short, 0.5, "sft")
    assert 0 < sum(sides(short, 0.5, "sft")) < 10


def test_a_share_does_not_move_prompts_when_rows_are_added_and_a_count_is_exact():
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(1000)]
    assert sides(rows, 0.1)[:500] == sides(rows[:500], 0.1)
    assert 70 < sum(sides(rows, 0.1)) < 130  # 100 expected, standard deviation 9.5
    assert sum(sides(rows, 30)) == 30 and sum(sides(rows + rows, 30)) == 60  # prompts, not rows


def test_by_hand():
    """Openings below 2**64 x the fraction; at least one, also if it is none; a number: the smallest ones."""
    openings = np.array([3 << 60, 1 << 60, 3 << 60, (1 << 64) - 1], np.uint64)
    assert held_out(openings, 0.1).tolist() == [False, True, False, False]  # 1.6 << 60
    assert held_out(openings, 0.2).tolist() == [True, True, True, False]  # 3.2 << 60
    assert held_out(openings, 0.01).tolist() == [False, True, False, False]
    assert held_out(openings, 2).tolist() == [True, True, True, False]
    assert held_out(openings[3:], 0.5).tolist() == [True]  # the only prompt
    assert held_out(openings[:0], 0.5).tolist() == []


@pytest.mark.parametrize(
    ("values", "key", "words"),
    [
        ({"heldout": 0.5, "dataset_test_split": "x"}, "heldout", "both define the held-out data"),
        ({"heldout": 12}, "heldout", "leaves no row of"),
        ({"heldout": 1.5}, "heldout", "neither a fraction below 1 nor an integer number"),
        ({"heldout": -1}, "heldout", "heldout"),
        ({"dataset_test_split": "heldout"}, "dataset_test_split", "has no split 'heldout': a single file has one split; use `heldout: 0.05`"),
        ({"dataset_train_split": "other"}, "dataset_name", "has no split 'other'"),
    ],
)  # fmt: skip
def test_refused_with_the_fix(values, key, words, recipe, tiny_llama, few_pairs, tmp_path, capsys):
    file = recipe(
        "dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "o"), **values
    )
    assert main(["dpo", file, "--check"]) == 2
    line = 1 + next(i for i, x in enumerate(Path(file).read_text().splitlines()) if x.startswith(f"{key}:"))
    error = capsys.readouterr().err
    assert error.startswith(f"rlhf: {file}:{line}: ") and words in error, error


def test_prompts_are_kept_and_found(tmp_path):
    """A dialogue of two answers trains two prompts; 8 bytes each; case and white space don't matter."""
    rows = prepared([{"messages": user("One?") + assistant("a") + user("Two?") + assistant("b")}], "sft")
    write_train_prompts(tmp_path, rows)
    assert (tmp_path / "prompts.hashes").stat().st_size == 16
    wanted = prepared([{"prompt": p, "chosen": "a", "rejected": "b"} for p in ("one?", "Two?", " ONE? ")])
    assert trained_on(tmp_path, wanted).tolist() == [True, False, True]
    assert trained_on(tmp_path / "nowhere", wanted) is None
    (tmp_path / "prompts.hashes").write_bytes(b"123")
    with pytest.raises(UserError, match="damaged"):
        trained_on(tmp_path, wanted)


def test_overlap_follows_the_runs_that_a_model_came_from(tmp_path):
    """dpo was trained on q0 and started from sft, which was trained on q1: both are seen; q2 and q3 are held out."""
    pairs = prepared([{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(4)])
    for number, (name, start) in enumerate((("dpo", str(tmp_path / "sft")), ("sft", "hub/base"))):
        (tmp_path / name).mkdir()
        write_train_prompts(tmp_path / name, pairs[number : number + 1])
        provenance = {"arguments": {"model": {"model_name_or_path": start}}}
        (tmp_path / name / "provenance.json").write_text(json.dumps(provenance))
    overlap, seen = find_overlap(pairs, {"dpo_model": str(tmp_path / "dpo")})
    assert seen.tolist() == [True, True, False, False] and overlap.left_out == 2
    assert overlap.by_run == {str(tmp_path / "dpo"): 1, str(tmp_path / "sft"): 1} and overlap.unknown == ["hub/base"]
    assert heading({"pairs": 2, "overlap": overlap.record()}) == "2 held-out pairs"
    overlap, _ = find_overlap(pairs[:2], {"dpo_model": str(tmp_path / "dpo")})
    assert heading({"pairs": 2, "overlap": overlap.record()}) == "2 pairs that a model was trained on (not held out)"
    overlap, _ = find_overlap(pairs, {"dpo_model": "hub/other"})
    assert heading({"pairs": 4, "overlap": overlap.record()}).startswith(
        "4 pairs (the models' training data is unknown)"
    )


def test_the_quickstart_copied_for_one_csv(tiny_llama, tmp_path, monkeypatch, capsys):
    """Only the data, the model and the folder are edited: what is evaluated was trained on by no stage."""
    with open(tmp_path / "mine.csv", "w", newline="") as opened:
        table = csv.writer(opened)
        table.writerow(["prompt", "chosen", "rejected"])
        table.writerows([[f"What is {i}?", f"It is {i}.", "No idea at all."] for i in range(24)])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for file in (ROOT / "configs" / "quickstart").glob("*.yaml"):
        text = re.sub("embedded:(sample|judge)", "mine.csv", file.read_text()).replace("runs/quickstart", "runs/mine")
        (tmp_path / "mine" / file.name).write_text(text.replace("embedded:smollm2-135m-instruct", tiny_llama))
    for stage in ("sft", "reward", "dpo"):
        steps = ["--max_steps", "1"] + (["--reference_cache", str(tmp_path / "cache")] if stage == "dpo" else [])
        assert main([stage, f"mine/{stage}.yaml", *steps]) == 0
    capsys.readouterr()
    assert main(["evaluate", "mine/evaluate.yaml", "--max_new_tokens", "2"]) == 0
    shown = capsys.readouterr().out
    results = json.loads(Path("runs/mine/evaluation/results.json").read_text())
    assert results["overlap"]["seen"] == 0 and results["overlap"]["known"]
    assert f"On {results['pairs']} held-out pairs" in shown
    # the same without the key: all rows are training rows, and are called so
    text = Path("mine/evaluate.yaml").read_text()
    Path("mine/evaluate.yaml").write_text("".join(x for x in text.splitlines(True) if not x.startswith("heldout")))
    assert main(["evaluate", "mine/evaluate.yaml", "--check", "--output_dir", "runs/other"]) == 0
    shown = capsys.readouterr().out
    trained = 24 - results["pairs"]
    assert f"{trained} of 24 evaluation prompts were in the training data of runs/mine/sft" in shown
    assert f"these {trained} are left out: only the other {results['pairs']} are held out" in shown


def test_the_sample_as_a_whole_and_its_splits():
    assert [len(load_source("embedded:sample", split).rows) for split in ("all", "train", "heldout")] == [250, 200, 50]
