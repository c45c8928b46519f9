"""Which rows are held out, decided by their prompt alone, so that all stages and evaluations of the same data agree.

Also the prompts that a run was trained on, saved with its model, so that an evaluation can find contaminated prompts.
"""

from __future__ import annotations

import bisect
import hashlib
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.data.messages import Messages
from rlhf.data.prompts import normalise_prompt, prompt_hash
from rlhf.errors import UserError, quote
from rlhf.files import write_file

TRAIN_PROMPTS = "prompts.hashes"  # 8 bytes per prompt, sorted: 80 MB for ten million
BYTES = 8


def prompt_messages(row: dict[str, Any]) -> Messages:
    """The messages before a row's answer; the entire text if it has no turns."""
    if "text" in row:
        return [{"role": "user", "content": row["text"]}]
    return row["prompt"] if "prompt" in row else row["messages"][:-1]


def opening(row: dict[str, Any]) -> int:
    """A number in [0, 2^64): the hash of the first message of a row's dialogue that isn't the system's.

    It decides whether a row is held out, so that a dialogue and its continuations are on the same side of the split.
    """
    spoken = [message for message in prompt_messages(row) if message["role"] != "system"]
    return int.from_bytes(hashlib.sha256(normalise_prompt(spoken[:1]).encode("utf-8")).digest()[:8], "big")


def held_out(rows: list[dict[str, Any]], heldout: float) -> list[bool]:
    """For each canonical row, whether it is held out.

    Args:
        heldout: a fraction between 0 and 1: about that fraction of the prompts, at least one; a prompt stays on its
            side when rows are added. Or a number of prompts, from 1 on: exactly that many, if there are more; which ones
            depends on all prompts present. Neither depends on the order of the rows or on their answers.

    Example: held_out([{"prompt": [user "a"]}, {"prompt": [user "b"]}, {"prompt": [user "A"]}], 1) -> [True, False, True].
    """
    numbers = [opening(row) for row in rows]
    if heldout < 1:
        limit = max(int(heldout * 2**64), min(numbers, default=0) + 1)
        return [number < limit for number in numbers]
    smallest = set(sorted(set(numbers))[: int(heldout)])
    return [number in smallest for number in numbers]


def check_heldout(heldout: float, rows: list[dict[str, Any]], where: str, name: str) -> list[bool]:
    """`held_out`, rejecting a split that leaves one side empty.

    Raises:
        UserError: with the numbers of rows and prompts.
    """
    sides = held_out(rows, heldout)
    if rows and not all(sides):
        return sides
    prompts = len({opening(row) for row in rows})
    raise UserError(
        f"{where}: heldout: {heldout:g} leaves no row of {name} to train on: its {len(rows):,} rows have {prompts:,} "
        f"different prompts (first messages); use a smaller fraction or number, or more data"
    )


# --- what a run was trained on ---------------------------------------------------------------------------------------


def prompts_of(row: dict[str, Any]) -> Iterable[bytes]:
    """16-byte hashes of all prompts whose answer a row trains: a dialogue of several turns has one per answer."""
    if "messages" not in row:
        yield prompt_hash(prompt_messages(row))
        return
    for number, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            yield prompt_hash(row["messages"][:number])


def write_train_prompts(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write the prompts of the training rows into a run folder, hashed and sorted (main rank only)."""
    hashes = sorted({prompt[:BYTES] for row in rows for prompt in prompts_of(row)})
    write_file(folder / TRAIN_PROMPTS, b"".join(hashes))


def trained_on(folder: Path, rows: list[dict[str, Any]]) -> list[bool] | None:
    """For each row, whether the run in `folder` was trained on its prompt; None if the run has not saved its prompts.

    The file is memory-mapped and searched, not loaded.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / TRAIN_PROMPTS
    if not file.is_file():
        return None
    size = file.stat().st_size
    if size % BYTES:
        raise UserError(
            f"{quote(str(file))} has {size} bytes, not a multiple of {BYTES}: it is damaged, so the trained prompts are "
            "unknown; remove it to continue without"
        )
    if not size:
        return [False] * len(rows)
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as known:
        return [_is_in(known, prompt_hash(prompt_messages(row))[:BYTES], size // BYTES) for row in rows]


def _is_in(known, wanted: bytes, count: int) -> bool:
    at = lambda i: known[i * BYTES : (i + 1) * BYTES]  # noqa: E731
    found = bisect.bisect_left(range(count), wanted, key=at)
    return found < count and at(found) == wanted
