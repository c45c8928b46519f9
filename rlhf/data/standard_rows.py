"""Rows with a prompt and answers under the usual names, or with whole dialogues: TRL, Alpaca, ShareGPT, HH-RLHF, argilla."""

from __future__ import annotations

from typing import Any

from rlhf.data import columns
from rlhf.data.dialogue_text import is_dialogue, no_dialogue, prompt_turns, split_texts, turns
from rlhf.data.messages import Messages, RowError, excluded_answers, has, is_empty, messages, text

SFT_SHAPES = "prompt + completion; prompt + chosen; messages; conversations; instruction (+ input) + output; question + answer; text"
PREFERENCE_SHAPES = (
    "prompt + chosen + rejected; chosen + rejected (full dialogues); instruction + chosen + rejected; "
    "conversations + chosen + rejected"
)

PROMPTS = ("prompt", "question", "instruction", "query")
OTHER_PROMPTS = ("input", "conversations", "messages", "context_messages", "context")  # without one of PROMPTS
ANSWERS = ("completion", "chosen", "response", "output", "answer")
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


# --- SFT -------------------------------------------------------------------------------------------------------------


def sft_row(row: dict, used: set[str]) -> dict[str, Any]:
    """`{"prompt": messages, "completion": messages}`, `{"messages": …}` or `{"text": …}`, and the template's fields."""
    if key := dialogue_of(row):
        return sft_dialogue(row, used, key)
    prompt = _prompt(row, used)
    answer_key = next((k for k in ANSWERS if has(row, k)), None)
    if prompt is None and answer_key == "chosen" and has(row, "rejected"):
        return preferred(pair_row(row, used), used)
    if prompt is not None and answer_key:
        return prompt_completion(row, used, prompt, answer_key)
    if has(row, "text"):
        return text_row(row, used)
    raise RowError(f"found columns {_columns(row)}; expected one of: {SFT_SHAPES}{columns.format_hint(row)}")


def preferred(pair: dict[str, Any], used: set[str]) -> dict[str, Any]:
    """The SFT row of a pair: its prompt and better answer."""
    used.difference_update(side for names in SIDES for side in names[1:])
    used.discard("margin")
    return {
        "completion" if k == "chosen" else k: v for k, v in pair.items() if k not in ("rejected", "margin", "scores")
    }


def prompt_completion_row(row: dict, used: set[str]) -> dict[str, Any]:
    """`format: prompt-completion`."""
    prompt, answer_key = _prompt(row, used), next((k for k in ANSWERS if has(row, k)), None)
    if prompt is None or answer_key is None:
        raise RowError(f"found columns {_columns(row)}; expected a prompt and a completion")
    return prompt_completion(row, used, prompt, answer_key)


def prompt_completion(row: dict, used: set[str], prompt: Messages, key: str) -> dict[str, Any]:
    if "label" in row:
        if columns.is_false(row["label"]):
            raise RowError("'label' is false: SFT would imitate a bad answer; remove the row")
        if columns.is_true(row["label"]):
            used.add("label")
    used.add(key)
    prompt, answer = _answer(row[key], key, prompt)
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
    if "kto_tag" in row and columns.is_false(row["kto_tag"]):
        raise RowError("'kto_tag' is false: SFT would imitate a bad answer; remove the row")
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


# --- pairs -----------------------------------------------------------------------------------------------------------


def pair_row(row: dict, used: set[str]) -> dict[str, Any]:
    """`{"prompt": messages, "chosen": messages, "rejected": messages}`, and `margin` and the template's fields."""
    sides = sides_of(row)
    if sides is None:
        raise RowError(f"found columns {_columns(row)}; expected one of: {PREFERENCE_SHAPES}{columns.format_hint(row)}")
    used.update(sides)
    if _holds_prompt(row, used, sides):
        prompt, chosen, rejected = _split_dialogues(row, used, sides)
        return make_pair(row, used, prompt, chosen, rejected)
    asked = _prompt(row, used)
    if asked is None:
        raise RowError(no_dialogue(sides[0]))
    (prompt, chosen), (other, rejected) = (_answer(row[side], side, asked) for side in sides)
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


def _holds_prompt(row: dict, used: set[str], sides: tuple[str, str]) -> bool:
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
    chosen, rejected = (_dialogue(row[side], side) for side in sides)
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


# --- parts -----------------------------------------------------------------------------------------------------------


def _prompt(row: dict, used: set[str]) -> Messages | None:
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
    return _answer(value, key, prompt)[1]


def _answer(value: Any, key: str, prompt: Messages) -> tuple[Messages, Messages]:
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
