"""Tensors whose values the host knows: as the ordinary ones, and read from the host alone."""

import pytest
import torch

from rlhf.packing.known import Known, plain

META = torch.device("meta")  # without values: whoever reads from it fails
VALUES = torch.tensor([[5, 6, -100, 8], [9, -100, -100, 2]])
MASK = VALUES != -100


def twice(x):
    """(on the CPU, known on a device that can't be read)"""
    return Known.of(x, x), Known.of(x.to(META), x)


OPERATIONS = {
    "compare": lambda x, m: x != -100, "equal": lambda x, m: x == 9, "shift": lambda x, m: x[:, 1:], "ellipsis": lambda x, m: x[..., 1:],
    "half": lambda x, m: x.chunk(2, dim=0)[1], "labels": lambda x, m: x.masked_fill(m == 0, -100), "sum": lambda x, m: m.sum(),
    "lengths": lambda x, m: torch.minimum(*m.sum(dim=1).long().chunk(2)), "both": lambda x, m: torch.cat([m.cumsum(1), x]),
    "and": lambda x, m: (m.cumsum(1) > 1) & m.bool(),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_losses_do_with_masks_stays_known(name):
    want = OPERATIONS[name](VALUES, MASK)
    for here in (0, 1):
        found = OPERATIONS[name](twice(VALUES)[here], twice(MASK)[here])
        assert type(found) is Known and torch.equal(found.host, want) and found.host.dtype == found.dtype == want.dtype
        assert found.tolist() == want.tolist() and found.plain.device == (META if here else want.device)
    assert bool(twice(MASK)[1].sum() > 4) and int(twice(MASK)[1].sum()) == 5 and twice(MASK)[1].sum().item() == 5


def test_selections_have_values_and_gradients_of_boolean_masks():
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    weights = torch.randn(5, 3, dtype=torch.float64)
    results = []
    for mask in (MASK, Known.of(MASK, MASK)):
        leaf = x.clone().requires_grad_()
        chosen = leaf[mask]
        back = leaf.new_zeros(MASK.shape).masked_scatter(mask, (chosen * weights).sum(dim=1))
        back.square().sum().backward()
        results.append((chosen.detach(), back.detach(), leaf.grad, torch.masked_select(back.detach(), mask)))
    for want, found in zip(*results, strict=True):
        assert type(found) is torch.Tensor and torch.equal(want, found)


def test_nothing_selected_stays_connected():
    """A micro-batch without labels adds a zero that has a gradient."""
    nothing = torch.zeros_like(MASK)
    leaf = torch.randn(2, 4, 3, requires_grad=True)
    chosen = leaf[Known.of(nothing, nothing)]
    back = leaf.new_zeros(MASK.shape).masked_scatter(Known.of(nothing, nothing), chosen.sum(dim=1))
    back.sum().backward()
    assert chosen.shape == (0, 3) and back.abs().sum() == 0 and torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_with_other_tensors_the_result_is_an_ordinary_one():
    known = Known.of(VALUES, VALUES)
    for found in (
        known * torch.ones(2, 4),
        torch.ones(2, 4) * known,
        known.masked_fill(MASK, 0),
        torch.stack([known, VALUES]),
    ):
        assert type(found) is torch.Tensor
    assert torch.equal(known.masked_fill(MASK, 0), VALUES.masked_fill(MASK, 0)) and plain(known) is VALUES


def test_a_change_in_place_is_not_read_from_the_host():
    """The host's copy would be of before."""
    device, host = MASK.clone(), MASK.clone()  # two copies, as with a GPU
    known = Known.of(device, host)
    known &= torch.zeros_like(MASK)
    assert plain(known).sum() == 0 and int(known.sum()) == 0 and torch.ones(2, 4)[known].numel() == 0
    known = Known.of(MASK.clone(), MASK.clone())
    known[0, 0] = False
    assert int(known.sum()) == 4 and len(torch.ones(2, 4)[known]) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda known: known[1].fill_(False), lambda known: known.view(-1)[4:].zero_(), lambda known: known.narrow(0, 1, 1).zero_(),
        lambda known: torch.logical_and(known, torch.tensor([[True], [False]]), out=plain(known)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("on_device", [True, False])
def test_nor_is_one_through_a_view(change, on_device):
    """A view is another tensor, whose change the mask itself is not asked for; on a CPU the positions were found before."""
    device = MASK.clone()
    known = Known.of(device, MASK.clone() if on_device else device)
    x = torch.arange(float(MASK.numel())).view(MASK.shape)
    assert torch.equal(x[known], x[MASK])
    change(known)
    left = MASK & torch.tensor([[True], [False]])
    assert 0 < int(left.sum()) < int(MASK.sum())
    assert int(known.sum()) == int(left.sum()) and torch.equal(x[known], x[left])


def test_inference_mode_has_no_versions():
    with torch.inference_mode():
        known = Known.of(MASK.clone(), MASK.clone())
        assert known.tolist() == MASK.tolist() and len(torch.ones(MASK.shape)[known]) == int(MASK.sum())


def test_a_mask_of_another_shape_is_used_as_torch_uses_it():
    """Positions in a mask that is broadcast would be others than those it selects."""
    x, values, rows = torch.arange(6.0).view(2, 3), torch.tensor([7.0, 8.0, 9.0]), torch.tensor([[True], [False]])
    known = Known.of(rows, rows)
    assert torch.equal(torch.masked_select(x, known), torch.masked_select(x, rows))
    assert torch.equal(x.masked_scatter(known, values), x.masked_scatter(rows, values))
    with pytest.raises(IndexError, match="does not match"):
        torch.zeros(2, 5)[Known.of(MASK, MASK)]


def test_what_was_changed_in_place_goes_with_what_was_not():
    """Their values are on two devices then."""
    changed, kept = twice(MASK)[1], twice(MASK)[1]
    changed[0, 0] = False
    found = changed & kept
    assert type(found) is torch.Tensor and found.device == META
