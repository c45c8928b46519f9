"""The run folder: whose it is, where to go on, and when it is complete. Imports no torch, so that skipping is instant.

A run folder holds the finished model (safetensors, tokenizer, template) and beside it
    recipe.yaml        the recipe as it was run, command line included
    provenance.json    versions, git commit, hardware, digests of data and input model, all arguments
    metrics.jsonl      one line a log
    checkpoint-N/      the trainer's state after step N; it gets this name when all of it is on the disk, with a manifest of
                       sizes and checksums (`whole.json`)
    stopped.json       of a run that was asked to stop: step, checkpoint and by what; gone when it goes on
    .lock              held by the run that writes here
    complete.json      written last: the model was reloaded and compared, with its files, sizes and sha256
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from rlhf import __version__
from rlhf.command import command_of, launcher_of, shell_line
from rlhf.config.defaults import describe, effective
from rlhf.config.recipe import HARMLESS, Recipe
from rlhf.errors import UserError, quote
from rlhf.files import read_json, whole_number
from rlhf.models import embedded
from rlhf.runs.records import checkpoints, look_at_complete, read_complete, read_recipe

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes")


OURS = re.compile(r"\.lock|stop|\.partial|\.rlhf-preflight-.*")  # may lie in a folder that is otherwise empty


@dataclass
class Run:
    """An output folder that is ours to write.

    Attributes:
        folder: the output directory.
        complete: what `complete.json` says, or None while there is work to do.
        resume_from: the newest whole checkpoint folder, or None to begin.
        lock: held while this process writes there.
    """

    folder: Path
    complete: dict[str, Any] | None
    resume_from: str | None
    lock: Lock | None = None


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
    found = _names_in(folder, where)
    if found and "recipe.yaml" not in found:
        raise UserError(
            f"{where}: output_dir {folder} holds other files ({', '.join(quote(n)[1:-1] for n in found[:4])}) and no run of "
            "ours; name another folder (nothing was overwritten)"
        )
    if found:
        refuse_other_run(recipe, folder, inputs)
    _check_writable(folder, where)
    return Run(folder, read_complete(folder), newest_checkpoint(folder))


def _names_in(folder: Path, where: str) -> list[str]:
    """What an output folder holds beside `OURS`; [] if it is not there yet."""
    for path in (folder, *folder.parents):
        if os.path.islink(path) and not os.path.exists(path):
            raise UserError(
                f"{where}: output_dir {quote(str(folder))[1:-1]}: {path} is a link to {os.readlink(path)}, which is not "
                "there; name another folder, or make that one"
            )
    if os.path.isfile(folder):
        raise UserError(f"{where}: output_dir {folder} is a file; name a folder")
    try:
        return sorted(p.name for p in folder.iterdir() if not OURS.fullmatch(p.name))
    except (FileNotFoundError, NotADirectoryError):  # the latter: it lies below a file, which _check_writable says
        return []
    except (OSError, ValueError) as error:  # too long, not permitted; a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{where}: output_dir {quote(str(folder))} can't be used: {reason}; name another folder"
        ) from None


def refuse_other_run(recipe: Recipe, folder: Path, inputs: dict[str, str]) -> None:
    """Raise UserError with what differs, if the run in `folder` is not this recipe's, of these inputs."""
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
            changed.append(f"the content of {named} is not what it was")
    if changed:
        shown = [c for i, c in enumerate(changed) if i == 0 or len("; ".join(changed[: i + 1])) <= 300]
        more = f"; and {len(changed) - len(shown)} more" if len(changed) > len(shown) else ""
        raise UserError(
            f"{recipe.where('output_dir')}: output_dir {folder} holds another run; it differs in {'; '.join(shown)}{more}. "
            f"Give --output_dir another folder, or --fresh for a new one beside it (nothing was overwritten)"
        )


