"""`rlhf data show`: the exact tokens of some rows, by whether they are trained on; chosen beside rejected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from rlhf.curation.encoder import Encoder, encoder_of
from rlhf.curation.screen import Screen, note, plural, safe, shown
from rlhf.curation.target import open_target
from rlhf.data.store import Rows
from rlhf.errors import UserError, one_line, quote
from rlhf.training.tokenise import Counts, Tokenise

SIDE_BY_SIDE = 100  # columns from which chosen and rejected are beside each other
STYLES = {"read": ("grey50", "grey70"), "trained": ("green", "bold green")}  # every other token
SPECIAL = "reverse"


@dataclass(frozen=True)
class Piece:
    """Text of one token, or of some that make up one character.

    Attributes:
        ids: its tokens.
        trained: the loss is computed on it.
        special: a special token.
    """

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool


def show(options: Any, rest: list[str]) -> None:
    """Print the tokens of the first rows, or of one that is named.

    Raises:
        UserError: no tokenizer, or no such row.
    """
    target = open_target(options.target, options, rest)
    data = target.read()
    encoder = encoder_of(target, data, options.max_length)
    if isinstance(encoder, str):
        raise UserError(
            "tokens need a tokenizer: give --model NAME_OR_FOLDER, or a recipe" if "--model" in encoder
            else f"tokens need a tokenizer: {encoder}"
        )  # fmt: skip
    rows = data.train
    numbers = [find_row(rows, options.row)] if options.row else list(range(min(options.n, len(rows))))
    screen = Screen()
    screen.print(_legend(screen, target.stage, encoder))
    for number in numbers:
        _show_row(screen, rows[number], number, encoder)
    if not options.row and len(rows) > len(numbers):
        note(f"{plural(len(rows) - len(numbers), 'more row')}; -n N shows more of them, --row FILE:LINE one")


def find_row(rows: Rows, place: str) -> int:
    """The number of the row at `file:line` (or `line` alone); of rows without lines, their number from 1.

    Raises:
        UserError: no such row, with the nearest.
    """
    match = re.fullmatch(r"(?s)(?:(.*)(?::|, row ))?([0-9]{1,15})", place)
    if not match:
        raise UserError(f"--row is {quote(place)}; expected FILE:LINE, or a line's number alone")
    lines = rows.column("line") + _offsets(rows)
    hits = np.flatnonzero(lines == int(match[2]))
    same = [
        int(i)
        for i in hits
        if match[1] in (None, rows.place(int(i)).removesuffix(f":{match[2]}").removesuffix(f", row {match[2]}"))
    ]
    if same:
        return same[0]
    if not len(rows):
        raise UserError("--row: there are no rows")
    nearest = int(np.abs(lines - int(match[2])).argmin())
    raise UserError(
        f"--row: no training row at {quote(place, 300)}: it may be held out, skipped, or not selected; the nearest is "
        f"{quote(rows.place(nearest), 300)}"
    )


def _offsets(rows: Rows) -> np.ndarray:
    """What is added to each row's line."""
    sizes = [sum(batch.num_rows for batch in part.batches) for part in rows.parts]
    every = np.repeat([part.line_offset for part in rows.parts], sizes).astype(np.int64)
    return every if rows.indices is None else every[rows.indices]


# --- tokens to text --------------------------------------------------------------------------------------------------


def pieces(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool]) -> list[Piece]:
    """The text of each token; a token that ends within a character is joined with the next ones."""
    special = set(tokenizer.all_special_ids) | {n for n, t in tokenizer.added_tokens_decoder.items() if t.special}
    found, begin, start = [], 0, 0  # text before `begin` is settled; decoding begins at `start`, some tokens earlier
    decode = lambda part: tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)  # noqa: E731
    for end in range(1, len(ids) + 1):
        before, text = decode(ids[start:begin]), decode(ids[start:end])
        if text.endswith("\ufffd") and end < len(ids) and end - begin < 8:
            continue
        one = end - begin == 1 and ids[begin] in special
        found.append(Piece(text[len(before) :], tuple(ids[begin:end]), any(trained[begin:end]), one))
        start, begin = max(0, end - 4), end
    return found


