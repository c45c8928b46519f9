"""Rows for SFT: a prompt and its completion, a dialogue, a text, or the better answer of a pair."""

from __future__ import annotations

from typing import Any

from rlhf.data import columns
from rlhf.data.messages import Messages, RowError, excluded_answers, has, is_empty, messages, text
from rlhf.data.pair_rows import pair_row
from rlhf.data.row_parts import ANSWERS, LABELS, SIDES, dialogue_of, list_columns, read_answer, read_prompt

SFT_SHAPES = "prompt + completion; prompt + chosen; messages; conversations; instruction (+ input) + output; question + answer; text"


def sft_row(row: dict, used: set[str]) -> dict[str, Any]:
    """`{"prompt": messages, "completion": messages}`, `{"messages": …}` or `{"text": …}`, and the template's fields."""
    if key := dialogue_of(row):
        return sft_dialogue(row, used, key)
    prompt = read_prompt(row, used)
    answer_key = next((k for k in ANSWERS if has(row, k)), None)
    if prompt is None and answer_key == "chosen" and has(row, "rejected"):
        return preferred(pair_row(row, used), used)
    if prompt is not None and answer_key:
        return prompt_completion(row, used, prompt, answer_key)
    if has(row, "text"):
        return text_row(row, used)
    raise RowError(f"found columns {list_columns(row)}; expected one of: {SFT_SHAPES}{columns.format_hint(row)}")


def preferred(pair: dict[str, Any], used: set[str]) -> dict[str, Any]:
    """The SFT row of a pair: its prompt and better answer."""
    used.difference_update(side for names in SIDES for side in names[1:])
    used.discard("margin")
    return {
        "completion" if k == "chosen" else k: v for k, v in pair.items() if k not in ("rejected", "margin", "scores")
    }


def prompt_completion_row(row: dict, used: set[str]) -> dict[str, Any]:
    """`format: prompt-completion`."""
    prompt, answer_key = read_prompt(row, used), next((k for k in ANSWERS if has(row, k)), None)
    if prompt is None or answer_key is None:
        raise RowError(f"found columns {list_columns(row)}; expected a prompt and a completion")
    return prompt_completion(row, used, prompt, answer_key)


def prompt_completion(row: dict, used: set[str], prompt: Messages, key: str) -> dict[str, Any]:
    for name in LABELS:
        if name in row and columns.is_false(row[name]):
            raise RowError(f"'{name}' is false: SFT would imitate a bad answer; remove the row")
        if name in row and columns.is_true(row[name]):
            used.add(name)
    used.add(key)
    prompt, answer = read_answer(row[key], key, prompt)
    return {"prompt": prompt, "completion": answer, **columns.template_fields(row, used, has(row, "conversations"))}


def text_row(row: dict, used: set[str]) -> dict[str, Any]:
    """`format: text`."""
    used.clear()
    used.add("text")
    for key in (*columns.SYSTEM, "history"):
        if not is_empty(row.get(key)):
            raise RowError(f"'{key}' can't be used with 'text'; write it into the text, or use prompt + completion")
    if not is_empty(row.get("tools")):
        raise RowError("'tools' can't be used with 'text', which no chat template renders; use messages")
    return {"text": text(row.get("text"), "text")}


def messages_row(row: dict, used: set[str]) -> dict[str, Any]:
    """`format: messages`."""
    return sft_dialogue(row, used, "messages")


def sharegpt_row(row: dict, used: set[str]) -> dict[str, Any]:
    """`format: sharegpt`."""
    return sft_dialogue(row, used, "conversation" if has(row, "conversation") else "conversations")


def sft_dialogue(row: dict, used: set[str], key: str) -> dict[str, Any]:
    used.add(key)
    found = messages(row.get(key), key)
    if found[-1]["role"] != "assistant":
        raise RowError(f"'{key}' ends with a {found[-1]['role']} message; the last one must be the assistant's")
    for name in LABELS:
        if name in row and columns.is_false(row[name]):
            raise RowError(f"'{name}' is false: SFT would imitate a bad answer; remove the row")
    columns.history(row, used, None)
    excluded = excluded_answers(row[key], key)
    num_answers = sum(m["role"] == "assistant" for m in found)
    if len(found) - 1 in excluded:
        raise RowError(
            "the last answer is excluded from training (weight: 0 or train: false); end the dialogue before it"
        )
    if excluded and len(excluded) < num_answers - 1:
        raise RowError(
            "some, but not all, of the earlier answers are excluded from training (weight: 0 or train: false); make one row "
            "per answer to train on, or exclude all but the last"
        )
    found = columns.add_system(row, used, found)
    more = columns.template_fields(row, used, key != "messages")
    if num_answers > 1 and not excluded:
        return {"messages": found, **more}
    if len(found) == 1:
        raise RowError("the prompt is empty")
    return {"prompt": found[:-1], "completion": found[-1:], **more}
