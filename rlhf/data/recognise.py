"""Which format a file's rows have, by the content of the first of them, and the converter of one row."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from rlhf.data import columns, pair_rows, prompt_rows, row_parts, sft_rows, unpaired
from rlhf.data.format_options import DEFAULT, SCORES, FormatOptions, at
from rlhf.data.format_table import BY_NAME, FORMATS, Convert, Row
from rlhf.data.messages import RowError, answer_text
from rlhf.errors import UserError

FIRST_ROWS = 200  # rows by whose content a format is recognised
STANDARD = "standard"  # what a file is read as whose rows have one of the usual shapes, or none


@dataclass(frozen=True)
class Converter:
    """Converts one row of a file to a canonical row; stateless and picklable.

    Attributes:
        kind: "sft", "pairs", "unpaired" (`rlhf.data.unpaired.pair_unpaired` makes pairs of those) or "prompts".
        name: the format, for the screen.
        reading: the name of the conversion: a format's, or STANDARD.
        margin_of_scores: the user asked for margins that are the difference of the scores.
    """

    kind: str
    name: str
    reading: str
    options: FormatOptions
    margin_of_scores: bool = False

    @property
    def keeps_texts(self) -> bool:
        """Whether prompts that all answers repeat must stay in them: `format: plain` changes no text."""
        return self.reading == "plain"

    def __call__(self, row: Row, used: set[str]) -> Row:
        """The canonical row; adds the columns that it uses to `used`.

        Raises:
            RowError: the row does not fit.
        """
        if not self.options.rewrites:
            return self._convert(row, used)
        inner: set[str] = set()
        try:
            return self._convert(self.options.view(row), inner)
        except RowError as error:
            raise RowError(self.options.explain(str(error))) from None
        finally:
            used |= self.options.originals(inner)

    def _convert(self, row: Row, used: set[str]) -> Row:
        columns.reject_columns(row)
        new = _conversion(self.kind, self.reading)(row, used)
        scores = new.pop("scores", None)
        if self.margin_of_scores:
            scores = scores or columns.scores(row)
            if scores is None:
                raise RowError("`columns: {margin: scores}` needs the scores of both answers; this row has none")
            new["margin"] = float(scores[0] - scores[1])
        if self.options.keeps_subset and (subset := columns.subset(row, used)) is not None:
            new["subset"] = subset
        return new


def _conversion(kind: str, reading: str) -> Convert:
    if kind == "prompts":
        return prompt_rows.prompt_row
    if reading == STANDARD:
        return {"sft": sft_rows.sft_row, "pairs": pair_rows.pair_row, "unpaired": unpaired.kto_row}[kind]
    fmt = BY_NAME[reading]
    found = fmt.conversion(kind)
    if found is None and kind == "sft" and fmt.pairs:
        return functools.partial(_better_answer, fmt.pairs)
    assert found is not None, "recognise has checked it"
    return found


def _better_answer(convert: Convert, row: Row, used: set[str]) -> Row:
    """SFT on pairs: the better answer of each."""
    return sft_rows.preferred(convert(row, used), used)


# --- recognition -----------------------------------------------------------------------------------------------------


def converter(kind: str, first_rows: list[Row], options: FormatOptions = DEFAULT) -> Converter:
    """The converter of a file's rows, chosen by the content of its first rows.

    Args:
        kind: "sft", "pairs", "unpaired" or "prompts".
        first_rows: up to FIRST_ROWS rows.
        options: the user's `format`, `columns` and `roles`.

    Raises:
        UserError: the rows fit several formats that give other pairs (with their names), the named format has no such rows,
            or a named column does not exist. The caller adds the file.
    """
    rows = first_rows[:FIRST_ROWS]
    options.check(rows)
    scores = ("margin", SCORES) in options.columns and not any(columns.number(at(r, SCORES)) is not None for r in rows)
    views = [options.view(row) for row in rows]
    if kind == "prompts":
        _reject_rivals(kind, views, options)
        return Converter(kind, kind, STANDARD, options)
    if options.format is not None:
        fmt = BY_NAME[options.format]
        if fmt.conversion(kind) is None and not (kind == "sft" and fmt.pairs):
            able = ", ".join(f.name for f in FORMATS if f.conversion(kind))
            raise UserError(
                f"{options.place('format')}format: {fmt.name} gives no {_ROWS[kind]}; expected one of {able}"
            )
        return Converter(kind, fmt.name, fmt.name, options, scores)
    name, reading = _recognise(kind, views, options)
    return Converter(kind, name, reading, options, scores)


_ROWS = {"sft": "rows for SFT", "pairs": "pairs", "unpaired": "single answers with a judgement"}


def _recognise(kind: str, rows: list[Row], options: FormatOptions) -> tuple[str, str]:
    """(name of the format, name of its conversion)."""
    counts = {fmt.name: sum(map(fmt.matches, rows)) for fmt in FORMATS if fmt.conversion(kind)}
    found = _common(counts)
    if kind == "sft" and not found:
        counts = {fmt.name: sum(map(fmt.matches, rows)) for fmt in FORMATS if fmt.pairs and fmt.unpaired is None}
        found = _common(counts)
    if not found:
        return STANDARD, STANDARD
    if found[0] in _USUAL:
        _reject_rivals(kind, rows, options)
        usual = [name for name in found if name in _USUAL and name != "text"]
        if kind == "sft" and len(usual) > 1:
            _reject_other_readings(rows, usual)
        return found[0], "pairs" if kind == "sft" and found[0] == "pairs" else STANDARD
    if len(found) > 1:
        raise _ambiguous(found)
    return found[0], found[0]


_USUAL = ("messages", "sharegpt", "prompt-completion", "text", "pairs")


def _common(counts: dict[str, int]) -> list[str]:
    """The names of the formats of more than a tenth of the rows that the most frequent one has."""
    most = max(counts.values(), default=0)
    return [name for name, count in counts.items() if count and count * 10 > most]


def _ambiguous(names: list[str]) -> UserError:
    listed = "; ".join(f"{name} ({BY_NAME[name].about})" for name in names)
    return UserError(f"the rows fit several formats: {listed}. `format: {names[0]}`, or another of them, decides")


def _reject_rivals(kind: str, rows: list[Row], options: FormatOptions) -> None:
    """Raise UserError if two columns could be the prompt, or the answer of SFT, and most rows have different texts there."""
    named = {target for target, _ in options.columns}
    for target, names in (("prompt", row_parts.PROMPTS), ("completion", row_parts.ANSWERS)):
        if named & set(names) or (target == "completion" and kind != "sft"):
            continue
        differing: dict[tuple[str, str], int] = {}
        for row in rows:
            if target == "completion" and (row_parts.sides_of(row) or row_parts.dialogue_of(row)):
                continue
            texts = {name: row[name].strip() for name in names if isinstance(row.get(name), str) and row[name].strip()}
            first = next(iter(texts), "")
            for name in texts:
                if texts[name] not in texts[first] and texts[first] not in texts[name]:
                    differing[first, name] = differing.get((first, name), 0) + 1
        for (first, second), count in differing.items():
            if 2 * count > len(rows):
                raise UserError(
                    f"'{first}' and '{second}' could both be the {target}, and they differ; `columns: {{{target}: {first}}}` or "
                    f"`{{{target}: {second}}}` decides"
                )


def _reject_other_readings(rows: list[Row], names: list[str]) -> None:
    """Raise UserError if two readings of the same rows, such as `messages` and `prompt` + `completion`, differ."""
    differ = set()
    for row in rows:
        read = {}
        for name in names:
            if BY_NAME[name].matches(row):
                try:
                    read[name] = _spoken(_conversion("sft", name)(row, set()))
                except RowError:  # the rest of the rows decide
                    continue
        first = next(iter(read), "")
        differ |= {(first, name) for name in read if read[name] != read[first]}
    if differ:
        raise _ambiguous(sorted({name for pair in differ for name in pair}, key=names.index))


def _spoken(row: Row) -> tuple[str, str]:
    """(what precedes the last answer, the answer) of an SFT row, without system messages."""
    turns = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    spoken = [m for m in turns if m["role"] != "system"]
    return answer_text(spoken[:-1]), answer_text(spoken[-1:])
