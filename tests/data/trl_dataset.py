"""Canonical rows as the data set that TRL's trainers tokenise, without the nulls that Arrow puts into messages and tools."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

_MESSAGES = ("prompt", "completion", "chosen", "rejected", "messages")


def trl_dataset(rows: list[dict[str, Any]]) -> Dataset:
    """A `Dataset` that gives back each row as it is.

    A column of Arrow has one set of fields: a message without tool calls would get `tool_calls: None`, which templates that ask
    `'tool_calls' in message` take for a call, and a tool would get the parameters of all others. So such parts are kept as JSON
    (tools as a text, which TRL reads).
    """
    from datasets import Dataset, Features, Json, List, Value

    if not any(_is_special(row) for row in rows):
        return Dataset.from_list(rows)
    names = {name for row in rows for name in row}
    kinds = {"tools": Value("string"), "chat_template_kwargs": Json(), "margin": Value("float64")}
    features = {n: List(Json()) if n in _MESSAGES else kinds.get(n, Value("string")) for n in sorted(names)}
    return Dataset.from_list([_written(row, names) for row in rows], features=Features(features))


def _is_special(row: dict[str, Any]) -> bool:
    if "tools" in row or "chat_template_kwargs" in row:
        return True
    return any(len(m) > 2 or m["content"] is None for name in _MESSAGES for m in row.get(name) or ())


def _written(row: dict[str, Any], names: set[str]) -> dict[str, Any]:
    new = dict(row)
    if "tools" in names:
        new["tools"] = json.dumps(row["tools"], ensure_ascii=False) if row.get("tools") else None
    if "chat_template_kwargs" in names:
        new["chat_template_kwargs"] = row.get("chat_template_kwargs") or {}  # TRL unpacks it, and can't unpack None
    return new
