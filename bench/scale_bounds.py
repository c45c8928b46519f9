"""How far two runs of one recipe may be apart when only the order of their sums differs, from what is summed.

Suffixes as in the formulas: eps = 2^-23, n pairs (or examples) of a step, t tokens of a row on average, Z = ln(vocabulary),
the magnitude of a log-partition function and of the logits around it.

A log-probability is a difference of two numbers of magnitude Z that have gone through tens of roundings: it is off by
DEPTH eps Z. Errors of tokens are independent, so an answer's sum is off by DEPTH eps Z sqrt(t). (The sum itself is made in
float64; in fp32 it would be off by up to eps/2 of its *magnitude*, t ln V: rlhf/training/precision.py.)

    SFT     loss = mean of n t log-probabilities                      DEPTH eps Z / sqrt(n t)
    reward  loss = mean of n f(score - score), scores of magnitude r  DEPTH eps sqrt(2) max(1, r) / sqrt(n)
    DPO     loss = mean of n f(beta (4 answers' sums)), |f'| <= 1     DEPTH eps beta Z sqrt(4 t) / sqrt(n)

and the loss itself is rounded a few times on its way to the log. A gradient is a sum of n t terms, each a product of
matrices with relative errors of DEPTH eps, and its length sees their mean; DPO's and the reward's have the weights
sigmoid(-margin), which are off by as much as the margins are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

EPS = 2.0**-23
DEPTH = 2.0  # roundings of one log-probability, score or gradient that don't cancel, in units of eps
ROUNDINGS = 4.0  # of a loss: its share of a micro-batch, their sum, the mean over ranks, the log
NOISES = 4.0  # of bf16: a launch and its comparison have each their own, and two controls are few


@dataclass(frozen=True)
class Bound:
    """What a step's loss (absolute) and gradient norm (relative) may differ by."""

    loss: float
    gradient: float


def of_step(stage: str, row: dict[str, Any], examples: int, tokens: int, beta: float, vocabulary: int) -> Bound:
    """The bound of one step.

    Args:
        stage: `sft`, `reward`, or one that starts with `dpo`.
        row: the step's line of metrics.jsonl of the run on one process.
        examples: of the step's batch.
        tokens: of the step, as TRL counts them: of all rows, prompts included.
    """
    z, rows = math.log(vocabulary), examples * (1 if stage == "sft" else 2)
    if stage == "sft":
        noise = DEPTH * EPS * z / math.sqrt(tokens)
        weights = 0.0
    elif stage == "reward":
        largest = max(1.0, abs(row["min_reward"]), abs(row["max_reward"]))
        noise = weights = DEPTH * EPS * math.sqrt(2) * largest / math.sqrt(examples)
    else:
        noise = weights = DEPTH * EPS * beta * z * math.sqrt(4 * tokens / rows) / math.sqrt(examples)
    return Bound(noise + ROUNDINGS * EPS * max(1.0, abs(row["loss"])), weights + DEPTH * ROUNDINGS * EPS)


def of_noise(runs: list[list[dict[str, Any]]]) -> Bound:
    """The bound of every step in bf16: NOISES times what bf16 makes of one process alone, in its worst step.

    Args:
        runs: logged steps of one process in bf16, and of its controls: in fp32, and in bf16 from weights that are off by what
            bf16 rounds away.
    """
    one, *controls = runs
    loss = max(abs(a["loss"] - b["loss"]) for other in controls for a, b in zip(one, other, strict=True))
    gradient = max(
        abs(a["grad_norm"] / b["grad_norm"] - 1) for other in controls for a, b in zip(one, other, strict=True)
    )
    return Bound(NOISES * loss, NOISES * gradient)
