"""What a checkpoint of full fine-tuning costs, for any engine (portable) and as the engine itself saves it (own).

    python bench/checkpoints.py                             36 M parameters, 2 processes (about 5 minutes on 2 cores)
    python bench/checkpoints.py --only zero2 fsdp2          those engines
    python bench/checkpoints.py --layers 24 --hidden 1024   288 M parameters

A case trains three steps and saves after the second and the third, then resumes from the second checkpoint for a step. Per
case: bytes of a checkpoint; of all ranks together the CPU seconds of writing the last one (with its checksums and fsync) and of
verifying and restoring it; and of the slowest rank the seconds on the clock. The first checkpoint, which warms up, is left out.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import memory
import scale

ROOT = Path(__file__).parent.parent
LAUNCH = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


def worker(out: str, *words: str) -> None:
    """Run `rlhf sft WORDS`, and write what saving and resuming took to OUT-RANK.json."""
    import rlhf.training.run
    from rlhf.__main__ import main as command_line
    from rlhf.runs.checkpointing import CheckpointMixin
    from rlhf.runs.stop import leave

    found: dict[str, list] = {"save": [], "resume": []}

    def measure(place, name: str, kind: str) -> None:
        function = getattr(place, name)

        @functools.wraps(function)
        def measured(*args, **kwargs):
            cpu, clock = time.process_time(), time.perf_counter()
            result = function(*args, **kwargs)
            found[kind].append([time.process_time() - cpu, time.perf_counter() - clock])
            return result

        setattr(place, name, measured)

    measure(CheckpointMixin, "_save_checkpoint", "save")
    measure(rlhf.training.run, "find_checkpoint", "resume")
    measure(CheckpointMixin, "_prepare_for_training", "resume")
    measure(CheckpointMixin, "_load_from_checkpoint", "resume")
    code = command_line(["sft", *words])
    Path(f"{out}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
    leave(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=LAUNCH, default=list(LAUNCH))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args, words = parser.parse_known_args()
    if args.worker:
        worker(*args.worker, *words)
        return
    heads = args.hidden // 64
    shape = {"hidden_size": args.hidden, "intermediate_size": 11 * args.hidden // 4, "num_hidden_layers": args.layers}
    rows = [["engine", "checkpoint", "bytes", "save: CPU s", "s", "resume: CPU s", "s"]]
    with tempfile.TemporaryDirectory() as folder:
        model = scale.make_model(
            Path(folder) / "model", num_attention_heads=heads, num_key_value_heads=heads // 2, **shape
        )
        weights = memory.model_bytes(model)
        for launch in args.only:
            for portable in (True, False):
                rows.append(run_case(launch, portable, args.processes, model, Path(folder)))
                print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    print(f"{weights / 1e6:.0f} MB of weights in fp32, {args.processes} processes\n")
    print(scale.aligned(rows))


def run_case(launch: str, portable: bool, processes: int, model: str, folder: Path) -> list[str]:
    out = folder / f"{launch}-{portable}"
    recipe = {
        "stage": "sft", "model_name_or_path": model, "dataset_name": "embedded:sample", "output_dir": str(out),
        "max_length": 64, "max_train_examples": 16, "global_batch_size": 2, "max_tokens_per_device": 256, "max_steps": 3,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3, "use_cpu": True, "seed": 1,
        "portable_checkpoints": portable,
    }  # fmt: skip
    file = folder / f"{launch}-{portable}.yaml"
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in recipe.items()))
    saved = _start(launch, processes, file, folder / "saved")
    size = sum(path.stat().st_size for path in (out / "checkpoint-2").rglob("*") if path.is_file())
    shutil.rmtree(out / "checkpoint-3")
    for name in ("complete.json", "model.safetensors", "config.json"):
        (out / name).unlink()
    resumed = _start(launch, processes, file, folder / "resumed")
    cells = []
    for of, kind, last in ((saved, "save", -1), (resumed, "resume", None)):
        taken = [rank[kind][last:] if last else rank[kind] for rank in of]
        cells += [f"{sum(cpu for rank in taken for cpu, _ in rank):.2f}"]
        cells += [f"{max(sum(clock for _, clock in rank) for rank in taken):.2f}"]
    return [launch, "portable" if portable else "own", f"{size / 1e6:.0f} MB", *cells]


def _start(launch: str, processes: int, recipe: Path, out: Path) -> list[dict[str, list]]:
    """What each rank has found."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/launch/{launch}.yaml"]
    command += ["--num_processes", str(processes), str(Path(__file__).resolve()), "--worker", str(out), str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(processes)]


if __name__ == "__main__":
    main()
