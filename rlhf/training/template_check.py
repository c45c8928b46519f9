"""Before a start: whether the chat template renders all that the rows have, tools and calls above all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.config.recipe import Recipe
from rlhf.data.messages import KEPT_FIELDS
from rlhf.distributed.processes import say
from rlhf.errors import UserError

MOST_ROWS, MOST_OF_A_KIND = 2000, 3
_HARMLESS = (
    "name",
    "tool_call_id",
    "reasoning_content",
    "thinking",
    "reasoning",
    "role system",
)  # by design of some templates


def check_template(rows: Sequence[dict[str, Any]], tokenizer, recipe: Recipe) -> None:
    """Refuse a chat template that leaves out tools, their calls or results, and name other parts that it leaves out.

    Of a large data set every n-th row is inspected, and of rows with the same fields the first three.

    Raises:
        UserError: the template leaves out what the answers depend on, or can't render a row; with the row's place.
    """
    from rlhf.models.tokenizer import template_drops

    step = max(1, -(-len(rows) // MOST_ROWS))
    seen: dict[frozenset[str], int] = {}
    noted: dict[str, str] = {}
    for index in range(0, len(rows), step):
        row = rows[index]
        kind = _fields(row)
        if not kind or seen.get(kind, 0) >= MOST_OF_A_KIND:
            continue
        seen[kind] = seen.get(kind, 0) + 1
        place = row.get("place", f"row {index + 1}")
        try:
            dropped = template_drops(tokenizer, row)
        except UserError as error:
            raise UserError(f"{place}: {error}; set `chat_template` to one for such rows, or remove it") from None
        grave = [name for name in dropped if name not in _HARMLESS and not name.startswith("chat_template_kwargs")]
        if grave:
            raise UserError(
                f"{recipe.where('chat_template')}: the chat template renders {place} without its {' and '.join(grave)}: set "
                "`chat_template` to one that knows them, or remove them from the data"
            )
        for name in dropped:
            noted.setdefault(name, place)
    for name, place in noted.items():
        say(f"note: the chat template leaves out '{name}' (first: {place})")


def _fields(row: dict[str, Any]) -> frozenset[str]:
    """What a row has beside contents of users and assistants, by name."""
    found = {name for name in ("tools", "chat_template_kwargs") if row.get(name)}
    for part in ("prompt", "completion", "chosen", "rejected", "messages"):
        for message in row.get(part, ()):
            if len(message) > 2:
                found.update(name for name in KEPT_FIELDS if message.get(name))
            if message["role"] not in ("user", "assistant"):
                found.add(f"role {message['role']}")
    return frozenset(found)
