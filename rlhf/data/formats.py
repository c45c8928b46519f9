"""Rows in the usual formats -> TRL's canonical conversational formats, with errors that name the line.

Everything is converted to messages, so that one chat template renders every prompt and answer the same way in SFT,
reward modelling, DPO, evaluation and chat.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlhf.data import columns
from rlhf.data.messages import Messages, RowError, excluded_answers, has, is_dialogue, is_empty, messages, text, turns
from rlhf.data.reading import Reading, each, without_repeated_prompts
from rlhf.data.sources import Source

SFT_SHAPES = "prompt + completion; prompt + chosen; messages; instruction (+ input) + output; question + answer; text"
PREFERENCE_SHAPES = "prompt + chosen + rejected; chosen + rejected (full dialogues); instruction + chosen + rejected"


@dataclass(frozen=True)
class FormatOptions:
    """What the recipe says of the data's format."""

    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)

    def key(self) -> str:
        return json.dumps([self.format, self.columns, self.roles], sort_keys=True)


def converter(kind: str, first_rows: list[dict], options: FormatOptions) -> Callable[[dict, set[str]], dict[str, Any]]:
    return _sft_row if kind == "sft" else _preference_row


def sft_rows(source: Source, reading: Reading | None = None) -> list[dict[str, Any]]:
    """Canonical SFT rows: `{"prompt": messages, "completion": [assistant message]}`, `{"messages": …}` or `{"text": …}`.

    Raises:
        UserError: file and line of the first row with an unknown format, an empty text or wrong roles.
    """
    reading = reading or Reading()
    first: dict[str, set[str]] = {}

    def convert(row: dict, used: set[str]) -> dict[str, Any]:
        new = _sft_row(row, used)
        shape = first.setdefault("shape", set(new))
        if set(new) != shape:
            raise RowError(f"this row gives {sorted(new)}, but the first row gives {sorted(shape)}; use one format")
        return new

    rows = each(source, convert, reading)
    return without_repeated_prompts(rows, ("completion",), reading)


def preference_rows(source: Source, reading: Reading | None = None) -> list[dict[str, Any]]:
    """Canonical pairs: `{"prompt": messages, "chosen": [assistant message], "rejected": [assistant message]}`, and `margin`.

    Raises:
        UserError: file and line of the first row with an unknown format, an empty text, wrong roles or equal answers.
    """
    reading = reading or Reading()
    return without_repeated_prompts(each(source, _preference_row, reading), ("chosen", "rejected"), reading)


def _sft_row(row: dict, used: set[str]) -> dict[str, Any]:
    if has(row, "messages"):
        return _sft_messages(row, used)
    prompt = _prompt(row, used)
    answer_key = next((k for k in ("completion", "chosen", "response", "output", "answer") if has(row, k)), None)
    if prompt is None and answer_key == "chosen" and has(row, "rejected"):
        pair = _preference_row(row, used)
        used.discard("rejected")
        return {"prompt": pair["prompt"], "completion": pair["chosen"]}
    if prompt is not None and answer_key:
        if columns.is_false(row.get("label")):
            raise RowError("'label' is false: SFT would imitate a bad answer; remove the row")
        used |= {answer_key} | ({"label"} if str(row.get("label")).lower() == "true" else set())
        prompt, answer = _answer(row[answer_key], answer_key, prompt)
        return {"prompt": prompt, "completion": answer}
    if has(row, "text"):
        used.clear()
        used.add("text")
        for key in (*columns.SYSTEM, "history"):
            if not is_empty(row.get(key)):
                raise RowError(f"'{key}' can't be used with 'text'; write it into the text, or use prompt + completion")
        return {"text": text(row["text"], "text")}
    raise RowError(f"found columns {_columns(row)}; expected one of: {SFT_SHAPES}{columns.format_hint(row)}")


def _sft_messages(row: dict, used: set[str]) -> dict[str, Any]:
    used.add("messages")
    found = messages(row["messages"], "messages")
    if found[-1]["role"] != "assistant":
        raise RowError(f"'messages' ends with a {found[-1]['role']} message; the last one must be the assistant's")
    columns.history(row, used, None)
    excluded = excluded_answers(row["messages"], "messages")
    answers = [number for number, m in enumerate(found) if m["role"] == "assistant"]
    if len(found) - 1 in excluded:
        raise RowError(
            "the last answer is excluded from training (weight: 0 or train: false); end the dialogue before it"
        )
    if excluded and len(excluded) < len(answers) - 1:
        raise RowError(
            "some, but not all, of the earlier answers are excluded from training (weight: 0 or train: false); make one row "
            "per answer to train on, or exclude all but the last"
        )
    found = columns.add_system(row, used, found)
    if len(answers) > 1 and not excluded:
        return {"messages": found}
    if len(found) == 1:
        raise RowError("the prompt is empty")
    return {"prompt": found[:-1], "completion": found[-1:]}


