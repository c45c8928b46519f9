"""Comparisons of two models, against values worked out by hand, SciPy's where it is there, and AlpacaEval's annotations."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rlhf.evaluation import paired, resampling
from rlhf.evaluation.paired import (
    divergence,
    holm,
    length_controlled,
    permutation_test,
    sign_test,
    win_rate,
)
from rlhf.evaluation.resampling import bootstrap_interval
from rlhf.runs.intervals import wilson_interval

ANNOTATIONS = json.loads(Path(__file__).with_name("alpaca_eval.json").read_text())["models"]


# --- win rates -------------------------------------------------------------------------------------------------------


def test_a_tie_is_half_a_win():
    found = win_rate([1, 1, 0.5, 0])  # (1 + 1 + 0.5 + 0) / 4
    assert (found["share"], found["wins"], found["ties"], found["losses"], found["count"]) == (0.625, 2, 1, 1, 4)


def test_a_probability_above_a_half_is_a_win():
    found = win_rate([0.9, 0.51, 0.5, 0.2])
    assert (found["wins"], found["ties"], found["losses"]) == (2, 1, 1) and found["share"] == pytest.approx(0.5275)


def test_the_interval_is_that_of_resampled_prompts():
    """Of 100 prompts, 60 won: a resample wins Binomial(100, 0.6); its 2.5th and 97.5th percentiles are 50 and 69."""
    found = win_rate([1] * 60 + [0] * 40, seed=3)
    assert found["low"] == pytest.approx(0.50, abs=0.011) and found["high"] == pytest.approx(0.69, abs=0.011)


def test_ties_narrow_the_interval():
    """100 ties and 60 to 40: the spread of a prompt falls from 0.49 to 0.35, so does the interval's width."""
    decided, tied = win_rate([1] * 60 + [0] * 40), win_rate([1] * 30 + [0] * 20 + [0.5] * 50)
    assert (tied["high"] - tied["low"]) / (decided["high"] - decided["low"]) == pytest.approx(0.35 / 0.49, rel=0.1)


def test_a_seed_decides_the_interval():
    wins = [1, 0, 1, 1, 0, 0.5, 1]
    assert win_rate(wins, 5) == win_rate(wins, 5)
    assert any(win_rate([1] * 61 + [0] * 40, s)["low"] != win_rate([1] * 61 + [0] * 40, 0)["low"] for s in (1, 2, 3))


def test_prompts_that_all_ended_alike_have_wilsons_interval():
    """A resample of wins is all wins: no interval at all, though 10 prompts prove little."""
    found = win_rate([1.0] * 10)
    assert (found["low"], found["high"]) == wilson_interval(10, 10) and found["low"] < 0.73


def test_the_resamples_do_not_depend_on_how_many_fit_in_memory(monkeypatch):
    values = np.arange(50.0)
    whole = bootstrap_interval(lambda draws: values[draws].mean(-1), 50, seed=1)
    monkeypatch.setattr(resampling, "AT_ONCE", 50 * 7)
    assert bootstrap_interval(lambda draws: values[draws].mean(-1), 50, seed=1) == whole


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wins, losses, p",
    [
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
        (5, 0, 2 / 2**5),
        (3, 3, 1.0),
        (4, 3, 1.0),  # 2 * (1 + 7 + 21 + 35) / 2^7 = 1
        (0, 0, 1.0),
    ],
)
def test_the_sign_test_counts_all_outcomes_as_far_out(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p)


def test_the_sign_test_is_scipys_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    for wins, losses in ((60, 40), (700, 600), (1, 30), (3000, 2000)):
        assert sign_test(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, rel=1e-9)


def test_all_signs_of_few_differences_are_counted():
    """Of +-1 +-2 +-3, only +6 and -6 are as large as 6: 2 of 8. Of +-1 +-2 +-2 from sum 1: all but none: |s| is 1, 3 or 5."""
    assert permutation_test([1, 2, 3]) == 0.25
    assert permutation_test([1, 2, -2]) == 1.0
    assert permutation_test([0.0, 0.0]) == 1.0


def test_many_differences_are_drawn():
    """40 of 50 differences of one size are positive: the sign test's p, 2.4e-5, to the precision of 10,000 draws."""
    assert permutation_test([1.0] * 40 + [-1.0] * 10) < 0.0006
    even = [(-1.0) ** i * (1 + i % 5) for i in range(200)]
    assert permutation_test(even, seed=2) > 0.9
    assert permutation_test(even, seed=2) == permutation_test(even, seed=2)


