"""Which checkpoint a run resumes from, agreed on by all ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rlhf.distributed.processes import is_main, rank, say, world_size
from rlhf.errors import UserError
from rlhf.files import Lock
from rlhf.runs.checkpoints import checkpoint_damage, read_manifest
from rlhf.runs.folder import RunFolder
from rlhf.runs.records import checkpoints


def take_over(run: RunFolder, where: str, topology: dict[str, Any]) -> RunFolder:
    """Lock the run folder for this run, and find the checkpoint to resume from, its checksums verified.

    Args:
        where: the place of `output_dir`, for messages.
        topology: of `Topology.record`.

    Returns:
        The folder with the checkpoint (the same on all ranks) and, on the main rank, the lock.

    Raises:
        UserError: another run writes there, or the checkpoint is sharded so that this run can't read it; on all ranks.
    """
    from accelerate.utils import broadcast_object_list

    lock, refused = None, ""
    if is_main():
        try:
            lock = Lock(run.folder, where)
            for partial in run.folder.glob(".*.partial"):  # of a write that a kill interrupted
                partial.unlink()
        except UserError as error:
            refused = str(error)
    if refused := broadcast_object_list([refused])[0]:
        raise UserError(refused)
    try:
        checkpoint = verified_checkpoint(run.folder)
        unsharded = checkpoint is not None and check_readable(checkpoint, topology)
    except BaseException:
        if lock:
            lock.release()
        raise
    if is_main():
        (run.folder / "stopped.json").unlink(missing_ok=True)
    return dataclasses.replace(run, resume_from=checkpoint, lock=lock, resumes_unsharded=unsharded)


def verified_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint whose checksums are right, or None; the ranks share the reading, and all must call it."""
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
    """Refuse a checkpoint that another engine has split; returns whether its state is in one piece, which any engine reads."""
    from rlhf.runs.portable import is_portable

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
            f"{topology['processes']} under {topology['engine']}: it was saved without `portable_checkpoints: true` (the default "
            "with LoRA). Go on as before (with that key the next checkpoint can be read by any), or begin anew with --fresh"
        )
    return False
