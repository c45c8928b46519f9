"""Who this process is among those of a launch, and what only the main one does."""

from __future__ import annotations

import os
from collections.abc import Callable

from rlhf.errors import RankFailed, UserError


def rank() -> int:
    """Of this process, as its launcher says; 0 without one."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Among the processes of this host."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def say(text: str = "") -> None:
    """Print on the main process only, at once."""
    if is_main():
        print(text, flush=True)


def on_main(work: Callable[[], None]) -> None:
    """Do `work` on the main rank while the others wait for its outcome: if it fails there, all ranks end at once.

    Raises:
        RankFailed: on the other ranks, with the exit code of the main rank's error, which that rank reports.
        Exception: on the main rank, what `work` raised.
    """
    import torch

    error: BaseException | None = None
    if is_main():
        try:
            work()
        except Exception as failure:  # of any kind: it is raised again below, once the other ranks know
            error = failure
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        from accelerate.utils import broadcast_object_list

        code = broadcast_object_list([0 if error is None else 2 if isinstance(error, UserError) else 1])[0]
        if code and error is None:
            raise RankFailed(code)
    if error is not None:
        raise error


def prepare_processes(args) -> None:
    """What accelerate 1.15 and DeepSpeed 0.19 have to be told where processes are on CPUs; nothing elsewhere."""
    if not args.use_cpu:
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # before a model loads, or zero.Init sees one process
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # MULTI_CPU is never made FSDP: it would train DDP, in silence
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState().distributed_type = DistributedType.MULTI_GPU
