"""Which checkpoint a run resumes from, agreed on by all ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rlhf.distributed.processes import is_main, on_main, rank, say, world_size
from rlhf.errors import UserError
from rlhf.files import Lock
from rlhf.runs.checkpoints import checkpoint_damage, read_manifest
from rlhf.runs.folder import RunFolder
from rlhf.runs.records import checkpoints


def lock_folder(folder: Path, where: str) -> Lock | None:
    """Lock the run folder for this run, and remove what an interrupted write has left there.

    Args:
        where: the line of `output_dir` in the recipe, for messages.

    Returns:
        The lock on the main rank, None on the others.

    Raises:
        UserError: another run writes there; RankFailed on the other ranks.
    """
    taken: list[Lock] = []

    def take() -> None:
        taken.append(Lock(folder, where))
        for partial in folder.glob(".*.partial"):
            partial.unlink()

    on_main(take)
    return taken[0] if taken else None


def find_checkpoint(run: RunFolder, topology: dict[str, Any]) -> RunFolder:
    """The run folder with the checkpoint to resume from, the same on all ranks; its checksums are verified.

    Args:
        topology: from `Topology.record`.

    Raises:
        UserError: this run can't read the checkpoint's shards.
    """
    checkpoint = verified_checkpoint(run.folder)
    anywhere = check_readable(checkpoint, topology) if checkpoint else False
    if is_main():
        (run.folder / "stopped.json").unlink(missing_ok=True)
    return dataclasses.replace(run, resume_from=checkpoint, resumes_anywhere=anywhere)


def verified_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint whose checksums match, or None. A collective: the ranks share the files to read."""
    from accelerate.utils import broadcast_object_list, gather_object

    paths = [str(path) for _, path in sorted(checkpoints(folder).items(), reverse=True)]
    for path in broadcast_object_list([paths])[0]:
        damage = checkpoint_damage(Path(path), verify=True, part=rank(), parts=world_size())
        damage = next(filter(None, gather_object([damage])), "")
        if not damage:
            return path
        say(f"warning: {path} is damaged and not used: {damage}")
    return None


def check_readable(checkpoint: str, topology: dict[str, Any]) -> bool:
    """Raise UserError for a checkpoint that only another engine can read; returns whether any engine can."""
    from rlhf.runs.portable_index import is_portable

    manifest = read_manifest(Path(checkpoint)) or {}
    if is_portable(manifest.get("files", {})):
        return True
    before = manifest.get("layout")
    if before is None or {before["split"], topology["split"]} <= {"no"}:
        return False
    same = before["split"] == topology["split"] and (
        before["split"] == "FSDP" or before["processes"] == topology["processes"]
    )
    if not same:
        raise UserError(
            f"{checkpoint} was written by {before['processes']} processes under {before['engine']}, and can't be read by "
            f"{topology['processes']} under {topology['engine']}: it was saved with `portable_checkpoints: false`, or its "
            "optimizer keeps a state of its own shape. Resume as before (without that key the next checkpoint can be read by "
            "any engine), or start from scratch with --fresh"
        )
    return False
