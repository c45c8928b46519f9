"""How much memory each process needs in each phase of `rlhf dpo`, in units of the model's bytes W. On CPUs (gloo).

    python bench/memory.py --small                         36 M parameters, every case (about 20 minutes on 2 cores)
    python bench/memory.py --only zero3-full-2 fsdp2-lora-2   those cases, of 288 M parameters
    python bench/memory.py --small --out runs/memory       results go to runs/memory/memory.json; cases there are not run again

A case is LAUNCH-TRAINING-PROCESSES. It trains a step, is stopped, resumes from its checkpoint, trains another and
finishes; then `rlhf evaluate` measures the result. Per phase and rank:

    private   anonymous memory of the process beyond what it had after the imports, at most (sampled every 2 ms)
    tensors   bytes of all live torch tensors, at most; each storage once (exact). What is mapped from a file counts once
              it is a module's parameter: it needs little memory on a CPU, but is copied to a GPU

In a phase a rank should hold its engine's share of the model, plus a constant that does not grow with the number of
layers. The share is W/N of the weights under ZeRO-3 and FSDP2, and W under DDP and ZeRO-1 and 2; in training the
gradients and the optimizer's state come on top.

DeepSpeed's thresholds are set to one layer, since below its defaults (1e9 parameters, buckets of 5e8 elements) ZeRO-3
keeps everything gathered. `qlora` holds a 4-bit base: 0.14 W without embedding and LM head. malloc returns what is freed, so that a phase does not count what an earlier one needed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LAUNCH = ("ddp", "zero2", "zero3", "fsdp2")
TRAININGS = {
    "lora": {"use_peft": True, "lora_r": 8, "lora_dropout": 0.0, "lora_target_modules": "all-linear"},
    "full": {},
}
TRAININGS["qlora"] = TRAININGS["lora"] | {"load_in_4bit": True}
SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 24},  # of the tests
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12},
    "large": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24},
}
# In the order of a run. `build`: TRL's constructor and what else is between load and training.
PHASES = (
    "load",
    "reference key",
    "reference pass",
    "build",
    "wrap",
    "step",
    "checkpoint",
    "resume",
    "finish",
    "evaluate",
)
SAMPLE_S = 0.002
MAX_TOKENS = 256  # of a micro-batch


# --- private memory ---------------------------------------------------------------------------------------------------


class Private:
    """The process's anonymous memory, sampled by a thread; `peaks` by phase, in bytes beyond those at the start."""

    def __init__(self):
        self.phase, self.peaks = "", {}
        self._start = self._read()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.note()
            time.sleep(SAMPLE_S)

    def note(self) -> None:
        phase = self.phase
        self.peaks[phase] = max(self.peaks.get(phase, 0), self._read() - self._start)

    @staticmethod
    def _read() -> int:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


# --- in each process that accelerate starts --------------------------------------------------------------------------


