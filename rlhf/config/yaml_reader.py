"""YAML of recipes, launch files and the command line: flat, small, with one sentence per error.

Anchors, aliases, tags and deep nesting are rejected: no recipe needs them, and they can make YAML hang, recurse or
grow. The rest can still fail while PyYAML converts values (`2024-13-45`, `0x_`, "\\UFFFFFFFF"): UNREADABLE.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from rlhf.errors import UserError, quote

MAX_BYTES = 1_000_000
MAX_DEPTH = 12  # a launch file has 3 levels, a recipe 2
# Raised by PyYAML, besides its YAMLError, for strings that look like a number, a date or a character but aren't one.
UNREADABLE = (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError, RecursionError)
# YAML 1.1 reads 010 as 8 and 1:30 as 90; nobody means that in a recipe.
_OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+)")


class _Rejected(Exception):
    """A YAML feature that recipes may not use, and where it is."""

    def __init__(self, mark, sentence: str):
        super().__init__(sentence)
        self.mark = mark


class Loader(yaml.SafeLoader):
    """SafeLoader that rejects, while reading, what can make a small text large or endless."""

    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            name = quote(sign + event.anchor, 40)
            raise _Rejected(event.start_mark, f"aliases ({name}) are not supported; write the value out, or in quotes")
        if event.tag is not None:
            name = quote(event.tag.replace("tag:yaml.org,2002:", "!!"), 40)
            raise _Rejected(event.start_mark, f"tags ({name}) are not supported; write the value without one")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Rejected(event.start_mark, f"nested more than {MAX_DEPTH} levels deep; values are flat")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_yaml_int(self, node):
        if _OTHER_BASE.fullmatch(node.value):
            raise ValueError("YAML reads it as a number in base 8 or 60; write it in decimal")
        if len(node.value) > 4000:
            raise ValueError(f"it is a number of {len(node.value)} digits")
        return super().construct_yaml_int(node)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


def read_text(path: str, kind: str = "recipe") -> str:
    """The text of a file.

    Args:
        path: as the user gave it.
        kind: what it should be, for the message.

    Raises:
        UserError: no such file, not a regular file, too large, unreadable, or not UTF-8.
    """
    name, file = quote_path(path), Path(path)
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        if os.path.islink(path):
            raise UserError(
                f"no {kind} at {name}: it is a link to {quote(os.readlink(path))}, which doesn't exist"
            ) from None
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise UserError(f"{name} can't be the path of a {kind}: {_reason(error)}") from None
        raise UserError(f"no {kind} at {name}{_neighbours(file, kind)}") from None
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{name} is a folder, not a {kind}{_neighbours(file / 'x', kind)}")
    if not stat.S_ISREG(found.st_mode):  # reading a pipe or a device could block for ever
        raise UserError(f"{name} is not a regular file; give the path of a {kind}")
    if found.st_size > MAX_BYTES:
        raise UserError(
            f"{name} has {found.st_size:,} bytes, too many for a {kind} (at most {MAX_BYTES:,}); is it data?"
        )
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{name} can't be read: {_reason(error)}") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{name}: UTF-16, not UTF-8 text; save the {kind} as UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start}); save the {kind} as UTF-8") from None


def read_flat(path: str, kind: str = "recipe") -> tuple[dict[str, Any], dict[str, int | None]]:
    """Read a flat YAML mapping.

    Returns:
        The values by key, and the line of each key.

    Raises:
        UserError: the file, its YAML or one of its values is invalid; with file and line.
    """
    text = read_text(path, kind)
    loader, place = Loader(""), quote_path(path)
    try:
        loader = Loader(text)
        node = _root(loader, place, loader.get_single_node)
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{place}:1: a {kind} is a list of `key: value` lines; found none")
        values: dict[str, Any] = {}
        lines: dict[str, int | None] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{place}:{line}: a key is one word; found a list or a mapping")
            key = key_node.value
            if key in values:
                raise UserError(f"{place}:{line}: key {quote(key)} is set twice (first in line {lines[key]}); keep one")
            values[key], lines[key] = _construct(loader, value_node, f"{place}:{line}", key), line
        return values, lines
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{place}:{line}: not valid YAML: character #x{error.character:04x} is not allowed") from None


def read_word(word: str, place: str) -> Any:
    """A command-line value as YAML reads it.

    Raises:
        UserError: YAML can't read it; the message starts with `place` (`--beta`).
    """
    try:
        loader = Loader(word)
        node = _root(loader, place, loader.get_single_node, with_line=False)
    except yaml.reader.ReaderError as error:
        raise UserError(f"{place}: {quote(word)} holds the character #x{error.character:04x}") from None
    return None if node is None else _construct(loader, node, place, place.lstrip("-"))


def quote_path(path: str) -> str:
    """A path for a message: verbatim if it is printable and short, else quoted."""
    return path if path.isprintable() and len(path) <= 300 else quote(path)


def _root(loader: Loader, place: str, compose, with_line: bool = True):
    """Compose the root node of the text."""
    try:
        return compose()
    except _Rejected as error:
        at = f":{error.mark.line + 1}:{error.mark.column + 1}" if with_line else ""
        raise UserError(f"{place}{at}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark and with_line else ""
        raise UserError(f"{place}{at}: not valid YAML: {_cut(error.problem)}") from None
    except UNREADABLE as error:
        at = f":{loader.line + 1}" if with_line else ""
        raise UserError(f"{place}{at}: not valid YAML: {_cut(error)}") from None


def _construct(loader: Loader, node, place: str, key: str) -> Any:
    try:
        _reject_repeated(node, place, key)
        return loader.construct_object(node, deep=True)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{place}: {quote(key)} can't be read: {_cut(error.problem)}; put a string in quotes") from None
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{place}: {quote(key)} can't be read: {_cut(error)}; put a string in quotes") from None


def _reject_repeated(node, place: str, outer: str) -> None:
    """Reject repeated keys in nested mappings, of which YAML silently takes the last."""
    if isinstance(node, yaml.CollectionNode):
        pairs = isinstance(node, yaml.MappingNode)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)] if pairs else []
        if len(set(keys)) < len(keys):
            repeated = next(key for number, key in enumerate(keys) if key in keys[:number])
            raise UserError(f"{place}: {quote(outer)} sets {quote(repeated)} twice; keep one")
        for part in node.value:
            _reject_repeated(part[1] if pairs else part, place, outer)


def _cut(error: Any) -> str:
    text = " ".join(str(error or type(error).__name__).split())
    return text if len(text) <= 120 else text[:119] + "…"


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _neighbours(file: Path, kind: str) -> str:
    """Existing files to suggest instead."""
    if kind != "recipe":
        return "; this project's are in launch/"
    near = sorted(str(p) for p in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
    if not near:
        return "; this project's recipes are in configs/"
    more = f" and {len(near) - 8} more" if len(near) > 8 else ""
    return f"; in {file.parent} there are {', '.join(near[:8])}{more}"
