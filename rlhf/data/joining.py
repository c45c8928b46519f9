"""Accepted and rejected answers, in a file each, joined by prompt to pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlhf.data.format_options import DEFAULT, FormatOptions
from rlhf.data.prepare import Prepared, prepare
from rlhf.data.sources import Source
from rlhf.data.store import Rows
from rlhf.errors import UserError


def join_chosen_rejected(chosen: Source, rejected: Source, options: FormatOptions = DEFAULT) -> tuple[Prepared, str]:
    """Pairs of accepted and rejected answers to the same prompt, in the order of the accepted ones.

    Rows are prompt (or instruction + input) and response (or output, completion, answer). Several answers to one
    prompt are paired in order.

    Returns:
        (the pairs, the digest of both files)

    Raises:
        UserError: an accepted answer without a rejected one for the same prompt, or vice versa.
    """
    sides = [prepare(source, "sft", options) for source in (chosen, _without_labels(rejected))]
    accepted, other = (side.rows for side in sides)
    partners = _partners(accepted, other, chosen.name, rejected.name)

    def pairs() -> Iterator[tuple[dict[str, Any], int]]:
        lines = accepted.column("line")
        for index, row in enumerate(accepted):
            answer = other[int(partners[index])]["completion"]
            more: dict[str, Any] = {k: row[k] for k in ("tools", "chat_template_kwargs") if k in row}
            yield {"prompt": row["prompt"], "chosen": row["completion"], "rejected": answer, **more}, int(lines[index])

    digest = chosen.digest[:32] + rejected.digest[:32]
    source = Source(chosen.name, None, None, digest, read=pairs, has_lines=chosen.has_lines,
                    num_bytes=chosen.num_bytes + rejected.num_bytes)  # fmt: skip
    joined = prepare(source, "pairs", bad_rows="error")
    unused = {**sides[0].num_unused, **{k: n for k, n in sides[1].num_unused.items() if k != "label"}}
    return Prepared(joined.rows, joined.skipped, unused, joined.stripped, joined.key), digest


def _without_labels(source: Source) -> Source:
    """The rejected answers, in which `label: false` is expected."""

    def read() -> Iterator[tuple[dict[str, Any], int]]:
        for row, line in source.stream():
            yield {key: value for key, value in row.items() if key != "label"}, line

    digest = hashlib.sha256(f"without label {source.digest}".encode()).hexdigest()
    return Source(source.name, None, None, digest, read=read, has_lines=source.has_lines, num_bytes=source.num_bytes)


def _partners(accepted: Rows, other: Rows, name: str, other_name: str) -> np.ndarray:
    """For each accepted answer the row of its rejected one; holds 8 bytes a row and one prompt's rows at a time."""
    keys, other_keys = (_prompt_keys(rows, others) for rows, others in ((accepted, "rejected"), (other, "accepted")))
    order, other_order = (np.argsort(k, kind="stable") for k in (keys, other_keys))
    ranks, other_ranks = (_rank_among_equals(k, o) for k, o in ((keys, order), (other_keys, other_order)))
    partners = _match(keys, ranks, other_keys, other_ranks, other_order)
    if (partners < 0).any():
        where = accepted.place(int((partners < 0).argmax()))
        raise UserError(f"{where}: no answer to this prompt in {other_name}; each prompt needs one in both")
    left = np.ones(len(other), bool)
    left[partners] = False
    if left.any():
        where = other.place(int(left.argmax()))
        raise UserError(f"{where}: no answer to this prompt in {name}; each prompt needs one in both")
    return partners


def _prompt_keys(rows: Rows, others: str) -> np.ndarray:
    """8 bytes of a hash of what each row's answer is given to: the exact prompt, tools and template variables.

    Args:
        others: the answers of the other file, for the message: "rejected" or "accepted".
    """
    keys = np.zeros(len(rows), np.uint64)
    for index, row in enumerate(rows):
        if "prompt" not in row:
            raise UserError(f"{row['place']}: expected prompt + response, to be joined with the {others} answers")
        asked = [row.get(key) for key in ("prompt", "tools", "chat_template_kwargs")]
        exact = json.dumps(asked, sort_keys=True).encode()
        keys[index] = int.from_bytes(hashlib.blake2b(exact, digest_size=8).digest(), "big")
    return keys


def _rank_among_equals(keys: np.ndarray, order: np.ndarray) -> np.ndarray:
    """How many rows before each have the same key."""
    if not len(keys):
        return np.zeros(0, np.int64)
    ordered = keys[order]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ranks = np.empty(len(keys), np.int64)
    ranks[order] = np.arange(len(keys)) - np.repeat(begins, np.diff(np.append(begins, len(keys))))
    return ranks


def _match(keys, ranks, other_keys, other_ranks, other_order) -> np.ndarray:
    """The row of `other` with the same key and rank; -1 if there is none."""
    ordered = other_keys[other_order]  # equal keys in the order of their ranks
    at = np.searchsorted(ordered, keys) + ranks
    inside = np.minimum(at, max(len(ordered) - 1, 0))
    if not len(ordered):
        return np.full(len(keys), -1, np.int64)
    equal = (at < len(ordered)) & (ordered[inside] == keys)
    return np.where(equal, other_order[inside], -1)
