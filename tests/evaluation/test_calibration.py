"""Calibration, length bias and subsets of a reward model, against values worked out by hand."""

import math

import numpy as np
import pytest

from rlhf.evaluation.calibration import (
    calibration,
    calibration_error,
    crossfitted_loss,
    error_by_chance,
    fit_temperature,
    loss,
    reliability,
    temperature_interval,
)
from rlhf.evaluation.length_bias import correlation, length_bias, slope
from rlhf.evaluation.resampling import bootstrap, estimate
from rlhf.evaluation.reward_measures import about_rewards
from rlhf.evaluation.subsets import MOST, by_subset

# --- calibration -----------------------------------------------------------------------------------------------------


def logit(p):
    return math.log(p / (1 - p))


def test_calibration_error_by_hand():
    # bin [0.9, 0.95): confidences 0.92, 0.92, one right: |0.5 - 0.92| = 0.42, two of four pairs
    # bin [0.6, 0.65): confidences 0.6, 0.62, both right: |1 - 0.61| = 0.39, two of four
    sure, correct = np.array([0.92, 0.92, 0.6, 0.62]), np.array([1.0, 0.0, 1.0, 1.0])
    assert calibration_error(sure, correct) == pytest.approx(0.5 * 0.42 + 0.5 * 0.39)


def test_the_curve_counts_a_pair_from_the_models_side():
    # margins of +-logit(0.8): the model is 80% sure in each, and right in three of four
    found = reliability(np.array([logit(0.8)] * 3 + [-logit(0.8)]))
    assert len(found) == 1
    assert found[0]["confidence"] == pytest.approx(0.8)
    assert (found[0]["share"], found[0]["count"]) == (0.75, 4)
    assert (found[0]["from"], found[0]["to"]) == pytest.approx((0.8, 0.85))
    assert found[0]["low"] < 0.75 < found[0]["high"]


def test_equal_scores_are_half_right_and_half_sure():
    found = reliability(np.array([0.0, 0.0]))
    assert (found[0]["confidence"], found[0]["share"]) == (0.5, 0.5)


def test_a_certain_model_stays_in_the_last_bin():
    assert [b["from"] for b in reliability(np.array([800.0, -800.0]))] == [0.95]


def test_loss_is_the_reward_models():
    # -log sigmoid(1) = log(1 + 1/e) = 0.313262, -log sigmoid(-1) = 1.313262
    assert loss(np.array([1.0, -1.0])) == pytest.approx((0.313262 + 1.313262) / 2, abs=1e-6)


def test_temperature_by_hand():
    # three of four right at |margin| 2: sigmoid(2 / T) = 3/4, so 2 / T = ln 3
    assert fit_temperature(np.array([2.0, 2.0, 2.0, -2.0])) == pytest.approx(2 / math.log(3), rel=1e-9)


def test_temperature_scales_with_the_margins():
    margins = np.array([3.0, 1.0, 0.5, -1.0, 2.0, -0.2])
    assert fit_temperature(1e4 * margins) == pytest.approx(1e4 * fit_temperature(margins), rel=1e-9)


def test_no_other_temperature_has_a_lower_loss():
    margins = np.random.default_rng(0).normal(0.7, 3, 200)
    best = fit_temperature(margins)
    assert all(loss(margins, best) < loss(margins, best * factor) for factor in (0.5, 0.97, 1.03, 2))


@pytest.mark.parametrize(
    "margins, why",
    [
        ([1.0] * 30, "every pair is ranked right"),
        ([1.0] * 10 + [-1.0] * 20, "the mean margin is not positive"),
        ([1.0, -1.0, 3.0], "fewer than 20 pairs"),
    ],
)
def test_there_may_be_no_temperature(margins, why):
    found = calibration(margins)
    assert (found["temperature"], found["loss_after"], found["no_temperature"]) == (None, None, why)


