"""The effect of max_length: how many answers are cut, pairs become identical, or rows are left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.config.recipe import Recipe
from rlhf.data.summary import Count
from rlhf.errors import UserError
from rlhf.training.tokenise import Counts, Settings, Tokenise

if TYPE_CHECKING:
    from rlhf.training.stage import Plan

BATCH_ROWS = 500


@dataclass(frozen=True)
class CutReport:
    """What TRL 1.16 will do to these rows at this max_length.

    Attributes:
        rows: how many rows were inspected.
        cut: rows with an answer that loses tokens (a reward model's rows are never cut).
        answers: how many answers lose tokens: up to two per pair.
        same: pairs without a training signal: both answers have the same tokens, once cut or formatted by the template.
        left_out: rows that TRL drops: the prompt alone fills max_length (SFT, DPO), or one side is longer (reward).
    """

    stage: str
    max_length: int | None
    rows: int
    cut: Count
    answers: int
    same: Count
    left_out: Count


def answers_cut(
    rows: Sequence[dict[str, Any]], tokenizer, settings: Settings, at_most: int | None = None
) -> tuple[CutReport, Counts]:
    """Tokenise canonical rows and count the effects of max_length.

    Args:
        rows: canonical rows; a row's `place` names it.
        at_most: inspect at most this many rows, evenly spaced.
    """
    step = max(1, -(-len(rows) // at_most)) if at_most else 1
    chosen = range(0, len(rows), step)
    tokenise, counts = Tokenise(tokenizer, settings), Counts()
    for start in range(0, len(chosen), BATCH_ROWS):
        tokenise([rows[i] for i in chosen[start : start + BATCH_ROWS]], start, counts)
    return cut_report(
        counts, settings, lambda number: rows[chosen[number]].get("place", f"row {chosen[number] + 1}")
    ), counts


def cut_report(counts: Counts, settings: Settings, place: Callable[[int], str]) -> CutReport:
    """The report of these counts; `place` names a row by its number."""
    count = lambda pair: Count(pair[0], place(pair[1])) if pair[0] else Count()  # noqa: E731
    return CutReport(
        settings.stage, settings.max_length, counts.rows, cut=count(counts.cut), answers=counts.answers, same=count(counts.same),
        left_out=count(counts.left_out),
    )  # fmt: skip


def cost(tokenizer, rows: list[dict[str, Any]], settings: Settings) -> Counts:
    """The counts of rows, `longest` and `longest_padded` of what counts towards max_tokens_per_device among them."""
    counts = Counts()
    Tokenise(tokenizer, dataclasses.replace(settings, too_long=settings.too_long.replace("error", "drop")))(
        rows, 0, counts
    )
    return counts


def line(report: CutReport) -> str:
    """The report for the screen; '' if max_length has no effect.

    Example: "max_length=512: cuts 40 answers in 31 of 1,000 pairs (first: a.jsonl:7); 7 of 1,000 pairs have the same
    tokens for chosen and rejected (first: a.jsonl:9); 2 of 1,000 pairs are left out, since the prompt alone fills it (first: a.jsonl:4)".
    """
    kind = "rows" if report.stage == "sft" else "pairs"
    first = lambda count: f" (first: {count.first})"  # noqa: E731
    parts = []
    if report.cut.rows:
        parts.append(
            f"cuts {report.answers:,} answers in {report.cut.rows:,} of {report.rows:,} {kind}{first(report.cut)}"
        )
    if report.same.rows:
        parts.append(
            f"{report.same.rows:,} of {report.rows:,} {kind} have the same tokens for chosen and rejected{first(report.same)}"
        )
    if report.left_out.rows:
        why = "one side is longer" if report.stage == "reward" else "the prompt alone fills it"
        parts.append(
            f"{report.left_out.rows:,} of {report.rows:,} {kind} are left out, since {why}{first(report.left_out)}"
        )
    return f"max_length={report.max_length}: {'; '.join(parts)}" if parts else ""


def longest_row(plan: Plan, *counted: Counts) -> int:
    """Tokens of the longest row among counted examples; a row is never longer than max_length."""
    rows = 1 if plan.recipe.stage == "sft" else 2  # of an example in a padded batch
    return max(counts.longest_padded[0] for counts in counted) // rows


def too_long(recipe: Recipe, place: str, tokens: int, most: int) -> UserError:
    """The error for a single example that exceeds max_tokens_per_device."""
    return UserError(
        f"{recipe.where('max_tokens_per_device')}: the longest example, {place}, takes {tokens} tokens, more than "
        f"max_tokens_per_device={most}; raise it to {tokens}, lower max_length, or remove the example"
    )
