"""`rlhf label`: the best against the worst, recomputed from all answers; an audit of labels; best-of-n in the chat."""

import json
import re
from pathlib import Path

import forked
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rlhf
from rlhf.__main__ import main
from rlhf.config.recipe import Recipe
from rlhf.inference.audit_command import disputed_pairs
from rlhf.inference.best_of import best_of
from rlhf.inference.finished import load, resolve
from rlhf.inference.label_command import Choice, best_and_worst
from rlhf.inference.sampling import Sampling
from rlhf.models.digests import weights_digest
from rlhf.runs.provenance import labellers

FEW = ("-n", 3, "--max_new_tokens", 8, "--seed", 3, "--keep_cut")


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run(*words, code=0):
    assert main([*map(str, words)]) == code


def answers(*texts, cut=()):
    return [{"text": text, "finished": n not in cut, "tokens": 1} for n, text in enumerate(texts)]


# --- which pair ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, scores, options, expected",
    [
        (answers("a", "b", "c"), [0.3, 1.2, -0.5], {}, Choice("b", "c", 1.2, -0.5)),
        (answers("a", "b", "c", cut=(1,)), [0.3, 1.2, -0.5], {}, Choice("a", "c", 0.3, -0.5)),
        (answers("a", "b", "c", cut=(1,)), [0.3, 1.2, -0.5], {"keep_cut": True}, Choice("b", "c", 1.2, -0.5)),
        (answers("a", "b", cut=(0,)), [1.0, 2.0], {}, "few"),
        (answers("a", "", "b"), [1.0, 2.0, 1.5], {"keep_cut": True}, Choice("b", "a", 1.5, 1.0)),
        (answers("", "b"), [1.0, 2.0], {}, "few"),
        (answers("a", "a", "a"), [1.0, 1.0, 1.0], {}, "same"),
        (answers("a", "b"), [1.0, 1.0], {}, "tie"),
        (answers("a", "b"), [1.0, 1.5], {"min_margin": 0.6}, "close"),
        (answers("a", "b"), [1.0, 1.5], {"min_margin": 0.5}, Choice("b", "a", 1.5, 1.0)),
        (answers("a", "b", "b"), [1.0, 1.5, 1.5], {}, Choice("b", "a", 1.5, 1.0)),
    ],
)
def test_the_best_against_the_worst(given, scores, options, expected):
    assert best_and_worst(given, scores, **options) == expected


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-2, 2), st.booleans()), min_size=1, max_size=6),
    st.integers(0, 3),
)
def test_a_pair_differs_in_text_and_by_its_margin_and_none_is_better(rows, min_margin):
    found = best_and_worst([{"text": t, "finished": f} for t, _, f in rows], [float(s) for _, s, _ in rows], min_margin)
    usable = [(t, s) for t, s, finished in rows if finished]
    if isinstance(found, str):
        spread = max((s for _, s in usable), default=0) - min((s for _, s in usable), default=0)
        assert (
            len(usable) < 2 or len({t for t, _ in usable}) < 2 or spread < min_margin or spread == 0 or found == "tie"
        )
        return
    assert found.chosen != found.rejected and found.score_chosen - found.score_rejected >= max(min_margin, 1)
    assert (found.chosen, found.score_chosen) in usable and (found.rejected, found.score_rejected) in usable
    assert all(found.score_rejected <= s <= found.score_chosen for _, s in usable)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(few_pairs, tiny_llama, tiny_judge, tmp_path_factory):
    file = tmp_path_factory.mktemp("label") / "pairs.jsonl"
    run("label", few_pairs, "--model", tiny_llama, "--reward", tiny_judge, "--output", file, *FEW)
    return file


def test_pairs_are_those_of_all_answers_and_their_scores(labelled, few_pairs, tiny_judge, tmp_path):
    every, pairs = lines(f"{labelled}.answers.jsonl"), lines(labelled)
    assert [(row["place"], row["sample"]) for row in every] == [
        (f"{few_pairs}:{n}", s) for n in range(1, 13) for s in range(3)
    ]
    expected = []
    for start in range(0, 36, 3):
        own = every[start : start + 3]
        best, worst = max(own, key=lambda row: row["score"]), min(own, key=lambda row: row["score"])
        expected.append({"prompt": best["prompt"], "chosen": best["completion"], "rejected": worst["completion"],
                         "score_chosen": best["score"], "score_rejected": worst["score"]})  # fmt: skip
    assert pairs == expected
    scored = rlhf.score(
        [{k: row[k] for k in ("prompt", "completion")} for row in every if row["completion"][0]["content"]], tiny_judge
    )
    known = [row["score"] for row in every if row["completion"][0]["content"]]
    assert [row["score"] for row in scored] == pytest.approx(known, abs=2e-5)
    record = json.loads(Path(f"{labelled}.provenance.json").read_text())
    assert record["summary"]["pairs"] == 12 and record["summary"]["margin"]["mean"] == pytest.approx(
        np.mean([row["score_chosen"] - row["score_rejected"] for row in pairs])
    )


