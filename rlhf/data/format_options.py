"""The recipe keys `format`, `columns` and `roles`: how a user says what the columns of a file are."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.errors import UserError, quote

VERSION = (
    1  # of what the converters make of a row; raise it with any change of that, so that prepared data is made again
)

SCORES = "scores"  # `columns: {margin: scores}`: the difference of the two answers' scores


@dataclass(frozen=True)
class FormatOptions:
    """How rows are read; the default recognises everything by content.

    Attributes:
        format: the name of a format, or None.
        columns: (name that a format reads, column or dotted path in the file).
        roles: (role in the file, role).
        keeps_subset: rows keep the value of `subset` or `task`, by which an evaluation counts; training has no use for it.
        where: recipe key -> where it is set, for messages; not part of the key.
    """

    format: str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    roles: tuple[tuple[str, str], ...] = ()
    keeps_subset: bool = False
    where: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any], where: Callable[[str], str]) -> FormatOptions:
        """The options of a recipe's values, which config/recipe_checks.py has checked."""
        pairs = {key: tuple(sorted((values.get(key) or {}).items())) for key in ("columns", "roles")}
        places = tuple((key, where(key)) for key in ("format", "columns", "roles") if values.get(key))
        return cls(values.get("format"), pairs["columns"], pairs["roles"], values.get("stage") == "evaluate", places)

    def key(self) -> str:
        """A text that is the same for options that read all rows alike: part of the digest of prepared data."""
        parts = [VERSION, self.format, dict(self.columns), dict(self.roles)]
        return json.dumps([*parts, "subset"] if self.keeps_subset else parts, sort_keys=True)

    def place(self, key: str) -> str:
        """`recipe.yaml:7: `, or '' if it is unknown."""
        return f"{dict(self.where)[key]}: " if key in dict(self.where) else ""

    @property
    def rewrites(self) -> bool:
        return bool(self.columns or self.roles)

    @functools.cached_property
    def _hidden(self) -> frozenset[str]:
        """Columns that a row's view doesn't have: those that are renamed, and those whose name another one takes."""
        return frozenset(name for target, path in self.columns for name in (target, path, path.split(".")[0]))

    @functools.cached_property
    def _roles(self) -> dict[str, str]:
        return dict(self.roles)

    def view(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row as its format reads it."""
        if self.columns:
            new = {key: value for key, value in row.items() if key not in self._hidden}
            for target, path in self.columns:
                found = at(row, path)
                if found is not MISSING:
                    new[target] = found
            row = new
        return {key: _map_roles(value, self._roles) for key, value in row.items()} if self.roles else row

    def originals(self, used: set[str]) -> set[str]:
        """The file's columns behind the used columns of a view."""
        paths = dict(self.columns)
        found = set()
        for name in used:
            base, _, rest = name.partition(".")
            found.add(paths.get(name) or (f"{paths[base]}.{rest}" if base in paths else name))
        return found

    def explain(self, message: str) -> str:
        """An error of a view, with the file's names of the columns in it."""
        renamed = [f"'{target}' is the column {quote(path)}" for target, path in self.columns
                   if f"'{target}'" in message and target != path]  # fmt: skip
        return f"{message} ({', '.join(renamed)})" if renamed else message

    def check(self, rows: list[dict[str, Any]]) -> None:
        """Raise UserError for a column that none of the rows has."""
        for target, path in self.columns:
            if not rows or any(at(row, path) is not MISSING for row in rows) or (target, path) == ("margin", SCORES):
                continue
            names = sorted({name for row in rows for name in _paths(row)})
            near = difflib.get_close_matches(path[:100], names, n=3, cutoff=0.6)
            shown = f"did you mean {' or '.join(map(quote, near))}?" if near else f"it has {', '.join(names[:20])}"
            raise UserError(f"{self.place('columns')}columns: {target}: there is no column {quote(path)}; {shown}")


DEFAULT = FormatOptions()
MISSING = object()


def at(row: Any, path: str) -> Any:
    """The value of a column, or of a dotted path through mappings and lists; MISSING if there is none.

    Example: at({"input": {"messages": [1]}}, "input.messages") -> [1].
    """
    if isinstance(row, dict) and path in row:
        return row[path]
    for part in path.split("."):
        if isinstance(row, dict) and part in row:
            row = row[part]
        elif isinstance(row, list) and part.isdecimal() and int(part) < len(row):
            row = row[int(part)]
        else:
            return MISSING
    return row


def _paths(row: dict[str, Any]) -> list[str]:
    found = []
    for key, value in row.items():
        found.append(str(key))
        found += [f"{key}.{part}" for part in value] if isinstance(value, dict) else []
    return found


def _map_roles(value: Any, roles: dict[str, str]) -> Any:
    """The value with the roles of its messages renamed, also of those in mappings."""
    if isinstance(value, list):
        return [_map_roles(item, roles) for item in value] if value and isinstance(value[0], (dict, list)) else value
    if not isinstance(value, dict):
        return value
    for key in ("role", "from"):
        if isinstance(value.get(key), str):
            return {**value, key: roles.get(value[key], value[key])}
    return {key: _map_roles(item, roles) for key, item in value.items()}
