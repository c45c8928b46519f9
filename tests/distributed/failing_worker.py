"""One rank of a run whose main rank fails at the end: failing_worker.py FAULT STAGE RECIPE.

FAULT: `full_disk` fills the output folder's disk before the model is written; `mismatch` changes the logits of the model
that is read again; `provenance` makes the first file of the run unwritable; `many_files` writes a small model as many, and
`killed` also kills each rank when it opens its third.
"""

import contextlib
import functools
import importlib.util
import os
import signal
import sys
from pathlib import Path

import rlhf.models.saving
import rlhf.models.writing
from rlhf.__main__ import main
from rlhf.distributed.processes import is_main
from rlhf.runs.stop import leave


def full_disk():
    save = rlhf.models.saving.save_finished

    def filled(model, tokenizer, folder, **options):
        if is_main():
            with open(Path(folder) / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(1 << 20))
        return save(model, tokenizer, folder, **options)

    rlhf.models.saving.save_finished = filled


def mismatch():
    read = rlhf.models.saving.offloaded_logits
    rlhf.models.saving.offloaded_logits = lambda *args: [logits + 1.0 for logits in read(*args)]


def provenance():
    def refused(*args, **options):
        raise OSError(28, "No space left on device")

    import rlhf.training.run

    rlhf.training.run.start_run = refused


def many_files(killed_at=0):
    split, opened = rlhf.models.writing.split_files, []

    class Counted(rlhf.models.writing.TensorFile):
        def __init__(self, path, tensors):
            opened.append(path.name)
            if len(opened) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            print(f"opens {path.name}", flush=True)
            super().__init__(path, tensors)

    if importlib.util.find_spec("deepspeed"):
        from deepspeed import DeepSpeedEngine

        save = DeepSpeedEngine.save_checkpoint

        @functools.wraps(save)
        def told(self, *args, **options):
            print("writes the engine's state", flush=True)
            return save(self, *args, **options)

        DeepSpeedEngine.save_checkpoint = told
    rlhf.models.writing.split_files = lambda pieces: split(pieces, 20_000)
    rlhf.models.writing.TensorFile = Counted


def killed():
    many_files(killed_at=3)


if __name__ == "__main__":
    faults = (full_disk, mismatch, provenance, many_files, killed)
    next(fault for fault in faults if fault.__name__ == sys.argv[1])()
    leave(main(sys.argv[2:]))