def test_a_run_records_who_labelled_its_pairs(labelled, few_pairs, tiny_judge):
    """So that an evaluation by that judge does not call it independent."""
    recipe = Recipe("dpo", "", {"dataset_name": [{"name": str(labelled)}, few_pairs]}, {})
    assert labellers(recipe) == [weights_digest(tiny_judge)]
    assert labellers(recipe.replace("dataset_name", few_pairs)) == []


def test_answers_are_those_of_generate(labelled, few_pairs, tiny_llama):
    """The same seed, row and sample."""
    found = rlhf.generate(few_pairs, tiny_llama, n=3, max_new_tokens=8, seed=3)
    assert found == [{k: v for k, v in row.items() if k != "score"} for row in lines(f"{labelled}.answers.jsonl")]


def test_dpo_reads_the_pairs_and_uses_every_column(labelled, recipe, tiny_llama, tmp_path, capsys):
    file = recipe("dpo", model_name_or_path=tiny_llama, dataset_name=str(labelled), output_dir=str(tmp_path / "dpo"))
    run("dpo", file, "--check")
    shown = capsys.readouterr().out
    assert "12 pairs: 0 duplicates" in shown and "not used" not in shown and "score" not in shown


def test_two_processes_write_the_same_pairs(labelled, few_pairs, tiny_llama, tiny_judge, tmp_path):
    out = tmp_path / "pairs.jsonl"
    done = forked.launch(
        2, "label", few_pairs, "--model", tiny_llama, "--reward", tiny_judge, "--output", str(out), *map(str, FEW)
    )
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == labelled.read_bytes()
    assert Path(f"{out}.answers.jsonl").read_bytes() == Path(f"{labelled}.answers.jsonl").read_bytes()


