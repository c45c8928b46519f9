"""Rows of the field's usual shapes -> TRL's canonical conversational formats, with errors that name the line.

Everything becomes messages, so that one chat template writes every prompt and every answer the same way in SFT,
reward modelling, DPO, evaluation and chat.
"""

from __future__ import annotations

import math
import re
from typing import Any

from rlhf.data.sources import Source
from rlhf.errors import UserError, quote

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")

SFT_SHAPES = "prompt + completion; prompt + chosen; messages; instruction (+ input) + output; question + answer; text"
PREFERENCE_SHAPES = "prompt + chosen + rejected; chosen + rejected (whole dialogues); instruction + chosen + rejected"


class RowError(ValueError):
    """What is wrong with one row; the caller adds the place."""


def sft_rows(source: Source) -> list[dict[str, Any]]:
    """Canonical SFT rows: `{"prompt": messages, "completion": [assistant message]}`, `{"messages": …}` or `{"text": …}`.

    Raises:
        UserError: file and line of the first row that has no known shape, an empty text or wrong roles.
    """
    rows = _each(source, _sft_row)
    first = set(rows[0])
    for index, row in enumerate(rows):
        if set(row) != first:
            raise UserError(
                f"{source.where(index)}: this row becomes {sorted(row)}, the first row {sorted(first)}; use one shape"
            )
    return rows


def preference_rows(source: Source) -> list[dict[str, Any]]:
    """Canonical pairs: `{"prompt": messages, "chosen": [assistant message], "rejected": [assistant message]}`, `margin` kept.

    Raises:
        UserError: file and line of the first row that has no known shape, an empty text, wrong roles, or two equal answers.
    """
    return _each(source, _preference_row)


def join_chosen_rejected(chosen: Source, rejected: Source) -> Source:
    """Join accepted and rejected answers by prompt, in the order of the accepted ones.

    Rows are prompt (or instruction + input) and response (or output, completion, answer). Several answers to one
    prompt are paired in order.

    Raises:
        UserError: an accepted answer without a rejected one for the same prompt, or the other way round.
    """
    waiting: dict[str, list[int]] = {}
    rejected_rows = _each(rejected, _sft_row)
    for index, row in enumerate(rejected_rows):
        waiting.setdefault(repr(row.get("prompt")), []).append(index)
    pairs = []
    for index, row in enumerate(_each(chosen, _sft_row)):
        if "prompt" not in row:
            raise UserError(
                f"{chosen.where(index)}: expected prompt + response, to be joined with the rejected answers"
            )
        matches = waiting.get(repr(row["prompt"]))
        if not matches:
            raise UserError(
                f"{chosen.where(index)}: no answer to this prompt in {rejected.name}; each needs one of both"
            )
        other = rejected_rows[matches.pop(0)]
        pairs.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]})
    left = [index for indices in waiting.values() for index in indices]
    if left:
        raise UserError(
            f"{rejected.where(min(left))}: no answer to this prompt in {chosen.name}; each needs one of both"
        )
    digest = chosen.digest[:32] + rejected.digest[:32]
    return Source(chosen.name, pairs, chosen.lines, digest)


def prompt_key(row: dict[str, Any]) -> str:
    """The prompt's text, for finding the same prompt in two splits."""
    messages = row.get("prompt") or row.get("messages") or row.get("text")
    return repr(messages)


def _each(source: Source, convert) -> list[dict[str, Any]]:
    rows = []
    for index, row in enumerate(source.rows):
        try:
            rows.append(convert(row))
        except RowError as error:
            raise UserError(f"{source.where(index)}: {error}") from None
    return rows


def _sft_row(row: dict) -> dict[str, Any]:
    if _has(row, "messages"):
        messages = _messages(row["messages"], "messages")
        if messages[-1]["role"] != "assistant":
            raise RowError(
                f"'messages' ends with a {messages[-1]['role']} message; the last one must be the assistant's"
            )
        if sum(m["role"] == "assistant" for m in messages) > 1:
            return {"messages": messages}
        if len(messages) == 1:
            raise RowError("the prompt is empty")
        return {"prompt": messages[:-1], "completion": messages[-1:]}
    prompt = _prompt(row)
    answer_key = next((k for k in ("completion", "chosen", "response", "output", "answer") if _has(row, k)), None)
    if prompt is None and answer_key == "chosen" and _has(row, "rejected"):
        pair = _preference_row(row)
        return {"prompt": pair["prompt"], "completion": pair["chosen"]}
    if prompt is not None and answer_key:
        return {"prompt": prompt, "completion": _answer(row[answer_key], answer_key)}
    if _has(row, "text"):
        return {"text": _text(row["text"], "text")}
    raise RowError(f"found columns {_columns(row)}; expected one of: {SFT_SHAPES}")


