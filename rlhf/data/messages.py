"""Validate texts and messages of a row, with errors that name the field and the true cause."""

from __future__ import annotations

import json
import re
from typing import Any

from rlhf.errors import quote

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")

# What str.strip() removes, and other invisible characters (zero-width, joiners, marks, NUL, blank Braille).
INVISIBLE = "".join(chr(c) for c in range(0x3001) if chr(c).isspace()) + (
    "\x00\u00ad\u115f\u1160\u180e\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\u2800\u3164\ufeff\uffa0"
)
_BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")

_TOOLS = "tools and their calls are not supported: skip these rows (`bad_rows: skip`), or write call and result into the contents as text"
_REASONING = "only 'content' is trained: write the reasoning into it, as the model's template does, or remove the field"
_MEDIA = "only text is trained: skip these rows (`bad_rows: skip`), or remove it if the text makes sense alone"
# Fields of a row or a message that change what is trained on, and what to do about each.
UNSUPPORTED = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), _TOOLS),
    **dict.fromkeys(("reasoning_content", "thinking"), _REASONING),
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), _MEDIA),
    "chat_template_kwargs": "it is not passed to the chat template: write a chat_template with these values, or remove it",
    "train_detail": "parts of an answer can't be excluded from the loss: shorten the answer, or remove the field",
}


class RowError(ValueError):
    """An error in one row; the caller adds the place."""


def is_empty(value: Any) -> bool:
    """Null, or an empty string, list or mapping (also as JSON, and with Arrow's nulls for missing fields)."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, dict):
        return all(is_empty(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_empty(v) for v in value)
    return value is None or value != value  # NaN: pandas' null


def has(row: dict, key: str) -> bool:
    return row.get(key) is not None


def describe(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def reject_unsupported(fields: dict, where: str = "") -> None:
    """Raise RowError for a field that has a meaning and would be dropped."""
    for key in fields:
        if key in UNSUPPORTED and fields[key] is not False and not is_empty(fields[key]):
            raise RowError(f"{where}'{key}' is set ({describe(fields[key])}) and would be dropped; {UNSUPPORTED[key]}")


def text(value: Any, key: str) -> str:
    """A text without leading blank lines and trailing white space. The indentation of its first line is preserved.

    A single leading space separates the words of plain texts ("The sky is" + " blue") and is no indentation: it is
    removed unless other lines are indented too.
    """
    if not isinstance(value, str):
        raise RowError(f"'{key}' is {describe(value)}; expected a string")
    if not value.strip(INVISIBLE):
        raise RowError(f"'{key}' is empty" + (" (it has only invisible characters)" if value.strip() else ""))
    if not value.isascii():
        _reject_surrogates(value, key)
    value = value.rstrip()
    if value[0].isspace():
        value = _BLANK_LINES.sub("", value)
        if value[0] == " " and not value[1].isspace() and "\n " not in value:
            value = value[1:]
    elif value[:2] == "[{" and re.match(r"\[\{\s*['\"](role|content|from|value)['\"]\s*:", value):
        raise RowError(
            f"'{key}' is a list of messages written as a string ({value[:30]!r}); store it as a list, in .jsonl or .parquet"
        )
    return value


def _reject_surrogates(value: str, key: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"'{key}' has a lone surrogate (\\u{ord(value[error.start]):04x}) at position {error.start + 1}, which UTF-8 "
            "can't encode; replace it"
        ) from None


def messages(value: Any, key: str) -> Messages:
    """A list of messages, or a single one, as `{"role", "content"}` dicts."""
    if isinstance(value, dict) and "role" in value:
        value = [value]
    if not isinstance(value, list) or not value:
        raise RowError(f"'{key}' is {describe(value)}; expected a string or a list of messages")
    found = []
    for number, message in enumerate(value, 1):
        where = f"'{key}', message {number}: "
        if isinstance(message, dict):
            reject_unsupported(message, where)
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise RowError(f"{where}expected {{'role': …, 'content': …}}, found {describe(message)}")
        if message["role"] not in ROLES:
            fix = f"; {_TOOLS}" if message["role"] in ("tool", "function", "ipython") else ""
            raise RowError(f"{where}role {quote(message['role'])}; expected one of {', '.join(ROLES)}{fix}")
        content = _join_parts(message["content"], where)
        found.append({"role": message["role"], "content": text(content, f"{key}, message {number}")})
    return found


def _join_parts(content: Any, where: str) -> Any:
    """The text of a single content part (`[{"type": "text", "text": …}]`); anything else unchanged."""
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        return content
    others = sorted({str(part.get("type", "text")) for part in content} - {"text"})
    if others:
        raise RowError(f"{where}the content has parts of type {', '.join(others)}; {_MEDIA}")
    if len(content) > 1:
        raise RowError(
            f"{where}the content has {len(content)} parts; join their texts into one, as the model should see it"
        )
    return content[0].get("text")


def excluded_answers(value: Any, key: str) -> set[int]:
    """Indices of the assistant messages that are excluded from training: `weight: 0`, `train: false`."""
    marked = set()
    for number, message in enumerate([value] if isinstance(value, dict) else value if isinstance(value, list) else []):
        if not isinstance(message, dict) or message.get("role") != "assistant":
            continue
        weight = message.get("weight")
        if weight not in (None, 0, 1):
            raise RowError(f"'{key}', message {number + 1}: weight {weight!r}; expected 0 or 1")
        if weight == 0 and weight is not None or False in (message.get("train"), message.get("training")):
            marked.add(number)
    return marked


def is_dialogue(value: Any) -> bool:
    """Whether a text is a full dialogue in the format of Anthropic's HH-RLHF."""
    return isinstance(value, str) and bool(re.match(r"\s*Human:", value)) and "\n\nAssistant:" in value


def turns(value: str, key: str) -> Messages:
    """The turns of a `Human:` / `Assistant:` text. The space after the colon is part of the format.

    Raises:
        RowError: it is not such a dialogue, or a turn is empty.
    """
    parts = _TURN.split(value.lstrip())
    if len(parts) < 5 or parts[0].strip():
        raise RowError(f"there is no 'prompt', and '{key}' is not a dialogue of Human: and Assistant: turns")
    roles = {"Human": "user", "Assistant": "assistant"}
    return messages(
        [{"role": roles[r], "content": _turn_text(t)} for r, t in zip(parts[1::2], parts[2::2], strict=True)], key
    )


def _turn_text(value: str) -> str:
    """Spaces after the colon are not indentation; those at the start of a line are."""
    return value if value.lstrip(" ").startswith("\n") else value.strip()


def answer_text(found: Messages) -> str:
    """All text of messages, for hashes, lengths and summaries: the content of a plain one, else their JSON."""
    if len(found) == 1 and isinstance(found[0].get("content"), str) and len(found[0]) == 2:
        return found[0]["content"]
    return json.dumps(found, ensure_ascii=False)
