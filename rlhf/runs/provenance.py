"""The provenance of a run: versions, hardware, git commit, digests of its input models."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf import __version__
from rlhf.config.recipe import Recipe
from rlhf.distributed.processes import world_size
from rlhf.errors import UserError
from rlhf.files import read_json
from rlhf.models import embedded
from rlhf.runs.records import look_at_complete

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes")


def model_digest(name: str) -> str:
    """A short text that identifies a model, so that a stage notices when its input model was trained again.

    The sha256 of the embedded model, or the one recorded by the model's own run; for other folders the names and sizes
    of their weight files; for a hub id the id itself (its commit is in provenance.json).
    """
    if name == embedded.NAME:
        return embedded.GGUF_SHA256
    folder = Path(name)
    if not os.path.isdir(folder):
        return name
    summary, damage = look_at_complete(folder)
    if damage:
        raise UserError(
            f"{folder / 'complete.json'} is damaged ({damage}), so the model beside it can't be identified; if its "
            "weights are right, remove that file, else write or copy the model again"
        )
    recorded = (summary or {}).get("weights_sha256")
    weights = [w for w in sorted(folder.glob("*.safetensors")) if os.path.isfile(w)]  # without dangling links
    return recorded or "+".join(f"{w.name}:{w.stat().st_size}" for w in weights)


def labellers(recipe: Recipe) -> list[str]:
    """Digests of the weights of the reward models that chose this recipe's pairs, as `rlhf label` records beside its output."""
    names = recipe.get("dataset_name")
    found = set()
    for item in names if isinstance(names, list) else [names]:
        name = item.get("name") if isinstance(item, dict) else item
        record = (read_json(Path(f"{name}.provenance.json")) if isinstance(name, str) else None) or {}
        judge = (record.get("inputs") or {}).get("reward") if record.get("command") == "label" else None
        if isinstance(judge, dict) and isinstance(judge.get("weights_sha256"), str):
            found.add(judge["weights_sha256"])
    return sorted(found)


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

    A container image has no git: its build sets RLHF_GIT_COMMIT.
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
    """Host, cores, memory and GPUs (GPUs only if torch is already imported)."""
    found: dict[str, Any] = {"host": platform.node(), "cpus": os.cpu_count(), "platform": platform.platform()}
    if hasattr(os, "sysconf"):
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["processes"] = world_size()
    return found
