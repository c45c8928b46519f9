"""Columns besides prompt and answers: used (system, history, margin), rejected by name, or listed as unused."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from rlhf.data.messages import Messages, RowError, describe, has, is_empty, reject_unsupported, text

SYSTEM = ("system", "system_prompt")
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
_SCORE_NAMES = frozenset(name for names in SCORES for name in names)
_KNOWN_FIELDS = {"role", "content", "weight", "train", "training"}

# Unsupported formats, by columns that only they have, and how to convert them.
FORMATS = {
    ("conversations",): (
        "a ShareGPT row: rename 'conversations' to 'messages', 'from' to 'role' (human: user, gpt: assistant) and 'value' to "
        "'content'"
    ),
    (
        "prompt",
        "completion",
        "label",
    ): "a KTO row, with one answer and its label; pair the good answers with the bad ones",
    ("response_0", "response_1"): "a row with two responses: name the better one 'chosen' and the other 'rejected'",
    (
        "response_j",
        "response_k",
    ): "a row with two responses: rename 'response_j' to 'chosen' and 'response_k' to 'rejected'",
    (
        "human_ref_A",
        "human_ref_B",
    ): "an SHP row: name the better of human_ref_A and human_ref_B 'chosen', 'history' 'prompt'",
    ("preferred_output", "non_preferred_output"): (
        "an OpenAI preference row: use input's messages as 'prompt', and name the outputs 'chosen' and 'rejected'"
    ),
}


def format_hint(row: dict) -> str:
    """The unsupported format that a row looks like, and how to convert it; '' if none."""
    return next((f"; this looks like {hint}" for keys, hint in FORMATS.items() if set(keys) <= set(row)), "")


def reject_columns(row: dict) -> None:
    """Raise RowError for columns that change the meaning of the row but would be ignored."""
    reject_unsupported(row)
    for key in ("train", "training"):
        if is_false(row.get(key)):
            raise RowError(f"'{key}' is false, but every row is trained; remove the row")


def is_false(value: Any) -> bool:
    """Whether a value is false in JSON or Parquet, or `false` in CSV."""
    return value is False or isinstance(value, str) and value.strip().lower() == "false"


def add_context(row: dict, used: set[str], prompt: Messages) -> Messages:
    """The prompt with the system message of `system` or `system_prompt` and the turns of `history` prepended."""
    return add_system(row, used, history(row, used, prompt) + prompt)


def add_system(row: dict, used: set[str], messages: Messages) -> Messages:
    found = None
    for key in SYSTEM:
        if not has(row, key) or is_empty(row[key]):
            continue
        used.add(key)
        content = text(row[key], key)
        present = messages[0]["content"] if messages[0]["role"] == "system" else found
        if present is not None and present != content:
            raise RowError(
                f"'{key}' ({content[:40]!r}) differs from the other system message ({present[:40]!r}); keep one"
            )
        if messages[0]["role"] != "system":
            found = content
    return messages if found is None else [{"role": "system", "content": found}, *messages]


def history(row: dict, used: set[str], prompt: Messages | None) -> Messages:
    """LLaMA-Factory's `history`: earlier turns as [user, assistant] pairs. With `prompt` None, none are allowed."""
    if "history" not in row or is_empty(row["history"]):
        return []
    used.add("history")
    if prompt is None or len(prompt) > 1:
        raise RowError("'history' is set, but the dialogue's earlier turns are in its messages; remove one of the two")
    value, turns = row["history"], []
    if not isinstance(value, list):
        raise RowError(f"'history' is {describe(value)}; expected a list of [user, assistant] pairs")
    for number, pair in enumerate(value, 1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError(f"'history', turn {number} is {describe(pair)}; expected [user, assistant]")
        for role, content in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": text(content, f"history, turn {number}")})
    return turns


def margin(row: dict, used: set[str]) -> float | None:
    """By how much chosen is better, as a finite number; None if the row has no margin."""
    value = row.get("margin")
    if value is None or value == "":
        return None
    used.add("margin")
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not math.isfinite(number):
        raise RowError(f"'margin' is {describe(value)}; expected a finite number")
    return number


def scores(row: dict) -> tuple[float, float] | None:
    """The scores of (chosen, rejected); None unless the row has both."""
    if _SCORE_NAMES.isdisjoint(row):
        return None
    for names in SCORES:
        chosen, rejected = (row.get(name) for name in names)
        if _is_number(chosen) and _is_number(rejected):
            return chosen, rejected
    return None


def unused(row: dict, used: set[str]) -> set[str]:
    """Columns and message fields that are not empty and not used."""
    checked = _SCORE_NAMES if scores(row) else frozenset()
    found = {str(key) for key in row.keys() - used - checked if not is_empty(row[key])}
    for key in used & row.keys():
        for message in row[key] if isinstance(row[key], list) else ():
            if isinstance(message, dict) and not message.keys() <= _KNOWN_FIELDS:
                found |= {f"{key}[].{k}" for k in message.keys() - _KNOWN_FIELDS if not is_empty(message[k])}
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
