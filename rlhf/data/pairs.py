"""Preference pairs -> three files: accepted, rejected and preference data."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import stat
from pathlib import Path

from rlhf.config.stage_config import FORMATS
from rlhf.data.format_options import FormatOptions
from rlhf.data.prepare import prepare
from rlhf.data.raw import find
from rlhf.data.sources import load_source
from rlhf.data.summary import line, summarise
from rlhf.errors import UserError, quote
from rlhf.files import new_file

FILES = ("accepted_data.jsonl", "rejected_data.jsonl", "preference_data.jsonl")


def write_pair_files(
    dataset_name: str, output_dir: str, split: str | None = None, limit: int | None = None, format: str | None = None
) -> int:
    """Write accepted_data.jsonl, rejected_data.jsonl (prompt, response) and preference_data.jsonl from any preference data,
    and print a summary of the data.

    Args:
        format: of the rows, if several fit.

    Returns:
        The number of pairs written.

    Raises:
        UserError: the data can't be read, or one of the files already exists (nothing is overwritten).
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; expected at least 1 pair")
    if format is not None and format not in FORMATS:
        near = difflib.get_close_matches(format[:100], FORMATS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"--format: there is no format {quote(format)}; expected one of {', '.join(FORMATS)}{hint}")
    found = prepare(load_source(dataset_name, split).head(limit), "pairs", FormatOptions(format))
    folder = _output_folder(output_dir)
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(new_file(folder / name)) for name in FILES]
        for row in found.rows:
            del row["place"]
            parts = ({"prompt": row["prompt"], "response": row[side]} for side in ("chosen", "rejected"))
            for file, content in zip(files, (*parts, row), strict=True):
                file.write(json.dumps(content, ensure_ascii=False) + "\n")
    print(f"{dataset_name}: {line(summarise(found.rows, found.num_unused, stripped=found.stripped))}")
    return len(found.rows)


def _output_folder(output_dir: str) -> Path:
    """The folder, created if needed, without any of our files in it."""
    folder, status = find(output_dir, "--output_dir: ")
    if status and not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{folder} is a file; give a folder as --output_dir")
    for name in FILES if status else ():
        if os.path.lexists(folder / name):
            raise UserError(f"{folder / name} already exists; move it away or give another --output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} can't be created: {error.strerror}; give another --output_dir") from None
    return folder
