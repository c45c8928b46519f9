"""One rank of a run whose main rank fails at the end: failing_worker.py FAULT STAGE RECIPE.

FAULT: `full_disk` fills the output folder's disk before the model is written; `mismatch` changes a weight of the model that
is loaded again; `provenance` makes the first file of the run unwritable.
"""

import sys
from pathlib import Path

import rlhf.models.finished
from rlhf.__main__ import main
from rlhf.runs.stop import leave


def full_disk():
    save = rlhf.models.finished.save_finished

    def filled(model, tokenizer, folder, **options):
        with open(Path(folder) / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(1 << 20))
            except OSError:
                pass
        return save(model, tokenizer, folder, **options)

    rlhf.models.finished.save_finished = filled


def mismatch():
    load = rlhf.models.finished.load_finished

    def changed(*args, **options):
        model, tokenizer = load(*args, **options)
        next(model.parameters()).data.add_(1.0)
        return model, tokenizer

    rlhf.models.finished.load_finished = changed


def provenance():
    def refused(*args, **options):
        raise OSError(28, "No space left on device")

    import rlhf.training.run

    rlhf.training.run.start_run = refused


if __name__ == "__main__":
    {"full_disk": full_disk, "mismatch": mismatch, "provenance": provenance}[sys.argv[1]]()
    leave(main(sys.argv[2:]))
