"""Packed attention against one dense mask over the whole row, forward and backward, with each of its paths."""

import pytest
import torch
from torch import nn

from rlhf.packing.attention import (
    CpuAttention,
    Segments,
    VarlenPlan,
    attend_by_segment,
    attend_varlen,
    attention_forward,
    fits_varlen,
    varlen_kernel,
    varlen_plan,
)

CPU = torch.device("cpu")
CASES = {
    "one pair": [(4, 3, 2)],
    "uneven pairs": [(5, 1, 7), (1, 6, 1), (9, 2, 3)],
    "no prefix": [(0, 3, 2), (2, 2, 1)],
    "one-token completions": [(6, 1, 1), (0, 1, 1)],
    "rows": [(5, 0, 0), (1, 0, 0), (3, 0, 0)],
    "an empty row": [(3, 0, 0), (0, 0, 0), (2, 0, 0)],
}


def dense_mask(lengths):
    """(T, T) bool, straight from the definition: a token sees itself and what came before it in its own sequence."""
    rows = []  # (segment, part, place in the row) of each token
    for segment, (p, c, r) in enumerate(lengths):
        rows += [(segment, part) for part, n in (("p", p), ("c", c), ("r", r)) for _ in range(n)]
    mask = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    for query, (segment, part) in enumerate(rows):
        for key in range(query + 1):
            same_sequence = rows[key][0] == segment and rows[key][1] in ("p", part)
            mask[query, key] = same_sequence
    return mask


def reference(query, key, value, lengths, scaling):
    """Softmax attention written out, with the dense mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)) * scaling
    weights = scores.masked_fill(~dense_mask(lengths), float("-inf")).softmax(dim=-1)
    return (weights @ value).transpose(1, 2)


def stand_in_kernel(query, key, value, plan: VarlenPlan, scaling):
    """What varlen kernels document: sequence by sequence, causal, aligned to the bottom right; (T, heads, dim)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    assert plan.cu_seqlens_q.dtype == plan.cu_seqlens_k.dtype == torch.int32
    q_ends, k_ends = plan.cu_seqlens_q.tolist(), plan.cu_seqlens_k.tolist()
    outputs = []
    for i in range(len(q_ends) - 1):
        q = query[q_ends[i] : q_ends[i + 1]].transpose(0, 1)
        k, v = (x[k_ends[i] : k_ends[i + 1]].transpose(0, 1) for x in (key, value))
        n, m = q.shape[1], k.shape[1]
        assert 0 < n <= plan.max_seqlen_q and n <= m <= plan.max_seqlen_k
        sees = torch.arange(m)[None] <= torch.arange(n)[:, None] + m - n
        outputs.append(((q @ k.transpose(1, 2) * scaling).masked_fill(~sees, float("-inf")).softmax(-1) @ v).transpose(0, 1))  # fmt: skip
    return torch.cat(outputs)


def by_segment(query, key, value, lengths, scaling):
    return attend_by_segment(query, key, value, Segments(lengths, CPU), scaling)


def by_cpu_kernel(query, key, value, lengths, scaling):
    return CpuAttention.apply(query, key, value, Segments(lengths, CPU), scaling)


def by_varlen(query, key, value, lengths, scaling):
    return attend_varlen(query, key, value, varlen_plan(lengths, CPU), scaling, stand_in_kernel)


def with_gradients(attend, tensors, lengths, scaling):
    tensors = [x.clone().requires_grad_() for x in tensors]
    output = attend(*tensors, lengths, scaling)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
    return [output.detach(), *(x.grad for x in tensors)]


