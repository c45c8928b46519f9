"""The check of DPO's start: before its first update the policy *is* the reference, up to numerical noise.

How large that noise is depends on dtype, model and length of the answers, so it is measured: log-probabilities of the
same answers in two batch shapes. All values are in nats (log-probability per answer); beta and the slope of the loss
convert them to rewards and losses. A wrong reference is off by several nats: SmolLM2-135M in NF4 by 5, while bf16's
noise is below one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlhf.distributed.processes import say
from rlhf.errors import UserError
from rlhf.models.precision import compute_dtype
from rlhf.packing.collate import KEY

if TYPE_CHECKING:
    from trl import DPOConfig, DPOTrainer

    from rlhf.training.trainer import GlobalBatches

    class CheckedTrainer(GlobalBatches, DPOTrainer):
        """What is checked: TRL's trainer on global batches."""

        args: DPOConfig


PAIRS = 8  # at most this many pairs of the first micro-batch
FLOOR_NATS = 0.02  # harmless in any dtype: a reward of 2e-3 at beta 0.1
NOISES = 6  # allowed multiple of the measured noise: a sample of two answers may show only a fifth of it by chance


@dataclass(frozen=True)
class Start:
    """The measurements before the first update, the same on all ranks.

    Attributes:
        loss: of the first micro-batches.
        expected_loss: its value if policy and reference are equal; None if that is not a constant.
        loss_slope: maximum change of the loss if every answer's log-probability is off by one nat.
        off_nats: policy minus reference, root mean square over answers.
        noise_nats: the same answers in two batch shapes, root mean square of the difference.
        dtype: compute dtype of the model.
        num_tokens: per answer, on average.
    """

    loss: float
    expected_loss: float | None
    loss_slope: float
    off_nats: float
    noise_nats: float
    dtype: torch.dtype
    num_tokens: float

    @property
    def allowed_nats(self) -> float:
        """NOISES times the measured noise, or times the noise of one rounding per token if that is larger."""
        rounding = torch.finfo(self.dtype).eps * math.sqrt(self.num_tokens)
        return max(FLOOR_NATS, NOISES * max(self.noise_nats, rounding))

    @property
    def allowed_loss(self) -> float:
        return 1e-4 * max(1.0, abs(self.expected_loss or 0.0)) + self.loss_slope * self.allowed_nats

    def __str__(self) -> str:
        expected = "" if self.expected_loss is None else f" (at its reference: {self.expected_loss:.4f})"
        return (
            f"policy and reference differ by {self.off_nats:.2g} nats per answer, allowed {self.allowed_nats:.2g} "
            f"(noise of {str(self.dtype).removeprefix('torch.')}: {self.noise_nats:.2g}); "
            f"loss {self.loss:.4f}{expected}"
        )


def check_start(trainer: CheckedTrainer, model, inputs) -> Start:
    """Compare policy and reference on the first micro-batch. A collective: all ranks run the same forward passes.

    Args:
        trainer: a DPOTrainer with GlobalBatches, before its first step.
        model, inputs: the arguments of its `training_step`; inputs are a batch, or `micro_batches`.

    Raises:
        UserError: they are different models.
    """
    part = inputs.get("micro_batches", [{"batch": inputs, "examples": 1}])[0]
    batch = trainer._prepare_inputs(dict(part["batch"]))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        with trainer.compute_loss_context_manager(), trainer._step_metrics("eval") as note:
            loss = trainer.compute_loss(model, batch)
            note(part)
        trainer._metrics["eval"].clear()
        batch.pop(KEY, None)  # the layout of all pairs of the batch; what follows takes some
        off, noise = compare_logps(trainer, model, batch)
    model.train(was_training)
    tokens = batch["completion_mask"].sum() / batch["completion_mask"].shape[0]
    sums = torch.stack([loss.float().reshape(()), off.square().mean(), noise.square().mean(), tokens.float()])
    loss, off, noise, tokens = trainer.accelerator.gather(sums[None]).double().mean(dim=0).tolist()
    expected, slope = expected_loss(trainer)
    dtype = compute_dtype(model, trainer.accelerator.mixed_precision)
    start = Start(loss, expected, slope, math.sqrt(off), math.sqrt(noise), dtype, tokens)
    say(f"  start    {start}")
    refuse_wrong_start(start)
    return start


def refuse_wrong_start(start: Start) -> None:
    """Raise unless DPO starts from its reference: log-ratios of 0 and, where it is known, the loss expected for them.

    Raises:
        UserError: with the measurements and the likely causes.
    """
    wrong_loss = start.expected_loss is not None and not abs(start.loss - start.expected_loss) <= start.allowed_loss
    if wrong_loss or not math.isfinite(start.loss) or not start.off_nats <= start.allowed_nats:
        raise UserError(
            f"DPO does not start from its reference: before the first update {start}. The policy and the reference are "
            "different models: the reference log-probabilities come from another model, adapter, precision or template "
            "than the policy. Nothing was trained"
        )


