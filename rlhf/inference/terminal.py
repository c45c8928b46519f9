"""The terminal I/O of a chat: typed or pasted messages, word-wrapped answers, notes in brackets."""

from __future__ import annotations

import select
import shutil
import sys
import unicodedata
from collections.abc import Callable

LEAVE_HINT = "(Ctrl-C again, or Ctrl-D, leaves)"
BURST_S = 0.05  # lines that arrive faster than this were pasted, not typed


class Reader:
    '''Messages from a keyboard or a pipe: one line, a paste of any number of lines, or a block between two `"""`.

    Args:
        typed: input comes from a keyboard: show a prompt, allow line editing, handle Ctrl-C.
        bracketed: the terminal marks pasted text, and readline returns it as one message; None: if it is GNU readline.
    '''

    def __init__(self, typed: bool, bracketed: bool | None = None):
        self.typed = typed
        self.block: list[str] = []  # lines of a block that has not ended
        self.readline = _line_editor() if typed else None
        if bracketed is None:
            bracketed = self.readline is not None and "GNU readline" in (self.readline.__doc__ or "")
        self.bracketed = bracketed
        if self.readline and bracketed:  # Python disables it
            self.readline.parse_and_bind("set enable-bracketed-paste on")

    def message(self) -> str | None:
        """The next message; None at the end of the input or after a second Ctrl-C on an empty line."""
        interrupted = False
        while True:
            try:
                return self._read()
            except EOFError:
                if self.typed:
                    print()  # ends the line (a blank line where readline has done so already)
                return None
            except KeyboardInterrupt:
                print()
                empty = not (self.block or (self.readline and self.readline.get_line_buffer()))
                if interrupted and empty:
                    return None
                interrupted = True
                print(LEAVE_HINT)

    def _read(self) -> str:
        self.block = []
        line = self._line("> ")
        if "\n" in line or not line.lstrip().startswith('"""'):
            return line
        line = line.lstrip().removeprefix('"""')
        try:
            while not line.rstrip().endswith('"""'):
                self.block.append(line)
                line = self._line("... ")
            self.block.append(line.rstrip().removesuffix('"""'))
        except EOFError:  # an unterminated block is a message too
            pass
        return "\n".join(self.block)

    def _line(self, prompt: str) -> str:
        line = input(prompt if self.typed else "")
        while self.typed and not self.bracketed and select.select([sys.stdin], [], [], BURST_S)[0]:
            try:
                line += "\n" + input()
            except EOFError:  # raised again by the next read
                break
        return line


def _line_editor():
    try:
        import readline
    except ImportError:  # a Python without it
        return None
    return readline


def converse(reader: Reader, say: Callable[[str], None], command: Callable[[str], bool]) -> None:
    """Pass each message to `say` and each line that starts with / to `command`; ends when that returns False."""
    while (text := reader.message()) is not None:
        text = text.strip("\n").rstrip()
        try:
            if "\n" not in text and text.lstrip().startswith("/"):
                if not command(text.strip()):
                    return
            elif text.strip():
                say(text if "\n" in text else text.strip())
        except KeyboardInterrupt:
            print("\n(stopped)", flush=True)


def note(text: object) -> None:
    """Print a remark beside the answers: on stdout in a terminal, else on stderr (a pipe gets answers only)."""
    print(f"({text})", file=sys.stdout if sys.stdout.isatty() else sys.stderr, flush=True)


class Screen:
    """Prints streamed text; in a terminal a word that doesn't fit moves to the next line.

    Args:
        width: columns; 0: no wrapping; None: the terminal's, 0 without a terminal.
    """

    def __init__(self, width: int | None = None):
        if width is None:
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
        self.width = width
        self.column = 0
        self.word = self.space = ""  # buffered until it is known whether they fit

    def write(self, text: str) -> None:
        for char in text:
            if char == "\n":
                self._place_word()
                self._print(self.space + "\n" if not self.width else "\n")
                self.column, self.space = 0, ""
            elif char.isspace():
                self._place_word()
                self.space += char
            elif unicodedata.east_asian_width(char) in "WF":  # Chinese and Japanese text may wrap anywhere
                self._place_word()
                self.word = char
                self._place_word()
            else:
                self.word += char
        if not self.width:
            self._place_word()

    def end(self) -> None:
        """Print buffered text and end the line."""
        self._place_word()
        self._print("\n")
        self.column, self.space = 0, ""

    def _place_word(self) -> None:
        if not self.word:
            return
        size = columns(self.word)
        gap = columns(self.space)
        if self.width and self.column and self.column + gap + size > self.width:
            self._print("\n")
            self.column, self.space, gap = 0, "", 0
        text, self.word, self.space = self.space + self.word, "", ""  # cleared first: Ctrl-C may interrupt the print
        self.column += gap + size
        self._print(text)

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)


def columns(text: str) -> int:
    """The width in columns of a text without line breaks; a tab counts as 8."""
    wide = {"W": 2, "F": 2}
    sizes = (
        0 if unicodedata.combining(c) else 8 if c == "\t" else wide.get(unicodedata.east_asian_width(c), 1)
        for c in text
    )
    return sum(sizes)
