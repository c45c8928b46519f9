"""Stopping politely: a signal or a file asks, all processes agree on the step, the run is saved and ends with exit code 85.

And ending: `leave` is how a process of several goes.
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

EXIT_STOPPED = 85  # the run was asked to stop; the same command goes on
SAME_INTERRUPT_S = 1.0  # a launcher hands Ctrl-C on to processes that the terminal has told already
STOP_FILE = "stop"
STOP_FILE_VARIABLE = "RLHF_STOP_FILE"  # names another one, for scripts, which don't know the run folder
EXIT_VARIABLE = "RLHF_EXIT_STOPPED"  # another exit code than 85
NOT_FINITE, SPIKE = "loss", "gradient"  # requests that are none: why a run has to end


class Stopped(Exception):
    """The run was asked to stop, and everything that there is to save is saved."""


class OutOfMemory(Exception):
    """One process has run out of memory: told by that process, whichever it is."""


class Stopper:
    """Notes requests to stop, and lets all processes agree on one.

    Signals SIGTERM, SIGINT and SIGUSR1 to any process, a file named `stop` in the run folder, or the file that the
    environment variable RLHF_STOP_FILE names (whoever makes it also removes it). A second SIGINT stops at once.

    Attributes:
        asked_by: the request that this process knows of, or ''.
        agreed: the request that all processes have agreed on, or ''.
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
            again = "; once more stops at once" if number == signal.SIGINT else ""
            os.write(2, f"\n{self.asked_by}: stopping after this step{again}\n".encode())

    def agree(self, failure: str = "") -> str:
        """The request (or the failure, which comes first) that one process or more knows of, or ''.

        All processes must ask, at the same place. Two processes on a busy 2-core CPU take 0.2 ms for it.
        """
        first = local_rank() == 0  # of its host: a container may have been told alone
        if not self.asked_by and time.monotonic() - self._looked_at > 1.0 and first:
            self._looked_at = time.monotonic()
            self.asked_by = next((f"the file {file}" for file in self.files if file.exists()), "")
        names = ["", *(s.name for s in self.SIGNALS), *(f"the file {file}" for file in self.files), SPIKE, NOT_FINITE]
        code = names.index(failure or self.asked_by)
        found = names[self._largest(code)]
        self.agreed = "" if found in (SPIKE, NOT_FINITE) else found
        return found

    def _largest(self, code: int) -> int:
        import torch

        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return code
        if self._group is None:  # gloo also beside NCCL: the processor asks, and does not wait for the GPU
            self._group = torch.distributed.new_group(backend="gloo")
        flag = torch.tensor([code])
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(flag)


def watch(seconds: float | None) -> None:
    """End this process with the stacks of all its threads if it does not come by here again in time (None: never)."""
    faulthandler.cancel_dump_traceback_later()
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)


def exit_code_stopped() -> int:
    """The exit code of a run that was stopped: RLHF_EXIT_STOPPED, or 85.

    Where there is a RLHF_STOP_FILE, a file of that name with `.done` behind it says so too, for scripts that start training
    through accelerate's launcher: of any code but 0 that makes 1, and a traceback.
    """
    if os.environ.get(STOP_FILE_VARIABLE) and local_rank() == 0:
        with contextlib.suppress(OSError):
            Path(os.environ[STOP_FILE_VARIABLE] + ".done").touch()
    return int(os.environ.get(EXIT_VARIABLE, EXIT_STOPPED))


def leave(code: int) -> None:
    """End this process with `code`; of several processes, without Python's own tear-down.

    gloo's threads may still hold tensors then, and abort the process: "terminate called without an active exception",
    exit code -6, seen once in a few hundred runs, also after `destroy_process_group` (torch 2.13; pytorch/pytorch#179291).
    To be removed when torch ends its threads by itself.
    """
    torch = sys.modules.get("torch")
    if torch is None or world_size() == 1:
        sys.exit(code)
    if torch.distributed.is_initialized():
        with contextlib.suppress(Exception):  # another process may be gone; this one has its code already
            if code in (0, EXIT_STOPPED):
                torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    threading._shutdown()  # type: ignore[attr-defined]  # what Python does first at its end: wait for threads, call what is registered
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
