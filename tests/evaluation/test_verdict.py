"""The verdict and its tables say what the numbers show, and who judged; every branch, from hand-made results."""

import pytest

from rlhf.evaluation.comparison import summarise_judges, summarise_judgments, summarise_samples
from rlhf.runs.verdict import (
    compared_with_others,
    dependence,
    model_note,
    model_rows,
    pair_note,
    pair_rows,
    verdicts,
)

POLICY = {"chosen_logp": -20.04, "rejected_logp": -30.0, "mean_words": 100.0, "mean_characters": 600.0, "answers": 120,
          "answers_cut": 3, "answers_empty": 0}  # fmt: skip
SHARE = {"share": 0.58, "low": 0.52, "high": 0.64}
EVEN = {"share": 0.52, "low": 0.46, "high": 0.58}
LOST = {"share": 0.38, "low": 0.30, "high": 0.47}


def model(name, stage, data=("d",), digest="x", **more):
    return {"name": name, "digest": digest, "weights": f"files of {digest}", "stage": stage, "data": list(data), "labelled_by": [], "starts_from": None, "beta": None, **more}  # fmt: skip


def row(judge="reward_model", found=SHARE, equal=SHARE, **more):
    return {"judge": judge, "a": "dpo", "b": "sft", "count": 120, "not_judged": {}, "a_words": 112.0, "b_words": 100.0,
            "wins": 60, "ties": 20, "losses": 40, "p": 0.0569, "p_adjusted": 0.0569, **found,
            "length_controlled": {**equal, "coefficient": 0.31, "sd": 90.0}, **more}  # fmt: skip


def results(*rows, **more):
    found = {
        "policies": {"sft": dict(POLICY), "dpo": dict(POLICY)}, "baseline": "sft", "pairwise": list(rows), "max_new_tokens": 96,
        "models": {"sft_model": model("runs/sft", "sft", digest="s"), "dpo_model": model("runs/dpo", "dpo", ("pairs",)),
                   "reward_model": model("runs/rm", "reward", ("other",), "r"), "judge.RM2": model("runs/rm2", "reward", ("pairs",), "q")},
        "judges": {"reward_model": {"kind": "reward", "key": "reward_model"}, "RM2": {"kind": "reward", "key": "judge.RM2"},
                   "gpt": {"kind": "endpoint", "model": "gpt"}},
    }  # fmt: skip
    return found | more


def told(*rows, **more):
    (sentence,) = verdicts(results(*rows, **more))
    return sentence


def test_a_win():
    assert told(row()) == (
        "DPO beats SFT: 58% [52, 64] of 120 prompts by runs/rm (trained on other data than DPO), DPO's answers 12% longer; "
        "length-controlled 58% [52, 64]."
    )


def test_a_win_that_length_explains():
    assert told(row(equal=EVEN)).endswith("length-controlled 52% [46, 58], where no difference is shown.")
    assert told(row(equal=LOST)).endswith("length-controlled 38% [30, 47], where it is the other way.")


def test_no_difference_and_a_loss():
    assert told(row(found=EVEN, equal=EVEN)).startswith(
        "No difference shown between DPO and SFT: DPO wins 52% [46, 58] of 120"
    )
    assert told(row(found=LOST)).startswith("SFT beats DPO: DPO wins 38% [30, 47] of 120 prompts")


@pytest.mark.parametrize("low, text", [(0.501, "[50.1, 64.0]"), (0.5, "[50, 64]")])
def test_an_end_that_decides_is_not_rounded_to_a_half(low, text):
    assert text in told(row(found={**SHARE, "low": low}))
    assert told(row(found={**SHARE, "low": low})).startswith("DPO beats" if low > 0.5 else "No difference")


@pytest.mark.parametrize(
    "words, text",
    [(112.0, "12% longer"), (80.0, "20% shorter"), (100.4, "of the same length"), (99.6, "of the same length")],
)
def test_lengths_stand_beside_the_rate(words, text):
    assert f"DPO's answers {text};" in told(row(a_words=words))
    assert "longer, as the other's are empty" in told(row(b_words=0.0))