def worker(out: str, elements: str, command: str, *words: str) -> None:
    """Run `rlhf COMMAND WORDS` and write what each phase needed to OUT-RANK.json.

    Args:
        elements: of a layer's largest matrix, for DeepSpeed's thresholds.
        command: `dpo`; `stop`, which is `dpo` that is stopped after its first step; or `evaluate`.
    """
    import deepspeed  # noqa: F401  # accelerate imports it in every run: it belongs to what was there before
    import trl.trainer.dpo_trainer  # noqa: F401
    from live_tensors import LiveTensors

    import rlhf.evaluation.evaluate
    from rlhf.__main__ import main as command_line
    from rlhf.runs.stop import EXIT_STOPPED, leave

    live, private = LiveTensors(), Private()
    live.__enter__()
    open_phases: list[str] = []

    def switch(name: str) -> None:
        private.note()
        live.phase = private.phase = name
        private.note()
        live.note()

    @contextlib.contextmanager
    def phase(name: str):
        if open_phases and open_phases[-1] in ("finish", "evaluate"):  # a model that it loads is its own
            yield
            return
        open_phases.append(name)
        switch(name)
        try:
            yield
        finally:
            open_phases.pop()
            switch(open_phases[-1] if open_phases else "")

    if command == "evaluate":
        follow(phase, rlhf.evaluation.evaluate, "measure", "evaluate")
    else:
        follow_training(phase, resumed=command == "dpo", stop=command == "stop")
        shard_small_models(int(elements))
    code = command_line(["dpo" if command == "stop" else command, *words])
    switch("")
    peaks = {"private": private.peaks, "tensors": live.peaks}
    found = {name: {kind: of[name] for kind, of in peaks.items()} for name in live.peaks if name}
    Path(f"{out}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
    live.__exit__(None, None, None)
    leave(0 if command == "stop" and code == EXIT_STOPPED else code)


def follow(phase: Callable, place: Any, name: str, title: str) -> None:
    """Make `place.name`, a function of the project, a phase."""
    function = getattr(place, name)  # fails where it has moved

    @functools.wraps(function)
    def followed(*args, **kwargs):
        with phase(title):
            return function(*args, **kwargs)

    setattr(place, name, followed)


def follow_training(phase: Callable, resumed: bool, stop: bool) -> None:
    """Make the functions of a run phases: those around training in rlhf/training/run.py, and the trainer's."""
    import rlhf.training.dpo
    import rlhf.training.reference
    import rlhf.training.run
    from rlhf.runs.checkpointing import CheckpointMixin
    from rlhf.training.trainer import GlobalBatches

    follow(phase, rlhf.training.run, "build", "build")
    follow(phase, rlhf.training.dpo, "load", "load")
    follow(phase, rlhf.training.reference, "reference_key", "reference key")
    follow(phase, rlhf.training.reference, "compute_logps", "reference pass")
    follow(phase, rlhf.training.run, "train_or_restore", "step")
    follow(phase, rlhf.training.run, "finish", "finish")
    follow(phase, CheckpointMixin, "_prepare_for_training", "resume" if resumed else "wrap")
    follow(phase, CheckpointMixin, "_save_checkpoint", "checkpoint")
    if resumed:
        follow(phase, rlhf.training.run, "find_checkpoint", "resume")
        follow(phase, CheckpointMixin, "_load_from_checkpoint", "resume")
    if stop:
        training_step = GlobalBatches.training_step

        def stop_after(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGUSR1)
            return training_step(self, *args, **kwargs)

        GlobalBatches.training_step = stop_after


def shard_small_models(elements: int) -> None:
    """Set DeepSpeed's thresholds, in elements, to the largest matrix of a layer: its defaults are for larger models."""
    from accelerate.utils.dataclasses import DeepSpeedPlugin

    post_init = DeepSpeedPlugin.__post_init__

    def with_thresholds(self):
        post_init(self)
        zero = self.deepspeed_config["zero_optimization"]
        zero |= {"reduce_bucket_size": elements, "allgather_bucket_size": elements, "sub_group_size": elements}
        if zero["stage"] == 3:
            zero |= {
                "stage3_max_live_parameters": elements, "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0,
            }  # fmt: skip

    DeepSpeedPlugin.__post_init__ = with_thresholds


# --- cases -----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="36 M instead of 288 M parameters")
    parser.add_argument("--launch", nargs="+", choices=LAUNCH, default=list(LAUNCH))
    parser.add_argument("--trainings", nargs="+", choices=list(TRAININGS), default=list(TRAININGS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--only", nargs="+", metavar="CASE", help="such as zero3-lora-2")
    parser.add_argument("--out", help="a folder for memory.json; default: a temporary one")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args, words = parser.parse_known_args()
    if args.worker:
        worker(*args.worker, *words)
        return
    if words:
        parser.error(f"unknown argument {words[0]}")
    cases = args.only or [f"{a}-{b}-{c}" for a in args.launch for b in args.trainings for c in args.processes]
    size = "small" if args.small else "large"
    with tempfile.TemporaryDirectory() as folder:
        results = Path(args.out or folder) / "memory.json"
        results.parent.mkdir(parents=True, exist_ok=True)
        found = json.loads(results.read_text()) if results.is_file() else {}
        model = ""
        for case in cases:
            if f"{size} {case}" in found:
                continue
            model = model or make_model(Path(folder) / "model", size)
            print(f"  {case} ...", file=sys.stderr, flush=True)
            found[f"{size} {case}"] = run_case(case, model, Path(folder) / case)
            results.write_text(json.dumps(found, indent=1) + "\n")
            shutil.rmtree(Path(folder) / case)
    print(table({case: found[f"{size} {case}"] for case in cases}))


def make_model(folder: Path, size: str) -> str:
    """A Llama whose layers are nearly all of it."""
    import scale

    from rlhf.console import quiet_libraries

    quiet_libraries()
    heads = SHAPES[size]["hidden_size"] // 64
    return scale.make_model(folder, num_attention_heads=heads, num_key_value_heads=heads // 2, **SHAPES[size])


def model_bytes(model: str) -> int:
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))


def run_case(case: str, model: str, folder: Path) -> dict[str, Any]:
    """{"weights": W in bytes, "seconds": of all, "ranks": per rank {phase: {kind: bytes}}}"""
    launch, training, processes = case.rsplit("-", 2)
    started, out = time.time(), folder / "dpo"
    folder.mkdir(parents=True)
    train = {
        "stage": "dpo", "model_name_or_path": model, "dataset_name": "embedded:sample", "output_dir": str(out),
        "reference_cache": str(folder / "reference"), "max_length": 128, "max_train_examples": 4,
        "global_batch_size": 2, "max_tokens_per_device": MAX_TOKENS, "max_steps": 2, "logging_steps": 1,
        "save_strategy": "no", "gradient_checkpointing": True, "use_cpu": True, "seed": 1,
    } | TRAININGS[training]  # fmt: skip
    evaluate = {
        "stage": "evaluate", "sft_model": str(out), "dpo_model": str(out), "dataset_name": "embedded:sample", "max_eval_examples": 4,
        "dataset_test_split": "heldout", "max_new_tokens": 4, "batch_size": 1, "output_dir": str(folder / "evaluation"),
    }  # fmt: skip
    ranks: list[dict[str, dict[str, int]]] = [{} for _ in range(int(processes))]
    for number, (command, recipe) in enumerate((("stop", train), ("dpo", train), ("evaluate", evaluate))):
        file = folder / f"{recipe['stage']}.yaml"
        file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in recipe.items()))
        found = folder / f"found{number}"
        run_worker(launch, int(processes), (str(found), largest_matrix(model), command, str(file)))
        for rank, phases in enumerate(ranks):
            for name, peaks in json.loads(Path(f"{found}-{rank}.json").read_text()).items():
                before = phases.get(name, {})
                phases[name] = {kind: max(size, before.get(kind, 0)) for kind, size in peaks.items()}
    return {"weights": model_bytes(model), "seconds": round(time.time() - started), "ranks": ranks}


