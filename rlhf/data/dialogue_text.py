"""Dialogues that are written as one text: Anthropic's `Human:` / `Assistant:` turns, NVIDIA's `<extra_id_1>` turns."""

from __future__ import annotations

import re
from typing import Any

from rlhf.data.messages import INVISIBLE, Messages, RowError, messages, text

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_START = re.compile(r"\s*Human:")
_NVIDIA_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_LAST = "\n\nAssistant:"
_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}


def is_dialogue(value: Any) -> bool:
    """Whether a text is a full dialogue in the format of Anthropic's HH-RLHF."""
    return isinstance(value, str) and "\n\nAssistant:" in value and bool(_START.match(value))


def turns(value: str, key: str) -> Messages:
    """The turns of a `Human:` / `Assistant:` text. The space after the colon is part of the format.

    Raises:
        RowError: it is not such a dialogue, or a turn is empty.
    """
    parts = _TURN.split(value.lstrip())
    if len(parts) < 5 or parts[0].strip():
        raise RowError(no_dialogue(key))
    return [
        {"role": _ROLES[role], "content": text(_turn_text(turn), key, number)}
        for number, (role, turn) in enumerate(zip(parts[1::2], parts[2::2], strict=True), 1)
    ]


def no_dialogue(key: str) -> str:
    return (
        f"there is no 'prompt', and '{key}' is not a dialogue of Human: and Assistant: turns; name the column of the prompt "
        "with `columns: {prompt: …}`; `format: plain` takes the common start of both texts as the prompt"
    )


def split_texts(chosen: Any, rejected: Any, keys: tuple[str, str]) -> tuple[Messages, Messages, Messages] | None:
    """(prompt, chosen, rejected) of two dialogues that differ in their last turn alone, the usual case, read once.

    Returns:
        None if the texts have to be read turn by turn.
    """
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return None
    end = chosen.rfind(_LAST)
    if end < 0 or rejected.rfind(_LAST) != end or chosen[:end] != rejected[:end]:
        return None
    answers = [value[end + len(_LAST) :] for value in (chosen, rejected)]
    if any("\n\nHuman:" in answer or not answer.strip(INVISIBLE) for answer in answers):
        return None
    prompt = turns(f"{chosen[:end]}{_LAST} …", keys[0])[:-1]
    if prompt[-1]["role"] != "user":
        return None
    found = [[{"role": "assistant", "content": text(_turn_text(a), k)}] for a, k in zip(answers, keys, strict=True)]
    return prompt, found[0], found[1]


def prompt_turns(value: str, key: str) -> Messages | None:
    """The turns of a prompt that is written as one text; None if it is a plain text.

    Example: "\\n\\nHuman: Hi\\n\\nAssistant: " (HH-RLHF, Nectar) -> [user "Hi"].
    """
    if is_dialogue(value) and value.rstrip().endswith("\n\nAssistant:"):
        return turns(value.rstrip().removesuffix("\n\nAssistant:") + "\n\nAssistant: …", key)[:-1]
    if "<extra_id_1>" not in value:
        return None
    parts = _NVIDIA_TURN.split(value.removesuffix("<extra_id_1>Assistant\n"))  # HelpSteer: the first turn has no marker
    first = [{"role": "user", "content": parts[0]}] if parts[0].strip() else []
    if len(parts) == 1:
        return None
    return messages(
        first + [{"role": _ROLES[r], "content": t} for r, t in zip(parts[1::2], parts[2::2], strict=True)], key
    )


def _turn_text(value: str) -> str:
    """Spaces after the colon are not indentation; those at the start of a line are."""
    value = value.lstrip(" ")
    return value if value[:1] == "\n" else value.strip()
