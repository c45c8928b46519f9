"""RewardBench 1 and 2 from files: read and checked before a model loads, scored, and put together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.messages import Messages, RowError, messages
from rlhf.data.sources import Source, load_source
from rlhf.errors import UserError
from rlhf.evaluation.reward_bench import TIES, Item, best_of_n, score_1, score_2, strictly_right, ties_prompts

EXPECTED = (
    "expected the columns of RewardBench (prompt, chosen, rejected, subset) or of RewardBench 2 (prompt, chosen and rejected "
    "as lists, subset, and id for Ties)"
)


@dataclass(frozen=True)
class Question:
    """A prompt of a benchmark and its answers.

    Attributes:
        right, wrong: texts of the right and of the wrong answers; version 1 has one of each.
    """

    subset: str
    id: str
    prompt: Messages
    right: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        return (*self.right, *self.wrong)

    def scored(self, scores: list[float]) -> Item:
        """With a score for each of `answers`, in their order."""
        return Item(self.subset, self.id, tuple(scores[: len(self.right)]), tuple(scores[len(self.right) :]))


@dataclass(frozen=True)
class Benchmark:
    """The questions of a file.

    Attributes:
        name: as it was given.
        version: 1 (pairs) or 2 (lists).
        digest: of the file.
    """

    name: str
    version: int
    digest: str
    questions: list[Question]

    def results(self, scores: list[list[float]]) -> dict[str, Any]:
        """Subsets, sections and average (reward_bench.py) of scores, a list for each question."""
        items = [question.scored(own) for question, own in zip(self.questions, scores, strict=True)]
        return {"name": self.name, **(score_1(items) if self.version == 1 else score_2(items))}

    def lines(self, scores: list[list[float]]) -> Iterable[dict[str, Any]]:
        """Per question its scores and what it counts, as JSON values; of Ties, whose score is one of all prompts, None."""
        for question, own in zip(self.questions, scores, strict=True):
            item = question.scored(own)
            counts = strictly_right(item) if self.version == 1 else best_of_n(item)
            yield {
                "benchmark": self.name, "subset": item.subset, "id": item.id, "chosen": list(item.right),
                "rejected": list(item.wrong), "counts": None if _is_ties(item.subset) and self.version == 2 else counts,
            }  # fmt: skip


def version_of(row: dict[str, Any]) -> int | None:
    """1 or 2 for a row of RewardBench 1 or 2; None for any other."""
    if not isinstance(row.get("subset"), str) or not isinstance(row.get("prompt"), (str, list)):
        return None
    answers = row.get("chosen"), row.get("rejected")
    if all(isinstance(answer, str) for answer in answers):
        return 1
    if all(isinstance(a, list) and a and all(isinstance(text, str) for text in a) for a in answers):
        return 2
    return None


def read_benchmark(name: str, where: str = "") -> Benchmark:
    """Read a benchmark: a Parquet, JSON Lines, JSON or CSV file, a folder of them, or an id on the hub.

    Args:
        where: where it was named (`recipe:line`), for messages.

    Raises:
        UserError: no such file; a row that is none of a benchmark, with its place.
    """
    source = _load(name, where)
    version, questions = 0, []
    for number, (row, _) in enumerate(source.stream(), 1):
        found = version_of(row)
        version = version or found or 0
        try:
            if found is None:
                raise RowError(f"found {', '.join(map(str, row)) or 'no columns'}; {EXPECTED}")
            if found != version:
                raise RowError(
                    f"this is a row of RewardBench {found}, but the first row is one of RewardBench {version}"
                )
            questions.append(_question(row, number, version))
        except RowError as error:
            raise UserError(f"{where + ': ' if where else ''}{source.where(number - 1)}: {error}") from None
    return Benchmark(name, version, source.digest, questions)


def _load(name: str, where: str) -> Source:
    """The split that is scored: `filtered` of RewardBench (its `raw` has pairs that nobody checked), `test` of version 2."""
    is_on_hub = not Path(name).expanduser().exists() and name.count("/") == 1
    return load_source(name, None, None, where, "test" if is_on_hub and name.endswith("-2") else "filtered")


def _question(row: dict[str, Any], number: int, version: int) -> Question:
    if isinstance(row["prompt"], str):
        prompt = [{"role": "user", "content": row["prompt"]}]
    else:
        prompt = messages(row["prompt"], "prompt")
    right, wrong = ((row["chosen"],), (row["rejected"],)) if version == 1 else (row["chosen"], row["rejected"])
    subset = row["subset"].strip()
    key = str(row["id"]) if row.get("id") is not None else str(number)
    if version == 2:
        if _is_ties(subset):
            _check_ties(key)
        elif len(right) != 1:
            raise RowError(f"'chosen' has {len(right)} answers; expected one, since the subset is {subset}, not Ties")
        expected = row.get("num_correct")
        if isinstance(expected, (int, float)) and math.isfinite(expected) and int(expected) != len(right):
            raise RowError(f"'num_correct' is {int(expected)}, but 'chosen' has {len(right)} answers")
    return Question(subset, key, prompt, tuple(right), tuple(wrong))


def _check_ties(key: str) -> None:
    try:
        ties_prompts([Item(TIES, key, (1.0,), (0.0,))])
    except ValueError as error:
        raise RowError(str(error)) from None


def _is_ties(subset: str) -> bool:
    return subset.lower() == TIES
