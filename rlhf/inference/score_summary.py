"""What a person wants to know of many scores, gathered row by row in constant memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from rlhf.runs.intervals import wilson_interval

GROUPS = ("subset", "task")  # columns by whose values accuracy is shown
MOST_GROUPS = 100


@dataclass
class Spread:
    """Mean, standard deviation and range of numbers (Welford's sums)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    least: float = math.inf
    most: float = -math.inf

    def add(self, value: float) -> None:
        self.count += 1
        before = value - self.mean
        self.mean += before / self.count
        self.squares += before * (value - self.mean)
        self.least, self.most = min(self.least, value), max(self.most, value)

    @property
    def sd(self) -> float:
        """With n - 1; 0 of one number."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def record(self) -> dict[str, Any]:
        if not self.count:
            return {"count": 0}
        return {"count": self.count, "mean": self.mean, "sd": self.sd, "min": self.least, "max": self.most}


@dataclass
class Wins:
    """Pairs whose chosen answer has the higher score; ties count as half."""

    count: int = 0
    won: int = 0
    ties: int = 0

    def add(self, margin: float) -> None:
        self.count += 1
        self.won += margin > 0
        self.ties += margin == 0

    def record(self) -> dict[str, Any]:
        if not self.count:
            return {"count": 0}
        wins = self.won + self.ties / 2
        low, high = wilson_interval(wins, self.count)
        return {"accuracy": wins / self.count, "low": low, "high": high, "count": self.count, "ties": self.ties}


@dataclass
class Summary:
    """Of all rows of a file.

    Attributes:
        scores: by part (`chosen`, `rejected`, `completion` or `messages`).
        unscored: rows without a score, since they have more tokens than the model has positions.
        groups: pairs by column and value, of the columns GROUPS.
    """

    scores: dict[str, Spread] = field(default_factory=dict)
    unscored: int = 0
    rows: int = 0
    margins: Spread = field(default_factory=Spread)
    wins: Wins = field(default_factory=Wins)
    groups: dict[str, dict[str, Wins]] = field(default_factory=dict)

    def add(self, parts: tuple[str, ...], scores: list[float] | None, kept: dict[str, Any]) -> None:
        self.rows += 1
        if scores is None:
            self.unscored += 1
            return
        for part, value in zip(parts, scores, strict=True):
            self.scores.setdefault(part, Spread()).add(value)
        if len(scores) < 2:
            return
        margin = scores[0] - scores[1]
        self.margins.add(margin)
        self.wins.add(margin)
        for column in GROUPS:
            if column in kept:
                values = self.groups.setdefault(column, {})
                name = str(kept[column])
                if name in values or len(values) <= MOST_GROUPS:  # one more shows that there are too many
                    values.setdefault(name, Wins()).add(margin)

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = {"rows": self.rows, "unscored": self.unscored}
        found["scores"] = {part: spread.record() for part, spread in self.scores.items()}
        if self.wins.count:
            found["pairs"] = self.wins.record() | {"margin": self.margins.record()}
        shown = {column: values for column, values in self.groups.items() if len(values) <= MOST_GROUPS}
        found["groups"] = {c: {name: wins.record() for name, wins in values.items()} for c, values in shown.items()}
        return found


def lines(record: dict[str, Any]) -> list[str]:
    """A summary's record, for the screen."""
    if not record["scores"]:
        return ["  no row has a score"]
    names = {
        "chosen": "chosen answers",
        "rejected": "rejected answers",
        "completion": "answers",
        "messages": "dialogues",
    }
    wide = max((len(names[part]) for part in record["scores"]), default=0)
    found = [f"  {'':<{wide}}   {'scored':>9} {'mean':>9} {'sd':>9} {'min':>9} {'max':>9}"]
    for part, spread in record["scores"].items():
        numbers = " ".join(
            f"{spread[key]:>+9.3f}" if key != "sd" else f"{spread[key]:>9.3f}" for key in ("mean", "sd", "min", "max")
        )
        found.append(f"  {names[part]:<{wide}}   {spread['count']:>9,} {numbers}")
    if pairs := record.get("pairs"):
        found += [
            "",
            f"  accuracy      {_accuracy(pairs)}",
            f"  mean margin   {pairs['margin']['mean']:+.3f} (sd {pairs['margin']['sd']:.3f})",
        ]
    for column, values in record["groups"].items():
        found += ["", f"  accuracy by {column}"]
        wide = max(len(_short(name)) for name in values)
        found += [f"  {_short(name):<{wide}}   {_accuracy(value)}" for name, value in sorted(values.items())]
    return found


def _accuracy(wins: dict[str, Any]) -> str:
    ties = f", {wins['ties']:,} ties" if wins["ties"] > 1 else ", 1 tie" if wins["ties"] else ""
    pairs = "1 pair" if wins["count"] == 1 else f"{wins['count']:,} pairs"
    return f"{wins['accuracy']:6.1%}   (95%: {wins['low']:.0%} to {wins['high']:.0%}; {pairs}{ties})"


def _short(name: str) -> str:
    from rlhf.errors import one_line

    return one_line(name, 40)
