"""Strict JSON rows: what Python's parser silently accepts or crashes on is reported by line and column."""

from __future__ import annotations

import io
import json
import re
from typing import Any

from rlhf.data.raw import Raw, text_of
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


def json_rows(raw: Raw) -> tuple[list[dict[str, Any]], list[int] | None]:
    """The rows of a file with one object per line (and their lines), or with one list of objects (lines: None)."""
    start = raw.data[:4096].lstrip()
    if start.startswith(b"["):
        return _list_rows(raw, text_of(raw)), None
    if raw.suffix == ".json" and start.startswith(b"{") and b"\n" in raw.data.strip().split(b"}", 1)[0]:
        raise UserError(
            f"{raw.path}:1: one JSON object over several lines; expected a list of rows, or one row per line"
        )
    return _line_rows(raw)


def _line_rows(raw: Raw) -> tuple[list[dict[str, Any]], list[int]]:
    rows, lines = [], []
    for number, line in enumerate(io.BytesIO(raw.data), 1):  # no copy of the full text
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            text_of(raw)  # raises, with the byte's offset in the file
            raise
        if not text.strip():
            continue
        try:
            row, end = parse(text, _after_space(text))
            rest = _after_space(text, end)
            if rest < len(text):
                raise JsonError("not valid JSON: Extra data", rest)
        except JsonError as error:
            message = str(error) if text.strip("\x00") else _ZEROS
            raise UserError(f"{raw.path}:{number}:{error.at + 1}: {message}") from None
        if not isinstance(row, dict):
            raise UserError(f"{raw.path}:{number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
        lines.append(number)
    return rows, lines


_ZEROS = "only NUL characters; a crash or a full disk damaged the file: write it again"


def _list_rows(raw: Raw, text: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    at = _after_space(text, text.index("[") + 1)
    try:
        while text[at : at + 1] != "]" or rows:
            row, at = parse(text, at)
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise UserError(f"{raw.path}, row {len(rows) + 1}: expected a JSON object, found {kind}")
            rows.append(row)
            at = _after_space(text, at)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise JsonError("not valid JSON: Expecting ',' delimiter", at)
            at = _after_space(text, at + 1)
        after = _after_space(text, at + 1)
        if after < len(text):
            raise JsonError("not valid JSON: Extra data", after)
    except JsonError as error:
        line = text.count("\n", 0, error.at) + 1
        column = error.at - text.rfind("\n", 0, error.at)
        raise UserError(f"{raw.path}:{line}:{column}: {error}") from None
    return rows
