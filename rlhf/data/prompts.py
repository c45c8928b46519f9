"""Compare prompts: those that differ only in case, character width or white space are the same."""

from __future__ import annotations

import hashlib
import unicodedata

from rlhf.data.messages import Messages, message_text


def normalise_prompt(messages: Messages) -> str:
    """Roles and contents joined by \\x1f, after NFKC and casefold, with each run of white space as one space.

    System messages are ignored: the same question with another system message is the same prompt.

    Example: [{"role": "user", "content": " What\\n IS it? "}] -> "user\\x1fwhat is it?".
    """
    parts = []
    for message in messages:
        if message["role"] == "system":
            continue
        content = unicodedata.normalize("NFKC", message_text(message)).casefold()
        parts += [message["role"], " ".join(content.split())]
    return "\x1f".join(parts)


def prompt_hash(messages: Messages) -> bytes:
    """The first 16 bytes of the sha256 of the normalised prompt."""
    return hashlib.sha256(normalise_prompt(messages).encode("utf-8")).digest()[:16]
