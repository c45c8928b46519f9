"""What later steps ask of a canonical row, as numbers: computed once, when the row is prepared, and kept beside it."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Any, NamedTuple

from rlhf.data.messages import answer_text, message_text

# Markers that chat templates write around turns; inside a text, tokenizers read them as real ones.
MARKERS = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|begin_of_text|end_of_text|endoftext|user|assistant|system|"
    r"end|START_OF_TURN_TOKEN|END_OF_TURN_TOKEN)\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</?s>|"
    r"^### (?:Instruction|Response):",
    re.MULTILINE,
)
# U+FFFD, and UTF-8 that was read as Latin-1 ("Ã©", "â€™").
GARBLED = re.compile(
    "\ufffd|[\u00c3\u00c2][\u0080-\u00bf]|\u00e2[\u0080\u20ac][\u0080-\u00bf\u2018-\u201d\u0153\u02dc\u2122]"
)
NO_ANSWER = {"nan", "none", "null", "n/a"}  # what tables write for an empty field
BLANKS = 64  # characters by which answers that differ only in white space differ in length at most
ANSWERS = ("completion", "chosen", "rejected")

# What is noticed in a row: one bit each, by the name of its count in DataSummary.
FLAGS = ("markers", "garbled", "turn_order", "no_answer", "negative_margins", "blanks_only", "low_scores", "equal_scores",
         "repeats", "chosen_longer", "has_margin")  # fmt: skip
BIT = {name: 1 << number for number, name in enumerate(FLAGS)}


Turn = tuple[str, str]  # (role, all text of the message)


class Features(NamedTuple):
    """Of one row.

    Attributes:
        chars: characters of all its texts.
        flags: bits of FLAGS.
        opening: in [0, 2^64): hash of the first message that isn't the system's; decides whether a row is held out, so that
            a dialogue and its continuations are on the same side of the split.
        own: hash of the row's prompt and answers.
        flipped: `own` of the row with chosen and rejected swapped; 0 if it is not a pair.
        prompts: hashes of all prompts whose answer the row trains (a dialogue of several turns has one per answer).
    """

    chars: int
    flags: int
    opening: int
    own: int
    flipped: int
    prompts: list[int]


def features(row: dict[str, Any]) -> Features:
    """The features of a canonical row."""
    messages = prompt_messages(row) if "messages" not in row else row["messages"]
    turns = [(message["role"], message_text(message)) for message in messages]
    answers = [answer_text(row[side]) for side in ANSWERS if side in row]
    own, flipped = _hashes("\x1e".join("\x1f".join(turn) for turn in turns), answers)
    if "messages" in row:
        prompts = [prompt_hash(turns[:n]) for n, (role, _) in enumerate(turns) if role == "assistant"]
        turns_before = turns[:-1]
    else:
        prompts, turns_before = [prompt_hash(turns)], turns
    spoken = [turn for turn in turns_before if turn[0] != "system"]
    opening = prompts[0] if len(prompts) == 1 == len(spoken) else prompt_hash(spoken[:1])
    chars = sum(map(len, answers)) + sum(len(text) for _, text in turns)
    return Features(chars, _flags(row, turns, answers), opening, own, flipped, prompts)


def _flags(row: dict[str, Any], turns: list[Turn], answers: list[str]) -> int:
    found = 0
    for text in (*answers, *(text for _, text in turns)):
        # most texts have none of these: searching for MARKERS is ten times as slow
        if ("<" in text or "[" in text or "###" in text) and MARKERS.search(text):
            found |= BIT["markers"]
        if not text.isascii() and GARBLED.search(text):
            found |= BIT["garbled"]
    if "text" not in row and is_odd([role for role, _ in turns]):
        found |= BIT["turn_order"]
    if any(len(answer) < 5 and answer.lower() in NO_ANSWER for answer in answers):
        found |= BIT["no_answer"]
    if "margin" in row:
        found |= BIT["has_margin"] | (BIT["negative_margins"] if row["margin"] < 0 else 0)
    if len(answers) == 2:
        if len(answers[0]) > len(answers[1]):
            found |= BIT["chosen_longer"]
        # most answers differ in their first word: the others are split whole
        if (
            abs(len(answers[0]) - len(answers[1])) < BLANKS
            and answers[0].split(None, 1)[:1] == answers[1].split(None, 1)[:1]
            and (answers[0].split() == answers[1].split())
        ):
            found |= BIT["blanks_only"]
    return found


def is_odd(roles: list[str]) -> bool:
    """Whether turns are in an odd order: two of one role, the assistant first, or a late system message."""
    spoken = [role for role in roles if role not in ("system", "developer")]
    return (
        "system" in roles[1:]
        or spoken[:1] == ["assistant"]
        or any(
            a == b != "tool" for a, b in zip(spoken, spoken[1:], strict=False)
        )  # several tools may be called at once
    )


def _hashes(start: str, answers: list[str]) -> tuple[int, int]:
    base = hashlib.blake2b(start.encode(), digest_size=8)
    pair = len(answers) == 2
    flipped = base.copy() if pair else None
    base.update("\x1f".join(answers).encode())
    if flipped is None:
        return int.from_bytes(base.digest(), "big"), 0
    flipped.update("\x1f".join(reversed(answers)).encode())
    return int.from_bytes(base.digest(), "big"), int.from_bytes(flipped.digest(), "big")


# --- prompts ---------------------------------------------------------------------------------------------------------


def prompt_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages before a row's answer; the entire text if it has no turns."""
    if "text" in row:
        return [{"role": "user", "content": row["text"]}]
    return row["prompt"] if "prompt" in row else row["messages"][:-1]


def normalise_prompt(turns: list[Turn]) -> str:
    """Roles and texts joined by \\x1f, after NFKC and casefold, with each run of white space as one space.

    System messages are ignored: the same question with another system message is the same prompt.

    Example: [("user", " What\\n IS it? ")] -> "user\\x1fwhat is it?".
    """
    parts = []
    for role, content in turns:
        if role == "system":
            continue
        content = content.lower() if content.isascii() else unicodedata.normalize("NFKC", content).casefold()
        parts += [role, " ".join(content.split())]
    return "\x1f".join(parts)


def prompt_hash(turns: list[Turn]) -> int:
    """The first 8 bytes of the sha256 of the normalised prompt, as a number."""
    return int.from_bytes(hashlib.sha256(normalise_prompt(turns).encode("utf-8")).digest()[:8], "big")