def test_a_judge_of_the_same_pairs_is_said_to_be_one():
    text = told(row("RM2"))
    assert "by RM2 (trained on the same pairs as DPO)" in text
    assert text.endswith("No independent judge was asked: it shows that DPO follows these preferences, not that its answers are better.")  # fmt: skip
    assert told(row("RM2", found=EVEN)).endswith("No independent judge was asked.")


def test_a_judge_that_labelled_the_pairs_is_said_to_have():
    found = results(row())
    found["models"]["dpo_model"]["labelled_by"] = ["files of r"]
    (text,) = verdicts(found)
    assert "runs/rm (which labelled the pairs that DPO was trained on)" in text and "No independent judge" in text


@pytest.mark.parametrize(
    "change", [{"models": {}}, {"models": {"dpo_model": model("d", "dpo"), "reward_model": model("m", None, ())}}]
)
def test_a_judge_of_unknown_training_is_not_called_independent(change):
    assert dependence(results(**change), "reward_model", "dpo")[0] is None
    assert "whether" in told(row(), **change) and "is not recorded" in told(row(), **change)


def test_the_most_independent_judge_decides_and_the_others_are_named():
    text = told(row("RM2", found={"share": 0.7, "low": 0.6, "high": 0.8}), row("gpt", found=EVEN, equal=EVEN))
    assert text.startswith(
        "No difference shown between DPO and SFT: DPO wins 52% [46, 58] of 120 prompts by gpt (an outside judge)"
    )
    assert "; RM2 (trained on the same pairs as DPO): 70% [60, 80]." in text
    assert "No independent judge" not in text and "disagree" not in text


def test_judges_that_disagree():
    assert told(row("gpt"), row("RM2", found=LOST)).endswith("RM2 (trained on the same pairs as DPO): 38% [30, 47]; the judges disagree.")  # fmt: skip


def test_few_prompts_missing_judgments_and_cut_answers_are_said():
    few = told(row(count=12, not_judged={"refused": 1}))
    assert "12 prompts are few: the interval is too narrow. 1 more prompt was not judged." in few
    found = results(row())
    found["policies"]["dpo"]["answers_cut"] = 60
    assert verdicts(found)[0].endswith("60 of 120 answers of DPO were cut at max_new_tokens=96.")


def test_a_judge_that_judged_nothing():
    nothing = {"judge": "gpt", "a": "dpo", "b": "sft", "count": 0, "not_judged": {"refused": 120}}
    assert told(nothing) == "No verdict on DPO against SFT: gpt judged none of the answers."
    assert pair_rows(results(nothing))[0][:5] == (
        "DPO against SFT",
        "gpt",
        "",
        "",
        "0, 0, 0, 120 not judged (120 refused)",
    )


def test_a_sentence_for_every_model_against_the_baseline():
    rows = [row(), row() | {"a": "x"}, row() | {"a": "x", "b": "dpo"}]
    found = results(*rows)
    found["policies"]["x"] = dict(POLICY)
    assert [text.split(":")[0] for text in verdicts(found)] == ["DPO beats SFT", "x beats SFT"]
    assert len(pair_rows(found)) == 3


def test_nobody_compared():
    assert verdicts(results()) == [] and pair_rows(results()) == [] and pair_note(results()) == ""
    assert verdicts({"policies": {}}) == []  # an older version


def test_the_tables():
    kl = {
        "dpo": {
            "reference": "sft",
            "sum": 3.456,
            "sum_se": 0.4567,
            "per_token": 0.0456,
            "per_token_se": 0.006,
            "answers": 64,
        }
    }
    found = results(row(p=0.0002, p_adjusted=0.0004), kl=kl, kl_skipped={"sft": "why"})
    assert pair_rows(found) == [(
        "DPO against SFT", "rm", "58%", "52% to 64%", "60, 20, 40", "<0.001 (<0.001)", "112, 100", "58% (52% to 64%; +0.31)",
    )]  # fmt: skip
    assert model_rows(found)[1] == ("DPO", "-20.0", "-30.0", "100", "600", "3 of 120", "3.46 ± 0.46", "0.0456 ± 0.006")
    assert "divergence from SFT in nats (± standard error), on 64 answers" in model_note(found)
    assert "first 96 tokens. No KL of SFT: why." in model_note(found)
    assert "(Holm)" in pair_note(found)
    del found["policies"]["sft"]["mean_words"]  # an older version
    assert model_rows(found) == [] and model_note(found) == ""