def run_worker(launch: str, processes: int, words: tuple[str, ...]) -> None:
    """`worker(*words)` in `processes` processes that accelerate starts."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/launch/{launch}.yaml"]
    command += ["--num_processes", str(processes), str(Path(__file__).resolve()), "--worker", *words]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16), "MALLOC_ARENA_MAX": "1",
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[:3000]}\n...\n{done.stderr[-3000:]}"
        )


def largest_matrix(model: str) -> str:
    """Elements of the largest matrix of a layer."""
    config = json.loads((Path(model) / "config.json").read_text())
    return str(config["hidden_size"] * config["intermediate_size"])


def table(cases: dict[str, dict]) -> str:
    """A line per case and rank; cells: private and tensors, in W."""
    import scale

    rows = [["case", "rank", *PHASES]]
    for case, found in cases.items():
        for rank, phases in enumerate(found["ranks"]):
            cells = []
            for name in PHASES:
                peaks = phases.get(name)
                kinds = ("private", "tensors")
                cells.append(" ".join(f"{peaks[kind] / found['weights']:.2f}" for kind in kinds) if peaks else "-")
            rows.append([case, str(rank), *cells])
    return f"private and tensors, in units of the model's bytes\n\n{scale.aligned(rows)}"


if __name__ == "__main__":
    main()
