"""TRL's Triton kernels of the LM head in Triton's interpreter, on a CPU: how far they are from full logits in float64.

    TRITON_INTERPRET=1 python tests/packing/interpreted_kernels.py

Prints one line of JSON: `calls` of each kernel, and `rows` of `rlhf.preflight.equality.differ`. The products around the kernels
are a CPU's; a GPU's are measured by the part `lm-head` of `make gpu-proof`.
"""

import json
import os
from collections import Counter

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are made

import torch
import torch.nn.functional as F
from trl.kernels import chunked_logprob

from rlhf.preflight.equality import differ

TOKENS, WIDTH, VOCABULARY, CHUNK = 9, 32, 2500, 1030  # three tiles, of which the last is no multiple of a block
NAMES = ("log-probabilities", "gradient of hidden states", "gradient of weights")
calls: Counter = Counter()


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel, name):
        self.kernel, self.name = kernel, name

    def __getitem__(self, grid):
        calls[self.name] += 1
        return self.kernel[grid]


def with_gradients(function, inputs, weighting):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    values = function(*leaves)
    return [values.detach(), *torch.autograd.grad(values, leaves, weighting.to(values.dtype))]


def compare(dtype, softcap) -> dict:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, WIDTH, generator=draw) for n in (TOKENS, VOCABULARY))
    inputs = [hidden.to(dtype), (weight * WIDTH**-0.5).to(dtype)]
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=draw)
    targets[:2] = torch.tensor([CHUNK - 1, CHUNK])  # on both sides of a tile's end
    weighting = torch.randn(TOKENS, generator=draw)

    def fused(hidden, weight):
        return chunked_logprob.ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 0.7, CHUNK, softcap, 1.3, ("log_probs",)
        )[0]

    def full(hidden, weight):
        logits = (hidden @ weight.T) * 1.3
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return -F.cross_entropy(logits / 0.7, targets, reduction="none")

    exact = with_gradients(full, [x.double() for x in inputs], weighting)
    epsilon = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 1)  # as in bench/gpu_proof_equal.py
    found = differ(f"{dtype} softcap {softcap}", with_gradients(fused, inputs, weighting), with_gradients(full, inputs, weighting), exact, NAMES, epsilon)  # fmt: skip
    return {
        "case": found.what,
        "worst": found.worst,
        "off": found.packed,
        "allowed": found.allowed,
        "equal": found.equal,
    }


def main() -> None:
    assert chunked_logprob._TRITON_AVAILABLE, "triton is not installed"
    chunked_logprob._use_triton = lambda device: True
    chunked_logprob._forward_kernel = Counted(chunked_logprob._forward_kernel, "forward")
    chunked_logprob._backward_kernel = Counted(chunked_logprob._backward_kernel, "backward")
    rows = [compare(dtype, softcap) for dtype in (torch.float32, torch.bfloat16) for softcap in (None, 30.0)]
    print(json.dumps({"calls": calls, "rows": rows}))


if __name__ == "__main__":
    main()
