"""Validate texts and messages of a row, with errors that name the field and the true cause."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from rlhf.config.stage_config import CHAT_ROLES
from rlhf.errors import quote

Message = dict[str, Any]
Messages = list[Message]

# Fields beside role and content that chat templates read; kept as they are.
TEXT_FIELDS = ("reasoning_content", "thinking", "reasoning", "name", "tool_call_id")
KEPT_FIELDS = ("tool_calls", *TEXT_FIELDS)
# What ShareGPT and its descendants call the roles.
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    "system": "system",
    "developer": "developer",
    "function_call": "assistant",
    "tool_call": "assistant",
}

# What str.strip() removes, and other invisible characters (zero-width, joiners, marks, NUL, blank Braille).
INVISIBLE = "".join(chr(c) for c in range(0x3001) if chr(c).isspace()) + (
    "\x00\u00ad\u115f\u1160\u180e\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\u2800\u3164\ufeff\uffa0"
)
_BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")

_LEGACY_TOOLS = (
    "this is OpenAI's old form: write `tools`, `tool_calls` and the role 'tool' instead, or skip these rows "
    "(`bad_rows: skip`)"
)
_REASONING = (
    "put it into the answer's message, as its 'reasoning_content', or into 'content', as the model's template does"
)
_MEDIA = "only text is trained: skip these rows (`bad_rows: skip`), or remove it if the text makes sense alone"
# Fields of a row or a message that change what is trained on, and what to do about each.
UNSUPPORTED = {
    **dict.fromkeys(("functions", "function_call"), _LEGACY_TOOLS),
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), _MEDIA),
    "train_detail": "parts of an answer can't be excluded from the loss: shorten the answer, or remove the field",
}
UNSUPPORTED_IN_ROWS = {
    **UNSUPPORTED,
    **dict.fromkeys(("reasoning_content", "thinking"), _REASONING),
    "tool_calls": "put them into the answer's message, as its 'tool_calls'",
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


def reject_unsupported(fields: dict, where: str = "", unsupported: dict[str, str] = UNSUPPORTED_IN_ROWS) -> None:
    """Raise RowError for a field that has a meaning and would be dropped."""
    if unsupported.keys().isdisjoint(fields):
        return
    for key in fields:
        if key in unsupported and fields[key] is not False and not is_empty(fields[key]):
            raise RowError(f"{where}'{key}' is set ({describe(fields[key])}) and would be dropped; {unsupported[key]}")


# --- texts -----------------------------------------------------------------------------------------------------------


def text(value: Any, key: str, number: int = 0) -> str:
    """A text without leading blank lines and trailing white space. The indentation of its first line is preserved.

    A single leading space separates the words of plain texts ("The sky is" + " blue") and is no indentation: it is
    removed unless other lines are indented too.

    Args:
        key, number: the field and, from 1 on, the message in it that errors name.
    """
    value = verbatim(value, key, number).rstrip()
    if value[0].isspace():
        value = _BLANK_LINES.sub("", value)
        if value[0] == " " and not value[1].isspace() and "\n " not in value:
            value = value[1:]
    elif value[:2] == "[{" and re.match(r"\[\{\s*['\"](role|content|from|value)['\"]\s*:", value):
        raise RowError(
            f"'{_name(key, number)}' is a list of messages written as a string ({value[:30]!r}); store it as a list, in "
            ".jsonl or .parquet"
        )
    return value


def verbatim(value: Any, key: str, number: int = 0) -> str:
    """A text as it is, that has a visible character and can be encoded."""
    if not isinstance(value, str):
        raise RowError(f"'{_name(key, number)}' is {describe(value)}; expected a string")
    if not value.strip(INVISIBLE):
        invisible = " (it has only invisible characters)" if value.strip() else ""
        raise RowError(f"'{_name(key, number)}' is empty{invisible}")
    if not value.isascii():
        _reject_surrogates(value, _name(key, number))
    return value


def _name(key: str, number: int) -> str:
    return f"{key}, message {number}" if number else key


def _reject_surrogates(value: str, name: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"'{name}' has a lone surrogate (\\u{ord(value[error.start]):04x}) at position {error.start + 1}, which UTF-8 "
            "can't encode; replace it"
        ) from None


def from_json(value: Any, name: str) -> Any:
    """A list or mapping, also where a table holds it as JSON text; it can be written as JSON.

    Raises:
        RowError: it is not JSON, or holds what JSON can't.
    """
    try:
        if isinstance(value, str):
            value = json.loads(value)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, TypeError, RecursionError):
        raise RowError(f"{name} is {describe(value)}; expected JSON") from None
    return value


# --- messages --------------------------------------------------------------------------------------------------------


def messages(value: Any, key: str) -> Messages:
    """A list of messages, or a single one, as dicts with role, content and whichever of KEPT_FIELDS they have.

    Messages are `{"role", "content"}` (OpenAI, TRL), `{"from", "value"}` (ShareGPT) or `{"input", "output"}` (two turns).
    """
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = _transposed(value)
    if not isinstance(value, list) or not value:
        raise RowError(f"'{key}' is {describe(value)}; expected a string or a list of messages")
    found: Messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise RowError(
                f"'{key}', message {number}: expected {{'role': …, 'content': …}}, found {describe(message)}"
            )
        role, content = message.get("role"), message.get("content")
        if len(message) == 2 and isinstance(content, str) and content and role in CHAT_ROLES:
            found.append({"role": role, "content": text(content, key, number)})
        elif role is None and "input" in message and "output" in message:
            found.append({"role": "user", "content": text(message["input"], key, number)})
            found.append({"role": "assistant", "content": text(message["output"], key, number)})
        else:
            found.append(_message(message, key, number))
    return found


def _transposed(value: dict) -> list:
    """One message in a list; or a mapping of lists, as `datasets` gives a sequence of mappings, as a list of messages."""
    lists = [part for part in value.values() if isinstance(part, list)]
    if isinstance(value.get("role", value.get("from")), list) and len({len(part) for part in lists}) == 1:
        return [{key: part[i] for key, part in value.items() if isinstance(part, list)} for i in range(len(lists[0]))]
    return [value]


def _message(message: dict, key: str, number: int) -> Message:
    where = f"'{key}', message {number}: "
    reject_unsupported(message, where, UNSUPPORTED)
    sharegpt = message.get("role") is None and message.get("from") is not None
    given = message.get("from") if sharegpt else message.get("role")
    content = message.get("value") if sharegpt else message.get("content")
    calls = message.get("tool_calls")
    calls = None if is_empty(calls) else calls
    if given is None or (not sharegpt and "content" not in message and calls is None):
        raise RowError(f"{where}expected {{'role': …, 'content': …}}, found {describe(message)}")
    role = SHAREGPT_ROLES.get(given) if sharegpt and isinstance(given, str) else given
    if not isinstance(role, str) or role not in CHAT_ROLES:
        raise RowError(f"{where}role {quote(given)}; expected one of {', '.join(CHAT_ROLES)}{_role_fix(given)}")
    new: Message = {"role": role, "content": _join_parts(content, where)}
    if sharegpt and given in ("function_call", "tool_call"):
        new["content"], calls = "", _sharegpt_calls(content, where)
    if calls is not None:
        new["tool_calls"] = _tool_calls(calls, role, where)
    new["content"] = _content(new["content"], role, calls is not None, key, number)
    for name in TEXT_FIELDS:
        field = message.get(name)
        if field is None or field is False or field == "":
            continue
        if not isinstance(field, str):
            raise RowError(f"{where}'{name}' is {describe(field)}; expected a string")
        _reject_surrogates(field, f"{key}, message {number}, {name}")
        new[name] = field
    return new


def _content(content: Any, role: str, calls: bool, key: str, number: int) -> str | None:
    """The text of a message; '' or None beside tool calls, '' as the result of a tool."""
    if isinstance(content, str) and (calls or role == "tool") and not content.strip():
        return ""
    return None if content is None and calls else text(content, key, number)


def _role_fix(given: Any) -> str:
    if given in ("function", "ipython"):
        return f"; `roles: {{{given}: tool}}` maps it"
    near = SHAREGPT_ROLES.get(given.lower()) if isinstance(given, str) else None
    return f"; `roles: {{{given}: {near or '…'}}}` maps it" if isinstance(given, str) and given.isidentifier() else ""


def _tool_calls(calls: Any, role: str, where: str) -> list[dict]:
    """OpenAI's tool calls; a table may hold them as JSON text."""
    if role != "assistant":
        raise RowError(f"{where}'tool_calls' in a message of the {role}; only the assistant calls tools")
    calls = from_json(calls, f"{where}'tool_calls'")
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(calls, list) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(
                f"{where}'tool_calls' is {describe(calls)}; expected a list of {{'type': 'function', 'function': {{'name': …, "
                "'arguments': {…}}}}"
            )
    return calls


