"""Parts of bench/gpu_proof.py that measure: this project beside TRL at its own best settings, and a profile of a step.

The variants are those of bench/dpo.py, reward.py and sft.py, and bench/compare.py builds, checks and times them. Here all of a
case's variants take turns in one process: the imports are paid for once, and peak memory is counted anew for each.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import math
import statistics
from pathlib import Path
from typing import Any

import compare
import dpo
import gpu_proof_device as device
import reward
import sft
from gpu_proof_device import Context, model_folder

BENCHES = {"dpo": dpo, "reward": reward, "sft": sft}
LIGER = "+liger"  # TRL with Liger's layer kernels (use_liger_kernel), where they are installed


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        variants: of the stage's bench; the first is the baseline of losses.
        examples: pairs (SFT: answers) a step.
    """

    stage: str
    shape: str
    lengths: str
    examples: int
    variants: tuple[str, ...]
    train: str = "lora"
    gradient_checkpointing: bool = False


DPO, REWARD, SFT = ("trl", "trl-precomputed", "shared"), ("trl", "shared"), ("trl", "trl-padding-free", "packed")
HH, LONG = "hh-lengths", "completion-heavy"
CASES = {
    "dpo-8b-hh": Case("dpo", "llama-8b", HH, 8, DPO),
    "reward-8b-hh": Case("reward", "llama-8b", HH, 8, REWARD),
    "sft-8b-hh": Case("sft", "llama-8b", HH, 16, SFT),
    "dpo-8b-hh-large": Case("dpo", "llama-8b", HH, 48, ("shared",)),  # as many as padded batches have no memory for
    "dpo-1b-hh": Case("dpo", "llama-1b", HH, 32, (*DPO, f"trl{LIGER}"), train="full"),
    "reward-1b-hh": Case("reward", "llama-1b", HH, 32, REWARD, train="full"),
    "sft-1b-hh": Case("sft", "llama-1b", HH, 32, (*SFT, f"trl-padding-free{LIGER}"), train="full"),
    "dpo-8b-long": Case("dpo", "llama-8b", LONG, 8, DPO),
    "sft-8b-long": Case("sft", "llama-8b", LONG, 16, SFT),
    "reward-8b-long": Case("reward", "llama-8b", LONG, 8, REWARD),
    "dpo-1b-long": Case("dpo", "llama-1b", LONG, 32, DPO, train="full"),
    "sft-1b-long": Case("sft", "llama-1b", LONG, 32, SFT, train="full"),
    "reward-1b-long": Case("reward", "llama-1b", LONG, 32, REWARD, train="full"),
    "dpo-8b-hh-checkpointed": Case("dpo", "llama-8b", HH, 16, DPO, gradient_checkpointing=True),
    "reward-8b-hh-checkpointed": Case("reward", "llama-8b", HH, 16, REWARD, gradient_checkpointing=True),
    "sft-8b-hh-checkpointed": Case("sft", "llama-8b", HH, 32, SFT, gradient_checkpointing=True),
}


def measure(context: Context, name: str) -> dict[str, Any]:
    """All variants of a case: pairs a second, peak memory, MFU, ratios to each of TRL's, loss differences."""
    case, folder = CASES[name], context.folder(name)
    runs, left_out = {}, {}
    for variant in case.variants:
        if variant.endswith(LIGER) and importlib.util.find_spec("liger_kernel") is None:
            left_out[variant] = "liger_kernel is not installed"
            continue
        try:
            runs[variant] = run(context, case, variant, folder)
        except Exception as error:
            if not device.is_out_of_memory(error):
                raise
            left_out[variant] = "out of memory"
        device.free_memory(context.device)
    found = compared(runs, device.device_name(context.device), matmul_peak(context))
    ours = case.variants[2] if case.stage != "reward" and len(case.variants) > 1 else case.variants[-1]
    ok = ours in runs and all(math.isfinite(x) for run in runs.values() for x in run["losses"])
    return {"ok": ok, "summary": words(found, ours, left_out), "variants": found, "left_out": left_out, "ours": ours,
            "case": dataclasses.asdict(case)}  # fmt: skip


def run(context: Context, case: Case, variant: str, folder: Path, profiled: bool = False) -> dict[str, Any]:
    """What bench/compare.py measures of one variant, in this process."""
    bench_module = BENCHES[case.stage]
    bench = compare.Bench(case.stage, bench_module.VARIANTS, bench_module.MODES, bench_module.build)
    plain = variant.removesuffix(LIGER)
    out = folder / f"{variant}.json"
    args = argparse.Namespace(
        model=model_folder(context, case.shape), data=case.lengths, examples=2 if context.toy else case.examples, steps=1 if context.toy else 4,
        train=case.train, dtype="bfloat16", device="cpu" if context.device == "cpu" else "auto", max_length=2048,
        gradient_checkpointing=case.gradient_checkpointing, recipe={"use_liger_kernel": True} if plain != variant else {},
        worker=plain, folder=str(folder), out=str(out), profile=plain if profiled else None,
    )  # fmt: skip
    compare.prepare(bench, args, folder)
    device.free_memory(context.device)
    compare.worker(bench, args)
    gc.collect()
    return json.loads(out.read_text())


