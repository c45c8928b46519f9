"""Rank and world size of this process, and work that only the main rank does."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

from rlhf.errors import RankFailed, UserError


def rank() -> int:
    """The rank of this process, from its launcher; 0 without one."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """The rank among the processes of this host."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def say(text: str = "") -> None:
    """Print on the main rank only, and flush."""
    if is_main():
        print(text, flush=True)


def on_main(work: Callable[[], None]) -> None:
    """Do `work` on the main rank while the others wait for its result: if it fails there, all ranks exit at once.

    Raises:
        RankFailed: on the other ranks, with the exit code of the main rank's error, which that rank reports.
        Exception: on the main rank, what `work` raised.
    """
    import torch

    error: BaseException | None = None
    if is_main():
        try:
            work()
        except Exception as failure:  # of any type: re-raised below, once the other ranks know
            error = failure
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        code = exchange_code(0 if error is None else 2 if isinstance(error, UserError) else 1)
        if code and error is None:
            raise RankFailed(code)
    if error is not None:
        raise error


_EXCHANGES = itertools.count()
ACKNOWLEDGED_S = 60.0  # how long the main rank waits for ranks that may have died


def exchange_code(code: int) -> int:
    """The main rank's code, on all ranks; they poll the process group's store for it.

    Writing a large model takes longer than the 30 minutes after which a collective fails, so none waits for it.
    """
    import torch

    store = torch.distributed.distributed_c10d._get_default_store()
    key = f"rlhf/main/{next(_EXCHANGES)}"
    if is_main():
        store.set(key, str(code))
        started = time.monotonic()  # this process may serve the store, and an error ends it
        while store.add(f"{key}/read", 0) < torch.distributed.get_world_size() - 1:
            if time.monotonic() - started > ACKNOWLEDGED_S:
                break
            time.sleep(0.05)
        return code
    pause_s = 0.05
    while not store.check([key]):
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 2.0)
    code = int(store.get(key))
    store.add(f"{key}/read", 1)
    return code


def shared_count(name: str, add: int = 0) -> int:
    """A number that all ranks see, after `add` was added to it; no collective, so a rank may be late or never ask."""
    import torch

    return int(torch.distributed.distributed_c10d._get_default_store().add(f"rlhf/{name}", add))


def wait_for_ranks(name: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Return once all ranks have called this, however long their work takes: no collective, which would time out.

    Args:
        name: used once in a process group.
        meanwhile: called every second or so while this rank waits.
    """
    shared_count(name, 1)
    pause_s = 0.02
    while shared_count(name) < world_size():
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)
        meanwhile()


def report_build_locks() -> None:
    """Name the locks of DeepSpeed's compilations: one that a killed process left makes every later start wait, silently."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        say(
            f"note: {lock} belongs to a process that compiles a part of DeepSpeed, or was left by one that was killed; if this "
            "start waits for minutes, delete it"
        )


def prepare_processes(args) -> None:
    """Set what accelerate 1.15 and DeepSpeed 0.19 don't set themselves on CPUs."""
    deepspeed_runs = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if deepspeed_runs:
        report_build_locks()
    if not args.use_cpu:
        return
    if deepspeed_runs:  # before a model loads: zero.Init reads the world size
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    # accelerate doesn't turn MULTI_CPU into FSDP: it would silently train DDP
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState().distributed_type = DistributedType.MULTI_GPU
