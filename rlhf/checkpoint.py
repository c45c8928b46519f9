"""The run folder: whose it is, where to go on, and when it is complete. Imports no torch, so that skipping is instant.

A run folder holds the finished model (safetensors, tokenizer, template) and beside it
    recipe.yaml        the recipe as it was run, command line included
    provenance.json    versions, git commit, hardware, digests of data and input model, all arguments
    metrics.jsonl      one line a log
    checkpoint-N/      the trainer's state after step N; whole once `whole.json` is in it
    complete.json      written last: the model was reloaded and compared, with its files, sizes and sha256
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from rlhf import __version__, embedded
from rlhf.config import HARMLESS, Recipe, UserError

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes")


@dataclass
class Run:
    """An output folder that is ours to write.

    Attributes:
        folder: the output directory.
        complete: what `complete.json` says, or None while there is work to do.
        resume_from: the newest whole checkpoint folder, or None to begin.
    """

    folder: Path
    complete: dict[str, Any] | None
    resume_from: str | None


def open_run(recipe: Recipe, inputs: dict[str, str]) -> Run:
    """Look at the output directory before anything is loaded: new, to be resumed, complete, or not ours.

    Args:
        recipe: the validated recipe.
        inputs: digests of the data and of the models that go in, by the name of their key.

    Raises:
        UserError: the folder holds another run (the differing keys are listed) or things that are no run, it can't be
            written to, or the disk is full. Nothing is changed.
    """
    folder = Path(recipe.values["output_dir"])
    where = recipe.where("output_dir")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{where}: output_dir {folder} is a file; name a folder")
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if found and "recipe.yaml" not in found:
        raise UserError(
            f"{where}: output_dir {folder} holds other files ({', '.join(found[:4])}) and no run of ours; "
            "name another folder (nothing was overwritten)"
        )
    if found:
        _refuse_other_run(recipe, folder, inputs)
    _check_writable(folder, where)
    return Run(folder, _read_json(folder / "complete.json"), newest_checkpoint(folder))


def _refuse_other_run(recipe: Recipe, folder: Path, inputs: dict[str, str]) -> None:
    try:
        before = dict(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, ValueError, TypeError):
        raise UserError(f"{folder / 'recipe.yaml'} can't be read; move the folder away and start again") from None
    changed = [
        f"{key}: {before.get(key)!r} -> {recipe.get(key)!r}"
        for key in sorted(set(before) | set(recipe.values))
        if key not in HARMLESS and before.get(key) != recipe.get(key)
    ]
    provenance = _read_json(folder / "provenance.json") or {}
    for key, digest in inputs.items():
        old = provenance.get("inputs", {}).get(key)
        if old is not None and old != digest and not any(c.startswith(f"{key}:") for c in changed):
            named = f"{key} ({recipe.get(key)})" if recipe.get(key) else f"the {key} data"
            changed.append(f"the content of {named} is not what it was")
    if changed:
        raise UserError(
            f"{recipe.where('output_dir')}: output_dir {folder} holds another run; it differs in {'; '.join(changed)}. "
            f"Give --output_dir another folder, or move {folder} away (nothing was overwritten)"
        )


def _check_writable(folder: Path, where: str) -> None:
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{where}: output_dir {folder} lies below the file {parent}; name another folder")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{where}: output_dir {folder} can't be written to ({parent} is read-only for this user)")


def check_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise UserError if the disk under `folder` has less than `needed_bytes` free."""
    parent = folder
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free, but {what} needs about {needed_bytes / 1e9:.2f} GB; "
            "free some, or give --output_dir a folder on another disk"
        )


def begin_run(run: Run, recipe: Recipe, inputs: dict[str, str], arguments: dict[str, Any]) -> None:
    """Write recipe.yaml and provenance.json (main process only)."""
    run.folder.mkdir(parents=True, exist_ok=True)
    text = f"# {recipe.path}, as it was run by `{' '.join(' '.join(sys.argv).split())}`\n"
    _write(run.folder / "recipe.yaml", text + yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True))
    provenance = {
        "stage": recipe.stage,
        "recipe": recipe.path,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": inputs,
        **environment(),
        "arguments": {k: v for k, v in arguments.items() if k != "token" and not k.endswith("_token")},
    }
    _write(run.folder / "provenance.json", json.dumps(provenance, indent=2, default=str, ensure_ascii=False) + "\n")


def finish_run(run: Run, summary: dict[str, Any]) -> None:
    """Write complete.json, last of all (main process only)."""
    summary = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), **summary}
    _write(run.folder / "complete.json", json.dumps(summary, indent=2, default=str, ensure_ascii=False) + "\n")


def mark_checkpoint(folder: Path) -> None:
    """Note the files and sizes of a checkpoint after all of them are written: from now on it may be resumed."""
    (folder / "whole.json").unlink(missing_ok=True)
    files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    _write(folder / "whole.json", json.dumps({"files": files}) + "\n")


def newest_checkpoint(folder: Path) -> str | None:
    """The checkpoint of the highest step whose files are all there in their size, or None."""
    steps = {}
    for path in folder.glob("checkpoint-*") if folder.is_dir() else []:
        if path.name.removeprefix("checkpoint-").isdigit():
            steps[int(path.name.removeprefix("checkpoint-"))] = path
    for step in sorted(steps, reverse=True):
        manifest = _read_json(steps[step] / "whole.json")
        if manifest and all(
            (steps[step] / name).is_file() and (steps[step] / name).stat().st_size == size
            for name, size in manifest["files"].items()
        ):
            return str(steps[step])
    return None


def model_digest(name: str) -> str:
    """What a model is, as a short text, so that a stage notices that its input model was trained anew.

    The sha256 of the embedded model, or the one that the model's own run recorded; for other folders the names and sizes
    of their weight files; a hub id as it is (its commit is in provenance.json).
    """
    if name == embedded.NAME:
        return embedded.GGUF_SHA256
    folder = Path(name)
    if not folder.is_dir():
        return name
    recorded = (_read_json(folder / "complete.json") or {}).get("weights_sha256")
    return recorded or "+".join(f"{w.name}:{w.stat().st_size}" for w in sorted(folder.glob("*.safetensors")))


def environment() -> dict[str, Any]:
    """Versions, git commit and hardware of this process."""
    versions = {"rlhf-dpo": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "git_commit": git_commit(), "hardware": hardware()}


def git_commit() -> str | None:
    """The commit of the source tree this package runs from, with `+changes` if it is not clean; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def hardware() -> dict[str, Any]:
    """Host, cores, memory and GPUs (GPUs only if torch is loaded already)."""
    found: dict[str, Any] = {"host": platform.node(), "cpus": os.cpu_count(), "platform": platform.platform()}
    if hasattr(os, "sysconf"):
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["processes"] = int(os.environ.get("WORLD_SIZE", 1))
    return found


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