@pytest.mark.parametrize("attend", [by_segment, by_cpu_kernel, by_varlen])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("case", CASES)
def test_equals_dense_mask(case, heads, kv_heads, attend):
    lengths = CASES[case]
    tokens = sum(map(sum, lengths))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, n, tokens, 8, generator=generator) for n in (heads, kv_heads, kv_heads)]
    expected = with_gradients(reference, tensors, lengths, 0.3)
    for found, want in zip(with_gradients(attend, tensors, lengths, 0.3), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attend", [by_segment, by_cpu_kernel])
def test_bfloat16_is_as_near_as_its_rounding(attend):
    lengths = CASES["uneven pairs"]
    tensors = [torch.randn(1, 4, sum(map(sum, lengths)), 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]  # fmt: skip
    expected = reference(*tensors, lengths, 0.3)
    found = attend(*(x.bfloat16() for x in tensors), lengths, 0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cpu_kernel_in_other_dtypes(dtype):
    """Its own backward pass against autograd's through SDPA, in the same dtype."""
    lengths = CASES["uneven pairs"]
    tensors = [torch.randn(1, n, sum(map(sum, lengths)), 16, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (6, 2, 2)]  # fmt: skip
    want = [x.double() for x in with_gradients_in(by_segment, tensors, lengths)]
    tolerance = {torch.float64: 1e-12, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for found, expected in zip(with_gradients_in(by_cpu_kernel, tensors, lengths), want, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def with_gradients_in(attend, tensors, lengths):
    tensors = [x.clone().requires_grad_() for x in tensors]
    output = attend(*tensors, lengths, 0.3)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype))
    return [output.detach(), *(x.grad for x in tensors)]


def test_cpu_kernel_keeps_the_row_once():
    """Query, key, value and output of the row, and a number a query and head: no repeated heads, no cut-outs."""
    lengths = [(20, 10, 10)] * 3
    query, key, value = (torch.randn(1, n, 120, 8, requires_grad=True) for n in (6, 2, 2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        by_cpu_kernel(query, key, value, lengths, 0.3)
    assert sum(kept) == 120 * 8 * (6 + 2 + 2 + 6) + 120 * 6


@pytest.mark.parametrize("attend", [by_segment, by_cpu_kernel, by_varlen])
def test_chosen_does_not_reach_rejected(attend):
    """Other keys and values of c leave the outputs of r bit for bit alone, and r those of c."""
    lengths = [(3, 2, 4)]
    tensors = [torch.randn(1, 2, 9, 8) for _ in range(3)]
    before = attend(*tensors, lengths, 0.3)
    changed = [x.clone() for x in tensors]
    for x in changed:
        x[:, :, 3:5] += 1
    after = attend(*changed, lengths, 0.3)
    assert torch.equal(before[:, 5:], after[:, 5:]) and torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3:5], after[:, 3:5])


def test_varlen_plan_example():
    """The docstring's: [p p c r r] is queries [p p c] and [r r] over keys [p p c] and [p p r r]."""
    plan = varlen_plan([(2, 1, 2)], CPU)
    assert plan.cu_seqlens_q.tolist() == [0, 3, 5] and plan.cu_seqlens_k.tolist() == [0, 3, 7]
    assert plan.key_index.tolist() == [0, 1, 2, 0, 1, 3, 4]
    assert (plan.max_seqlen_q, plan.max_seqlen_k) == (3, 4)


def test_rows_need_no_gathered_keys():
    assert varlen_plan([(5, 0, 0), (2, 0, 0)], CPU).key_index is None


def test_varlen_is_for_half_precision_on_cuda():
    fp32, bf16 = (torch.zeros(1, 2, 3, 16, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert varlen_kernel(CPU) is None
    assert fits_varlen(bf16, bf16, bf16)
    assert not fits_varlen(fp32, fp32, fp32) and not fits_varlen(bf16, bf16, bf16[..., :8])
    assert not fits_varlen(*[bf16[..., :12]] * 3)


def call(**kwargs):
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    tensors = [torch.randn(1, n, 5, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2)]
    return attention_forward(module, *tensors, kwargs.pop("attention_mask", None), scaling=0.3, **kwargs)


def test_without_segments_it_is_sdpa():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    tensors = [torch.randn(1, n, 5, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2)]
    for mask in (
        None,
        torch.ones(5, 5, dtype=torch.bool).tril(-1).logical_or(torch.eye(5, dtype=torch.bool))[None, None],
    ):
        want, _ = sdpa_attention_forward(module, *tensors, mask, scaling=0.3)
        assert torch.equal(call(attention_mask=mask)[0], want)


def test_dropout_is_refused():
    with pytest.raises(ValueError, match="attention dropout of 0.1 can't be packed .* set attention_dropout"):
        call(packed_segments=Segments([(2, 1, 2)], CPU), dropout=0.1)


@pytest.mark.parametrize("kwargs, word", [({"softcap": 30.0}, "softcap"), ({"s_aux": 1}, "s_aux"), ({"sliding_window": 3}, "a row has 4 tokens, more than the sliding_window of 3"), ({"is_causal": False}, "not causal")])  # fmt: skip
def test_what_would_change_attention_is_refused(kwargs, word):
    with pytest.raises(ValueError, match=word):
        call(packed_segments=Segments([(2, 1, 2)], CPU), **kwargs)
    call(packed_segments=Segments([(2, 1, 2)], CPU), sliding_window=None, softcap=None)
    call(packed_segments=Segments([(2, 1, 2)], CPU), sliding_window=4)  # its longest row has 4 tokens
