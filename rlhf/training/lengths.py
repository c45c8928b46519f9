"""The effect of max_length: how many answers are cut, pairs become identical, or rows are left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf.config.recipe import Recipe
from rlhf.data.summary import Count
from rlhf.errors import UserError


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
    rows: list[dict[str, Any]], tokenizer, max_length: int | None, stage: str, truncation_mode: str = "keep_start",
    at_most: int | None = None,
) -> CutReport:  # fmt: skip
    """Tokenise canonical rows as TRL does and count the effects of max_length.

    Args:
        rows: canonical rows of `sft`, `reward` or `dpo`; a row's `place` names it.
        max_length: in tokens, of prompt and answer together; None: no limit.
        truncation_mode: TRL's; `keep_end` cuts the start of the prompt first and drops nothing.
        at_most: inspect at most this many rows, evenly spaced (about 800 rows per second on one core).
    """
    step = max(1, -(-len(rows) // at_most)) if at_most else 1
    found: dict[str, list[str]] = {"cut": [], "same": [], "left_out": []}
    looked_at = answers = 0
    for index in range(0, len(rows), step):
        row = rows[index]
        kind, lost = _effect(tokenizer, row, max_length, stage, truncation_mode)
        looked_at += 1
        answers += lost
        for name in kind:
            found[name].append(row.get("place", f"row {index + 1}"))
    counts = {name: Count(len(places), places[0] if places else None) for name, places in found.items()}
    return CutReport(stage, max_length, looked_at, answers=answers, **counts)


def cost(tokenizer, row: dict[str, Any], max_length: int | None, stage: str, padded: bool) -> int:
    """Tokens that a row counts towards max_tokens_per_device: what `count_tokens` gives for its tokenised row."""

    prompt, answers = _tokens(tokenizer, row)
    if len(answers) == 1:
        return count_tokens({"input_ids": [0] * prompt + answers[0]}, max_length, padded)
    start = [0] * prompt
    if stage == "reward":
        rows = {"chosen_ids": start + answers[0], "rejected_ids": start + answers[1]}
    else:
        rows = {"prompt_ids": start, "chosen_ids": answers[0], "rejected_ids": answers[1]}
    return count_tokens(rows, max_length, padded)


def _effect(tokenizer, row: dict, max_length: int | None, stage: str, mode: str) -> tuple[list[str], int]:
    """(which of cut, same and left_out apply to a row, how many of its answers lose tokens)."""
    prompt, answers = _tokens(tokenizer, row)
    longest = prompt + max(map(len, answers))
    limit = max_length or longest
    if longest > limit if stage == "reward" else mode == "keep_start" and prompt >= limit:
        return ["left_out"], 0
    kept = [answer[: limit - prompt] if mode == "keep_start" else answer[-limit:] for answer in answers]
    lost = sum(len(short) < len(answer) for short, answer in zip(kept, answers, strict=True))
    return ["cut"] * (lost > 0) + ["same"] * (len(kept) == 2 and kept[0] == kept[1]), lost


def _tokens(tokenizer, row: dict) -> tuple[int, list[list[int]]]:
    """(number of prompt tokens, token ids of each answer); a dialogue or a text is an answer without a prompt."""
    from trl.data_utils import common_prefix_length

    from rlhf.models.tokenizer import render, tokenize_pair

    if "chosen" in row:
        ids = tokenize_pair(tokenizer, row)
        return len(ids["prompt_ids"]), [ids["chosen_ids"], ids["rejected_ids"]]
    if "prompt" in row:
        both = render(tokenizer, row, row["prompt"] + row["completion"])
        cut = common_prefix_length(render(tokenizer, row, row["prompt"], add_generation_prompt=True), both)
        return cut, [both[cut:]]
    if "messages" in row:
        return 0, [render(tokenizer, row, row["messages"])]
    text = row["text"]
    return 0, [tokenizer(text=text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token)["input_ids"]]


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


def count_tokens(row: dict[str, list[int]], max_length: int | None, padded: bool) -> int:
    """Tokens that an example takes: packed with a shared prompt; padded, its longest row (twice for a pair)."""
    cut = lambda n: n if max_length is None else min(n, max_length)  # noqa: E731
    if "input_ids" in row:
        return cut(len(row["input_ids"]))
    prompt = len(row.get("prompt_ids", []))
    chosen, rejected = cut(prompt + len(row["chosen_ids"])), cut(prompt + len(row["rejected_ids"]))
    if padded:
        return 2 * max(chosen, rejected)
    if not prompt:  # reward models: the common prefix of both rows
        pairs = enumerate(zip(row["chosen_ids"], row["rejected_ids"], strict=False))
        prompt = next((i for i, (a, b) in pairs if a != b), min(chosen, rejected))
    return chosen + rejected - min(prompt, chosen, rejected)


def too_long(recipe: Recipe, place: str, tokens: int, most: int) -> UserError:
    """The error for a single example that exceeds max_tokens_per_device."""
    return UserError(
        f"{recipe.where('max_tokens_per_device')}: the longest example, {place}, takes {tokens} tokens, more than "
        f"max_tokens_per_device={most}; raise it to {tokens}, lower max_length, or remove the example"
    )
