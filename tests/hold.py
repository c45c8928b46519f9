"""As `sitecustomize.py` on PYTHONPATH it makes training wait: before it goes past the step that the file `hold` beside it names.

It waits until the file names a later step or is gone. A request to stop ends the waiting too, be it a signal or the file
that RLHF_STOP_FILE names, and removes `hold`, so that the other ranks do not wait for the one that was told.
"""

import contextlib
import importlib.abc
import importlib.util
import os
import select
import signal
import sys
import time
from pathlib import Path

FILE, MODULE = Path(__file__).with_name("hold"), "transformers.trainer_callback"


def held(step: int) -> bool:
    try:
        return step >= int(FILE.read_text())
    except (OSError, ValueError):  # there is none, or it is being written
        return False


def wait(step: int, told: int) -> None:
    """`told`: what can be read from once a signal has come, also if that was before this."""
    while held(step):
        asked = Path(os.environ.get("RLHF_STOP_FILE") or "/none").exists()
        if select.select([told], [], [], 0.1)[0] or asked:
            time.sleep(1.1 if asked else 0)  # a run looks for that file once a second
            with contextlib.suppress(OSError):
                FILE.unlink()


def put_into(module) -> None:
    begin = module.CallbackHandler.on_step_begin
    told, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def on_step_begin(handler, args, state, control):
        wait(state.global_step, told)
        return begin(handler, args, state, control)

    module.CallbackHandler.on_step_begin = on_step_begin


class Finder(importlib.abc.MetaPathFinder):
    """Puts the waiting into transformers' callbacks when they are imported, and imports nothing itself."""

    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            put_into(module)

        spec.loader.exec_module = exec_module
        return spec


if MODULE in sys.modules:  # in a process of tests/forked.py
    put_into(sys.modules[MODULE])
else:
    sys.meta_path.insert(0, Finder())
