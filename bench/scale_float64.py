"""A run in float64, as `python -m rlhf`: scale_float64.py STAGE RECIPE. What is written is the same, but exact.

For bench/scale_proof.py --exact: on one process of a CPU, SFT or DPO with the cached reference.
"""

from __future__ import annotations

import sys

import torch
from torch.utils.checkpoint import checkpoint

TOKENS = 128  # per block of logits


class LogProbs:
    """The log-probabilities of TRL's fused LM head in float64; its other statistics are zeros."""

    @staticmethod
    def apply(
        hidden_NH, weight_VH, bias_V, targets_N, temperature, chunk_size, softcap=None, logit_scale=1.0, outputs=()
    ):
        assert bias_V is None and softcap is None

        def score(hidden, targets):
            logits = (hidden @ weight_VH.T) * (logit_scale / temperature)
            return logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]

        blocks = zip(hidden_NH.split(TOKENS), targets_N.split(TOKENS), strict=True)
        found = torch.cat([checkpoint(score, *block, use_reentrant=False) for block in blocks])
        none = torch.zeros_like(found).detach()
        return found, none, none, none, none.bool()


def main() -> int:
    from transformers import AutoModelForCausalLM
    from trl.trainer import utils

    from rlhf.__main__ import main
    from rlhf.packing import lm_head
    from rlhf.training import reference

    load = AutoModelForCausalLM.from_pretrained.__func__  # type: ignore[attr-defined]

    def load_exact(cls, *args, **options):
        found = load(cls, *args, **options)
        return (found[0].double(), *found[1:]) if isinstance(found, tuple) else found.double()

    def install() -> None:
        utils._use_triton = lambda device: True  # only answer tokens
        utils._ChunkedLogProbFunction = LogProbs

    AutoModelForCausalLM.from_pretrained = classmethod(load_exact)
    lm_head.install = install
    reference.FORMAT = "float64"
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
