"""Rows in the field's formats -> TRL's canonical conversational formats, with errors that name the line.

Everything is converted to messages, so that one chat template renders every prompt and answer the same way in SFT,
reward modelling, DPO, evaluation and chat. recognise.py has the conversion of a row; here are those of entire sources.
"""

from __future__ import annotations

from rlhf.data.format_options import DEFAULT, FormatOptions
from rlhf.data.format_table import Row
from rlhf.data.messages import RowError
from rlhf.data.pair_rows import PREFERENCE_SHAPES  # noqa: F401 (part of this module's face)
from rlhf.data.reading import Reading, each, without_repeated_prompts
from rlhf.data.recognise import FIRST_ROWS, Converter, converter
from rlhf.data.sft_rows import SFT_SHAPES  # noqa: F401
from rlhf.data.sources import Source
from rlhf.errors import UserError


def source_converter(kind: str, source: Source, options: FormatOptions) -> Converter:
    """The converter of a source's rows; its errors name the source."""
    try:
        return converter(kind, source.rows[:FIRST_ROWS], options)
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from None


def sft_rows(source: Source, reading: Reading | None = None, options: FormatOptions = DEFAULT) -> list[Row]:
    """Canonical SFT rows: `{"prompt": messages, "completion": messages}`, `{"messages": …}` or `{"text": …}`, with `tools` and
    `chat_template_kwargs` where a row has them.

    Raises:
        UserError: an ambiguous format; or file and line of the first row with an unknown format, an empty text or wrong roles.
    """
    reading = reading or Reading()
    convert_row = source_converter("sft", source, options)
    first: dict[str, set[str]] = {}

    def convert(row: Row, used: set[str]) -> Row:
        new = convert_row(row, used)
        shape = first.setdefault("shape", new.keys() & _SHAPE)
        if new.keys() & _SHAPE != shape:
            found = sorted(new.keys() & _SHAPE)
            raise RowError(f"this row gives {found}, but the first row gives {sorted(shape)}; use one format")
        return new

    rows = each(source, convert, reading)
    return rows if convert_row.keeps_texts else without_repeated_prompts(rows, ("completion",), reading)


_SHAPE = frozenset(("prompt", "completion", "messages", "text"))


def preference_rows(source: Source, reading: Reading | None = None, options: FormatOptions = DEFAULT) -> list[Row]:
    """Canonical pairs: `{"prompt": messages, "chosen": messages, "rejected": messages}`, with `margin`, `tools` and
    `chat_template_kwargs` where a row has them.

    Raises:
        UserError: an ambiguous format; or file and line of the first row with an unknown format, an empty text, wrong roles or
            equal answers.
    """
    reading = reading or Reading()
    convert = source_converter("pairs", source, options)
    rows = each(source, convert, reading)
    return rows if convert.keeps_texts else without_repeated_prompts(rows, ("chosen", "rejected"), reading)


def join_chosen_rejected(
    chosen: Source, rejected: Source, reading: Reading | None = None, options: FormatOptions = DEFAULT
) -> Source:
    """Join accepted and rejected answers by prompt, in the order of the accepted ones.

    Rows are prompt (or instruction + input) and response (or output, completion, answer). Several answers to one
    prompt are paired in order.

    Raises:
        UserError: an accepted answer without a rejected one for the same prompt, or vice versa.
    """
    unmatched: dict[str, list[int]] = {}
    sides = [Reading(), Reading()]
    convert = source_converter("sft", rejected, options)

    def rejected_row(row: Row, used: set[str]) -> Row:
        new = convert(row | {"label": None}, used)  # `label: false` is expected here
        used.add("label")
        return new

    rejected_rows = each(rejected, rejected_row, sides[1])
    for index, row in enumerate(rejected_rows):
        unmatched.setdefault(_asked(row), []).append(index)
    pairs: list[Row] = []
    for index, row in enumerate(each(chosen, source_converter("sft", chosen, options), sides[0])):
        if "prompt" not in row:
            raise UserError(
                f"{chosen.where(index)}: expected prompt + response, to be joined with the rejected answers"
            )
        matches = unmatched.get(_asked(row))
        if not matches:
            raise UserError(
                f"{chosen.where(index)}: no answer to this prompt in {rejected.name}; each prompt needs one in both"
            )
        other = rejected_rows[matches.pop(0)]
        more: Row = {key: row[key] for key in ("tools", "chat_template_kwargs") if key in row}
        pairs.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"], **more})
    left = [index for indices in unmatched.values() for index in indices]
    if left:
        raise UserError(
            f"{rejected.where(min(left))}: no answer to this prompt in {chosen.name}; each prompt needs one in both"
        )
    if reading:
        for side in sides:
            reading.num_unused.update(side.num_unused)
    digest = chosen.digest[:32] + rejected.digest[:32]
    return Source(chosen.name, pairs, chosen.lines, digest)


def _asked(row: Row) -> str:
    """What the model reads before the answer."""
    return repr([row.get(key) for key in ("prompt", "tools", "chat_template_kwargs")])


def reject_margins_in_some_rows(rows: list[Row], places: list[str]) -> None:
    """Raise UserError if only some rows have a margin: the reward model's loss needs all or none."""
    have = [place for row, place in zip(rows, places, strict=True) if "margin" in row]
    if have and len(have) < len(rows):
        without = next(place for row, place in zip(rows, places, strict=True) if "margin" not in row)
        raise UserError(
            f"{without}: no 'margin', but {len(have):,} of {len(rows):,} rows have one (first: {have[0]}); set it in all rows "
            "or in none"
        )
