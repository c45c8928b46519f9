"""Rows that have a prompt and no answer: what a model is to answer."""

from __future__ import annotations

from typing import Any

from rlhf.data import columns
from rlhf.data.messages import RowError
from rlhf.data.row_parts import dialogue_of, list_columns, prompt_messages, read_prompt

PROMPT_SHAPES = "prompt; question; instruction (+ input); messages or conversations that end with the user's"


def prompt_row(row: dict, used: set[str]) -> dict[str, Any]:
    """`{"prompt": messages}` and the template's fields.

    Raises:
        RowError: there is no prompt, or it does not end with the user's or a tool's message.
    """
    key = dialogue_of(row)
    if key:
        used.add(key)
        prompt = columns.add_system(row, used, prompt_messages(row[key], key))
    elif (found := read_prompt(row, used)) is not None:
        prompt = found
    else:
        raise RowError(f"found columns {list_columns(row)}; expected a prompt: {PROMPT_SHAPES}")
    if not any(message["role"] == "user" for message in prompt):
        raise RowError("the prompt has no user message")
    return {"prompt": prompt, **columns.template_fields(row, used, key not in (None, "messages"))}