def _sequences(encoder: Encoder, row: dict[str, Any]) -> tuple[dict[str, list[Piece]], str]:
    """(title -> tokens, what to say of the row)"""
    counts = Counts()
    try:
        columns = Tokenise(encoder.tokenizer, encoder.settings)([row], 0, counts)
    except UserError as error:
        return {}, one_line(error, 300)
    settings, tokenizer = encoder.settings, encoder.tokenizer
    if not columns:
        return {}, f"left out of training: max_length={settings.max_length} has no room for it"
    ids = {name: values[0] for name, values in columns.items()}
    said = "cut by max_length" if counts.cut[0] else ""
    said += ("; " if said else "") + "chosen and rejected have the same tokens" if counts.same[0] else ""
    if "input_ids" in ids:
        return {"": pieces(tokenizer, ids["input_ids"], [label != -100 for label in ids["labels"]])}, said
    found = {}
    for side in ("chosen", "rejected"):
        prompt = ids.get("prompt_ids", [])
        whole, trained = prompt + ids[f"{side}_ids"], [False] * len(prompt) + [True] * len(ids[f"{side}_ids"])
        if settings.max_length is not None:
            cut = (
                slice(None, settings.max_length)
                if settings.truncation_mode == "keep_start"
                else slice(-settings.max_length, None)
            )
            whole, trained = whole[cut], trained[cut]
        if settings.stage == "reward":  # the score is read at the last token
            trained = [False] * (len(whole) - 1) + [True] * bool(whole)
        found[side] = pieces(tokenizer, whole, trained)
    return found, said


# --- the screen ------------------------------------------------------------------------------------------------------


def _legend(screen: Screen, stage: str, encoder: Encoder) -> Text:
    what = "the score is read here" if stage == "reward" else "trained on"
    limit = encoder.settings.max_length
    head = (
        f"{stage}, tokenizer of {shown(encoder.model, 120)}, max_length {limit if limit is not None else 'unlimited'}\n"
    )
    if screen.color_system:
        return Text.assemble(head, ("read only", STYLES["read"][0]), "  ", (what, STYLES["trained"][1]), "  ",
                             ("special token", SPECIAL), "  shades change from token to token")  # fmt: skip
    return Text(head + f"[[ {what} ]]  | between tokens  ⏎ line break")


def _show_row(screen: Screen, row: dict[str, Any], number: int, encoder: Encoder) -> None:
    found, said = _sequences(encoder, row)
    sizes = ", ".join(
        f"{title + ' ' if title else ''}{plural(_tokens(part), 'token')} ({_tokens(p for p in part if p.trained):,} trained on)"
        for title, part in found.items()
    )
    screen.print()
    place, line = shown(row["place"], 300), "─" if screen.color_system else "-"
    screen.print(Text.assemble((place, "bold"), " ", line * max(screen.width - len(place) - 1, 3)), soft_wrap=True)
    for line in filter(None, (sizes, said)):
        screen.print(Text(shown(line), "dim"))
    texts = {title: rendered(part, bool(screen.color_system)) for title, part in found.items()}
    if len(texts) == 2 and screen.width >= SIDE_BY_SIDE:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
        for title in texts:
            table.add_column(title, ratio=1, overflow="fold")
        table.add_row(*texts.values())
        screen.print(table, soft_wrap=False)
        return
    for title, text in texts.items():
        if title:
            screen.print(Text(title, "bold"))
        screen.print(text, soft_wrap=False, overflow="fold")


def _tokens(part: Any) -> int:
    return sum(len(piece.ids) for piece in part)


def rendered(part: list[Piece], colours: bool) -> Text:
    """Tokens as text: in colours, or with `[[` and `]]` around what is trained on and `|` between tokens."""
    text, inside = Text(), False
    for number, piece in enumerate(part):
        words = safe(piece.text).replace("\n", "⏎\n")
        if colours:
            style = STYLES["trained" if piece.trained else "read"][number % 2]
            text.append(words, f"{style} {SPECIAL}" if piece.special else style)
            continue
        if piece.trained != inside:
            text.append(" [[" if piece.trained else "]] ")
            inside = piece.trained
        elif number:
            text.append("|")
        text.append(words)
    return text.append("]]") if inside else text
