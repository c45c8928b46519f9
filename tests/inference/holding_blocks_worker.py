"""`rlhf`: the rank HOLD_RANK, once it has written HOLD_AFTER batches, makes the file HELD and waits for a request to stop.

A line per batch that is computed goes to the file WRITES.
"""

import os
import sys
import time
from pathlib import Path

from rlhf.__main__ import main
from rlhf.distributed.processes import rank
from rlhf.inference import blocks, score
from rlhf.runs.stop import Stopper, leave

score.MAX_TOKENS = 1000
append, written, stoppers = blocks._append, [], []


def hold(file, lines):
    lines = list(lines)
    append(file, lines)
    written.append(lines)
    with open(os.environ["WRITES"], "a", encoding="utf-8") as out:
        out.write(f"{os.path.basename(file.name)} {[item for item, _ in lines]}\n")
    if (rank(), len(written)) != (int(os.environ.get("HOLD_RANK", 0)), int(os.environ["HOLD_AFTER"])):
        return
    Path(os.environ["HELD"]).touch()
    while not stoppers[-1].asked_by:
        time.sleep(0.02)


class Noted(Stopper):
    def __enter__(self):
        stoppers.append(self)
        return super().__enter__()


if __name__ == "__main__":
    blocks._append = hold
    import rlhf.runs.stop

    rlhf.runs.stop.Stopper = Noted
    leave(main(sys.argv[1:]))
