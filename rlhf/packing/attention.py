"""Exact causal attention over a packed row, without a T x T mask.

A segment `[p c r]` of the row is two sequences that share the prefix p: `[p c]` with plain causal attention, and
queries r over keys `[p r]`, where query i attends to p and the first i + 1 of r (a causal mask aligned bottom right).

The segments are passed as `packed_segments` in the model's **kwargs, which transformers passes on to the attention
function; a call without them (generation, an unpacked batch) is the same as "sdpa".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.packing.layout import longest_sequence

NAME = "rlhf_packed"
# Arguments that some models pass to attention functions and that would change the result.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")


def register() -> None:
    """Register `NAME` with transformers; unpacked calls get sdpa's mask. Idempotent."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass(frozen=True)
class Segments:
    """The segments of a packed row, and the tensors that attention derives from them once for all layers.

    Attributes:
        lengths: (prefix, chosen, rejected) token counts per segment; their sum is T.
        device: the device of the derived tensors.
        plan: the sequences of a varlen call on that device, if the collator has made them.
    """

    lengths: list[tuple[int, int, int]]
    device: torch.device
    plan: VarlenPlan | None = field(default=None, repr=False, compare=False)
    _copies: dict[torch.device, Segments] = field(default_factory=dict, repr=False, compare=False)

    def on(self, device: torch.device) -> Segments:
        """These segments on a device, made once for all its layers: a model may be spread over several."""
        if device == self.device:
            return self
        if device not in self._copies:
            self._copies[device] = Segments(self.lengths, device)
        return self._copies[device]

    @cached_property
    def longest(self) -> int:
        return longest_sequence(self.lengths)

    @cached_property
    def masks(self) -> list[torch.Tensor]:
        """Per segment the (r, p + r) bool mask of queries r over keys [p r]; small compared to T x T."""
        return [torch.ones(r, p + r, dtype=torch.bool, device=self.device).tril(p) for p, _, r in self.lengths]

    @cached_property
    def parts(self) -> list[tuple[slice, list[slice], torch.Tensor | None]]:
        """Per SDPA call: queries, keys (one or two slices of the row) and the bias of the scores (None: causal)."""
        parts: list[tuple[slice, list[slice], torch.Tensor | None]] = []
        start = 0
        for (p, c, r), mask in zip(self.lengths, self.masks, strict=True):
            own, end = start + p + c, start + p + c + r
            if p + c:
                parts.append((slice(start, own), [slice(start, own)], None))
            if r:
                bias = torch.zeros(1, 1, *mask.shape).masked_fill_(~mask, -torch.inf)
                parts.append((slice(own, end), [slice(start, start + p), slice(own, end)], bias))
            start = end
        return parts

    @cached_property
    def varlen(self) -> VarlenPlan:
        return self.plan or varlen_plan(self.lengths, self.device)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_segments: Segments | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Implement transformers' attention interface.

    Args:
        query: (1, heads, T, dim); key, value: (1, kv_heads, T, dim), heads a multiple of kv_heads.
        attention_mask: ignored if there are segments.

    Returns:
        ((1, T, heads, dim), None)

    Raises:
        ValueError: attention dropout, or an argument that changes attention and that packing doesn't support.
    """
    if packed_segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(
            f"packing: attention dropout of {dropout} can't be packed (both answers of a pair would share one mask); "
            "set attention_dropout (GPT-2: attn_pdrop) to 0 or switch packing off"
        )
    found = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if found or kwargs.get("is_causal") is False:
        raise ValueError(
            f"packing: {type(module).__name__} uses {', '.join(found) or 'attention that is not causal'}, which "
            "packed attention doesn't support; switch packing off"
        )
    if (window := kwargs.get("sliding_window")) is not None and packed_segments.longest > window:
        raise ValueError(
            f"packing: a row has {packed_segments.longest} tokens, more than the sliding_window of {window} tokens of "
            f"{type(module).__name__}; cut rows to {window} tokens or switch packing off"
        )
    packed_segments = packed_segments.on(query.device)
    kernel = varlen_kernel(query.device)
    if kernel is not None:
        query, key, value = (_to_autocast(x) for x in (query, key, value))
        if fits_varlen(query, key, value):
            return attend_varlen(query, key, value, packed_segments.varlen, scaling, kernel), None
    if fits_cpu_kernel(query, key, value):
        query, key, value = (_to_autocast(x) for x in (query, key, value))
        return CpuAttention.apply(query, key, value, packed_segments, scaling), None
    return attend_by_segment(query, key, value, packed_segments, scaling), None


# --- one or two SDPA calls per segment: the fallback of the kernels below --------------------------------------------


def attend_by_segment(query, key, value, segments: Segments, scaling: float | None) -> torch.Tensor:
    """(1, T, heads, dim) from SDPA: causal over [p c], then r over [p r]."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    outputs, start = [], 0
    for (p, c, r), mask in zip(segments.lengths, segments.masks, strict=True):
        own = start + p + c  # where r starts
        q, k, v = (x[:, :, start:own] for x in (query, key, value))
        if p + c:
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
        if r:
            k, v = (torch.cat([x[:, :, start : start + p], x[:, :, own : own + r]], dim=2) for x in (key, value))
            q = query[:, :, own : own + r]
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling))
        start = own + r
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def repeat_heads(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(1, kv_heads, T, dim) -> (1, kv_heads * groups, T, dim).

    SDPA's own `enable_gqa` is not faster on a CPU (7.5 instead of 6.7 ms forward and backward, 195 tokens, 9 over 3
    heads of 64, fp32, 2 cores), and on CUDA in fp32 only the kernel that materialises all scores supports it.
    """
    if groups == 1:
        return x
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, groups, length, dim).reshape(batch, heads * groups, length, dim)


# --- the CPU: SDPA's own kernel, called per segment ------------------------------------------------------------------


def fits_cpu_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether SDPA would use its flash kernel on this CPU: one head size, a known dtype."""
    known = query.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return query.device.type == "cpu" and known and value.shape[-1] == query.shape[-1]