def matmul_peak(context: Context) -> float:
    """FLOP/s of bf16 matmuls on this device, measured; a toy's is not worth the seconds."""
    if context.toy:
        return math.nan
    return compare.matmul_peak(argparse.Namespace(device=context.device, dtype="bfloat16"))


def compared(runs: dict[str, dict[str, Any]], name: str, matmul: float) -> dict[str, dict[str, Any]]:
    """For each variant its speed and memory, and against each of the others: ratios and loss differences.

    A ratio of speeds is the median over steps, which hold the same examples in every variant.
    """
    from rlhf.training.throughput import peak_flops

    peak = peak_flops(name)
    flops = next((run["flops"] for run in runs.values() if not any(map(math.isnan, run["flops"]))), None)
    found = {}
    for variant, mine in runs.items():
        useful = sum(flops) / sum(mine["seconds"]) if flops else None
        found[variant] = {
            "per_second": mine["examples"] * len(mine["seconds"]) / sum(mine["seconds"]), "seconds": mine["seconds"],
            "losses": mine["losses"], "memory_gib": mine["memory"] / 2**30 if peak or name != "CPU" else None,
            "mfu": useful / peak if useful and peak else None, "of_matmul": useful / matmul if useful and matmul == matmul else None,
            "tokens": sum(mine["tokens"]), "padded": sum(mine["padded"]), "parameters": mine["parameters"],
            "against": {
                other: {
                    "speed": statistics.median(b / a for a, b in zip(mine["seconds"], run["seconds"], strict=True)),
                    "memory": mine["memory"] / run["memory"],
                    "loss": max(abs(a - b) for a, b in zip(mine["losses"], run["losses"], strict=True)),
                }
                for other, run in runs.items() if other != variant
            },
        }  # fmt: skip
    return found


def words(found: dict[str, Any], ours: str, left_out: dict[str, str]) -> str:
    """One line about a case."""
    parts = [f"{variant}: {why}" for variant, why in left_out.items()]
    if ours in found:
        mine = found[ours]
        mfu = f", MFU {mine['mfu']:.0%}" if mine["mfu"] else ""
        parts = [f"{ours} {mine['per_second']:.3g}/s{mfu}", *(f"{x['speed']:.2f}x {other}" for other, x in mine["against"].items()), *parts]  # fmt: skip
    return "; ".join(parts)


# --- a profile -------------------------------------------------------------------------------------------------------


def profile(context: Context) -> dict[str, Any]:
    """One DPO step of this project under torch's profiler: the longest kernels, synchronisations, how long the GPU is idle."""
    case, kept = Case("dpo", "llama-1b", HH, 32, ("shared",), train="full"), []
    original = compare.profile
    compare.profile = lambda trainer: kept.append(watch(trainer))
    try:
        run(context, case, "shared", context.folder("profile"), profiled=True)
    finally:
        compare.profile = original
    return {"ok": bool(kept)} | read_profile(kept[0], context.device)


def watch(trainer: Any) -> Any:
    """A profiler of the last step, from its begin to its end, with all of its work done."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler
    from transformers import TrainerCallback

    cuda = trainer.args.device.type
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda == "cuda" else [])
    running = profiler(activities=activities)

    class OneStep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps - 1:
                device.synchronize(cuda)
                running.start()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps:
                device.synchronize(cuda)
                running.stop()

    trainer.add_callback(OneStep)
    return running


SYNCHRONISE = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
ONE_NUMBER = "aten::_local_scalar_dense"  # .item(), float(x), int(x), a tensor in an `if`


def read_profile(running: Any, kind: str) -> dict[str, Any]:
    """Tables and counts of a profiled step; idle is the share of the step in which no kernel runs."""
    averages, events = running.key_averages(), running.events()
    on_gpu = kind == "cuda"
    count = {row.key: row.count for row in averages}
    table = averages.table(
        sort_by=f"self_{'device' if on_gpu else 'cpu'}_time_total", row_limit=20, max_name_column_width=60
    )
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if str(e.device_type).endswith("CUDA"))
    begin, end = min(e.time_range.start for e in events), max(e.time_range.end for e in events)
    idle = idle_share(spans, begin, end) if on_gpu and spans else None
    items, waits = count.get(ONE_NUMBER, 0), {name: count[name] for name in SYNCHRONISE if name in count}
    summary = f"{(end - begin) / 1e3:.1f} ms, {items} reads of single numbers"
    summary += f", {sum(waits.values())} synchronisations, GPU idle {idle:.0%}" if idle is not None else ""
    return {"summary": summary, "table": table, "synchronisations": waits, "items": items, "idle": idle, "milliseconds": (end - begin) / 1e3}  # fmt: skip


def idle_share(spans: list[tuple[float, float]], begin: float, end: float) -> float:
    """The share of [begin, end] that none of the spans, sorted by their starts, covers.

    >>> idle_share([(1, 3), (2, 4), (6, 7)], 0, 10)  # 1 to 4 and 6 to 7 are covered
    0.6
    """
    covered, last = 0.0, begin
    for start, stop in spans:
        covered += max(0.0, stop - max(start, last))
        last = max(last, stop)
    return 1 - covered / (end - begin)
