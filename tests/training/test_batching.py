"""The split of a global batch: everything once, nothing too big, all processes alike, well balanced."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.training.batching import split_batch, step_examples

lengths = st.lists(st.integers(1, 500), min_size=1, max_size=60)


def test_by_hand():
    """The longest first into the emptiest: 9; 5; 4 to the 5; 2 to either 9, so to the first."""
    assert split_batch([5, 9, 2, 4], 2, 11).ranks == [[[1, 2]], [[0, 3]]]
    assert split_batch([5, 9, 2, 4], 1, 11).ranks == [[[1, 2], [0, 3]]]
    assert split_batch([5, 9, 2, 4], 2, 11).imbalance == pytest.approx(11 / 10 - 1)
    assert split_batch([5, 9, 2, 4], 1, 20).ranks == [[[0, 1, 2, 3]]]


def test_padded_rows_take_their_longest():
    """5 + 5 beside 9 would take 3 x 9 = 27 of 20 tokens."""
    assert split_batch([5, 9, 5], 1, 20).ranks == [[[0, 1, 2]]]
    assert split_batch([5, 9, 5], 1, 20, padded=True).ranks == [[[0, 2], [1]]]


def test_fewer_examples_than_processes():
    split = split_batch([3, 4], 4, 10)
    assert sorted(split.ranks) == [[[]], [[]], [[0]], [[1]]]


def test_too_long():
    with pytest.raises(ValueError, match="example 1 has 12 tokens, more than max_tokens=10"):
        split_batch([5, 12], 2, 10)
    with pytest.raises(ValueError, match="no examples"):
        split_batch([], 2, 10)


@settings(max_examples=300, deadline=None)
@given(lengths, st.integers(1, 9), st.integers(500, 2000), st.booleans())
def test_every_example_once_within_the_budget(num_tokens, processes, max_tokens, padded):
    split = split_batch(num_tokens, processes, max_tokens, padded)
    assert len(split.ranks) == processes and len({len(rank) for rank in split.ranks}) == 1
    assert sorted(i for rank in split.ranks for micro in rank for i in micro) == list(range(len(num_tokens)))
    for micro in (micro for rank in split.ranks for micro in rank):
        found = [num_tokens[i] for i in micro]
        assert (len(found) * max(found, default=0) if padded else sum(found)) <= max_tokens
    loads = [sum(num_tokens[i] for micro in rank for i in micro) for rank in split.ranks]
    assert split.imbalance == pytest.approx(max(loads) * processes / sum(loads) - 1)
    assert split == split_batch(num_tokens, processes, max_tokens, padded)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=16, max_size=200), st.integers(1, 8))
def test_balance(num_tokens, processes):
    """One micro-batch: LPT's bound, 4/3 of the best maximum (at least the mean and the longest)."""
    split = split_batch(num_tokens, processes, 10**9)
    loads = [sum(num_tokens[i] for i in rank[0]) for rank in split.ranks]
    best = max(sum(num_tokens) / processes, max(num_tokens))
    # the optimum is at least `best`; LPT is within one example of the mean besides
    assert max(loads) <= sum(num_tokens) / processes + max(num_tokens)
    if len(num_tokens) > 4 * processes:
        assert max(loads) <= 4 / 3 * best + max(num_tokens) / 3


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5))
def test_an_epoch_takes_every_row_once(num_examples, global_batch_size, seed):
    steps = -(-num_examples // global_batch_size)
    for epoch in range(2):
        found = [step_examples(epoch * steps + k, num_examples, global_batch_size, seed) for k in range(steps)]
        assert sorted(sum(found, [])) == list(range(num_examples))
        assert all(len(step) == global_batch_size for step in found[:-1])


def test_steps_depend_on_the_seed_and_the_epoch():
    orders = {tuple(step_examples(step, 50, 50, seed)) for step in (0, 1) for seed in (1, 2)}
    assert len(orders) == 4
    assert step_examples(3, 50, 8, 1) == step_examples(3, 50, 8, 1)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 200), st.integers(1, 70), st.integers(0, 2**31), st.lists(st.integers(0, 30), min_size=1, max_size=5)
)
def test_the_rows_of_a_step_are_those_of_every_release(num_examples, global_batch_size, seed, steps):
    """A run that an older release has begun goes on with the same rows: the formula itself, in whatever order steps are asked."""
    for step in steps:
        epoch, place = divmod(step, -(-num_examples // global_batch_size))
        order = np.random.default_rng([seed, epoch]).permutation(num_examples)
        expected = order[place * global_batch_size : (place + 1) * global_batch_size].tolist()
        assert step_examples(step, num_examples, global_batch_size, seed) == expected


def test_the_rows_of_a_step_by_hand():
    assert [step_examples(k, 5, 2, seed=3) for k in range(4)] == [[4, 2], [1, 3], [0], [1, 4]]


def test_an_epoch_is_permuted_once(monkeypatch):
    """Not at each step: that takes half a second for ten million rows."""
    made, real = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: (made.append(seed), real(seed))[1])
    for step in range(20):
        step_examples(step, 30, 3, seed=987654)
    assert made == [[987654, 0], [987654, 1]]
