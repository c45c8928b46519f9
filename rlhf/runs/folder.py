"""The run folder: ownership, resume point, completion. Imports no torch, so that complete runs are skipped instantly.

A run folder holds the finished model (safetensors, tokenizer, template) and beside it
    recipe.yaml        the recipe as it was run, including overrides from the command line
    provenance.json    versions, git commit, hardware, digests of data and input model, all arguments
    metrics.jsonl      one line per log
    checkpoint-N/      the trainer's state after step N; renamed to this name once all of it is on disk, with a manifest
                       of sizes and checksums (`manifest.json`)
    stopped.json       of a run that was asked to stop: step, checkpoint and what asked; removed when the run resumes
    .lock              held by the run that writes here
    complete.json      written last, after the model was reloaded and compared: its files, sizes and sha256
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from rlhf.config.defaults import describe, effective
from rlhf.config.recipe import HARMLESS, Recipe
from rlhf.errors import UserError, quote
from rlhf.files import free_bytes, read_json, write_file
from rlhf.runs.checkpoints import newest_checkpoint
from rlhf.runs.command import command_of, launcher_of, shell_line
from rlhf.runs.provenance import environment, labellers
from rlhf.runs.records import read_complete, read_recipe

# Allowed in an otherwise empty folder.
MERGED_START = ".merged-start"  # the adapter that a run starts from, merged into its base, until the run ends
MERGED_REFERENCE = ".merged-reference"  # the same of a reference model, until its log-probabilities are cached
OURS = re.compile(r"\.lock|stop|stopped\.json|\.partial|\.merged-(start|reference)(\.partial)?|\.rlhf-preflight-.*")


@dataclass(frozen=True)
class RunFolder:
    """An output folder that this run may write to.

    Attributes:
        folder: the output directory.
        complete: the content of `complete.json`; None while the run is not complete.
        resume_from: the newest complete checkpoint folder; None to start from scratch.
        resumes_anywhere: any launch file and world size can read the state in `resume_from`.
    """

    folder: Path
    complete: dict[str, Any] | None
    resume_from: str | None
    resumes_anywhere: bool = False


def open_run(recipe: Recipe, inputs: dict[str, str]) -> RunFolder:
    """Inspect the output directory before anything is loaded: new, to be resumed, complete, or not this run's.

    Args:
        recipe: the validated recipe.
        inputs: digests of the data and of the input models, by recipe key.

    Raises:
        UserError: the folder holds another run (the differing keys are listed) or other files, or it can't be written
            to. Nothing is changed.
    """
    folder = Path(recipe.values["output_dir"])
    where = recipe.where("output_dir")
    found = _names_in(folder, where)
    if found and "recipe.yaml" not in found:
        raise UserError(
            f"{where}: output_dir {folder} holds other files ({', '.join(quote(n)[1:-1] for n in found[:4])}) and "
            "no run; name another folder (nothing was overwritten)"
        )
    if found:
        refuse_other_run(recipe, folder, inputs)
    _check_writable(folder, where)
    return RunFolder(folder, read_complete(folder), newest_checkpoint(folder))


def _names_in(folder: Path, where: str) -> list[str]:
    """The names in an output folder other than `OURS`; [] if the folder does not exist yet."""
    for path in (folder, *folder.parents):
        if os.path.islink(path) and not os.path.exists(path):
            raise UserError(
                f"{where}: output_dir {quote(str(folder))[1:-1]}: {path} is a link to {os.readlink(path)}, which "
                "does not exist; name another folder, or create that one"
            )
    if os.path.isfile(folder):
        raise UserError(f"{where}: output_dir {folder} is a file; name a folder")
    try:
        return sorted(p.name for p in folder.iterdir() if not OURS.fullmatch(p.name))
    except (FileNotFoundError, NotADirectoryError):  # the latter: it is below a file, which _check_writable reports
        return []
    except (OSError, ValueError) as error:  # too long, not permitted; a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{where}: output_dir {quote(str(folder))} can't be used: {reason}; name another folder"
        ) from None


def refuse_other_run(recipe: Recipe, folder: Path, inputs: dict[str, str]) -> None:
    """Raise UserError with the differences if the run in `folder` has another recipe or other inputs."""
    before = read_recipe(folder / "recipe.yaml")
    if before is None:
        raise UserError(f"{folder / 'recipe.yaml'} can't be read; move the folder away and start again")
    changed = [
        f"{quote(key)[1:-1]}: {describe(before, recipe.stage, key)} -> {describe(recipe.values, recipe.stage, key)}"
        for key in sorted({str(key) for key in before} | set(recipe.values))
        if key not in HARMLESS and effective(before, recipe.stage, key) != effective(recipe.values, recipe.stage, key)
    ]
    recorded = _inputs_before(folder) if inputs else {}
    for key, digest in inputs.items():
        old = recorded.get(key)
        if old is not None and old != digest and not any(c.startswith(f"{key}:") for c in changed):
            named = f"{key} ({recipe.get(key)})" if recipe.get(key) else f"the {key} data"
            changed.append(f"the content of {named}")
    if changed:
        shown = [c for i, c in enumerate(changed) if i == 0 or len("; ".join(changed[: i + 1])) <= 300]
        more = f"; and {len(changed) - len(shown)} more" if len(changed) > len(shown) else ""
        raise UserError(
            f"{recipe.where('output_dir')}: output_dir {folder} holds another run; it differs in {'; '.join(shown)}{more}. "
            f"Give --output_dir another folder, or --fresh for a new one beside it (nothing was overwritten)"
        )


def _inputs_before(folder: Path) -> dict[str, Any]:
    """The digests of the inputs recorded in provenance.json; {} if that file was never written."""
    path = folder / "provenance.json"
    if not os.path.lexists(path):
        return {}
    provenance = read_json(path)
    inputs = None if provenance is None else provenance.get("inputs", {})
    if not isinstance(inputs, dict):
        raise UserError(
            f"{path} is damaged, so data and input model can't be compared with those of the run in this folder; move "
            "that file away to resume without this comparison, or give --fresh to train in a new folder"
        )
    return inputs


def _check_writable(folder: Path, where: str) -> None:
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{where}: output_dir {folder} is below the file {parent}; name another folder")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{where}: output_dir {folder} can't be written to ({parent} is read-only for this user)")


def check_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise UserError if the disk under `folder` has less than `needed_bytes` free."""
    free = free_bytes(folder)
    if free < needed_bytes:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free, but {what} needs about {needed_bytes / 1e9:.2f} GB; "
            "free some, or give --output_dir a folder on another disk"
        )


