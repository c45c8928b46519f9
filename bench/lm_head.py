"""The LM head on a CPU: rlhf/packing/lm_head.py against TRL's ChunkedLogProbFunction, forward and backward, in turns.

python bench/lm_head.py [--tokens 422] [--hidden 576] [--vocabulary 49152]
"""

import argparse
import statistics
import time

import torch
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from rlhf.packing.lm_head import LogProbs

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # what DPO asks for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=422)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    args = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.randn(args.vocabulary, args.hidden) * 0.05
    hidden = torch.randn(args.tokens, args.hidden, requires_grad=True)
    targets = torch.randint(0, args.vocabulary, (args.tokens,))
    seconds, gradients = {"trl": [], "ours": []}, {}
    for turn in range(7):
        for name, function in (("trl", ChunkedLogProbFunction), ("ours", LogProbs)):
            started = time.perf_counter()
            out = function.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, OUTPUTS)
            (gradients[name],) = torch.autograd.grad(out[0].sum(), hidden)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        print(f"{name:<5} {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})")
    print(f"largest difference of the gradient {(gradients['trl'] - gradients['ours']).abs().max():.1e}")


if __name__ == "__main__":
    main()