def _sharegpt_calls(value: Any, where: str) -> list[dict]:
    """LLaMA-Factory's `function_call` turn: the JSON of one call or of several."""
    calls = from_json(value, f"{where}a function call")
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


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
        if not isinstance(message, dict) or len(message) == 2:
            continue
        role = message.get("role")
        if role is None and isinstance(message.get("from"), str):
            role = SHAREGPT_ROLES.get(message["from"])
        if role != "assistant":
            continue
        weight = message.get("weight")
        if weight not in (None, 0, 1):
            raise RowError(f"'{key}', message {number + 1}: weight {weight!r}; expected 0 or 1")
        if weight == 0 and weight is not None or False in (message.get("train"), message.get("training")):
            marked.add(number)
    return marked


# --- the text of messages, for hashes, lengths and summaries ---------------------------------------------------------


def message_text(message: Message) -> str:
    """All text of a message: its content alone if it has nothing else; else reasoning, content and tool calls, by lines.

    Example: {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]} ->
    '[{"function": {"name": "f", "arguments": {}}}]'.
    """
    if len(message) == 2:
        return message["content"]
    parts = [message.get(name) for name in ("reasoning_content", "thinking", "reasoning", "content")]
    if calls := message.get("tool_calls"):
        parts.append(json.dumps(calls, ensure_ascii=False))
    return "\n".join(part for part in parts if part)


def answer_text(answer: Iterable[Message]) -> str:
    """All text of an answer, tool calls as JSON: the content of a single message, several ones joined by line breaks."""
    return "\n".join(map(message_text, answer))
