"""Graceful stopping: on a signal or a stop file all ranks agree on the step, save, and exit with code 85.

Also `leave`: clean exit of one rank of a distributed job.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rlhf.distributed.processes import is_main, local_rank, world_size

EXIT_STOPPED = 85  # the run was asked to stop; the same command resumes it
SAME_INTERRUPT_S = 1.0  # on Ctrl-C a process gets SIGINT twice: from the terminal and from its launcher
STOP_FILE = "stop"
STOP_FILE_VARIABLE = "RLHF_STOP_FILE"  # path of a second stop file, for scripts that don't know the run folder
EXIT_VARIABLE = "RLHF_EXIT_STOPPED"  # exit code to use in place of 85
NOT_FINITE, SPIKE = "loss", "gradient"  # not stop requests: failures that abort the run


class Stopped(Exception):
    """The run was asked to stop, and everything has been saved."""


class OutOfMemory(Exception):
    """One rank has run out of memory; that rank reports it, whichever it is."""


class Stopper:
    """Records requests to stop, and lets all ranks agree on one.

    A request is a signal SIGTERM, SIGINT or SIGUSR1 to any rank, a file named `stop` in the run folder, or the file
    named by the environment variable RLHF_STOP_FILE (its creator also removes it). A second SIGINT stops immediately.

    Attributes:
        asked_by: the request that this rank has received, or ''.
        agreed: the request that all ranks have agreed on, or ''.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, folder: Path):
        self.folder, self.asked_by, self.agreed = folder, "", ""
        self.files = [folder / STOP_FILE]
        if os.environ.get(STOP_FILE_VARIABLE):
            self.files.append(Path(os.environ[STOP_FILE_VARIABLE]))
        self._asked_at = self._looked_at = 0.0
        self._group = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        faulthandler.cancel_dump_traceback_later()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.asked_by == "SIGINT" and now - self._asked_at > SAME_INTERRUPT_S:
            raise KeyboardInterrupt
        self.asked_by, self._asked_at = signal.Signals(number).name, now
        if is_main():
            again = "; press Ctrl-C again to stop immediately" if number == signal.SIGINT else ""
            os.write(2, f"\n{self.asked_by}: stopping after this step{again}\n".encode())

    def agree(self, failure: str = "") -> str:
        """The request that at least one rank has received, or ''; a failure takes precedence.

        A collective: all ranks must call it at the same point. Two processes on a busy 2-core CPU take 0.2 ms for it.
        """
        self._look_for_files()
        names = ["", *(s.name for s in self.SIGNALS), *(f"the file {file}" for file in self.files), SPIKE, NOT_FINITE]
        code = names.index(failure or self.asked_by)
        found = names[self._largest(code)]
        self.agreed = "" if found in (SPIKE, NOT_FINITE) else found
        return found

    def heard(self) -> bool:
        """Whether this or another rank has been asked to stop: no collective, for work that each rank does by itself.

        All ranks must call `agree` after that work, which tells them by what.
        """
        import torch

        self._look_for_files()
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return bool(self.asked_by)
        store = torch.distributed.distributed_c10d._get_default_store()
        if self.asked_by:
            store.set("rlhf/stop", "1")
        return store.check(["rlhf/stop"])

    def _look_for_files(self) -> None:
        first = local_rank() == 0  # per host: a stop file may exist in one container only
        if not self.asked_by and time.monotonic() - self._looked_at > 1.0 and first:
            self._looked_at = time.monotonic()
            self.asked_by = next((f"the file {file}" for file in self.files if file.exists()), "")

    def _largest(self, code: int) -> int:
        import torch

        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return code
        if self._group is None:  # gloo even beside NCCL: on the CPU it does not synchronise with the GPU
            self._group = torch.distributed.new_group(backend="gloo")
        flag = torch.tensor([code])
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(flag)


def watch(seconds: float | None) -> None:
    """Restart the watchdog: unless called again in time, dump all threads' stacks and exit (None disables it)."""
    faulthandler.cancel_dump_traceback_later()
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)


def exit_code_stopped() -> int:
    """The exit code of a run that was stopped: RLHF_EXIT_STOPPED, or 85.

    If RLHF_STOP_FILE is set, it also creates a file of that name plus `.done`, for scripts that start training with
    accelerate's launcher, which turns every code but 0 into 1 and prints a traceback.
    """
    if os.environ.get(STOP_FILE_VARIABLE) and local_rank() == 0:
        with contextlib.suppress(OSError):
            Path(os.environ[STOP_FILE_VARIABLE] + ".done").touch()
    return int(os.environ.get(EXIT_VARIABLE, EXIT_STOPPED))


def leave(code: int) -> None:
    """Exit this process with `code`; in a distributed job, without Python's own tear-down.

    During the tear-down gloo's threads may still hold tensors and abort the process: "terminate called without an
    active exception", exit code -6, seen once in a few hundred runs, even after `destroy_process_group` (torch 2.13;
    pytorch/pytorch#179291). Remove this when torch joins its threads by itself.
    """
    torch = sys.modules.get("torch")
    if torch is None or world_size() == 1:
        sys.exit(code)
    if torch.distributed.is_initialized():
        with contextlib.suppress(Exception):  # another rank may have died; this one's exit code is settled
            if code in (0, EXIT_STOPPED):
                torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    threading._shutdown()  # type: ignore[attr-defined]  # as Python does on exit: join threads, run registered functions
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
