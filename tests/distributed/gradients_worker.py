"""One rank of a DPO run under FSDP2 that looks at its gradients between two micro-batches: gradients_worker.py OUT dpo RECIPE.

Rank 0 writes the bytes of gradients that are held unsharded, and of those that are sharded, before the last micro-batch.
"""

import json
import sys
from pathlib import Path

from torch.distributed.fsdp import FSDPModule

from rlhf.__main__ import main
from rlhf.runs.stop import leave
from rlhf.training.trainer import GlobalBatches


def held(model):
    groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
    parameters = [p for group in groups if group for p in group.fsdp_params]
    unsharded = [p.unsharded_accumulated_grad for p in parameters]  # in another dtype than the parameter's
    unsharded += [p._unsharded_param.grad for p in parameters if hasattr(p, "_unsharded_param")]
    unsharded = [g for g in unsharded if g is not None]
    sharded = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
    return {name: sum(g.nbytes for g in grads) for name, grads in (("unsharded", unsharded), ("sharded", sharded))}


if __name__ == "__main__":
    exchange = GlobalBatches._exchange_gradients

    def look(self, model, last):
        if last and self.accelerator.is_main_process:
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            Path(sys.argv[1]).write_text(json.dumps(held(model) | {"trained": trained}))
        return exchange(self, model, last)

    GlobalBatches._exchange_gradients = look
    leave(main(sys.argv[2:]))
