"""Rows with chosen and rejected, a prompt beside them or in them: TRL, Alpaca, ShareGPT, HH-RLHF, UltraFeedback, argilla."""

from __future__ import annotations

from typing import Any

from rlhf.data import columns
from rlhf.data.dialogue_text import is_dialogue, no_dialogue, split_texts
from rlhf.data.messages import Messages, RowError, excluded_answers, has
from rlhf.data.row_parts import OTHER_PROMPTS, PROMPTS, dialogue, list_columns, read_answer, read_prompt, sides_of

PREFERENCE_SHAPES = (
    "prompt + chosen + rejected; chosen + rejected (full dialogues); instruction + chosen + rejected; "
    "conversations + chosen + rejected"
)


def pair_row(row: dict, used: set[str]) -> dict[str, Any]:
    """`{"prompt": messages, "chosen": messages, "rejected": messages}`, and `margin` and the template's fields."""
    sides = sides_of(row)
    if sides is None:
        raise RowError(
            f"found columns {list_columns(row)}; expected one of: {PREFERENCE_SHAPES}{columns.format_hint(row)}"
        )
    used.update(sides)
    if _holdsread_prompt(row, used, sides):
        prompt, chosen, rejected = _split_dialogues(row, used, sides)
        return make_pair(row, used, prompt, chosen, rejected)
    asked = read_prompt(row, used)
    if asked is None:
        raise RowError(no_dialogue(sides[0]))
    (prompt, chosen), (other, rejected) = (read_answer(row[side], side, asked) for side in sides)
    if prompt != other:
        raise RowError(f"'chosen' and 'rejected' differ before the last answer{_difference(prompt, other)}")
    return make_pair(row, used, prompt, chosen, rejected)


def make_pair(row: dict, used: set[str], prompt: Messages, chosen: Messages, rejected: Messages) -> dict[str, Any]:
    """A checked canonical pair, with the row's margin and the template's fields."""
    if not prompt:
        raise RowError("the prompt is empty")
    if prompt[0]["role"] != "user" and not any(m["role"] == "user" for m in prompt):
        raise RowError("the prompt has no user message")
    if _are_equal(chosen, rejected):
        raise RowError("'chosen' and 'rejected' are equal, so there is nothing to learn; remove the pair")
    pair: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if "margin" in row and (margin := columns.margin(row, used)) is not None:
        pair["margin"] = margin
    if "tools" in row or "chat_template_kwargs" in row:
        pair |= columns.template_fields(row, used, "conversations" in used)
    return pair


def _are_equal(a: Messages, b: Messages) -> bool:
    """Whether two answers are the same but for outer white space."""
    if len(a) == len(b) == 1 and len(a[0]) == len(b[0]) == 2:
        return a[0]["content"].strip() == b[0]["content"].strip()
    bare = lambda answer: [{**m, "content": (m["content"] or "").strip()} for m in answer]  # noqa: E731
    return bare(a) == bare(b)


def _holdsread_prompt(row: dict, used: set[str], sides: tuple[str, str]) -> bool:
    """Whether the answers are whole dialogues, from which the prompt is taken.

    A prompt beside them as text may be one of several turns (argilla's capybara); otherwise it is read for itself.
    """
    key = next((k for k in PROMPTS if has(row, k)), None)
    if key is None:
        return all(_is_whole(row[side]) for side in sides) or not any(has(row, k) for k in OTHER_PROMPTS)
    if not isinstance(row[key], str) or not all(isinstance(row[s], list) and _is_whole(row[s]) for s in sides):
        return False
    asked = [m.get("content") for m in row[sides[0]] if isinstance(m, dict) and m.get("role") == "user"]
    if len(asked) > 1 and row[key].strip() in [c.strip() for c in asked if isinstance(c, str)]:
        used.add(key)
        return True
    return False


def _is_whole(value: Any) -> bool:
    """Whether an answer's raw value is a dialogue that starts with its prompt."""
    if isinstance(value, list):
        first = value[0] if value else None
        role = (first.get("role") or first.get("from")) if isinstance(first, dict) else None
        return len(value) > 1 and role not in ("assistant", "gpt", "function_call")
    return is_dialogue(value)


def _split_dialogues(row: dict, used: set[str], sides: tuple[str, str]) -> tuple[Messages, Messages, Messages]:
    """(prompt, chosen, rejected): the prompt is the longest common start that ends before an assistant's turn."""
    if (split := split_texts(row[sides[0]], row[sides[1]], sides)) is not None:
        prompt, *answers = split
    else:
        prompt, *answers = _split_messages(row, sides)
    columns.history(row, used, None)
    return columns.add_system(row, used, prompt), answers[0], answers[1]


def _split_messages(row: dict, sides: tuple[str, str]) -> tuple[Messages, Messages, Messages]:
    chosen, rejected = (dialogue(row[side], side) for side in sides)
    end = 0
    for i in range(min(len(chosen), len(rejected)) - 1):
        if chosen[i] != rejected[i]:
            break
        if chosen[i]["role"] in ("user", "tool") and chosen[i + 1]["role"] == rejected[i + 1]["role"] == "assistant":
            end = i + 1
    if not end:
        if chosen[:-1] != rejected[:-1]:
            raise RowError(
                f"'chosen' and 'rejected' differ before the last answer{_difference(chosen[:-1], rejected[:-1])}"
            )
        raise RowError("the prompt has no user message before the answers" if chosen[:-1] else "the prompt is empty")
    for side, found in zip(sides, (chosen, rejected), strict=True):
        if end < len(found) - 1 and any(number >= end for number in excluded_answers(row[side], side)):
            raise RowError(
                f"'{side}' has an answer that is excluded from training (weight: 0 or train: false); remove the row"
            )
    return chosen[:end], chosen[end:], rejected[end:]


def _difference(chosen: Messages, rejected: Messages) -> str:
    """Where two prompts differ, for a message."""
    for number, (a, b) in enumerate(zip(chosen, rejected, strict=False), 1):
        if a != b:
            return f", in message {number} ({a['role']}); expected equal dialogues before the last answer"
    return f" ({len(chosen)} and {len(rejected)} messages); expected equal dialogues before the last answer"