def test_temperature_interval_by_hand():
    # four pairs of +-2 at the optimum, x = 1/T = ln(3)/2: sigmoid(-m x) is 1/4 for +2 and 3/4 for -2
    # bread = mean m^2 s (1 - s) = 4 * 3/16 = 0.75; meat = mean (m s)^2 = (3 * 0.25 + 2.25) / 4 = 0.75
    # half = 1.96 * sqrt(0.75 / 4) / 0.75 = 1.1316; x - half < 0: no upper bound
    low, high = temperature_interval(np.array([2.0, 2.0, 2.0, -2.0]), 2 / math.log(3))
    assert low == pytest.approx(1 / (math.log(3) / 2 + 1.959964 * math.sqrt(0.75 / 4) / 0.75))
    assert high is None


def test_the_temperature_is_not_judged_on_pairs_it_was_fitted_on():
    # five pairs, a fold each: four of +2 and one of -2; without a pair of +2 the others fit sigmoid(2/T) = 3/4 and it
    # costs -log 3/4; without the pair of -2 all others are right, and there is no temperature
    assert crossfitted_loss(np.array([2.0, 2.0, 2.0, 2.0, -2.0])) is None
    # eight of +2, two of -2 in different folds (numbers 0 and 1): those two folds leave 7 : 1, the others 6 : 2
    margins = np.array([-2.0, -2.0] + [2.0] * 8)
    inside = -(math.log(7 / 8) + math.log(1 / 8)) * 2  # each of two folds: one right, one wrong, at 7 : 1
    outside = -6 * math.log(3 / 4)
    assert crossfitted_loss(margins) == pytest.approx((inside + outside) / 10, rel=1e-6)


def test_a_calibrated_model_is_within_chance_and_an_overconfident_one_is_not():
    draw = np.random.default_rng(1)
    sizes = np.abs(draw.normal(0, 1.5, 3000))
    margins = np.where(draw.random(3000) < 1 / (1 + np.exp(-sizes)), sizes, -sizes)
    fair, loud = calibration(margins), calibration(3 * margins)
    assert fair["error"]["value"] < fair["by_chance"][1]
    assert loud["error"]["value"] > loud["by_chance"][1]
    assert fair["temperature_low"] < 1 < fair["temperature_high"]
    assert loud["temperature_low"] < 3 < loud["temperature_high"]
    assert loud["loss_after"] == pytest.approx(fair["loss_after"], rel=1e-6)
    assert loud["loss_after"] < loud["loss"]


def test_error_by_chance_of_coins_that_know_it():
    # 100 pairs at confidence 0.75, all in one bin: |Binomial(100, 0.75) / 100 - 0.75|; mean sqrt(2 / pi) * 0.0433 = 0.0345
    mean, high = error_by_chance(np.full(100, 0.75))
    assert mean == pytest.approx(0.0345, abs=0.003)
    assert high == pytest.approx(1.96 * 0.0433, abs=0.012)


# --- length ----------------------------------------------------------------------------------------------------------

#          margin, tokens more: the model prefers the longer one in 1, 2, 3, the labels in 1, 2, 4
PAIRS = [(2.0, 10), (1.0, 5), (-1.0, -10), (-1.0, 5), (3.0, 0)]


@pytest.fixture(scope="module")
def length():
    return length_bias([m for m, _ in PAIRS], [n for _, n in PAIRS])


@pytest.mark.parametrize(
    "key, share, count",
    [
        ("prefers_longer", 3 / 4, 4),
        ("labels_prefer_longer", 3 / 4, 4),
        ("chosen_longer", 2 / 3, 3),
        ("chosen_shorter", 0.0, 1),
        ("equal_length", 1.0, 1),
    ],
)
def test_length_shares_by_hand(length, key, share, count):
    assert (length[key]["share"], length[key]["count"]) == (pytest.approx(share), count)
    assert 0 <= length[key]["low"] <= share <= length[key]["high"] <= 1