def test_cut_answers_make_no_pair_and_every_prompt_is_counted(few_pairs, tiny_llama, tiny_judge, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    words = [word for word in FEW if word != "--keep_cut"]
    run("label", few_pairs, "--model", tiny_llama, "--reward", tiny_judge, "--output", out, *words, "--min_margin", 0.2)
    record = json.loads(Path(f"{out}.provenance.json").read_text())["summary"]
    assert record["pairs"] + sum(record["no_pair"].values()) == record["prompts"] == 12 and record["no_pair"]["few"] > 0
    shown = capsys.readouterr().out
    assert "fewer than two answers that ended by themselves and have a text (--keep_cut takes cut ones too)" in shown
    every = lines(f"{out}.answers.jsonl")
    ended = {row["completion"][0]["content"] for row in every if row["finished"]}
    assert all(pair["chosen"][0]["content"] in ended and pair["rejected"][0]["content"] in ended for pair in lines(out))


@pytest.mark.parametrize(
    "words, message",
    [
        (("--model", "MODEL", "-n", 1), "a pair needs two answers; give -n 2 or more"),
        ((), "rlhf label needs --model, which answers the prompts"),
        (("--model", "MODEL", "--temperature", 0), "-n 4 with --temperature 0 gives 4 times the same answer"),
        (("--audit", "--model", "MODEL"), "--audit looks at the answers that FILE has; leave --model out"),
        (("--audit", "--min_margin", 1), "--min_margin has no effect with --audit"),
    ],
)
def test_mistakes_are_named(words, message, few_pairs, tiny_llama, tiny_judge, tmp_path, capsys):
    words = [tiny_llama if word == "MODEL" else word for word in words]
    run("label", few_pairs, "--reward", tiny_judge, "--output", tmp_path / "out.jsonl", *words, code=2)
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_file_of_all_answers_that_is_somebody_elses_is_kept(few_pairs, tiny_llama, tiny_judge, tmp_path, capsys):
    (tmp_path / "out.jsonl.answers.jsonl").write_text("mine\n")
    run(
        "label",
        few_pairs,
        "--model",
        tiny_llama,
        "--reward",
        tiny_judge,
        "--output",
        tmp_path / "out.jsonl",
        *FEW,
        code=2,
    )
    assert "out.jsonl.answers.jsonl already exists" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl.answers.jsonl").read_text() == "mine\n"


# --- an audit --------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)) | st.just((np.nan, np.nan)), max_size=40))
def test_disputed_pairs_are_all_below_zero_and_sorted(scores):
    both = np.array(scores).reshape(-1, 2)
    found = disputed_pairs(both)
    margins = both[:, 0] - both[:, 1]
    assert sorted(found.tolist()) == [n for n, margin in enumerate(margins) if margin < 0]
    assert all(a <= b for a, b in zip(margins[found], margins[found][1:], strict=False))


def test_an_audit_names_the_labels_that_the_scores_contradict(few_pairs, tiny_judge, tmp_path, capsys):
    scored = rlhf.score(few_pairs, tiny_judge)
    capsys.readouterr()
    run("label", few_pairs, "--reward", tiny_judge, "--audit", "--output", tmp_path / "out.jsonl")
    margin = lambda row: row["score_chosen"] - row["score_rejected"]  # noqa: E731
    expected = sorted((row for row in scored if margin(row) < 0), key=margin)
    found, shown = lines(tmp_path / "out.jsonl"), capsys.readouterr().out
    assert [row["place"] for row in found] == [row["place"] for row in expected] and 0 < len(found) < 12
    assert f"disputes {len(found)} of 12 labels ({len(found) / 12:.1%})" in shown
    assert re.findall(r"^ +([-+]\d+\.\d{3})   (\S+)$", shown, re.MULTILINE)[0] == (
        f"{margin(found[0]):+.3f}",
        found[0]["place"],
    )
    assert f"rlhf data show {few_pairs} --row {found[0]['place']} --model MODEL" in shown


def test_an_audit_needs_pairs(tiny_judge, tmp_path, capsys):
    (tmp_path / "sft.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    run("label", tmp_path / "sft.jsonl", "--reward", tiny_judge, "--audit", "--output", tmp_path / "out.jsonl", code=2)
    assert (
        "--audit needs pairs, and these rows have one answer each; `rlhf score` scores them" in capsys.readouterr().err
    )


# --- best of n -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tiny_llama, tiny_judge):
    return load(resolve(tiny_llama, "test", reward=False)), load(resolve(tiny_judge, "test", reward=True))


def test_the_best_of_more_is_no_worse_and_of_one_is_the_first(models):
    prompts = [[{"role": "user", "content": text}] for text in ("Hi", "Name a river.", "Why?")]
    sampling = Sampling(max_new_tokens=6, seed=1)
    found = {n: best_of(*models, prompts, n, sampling) for n in (1, 4, 8)}
    for one, four, eight in zip(*found.values(), strict=True):
        assert four.scores[0] == pytest.approx(one.score, abs=1e-5) and eight.scores[:4] == pytest.approx(
            four.scores, abs=1e-5
        )
        assert four.score == max(four.scores) and eight.score == max(eight.scores) >= four.score - 1e-5
    alone = [best_of(*models, [prompt], 4, sampling, first_row=n)[0] for n, prompt in enumerate(prompts)]
    assert [best.answer for best in alone] == [best.answer for best in found[4]]


def test_a_chat_shows_the_best_with_its_score(tiny_llama, tiny_judge, capsys):
    run("chat", tiny_llama, "--reward", tiny_judge, "--best_of", 3, "--prompt", "Hi", "--max_new_tokens", 6)
    out = capsys.readouterr().out
    best, others = re.search(
        r"^    reward ([-+]\d+\.\d\d), the best of 3 \(the others: (.*)\)$", out, re.MULTILINE
    ).groups()
    assert len(others.split(", ")) == 2 and all(float(best) >= float(other) for other in others.split(", "))


@pytest.mark.parametrize(
    "words, message",
    [
        (("--best_of", 3), "--best_of 3 needs --reward MODEL_DIR"),
        (
            ("--best_of", 3, "--reward", "JUDGE", "--temperature", 0),
            "--best_of 3 with --temperature 0 would compare 3 times the same answer",
        ),
    ],  # fmt: skip
)
def test_a_chat_needs_a_judge_and_answers_that_differ(words, message, tiny_llama, tiny_judge, capsys):
    run("chat", tiny_llama, "--prompt", "Hi", *(tiny_judge if word == "JUDGE" else word for word in words), code=2)
    assert message in capsys.readouterr().err
