"""Answers that are judged one per row -> pairs of a better and a worse answer to one prompt.

KTO rows have a thumb up or down; HelpSteer2 and its like a score. No stage takes them; `pair_unpaired` makes pairs of them.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rlhf.data import columns
from rlhf.data.messages import RowError, answer_text, describe, has, messages
from rlhf.data.row_parts import ANSWERS, LABELS, SIDES
from rlhf.data.sft_rows import prompt_completion_row


def label_of(row: dict) -> str | None:
    """The column with a thumb up or down; None if the row has none."""
    for key in LABELS:
        if key in row and (_is_up(row[key]) or row[key] == 0 or columns.is_false(row[key])):
            return key
    return None


def _is_up(value: Any) -> bool:
    return value == 1 or columns.is_true(value)


def is_kto(row: dict) -> bool:
    answer = any(has(row, key) for key in (*ANSWERS, "conversations", "messages"))
    return answer and label_of(row) is not None and not _is_pair(row)


def is_helpsteer(row: dict) -> bool:
    return has(row, "prompt") and has(row, "response") and columns.number(row.get("helpfulness")) is not None


def _is_pair(row: dict) -> bool:
    return any(has(row, name) for names in SIDES for name in names[1:])


def kto_row(row: dict, used: set[str]) -> dict[str, Any]:
    """`{"prompt": messages, "completion": messages, "label": bool}`."""
    key = label_of(row)
    if key is None:
        raise RowError(f"'label' is {describe(row.get('label'))}; expected true or false")
    used.add(key)
    dialogue = next((k for k in ("conversations", "messages") if has(row, k)), None)
    if dialogue and not any(has(row, k) for k in ANSWERS):
        used.add(dialogue)
        found = columns.add_system(row, used, messages(row[dialogue], dialogue))
        if len(found) < 2 or found[-1]["role"] != "assistant":
            raise RowError(f"'{dialogue}' must hold a prompt and end with the assistant's answer")
        new = {
            "prompt": found[:-1],
            "completion": found[-1:],
            **columns.template_fields(row, used, dialogue != "messages"),
        }
    else:
        new = prompt_completion_row({**row, key: None}, used)
    return {**new, "label": _is_up(row[key])}


def helpsteer_row(row: dict, used: set[str]) -> dict[str, Any]:
    """`{"prompt": messages, "completion": messages, "score": helpfulness}`."""
    score = columns.number(row.get("helpfulness"))
    if score is None:
        raise RowError(f"'helpfulness' is {describe(row.get('helpfulness'))}; expected a number")
    used.add("helpfulness")
    return {**prompt_completion_row(row, used), "score": score}


def refuse_kto(row: dict, used: set[str]) -> dict[str, Any]:
    raise RowError(_refusal(row, "a KTO row, with one answer and its thumb up or down"))


def refuse_helpsteer(row: dict, used: set[str]) -> dict[str, Any]:
    raise RowError(_refusal(row, "a HelpSteer row, with one answer and its scores"))


def _refusal(row: dict, what: str) -> str:
    return (
        f"found columns {', '.join(map(str, row))}; this looks like {what}, and this stage needs pairs: `rlhf data convert` "
        "pairs the better with the worse answers to each prompt"
    )


# --- pairing ---------------------------------------------------------------------------------------------------------


@dataclass
class Leftovers:
    """What `pair_unpaired` could not pair.

    Attributes:
        better, worse: answers without a worse or a better one to the same prompt.
        equal: answers that are equal to their counterpart, or have its score; both are left out.
        first: the place of the first of each.
    """

    pairs: int = 0
    better: int = 0
    worse: int = 0
    equal: int = 0
    first: dict[str, str] = field(default_factory=dict)

    def count(self, name: str, place: str, number: int = 1) -> None:
        setattr(self, name, getattr(self, name) + number)
        self.first.setdefault(name, place)

    def __str__(self) -> str:
        words = {
            "better": "good answers without a bad one to the same prompt",
            "worse": "bad answers without a good one",
            "equal": "answers equal to, or judged like, their counterpart",
        }
        left = [f"{getattr(self, k):,} {v} (first: {self.first[k]})" for k, v in words.items() if getattr(self, k)]
        return f"{self.pairs:,} pairs" + (f"; left out: {', '.join(left)}" if left else "")


@dataclass
class _Waiting:
    """An answer that waits for its counterpart."""

    place: str
    row: dict[str, Any]


def pair_unpaired(
    rows: Iterable[tuple[str, dict[str, Any]]], leftovers: Leftovers | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pair judged answers (place, `kto_row` or `helpsteer_row`) to one prompt in the order in which they come.

    With thumbs, each good answer is paired with the next bad one to its prompt, or the other way round. With scores, each
    two answers to a prompt are a pair, the higher score is chosen. Only answers that still wait are in memory.

    Args:
        leftovers: is filled in; complete when the iterator ends.

    Yields:
        (place of the good answer, canonical pair)

    Example: rows a (up), b (up), c (down), d (down) to one prompt -> pairs (a, c), (b, d).
    """
    leftovers = Leftovers() if leftovers is None else leftovers
    waiting: defaultdict[bytes, deque[_Waiting]] = defaultdict(deque)
    for place, row in rows:
        key = _prompt_key(row)
        queue = waiting[key]
        if not queue or ("label" in row and queue[0].row["label"] == row["label"]):
            queue.append(_Waiting(place, row))
            continue
        other = queue.popleft()
        if not queue:
            del waiting[key]
        this = _Waiting(place, row)
        a, b = (_judgement(w.row) for w in (this, other))
        good, bad = (this, other) if a > b else (other, this)
        if a == b or answer_text(good.row["completion"]).strip() == answer_text(bad.row["completion"]).strip():
            leftovers.count("equal", place, 2)
            continue
        leftovers.pairs += 1
        more = {k: v for k, v in good.row.items() if k in ("tools", "chat_template_kwargs")}
        pair = {"prompt": good.row["prompt"], "chosen": good.row["completion"], "rejected": bad.row["completion"]}
        yield good.place, {**pair, **more}
    for queue in waiting.values():
        for left in queue:
            leftovers.count("better" if left.row.get("label", True) else "worse", left.place)


def _judgement(row: dict[str, Any]) -> float:
    return float(row["label"] if "label" in row else row["score"])


def _prompt_key(row: dict[str, Any]) -> bytes:
    """16 bytes of all that the model reads before the answer."""
    read = [row["prompt"], row.get("tools"), row.get("chat_template_kwargs")]
    return hashlib.blake2b(json.dumps(read, sort_keys=True).encode(), digest_size=16).digest()
