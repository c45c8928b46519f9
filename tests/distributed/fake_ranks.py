"""Runs of this project as one rank of many, alone, in torch's fake process group; and the collectives that each takes part in.

    echo '[{"rank": 7, "world": 1024, "launch": "fsdp2", "words": ["dpo", "recipe.yaml"], "out": "folder"}]' | python tests/distributed/fake_ranks.py

Each job is a process of its own, forked once torch and TRL are imported. It leaves `OUT/events.json`: the exit code, an error, and
`events`, a list of [phase, operation, ranks in the group, bytes]; OUT.log has what it printed.

    like     the `out` of an earlier job, of rank 0. A fake group computes nothing, so what rank 0 got from a small collective (a
             flag, a count, an object) is given to this rank: then it decides by the values that all ranks would have had, and a
             collective in a branch that ranks take differently shows as another sequence.
    start    a folder whose `run` and `cache` are copied first: of a run to resume
    plant    true: odd ranks leave out a collective, to see that it is seen
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SMALL = 1 << 20  # bytes: what decides, not what is trained
SAME_EVERYWHERE = {
    "broadcast",
    "allreduce",
    "allgather",
    "allgather_base",
    "all_reduce",
    "all_gather_into_tensor",
}  # in its group
SECONDS = 240
WAITS = {"wait_tensor", "_wrap_tensor_autograd"}  # they send nothing


# --- what is recorded ------------------------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Notes each operation of c10d and of its functional form, whoever calls it: Python, DDP's reducer, DTensor.

    Args:
        given: the results of small collectives, in their order, that another rank has had; None to keep one's own.

    Attributes:
        events: (phase, operation, ranks in the group, bytes).
        results: the small results, for another rank.
    """

    def __init__(self, given: list | None):
        super().__init__()
        self.given, self.events, self.results, self.phase = given, [], [], "start"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.namespace not in ("c10d", "_c10d_functional") or WAITS & {func.name().split("::")[1].split(".")[0]}:
            return found
        name = func.name().split("::")[1].split(".")[0].strip("_").removesuffix("_")
        group = next(filter(None, map(as_group, args)), None)
        assert group is not None, func
        outputs = tensors(found)
        payload = max(size_of(tensors(x)) for x in (found, *args)) if name != "barrier" else 0
        self.events.append([self.phase, name, group.size(), payload])
        if name in SAME_EVERYWHERE and size_of(outputs) <= SMALL:
            self.exchange(outputs)
        return found

    def exchange(self, outputs: list[torch.Tensor]) -> None:
        """Keep a small result, or replace it by the other rank's."""
        number = len(self.results)
        self.results.append([x.detach().clone() for x in outputs])
        if self.given is None or number >= len(self.given):
            return
        theirs = self.given[number]
        if [x.shape for x in theirs] == [x.shape for x in outputs]:  # if not, the sequences differ already
            with torch.no_grad():
                for mine, other in zip(outputs, theirs, strict=True):
                    mine.copy_(other)


def as_group(x):
    """The process group of an argument of a collective: an object, or the name of one; None for anything else."""
    if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()):
        return dist.ProcessGroup.unbox(x)
    if isinstance(x, str):
        with contextlib.suppress(RuntimeError, ValueError):
            return dist.distributed_c10d._resolve_process_group(x)
    return None


def tensors(x) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    return [found for part in x for found in tensors(part)] if isinstance(x, (list, tuple)) else []


