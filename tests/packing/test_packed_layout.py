"""The layout: every token of a padded batch once, what a pair shares only once, and the way back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.packing.layout import MODES, is_right_padded, packed_layout, unpack

PAD = 0


def padded(rows, pad_to=0):
    """(input_ids, attention_mask) of lists of ids, right-padded; `pad_to` may make it longer than the longest row."""
    length = max(pad_to, *(len(row) for row in rows))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


def packed_tokens(ids, layout):
    return ids.flatten()[layout.token_index_T].tolist()


def test_worked_example():
    """The docstring's: 5 6 7 is chosen, 5 6 8 9 rejected; they share 5 6."""
    ids, mask = padded([[5, 6, 7], [5, 6, 8, 9]])
    layout = packed_layout(ids, mask, "pairs")
    assert layout.segments == [(2, 1, 2)]
    assert packed_tokens(ids, layout) == [5, 6, 7, 8, 9]
    assert layout.token_index_T.tolist() == [0, 1, 2, 6, 7]
    assert layout.position_ids_T.tolist() == [0, 1, 2, 2, 3]
    assert layout.padded_index_N.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert layout.packed_index_N.tolist() == [0, 1, 2, 0, 1, 3, 4]


def test_two_pairs_are_rows_i_and_i_plus_half():
    ids, mask = padded([[5, 6, 7], [8, 9], [5, 6, 1, 2], [8, 3, 4]])
    layout = packed_layout(ids, mask, "pairs")
    assert layout.segments == [(2, 1, 2), (1, 1, 2)]
    assert packed_tokens(ids, layout) == [5, 6, 7, 1, 2, 8, 9, 3, 4]
    assert layout.position_ids_T.tolist() == [0, 1, 2, 2, 3, 0, 1, 1, 2]


@pytest.mark.parametrize(
    "chosen, rejected, segment",
    [
        ([5, 6, 7], [5, 6, 7], (3, 0, 0)),  # equal: once
        ([5, 6], [5, 6, 7, 8], (1, 1, 3)),  # one begins the other
        ([5, 6, 7, 8], [5, 6], (1, 3, 1)),
        ([5, 6], [5, 7], (1, 1, 1)),  # one-token completions
        ([5, 6], [7, 8], (0, 2, 2)),  # nothing in common
        ([5], [5], (1, 0, 0)),
        ([5], [5, 6], (0, 1, 2)),
        ([5, 6, PAD], [5, 6, PAD, 7], (2, 1, 2)),  # the pad token as a real token
    ],
)
def test_pair(chosen, rejected, segment):
    assert packed_layout(*padded([chosen, rejected], pad_to=6), "pairs").segments == [segment]


def test_pads_are_no_tokens():
    """Both rows go on with pads, which are equal too."""
    assert packed_layout(*padded([[5, 6], [5, 6]], pad_to=9), "pairs").segments == [(2, 0, 0)]


def test_rows_share_nothing():
    ids, mask = padded([[5, 6, 7], [5, 6], [5]])
    layout = packed_layout(ids, mask, "rows")
    assert layout.segments == [(3, 0, 0), (2, 0, 0), (1, 0, 0)]
    assert packed_tokens(ids, layout) == [5, 6, 7, 5, 6, 5]
    assert layout.position_ids_T.tolist() == [0, 1, 2, 0, 1, 0]


def test_odd_number_of_rows_holds_no_pairs():
    ids, mask = padded([[5, 6], [5, 6], [5, 6]])
    assert packed_layout(ids, mask, "pairs").segments == [(2, 0, 0)] * 3


def test_unknown_mode():
    with pytest.raises(ValueError, match="packing mode 'pair' is unknown; expected pairs or rows"):
        packed_layout(*padded([[5]]), "pair")


@pytest.mark.parametrize("row, right", [([1, 1, 0], True), ([1, 1, 1], True), ([0, 0, 0], True), ([0, 1, 1], False), ([1, 0, 1], False)])  # fmt: skip
def test_right_padded(row, right):
    assert is_right_padded(torch.tensor([[1, 1, 0], row])) is right


def test_unpack_adds_the_gradients_of_a_shared_token():
    """Tokens 5 6 | 7 | 8 9: d(sum of weights * padded) is 1 + 100 and 10 + 1000 for the shared ones."""
    ids, mask = padded([[5, 6, 7], [5, 6, 8, 9]])
    layout = packed_layout(ids, mask, "pairs")
    values = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]], requires_grad=True)
    back = unpack(values, layout, 2, 4)
    assert back[..., 0].tolist() == [[1, 2, 3, 0], [1, 2, 4, 5]]
    weights = torch.tensor([[1.0, 10, 7, 9], [100, 1000, 3, 5]])
    (back[..., 0] * weights).sum().backward()
    assert values.grad[:, 0].tolist() == [101, 1010, 7, 3, 5]


rows = st.lists(st.integers(0, 3), min_size=1, max_size=9)  # few ids, so that prefixes are common


@st.composite
def batches(draw):
    return draw(st.lists(rows, min_size=1, max_size=8)), draw(st.integers(0, 12)), draw(st.sampled_from(MODES))


@settings(max_examples=150, deadline=None)
@given(batches())
def test_any_batch(batch):
    rows, pad_to, mode = batch
    ids, mask = padded(rows, pad_to)
    layout = packed_layout(ids, mask, mode)
    # the way back: each real token is where it was, padding is zero
    back = unpack(ids.flatten()[layout.token_index_T][:, None] + 1, layout, *ids.shape)[..., 0]
    assert torch.equal(back, (ids + 1) * mask)
    # no padding, no token twice, positions as in the padded batch
    assert len(set(layout.token_index_T.tolist())) == layout.num_tokens
    assert mask.flatten()[layout.token_index_T].all()
    assert torch.equal(layout.position_ids_T, layout.token_index_T % ids.shape[1])
    # the segments describe the row
    assert sum(map(sum, layout.segments)) == layout.num_tokens
    if mode == "rows" or len(rows) % 2:
        assert layout.segments == [(len(row), 0, 0) for row in rows]
        return
    for (p, c, r), chosen, rejected in zip(layout.segments, rows, rows[len(rows) // 2 :], strict=False):
        assert chosen[:p] == rejected[:p] and (p + c, p + r) == (len(chosen), len(rejected))
        assert (c, r) == (0, 0) if chosen == rejected else c >= 1 and r >= 1
        assert min(c, r) <= 1 or chosen[p] != rejected[p]  # the longest there is


def test_docstring_example_runs():
    import doctest

    import rlhf.packing.layout as module

    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