def start_run(run: RunFolder, recipe: Recipe, inputs: dict[str, str], arguments: dict[str, Any]) -> None:
    """Write recipe.yaml and provenance.json (main process only)."""
    run.folder.mkdir(parents=True, exist_ok=True)
    started = {"command": command_of(recipe), "launcher": launcher_of()}
    text = f"# {recipe.path}, as run by `{' '.join(shell_line(started).split())}`\n"
    write_file(run.folder / "recipe.yaml", text + yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True))
    provenance = {
        "stage": recipe.stage,
        "recipe": recipe.path,
        **started,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": inputs,
        **({"labelled_by": found} if (found := labellers(recipe)) else {}),
        **environment(),
        "arguments": {k: v for k, v in arguments.items() if k != "token" and not k.endswith("_token")},
    }
    write_file(run.folder / "provenance.json", json.dumps(provenance, indent=2, default=str, ensure_ascii=False) + "\n")


def finish_run(run: RunFolder, summary: dict[str, Any]) -> None:
    """Write complete.json, the last file of a run (main process only)."""
    summary = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), **summary}
    write_file(run.folder / "complete.json", json.dumps(summary, indent=2, default=str, ensure_ascii=False) + "\n")


def fresh_folder(folder: Path) -> Path:
    """The first of `folder`, `folder-2`, `folder-3`, ... that is empty or does not exist."""
    if folder.name in ("", ".."):
        raise UserError(
            f"--fresh makes a new folder beside output_dir, but {folder} has no name; give --output_dir another one"
        )
    number, found = 1, folder
    while os.path.lexists(found) and (not os.path.isdir(found) or os.listdir(found)):
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found
