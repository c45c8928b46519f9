"""`rlhf data stats`: how long prompts and answers are, in tokens or characters, and what the dialogues look like."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from rlhf.curation.batches import batches, spread
from rlhf.curation.lengths import Lengths, bars
from rlhf.curation.screen import Screen, command, plural, shown
from rlhf.curation.target import Target, in_file_order, open_target
from rlhf.data.features import ANSWERS
from rlhf.data.messages import answer_text
from rlhf.data.rows import StageData
from rlhf.data.store import Rows

WHOLE = "whole row"  # the prompt with its longer answer: what max_length is compared with


@dataclass
class Statistics:
    """Of the rows of one target.

    Attributes:
        unit: of lengths: "tokens" or "characters".
        rows, looked_at: all, and those that were measured.
        lengths: by part of the rows: prompt, chosen, rejected, ...; and WHOLE.
        max_length: of the run, in tokens.
        longer: pairs whose chosen answer is longer than the rejected, and pairs whose answers are of equal length.
        turns: messages of users and assistants up to the last answer -> rows.
        system: rows with a system message.
        tools: rows with tools.
        sources: rows of each file or data set.
    """

    unit: str
    rows: int
    looked_at: int = 0
    lengths: dict[str, Lengths] = field(default_factory=dict)
    max_length: int | None = None
    longer: list[int] = field(default_factory=lambda: [0, 0])
    turns: Counter[int] = field(default_factory=Counter)
    system: int = 0
    tools: int = 0
    sources: dict[str, int] = field(default_factory=dict)

    def add(self, row: dict[str, Any], lengths: dict[str, int]) -> None:
        """Add a row with the lengths of its parts."""
        self.looked_at += 1
        lengths[WHOLE] = lengths.get("prompt", 0) + max(
            (n for part, n in lengths.items() if part != "prompt"), default=0
        )
        for part, length in lengths.items():
            self.lengths.setdefault(part, Lengths()).add(length)
        if "rejected" in lengths:
            self.longer[0] += lengths["chosen"] > lengths["rejected"]
            self.longer[1] += lengths["chosen"] == lengths["rejected"]
        messages = row.get("messages") or row.get("prompt") or ()
        spoken = sum(message["role"] in ("user", "assistant") for message in messages)
        self.turns[spoken + ("prompt" in row)] += 1
        self.system += any(message["role"] in ("system", "developer") for message in messages)
        self.tools += bool(row.get("tools"))

    def record(self) -> dict[str, Any]:
        whole = self.lengths.get(WHOLE)
        found: dict[str, Any] = {
            "unit": self.unit, "rows": self.rows, "looked_at": self.looked_at,
            "lengths": {part: lengths.record() for part, lengths in self.lengths.items()},
            "turns": dict(sorted(self.turns.items())), "with_system": self.system, "with_tools": self.tools,
            "sources": self.sources,
        }  # fmt: skip
        if self.max_length is not None and whole:
            found |= {"max_length": self.max_length, "longer_than_max_length": whole.above(self.max_length)}
        if "rejected" in self.lengths:
            found |= {"chosen_longer": self.longer[0], "equally_long": self.longer[1]}
        return found


def stats(options: Any, rest: list[str]) -> None:
    """Print the statistics of a target's training rows, as tables or with --json as an object."""
    target = open_target(options.target, options, rest)
    data = target.read()
    rows = in_file_order(data.train)
    encoder: Any = "--model NAME counts tokens instead"
    if target.recipe.get("model_name_or_path") and not options.characters:
        from rlhf.curation.encoder import encoder_of

        encoder = encoder_of(target, data, options.max_length)
    if isinstance(encoder, str):
        found = of_characters(rows)
    else:
        found = of_tokens(rows, encoder, options.rows)
    found.sources = sources(rows)
    if options.json:
        print(json.dumps({"target": target.name, "kind": target.kind, **found.record()}, indent=1), flush=True)
    else:
        _show(target, data, found, encoder if isinstance(encoder, str) else f"with the tokenizer of {encoder.model}")


def of_characters(rows: Rows) -> Statistics:
    """Lengths in characters, of all rows."""
    from tqdm import tqdm

    found = Statistics("characters", len(rows))
    for row in tqdm(rows, desc="Measuring", unit=" rows", unit_scale=True, delay=3, leave=False):
        lengths = {side: len(answer_text(row[side])) for side in ("prompt", "messages", *ANSWERS) if side in row}
        found.add(row, lengths if "text" not in row else {"text": len(row["text"])})
    return found


