"""Text on the terminal: colours where it has them, control characters of data escaped, a closed pipe ends the command."""

from __future__ import annotations

import shlex
import sys

from rich.console import Console

from rlhf.errors import one_line

COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}


class Screen(Console):
    """A console that wraps nothing, and raises BrokenPipeError as `print` does (`rlhf … | head`)."""

    def __init__(self):
        super().__init__(highlight=False, markup=False, emoji=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def safe(text: str) -> str:
    """Text whose line breaks are kept and whose other control characters are escaped.

    Example: safe("a\\x1b[31m") -> "a\\\\x1b[31m".
    """
    escape = lambda c: c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode()  # noqa: E731
    return text if text.isascii() and text.isprintable() else "".join(map(escape, text))


def shown(text: str, limit: int = 400) -> str:
    """Text on one line, with control characters escaped."""
    return one_line(text, limit)


def command(*words: str) -> str:
    """A command to copy."""
    return shown(shlex.join(["rlhf", "data", *words]))


def note(text: str) -> None:
    """Something beside the command's output."""
    print(shown(text, 600), file=sys.stderr, flush=True)


def plural(number: int, noun: str) -> str:
    """Example: plural(1, "pair") -> "1 pair"; plural(2000, "pair") -> "2,000 pairs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(num_bytes: float) -> str:
    """Example: size(1_500_000) -> "1.5 MB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes:.0f} B"
