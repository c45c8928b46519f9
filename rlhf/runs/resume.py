"""Which checkpoint a run resumes from, agreed on by all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.distributed.processes import is_main, say
from rlhf.errors import UserError
from rlhf.files import Lock
from rlhf.runs.checkpoints import newest_checkpoint, read_manifest
from rlhf.runs.folder import RunFolder


def take_over(run: RunFolder, where: str, layout: dict[str, Any]) -> tuple[str | None, bool]:
    """Lock the run folder for this run, and find the checkpoint to go on from, its checksums verified.

    Returns:
        The checkpoint's folder, the same on all processes, or None to begin; whether its state is in one piece.

    Raises:
        UserError: another run writes there, or the checkpoint is of a layout that this one can't read; on all processes.
    """
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, "", False]
    if is_main():
        try:
            run.lock = Lock(run.folder, where)
            found[0] = newest_checkpoint(run.folder, verify=True, tell=lambda text: say(f"warning: {text}"))
            if found[0]:
                found[2] = check_readable(found[0], layout)
            (run.folder / "stopped.json").unlink(missing_ok=True)
        except UserError as error:
            found[1] = str(error)
    found = broadcast_object_list(found)
    if found[1]:
        raise UserError(found[1])
    return found[0], found[2]


def check_readable(checkpoint: str, layout: dict[str, Any]) -> bool:
    """Refuse a checkpoint that another engine has split; returns whether its state is in one piece, which any engine reads."""
    from rlhf.runs.portable import is_portable

    manifest = read_manifest(Path(checkpoint)) or {}
    if is_portable(manifest.get("files", {})):
        return True
    before = manifest.get("layout")
    if before is None or {before["split"], layout["split"]} <= {"no"}:
        return False
    same = before["split"] == layout["split"] and (
        before["split"] == "FSDP" or before["processes"] == layout["processes"]
    )
    if not same:
        raise UserError(
            f"{checkpoint} was written by {before['processes']} processes under {before['engine']}, and can't be read by "
            f"{layout['processes']} under {layout['engine']}: it was saved without `portable_checkpoints: true` (the default "
            "with LoRA). Go on as before (with that key the next checkpoint can be read by any), or begin anew with --fresh"
        )
    return False
