"""The parts of bench/gpu_proof.py, in the order in which they are worth their time, and the process that one of them runs in."""

from __future__ import annotations

import functools
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_proof_device
import gpu_proof_equal as equal
import gpu_proof_runs as runs
import gpu_proof_trl as trl
from gpu_proof_device import Context


@dataclass(frozen=True)
class Part:
    """One part of the proof.

    Attributes:
        what: what it shows, for the report.
        run: returns {"ok": bool, "summary": one line, ...}.
        alone: it is timed, so nothing else may run beside it.
        limit_s: it is ended after this many seconds.
        least_s: it is not started with fewer seconds left.
    """

    what: str
    run: Callable[[Context], dict[str, Any]]
    alone: bool = False
    limit_s: float = 180
    least_s: float = 30


def _launch(name: str) -> Part:
    offload = name == "zero3_offload"  # whose optimizer is compiled first
    return Part(f"launch/{name}.yaml", functools.partial(runs.launch, name=name), limit_s=300 if offload else 200)


def _measured(name: str) -> Part:
    case = trl.CASES[name]
    checkpointed = ", gradient checkpointing" if case.gradient_checkpointing else ""
    what = f"{case.stage} against TRL: {case.shape}, {case.train}, {case.lengths}, {case.examples} a step{checkpointed}"
    return Part(what, functools.partial(trl.measure, name=name), alone=True, limit_s=240, least_s=60)


EQUAL = {
    "attention": Part("packed attention = padded", equal.attention),
    "families": Part("packed models = padded, each verified family", equal.families),
    "lm-head": Part("fused LM head = full logits", equal.lm_head),
    "qlora": Part("QLoRA", runs.qlora),
    "nf4": Part("4-bit reference", runs.nf4),
}
MEASURED = {name: _measured(name) for name in trl.CASES}
FIRST = ("dpo-8b-hh", "sft-8b-hh", "reward-8b-hh", "dpo-8b-hh-large")
PROFILE = {"profile": Part("profile of a DPO step", trl.profile, alone=True, limit_s=120)}
PARTS: dict[str, Part] = (
    EQUAL
    | {name: MEASURED[name] for name in FIRST}
    | {f"launch-{name}": _launch(name) for name in runs.LAUNCH}
    | PROFILE
    | MEASURED  # those that are there already keep their place
)
ABOUT = "about"  # the machine: not a part of its own in the report, and made in every call


def run_part(name: str, job: Path) -> None:
    """In a process of its own: run a part, and write what it found beside its job, atomically."""
    from rlhf.console import quiet_libraries
    from rlhf.files import write_file

    told = json.loads(job.read_text(encoding="utf-8"))
    context, out = Context(**told["context"]), Path(told["out"])
    started = time.time()
    if name == ABOUT:
        write_file(out, json.dumps({"state": "done", "about": gpu_proof_device.describe(context.device)}))
        return
    quiet_libraries()
    try:
        found = {"state": "done", **PARTS[name].run(context)}
    except runs.NotHere as reason:
        found = {"state": "not here", "ok": True, "summary": str(reason)}
    except Exception as error:  # the runner records it, with the last lines of the log
        traceback.print_exc()
        words = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        found = {"state": "failed", "ok": False, "summary": words}
    about = gpu_proof_device.describe(context.device) | {
        "gpus": context.gpus
    }  # of the machine; this process may see only one
    found |= {
        "part": name,
        "seconds": round(time.time() - started, 1),
        "about": about,
    }
    write_file(out, json.dumps(found))
