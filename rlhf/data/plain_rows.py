"""`format: plain`: texts exactly as they are, for a base model that continues them (TRL's standard, not conversational, form).

With `chat_template: plain` the token ids are TRL's: prompt and answer are joined, and EOS follows.
"""

from __future__ import annotations

from typing import Any

from rlhf.data import columns
from rlhf.data.messages import Messages, RowError, has, is_empty, verbatim
from rlhf.data.pair_rows import make_pair
from rlhf.data.row_parts import ANSWERS, PROMPTS, sides_of


def plain_pair_row(row: dict, used: set[str]) -> dict[str, Any]:
    """`{"prompt", "chosen", "rejected"}` with unchanged texts; without a prompt it is the common start of both answers."""
    sides = sides_of(row)
    if sides is None:
        raise RowError(
            f"found columns {', '.join(map(str, row)) or 'none'}; expected the texts chosen + rejected, and a prompt"
        )
    _reject_context(row)
    used.update(sides)
    chosen, rejected = (verbatim(row[side], side) for side in sides)
    prompt = _prompt(row, used)
    if prompt is None:
        end = _common_start(chosen, rejected)
        if not chosen[:end].strip():
            raise RowError("there is no 'prompt', and 'chosen' and 'rejected' don't start alike")
        prompt, chosen, rejected = chosen[:end], chosen[end:], rejected[end:]
    return make_pair(
        row, used, _message("user", prompt), _message("assistant", chosen), _message("assistant", rejected)
    )


def plain_sft_row(row: dict, used: set[str]) -> dict[str, Any]:
    """`{"prompt", "completion"}` or `{"text"}` with unchanged texts."""
    _reject_context(row)
    prompt, key = _prompt(row, used), next((k for k in ANSWERS if has(row, k)), None)
    if prompt is None and has(row, "text"):
        used.add("text")
        return {"text": verbatim(row["text"], "text")}
    if prompt is None or key is None:
        raise RowError(
            f"found columns {', '.join(map(str, row)) or 'none'}; expected the texts prompt + completion, or text"
        )
    if columns.is_false(row.get("label")):
        raise RowError("'label' is false: SFT would imitate a bad answer; remove the row")
    used.add(key)
    return {"prompt": _message("user", prompt), "completion": _message("assistant", verbatim(row[key], key))}


def _prompt(row: dict, used: set[str]) -> str | None:
    key = next((k for k in (*PROMPTS, "input", "context") if has(row, k)), None)
    if key is None:
        return None
    used.add(key)
    return verbatim(row[key], key)


def _reject_context(row: dict) -> None:
    for key in (*columns.SYSTEM, "history", "tools"):
        if not is_empty(row.get(key)):
            raise RowError(f"'{key}' can't be used with `format: plain`; write it into the prompt's text")


def _message(role: str, content: str) -> Messages:
    return [{"role": role, "content": content}]


def _common_start(chosen: str, rejected: str) -> int:
    """The length of the common start, without a space at its end (TRL's extract_prompt)."""
    end = 0
    for end, (a, b) in enumerate(zip(chosen, rejected, strict=False)):
        if a != b:
            return end - 1 if end and chosen[end - 1] == " " else end
    return end