class CpuAttention(torch.autograd.Function):
    """`attend_by_segment` that saves fewer tensors for the backward pass.

    Autograd saves key and value with repeated heads, the parts of `[p r]`, and each output twice, and allocates a
    zero-filled gradient of the full row for each slice. This saves the row's query, key, value and output once.
    SmolLM2-135M, 4 HH pairs, LoRA, 2 cores: peak 3.96 -> 3.70 GiB, 0.86 -> 0.88 pairs/s (`bench/dpo.py`).
    """

    @staticmethod
    def forward(ctx, query, key, value, segments: Segments, scaling):
        groups = query.shape[1] // key.shape[1]
        _, heads, tokens, dim = query.shape
        output = query.new_empty(1, tokens, heads, dim)
        log_sums = []
        for queries, keys, mask in segments.parts:
            q, k, v = query[:, :, queries], _pick(key, keys, groups), _pick(value, keys, groups)
            part, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, mask is None, attn_mask=_like(mask, q), scale=scaling
            )
            output[:, queries] = part.transpose(1, 2)
            log_sums.append(log_sum)
        ctx.save_for_backward(query, key, value, output, *log_sums)
        ctx.segments, ctx.scaling = segments, scaling
        return output

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, output, *log_sums = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        for (queries, keys, mask), log_sum in zip(ctx.segments.parts, log_sums, strict=True):
            q, k, v = query[:, :, queries], _pick(key, keys, groups), _pick(value, keys, groups)
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_output[:, queries].transpose(1, 2), q, k, v, output[:, queries].transpose(1, 2), log_sum, 0.0,
                mask is None, attn_mask=_like(mask, q), scale=ctx.scaling,
            )  # fmt: skip
            grad_query[:, :, queries] = grads[0]
            for total, grad in ((grad_key, grads[1]), (grad_value, grads[2])):
                if groups > 1:
                    grad = grad.unflatten(1, (-1, groups)).sum(dim=2)
                at = 0
                for part in keys:
                    length = part.stop - part.start
                    total[:, :, part] += grad[:, :, at : at + length]
                    at += length
        return grad_query, grad_key, grad_value, None, None


def _pick(x: torch.Tensor, parts: list[slice], groups: int) -> torch.Tensor:
    """The tokens of some slices of a row, with repeated heads."""
    return repeat_heads(x[:, :, parts[0]] if len(parts) == 1 else torch.cat([x[:, :, p] for p in parts], dim=2), groups)


