"""The evaluation's arithmetic, against values worked out by hand."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf.evaluation.statistics import compare, share, summarise, token_loss, wilson_interval
from rlhf.runs.results import cut_sentence, judge_sentence, labels_of, reference_note, table_rows, what_got_worse

LN2 = 0.693147


# --- shares and their intervals --------------------------------------------------------------------------------------


def test_wilson_of_8_in_10():
    # z = 1.96, z^2 = 3.8416; centre (0.8 + 3.8416/20) / (1 + 3.8416/10) = 0.99208 / 1.38416 = 0.71674
    # half 1.96 * sqrt(0.8*0.2/10 + 3.8416/400) / 1.38416 = 1.96 * sqrt(0.025604) / 1.38416 = 0.22658
    # 0.71674 - 0.22658 = 0.49016, 0.71674 + 0.22658 = 0.94332
    assert wilson_interval(8, 10) == pytest.approx((0.49016, 0.94332), abs=2e-5)


def test_wilson_of_none():
    # share 0: both terms are z^2 / (2n) / (1 + z^2 / n), so low = 0 and high = z^2 / (n + z^2) = 3.8416 / 13.8416
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27754), abs=2e-5)


def test_wilson_of_all():
    # the mirror image: 1 - 0.27754
    assert wilson_interval(10, 10) == pytest.approx((0.72246, 1.0), abs=2e-5)


def test_wilson_of_half_of_100():
    # centre 0.5; half 1.96 * sqrt(0.0025 + 3.8416/40000) / 1.038416 = 1.96 * 0.050951 / 1.038416 = 0.09617
    assert wilson_interval(50, 100) == pytest.approx((0.40383, 0.59617), abs=2e-5)


def test_wilson_of_nothing_is_everything():
    assert wilson_interval(0, 0) == (0.0, 1.0)


COUNTS = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, 2 * n).map(lambda k: k / 2), st.just(n)))


@given(COUNTS)
def test_wilson_is_symmetric(case):
    wins, count = case
    low, high = wilson_interval(wins, count)
    assert wilson_interval(count - wins, count) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@given(COUNTS)
@example((0, 9))  # the two halves differ in their last bit
@example((0, 50))
@example((50, 50))
def test_wilson_lies_within_0_and_1_around_the_share(case):
    wins, count = case
    low, high = wilson_interval(wins, count)
    assert 0 <= low <= wins / count <= high <= 1


@given(COUNTS)
def test_wilson_narrows_with_the_count(case):
    wins, count = case
    narrow, wide = wilson_interval(2 * wins, 2 * count), wilson_interval(wins, count)
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


def test_share_counts_a_tie_as_half_a_win():
    # (1 + 0.5 + 0 + 0.5) / 4 = 0.5
    found = share([1.0, 0.5, 0.0, 0.5])
    assert (found["share"], found["count"]) == (0.5, 4)


def test_share_has_the_interval_of_its_wins():
    found = share([1.0] * 7 + [0.5] * 2 + [0.0])  # 7 + 2 * 0.5 = 8 of 10
    assert (found["low"], found["high"]) == pytest.approx((0.49016, 0.94332), abs=2e-5)


@pytest.mark.parametrize("a, b, expected", [(2.0, 1.0, 1.0), (1.0, 2.0, 0.0), (-3.0, -3.0, 0.5)])
def test_compare(a, b, expected):
    assert compare(a, b) == expected


# --- three pairs by hand ---------------------------------------------------------------------------------------------


def logps(chosen, chosen_tokens, rejected, rejected_tokens):
    return {"chosen": chosen, "chosen_tokens": chosen_tokens, "rejected": rejected, "rejected_tokens": rejected_tokens}


BETA = 0.5
PAIRS = [
    {
        "base": logps(-30.0, 10, -20.0, 10),
        "sft": logps(-20.0, 10, -15.0, 5),
        "dpo": logps(-18.0, 10, -19.0, 5),
        "reward": {"chosen": 2.0, "rejected": 1.0},
    },
    {
        "base": logps(-40.0, 20, -40.0, 20),
        "sft": logps(-30.0, 20, -36.0, 12),
        "dpo": logps(-34.0, 20, -36.0, 12),
        "reward": {"chosen": -1.0, "rejected": 1.0},
    },
    {
        "base": logps(-10.0, 10, -20.0, 10),
        "sft": logps(-10.0, 10, -12.0, 12),
        "dpo": logps(-8.0, 10, -10.0, 20),
        "reward": {"chosen": 0.5, "rejected": 0.5},
    },
]
MODELS = {
    "base_model": {"name": "embedded:x", "digest": "b", "stage": None, "data": [], "starts_from": None, "beta": None},
    "sft_model": {"name": "runs/sft", "digest": "s", "stage": "sft", "data": ["d"], "starts_from": "b", "beta": None},
    "reward_model": {
        "name": "runs/rm",
        "digest": "r",
        "stage": "reward",
        "data": ["d"],
        "starts_from": "s",
        "beta": None,
    },
    "dpo_model": {"name": "runs/dpo", "digest": "p", "stage": "dpo", "data": ["d"], "starts_from": "s", "beta": 0.5},
}
ANSWERS = [
    {"base": "x", "sft": "one two", "dpo": "one two three", "base_reward": 0.0, "sft_reward": 1.0, "dpo_reward": 3.0},
    {"sft": "same", "dpo": "same", "sft_reward": 0.5, "dpo_reward": 0.5},
    {"sft": "", "dpo": "not judged: the other gave no answer", "dpo_reward": 9.0},
]


@pytest.fixture(scope="module")
def results():
    return summarise(PAIRS, ANSWERS, BETA) | {"models": MODELS}


@pytest.mark.parametrize(
    "model, loss",
    [
        ("base", 2.0),  # (30 + 40 + 10) / (10 + 20 + 10) = 80 / 40
        ("sft", 1.5),  # (20 + 30 + 10) / 40
        ("dpo", 1.5),  # (18 + 34 + 8) / 40
    ],
)
def test_loss_is_a_mean_over_tokens(results, model, loss):
    assert (token_loss(PAIRS, model), results["policies"][model]["chosen_loss"]) == (loss, loss)


@pytest.mark.parametrize(
    "model, expected",
    [
        ("base", 1.5 / 3),  # -30 < -20: 0; -40 = -40: 0.5; -10 > -20: 1
        ("sft", 2.0 / 3),  # -20 < -15: 0; -30 > -36: 1; -10 > -12: 1
        ("dpo", 3.0 / 3),  # -18 > -19, -34 > -36, -8 > -10
    ],
)
def test_share_of_pairs_whose_chosen_answer_is_likelier(results, model, expected):
    assert results["policies"][model]["prefers_chosen"]["share"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "model, expected",
    [
        ("base", 1.5 / 3),  # -3 < -2: 0; -2 = -2: 0.5; -1 > -2: 1
        ("sft", 2.5 / 3),  # -2 > -3: 1; -1.5 > -3: 1; -1 = -1: 0.5
        ("dpo", 2.0 / 3),  # -1.8 > -3.8: 1; -1.7 > -3: 1; -0.8 < -0.5: 0
    ],
)
def test_share_of_pairs_whose_chosen_answer_is_likelier_a_token(results, model, expected):
    assert results["policies"][model]["prefers_chosen_per_token"]["share"] == pytest.approx(expected)


# DPO margins, beta * ((dpo - sft of chosen) - (dpo - sft of rejected)):
#   0.5 * ((-18 + 20) - (-19 + 15)) = 0.5 * (2 + 4) = 3
#   0.5 * ((-34 + 30) - (-36 + 36)) = 0.5 * (-4 - 0) = -2
#   0.5 * ((-8 + 10) - (-10 + 12)) = 0.5 * (2 - 2) = 0


def test_dpo_margin(results):
    assert results["dpo"]["margin"] == pytest.approx((3 - 2 + 0) / 3)


def test_dpo_accuracy(results):
    assert results["dpo"]["accuracy"]["share"] == pytest.approx((1 + 0 + 0.5) / 3)


def test_dpo_loss(results):
    # -log sigmoid(m) = log(1 + e^-m): 3 -> 0.048587, -2 -> 2.126928, 0 -> 0.693147
    assert results["dpo"]["loss_after"] == pytest.approx((0.048587 + 2.126928 + LN2) / 3, abs=1e-6)


def test_dpo_loss_before_is_ln_2(results):
    assert results["dpo"]["loss_before"] == pytest.approx(LN2, abs=1e-6)


def test_reward_accuracy(results):
    # gaps 2 - 1 = 1 (right), -1 - 1 = -2 (wrong), 0.5 - 0.5 = 0 (tie)
    assert results["reward"]["accuracy"]["share"] == pytest.approx((1 + 0 + 0.5) / 3)


def test_reward_loss(results):
    # log(1 + e^-gap): 1 -> 0.313262, -2 -> 2.126928, 0 -> 0.693147
    assert results["reward"]["loss_after"] == pytest.approx((0.313262 + 2.126928 + LN2) / 3, abs=1e-6)


def test_win_rate_judges_prompts_that_both_answered(results):
    # 3 > 1: 1; 0.5 = 0.5: 0.5; the third prompt has no SFT answer
    assert (results["win_rate"]["share"], results["win_rate"]["count"]) == (0.75, 2)


@pytest.mark.parametrize(
    "key, expected",
    [
        ("same_answer", 1),
        ("sft_mean_reward", (1.0 + 0.5) / 2),
        ("dpo_mean_reward", (3.0 + 0.5) / 2),
        ("sft_mean_words", (2 + 1) / 2),
        ("dpo_mean_words", (3 + 1) / 2),
    ],
)
def test_win_rate_says_what_was_compared(results, key, expected):
    assert results["win_rate"][key] == pytest.approx(expected)


def test_counts_and_beta_are_told(results):
    assert (results["pairs"], results["beta"]) == (3, 0.5)


@pytest.mark.parametrize(
    "left_out, sections",
    [("base", {"dpo", "reward", "win_rate"}), ("sft", {"reward", "win_rate"}), ("reward", {"dpo"})],
)
def test_what_was_not_measured_is_not_told(left_out, sections):
    pairs = [{key: value for key, value in pair.items() if key != left_out} for pair in PAIRS]
    found = summarise(pairs, ANSWERS, BETA)
    assert set(found) - {"pairs", "beta", "policies"} == sections


def test_policies_are_those_that_were_measured():
    pairs = [{"sft": pair["sft"]} for pair in PAIRS]
    assert list(summarise(pairs, ANSWERS, BETA)["policies"]) == ["sft"]


def test_huge_margins_have_a_finite_loss():
    """log(1 + e^1000) is 1000 to rounding, though e^1000 is no double. Margin: 1 * ((-1000 - 0) - (0 - 0))."""
    pair = {
        "sft": logps(0.0, 1, 0.0, 1),
        "dpo": logps(-1000.0, 1, 0.0, 1),
        "reward": {"chosen": 0.0, "rejected": 1000.0},
    }
    found = summarise([pair], [{}], 1.0)
    assert (found["dpo"]["loss_after"], found["reward"]["loss_after"]) == (1000.0, 1000.0)


def test_policies_that_answered_nothing_have_no_win_rate():
    answers = [{"sft": "", "dpo": ""} for _ in PAIRS]
    rows = table_rows(summarise(PAIRS, answers, BETA) | {"models": MODELS})
    assert rows and [row for row in rows if row[0] == "DPO answer beats SFT answer"] == []


# --- the table -------------------------------------------------------------------------------------------------------


def row_of(results, measure):
    return next(row for row in table_rows(results) if row[0] == measure)


@pytest.mark.parametrize(
    "row",
    [
        ("SFT loss on chosen answers", "2.000", "1.500", "better", "nats/token"),
        ("Reward model loss", "0.693", "1.044", "worse", "nats/pair"),  # (0.313262 + 2.126928 + 0.693147) / 3
        ("DPO loss (beta 0.5)", "0.693", "0.956", "worse", "nats/pair"),  # (0.048587 + 2.126928 + 0.693147) / 3
        ("DPO loss on chosen answers", "1.500", "1.500", "", "nats/token"),  # 60 / 40 both
        # (15 + 36 + 12) / (5 + 12 + 12) = 63 / 29; (19 + 36 + 10) / (5 + 12 + 20) = 65 / 37
        ("DPO loss on rejected answers", "2.172", "1.757", "worse", "nats/token"),
        ("DPO log-prob. of a chosen answer", "-20.000", "-20.000", "", "nats/answer"),
        ("DPO log-prob. of a rejected answer", "-21.000", "-21.667", "better", "nats/answer"),  # -63 / 3, -65 / 3
    ],
)
def test_table_tells_numbers_before_and_after(results, row):
    assert row_of(results, row[0]) == row


def test_table_tells_shares_with_their_interval(results):
    # 1.5 of 3: centre 0.5, half 1.96 * sqrt(0.25/3 + 3.8416/36) / (1 + 3.8416/3) = 1.96 * 0.43592 / 2.28053 = 0.37465
    expected = ("Reward model accuracy", "50%", "50%", "unclear", "13% to 87%")
    assert row_of(results, "Reward model accuracy") == expected


def test_table_tells_sft_and_dpo_side_by_side(results):
    # 2 of 3 before; 3 of 3 after: low = 3 / (3 + 3.8416) = 0.4385, and 67% lies above it
    measure = "DPO finds chosen likelier"
    assert row_of(results, measure) == (measure, "67%", "100%", "unclear", "44% to 100%")


def test_a_loss_on_chosen_answers_that_rose_is_named():
    """The quickstart's 2.707 -> 2.912 stood in results.json and in no table."""
    worse = {"sft": logps(-27.07, 10, -30.0, 10), "dpo": logps(-29.12, 10, -35.0, 10)}
    found = summarise([worse], [{}], BETA) | {"models": MODELS}
    assert row_of(found, "DPO loss on chosen answers")[1:4] == ("2.707", "2.912", "worse")
    told = what_got_worse(table_rows(found))
    assert "DPO loss on chosen answers (2.707 → 2.912)" in told
    assert "log-prob. of a chosen answer (-27.070 → -29.120)" in told and "rejected" not in told.split(";")[0]