def _inputs_before(folder: Path) -> dict[str, Any]:
    """The digests of the inputs that provenance.json has recorded; {} if that file was never written."""
    path = folder / "provenance.json"
    if not os.path.lexists(path):
        return {}
    provenance = read_json(path)
    inputs = None if provenance is None else provenance.get("inputs", {})
    if not isinstance(inputs, dict):
        raise UserError(
            f"{path} is damaged, so it can't be told whether data and input model are those of the run in this folder; move "
            "that file away to resume without this comparison, or give --fresh to train in a new folder"
        )
    return inputs


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
    started = {"command": command_of(recipe), "launcher": launcher_of()}
    text = f"# {recipe.path}, as it was run by `{' '.join(shell_line(started).split())}`\n"
    write_file(run.folder / "recipe.yaml", text + yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True))
    provenance = {
        "stage": recipe.stage,
        "recipe": recipe.path,
        **started,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": inputs,
        **environment(),
        "arguments": {k: v for k, v in arguments.items() if k != "token" and not k.endswith("_token")},
    }
    write_file(run.folder / "provenance.json", json.dumps(provenance, indent=2, default=str, ensure_ascii=False) + "\n")


def finish_run(run: Run, summary: dict[str, Any]) -> None:
    """Write complete.json, last of all (main process only)."""
    summary = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), **summary}
    write_file(run.folder / "complete.json", json.dumps(summary, indent=2, default=str, ensure_ascii=False) + "\n")


MANIFEST = "whole.json"


def digest_files(folder: Path, part: int = 0, parts: int = 1) -> dict[str, list]:
    """`{name: [bytes, sha256]}` of a checkpoint's files, each brought to the disk; of every `parts`-th one from `part`."""
    found = {}
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)[part::parts]:
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            os.fsync(opened.fileno())
        found[str(file.relative_to(folder))] = [file.stat().st_size, digest]
    return found


def place_checkpoint(partial: Path, folder: Path, files: dict[str, list], **more: Any) -> None:
    """Write the manifest of a checkpoint that is on the disk, and give it its name: from now on it may be resumed.

    Args:
        partial: where its files are.
        folder: where it belongs (`checkpoint-N`); one that is there already is replaced.
        files: of `digest_files`.
        more: what else the manifest tells (processes, layout, ...).
    """
    write_file(partial / MANIFEST, json.dumps({"files": files, **more}) + "\n")
    for directory in {partial, *(f.parent for f in partial.rglob("*"))}:
        _sync_folder(directory)
    if folder.exists():
        remove_checkpoint(folder)
    os.rename(partial, folder)
    _sync_folder(folder.parent)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint so that a kill in between leaves nothing that looks whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def rotate_checkpoints(folder: Path, keep: int | None, best: str | None = None) -> None:
    """Delete all whole checkpoints but the newest `keep` and the best one, and what a kill has left half-written."""
    numbered = checkpoints(folder)
    whole = [step for step in sorted(numbered) if (numbered[step] / MANIFEST).is_file()]
    old = whole[: -max(keep, 1)] if keep else []
    for step, path in numbered.items():
        if (step in old or (whole and step not in whole)) and str(path) != best:
            remove_checkpoint(path)


def newest_checkpoint(folder: Path, verify: bool = False, tell=lambda text: None) -> str | None:
    """The checkpoint of the highest step whose files are all there in their size, or None.

    Args:
        verify: read all files and compare their checksums too.
        tell: is called with a sentence about each checkpoint that is passed over.
    """
    for _, path in sorted(checkpoints(folder).items(), reverse=True):
        damage = checkpoint_damage(path, verify)
        if not damage:
            return str(path)
        tell(f"{path} is damaged and not used: {damage}")
    return None


def checkpoint_damage(folder: Path, verify: bool = False) -> str:
    """What is wrong with a checkpoint; '' if nothing is."""
    manifest = read_manifest(folder)
    files = (manifest or {}).get("files")
    if manifest is None or not isinstance(files, dict) or not files:
        return "it was never finished (no manifest that can be read)"
    if not _is_layout(manifest.get("layout")):
        return f"its manifest says layout: {quote(manifest['layout'])}"
    for name, noted in files.items():
        damage = _file_damage(folder, name, noted, verify)
        if damage:
            return damage
    return ""


