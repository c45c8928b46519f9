"""What each round has reached, when rounds stop, and the table of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.files import read_json


@dataclass(frozen=True)
class Result:
    """What a round has reached on the held-out prompts.

    Attributes:
        policy: its folder.
        pairs: labelled in this round; None in round 1, whose pairs are dpo.yaml's data.
        share, low, high: the win rate against the SFT model with its 95% interval.
        words, sft_words: of an answer, mean.
        reward: of an answer, mean; None if no reward model judges.
        chosen_loss: per token of the held-out chosen answers, nats.
    """

    round: int
    policy: str
    pairs: int | None
    share: float
    low: float
    high: float
    words: float
    sft_words: float
    reward: float | None
    chosen_loss: float | None

    def record(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_result(number: int, evaluation: Path, policy: str, pairs: Path) -> Result:
    """The result of a round from the folder of its complete evaluation.

    Raises:
        UserError: there is no win rate in it.
    """
    found: Any = read_json(evaluation / "results.json") or {}
    labelled: Any = read_json(pairs.with_name(f"{pairs.name}.provenance.json")) if number > 1 else None
    try:
        rate = found["win_rate"]
        return Result(
            number, policy, labelled["summary"]["pairs"] if labelled else None, rate["share"], rate["low"], rate["high"],
            rate["dpo_mean_words"], rate["sft_mean_words"], rate.get("dpo_mean_reward"),
            (found.get("policies") or {}).get("dpo", {}).get("chosen_loss"),
        )  # fmt: skip
    except (KeyError, TypeError):
        raise UserError(
            f"{evaluation / 'results.json'} has no win rate of the policy against the SFT model, or is damaged; evaluate.yaml needs "
            "sft_model, dpo_model and reward_model"
        ) from None


def why_stop(results: list[Result], num_rounds: int, min_gain: float) -> str:
    """Why no further round follows these; '' if one does.

    Example: win rates 0.56, 0.61, 0.60 with min_gain 0 -> "the win rate no longer rises: 60.0% after 61.0%".
    """
    for before, after in zip(results, results[1:], strict=False):
        if after.share - before.share <= min_gain:
            least = f" (min_gain is {min_gain:g})" if min_gain else ""
            return f"the win rate no longer rises: {after.share:.1%} in round {after.round} after {before.share:.1%}{least}"
    return f"all {num_rounds} rounds are done" if len(results) >= num_rounds else ""


def best(results: list[Result]) -> Result:
    """The round with the highest win rate, the first of equal ones."""
    return max(results, key=lambda result: (result.share, -result.round))


def table(results: list[Result]) -> list[str]:
    """Lines for the screen, one per round."""
    lines = ["  round     pairs   win rate against SFT      words (SFT)      reward   chosen loss"]
    for r in results:
        pairs = f"{r.pairs:,}" if r.pairs is not None else "given"
        reward = f"{r.reward:+.3f}" if r.reward is not None and math.isfinite(r.reward) else "-"
        loss = f"{r.chosen_loss:.3f}" if r.chosen_loss is not None else "-"
        rate = f"{r.share:.1%} [{r.low:.1%}, {r.high:.1%}]"
        lines.append(
            f"  {r.round:<6} {pairs:>8}   {rate:<23}  {f'{r.words:.0f} ({r.sft_words:.0f})':>12}  {reward:>10}  {loss:>12}"
        )
    return lines
