"""Reading files that a disk, an editor or a broken copy may have damaged: nothing here raises for a file's content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

# What PyYAML's constructors raise for a value that has a tag or the look of a type and isn't of it, and for 1,000 levels.
YAML_ERRORS = (
    yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError, RecursionError
)  # fmt: skip


def read_json(path: Path | str) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file, or anything else in it."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_json_lines(path: Path | str) -> list[dict[str, Any]]:
    """The JSON objects in a file of one a line; lines that are none (a kill tears the last one) are left out."""
    rows = []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except (OSError, ValueError):
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def whole_number(value: Any) -> int | None:
    """A value that is a whole number from 0 on, as int; None else (`"two"`, NaN, true)."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
