"""What is kept of a run's metrics to find symptoms in, and what was reported already."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Row = dict[str, Any]
WINDOW = (
    10  # logs whose mean stands for a training metric: 10 batches of 8 pairs have a standard error of 0.06 in accuracy
)
LATER = 20  # the last logs that are kept
WORSE = 2.0  # a symptom is reported again when its size has grown by this factor


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters that the symptoms depend on.

    Attributes:
        stage: `sft`, `reward` or `dpo`.
        learning_rate: the highest of the schedule.
        beta: DPO's; 1 otherwise.
        total_steps: of the run.
        heldout: number of held-out pairs; 0: unknown.
        log_two: the loss starts at ln 2 (DPO's sigmoid loss without label smoothing; reward models).
    """

    stage: str
    learning_rate: float
    beta: float = 1.0
    total_steps: int = 0
    heldout: int = 0
    log_two: bool = True


class Finding(NamedTuple):
    """One symptom.

    Attributes:
        key: its name, a heading of docs/tuning.md.
        step: of the last log that shows it.
        sentence: what was seen and what it means.
        turn: which keys to turn, and how.
        size: how bad it is; reported again when it has grown by `WORSE`.
    """

    key: str
    step: int
    sentence: str
    turn: tuple[str, ...]
    size: float


@dataclass
class History:
    """What the symptoms need of all logs: the first and the last ones of training, and all evaluations."""

    first: list[Row] = field(default_factory=list)
    last: list[Row] = field(default_factory=list)
    heldout: list[Row] = field(default_factory=list)
    top_rate_since: int | None = None  # the step from which the learning rate has been at half its highest or more

    def add(self, row: Row, settings: Settings) -> bool:
        """Take a log in; returns whether it holds metrics. `row` has its `step`; what is not a finite number counts as missing."""
        row = {k: v for k, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        if "eval_loss" in row:
            self.heldout.append(row)
        elif "loss" in row:
            if len(self.first) < WINDOW:
                self.first.append(row)
            self.last = [*self.last, row][-LATER:]
            rate = row.get("learning_rate")
            if self.top_rate_since is None and rate is not None and rate >= settings.learning_rate / 2:
                self.top_rate_since = row["step"]
        else:
            return False
        return True

    @property
    def step(self) -> int:
        return max([0, *(rows[-1]["step"] for rows in (self.last, self.heldout) if rows)])

    def smoothed(self, metric: str) -> float | None:
        """The mean of the last `WINDOW` training logs; None if there are fewer."""
        values = [row[metric] for row in self.last[-WINDOW:] if metric in row]
        return sum(values) / WINDOW if len(values) == WINDOW else None


class Teller:
    """Remembers what was reported: each symptom once, and again when it has become `WORSE` times as bad.

    Args:
        told: findings of a run that resumes: key -> size.
    """

    def __init__(self, told: dict[str, float] | None = None):
        self.told = dict(told or {})

    def news(self, found: Sequence[Finding]) -> list[Finding]:
        """Those of `found` that are to be reported now."""
        new = [f for f in found if f.key not in self.told or f.size >= WORSE * self.told[f.key]]
        self.told |= {f.key: f.size for f in new}
        return new
