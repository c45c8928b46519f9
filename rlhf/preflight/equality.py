"""Packed = padded on this device: attention and whole models, in the dtype of training, each against a more exact one.

Two half-precision computations of the same thing differ by rounding. So nothing here asks whether packed equals padded: it asks
whether packed is as near to the exact value as padded is. Exact: attention by its definition in float64; for a model, the padded
computation in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from rlhf.packing import pack_backbone
from rlhf.packing.attention import Segments, attention_forward, repeat_heads
from rlhf.packing.backbone import find_backbone

Lengths = list[tuple[int, int, int]]
# (prefix, chosen, rejected) tokens of each segment of a row, with what the varlen call has to get right.
LAYOUTS: dict[str, Lengths] = {
    "one pair": [(37, 19, 23)],  # fewer queries than keys: the causal mask is aligned to the bottom right
    "uneven pairs": [(65, 1, 130), (1, 64, 1), (129, 17, 3)],  # around the sizes of a kernel's tiles
    "nothing shared": [(0, 33, 21), (2, 40, 9)],
    "one-token answers": [(96, 1, 1), (0, 1, 1)],
    "rows": [(57, 0, 0), (1, 0, 0), (128, 0, 0)],  # as many queries as keys
    "an empty row": [(30, 0, 0), (0, 0, 0), (20, 0, 0)],
}
FACTOR = 2.0  # packed may be off by this many times what padded is off by, and by the dtype's epsilon


@dataclass(frozen=True)
class Difference:
    """How far packed and padded are from the exact value: |x - exact| / |exact|, the largest over outputs and gradients.

    Attributes:
        what: the case.
        worst: the tensor in which packed uses most of what it may be off by.
        packed, padded, allowed: relative errors of that tensor.
    """

    what: str
    worst: str
    packed: float
    padded: float
    allowed: float

    @property
    def equal(self) -> bool:
        return self.packed <= self.allowed  # false for NaN


def differ(
    what: str,
    packed: Sequence[torch.Tensor],
    padded: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    names: Sequence[str],
    epsilon: float,
) -> Difference:
    """The tensor in which packed uses most of what it may be off by; tensors of zeros must be zeros."""
    found = []
    for name, a, b, c in zip(names, packed, padded, exact, strict=True):
        c = c.double()
        scale = float(c.norm()) or 1.0
        off, other = (float((x.double() - c).norm()) / scale for x in (a, b))
        found.append(Difference(what, name, off, other, FACTOR * other + epsilon))
    return max(found, key=lambda d: d.packed / d.allowed if d.packed == d.packed else float("inf"))


# --- attention -------------------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    """What transformers' attention interface is called with."""

    is_causal = True


def attention_difference(
    lengths: Lengths,
    dtype: torch.dtype,
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    seed: int = 0,
) -> Difference:
    """Packed attention as it runs on a device, and SDPA sequence by sequence, against float64: output and gradients.

    Args:
        lengths: (prefix, chosen, rejected) tokens of each segment.
        num_kv_heads: a divisor of num_heads.
    """  # fmt: skip
    tokens = sum(map(sum, lengths))
    draw = torch.Generator().manual_seed(seed)
    shapes = [(1, n, tokens, head_dim) for n in (num_heads, num_kv_heads, num_kv_heads)]
    inputs = [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]
    grad = torch.randn(1, tokens, num_heads, head_dim, generator=draw).to(device, dtype)
    scaling, segments = head_dim**-0.5, Segments(lengths, device)

    def packed(query, key, value):
        return attention_forward(_Layer(), query, key, value, None, scaling=scaling, packed_segments=segments)[0]

    found = _with_gradients(packed, inputs, grad)
    padded = _with_gradients(lambda q, k, v: attend_padded(q, k, v, lengths, scaling), inputs, grad)
    exact = _with_gradients(
        lambda q, k, v: attend_exactly(q, k, v, lengths, scaling), [x.double() for x in inputs], grad.double()
    )
    what = f"{str(dtype).removeprefix('torch.')} {num_heads}/{num_kv_heads} heads of {head_dim}"
    names = ("output", "gradient of query", "gradient of key", "gradient of value")
    epsilon = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)  # fp32: kernels multiply differently
    return differ(what, found, padded, exact, names, epsilon)


