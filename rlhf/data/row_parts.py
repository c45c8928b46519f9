"""The parts of a row under their usual names: its prompt, its answers, and which columns hold them."""

from __future__ import annotations

from typing import Any

from rlhf.data import columns
from rlhf.data.dialogue_text import is_dialogue, prompt_turns, turns
from rlhf.data.messages import Messages, RowError, excluded_answers, has, is_empty, messages, text

PROMPTS = ("prompt", "question", "instruction", "query")
OTHER_PROMPTS = ("input", "conversations", "messages", "context_messages", "context")  # without one of PROMPTS
ANSWERS = ("completion", "chosen", "response", "output", "answer")
LABELS = ("label", "kto_tag")  # a thumb up or down
DIALOGUES = ("messages", "conversations", "conversation")
SIDES = (("chosen", "rejected"), ("chosen_response", "rejected_response"))


def sides_of(row: dict) -> tuple[str, str] | None:
    """The columns of the better and the worse answer."""
    return next((names for names in SIDES if has(row, names[0]) and has(row, names[1])), None)


def dialogue_of(row: dict) -> str | None:
    """The column with a whole dialogue; None if there is none, or it is the prompt of the answers beside it."""
    key = next((k for k in DIALOGUES if has(row, k)), None)
    if key and has(row, "chosen") and _last_role(row[key]) != "assistant":
        return None
    return key


def _last_role(value: Any) -> str:
    """The role of the last raw message, as `messages` would read it; '' if it is none."""
    last = value[-1] if isinstance(value, list) and value else None
    role = (last.get("role") or last.get("from")) if isinstance(last, dict) else None
    return {"gpt": "assistant", "human": "user", "observation": "tool"}.get(role, role) if isinstance(role, str) else ""


def read_prompt(row: dict, used: set[str]) -> Messages | None:
    key = next((k for k in PROMPTS if has(row, k)), None) or next((k for k in OTHER_PROMPTS if has(row, k)), None)
    if key is None:
        return None
    used.add(key)
    if key != "instruction":
        return columns.add_context(row, used, prompt_messages(row[key], key))
    content = text(row[key], key)
    if not is_empty(row.get("input")):
        content += f"\n\n{text(row['input'], 'input')}"
    used.add("input")
    return columns.add_context(row, used, [{"role": "user", "content": content}])


def prompt_messages(value: Any, key: str) -> Messages:
    """A prompt, written as a text, as a dialogue in a text, or as messages; it ends with the user's or a tool's message."""
    if isinstance(value, str):
        found = prompt_turns(value, key) or [{"role": "user", "content": text(value, key)}]
    else:
        found = messages(value, key)
    if found[-1]["role"] not in ("user", "tool"):
        article = "an" if found[-1]["role"] == "assistant" else "a"
        raise RowError(f"'{key}' ends with {article} {found[-1]['role']} message; it must end with the user's")
    return found


def answer_messages(value: Any, key: str, prompt: Messages) -> Messages:
    """An answer to a prompt, written as a text or as messages."""
    return read_answer(value, key, prompt)[1]


def read_answer(value: Any, key: str, prompt: Messages) -> tuple[Messages, Messages]:
    """(prompt, answer); the field may repeat the full dialogue, as in UltraFeedback.

    A system message that only the full dialogue has is added to the prompt.
    """
    if isinstance(value, str) and not is_dialogue(value):
        return prompt, [{"role": "assistant", "content": text(value, key)}]
    found = turns(value, key) if isinstance(value, str) else messages(value, key)
    end = _repeated(found, prompt)
    if not end and len(prompt) == 1 and prompt[0] in found[1:-1] and found[0]["role"] != "assistant":
        end, prompt = len(found) - 1, found[:-1]  # the prompt as text is one turn of the dialogue
    if any(number >= end for number in excluded_answers(value, key)):
        raise RowError(f"'{key}' is excluded from training (weight: 0 or train: false); remove the row")
    before, answer = found[:end], found[end:]
    roles = [m["role"] for m in answer]
    if roles[0] != "assistant" or roles[-1] != "assistant" or _has_double(roles):
        raise RowError(
            f"'{key}' has roles {[m['role'] for m in found]}; expected one assistant message (or turns that begin and end with "
            "one), optionally preceded by exactly the prompt's messages"
        )
    if before and before[0]["role"] == "system":
        if prompt[0]["role"] == "system" and prompt[0] != before[0]:
            raise RowError(f"'{key}' starts with a different system message than the prompt; keep one")
        prompt = [before[0], *(m for m in prompt if m["role"] != "system")]
    return prompt, answer


def _has_double(roles: list[str]) -> bool:
    return "system" in roles or any(a == b == "assistant" for a, b in zip(roles, roles[1:], strict=False))


def _repeated(found: Messages, prompt: Messages) -> int:
    """How many messages of a dialogue repeat the prompt, or its last message, with or without a system message before."""
    if found[: len(prompt)] == prompt and len(found) > len(prompt):
        return len(prompt)
    start = int(found[0]["role"] == "system")
    wanted = [m for m in prompt if m["role"] != "system"]
    for turns_ in (wanted, wanted[-1:]):
        end = start + len(turns_)
        if turns_ and end < len(found) and found[start:end] == turns_:
            return end
    return 0


def dialogue(value: Any, key: str) -> Messages:
    """A full dialogue: messages, or a string with `Human:` and `Assistant:` turns (Anthropic's HH-RLHF)."""
    found = turns(value, key) if isinstance(value, str) else messages(value, key)
    if found[-1]["role"] != "assistant":
        raise RowError(f"'{key}' must end with the assistant's answer, found {found[-1]['role']}")
    if len(found) - 1 in excluded_answers(value, key):
        raise RowError(f"'{key}' is excluded from training (weight: 0 or train: false); remove the row")
    return found


def list_columns(row: dict) -> str:
    return ", ".join(map(str, row)) or "none"