def test_what_got_worse_does_not_cry_wolf():
    better = {"sft": logps(-20.0, 10, -20.0, 10), "dpo": logps(-10.0, 10, -30.0, 10)}
    found = summarise([better] * 40, [{}], BETA) | {"models": MODELS}
    assert what_got_worse(table_rows(found)).startswith("Nothing in this table got worse.")


def test_a_share_that_fell_clearly_is_worse(results):
    wrong = {"policies": {}, "reward": {"loss_after": 0.6, "accuracy": share([0.0] * 30)}}
    assert row_of(wrong, "Reward model accuracy").change == "worse"


def test_results_of_an_older_version_have_a_table(results):
    for policy in results["policies"].values():
        assert {"rejected_loss", "chosen_logp", "rejected_logp"} <= set(policy)
    old = {"chosen_loss": 1.0, "prefers_chosen": share([1.0]), "prefers_chosen_per_token": share([1.0])}
    rows = table_rows({"policies": {"base": old, "sft": old}})
    assert [row.measure for row in rows] == ["sft_model loss on chosen answers"]  # whose run it is was not recorded


# --- who was measured, and who judged --------------------------------------------------------------------------------


def with_models(results, **changed):
    models = {key: model | changed.get(key, {}) for key, model in MODELS.items()}
    return results | {"models": models}