def test_what_a_card_takes_over():
    rows = [row(), row() | {"a": "x"}, row() | {"a": "x", "b": "dpo"}]
    found = results(*rows)
    found["policies"]["x"] = dict(POLICY)
    mine = compared_with_others(found, "models.x")
    assert [(r["a"], r["b"]) for r in mine["pairwise"]] == [("x", "sft"), ("x", "dpo")] and set(mine["policies"]) == {
        "sft",
        "dpo",
        "x",
    }
    nothing = compared_with_others(found, "reward_model")
    assert nothing["pairwise"] == [] and model_rows(nothing) == []


# --- what the judgments add up to ------------------------------------------------------------------------------------


def test_judgments_add_up():
    answers = [
        {"a": "one two", "b": "one"},
        {"a": "x", "b": "x"},
        {"a": "one", "b": "one two three"},
        {"a": "", "b": "y"},
    ]
    score = lambda i, x, y, win: {"row": i, "judge": "J", "a": "a", "b": "b", "win": win, "a_score": x, "b_score": y}  # noqa: E731
    lines = [score(0, 3.0, 1.0, 1.0), score(1, 1.0, 1.0, 0.5), score(2, 0.0, 1.0, 0.0),
             {"row": 3, "judge": "J", "a": "a", "b": "b", "win": None, "why": "refused"}]  # fmt: skip
    (found,) = summarise_judgments(lines, answers, 0)
    assert (found["share"], found["count"], found["not_judged"]) == (0.5, 3, {"refused": 1})
    assert (found["a_words"], found["b_words"]) == (4 / 3, 5 / 3)  # (2 + 1 + 1) / 3, (1 + 1 + 3) / 3
    assert found["a_characters"] == pytest.approx((7 + 1 + 3) / 3) and found["p"] == 1.0
    assert found["score_difference"] == pytest.approx((2 + 0 - 1) / 3)
    assert found["score_p"] == 1.0  # |+-2 +-0 +-1| is at least 1 for all signs


def test_a_judge_is_judged():
    verdicts_of = lambda *both: {"judge": "gpt", "verdicts": list(both)}  # noqa: E731
    lines = [
        verdicts_of("A", "B"),
        verdicts_of("A", "A"),
        verdicts_of("C", "C"),
        verdicts_of("A", "C"),
        verdicts_of(None, "A"),
    ]
    pairs = [{"reward": {"chosen": 2.0, "rejected": 1.0}}, {"reward": {"chosen": 0.0, "rejected": 1.0}}]
    found = summarise_judges({"gpt": {"kind": "endpoint"}, "reward_model": {"kind": "reward"}}, lines, pairs)
    assert found["gpt"]["orders_agree"]["share"] == 0.5  # the first and the third of four
    assert found["gpt"]["prefers_first"]["share"] == 0.8  # A, B, A, A, A: four of five
    assert found["reward_model"]["accuracy"]["share"] == 0.5


def test_samples_add_up():
    ones = {0: {"ids": [1, 2], "cut": False, "logp": -1.0, "reference_logp": -3.0}, 1: {"ids": [1, 2], "cut": True, "logp": -1.0, "reference_logp": -5.0}}  # fmt: skip
    found = summarise_samples({"dpo": ones}, "sft")["dpo"]
    assert (found["sum"], found["sum_se"], found["per_token"], found["cut"], found["reference"]) == (3.0, 1.0, 1.5, 1, "sft")  # fmt: skip
