"""Errors that end a command, and how messages quote values. Imports nothing of this package."""

from __future__ import annotations

import shlex
import sys
from typing import Any


class UserError(ValueError):
    """Invalid input from the user: shown as one sentence, exit code 2, no traceback."""


class RunFailed(RuntimeError):
    """A run that can't be completed, whatever its recipe: shown as one sentence, exit code 1."""


class RankFailed(Exception):
    """The main rank has failed and reports why: this rank exits silently with the same code.

    Attributes:
        code: the exit code.
    """

    def __init__(self, code: int):
        super().__init__(f"the main rank has failed (exit code {code})")
        self.code = code


def one_line(message: object, limit: int = 600) -> str:
    """A message as it is printed: one line, control characters escaped, the middle cut out of what is longer than `limit`.

    Example: one_line("a\\nb \\x1b[31m") -> "a b \\\\x1b[31m".
    """
    text = " ".join(filter(None, (line.strip() for line in str(message).splitlines())))
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[3 - limit + limit // 2 :]}"


def sentence(error: BaseException) -> str:
    """A library's error on one line, at most 300 characters, ending with a full stop."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."


def quote(value: Any, limit: int = 80) -> str:
    """A value as it is quoted in a message: its repr on one line, cut to `limit` characters.

    Safe for values of any size: containers are expanded only as far as shown, so nested YAML aliases can't blow up.

    Example: quote("x" * 100, 10) -> "'xxxxxxxx…".
    """
    import reprlib

    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = limit
    short.maxlist = short.maxtuple = short.maxset = short.maxdict = 6
    short.maxlevel = 3
    if isinstance(value, str):
        text = repr(value[: limit + 1])
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4 * limit:
        text = f"a number of about {int(value.bit_length() * 0.30103) + 1} digits"
    else:
        text = short.repr(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def pip_install(*packages: str) -> str:
    """The command that installs packages for the Python that runs this; a bare `pip` may belong to another one.

    Example: pip_install("rlhf-dpo[deepspeed]") -> "/env/bin/python -m pip install 'rlhf-dpo[deepspeed]'".
    """
    return shlex.join([sys.executable or "python", "-m", "pip", "install", *packages])