def test_a_model_is_called_sft_only_if_it_is_a_run_of_that_stage(results):
    assert labels_of(results) == {"base": "base", "sft": "SFT", "dpo": "DPO"}
    other = with_models(results, sft_model={"name": "embedded:x", "stage": None}, dpo_model={"stage": "sft"})
    assert labels_of(other) == {"base": "base", "sft": "embedded:x", "dpo": "runs/dpo"}
    assert row_of(other, "runs/dpo answer beats embedded:x answer")


def test_base_is_only_what_sft_started_from(results):
    assert labels_of(with_models(results, base_model={"digest": "another"}))["base"] == "embedded:x"


def test_two_models_of_one_name_are_told_apart(results):
    same = with_models(results, sft_model={"name": "m", "stage": None}, dpo_model={"name": "m", "stage": None})
    assert len(set(labels_of(same).values())) == 3


@pytest.mark.parametrize(
    "judge, told",
    [
        ({}, "is runs/rm, trained on the same data as DPO"),
        ({"name": "else/where", "data": ["other"]}, "is else/where, trained on other data than DPO."),
        ({"stage": None, "data": []}, "is runs/rm, which has no record of its training here"),
        ({"data": []}, "is runs/rm; whether it was trained on the data of DPO is not recorded"),
    ],
)
def test_the_judge_is_described_by_its_provenance(results, judge, told):
    assert told in judge_sentence(with_models(results, reward_model=judge))


