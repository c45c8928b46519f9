"""`rlhf`, with small batches: the rank HOLD_RANK, once it has written HOLD_AFTER batches, makes the file HELD and waits for a request.

A line per batch that is computed goes to the file WRITES.
"""

import os
import sys
import time
from pathlib import Path

from rlhf.__main__ import main
from rlhf.distributed.processes import rank
from rlhf.evaluation.partial import Measured
from rlhf.inference import score
from rlhf.runs.stop import leave

score.MAX_TOKENS = 1000
write, written = Measured._write, []


def hold(self, task, batch, values):
    write(self, task, batch, values)
    written.append(batch)
    with open(os.environ["WRITES"], "a", encoding="utf-8") as file:
        file.write(f"{task} {batch}\n")
    if (rank(), len(written)) != (int(os.environ.get("HOLD_RANK", 0)), int(os.environ["HOLD_AFTER"])):
        return
    Path(os.environ["HELD"]).touch()
    while not self.stopper.asked_by and not any(file.exists() for file in self.stopper.files):
        time.sleep(0.02)
    self.stopper._looked_at = 0.0  # files are looked for once a second


if __name__ == "__main__":
    Measured._write = hold
    leave(main(sys.argv[1:]))
