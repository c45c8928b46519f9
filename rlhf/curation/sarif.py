"""Findings as SARIF 2.1.0, which code review tools show beside the lines of a file."""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path
from typing import Any

from rlhf import __version__
from rlhf.curation.findings import KINDS, Finding

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LINE = re.compile(r"(?s)(.+):([1-9]\d*)\Z")


def sarif(findings: list[Finding], target: str) -> dict[str, Any]:
    """A SARIF log: a rule per kind of finding, and a result per place.

    Args:
        target: where findings of the data as a whole are.
    """
    rules = sorted({finding.kind for finding in findings}, key=list(KINDS).index)
    results = [
        {
            "ruleId": finding.kind, "ruleIndex": rules.index(finding.kind), "level": finding.level,
            "message": {"text": f"{finding.title}: {about}" if about else finding.title},
            "locations": [location(place)],
        }
        for finding in findings
        for place, about in (finding.places or (("", ""),))
        for place in (place or target,)
    ]  # fmt: skip
    driver = {
        "name": "rlhf data check",
        "version": __version__,
        "rules": [
            {
                "id": kind, "shortDescription": {"text": KINDS[kind].title}, "help": {"text": KINDS[kind].fix},
                "defaultConfiguration": {"level": KINDS[kind].level},
            }
            for kind in rules
        ],
    }  # fmt: skip
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}


def location(place: str) -> dict[str, Any]:
    """A line of a file, a file, or the name of a row that has no line.

    Example: location("a b.jsonl:3") -> {"physicalLocation": {"artifactLocation": {"uri": "a%20b.jsonl"}, "region": {"startLine": 3}}}.
    """
    match = _LINE.match(place)
    name = match[1] if match else place
    if not match and not Path(place).is_file():
        return {"logicalLocations": [{"fullyQualifiedName": place, "kind": "object"}]}
    uri = urllib.parse.quote(name)
    physical: dict[str, Any] = {"artifactLocation": {"uri": f"file://{uri}" if name.startswith("/") else uri}}
    if match:
        physical["region"] = {"startLine": int(match[2])}
    return {"physicalLocation": physical}
