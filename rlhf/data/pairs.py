"""Preference pairs -> the three files of the classic recipe: accepted, rejected and preference data."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rlhf.config import UserError
from rlhf.data.formats import preference_rows
from rlhf.data.reading import Reading
from rlhf.data.sources import load_source
from rlhf.data.summary import line, summarise

FILES = ("accepted_data.jsonl", "rejected_data.jsonl", "preference_data.jsonl")


def write_pair_files(dataset_name: str, output_dir: str, split: str = "train", limit: int | None = None) -> int:
    """Write accepted_data.jsonl, rejected_data.jsonl (prompt, response) and preference_data.jsonl from any preference data,
    and print what the data is like.

    Returns:
        The number of pairs written.

    Raises:
        UserError: the data can't be read, or a file of that name is already there (nothing is overwritten).
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; expected a number of pairs above 0")
    reading = Reading()
    pairs = preference_rows(load_source(dataset_name, split).head(limit), reading)
    folder = Path(output_dir)
    if folder.is_file():
        raise UserError(f"{folder} is a file; name a folder as --output_dir")
    for name in FILES:
        if (folder / name).exists():
            raise UserError(f"{folder / name} is already there; move it away or name another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        FILES[0]: [{"prompt": p["prompt"], "response": p["chosen"]} for p in pairs],
        FILES[1]: [{"prompt": p["prompt"], "response": p["rejected"]} for p in pairs],
        FILES[2]: pairs,
    }
    for name, content in rows.items():
        partial = folder / f".{name}.partial"
        partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in content), encoding="utf-8")
        os.replace(partial, folder / name)
    print(f"{dataset_name}: {line(summarise(pairs, reading))}")
    return len(pairs)