def _like(bias: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    return None if bias is None else bias.to(query.dtype)


# --- one varlen call: CUDA, half precision ---------------------------------------------------------------------------
# The kernels themselves were NOT run where this was written (no GPU; torch.nn.attention.varlen has no CPU kernel). They
# are called as documented by torch 2.13 and flash-attn's README. The plan is tested on a CPU against a mock kernel with
# their documented semantics: with causal attention and seqlen_q != seqlen_k the mask is aligned to the bottom right, as
# in flash-attn since 2.1 and in torch's copy of it.


@dataclass(frozen=True)
class VarlenPlan:
    """Sequences for one varlen call: queries in the order of the row, keys with each prefix repeated for r.

    Attributes:
        key_index: int64, packed tokens in the order of the keys; None if that is the row itself.
        cu_seqlens_q, cu_seqlens_k: int32, cumulative lengths from 0, one more than there are sequences.
        max_seqlen_q, max_seqlen_k: length of the longest sequence.
    """

    key_index: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def varlen_plan(lengths: list[tuple[int, int, int]], device: torch.device) -> VarlenPlan:
    """The sequences of a packed row; [(2, 1, 2)] is queries 3 + 2 over keys 3 + 4 at tokens 0 1 2, 0 1 3 4."""
    query_lengths, key_lengths, key_parts, start = [], [], [], 0
    for p, c, r in lengths:
        if p + c:
            query_lengths.append(p + c)
            key_lengths.append(p + c)
            key_parts.append(torch.arange(start, start + p + c))
        if r:
            query_lengths.append(r)
            key_lengths.append(p + r)
            key_parts += [torch.arange(start, start + p), torch.arange(start + p + c, start + p + c + r)]
        start += p + c + r
    cu_seqlens_q, cu_seqlens_k = (
        F.pad(torch.tensor(x).cumsum(0), (1, 0)).to(device, torch.int32) for x in (query_lengths, key_lengths)
    )
    key_index = torch.cat(key_parts).to(device) if query_lengths != key_lengths else None
    return VarlenPlan(key_index, cu_seqlens_q, cu_seqlens_k, max(query_lengths), max(key_lengths))


def attend_varlen(query, key, value, plan: VarlenPlan, scaling: float | None, kernel: Callable) -> torch.Tensor:
    """(1, T, heads, dim) from a varlen `kernel`, which takes (T, heads, dim)."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if plan.key_index is not None:
        key, value = key.index_select(0, plan.key_index), value.index_select(0, plan.key_index)
    return kernel(query.contiguous(), key.contiguous(), value.contiguous(), plan, scaling).unsqueeze(0)


def fits_varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether flash attention's varlen kernels fit these: half precision, one head size, a multiple of 8 up to 256."""
    dim = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16) and query.dtype == key.dtype == value.dtype
    return half and value.shape[-1] == dim and dim % 8 == 0 and dim <= 256


def _to_autocast(x: torch.Tensor) -> torch.Tensor:
    """Cast to autocast's dtype: varlen kernels don't, unlike SDPA, and rotary embeddings leave q and k in fp32."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


@lru_cache
def varlen_kernel(device: torch.device) -> Callable | None:
    """The varlen kernel of a device as kernel(query, key, value, plan, scaling); None means SDPA per segment."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        varlen_attn = None  # type: ignore[assignment]
    if varlen_attn is not None and "window_size" in inspect.signature(varlen_attn).parameters:
        return lambda *args: _torch_varlen(varlen_attn, *args)
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return lambda *args: _flash_attn_varlen(flash_attn_varlen_func, *args)


def kernel_name(device: torch.device) -> str:
    """The name of the kernel of packed attention in half precision on a device, for messages."""
    if varlen_kernel(device) is None:
        return "PyTorch's scaled_dot_product_attention, per segment"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "flash_attn's varlen kernel"
    return (
        f"{'PyTorch' if 'window_size' in inspect.signature(varlen_attn).parameters else 'flash_attn'}'s varlen kernel"
    )


def _torch_varlen(varlen_attn, query, key, value, plan: VarlenPlan, scaling: float | None) -> torch.Tensor:
    options = {"window_size": (-1, 0), "scale": scaling}  # (-1, 0): causal
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch before 2.12 doesn't document fewer key heads
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    sequences = (plan.cu_seqlens_q, plan.cu_seqlens_k, plan.max_seqlen_q, plan.max_seqlen_k)
    return varlen_attn(query, key, value, *sequences, **options)


def _flash_attn_varlen(flash_attn_varlen_func, query, key, value, plan: VarlenPlan, scaling) -> torch.Tensor:
    sequences = (plan.cu_seqlens_q, plan.cu_seqlens_k, plan.max_seqlen_q, plan.max_seqlen_k)
    return flash_attn_varlen_func(query, key, value, *sequences, softmax_scale=scaling, causal=True)