def test_nobody_judged(results):
    assert judge_sentence({key: value for key, value in results.items() if key != "win_rate"}) == ""


def test_a_dpo_model_of_another_reference_is_told(results):
    assert reference_note(results) == ""
    other = with_models(results, dpo_model={"starts_from": "another"})
    assert reference_note(other).startswith("DPO was not trained from runs/sft")


def test_a_beta_that_is_not_known_is_called_assumed(results):
    other = with_models(results, dpo_model={"beta": None, "stage": None, "name": "m"})
    assert row_of(other, "m loss (beta 0.5, assumed)")


def test_cut_answers_are_counted():
    answers = [{"sft": "a", "sft_cut": True}, {"sft": "b", "sft_cut": False}, {}]
    pairs = [{"sft": pair["sft"]} for pair in PAIRS]
    found = summarise(pairs, answers, BETA) | {"models": MODELS, "max_new_tokens": 8}
    assert cut_sentence(found) == "Answers cut at max_new_tokens=8 and marked with …: 1 of 2 of SFT."


def test_table_has_no_row_for_what_was_not_measured():
    pairs = [{"sft": pair["sft"], "reward": pair["reward"]} for pair in PAIRS]
    measures = [row[0] for row in table_rows(summarise(pairs, [{"sft": "x"}], BETA))]
    assert measures == ["Reward model loss", "Reward model accuracy"]


def test_table_knows_no_minus_zero_per_cent():
    """The lower end of 0 in n is 0; a rounding error below it would read -0%."""
    wrong = {
        n: table_rows({**NOTHING_RIGHT, "reward": {"loss_after": 1.0, "accuracy": share([0.0] * n)}}) for n in COUNTED
    }
    assert [n for n, rows in wrong.items() if rows[1].note.startswith("-")] == []


NOTHING_RIGHT = {"policies": {}}
COUNTED = range(1, 200)
