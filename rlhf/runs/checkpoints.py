"""Checkpoints on disk: atomic (a manifest of sizes and checksums, then a rename), verified before they are resumed."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from rlhf.errors import quote
from rlhf.files import non_negative_int, read_json, sha256_of, sync_file, sync_folder, write_file
from rlhf.runs.records import checkpoints

MANIFEST = "manifest.json"


def digest_files(folder: Path, part: int = 0, parts: int = 1, but: re.Pattern | None = None) -> dict[str, list]:
    """`{name: [bytes, sha256]}` of a checkpoint's files, each synced to disk; every `parts`-th file from `part` on.

    Args:
        but: file names that are left out: who wrote them knows their digests.
    """
    found, names = {}, (f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)
    for file in sorted(f for f in names if not (but and but.fullmatch(f.name)))[part::parts]:
        sync_file(file)
        found[str(file.relative_to(folder))] = [file.stat().st_size, sha256_of(file)]
    return found


def place_checkpoint(partial: Path, folder: Path, files: dict[str, list], **more: Any) -> None:
    """Write the manifest of a checkpoint whose files are on disk, and rename it: from now on it can be resumed.

    Args:
        partial: the folder that holds its files.
        folder: the final name (`checkpoint-N`); an existing checkpoint of that name is replaced.
        files: from `digest_files`.
        more: further entries of the manifest (processes, layout, ...).
    """
    write_file(partial / MANIFEST, json.dumps({"files": files, **more}) + "\n")
    for directory in {partial, *(f.parent for f in partial.rglob("*"))}:
        sync_folder(directory)
    if folder.exists():
        remove_checkpoint(folder)
    os.rename(partial, folder)
    sync_folder(folder.parent)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, its manifest first, so that a kill meanwhile leaves nothing that looks complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def rotate_checkpoints(folder: Path, keep: int | None, best: str | None = None) -> None:
    """Delete all complete checkpoints but the newest `keep` and the best one, and incomplete ones that a kill left."""
    numbered = checkpoints(folder)
    complete = [step for step in sorted(numbered) if (numbered[step] / MANIFEST).is_file()]
    old = complete[: -max(keep, 1)] if keep else []
    for step, path in numbered.items():
        if (step in old or (complete and step not in complete)) and str(path) != best:
            remove_checkpoint(path)


def newest_checkpoint(folder: Path) -> str | None:
    """The checkpoint of the highest step whose files are all present with their recorded sizes, or None."""
    steps = sorted(checkpoints(folder).items(), reverse=True)
    return next((str(path) for _, path in steps if not checkpoint_damage(path)), None)


def checkpoint_damage(folder: Path, verify: bool = False, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a checkpoint; '' if nothing is.

    Args:
        verify: also read every `parts`-th file from `part` on, from the largest, and compare its checksum: ranks share the
            files, so that each reads about as many bytes.
    """
    manifest = read_manifest(folder)
    files = (manifest or {}).get("files")
    if manifest is None or not isinstance(files, dict) or not files:
        return "it was never finished (no readable manifest)"
    if not _is_layout(manifest.get("layout")):
        return f"its manifest says layout: {quote(manifest['layout'])}"
    largest_first = sorted(files.items(), key=lambda item: _noted_size(item[1]), reverse=True)
    for name, noted in largest_first[part::parts]:
        damage = _file_damage(folder, name, noted, verify)
        if damage:
            return damage
    return ""


def _noted_size(noted: Any) -> int:
    return (non_negative_int(noted[0]) or 0) if isinstance(noted, list) and noted else 0


def _file_damage(folder: Path, name: str, noted: Any, verify: bool) -> str:
    size, digest = noted if isinstance(noted, list) and len(noted) == 2 else (None, None)
    if non_negative_int(size) is None or not isinstance(digest, str):
        return f"its manifest says {quote(noted)} of {quote(name)}, expected size and sha256"
    if os.path.isabs(name) or ".." in Path(name).parts:
        return f"its manifest names {quote(name)}, a file outside the checkpoint"
    path = folder / name
    if not os.path.isfile(path):
        return f"{quote(name)[1:-1]} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes, {size} were written"
    if verify:
        if sha256_of(path) != digest:
            return f"the content of {name} differs from what was written (sha256)"
    return ""


def _is_layout(layout: Any) -> bool:
    """Whether this is a result of `Topology.record`; also None, from before it was recorded."""
    if layout is None:
        return True
    texts = isinstance(layout, dict) and all(isinstance(layout.get(key), str) for key in ("engine", "split"))
    return texts and non_negative_int(layout.get("processes")) is not None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The content of a checkpoint's manifest; None if it can't be read."""
    return read_json(Path(folder) / MANIFEST)
