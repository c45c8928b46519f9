"""Strict JSON rows: what Python's parser silently accepts or crashes on is reported by line and column."""

from __future__ import annotations

import io
import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from rlhf.data.raw import Raw, not_utf8, text_of
from rlhf.errors import UserError, quote

MAX_DEPTH = 100  # nested lists and objects; this project's formats need 4
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)", re.S)
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]|-?(?:NaN|Infinity)|-?\d+', re.S)
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonError(ValueError):
    """An error in a JSON text and its character offset; the caller adds the place."""

    def __init__(self, message: str, at: int = 0):
        super().__init__(message)
        self.at = at


class _DuplicateKey(ValueError):
    pass


def _after_space(text: str, at: int = 0) -> int:
    """Where the white space that begins at `at` ends."""
    found = _SPACE.match(text, at)
    assert found is not None  # it may be empty
    return found.end()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(key)
            seen.add(key)
    return row


def _constant(name: str) -> None:
    raise OverflowError(name)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def parse(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that starts at `start`, and where it ends.

    Raises:
        JsonError: not JSON, a repeated key in an object, NaN or Infinity, a lone surrogate, an integer of more digits
            than Python parses, or more than MAX_DEPTH nested lists and objects.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise JsonError(f"not valid JSON: {error.msg}", error.pos) from None
    except _DuplicateKey as error:
        key = json.dumps(str(error), ensure_ascii=False)
        second = max(start, text.find(key, text.find(key, start) + len(key)))  # its column, if it is spelt so
        raise JsonError(f"key {quote(str(error))} is set twice in one object; keep one", second) from None
    except RecursionError:
        raise JsonError(_TOO_DEEP, start) from None
    except OverflowError as error:
        raise JsonError(f"{error} is not JSON; write null or remove the key", _at(text, start, str(error))) from None
    except ValueError:  # int() of more than 4,300 digits
        raise JsonError(
            "an integer of thousands of digits; write it as a string or remove it", _longest_number(text, start)
        ) from None
    _check_depth(text, start, end)
    _check_surrogates(text, start, end)
    return value, end


_TOO_DEEP = f"more than {MAX_DEPTH} nested lists and objects; expected a flat row"


def _at(text: str, start: int, word: str) -> int:
    return next((m.start() for m in _TOKEN.finditer(text, start) if m.group() == word), start)


def _longest_number(text: str, start: int) -> int:
    return next((m.start() for m in _TOKEN.finditer(text, start) if m.group()[-1].isdigit() and len(m[0]) > 600), start)


def _check_depth(text: str, start: int, end: int) -> None:
    if text.count("[", start, end) + text.count("{", start, end) <= MAX_DEPTH:
        return
    depth = 0
    for token in _TOKEN.finditer(text, start, end):
        depth += (token.group() in "[{") - (token.group() in "]}")
        if depth > MAX_DEPTH:
            raise JsonError(_TOO_DEEP, token.start())


def _check_surrogates(text: str, start: int, end: int) -> None:
    r"""`"\ud83d\ude00"` is one character; half of it can't be encoded as UTF-8, and no tokenizer accepts it."""
    if text.find("\\u", start, end) < 0:
        return
    half = None  # where a high surrogate still needs its low one
    for escape in _ESCAPE.finditer(text, start, end):
        code = int(escape[1], 16) if escape[1] else 0
        lower = 0xDC00 <= code < 0xE000
        if half is not None and not (lower and escape.start() == half + 6) or half is None and lower:
            half = escape.start() if half is None else half
            break
        half = escape.start() if 0xD800 <= code < 0xDC00 else None
    if half is not None:
        raise JsonError(
            f"{text[half : half + 6]} is a lone surrogate (half of a character); remove it, or write both halves", half
        )


class LineError(ValueError):
    """A line of a JSON Lines file that is no row.

    Attributes:
        line: counted from 1, in the file or in the range that was read.
        column: counted from 1; 0 if it is the whole line.
    """

    def __init__(self, message: str, line: int, column: int = 0):
        super().__init__(message)
        self.line, self.column = line, column

    def at(self, path: Path, before: int = 0) -> UserError:
        """The error for the user; `before`: how many lines come before the range."""
        column = f":{self.column}" if self.column else ""
        return UserError(f"{path}:{self.line + before}{column}: {self}")


def json_rows(raw: Raw) -> tuple[list[dict[str, Any]], list[int] | None]:
    """The rows of a file with one object per line (and their lines), or with one list of objects (lines: None)."""
    start = raw.data[:4096].lstrip()
    if start.startswith(b"["):
        return _list_rows(raw, text_of(raw)), None
    if raw.suffix == ".json" and start.startswith(b"{") and b"\n" in raw.data.strip().split(b"}", 1)[0]:
        raise UserError(
            f"{raw.path}:1: one JSON object over several lines; expected a list of rows, or one row per line"
        )
    try:
        found = list(parse_lines(io.BytesIO(raw.data), raw.mark))  # no copy of the full text
    except LineError as error:
        raise error.at(raw.path) from None
    return [row for row, _ in found], [number for _, number in found]


def json_lines(
    path: Path, start: int = 0, end: int | None = None, counted: Any = None
) -> Iterator[tuple[dict[str, Any], int]]:
    """Rows of an uncompressed UTF-8 file with one object per line, read as they are asked for, with their lines.

    Args:
        start, end: bytes: the lines that begin in this range, counted from 1 at its first.
        counted: its attribute `lines` is set to the number of lines of the range, blank ones too.

    Raises:
        LineError: a line that is not a JSON object.
    """
    with open(path, "rb") as file:
        mark = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
        file.seek(max(start - 1, 0))
        if start > mark:
            file.readline()  # the rest of the line before, which may end just before `start`
        else:
            file.seek(mark)
        at, number = file.tell(), 0

        def lines() -> Iterator[bytes]:
            nonlocal at, number
            while end is None or at < end:
                if not (line := file.readline()):
                    break
                at += len(line)
                number += 1
                yield line

        yield from parse_lines(lines(), at)
        if counted is not None:
            counted.lines = number


def parse_lines(lines: Iterable[bytes], offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Rows of lines with one object each, with their number from 1; blank lines are left out.

    Args:
        offset: bytes of the file before the first line.

    Raises:
        LineError: a line that is not a JSON object.
    """
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise LineError(not_utf8(offset + error.start), number) from None
        offset += len(line)
        if not text.strip():
            continue
        try:
            row, end = parse(text, _after_space(text))
            rest = _after_space(text, end)
            if rest < len(text):
                raise JsonError("not valid JSON: Extra data", rest)
        except JsonError as error:
            raise LineError(str(error) if text.strip("\x00") else _ZEROS, number, error.at + 1) from None
        if not isinstance(row, dict):
            raise LineError(f"expected a JSON object, found {type(row).__name__}", number)
        yield row, number


_ZEROS = "only NUL characters; a crash or a full disk damaged the file: write it again"


def _list_rows(raw: Raw, text: str) -> list[dict[str, Any]]:
    return [row for row, _ in list_items(raw.path, io.StringIO(text, newline=""), len(text) + 1)]


WINDOW = 1 << 20  # characters that are read at a time
LONGEST_ROW = 256 << 20  # characters


def list_items(path: Path, file: IO[str], window: int = WINDOW) -> Iterator[tuple[dict[str, Any], int]]:
    """The objects of a JSON list, read as they are asked for, with their number from 1.

    Raises:
        UserError: a mistake, with its line and column.
    """
    scan = _Scan(file, window)
    try:
        scan.skip_space()
        scan.take("[")
        scan.skip_space()
        number = 0
        while scan.peek() != "]" or number:
            row = scan.value()
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise UserError(f"{path}, row {number + 1}: expected a JSON object, found {kind}")
            number += 1
            yield row, number
            scan.skip_space()
            if scan.peek() == "]":
                break
            scan.take(",", "not valid JSON: Expecting ',' delimiter")
            scan.skip_space()
        scan.take("]")
        scan.skip_space()
        if scan.peek():
            raise JsonError("not valid JSON: Extra data", scan.at)
    except JsonError as error:
        line, column = scan.locate(error.at)
        raise UserError(f"{path}:{line}:{column}: {error}") from None


class _Scan:
    """A window of a text, and the line and column at which it begins."""

    def __init__(self, file: IO[str], window: int):
        self.file, self.window = file, window
        self.text, self.at, self.ended = "", 0, False
        self.lines, self.columns = 0, 0  # before the window
        self.more()

    def more(self) -> bool:
        """Read on, dropping what has been taken; False at the end of the file."""
        if self.ended:
            return False
        found = self.file.read(max(self.window, len(self.text) - self.at))
        if not found:
            self.ended = True
            return False
        taken = self.text[: self.at]
        if "\n" in taken:
            self.lines, self.columns = self.lines + taken.count("\n"), len(taken) - taken.rfind("\n") - 1
        else:
            self.columns += len(taken)
        self.text, self.at = self.text[self.at :] + found, 0
        return True

    def locate(self, at: int) -> tuple[int, int]:
        """Line and column, from 1, of an offset in the window."""
        lines = self.text.count("\n", 0, at)
        column = at - self.text.rfind("\n", 0, at) if lines else self.columns + at + 1
        return self.lines + lines + 1, column

    def skip_space(self) -> None:
        while True:
            self.at = _after_space(self.text, self.at)
            if self.at < len(self.text) or not self.more():
                return

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self, character: str, message: str = "") -> None:
        if self.peek() != character:
            raise JsonError(message or f"not valid JSON: Expecting {character!r}", self.at)
        self.at += 1

    def value(self) -> Any:
        while True:
            try:
                value, end = parse(self.text, self.at)
            except JsonError:
                if len(self.text) - self.at > LONGEST_ROW or not self.more():
                    raise
                continue
            if end == len(self.text) and self.more():  # a number may continue
                continue
            self.at = end
            return value
