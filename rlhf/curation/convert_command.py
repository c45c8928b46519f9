"""`rlhf data convert`: any data as canonical rows, in JSON Lines or Parquet; single judged answers as pairs."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.curation.export import SOURCE, output_file, write_json_lines, write_parquet, write_rows
from rlhf.curation.screen import command, note, plural, shown
from rlhf.curation.target import Target, in_file_order, is_judged, open_target
from rlhf.data.convert import first_rows
from rlhf.data.messages import RowError
from rlhf.data.recognise import converter
from rlhf.data.rows import format_options
from rlhf.data.sources import Source, place
from rlhf.data.unpaired import Leftovers, pair_unpaired
from rlhf.errors import UserError

Row = dict[str, Any]


def convert(options: Any, rest: list[str]) -> None:
    """Write a target's rows and say what was left out.

    Raises:
        UserError: the file exists, the data can't be read, a row can't be used (unless it is to be skipped).
    """
    out = output_file(options.out, "OUT")
    target = open_target(options.target, options, rest)
    if not target.is_recipe and target.kind == "pairs" and is_judged(first_rows((source := target.source()).stream())):
        number = _write_pairs(target, source, out, options)
    else:
        number = _write(target, out, options)
    print(f"{out}: {plural(number, 'pair' if target.kind == 'pairs' else 'row')}")
    if target.recipe.get("format") == "plain":
        note("read it with `format: plain`, which keeps texts as they are")
    note(f"Next: {command('check', str(out))}")


def _write(target: Target, out: Path, options: Any) -> int:
    if options.skip:
        target = Target(
            target.name, target.recipe.replace("bad_rows", "skip"), target.is_recipe, target.kind, target.limit
        )
    from rlhf.data.rows import read_data

    data = read_data(target.recipe, target.kind)
    for row in data.skipped[:3]:
        note(f"skipped {shown(row['place'], 200)}: {shown(row['reason'], 300)}")
    if len(data.skipped) > 3:
        note(f"and {len(data.skipped) - 3:,} more; `{command('check', target.name, '--all')}` names all of them")
    if data.heldout is not None:
        note(f"{plural(len(data.heldout), 'held-out row')} not written")
    if data.summary and data.summary.unused:
        note(f"columns that are not used, and not written: {shown(', '.join(data.summary.unused), 200)}")
    return write_rows(in_file_order(data.train), out, options.with_source, target.recipe.get("format") == "plain")


# --- single answers with a judgement ---------------------------------------------------------------------------------


def _write_pairs(target: Target, source: Source, out: Path, options: Any) -> int:
    left = Leftovers()
    skipped: list[str] = []

    def pairs() -> Iterator[Row]:
        for where, row in pair_unpaired(_judged(target, source, options.skip, skipped), left):
            yield {**row, SOURCE: where} if options.with_source else row

    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".rlhf-") as folder:
        lines = Path(folder) / "pairs.jsonl"  # pairs are matched once, and a Parquet file is made in two passes
        number = write_json_lines(pairs(), lines)
        if number and out.suffix == ".jsonl":
            os.replace(lines, out)
        elif number:
            write_parquet(lambda: map(json.loads, open(lines, encoding="utf-8")), out)
    note(shown(str(left)))
    for line in skipped[:3]:
        note(f"skipped {line}")
    if not number:
        raise UserError(f"{source.name}: no prompt has both a better and a worse answer; {left}")
    return number


def _judged(target: Target, source: Source, skip: bool, skipped: list[str]) -> Iterator[tuple[str, Row]]:
    """(place, canonical answer with its judgement) of each row."""
    try:
        to_answer = converter("unpaired", first_rows(source.stream()), format_options(target.recipe))
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from None
    for row, line in source.stream():
        where = place(source.name, line, source.has_lines)
        try:
            yield where, to_answer(row, set())
        except RowError as error:
            if not skip:
                raise UserError(f"{where}: {error}; --skip leaves such rows out") from None
            skipped.append(f"{shown(where, 200)}: {shown(str(error), 300)}")