def size_of(found: list[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in found)


# --- what a group of one process can't do ----------------------------------------------------------------------------


def stand_in(seen: Collectives) -> None:
    """Name the phases, and replace what waits for another process or judges values that no rank has computed."""
    from rlhf.distributed import processes
    from rlhf.models import saving
    from rlhf.runs import checkpointing, portable, stop
    from rlhf.training import reference, run, start_check, trainer

    new_group = dist.new_group
    dist.new_group = lambda *args, **kwargs: new_group(
        *args, **kwargs | {"backend": "fake"}
    )  # gloo would wait for the others

    def exchange_code(code: int) -> int:  # through the store
        seen.events.append([seen.phase, "exchange_code", dist.get_world_size(), 0])
        return code

    processes.exchange_code = exchange_code
    start_check.refuse_wrong_start = lambda start: None
    saving._compare = lambda *args: 0.0
    portable.uncovered = lambda *args: None  # all ranks' ranges are those of one
    reduce_buckets()
    watch = stop.watch
    for module in (run, checkpointing):
        module.watch = lambda seconds: watch(None)  # faulthandler is this file's

    def in_phase(owner, name: str, phase, after: str | None = None) -> None:
        original = getattr(owner, name)

        def inside(*args, **kwargs):
            before, seen.phase = seen.phase, phase(*args) if callable(phase) else phase
            try:
                return original(*args, **kwargs)
            finally:
                seen.phase = after or before

        setattr(owner, name, inside)

    in_phase(reference, "add_reference_logps", "reference")
    in_phase(start_check, "check_start", "start check")
    in_phase(
        trainer.GlobalBatches,
        "training_step",
        lambda self, *rest: f"step {self.state.global_step + 1}",
        "between steps",
    )
    in_phase(trainer.GlobalBatches, "evaluation_loop", "evaluation")
    in_phase(checkpointing.CheckpointMixin, "_save_checkpoint", "checkpoint")
    in_phase(run, "finish", "finish")
    fill_reference(reference)
    write_share = checkpointing.write_share

    def write_share_there(share, trainer, folder):
        folder.mkdir(parents=True, exist_ok=True)  # which rank 0 has made, in another folder
        return write_share(share, trainer, folder)

    checkpointing.write_share = write_share_there


def reduce_buckets() -> None:
    """DDP waits for the future of an all-reduce to hold its result, and a fake group's holds none: reduce in a hook."""
    from torch.nn.parallel import DistributedDataParallel

    construct = DistributedDataParallel.__init__

    def reduce(group, bucket):
        dist.all_reduce(bucket.buffer(), group=group)
        done: torch.futures.Future = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def constructed(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        self.register_comm_hook(self.process_group, reduce)

    DistributedDataParallel.__init__ = constructed


def fill_reference(reference) -> None:
    """The pairs of all ranks arrive in a reference pass: a gather of a fake group returns one rank's pairs again and again."""
    import accelerate.utils

    gather_object = accelerate.utils.gather_object

    def gather(value):
        found, caller = gather_object(value), sys._getframe(1)
        if caller.f_code is reference.compute_logps.__code__:
            values = found[0][1][:1]
            return [(numbers, values.repeat(len(numbers), axis=0)) for numbers in caller.f_locals["turn"]]
        return found

    accelerate.utils.gather_object = gather


def plant(rank: int) -> None:
    """A collective that ranks may leave out: the mean of the metrics, where there were none to be averaged."""
    from rlhf.training.trainer import GlobalBatches

    over_ranks = GlobalBatches._over_ranks
    GlobalBatches._over_ranks = lambda self, values, how: values if rank % 2 else over_ranks(self, values, how)


# --- a job -----------------------------------------------------------------------------------------------------------


def environment(job: dict) -> dict[str, str]:
    """What accelerate's launcher sets for this rank, with eight processes per host."""
    sys.path.insert(0, str(ROOT / "tests" / "faults"))
    from faults import environment_of

    rank, world = job["rank"], job["world"]
    found = environment_of(ROOT / "launch" / f"{job['launch']}.yaml") | {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank % 8), "LOCAL_WORLD_SIZE": str(min(8, world)),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RLHF_CACHE": f"{job['out']}/cache",
    }  # fmt: skip
    if job["launch"] == "fsdp2_hsdp":
        found |= {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": str(world // 8), "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"}
    return found


def work(job: dict) -> None:
    """Run a job in this process, and write its events."""
    out = Path(job["out"])
    for name in ("run", "cache") if job.get("start") else ():
        shutil.copytree(Path(job["start"]) / name, out / name)
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= environment(job)
    import torch.testing._internal.distributed.fake_pg

    given = torch.load(Path(job["like"]) / "results.pt", weights_only=True) if job.get("like") else None
    dist.init_process_group("fake", store=dist.HashStore(), rank=job["rank"], world_size=job["world"])
    seen, code, error = Collectives(given), None, ""
    stand_in(seen)
    if job.get("plant"):
        plant(job["rank"])
    from rlhf.__main__ import main

    try:
        with seen:
            code = main([*job["words"], "--output_dir", str(out / "run")])
    except BaseException as failure:
        error = "".join(traceback.format_exception(failure))[-3000:]
    (out / "events.json").write_text(json.dumps({"code": code, "error": error, "events": seen.events}))
    torch.save(seen.results, out / "results.pt")


def run_jobs(jobs: list[dict]) -> None:
    """One after another, each in a process of its own."""
    for name in (
        "accelerate",
        "transformers",
        "trl",
        "peft",
        "rlhf.training.run",
        "rlhf.training.dpo",
        "torch.distributed.fsdp",
    ):
        importlib.import_module(name)
    for job in jobs:
        child = os.fork()
        if child == 0:
            log = os.open(f"{job['out']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)
            try:
                work(job)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    run_jobs(json.load(sys.stdin))
