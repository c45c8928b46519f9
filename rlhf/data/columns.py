"""Columns besides prompt and answers: used (system, history, tools, margin), rejected by name, or listed as unused."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from rlhf.data.messages import (
    KEPT_FIELDS,
    Messages,
    RowError,
    describe,
    from_json,
    has,
    is_empty,
    reject_unsupported,
    text,
)  # fmt: skip

SYSTEM = ("system", "system_prompt")
SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"), ("rating_chosen", "rating_rejected"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)  # fmt: skip
_SCORE_NAMES = frozenset(name for names in SCORES for name in names)
_KNOWN_FIELDS = {"role", "content", "from", "value", "input", "output", "weight", "train", "training", *KEPT_FIELDS}

# Formats that hold no pair per row, by columns that only they have, and what to do.
OTHER_FORMATS = {
    ("prompt", "completions", "labels"): "stepwise supervision, which trains process reward models; no stage takes it",
    ("response_0", "response_1"): "a row with two responses: name the better one 'chosen' and the other 'rejected'",
    ("response_a", "response_b"): "a row with two responses: name the better one 'chosen' and the other 'rejected'",
}


def format_hint(row: dict) -> str:
    """The unsupported format that a row looks like, and how to convert it; '' if none."""
    return next((f"; this looks like {hint}" for keys, hint in OTHER_FORMATS.items() if set(keys) <= set(row)), "")


def reject_columns(row: dict) -> None:
    """Raise RowError for columns that change the meaning of the row but would be ignored."""
    reject_unsupported(row)
    for key in ("train", "training"):
        if key in row and is_false(row[key]):
            raise RowError(f"'{key}' is false, but every row is trained; remove the row")


def is_false(value: Any) -> bool:
    """Whether a value is false in JSON or Parquet, or `false` in CSV."""
    return value is False or isinstance(value, str) and value.strip().lower() == "false"


def is_true(value: Any) -> bool:
    return value is True or isinstance(value, str) and value.strip().lower() == "true"


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


def template_fields(row: dict, used: set[str], sharegpt: bool = False) -> dict[str, Any]:
    """`tools` and `chat_template_kwargs`, which TRL hands to the chat template; without those that are empty.

    Args:
        sharegpt: LLaMA-Factory's tools are bare functions; templates expect `{"type": "function", "function": …}`.
    """
    found: dict[str, Any] = {}
    if "tools" in row and not is_empty(row["tools"]):
        used.add("tools")
        found["tools"] = _tools(row["tools"], sharegpt)
    if "chat_template_kwargs" in row and not is_empty(row["chat_template_kwargs"]):
        used.add("chat_template_kwargs")
        kwargs = from_json(row["chat_template_kwargs"], "'chat_template_kwargs'")
        if not isinstance(kwargs, dict) or kwargs.keys() & _RESERVED:
            raise RowError(
                f"'chat_template_kwargs' is {describe(kwargs)}; expected a mapping of the template's own variables"
            )
        found["chat_template_kwargs"] = {key: value for key, value in kwargs.items() if value is not None}
    return found


# Arguments of `apply_chat_template` that decide what is returned, not what the template says.
_RESERVED = frozenset(
    "conversation tools documents chat_template add_generation_prompt continue_final_message tokenize padding truncation "
    "max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs messages".split()
)


def _tools(value: Any, sharegpt: bool) -> list[dict]:
    value = from_json(value, "'tools'")
    tools = (
        [from_json(tool, f"'tools', tool {n}") for n, tool in enumerate(value, 1)] if isinstance(value, list) else []
    )
    if not tools or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"'tools' is {describe(value)}; expected a list of JSON schemas of functions")
    bare = sharegpt and all("function" not in tool and "name" in tool for tool in tools)
    tools = [_without_nulls(tool) for tool in tools]
    return [{"type": "function", "function": tool} for tool in tools] if bare else tools


def _without_nulls(schema: Any) -> Any:
    """A JSON schema without the nulls that a table puts where other tools have a parameter or keyword; none is valid there."""
    if isinstance(schema, list):
        return [_without_nulls(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: _without_nulls(v) for k, v in schema.items() if v is not None or k in ("default", "const")}


def margin(row: dict, used: set[str]) -> float | None:
    """By how much chosen is better, as a finite number; None if the row has no margin."""
    value = row.get("margin")
    if value is None or value == "":
        return None
    used.add("margin")
    found = number(value)
    if found is None:
        raise RowError(f"'margin' is {describe(value)}; expected a finite number")
    return found


SUBSETS = ("subset", "task")


def subset(row: dict, used: set[str]) -> str | None:
    """The name of the part of the data that a row belongs to; None if it has no `subset` or `task` with a short text or a number."""
    for key in SUBSETS:
        value = row.get(key)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and 0 < len(str(value).strip()) <= 100:
            used.add(key)
            return str(value).strip()
    return None


def number(value: Any) -> float | None:
    """A finite number, also where a CSV file has it as text; None if it is none."""
    try:
        found = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


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
    """Columns and message fields that are not empty and not used.

    Args:
        used: columns, or parts of them with a dotted name (`input.messages`); the other parts of such a column are unused.
    """
    checked = _SCORE_NAMES if scores(row) else frozenset()
    found = set()
    dotted = [name for name in used if "." in name]
    for key in row.keys() - used - checked:
        if is_empty(row[key]):
            continue
        parts = {name[len(key) + 1 :].split(".")[0] for name in dotted if name.startswith(f"{key}.")}
        if parts and isinstance(row[key], dict):
            found |= {f"{key}.{part}" for part in row[key].keys() - parts if not is_empty(row[key][part])}
        elif not parts:
            found.add(str(key))
    for key in used & row.keys():
        for message in row[key] if isinstance(row[key], list) else ():
            if (
                isinstance(message, dict)
                and not message.keys() <= _KNOWN_FIELDS
                and ("role" in message or "from" in message)
            ):
                found |= {f"{key}[].{k}" for k in message.keys() - _KNOWN_FIELDS if not is_empty(message[k])}
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
