"""Who this process is among those of a launch, and what only the main one does."""

from __future__ import annotations

import os


def is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def say(text: str = "") -> None:
    """Print on the main process only, at once."""
    if is_main():
        print(text, flush=True)
