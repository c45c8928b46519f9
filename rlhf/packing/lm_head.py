"""The LM head on a CPU: log-probabilities and the statistics that TRL logs with them, one vocabulary tile at a time.

TRL's fused LM head calls `ChunkedLogProbFunction`, which without Triton makes a dozen passes over tiles of 32,768
columns, in memory instead of in cache, and recomputes the logits in the backward pass. This is the same function of the
same arguments for fp32 on CPUs: tiles fit in the cache, and with a frozen head (LoRA) the gradient of the hidden states
comes from the same pass. 422 answer tokens (4 HH pairs), SmolLM2-135M's head, forward and backward on 2 cores: 0.18 s,
TRL's 0.68 s (`python bench/lm_head.py`).

Suffixes: N tokens, H hidden size, V vocabulary, W width of a vocabulary tile.
"""

from __future__ import annotations

import torch

TILE_BYTES = 2 << 20
MAX_TOKENS = 1024  # per block, so that tiles do not become too narrow


def install() -> None:
    """Make TRL's fused LM head use this on CPUs, and score only answer tokens, as it does on a GPU.

    TRL 1.16 scores every position on devices without Triton, prompts and padding included, and masks afterwards (to
    avoid recompilation on Neuron, according to its source). Remove this once TRL is as fast on CPUs;
    tests/packing/test_lm_head.py shows equal results. Idempotent; other devices and dtypes still use TRL's function.
    """
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    utils._use_triton = lambda device: device.type == "cpu" or chunked_logprob._use_triton(device)
    utils._ChunkedLogProbFunction = LogProbs  # type: ignore[misc, assignment]  # it has all that TRL calls


