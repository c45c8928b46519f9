"""Where what a recipe names lies in a bundle: below the current folder at the same path, all else in a folder of its kind."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from rlhf.bundle.archive import HEADER, SUMS, is_safe
from rlhf.errors import UserError, quote

# What a bundle has beside what recipes name.
OWN = frozenset(
    (HEADER, SUMS, "setup.sh", "run.sh", "env.sh", "wheels", "hub", "cache", "launch", "slurm", ".venv", ".verified")
)


class Places:
    """The path in the bundle of each path that recipes name.

    Args:
        paths: (path as given, folder for it if it is outside of the current folder) of all of them, outputs too.
        root: the current folder, from which relative paths start.
        fixed: paths whose place is decided already.
    """

    def __init__(self, paths: Iterable[tuple[str, str]], root: Path, fixed: dict[Path, str] | None = None):
        self.root = root
        self.found: dict[str, str] = {os.path.realpath(path): place for path, place in (fixed or {}).items()}
        outside: dict[str, tuple[str, str]] = {}
        for path, folder in paths:
            key = self._key(path)
            if key in self.found:
                continue
            kept = self._below_root(path)
            if kept:
                self.found[key] = kept
            else:
                outside.setdefault(key, (path, folder))
        for key, (path, folder) in outside.items():
            self.found.setdefault(key, self._new(path, folder))

    def of(self, path: str) -> str:
        """The place of a path, or of one inside a folder, that was given."""
        key = self._key(path)
        if key in self.found:
            return self.found[key]
        inside = max((known for known in self.found if key.startswith(f"{known}/")), key=len)
        return f"{self.found[inside]}{key[len(inside) :]}"

    def _key(self, path: str) -> str:
        return os.path.realpath(self.root / os.path.expanduser(path))

    def _below_root(self, path: str) -> str:
        """The path from the current folder, if it is below; else ''."""
        path = os.path.expanduser(path)
        for full, root in (
            (os.path.normpath(self.root / path), self.root),
            (self._key(path), os.path.realpath(self.root)),
        ):
            place = os.path.relpath(full, root)
            top = place.split("/")[0]
            if top not in (".", "..") and top not in OWN and is_safe(place):
                return place
        return ""

    def _new(self, path: str, folder: str) -> str:
        """`folder/NAME`, or with a number where that is taken."""
        name = PurePosixPath(os.path.normpath(self.root / os.path.expanduser(path))).name or "root"
        if not is_safe(f"{folder}/{name}"):
            raise UserError(f"{quote(path)} can't be a path in a bundle; rename it, without control characters")
        stem, dot, rest = name.partition(".")
        for number in range(1, 10_000):
            place = f"{folder}/{name if number == 1 else f'{stem}-{number}{dot}{rest}'}"
            if not any(
                place == taken or place.startswith(f"{taken}/") or taken.startswith(f"{place}/")
                for taken in self.found.values()
            ):
                return place
        raise AssertionError(f"no free name for {path}")
