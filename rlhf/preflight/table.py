"""The rows of preflight's table, and the format of its numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A problem: its level (`error` or `warning`), what was found (with the host), and the fix."""

    level: str
    found: str
    fix: str


@dataclass(frozen=True)
class Row:
    """A row of the table, with its findings."""

    check: str
    shown: str
    findings: tuple[Finding, ...] = ()

    @property
    def status(self) -> str:
        """`ok`, or the worst level among its findings."""
        levels = {f.level for f in self.findings}
        return "error" if "error" in levels else "warning" if levels else "ok"


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count < 10e9 else f"{count / 1e9:,.0f} GB"


def speed(count: float) -> str:
    return f"{count / 1e9:.1f} GB/s" if count >= 1e9 else f"{count / 1e6:.0f} MB/s"


def near_time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
