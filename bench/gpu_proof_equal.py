"""Parts of bench/gpu_proof.py: what is computed packed and fused is what is computed padded and plain."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from gpu_proof_device import Context

TESTS = Path(__file__).parent.parent / "tests" / "packing"


def attention(context: Context) -> dict[str, Any]:
    """Packed attention (on GPUs one varlen call) and SDPA sequence by sequence against float64: outputs and gradients."""
    import torch

    from rlhf.packing import kernel_name
    from rlhf.preflight.equality import LAYOUTS, answers_are_apart, attention_difference

    device = torch.device(context.device)
    dims = (64,) if context.toy else (64, 80, 96, 128, 256)
    heads = ((4, 4), (4, 2)) if context.toy else ((8, 8), (8, 2), (12, 1))
    layouts = LAYOUTS if context.toy else LAYOUTS | {"a batch of pairs": pairs_of_a_batch()}
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in dims:
            for query_heads, key_heads in heads:
                for name, lengths in layouts.items():
                    found = attention_difference(lengths, dtype, device, query_heads, key_heads, head_dim)
                    rows.append(row_of(found) | {"case": f"{found.what}, {name}"})
        rows.append({"case": f"{dtype}, answers do not see each other", "equal": answers_are_apart(dtype, device)})
    return verdict(rows, kernel=kernel_name(device))


def pairs_of_a_batch() -> list[tuple[int, int, int]]:
    """24 pairs of HH-like lengths, about 4,300 tokens."""
    return [(30 + 37 * i % 290, 8 + 23 * i % 90, 5 + 31 * i % 110) for i in range(24)]


def row_of(found: Any) -> dict[str, Any]:
    return {"case": found.what, "equal": found.equal, "worst": found.worst, "packed": found.packed, "padded": found.padded, "allowed": found.allowed}  # fmt: skip


def verdict(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The result of a part that compares: how many cases are equal, the worst, and those that are not."""
    wrong = [row for row in rows if not row["equal"]]
    measured = [row for row in rows if row.get("allowed")]
    worst = max(measured, key=lambda row: row["packed"] / row["allowed"], default=None)
    words = f"{len(rows) - len(wrong)} of {len(rows)} cases equal"
    if worst:
        words += f"; nearest to its bound: off by {worst['packed']:.1e} of {worst['allowed']:.1e} ({worst['case']}, {worst['worst']})"
    return {"ok": not wrong, "summary": words, "wrong": wrong[:20], "rows": rows, **more}


def families(context: Context) -> dict[str, Any]:
    """A tiny model of every verified family, packed and padded in bf16 and fp32: hidden states and gradients."""
    import torch

    from rlhf.packing.backbone import VERIFIED
    from rlhf.preflight.equality import model_difference

    tests = family_models()
    device, rows = torch.device(context.device), []
    names = ("llama", "mixtral", "gpt2") if context.toy else sorted(VERIFIED)
    for name in names:
        for dtype in (torch.bfloat16, torch.float32):
            for mode in ("pairs", "rows"):
                case = f"{name} {dtype} {mode}"
                try:
                    model = without_choice(tests, name)
                    rows.append(row_of(model_difference(model, *tests.UNEVEN, mode, dtype, device)))
                except Exception as error:  # one family must not hide the others
                    rows.append({"case": case, "equal": False, "error": f"{type(error).__name__}: {error}"[:500]})
    return verdict(rows, families=len(names))


def family_models() -> Any:
    """tests/packing/tiny_models.py, which has a tiny model of every family."""
    sys.path.insert(0, str(TESTS))
    return importlib.import_module("tiny_models")


def without_choice(tests: Any, name: str) -> Any:
    """A family's tiny model; every expert of a mixture takes every token, because a router's choice is not continuous: where two
    experts are nearly tied, rounding alone changes the result by any amount."""
    config = tests.tiny_config(name)
    if not getattr(config, "num_experts_per_tok", None):
        return tests.tiny_model(name)
    counts = (getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    number = next(filter(None, counts))
    return tests.tiny_model(name, num_experts_per_tok=number)


def lm_head(context: Context) -> dict[str, Any]:
    """The fused log-probabilities of the device and those of full logits, against float64: values and gradients."""
    import torch
    import torch.nn.functional as F
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    from rlhf.packing.lm_head import LogProbs
    from rlhf.preflight.equality import differ

    device = torch.device(context.device)
    function = ChunkedLogProbFunction if context.device == "cuda" else LogProbs
    sizes = ((33, 32, 700),) if context.toy else ((33, 64, 1000), (512, 2048, 128256), (1500, 576, 49152))
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, hidden_size, vocabulary in sizes:
            draw = torch.Generator().manual_seed(0)
            hidden, weight = (torch.randn(n, hidden_size, generator=draw) for n in (tokens, vocabulary))
            targets = torch.randint(0, vocabulary, (tokens,), generator=draw).to(device)
            grad = torch.randn(tokens, generator=draw).to(device)
            inputs = [hidden.to(device, dtype), (weight * hidden_size**-0.5).to(device, dtype)]

            def fused(hidden, weight, targets=targets):
                return function.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs",))[0]

            def full(hidden, weight, targets=targets):
                logits = hidden @ weight.T
                return -F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")  # fmt: skip

            found = [_with_gradients(f, x, grad) for f, x in ((fused, inputs), (full, inputs), (full, [x.double() for x in inputs]))]  # fmt: skip
            what = f"{dtype} {tokens} tokens, {hidden_size} x {vocabulary}"
            # float32 sums of many columns, in another order
            epsilon = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 1)
            names = ("log-probabilities", "gradient of hidden states", "gradient of weights")
            rows.append(row_of(differ(what, *found, names, epsilon)))
            del found, inputs, hidden, weight
    return verdict(rows, function=function.__name__)


def _with_gradients(function: Any, inputs: list[Any], grad: Any) -> list[Any]:
    import torch

    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    values = function(*leaves)
    return [values.detach(), *torch.autograd.grad(values, leaves, grad.to(values.dtype))]
