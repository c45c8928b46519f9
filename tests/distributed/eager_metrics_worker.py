"""`rlhf` whose metrics are gathered and read as TRL does it, per micro-batch: what ours are compared with."""

import contextlib
import sys

from rlhf.__main__ import main
from rlhf.training import trainer

trainer.deferring = lambda *_: contextlib.nullcontext()
sys.exit(main(sys.argv[1:]))