def test_the_permutation_test_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    differences = np.random.default_rng(0).normal(0.3, 1, 60)
    theirs = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=10_000, random_state=1)  # fmt: skip
    assert permutation_test(differences, seed=1) == pytest.approx(theirs.pvalue, abs=0.008)


def test_holm_by_hand():
    """Sorted 0.01 * 3 = 0.03, 0.03 * 2 = 0.06, then 0.04 * 1 = 0.04, which may not be below the one before."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.7, 0.9]) == [1.0, 1.0]


# --- length control --------------------------------------------------------------------------------------------------


def test_equal_lengths_leave_the_win_rate():
    found = length_controlled([1, 1, 1, 0], [5, 6, 7, 8], [5, 6, 7, 8])
    assert found["share"] == pytest.approx(0.75, abs=1e-4) and found["coefficient"] == 0 and found["sd"] == 0


def test_two_lengths_by_hand():
    """Longer by 10 in 4 prompts (3 won), shorter by 10 in 4 (1 won): sd of +-10 over 8 is 10 * sqrt(8/7) = 10.690.

    Both groups are fitted exactly: constant + slope * t = ln 3, constant - slope * t = -ln 3, with t = tanh(10 / 10.690)
    = 0.73281. So the constant is 0, the rate 50%, and the slope ln(3) / 0.73281 = 1.4992.
    """
    found = length_controlled([1, 1, 1, 0, 1, 0, 0, 0], [20] * 4 + [10] * 4, [10] * 4 + [20] * 4)
    assert found["share"] == pytest.approx(0.5, abs=1e-6)
    assert found["coefficient"] == pytest.approx(1.4992, abs=1e-3) and found["sd"] == pytest.approx(10.690, abs=1e-3)


def test_what_only_length_decides_is_a_draw_with_a_wide_interval():
    found = length_controlled([1, 1, 1, 0, 0, 0], [9, 8, 9, 1, 1, 2], [1, 1, 2, 9, 8, 9])
    assert found["share"] == pytest.approx(0.5, abs=0.02) and found["coefficient"] > 5
    assert found["low"] < 0.35 and found["high"] > 0.65


def test_swapping_the_models_mirrors_the_result(monkeypatch):
    monkeypatch.setattr(paired, "MANY_RESAMPLES", 100)
    one = ANNOTATIONS["Qwen-14B-Chat"]
    wins, lengths, others = one["preferences"], one["lengths"], one["baseline_lengths"]
    there = length_controlled(wins, lengths, others)
    back = length_controlled([1 - w for w in wins], others, lengths)
    assert back["share"] == pytest.approx(1 - there["share"], abs=1e-6)
    assert back["coefficient"] == pytest.approx(there["coefficient"], rel=1e-6)
    assert (back["low"], back["high"]) == pytest.approx((1 - there["high"], 1 - there["low"]), abs=1e-6)


@pytest.mark.parametrize("model", ANNOTATIONS)
def test_alpaca_evals_annotations(model, monkeypatch):
    """805 published preferences: the leaderboard's win rate, and AlpacaEval's own fit of its minimal form to a point."""
    monkeypatch.setattr(paired, "MANY_RESAMPLES", 200)
    one = ANNOTATIONS[model]
    found = win_rate(one["preferences"])
    assert (found["count"], 100 * found["share"]) == (805, pytest.approx(one["win_rate"], abs=1e-3))
    equal = length_controlled(one["preferences"], one["lengths"], one["baseline_lengths"])
    assert 100 * equal["share"] == pytest.approx(one["length_controlled_minimal"], abs=1.0)
    assert equal["coefficient"] == pytest.approx(one["coefficient"], rel=0.25)
    assert equal["low"] < equal["share"] < equal["high"]


# --- divergence ------------------------------------------------------------------------------------------------------


def test_divergence_by_hand():
    """Sums 2 and 4 of 2 tokens each: mean 3, sd sqrt(2), error sqrt(2) / sqrt(2) = 1; per token both are halved."""
    found = divergence([2, 4], [2, 2])
    assert found == pytest.approx(
        {"sum": 3, "sum_se": 1, "per_token": 1.5, "per_token_se": 0.5, "answers": 2, "tokens": 4}
    )


def test_divergence_per_token_weighs_tokens():
    """1 of 1 token and 1 of 3: 2 nats of 4 tokens. Residuals 1 - 0.5 and 1 - 1.5: sqrt(0.5 / 2) / mean tokens 2 = 0.25."""
    found = divergence([1, 1], [1, 3])
    assert (found["per_token"], found["per_token_se"]) == pytest.approx((0.5, 0.25))
    assert math.isnan(divergence([1], [1])["sum_se"])