def _preference_row(row: dict, used: set[str]) -> dict[str, Any]:
    if not has(row, "chosen") or not has(row, "rejected"):
        raise RowError(f"found columns {_columns(row)}; expected one of: {PREFERENCE_SHAPES}{columns.format_hint(row)}")
    used |= {"chosen", "rejected"}
    prompt = _prompt(row, used)
    if prompt is None:
        chosen, rejected = _dialogue(row["chosen"], "chosen"), _dialogue(row["rejected"], "rejected")
        if chosen[:-1] and chosen[:-1] == rejected[:-1]:
            columns.history(row, used, None)
            chosen, rejected = columns.add_system(row, used, chosen), columns.add_system(row, used, rejected)
        prompts, answers = (chosen[:-1], rejected[:-1]), (chosen[-1:], rejected[-1:])
    else:
        sides = [_answer(row[side], side, prompt) for side in ("chosen", "rejected")]
        prompts, answers = (sides[0][0], sides[1][0]), (sides[0][1], sides[1][1])
    if prompts[0] != prompts[1]:
        raise RowError(f"'chosen' and 'rejected' differ before the last answer{_difference(*prompts)}")
    prompt = prompts[0]
    if not prompt:
        raise RowError("the prompt is empty")
    if not any(m["role"] == "user" for m in prompt):
        raise RowError("the prompt has no user message")
    if answers[0][0]["content"].strip() == answers[1][0]["content"].strip():
        raise RowError("'chosen' and 'rejected' are equal, so there is nothing to learn; remove the pair")
    pair = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    margin = columns.margin(row, used)
    return pair if margin is None else {**pair, "margin": margin}


def _difference(chosen: Messages, rejected: Messages) -> str:
    """Where two prompts differ, for a message."""
    for number, (a, b) in enumerate(zip(chosen, rejected, strict=False), 1):
        if a != b:
            return f", in message {number} ({a['role']}); expected equal dialogues before the last answer"
    return f" ({len(chosen)} and {len(rejected)} messages); expected equal dialogues before the last answer"


def _prompt(row: dict, used: set[str]) -> Messages | None:
    key = next((k for k in ("prompt", "question", "instruction") if has(row, k)), None)
    if key is None:
        return None
    used.add(key)
    value = row[key]
    if key == "instruction":
        content = text(value, key)
        if not is_empty(row.get("input")):
            content += f"\n\n{text(row['input'], 'input')}"
        used.add("input")
        found = [{"role": "user", "content": content}]
    elif is_dialogue(value) and value.rstrip().endswith("\n\nAssistant:"):  # HH-RLHF, truncated before the answer
        found = turns(value.rstrip().removesuffix("\n\nAssistant:") + "\n\nAssistant: …", key)[:-1]
    else:
        found = [{"role": "user", "content": text(value, key)}] if isinstance(value, str) else messages(value, key)
    if found[-1]["role"] != "user":
        article = "an" if found[-1]["role"] == "assistant" else "a"
        raise RowError(f"'{key}' ends with {article} {found[-1]['role']} message; it must end with the user's")
    return columns.add_context(row, used, found)


def _answer(value: Any, key: str, prompt: Messages) -> tuple[Messages, Messages]:
    """(prompt, answer as one assistant message); the field may repeat the full dialogue, as in UltraFeedback.

    A system message that only the full dialogue has is added to the prompt.
    """
    if isinstance(value, str) and not is_dialogue(value):
        return prompt, [{"role": "assistant", "content": text(value, key)}]
    found = turns(value, key) if isinstance(value, str) else messages(value, key)
    if len(found) - 1 in excluded_answers(value, key):
        raise RowError(f"'{key}' is excluded from training (weight: 0 or train: false); remove the row")
    before, last = found[:-1], found[-1:]
    if last[0]["role"] != "assistant" or (before and not _same_turns(before, prompt)):
        raise RowError(
            f"'{key}' has roles {[m['role'] for m in found]}; expected one assistant message, optionally preceded by exactly the "
            "prompt's messages"
        )
    if before and before[0]["role"] == "system":
        if prompt[0]["role"] == "system" and prompt[0] != before[0]:
            raise RowError(f"'{key}' starts with a different system message than the prompt; keep one")
        prompt = [before[0], *(m for m in prompt if m["role"] != "system")]
    return prompt, last


def _same_turns(before: Messages, prompt: Messages) -> bool:
    """Whether these are the prompt's messages, without `history` before them and ignoring the system message."""
    spoken, wanted = ([m for m in part if m["role"] != "system"] for part in (before, prompt))
    return bool(spoken) and spoken == wanted[-len(spoken) :] and len(spoken) in (1, len(wanted))


def _dialogue(value: Any, key: str) -> Messages:
    """A full dialogue: messages, or a string with `Human:` and `Assistant:` turns (Anthropic's HH-RLHF)."""
    found = turns(value, key) if isinstance(value, str) else messages(value, key)
    if found[-1]["role"] != "assistant":
        raise RowError(f"'{key}' must end with the assistant's answer, found {found[-1]['role']}")
    if len(found) - 1 in excluded_answers(value, key):
        raise RowError(f"'{key}' is excluded from training (weight: 0 or train: false); remove the row")
    return found


def _columns(row: dict) -> str:
    return ", ".join(map(str, row)) or "none"
