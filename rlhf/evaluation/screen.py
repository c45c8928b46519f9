"""An evaluation on the terminal: its tables, the verdict, and the first answers side by side."""

from __future__ import annotations

from typing import Any

from rlhf.distributed.processes import is_main
from rlhf.evaluation.overlap import heading
from rlhf.runs.measure_tables import tables
from rlhf.runs.results import COLUMNS, labels_of, sentences, shown_text, table_rows
from rlhf.runs.verdict import MODEL_COLUMNS, PAIR_COLUMNS, model_note, model_rows, pair_note, pair_rows


def shown_answers(answers: list[dict]) -> list[dict]:
    """The prompts that every policy answered (base answers the first few only)."""
    return [a for a in answers if "base" in a] or answers[:3]


def show_comparison(results: dict[str, Any], console: Any) -> None:
    """Print the models, their comparisons and the verdict; nothing of results of an older version."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for title, columns, rows, note in (
        ("The models", MODEL_COLUMNS, model_rows(results), model_note(results)),
        ("Their answers compared", PAIR_COLUMNS, pair_rows(results), pair_note(results)),
    ):
        if not rows:
            continue
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        console.print(Text(f"  {note}\n"), style="dim")
    for sentence in results.get("verdict") or ():
        console.print(Text(f"Verdict: {sentence}"), style="bold")
    if results.get("verdict"):
        console.print()


def show_tables(results: dict[str, Any], console: Any) -> None:
    """Print the tables about the reward model and the benchmarks."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for found in tables(results):
        table = Table(title=Text(found.title), box=box.SIMPLE_HEAD, title_justify="left")
        for number, column in enumerate(found.columns):
            table.add_column(column, no_wrap=number == 0)
        for row in found.rows:
            table.add_row(*map(Text, row))
        console.print(table)
        if found.sentence:
            console.print(Text(f"  {found.sentence}"), style="dim")
        console.print()


def show(results: dict[str, Any], answers: list[dict]) -> None:
    """Print the table and the answers side by side."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not is_main():
        return
    console = Console()
    table = Table(title=f"On {heading(results)}", box=box.SIMPLE_HEAD, title_justify="left")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if number in (1, 2) else "left")
    for row in table_rows(results):
        table.add_row(*map(Text, row), style="bold" if row.change == "worse" else None)
    console.print(table if table.rows else Text(f"On {heading(results)}\n"))
    for sentence in sentences(results):
        console.print(Text(f"  {sentence}"), style="dim")
    console.print()
    show_comparison(results, console)
    show_tables(results, console)
    labels = labels_of(results)
    for answer in shown_answers(answers):
        policies = [p for p in labels if p in answer]
        side = Table(
            box=box.SIMPLE_HEAD, title=Text(f"> {answer['prompt'][-1]['content']}"), title_justify="left", expand=True
        )
        for policy in policies:
            reward = f" (reward {answer[f'{policy}_reward']:+.2f})" if f"{policy}_reward" in answer else ""
            side.add_column(Text(f"{labels[policy]}{reward}"), ratio=1)
        side.add_row(*(Text(shown_text(answer, p)) for p in policies))
        console.print(side)