def _with_gradients(attend: Callable, inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def attend_padded(query, key, value, lengths: Lengths, scaling: float) -> torch.Tensor:
    """(1, T, heads, dim) from SDPA on each sequence alone, as a padded batch computes it: the prefix once with each answer."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    outputs, start = [], 0
    for p, c, r in lengths:
        own, end = start + p + c, start + p + c + r
        if p + c:
            q, k, v = (x[:, :, start:own] for x in (query, key, value))
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
        if r:
            q, k, v = (torch.cat([x[:, :, start : start + p], x[:, :, own:end]], dim=2) for x in (query, key, value))
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)[:, :, p:])
        start = end
    return torch.cat(outputs, dim=2).transpose(1, 2)


def attend_exactly(query, key, value, lengths: Lengths, scaling: float) -> torch.Tensor:
    """(1, T, heads, dim) from softmax attention written out, with one (T, T) mask of what each token sees."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    scores = (query @ key.transpose(2, 3)) * scaling
    weights = scores.masked_fill(~visible(lengths).to(query.device), -torch.inf).softmax(dim=-1)
    return (weights @ value).transpose(1, 2)


def visible(lengths: Lengths) -> torch.Tensor:
    """(T, T) bool: whether a token sees another: of its own segment, not later, and not of the other answer.

    >>> visible([(1, 1, 1)]).int().tolist()  # the prefix; chosen sees it and itself; rejected too, but not chosen
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    segment, part = [], []
    for number, lengths_of in enumerate(lengths):
        for name, count in enumerate(lengths_of):
            segment += [number] * count
            part += [name] * count
    segment_T, part_T = torch.tensor(segment), torch.tensor(part)
    same = segment_T[:, None] == segment_T[None]
    prefix_or_own = (part_T[None] == 0) | (part_T[:, None] == part_T[None])
    return (same & prefix_or_own).tril()


def answers_are_apart(dtype: torch.dtype, device: torch.device, num_heads: int = 4, head_dim: int = 64) -> bool:
    """Whether other keys and values of the chosen answer leave outputs of prefix and rejected answer bit for bit as they are."""
    p, c, r = 70, 33, 41
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(1, num_heads, p + c + r, head_dim, generator=draw).to(device, dtype) for _ in range(3)]
    segments = Segments([(p, c, r)], device)
    found = []
    for shift in (0.0, 1.0):
        query, key, value = (x.clone() for x in inputs)
        for x in (key, value):
            x[:, :, p : p + c] += shift
        found.append(attention_forward(_Layer(), query, key, value, None, packed_segments=segments, scaling=0.1)[0])
    before, after = found
    others = [*range(p), *range(p + c, p + c + r)]
    changed = not torch.equal(before[:, p : p + c], after[:, p : p + c])
    return changed and torch.equal(before[:, others], after[:, others])


# --- models ----------------------------------------------------------------------------------------------------------


def model_difference(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, mode: str, dtype: torch.dtype, device: torch.device
) -> Difference:
    """A model's packed and padded computation in a dtype, against the padded one in float32: hidden states and gradients.

    Args:
        model: that can be packed and is not yet, on the CPU in float32; it is left packed, on the device, in the dtype.
        ids, mask: a right-padded batch, (R, L); in mode `pairs` chosen rows first.
        mode: `pairs` or `rows`.
    """
    ids, mask = ids.to(device), mask.to(device)
    exact = _hidden_and_gradients(model.to(device, torch.float32), ids, mask)
    for (
        parameter
    ) in model.parameters():  # not the buffers: a model that is loaded in half precision has fp32 rotary frequencies
        parameter.data = parameter.data.to(dtype)
    padded = _hidden_and_gradients(model, ids, mask)
    pack_backbone(model, mode, int(mask.sum(dim=1).max()))  # no row is longer than a window has to be
    packed = _hidden_and_gradients(model, ids, mask)
    what = f"{getattr(model.config, 'model_type', '')} {str(dtype).removeprefix('torch.')} {mode}"
    # in fp32 padded is the exact one, so rounding that layers have amplified has to fit in here
    epsilon = torch.finfo(dtype).eps * (400 if dtype == torch.float32 else 4)
    return differ(what, packed, padded, exact, ("hidden states", "gradients"), epsilon)


def _hidden_and_gradients(model, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Last hidden states at the real tokens, and the gradients of all weights for a random weighting of them, in one tensor."""
    model.zero_grad()
    backbone = find_backbone(model)
    assert backbone is not None
    hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
    weighting = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden)
    hidden.backward(weighting)
    gradients = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [hidden.detach(), torch.cat(gradients)]
