"""Sums and weights that single precision (or TRL's bf16) would spoil: what makes two ways to split a step disagree.

Measured against float64 with answers of 300 words, on CPUs (bench/results/scale_proof.md):

- The norm of a gradient. torch adds the squares of a tensor on a CPU in the order of memory, in fp32: of an embedding of
  49,152 x 128 it is off by up to 4e-4 of itself, so FSDP2's pieces and one process's whole have other norms. DeepSpeed
  adds in float64, and GPUs in a tree.
- The log-probability of an answer. A sum of -4,000 nats has steps of 2.4e-4 in fp32, four of them make the margin of a
  pair, and its loss is a function of their difference, which is often below one nat.
- TRL casts a QLoRA adapter to bf16, where most of Adam's small updates are rounded away, and where gradients of several
  micro-batches and ranks are added in 8 bits of mantissa.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from rlhf.distributed.sharding import sum_of_squares

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")


class AccurateNorm(Trainer):
    """Mixin: on CPUs the norm of a gradient is added in float64, for the log as for clipping, under every engine."""

    def _clip_grad_norm(self, model):
        return self._clip(model, self.args.max_grad_norm) if self._adds_squares else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None and self._adds_squares:
            grad_norm = self._clip(model, math.inf)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    @property
    def _adds_squares(self) -> bool:
        return self.args.device.type == "cpu" and not self.is_deepspeed_enabled  # DeepSpeed's is in float64

    def _clip(self, model, max_norm: float) -> float:
        """The norm before clipping, of all ranks; torch's `clip_grad_norm_` but for the sum."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum_of_squares(gradients))
        if (factor := max_norm / (norm + 1e-6)) < 1:
            for gradient in gradients:
                getattr(gradient, "to_local", lambda g=gradient: g)().mul_(factor)
        return norm


def adds_in_float64(args) -> bool:
    """Whether DPO's log-probabilities are summed in float64: TRL 1.16's alpha divergence knows no float64, Apple's GPUs neither."""
    return args.device.type in ("cpu", "cuda") and args.f_divergence_type != "alpha_divergence"


def sum_logps_in_float64(model) -> None:
    """Make a model with TRL's fused LM head return its log-probabilities per token as float64, so that TRL sums them so."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.register_forward_hook(_to_float64)


def _to_float64(module, args, outputs):
    if getattr(outputs, "log_probs", None) is not None:
        outputs.log_probs = outputs.log_probs.double()
    return outputs


class Float64References:
    """A collator that keeps the reference's log-probabilities in float64; TRL 1.16's makes float32 of them."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(examples)
        exact = {name: [example[name] for example in examples] for name in REFERENCES if name in batch}
        return batch | {name: torch.tensor(values, dtype=torch.float64) for name, values in exact.items()}


def train_adapter_in_float32(model) -> None:
    """Hold a QLoRA adapter in float32, as any other; TRL 1.16 has cast it to bf16, and its frozen `ref` copy not.

    An adapter that is trained further gets the values from before the cast back, so that DPO starts at ln 2.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if parameter.requires_grad and ".default." in name and parameter.dtype == torch.bfloat16:
            reference = parameters.get(name.replace(".default.", ".ref."))
            parameter.data = (parameter if reference is None else reference).detach().to(torch.float32, copy=True)