# --- log-probabilities -----------------------------------------------------------------------------------------------


def compare_logps(trainer: CheckedTrainer, model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(policy minus reference, policy minus itself in another batch shape), per answer, in nats."""
    small = first_pairs(batch, PAIRS)
    policy = policy_logps(trainer, model, small)
    if trainer.precompute_ref_logps:
        reference = torch.stack([small["ref_chosen_logps"], small["ref_rejected_logps"]])
    else:
        reference = torch.stack(trainer.compute_ref_log_probs(trainer.ref_model or model, small))
    other = other_shape(small)
    again = policy_logps(trainer, model, other).flip(0)  # chosen and rejected are swapped
    shared = min(again.shape[1], policy.shape[1])
    return (policy - reference).float(), (again[:, :shared] - policy[:, :shared]).float()


def policy_logps(trainer: CheckedTrainer, model, batch) -> torch.Tensor:
    """(2, pairs): chosen and rejected, from TRL's reference pass with the policy in place of the reference."""
    with policy_as_reference(trainer, model):
        return torch.stack(trainer.compute_ref_log_probs(model, batch))


@contextlib.contextmanager
def policy_as_reference(trainer: CheckedTrainer, model) -> Iterator[None]:
    """Set the policy as `ref_model`: without one, TRL disables the adapter for a reference pass."""
    before, trainer.ref_model = trainer.ref_model, model
    try:
        yield
    finally:
        trainer.ref_model = before


def first_pairs(batch: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The first pairs of a batch of [chosen rows, rejected rows]."""
    pairs = batch["input_ids"].shape[0] // 2
    return {
        name: x[:count] if len(x) == pairs else torch.cat([h[:count] for h in x.chunk(2)]) for name, x in batch.items()
    }


def other_shape(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first half of the pairs (a single pair twice), chosen and rejected swapped: other matrix shapes and order."""
    pairs = batch["input_ids"].shape[0] // 2
    half = first_pairs({k: v for k, v in batch.items() if not k.startswith("ref_")}, max(1, pairs // 2))
    times = 2 if pairs == 1 else 1
    return {
        name: torch.cat([*[side] * times, *[other] * times]) for name, x in half.items() for other, side in [x.chunk(2)]
    }


# --- losses ----------------------------------------------------------------------------------------------------------


def expected_loss(trainer: CheckedTrainer) -> tuple[float | None, float]:
    """The loss if all log-ratios are 0, and its maximum change if each answer's log-ratio is off by one nat.

    None for losses that depend on more than log-ratios: the SFT loss, WPO's weights, the experts' load-balancing loss.
    """
    if trainer.use_weighting or trainer.aux_loss_enabled or "sft" in trainer.loss_types:
        return None, 0.0
    known = starts(trainer.beta, trainer.label_smoothing, trainer.args.discopop_tau)
    if set(trainer.loss_types) - known.keys():
        return None, 0.0
    parts = [(weight, *known[kind]) for kind, weight in zip(trainer.loss_types, trainer.loss_weights, strict=True)]
    return sum(w * value for w, value, _ in parts), sum(abs(w) * slope for w, _, slope in parts)


def starts(beta: float, smoothing: float, tau: float) -> dict[str, tuple[float, float]]:
    """For each of TRL's losses its value at log-ratios of 0, and the sum of |d loss / d log-ratio| over both answers.

    Losses of per-token means (ipo, sigmoid_norm) are evaluated for answers of one token, where they are steepest.
    """
    ln2 = math.log(2)
    found = {
        "sigmoid": (ln2, beta), "hinge": (1.0, 2 * beta), "ipo": (1 / (4 * beta**2), 2 / beta),
        "nca_pair": (2 * ln2, beta / 2), "bco_pair": (2 * ln2, beta), "sppo_hard": (0.5 / beta**2, 2 / beta),
        "aot": (ln2, beta), "aot_unpaired": (ln2, beta), "apo_zero": (1.0, beta / 2), "apo_down": (1.0, beta / 2),
        "discopop": (ln2 / 2 + 0.5, 2 * beta * (0.75 + (1 - ln2) / (4 * tau))), "sigmoid_norm": (ln2, beta),
    }  # fmt: skip
    if smoothing != 0.5:
        found["robust"] = (ln2, beta / abs(1 - 2 * smoothing))
    if 0 < smoothing < 1:
        log_odds = math.log((1 - smoothing) / smoothing)
        found["exo_pair"] = (-ln2 - (math.log(1 - smoothing) + math.log(smoothing)) / 2, beta * abs(log_odds) / 2)
    return found
