"""Texts that look like a secret, by detect-secrets; what was found is never shown."""

from __future__ import annotations

import dataclasses
from typing import Any

from rlhf.curation.batches import batches
from rlhf.curation.findings import QUOTING, Finding, Place, texts_of
from rlhf.data.store import Rows
from rlhf.errors import UserError, pip_install

# Those that know a form; not those that guess by entropy or by a word such as "password", which most texts about code hold.
_GUESSING = ("Base64HighEntropyString", "HexHighEntropyString", "KeywordDetector", "IPPublicDetector")


def require() -> None:
    """Raise UserError if detect-secrets is missing."""
    import importlib.util

    if importlib.util.find_spec("detect_secrets") is None:
        raise UserError(f"--secrets needs the package detect-secrets: {pip_install('rlhf-dpo[data]')}")


def secrets(rows: Rows, most: int | None, others: list[Finding]) -> list[Finding]:
    """The findings, and the rows with a text that has the form of a key, a token or a password in an address.

    Args:
        others: findings so far; what they quote of such rows, or quote that looks like a secret, is left out.
    """
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.core.scan import scan_line
    from detect_secrets.settings import transient_settings

    classes: dict[str, type] = get_mapping_from_secret_type_to_class()
    every = {plugin.__name__ for plugin in classes.values()}
    plugins = [{"name": name} for name in sorted(every - set(_GUESSING))]
    places: list[Place] = []
    held: set[str] = set()
    with transient_settings({"plugins_used": plugins}):
        for first, batch in batches(rows, "Looking for secrets"):
            for index, row in enumerate(batch, first):
                about = _about(row, scan_line)
                if not about:
                    continue
                held.add(rows.place(index))
                if most is None or len(places) < most:
                    places.append(Place(rows.place(index), about))
        hidden = [_hidden(finding, held, scan_line) for finding in others]
    return [*hidden, *([Finding("secrets", len(held), tuple(places))] if held else [])]


def _hidden(finding: Finding, held: set[str], scan_line) -> Finding:
    quotes = finding.kind in QUOTING
    places = tuple(
        Place(place.place, "not shown: this row holds what looks like a secret")
        if quotes and place.about and (place.place in held or any(scan_line(place.about))) else place
        for place in finding.places
    )  # fmt: skip
    return dataclasses.replace(finding, places=places)


def _about(row: dict[str, Any], scan_line) -> str:
    """Where in the row what kind of secret is; '' if there is none."""
    found = [
        f"{where}, line {line}: {kind}"
        for where, text in texts_of(row)
        for line, words in enumerate(text.splitlines(), 1)
        for kind in sorted({secret.type for secret in scan_line(words)})
    ]
    return "; ".join(found[:3]) + (", …" if len(found) > 3 else "")
