"""The sha256 of a model's weight files, each read once per machine: by its own hub's name, or kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import torch

from rlhf.distributed.processes import rank, world_size
from rlhf.files import file_digest, read_json
from rlhf.models.counts import is_added
from rlhf.models.folder import base_of, is_adapter, weight_files, weights_damage


def weights_digest(name: str, revision: str | None = None) -> str:
    """A sha256 that changes with any weight of a model; of an adapter also with its config and its base's weights.

    The files are shared out over the ranks: a collective that all ranks must call.

    Args:
        name: a local folder, or a hub id.
        revision: of the hub.
    """
    files = weight_files(local_folder(base_of(name), None if is_adapter(name) else revision))
    if is_adapter(name):
        files += [Path(name) / "adapter_config.json", *weight_files(Path(name))]
    mine = {n: file_digest(file) for n, file in enumerate(files) if n % world_size() == rank()}
    if world_size() > 1:
        from accelerate.utils import gather_object

        mine = dict(pair for part in gather_object([list(mine.items())]) for pair in part)
    lines = "".join(f"{mine[n]}  {file.name}\n" for n, file in enumerate(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def weights_in_memory(model) -> str:
    """The same of a model that somebody has built, from its tensors: without new adapters, with a frozen one (`ref`)."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not is_added(name) or ".ref." in name:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def local_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a model's files: itself, or where the hub's are kept, fetched if they are not there yet."""
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    with contextlib.suppress(OSError, ValueError):  # nothing of it, or not this revision
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        if not weights_damage(folder, "model"):
            return folder
    configs = ["*.json"]  # first, since the index among them names the weights; others may lie beside them
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=configs))
    shards = (read_json(folder / "model.safetensors.index.json") or {}).get("weight_map", {"": "model.safetensors"})
    return Path(snapshot_download(name, revision=revision, allow_patterns=[*configs, *sorted(set(shards.values()))]))