def _preference_row(row: dict) -> dict[str, Any]:
    if not _has(row, "chosen") or not _has(row, "rejected"):
        raise RowError(f"found columns {_columns(row)}; expected one of: {PREFERENCE_SHAPES}")
    prompt = _prompt(row)
    if prompt is None:
        chosen, rejected = _dialogue(row["chosen"], "chosen"), _dialogue(row["rejected"], "rejected")
        if chosen[:-1] != rejected[:-1]:
            raise RowError(
                "'chosen' and 'rejected' differ before the last answer; expected the same dialogue up to there"
            )
        prompt, answers = chosen[:-1], (chosen[-1:], rejected[-1:])
    else:
        answers = tuple(_answer(row[side], side, prompt) for side in ("chosen", "rejected"))
    if not prompt:
        raise RowError("the prompt is empty")
    if not any(m["role"] == "user" for m in prompt):
        raise RowError("the prompt has no message of the user")
    if answers[0] == answers[1]:
        raise RowError("'chosen' and 'rejected' are the same; a pair without a difference teaches nothing: remove it")
    pair = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    if isinstance(row.get("margin"), (int, float)):
        pair["margin"] = _margin(row["margin"])
    return pair


def _margin(value: float) -> float:
    try:
        margin = float(value)
    except OverflowError:  # an integer of more than 308 digits
        margin = math.inf
    if not math.isfinite(margin):
        raise RowError(f"'margin' is {quote(value)}; expected a finite number")
    return margin


def _prompt(row: dict) -> Messages | None:
    for key in ("prompt", "question"):
        if _has(row, key):
            value = row[key]
            messages = (
                [{"role": "user", "content": _text(value, key)}] if isinstance(value, str) else _messages(value, key)
            )
            if messages[-1]["role"] != "user":
                article = "an" if messages[-1]["role"] == "assistant" else "a"
                raise RowError(
                    f"'{key}' ends with {article} {messages[-1]['role']} message; it must end with the user's"
                )
            return messages
    if _has(row, "instruction"):
        text = _text(row["instruction"], "instruction")
        extra = str(row.get("input") or "").strip()
        return [{"role": "user", "content": f"{text}\n\n{extra}" if extra else text}]
    return None


def _answer(value: Any, key: str, prompt: Messages | None = None) -> Messages:
    if isinstance(value, str):
        return [{"role": "assistant", "content": _text(value, key)}]
    messages = _messages(value, key)
    if prompt and messages[: len(prompt)] == prompt:  # the whole dialogue again, as in UltraFeedback
        messages = messages[len(prompt) :]
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RowError(f"'{key}' has roles {[m['role'] for m in messages]}; expected one assistant message")
    return messages


def _dialogue(value: Any, key: str) -> Messages:
    """A whole dialogue: messages, or a text with `Human:` and `Assistant:` turns (Anthropic's HH-RLHF)."""
    if not isinstance(value, str):
        messages = _messages(value, key)
    else:
        parts = re.split(r"(?:^|\n\n)(Human|Assistant):", value)
        if len(parts) < 5 or parts[0].strip():
            raise RowError(f"there is no 'prompt', and '{key}' is not a dialogue of Human: and Assistant: turns")
        roles = {"Human": "user", "Assistant": "assistant"}
        turns = [{"role": roles[r], "content": t.strip()} for r, t in zip(parts[1::2], parts[2::2], strict=True)]
        messages = _messages(turns, key)
    if messages[-1]["role"] != "assistant":
        raise RowError(f"'{key}' must end with the assistant's answer, found {messages[-1]['role']}")
    return messages


def _messages(value: Any, key: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise RowError(f"'{key}' is {_describe(value)}; expected a text or a list of messages")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise RowError(
                f"'{key}', message {number}: expected {{'role': …, 'content': …}}, found {_describe(message)}"
            )
        if message["role"] not in ROLES:
            raise RowError(f"'{key}', message {number}: role {message['role']!r}; expected one of {', '.join(ROLES)}")
        messages.append({"role": message["role"], "content": _text(message["content"], f"{key}, message {number}")})
    return messages


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"'{key}' is {_describe(value)}; expected a text")
    if not value.strip():
        raise RowError(f"'{key}' is empty")
    return value.strip()


def _has(row: dict, key: str) -> bool:
    return key in row and row[key] is not None


def _columns(row: dict) -> str:
    return ", ".join(map(str, row)) or "none"


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