def test_excess_and_gap_by_hand(length):
    assert length["excess"]["value"] == 0.0
    assert length["accuracy_gap"]["value"] == pytest.approx(2 / 3)


def test_slope_and_correlation_by_hand():
    # tokens 0, 10, 20 (mean 10), margins 1, 2, 6 (mean 3): sum (-10)(-2) + 0 + 10 * 3 = 50, of 200: 0.25
    # correlation 50 / sqrt(200 * (4 + 1 + 9)) = 50 / 52.915
    margins, longer = np.array([1.0, 2.0, 6.0]), np.array([0.0, 10.0, 20.0])
    assert slope(margins, longer) == pytest.approx(0.25)
    assert correlation(margins, longer) == pytest.approx(50 / 52.91503, rel=1e-6)


def test_a_model_that_only_counts_tokens_is_explained_by_them():
    draw = np.random.default_rng(2)
    longer = np.round(draw.normal(0, 30, 400))
    found = length_bias(0.05 * longer, longer)
    assert found["explained"]["value"] == pytest.approx(1.0)
    assert found["per_token"] == pytest.approx({"value": 0.05, "low": 0.05, "high": 0.05})
    assert found["prefers_longer"]["share"] == 1.0
    assert found["excess"]["low"] > 0


def test_answers_of_equal_length_have_no_length_bias():
    found = length_bias([1.0, -1.0, 2.0], [0, 0, 0])
    assert found["equal_length"]["count"] == 3
    for key in ("prefers_longer", "excess", "chosen_longer", "accuracy_gap", "correlation", "per_token"):
        assert found[key] is None


# --- intervals -------------------------------------------------------------------------------------------------------


def test_bootstrap_of_a_mean_is_its_standard_error():
    values = np.arange(100.0)  # standard error sqrt(833.25 / 100) = 2.8866
    found = bootstrap(lambda rows: float(values[rows].mean()), [np.arange(100)])
    assert found["low"] == pytest.approx(49.5 - 1.96 * 2.8866, abs=0.5)
    assert found["high"] == pytest.approx(49.5 + 1.96 * 2.8866, abs=0.5)


def test_strata_are_drawn_for_themselves():
    values = np.array([0.0] * 10 + [1.0] * 10)
    found = bootstrap(lambda rows: float(values[rows].mean()), [np.arange(10), np.arange(10, 20)])
    assert (found["low"], found["high"]) == (0.5, 0.5)


def test_what_is_not_defined_has_no_interval():
    assert estimate(lambda rows: math.nan, 10) is None
    assert estimate(lambda rows: 1.0, 0) is None


# --- subsets ---------------------------------------------------------------------------------------------------------


def test_by_subset():
    found = by_subset(["b", "a", None, "a"], [1.0, 0.0, 1.0, 0.5])
    assert [(e["subset"], e["share"], e["count"]) for e in found] == [("a", 0.25, 2), ("b", 1.0, 1), ("(none)", 1.0, 1)]


def test_rows_without_subsets_and_rows_that_are_each_their_own_have_no_table():
    assert by_subset([None, None], [1.0, 0.0]) == []
    assert by_subset([str(i) for i in range(MOST + 1)], [1.0] * (MOST + 1)) == []


def test_everything_about_a_reward_model():
    pairs = [
        {"subset": "x", "reward": {"chosen": 2.0, "rejected": 1.0, "longer": 5}},
        {"reward": {"chosen": 0.0, "rejected": 1.0, "longer": -2}},
    ]
    found = about_rewards(pairs)
    assert found["calibration"]["loss"] == pytest.approx((0.313262 + 1.313262) / 2, abs=1e-6)
    assert [e["subset"] for e in found["subsets"]] == ["x", "(none)"]
    assert found["length"]["prefers_longer"]["share"] == 1.0
    assert about_rewards([{"sft": {}}]) == {}