class LogProbs:
    """Replaces TRL's `ChunkedLogProbFunction`: `apply` with the same arguments and results."""

    @staticmethod
    def apply(
        hidden_NH, weight_VH, bias_V, targets_N, temperature, chunk_size, softcap=None, logit_scale=1.0, outputs=()
    ):  # fmt: skip
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), each (N,), None if not in `outputs`."""
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        tensors = [x for x in (hidden_NH, weight_VH, bias_V) if x is not None]
        supported = all(x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() for x in tensors)
        if not supported or softcap is not None or torch.is_autocast_enabled("cpu"):
            rest = (temperature, chunk_size, softcap, logit_scale, outputs)
            return ChunkedLogProbFunction.apply(hidden_NH, weight_VH, bias_V, targets_N, *rest)
        return _LogProbs.apply(hidden_NH, weight_VH, bias_V, targets_N, logit_scale / temperature, outputs)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, targets_N, scale, outputs):
        ctx.set_materialize_grads(False)
        needs_hidden, *needs_head = ctx.needs_input_grad[:3]
        found: dict[str, list[torch.Tensor]] = {}
        for hidden, targets in zip(hidden_NH.split(MAX_TOKENS), targets_N.split(MAX_TOKENS), strict=True):
            part = log_prob_statistics(
                hidden, weight_VH, bias_V, targets, scale,
                with_jacobian=needs_hidden and not any(needs_head), log_sum_sq="log_sum_sq_probs" in outputs,
            )  # fmt: skip
            for name, value in part.items():
                found.setdefault(name, []).append(value)
        joined = {name: torch.cat(parts) for name, parts in found.items()}
        ctx.scale = scale
        if "jacobian" in joined:
            ctx.save_for_backward(joined["jacobian"])
        elif any(needs_head):
            ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, joined["log_z"])
        names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        wanted = [joined[name] if name in outputs else None for name in names]
        ctx.mark_non_differentiable(*(x for x in wanted[1:] if x is not None))
        return joined["log_probs"], *wanted

    @staticmethod
    def backward(ctx, grad_N, grad_entropy_N, *_):
        if grad_entropy_N is not None:
            raise NotImplementedError(
                "rlhf.packing.lm_head has no gradient of the entropy (no supported loss needs it)"
            )
        if grad_N is None:
            return (None,) * 6
        if len(ctx.saved_tensors) == 1:
            return grad_N[:, None] * ctx.saved_tensors[0], *(None,) * 5
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        hidden_NH, weight_VH, bias_V, targets_N, log_z_N = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        with maybe_gather_lm_head_ctx(weight_VH, bias_V):  # ZeRO-3
            grads = head_gradients(grad_N, hidden_NH, weight_VH, bias_V, targets_N, log_z_N, ctx.scale, needs)
        return *grads, None, None, None


def head_gradients(grad_N, hidden_NH, weight_VH, bias_V, targets_N, log_z_N, scale: float, needs) -> tuple:
    """Gradients of sum(grad * log_probs) for hidden states, weight and bias: None if `needs` is false.

    d log p_target / dz_j = [j = target] - p_j, z = scale * (hidden weight^T + bias).
    """
    grad_N = grad_N * scale
    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden = grad_N[:, None] * weight_VH[targets_N] if needs_hidden else None
    grad_weight = torch.zeros_like(weight_VH) if needs_weight else None
    grad_bias = torch.zeros_like(bias_V) if needs_bias else None
    if grad_weight is not None:
        grad_weight.index_add_(0, targets_N, grad_N[:, None] * hidden_NH)
    if grad_bias is not None:
        grad_bias.index_add_(0, targets_N, grad_N)
    for block in torch.arange(len(hidden_NH)).split(MAX_TOKENS):
        rows = slice(int(block[0]), int(block[-1]) + 1)
        hidden, step = hidden_NH[rows], tile_width(len(block), len(weight_VH))
        for start in range(0, len(weight_VH), step):
            tile = slice(start, start + step)
            z = _logits(hidden, weight_VH[tile], None if bias_V is None else bias_V[tile], scale)
            p = z.sub_(log_z_N[rows, None]).exp_().mul_(grad_N[rows, None])
            if grad_hidden is not None:
                grad_hidden[rows].addmm_(p, weight_VH[tile], alpha=-1)
            if grad_weight is not None:
                grad_weight[tile].addmm_(p.T, hidden, alpha=-1)
            if grad_bias is not None:
                grad_bias[tile] -= p.sum(dim=0)
    return grad_hidden, grad_weight, grad_bias


def tile_width(num_tokens: int, vocabulary: int) -> int:
    """The number of columns of a tile of about TILE_BYTES."""
    return max(256, min(vocabulary, TILE_BYTES // 4 // num_tokens // 256 * 256))


def _logits(hidden_NH, weight_WH, bias_W, scale: float) -> torch.Tensor:
    z = hidden_NH @ weight_WH.T if bias_W is None else torch.addmm(bias_W, hidden_NH, weight_WH.T)
    return z if scale == 1.0 else z.mul_(scale)


def log_prob_statistics(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    scale: float,
    with_jacobian: bool,
    log_sum_sq: bool = False,
) -> dict[str, torch.Tensor]:
    """Statistics of z = scale * (hidden weight^T + bias) per token, without materialising the (N, V) logits.

    Args:
        hidden_NH, weight_VH, bias_V: float32 (bias may be None).
        targets_N: int64 labels.
        with_jacobian: also return d log_probs / d hidden; with a frozen head it suffices for the backward pass.
        log_sum_sq: also return log(sum p^2).

    Returns:
        log_probs, log_z, entropy (nats), mean_logits: (N,) float32; is_top1: (N,) bool, ties go to the first token;
        log_sum_sq_probs (N,) and jacobian (N, H) float32 if requested.

    Source: the running rescaling of online softmax, arXiv:1805.02867, applied to softmax(z) weight as in
    arXiv:2205.14135.
    """
    num_tokens, vocabulary = hidden_NH.shape[0], weight_VH.shape[0]
    width = tile_width(num_tokens, vocabulary)
    maximum, top = hidden_NH.new_full((num_tokens,), -torch.inf), targets_N.new_full((num_tokens,), -1)
    sum_exp, sum_exp_z, sum_sq, sum_z, target_z = (hidden_NH.new_zeros(num_tokens) for _ in range(5))
    jacobian = torch.zeros_like(hidden_NH) if with_jacobian else None
    for start in range(0, vocabulary, width):
        tile_WH = weight_VH[start : start + width]
        z = _logits(hidden_NH, tile_WH, None if bias_V is None else bias_V[start : start + width], scale)
        sum_z += z.sum(dim=1)
        here = (targets_N >= start) & (targets_N < start + z.shape[1])
        at = z.gather(1, (targets_N - start).clamp(0, z.shape[1] - 1)[:, None])[:, 0]
        target_z = torch.where(here, at, target_z)
        tile_maximum, tile_top = z.max(dim=1)
        top = torch.where(tile_maximum > maximum, tile_top + start, top)  # the first of equals, as in argmax
        new_maximum = torch.maximum(maximum, tile_maximum)
        rescale = torch.exp(maximum - new_maximum)
        exp = torch.sub(z, new_maximum[:, None]).exp_()
        sum_exp = sum_exp * rescale + exp.sum(dim=1)
        sum_exp_z = sum_exp_z * rescale + torch.linalg.vecdot(exp, z)
        if log_sum_sq:
            sum_sq = sum_sq * rescale**2 + torch.linalg.vecdot(exp, exp)
        if jacobian is not None:
            jacobian.mul_(rescale[:, None]).addmm_(exp, tile_WH)
        maximum = new_maximum
    log_z = maximum + sum_exp.log()
    found = {
        "log_probs": target_z - log_z, "log_z": log_z, "entropy": log_z - sum_exp_z / sum_exp,
        "mean_logits": sum_z / vocabulary, "is_top1": top == targets_N,
    }  # fmt: skip
    if log_sum_sq:
        found["log_sum_sq_probs"] = sum_sq.log() - 2 * sum_exp.log()
    if jacobian is not None:
        found["jacobian"] = jacobian.div_(-sum_exp[:, None]).add_(weight_VH[targets_N]).mul_(scale)
    return found