def of_tokens(rows: Rows, encoder: Any, at_most: int | None) -> Statistics:
    """Lengths in tokens, before anything is cut.

    Args:
        at_most: rows, evenly spaced; None: all.
    """
    from rlhf.training.tokenise import Counts, Tokenise

    part, settings = spread(rows, at_most), encoder.settings
    found = Statistics("tokens", len(rows), max_length=settings.max_length)
    if settings.stage == "reward":  # its ids are whole dialogues; DPO's are of prompt and answers
        settings = dataclasses.replace(settings, stage="dpo")
    tokenise = Tokenise(encoder.tokenizer, dataclasses.replace(settings, max_length=None, too_long=""))
    for first, batch in batches(part, "Tokenising"):
        columns = tokenise(batch, first, Counts())
        for at, number in enumerate(columns.get("example", ())):
            found.add(batch[number - first], _token_lengths({name: values[at] for name, values in columns.items()}))
    return found


def _token_lengths(ids: dict[str, Any]) -> dict[str, int]:
    if "prompt_ids" in ids:
        return {side: len(ids[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")}
    trained = sum(label != -100 for label in ids["labels"])
    return {"prompt": len(ids["labels"]) - trained, "trained": trained}


def sources(rows: Rows) -> dict[str, int]:
    """Rows of each file or data set."""
    found: Counter[str] = Counter()
    start = 0
    for part in rows.parts:
        end = start + sum(batch.num_rows for batch in part.batches)
        inside = (
            end - start
            if rows.indices is None
            else int(np.count_nonzero((rows.indices >= start) & (rows.indices < end)))
        )
        found[part.name] += inside
        start = end
    return {name: number for name, number in found.items() if number}


# --- the screen ------------------------------------------------------------------------------------------------------


def _show(target: Target, data: StageData, found: Statistics, how: str) -> None:
    screen = Screen()
    part = f", {found.looked_at:,} of them measured, evenly spaced" if found.looked_at < found.rows else ""
    noun = "pair" if target.kind == "pairs" else "row"
    screen.print(Text(f"{shown(target.name, 200)}: {plural(found.rows, noun)}{part}", "bold"))
    screen.print(Text(f"  lengths in {found.unit}; {shown(how)}", "dim"))
    screen.print()
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for name in ("mean", "median", "95%", "max"):
        table.add_column(name, justify="right")
    for part, lengths in found.lengths.items():
        of = lengths.record()
        table.add_row(f"  {part}", f"{of['mean']:,.1f}", *(f"{of[key]:,}" for key in ("median", "p95", "max")))
    screen.print(table)
    _show_histogram(screen, found)
    screen.print()
    for line in _facts(found):
        screen.print(f"  {line}")
    for line in data.about or (
        [f"{name}: {n:,} rows" for name, n in found.sources.items()] if len(found.sources) > 1 else []
    ):
        screen.print(f"  {shown(line)}")
    screen.print(f"\nNext: {command('show', target.name)}   # the tokens that are trained on")


def _show_histogram(screen: Screen, found: Statistics) -> None:
    whole = found.lengths.get(WHOLE)
    if not whole:
        return
    full = "█" if "utf" in (getattr(sys.stdout, "encoding", "") or "").lower() else "#"
    lines = bars(whole.histogram(), full=full)
    width = max(len(span) for span, _, _ in lines)
    screen.print(f"\n  {found.unit} of prompt and longer answer together")
    for (span, number, bar), edge in zip(lines, whole.histogram(), strict=True):
        over = found.max_length is not None and edge > found.max_length
        screen.print(Text.assemble(f"  {span:>{width}} {number:>11,} ", (bar, "yellow" if over else "cyan")))


def _facts(found: Statistics) -> list[str]:
    total, whole = max(1, found.looked_at), found.lengths.get(WHOLE)
    facts = []
    if found.max_length is not None and whole:
        above = whole.above(found.max_length)
        facts.append(f"longer than max_length={found.max_length:,}: {above:,} ({above / total:.1%})")
    if "rejected" in found.lengths:
        longer, equal = found.longer
        facts.append(f"chosen longer: {longer / total:.1%}, equally long: {equal / total:.1%}")
    turns = sorted(found.turns.items())
    facts.append(
        "turns: "
        + ", ".join(f"{n} in {number / total:.1%}" for n, number in turns[:8])
        + (", …" if len(turns) > 8 else "")
    )
    facts.append(f"with a system message: {found.system / total:.1%}")
    if found.tools:
        facts.append(f"with tools: {found.tools / total:.1%}")
    return facts
