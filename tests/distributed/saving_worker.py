"""One rank of a run whose checkpoints meet a fault: saving_worker.py FAULT STAGE RECIPE.

Every rank writes a part of what all hold, however small. FAULT: `none`; `killed` kills rank 1 in the middle of its part of the
second checkpoint; `full` tells rank 1 there that its disk is full. What a rank hashes when it verifies a checkpoint is shown.
"""

import errno
import functools
import os
import signal
import sys

import rlhf.runs.checkpoints
import rlhf.runs.portable
from rlhf.__main__ import main
from rlhf.distributed.processes import rank
from rlhf.runs.stop import leave


def inject(fault):
    class Faulty(rlhf.runs.portable.TensorFile):
        def write(self, name, tensor):
            super().write(name, tensor)
            if rank() == 1 and "checkpoint-2" in str(self.path) and name.startswith("exp_avg:"):
                if fault == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fault == "full":
                    raise OSError(errno.ENOSPC, "No space left on device")

    rlhf.runs.portable.TensorFile = Faulty
    write_all = rlhf.runs.portable.written_by_this_rank
    rlhf.runs.portable.written_by_this_rank = functools.partial(write_all, least=1)
    sha256_of = rlhf.runs.checkpoints.sha256_of

    def shown(path):
        print(f"rank {rank()} reads {path.parent.name}/{path.name}", flush=True)
        return sha256_of(path)

    rlhf.runs.checkpoints.sha256_of = shown


if __name__ == "__main__":
    inject(sys.argv[1])
    leave(main(sys.argv[2:]))