def _file_damage(folder: Path, name: str, noted: Any, verify: bool) -> str:
    size, digest = (
        noted if isinstance(noted, list) and len(noted) == 2 else (noted, None)
    )  # before there were checksums
    if whole_number(size) is None or not isinstance(digest, str | None):
        return f"its manifest says {quote(noted)} of {quote(name)}, expected size and sha256"
    if os.path.isabs(name) or ".." in Path(name).parts:
        return f"its manifest names {quote(name)}, a file outside of it"
    path = folder / name
    if not os.path.isfile(path):
        return f"{quote(name)[1:-1]} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes, {size} were written"
    if verify and digest:
        with open(path, "rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != digest:
                return f"the content of {name} is not what was written (sha256)"
    return ""


def _is_layout(layout: Any) -> bool:
    """Whether this is what `Layout.record` gives; also None, of before it was recorded."""
    if layout is None:
        return True
    texts = isinstance(layout, dict) and all(isinstance(layout.get(key), str) for key in ("engine", "split"))
    return texts and whole_number(layout.get("processes")) is not None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint's manifest says."""
    return read_json(Path(folder) / MANIFEST)


def sync_file(path: Path) -> None:
    """Bring a file's content to the disk."""
    with open(path, "rb") as opened:
        os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:  # some file systems sync no folders
        pass
    finally:
        os.close(opened)


def is_disk_trouble(error: BaseException) -> bool:
    """Whether an error says that a disk is full or can't be written to, in whichever library's words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        return True
    words = (
        "No space left on device",
        "Read-only file system",
        "Disk quota exceeded",
        "file write failed",
        "unexpected pos",
    )
    return any(word in str(error) for word in words)  # safetensors' errors, and those of torch's zip writer


class Lock:
    """An output folder is written by one run at a time; the kernel lets go of it when the process ends, however it does."""

    def __init__(self, folder: Path, where: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / ".lock"
        self.file = open(self.path, "a+", encoding="utf-8")
        try:
            self._take()
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip()
            self.file.close()
            raise UserError(
                f"{where}: output_dir {folder} is being written by another run ({holder}); wait for it, stop it, or give "
                "--output_dir another folder"
            ) from None
        except OSError:  # a file system without locks
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {platform.node()}, since {now}")
        self.file.flush()

    def _take(self, attempts: int = 3) -> None:
        for left in reversed(range(attempts)):
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:  # `rlhf status` looks whether it is held by holding it for a moment
                if not left:
                    raise
                time.sleep(0.1)

    def release(self) -> None:
        """Let go of the folder, and remove it if there is nothing else in it."""
        if not any(p.name != ".lock" for p in self.path.parent.iterdir()):
            self.path.unlink()
            self.path.parent.rmdir()
        self.file.close()


def fresh_folder(folder: Path) -> Path:
    """The first of `folder`, `folder-2`, `folder-3`, ... that holds nothing yet."""
    if folder.name in ("", ".."):
        raise UserError(
            f"--fresh makes a new folder beside output_dir, and {folder} has no name; give --output_dir another one"
        )
    number, found = 1, folder
    while os.path.lexists(found) and (not os.path.isdir(found) or os.listdir(found)):
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


def model_digest(name: str) -> str:
    """What a model is, as a short text, so that a stage notices that its input model was trained anew.

    The sha256 of the embedded model, or the one that the model's own run recorded; for other folders the names and sizes
    of their weight files; a hub id as it is (its commit is in provenance.json).
    """
    if name == embedded.NAME:
        return embedded.GGUF_SHA256
    folder = Path(name)
    if not os.path.isdir(folder):
        return name
    summary, damage = look_at_complete(folder)
    if damage:
        raise UserError(
            f"{folder / 'complete.json'} is damaged ({damage}), so it can't be told which model this is; if the weights beside it "
            "are right, remove that file, else write or copy the model again"
        )
    recorded = (summary or {}).get("weights_sha256")
    weights = [w for w in sorted(folder.glob("*.safetensors")) if os.path.isfile(w)]  # not links to what is gone
    return recorded or "+".join(f"{w.name}:{w.stat().st_size}" for w in weights)


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
    """The commit of the source tree this package runs from, with `+changes` if it is not clean; None outside of git.

    An image has no git: there RLHF_GIT_COMMIT tells it.
    """
    if os.environ.get("RLHF_GIT_COMMIT"):
        return os.environ["RLHF_GIT_COMMIT"]
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


def write_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
