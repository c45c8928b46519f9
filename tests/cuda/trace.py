"""Build trainers, train and evaluate them on a GPU of fake tensors (fake_gpu.py).

    echo '[{"name": "dpo", "stage": "dpo", "values": {...}}]' | python tests/cuda/trace.py

Prints one line of JSON: for each job what was seen (`follow`), or the error that it ended with; and, as `calls`, which
functions of torch.cuda this project has called, with the file.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import traceback
from collections import Counter
from types import SimpleNamespace

import fake_gpu  # before torch
import torch
from fake_gpu import aten
from transformers import TrainerCallback

MATMULS = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2), aten.bmm.default: (0, 1), aten.linear.default: (0, 1)}


class Seen(fake_gpu.Waits):
    """Also counts the dtypes that matrices are multiplied in, and the attention kernels."""

    def __init__(self):
        super().__init__()
        self.matmuls, self.attention = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in MATMULS:
            first, second = (args[i] for i in MATMULS[func])
            if first.device.type == "cuda":
                self.matmuls[f"{first.dtype} x {second.dtype}".replace("torch.", "")] += 1
        if "attn" in func.name() or "attention" in func.name():
            self.attention[func.name().removeprefix("aten::")] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def stand_in_for_triton() -> None:
    """Where Triton is missing: its kernels of TRL's LM head fill tensors that exist, so that they can do nothing."""
    from trl.kernels import chunked_logprob

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    chunked_logprob._TRITON_AVAILABLE = True
    chunked_logprob._forward_kernel = chunked_logprob._backward_kernel = Kernel()
    chunked_logprob.triton = SimpleNamespace(cdiv=lambda a, b: -(-a // b))


def planned(stage: str, values: dict):
    """(the stage, its plan with token ids)"""
    from rlhf.config.recipe import Recipe, check_recipe
    from rlhf.distributed.topology import Topology
    from rlhf.training.plan import make_plan
    from rlhf.training.tokens import load_plan_tokenizer, with_tokens

    module = importlib.import_module(f"rlhf.training.{stage}")
    recipe = check_recipe(Recipe(stage, "trace", {"stage": stage, **values}, {}))
    kind = getattr(module, stage.upper())
    plan = make_plan(kind, recipe, Topology("one process"))
    return kind, with_tokens(plan, load_plan_tokenizer(plan))


def follow(stage: str, values: dict, plant: str = "") -> dict:
    """What a job does: in its construction (with the pass of a cached reference), two steps of training and an evaluation.

    Args:
        plant: a defect, to see that it is seen: "wait", "cpu", "dtype".
    """
    kind, plan = planned(stage, values)
    found = {}
    seen = Seen()
    with fake_gpu.MODE, seen, planted(plant):
        trainer = kind.build(plan, None)
        found["build"] = report(seen)
        if hasattr(trainer, "_start_checked"):
            trainer._start_checked = True  # it reads a loss once, and by ones it can't judge
        gradients = {}
        trainer.add_callback(Gradients(trainer, gradients))
        trainer.args.eval_strategy = "no"  # it is asked for below
        trainer.train()
        found["train"] = report(seen) | gradients
        trainer.evaluate()
        found["evaluation"] = report(seen)
    return found


class Gradients(TrainerCallback):
    """Notes what the gradients are before the optimizer's step."""

    def __init__(self, trainer, found: dict):
        self.trainer, self.found = trainer, found

    def on_pre_optimizer_step(self, *args, **kwargs):
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        made = [p.grad for p in trained if p.grad is not None]
        self.found["gradients"] = sorted({f"{g.device} {g.dtype}" for g in made})
        self.found["without_gradient"] = len(trained) - len(made)


def report(seen: Seen) -> dict:
    """What was seen since the last report."""
    found = {"waits": dict(seen.found), "matmuls": dict(seen.matmuls), "attention": dict(seen.attention)}
    seen.found, seen.matmuls, seen.attention = Counter(), Counter(), Counter()
    return found


@contextlib.contextmanager
def planted(defect: str):
    """The packed backbone with a defect of a kind that only a GPU would show."""
    from rlhf.packing import backbone

    original = backbone.unpack

    def defective(hidden, *rest):
        if defect == "wait":
            assert hidden.sum().item()
        if defect == "cpu":
            hidden = hidden.index_select(0, torch.arange(hidden.shape[0]))
        if defect == "dtype":
            with torch.autocast("cuda", enabled=False):
                hidden = (hidden.float() @ torch.eye(hidden.shape[1], device=hidden.device)).to(hidden.dtype)
        return original(hidden, *rest)

    backbone.unpack = defective if defect else original
    try:
        yield
    finally:
        backbone.unpack = original


def main() -> None:
    stand_in_for_triton()
    found = {}
    for job in json.load(sys.stdin):
        try:
            found[job["name"]] = follow(job["stage"], job["values"], job.get("plant", ""))
        except Exception as error:  # what a GPU would have ended with
            where = traceback.extract_tb(error.__traceback__)
            lines = [f"{f.filename}:{f.lineno}" for f in where if "/torch/" not in f.filename][-4:]
            found[job["name"]] = {"error": f"{type(error).__name__}: {error}"[:600], "at": lines}
    print(json.dumps(found | {"calls": sorted(fake_gpu.CALLS)}))


if __name__ == "__main__":
    main()
