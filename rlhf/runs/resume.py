"""Which checkpoint a run resumes from, agreed on by all ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rlhf.distributed.processes import is_main, say
from rlhf.errors import UserError
from rlhf.files import Lock
from rlhf.runs.checkpoints import newest_checkpoint, read_manifest
from rlhf.runs.folder import RunFolder


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

    found: list[Any] = [None, "", False]
    lock = None
    if is_main():
        try:
            lock = Lock(run.folder, where)
            for partial in run.folder.glob(".*.partial"):  # of a write that a kill interrupted
                partial.unlink()
            found[0] = newest_checkpoint(run.folder, verify=True, tell=lambda text: say(f"warning: {text}"))
            if found[0]:
                found[2] = check_readable(found[0], topology)
            (run.folder / "stopped.json").unlink(missing_ok=True)
        except UserError as error:
            found[1] = str(error)
    checkpoint, refused, unsharded = broadcast_object_list(found)
    if refused:
        if lock:
            lock.release()
        raise UserError(refused)
    return dataclasses.replace(run, resume_from=checkpoint, lock=lock, resumes_unsharded=unsharded)


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
