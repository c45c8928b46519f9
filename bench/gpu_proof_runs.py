"""Parts of bench/gpu_proof.py that train through the command line: QLoRA, the 4-bit reference, and every launch file."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_proof_device import Context, model_folder

ROOT = Path(__file__).parent.parent
LN_2_TOLERANCE = 0.05  # bf16 and 4 bits: what a batch's log-probabilities differ by when they are computed twice
LAUNCH = ("single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "fsdp2_hsdp")
STOPPED = 85  # the exit code of a run that stopped on request


class NotHere(Exception):
    """A part can't run on this machine; the reason is not a failure."""


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise NotHere(f"{package} is not installed; bring its wheel (--wheels)")


def recipe(context: Context, folder: Path, name: str, **values: Any) -> tuple[Path, Path]:
    """(recipe file, output folder) of two DPO steps on the embedded sample."""
    out = folder / name
    keys = {
        "stage": "dpo", "model_name_or_path": model_folder(context, "small"), "dataset_name": "embedded:sample", "max_train_examples": 8,
        "output_dir": str(out), "max_length": 256, "global_batch_size": 4, "max_tokens_per_device": 1024, "max_steps": 2,
        "learning_rate": 1e-4, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "seed": 1, "use_peft": True, "lora_r": 4,
        "lora_dropout": 0.0, "lora_target_modules": "all-linear", "merge_adapter": False, "reference_cache": str(folder / f"{name}-reference"),
    } | values  # fmt: skip
    keys = {key: value for key, value in keys.items() if value is not None}
    file = folder / f"{name}.yaml"
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()), encoding="utf-8")
    return file, out


def steps_of(out: Path) -> list[dict[str, Any]]:
    from rlhf.runs.metrics import read_metrics

    return [row for row in read_metrics(out) if "loss" in row]


def train(stage: str, file: Path) -> tuple[int, str]:
    """Run a stage in this process; (exit code, what it printed)."""
    from rlhf.__main__ import main

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = main([stage, str(file)])
    print(shown.getvalue())
    return code, shown.getvalue()


def check_steps(rows: list[dict[str, Any]], first: float | None) -> list[str]:
    """What is wrong with the logged steps of a run: two, finite, the first loss `first` if given."""
    losses, norms = ([row[key] for row in rows] for key in ("loss", "grad_norm"))
    wrong = [] if len(rows) == 2 else [f"{len(rows)} steps were logged, expected 2"]
    wrong += (
        [f"a loss or gradient is not finite: {losses} {norms}"] if not all(map(math.isfinite, losses + norms)) else []
    )
    if first is not None and losses and abs(losses[0] - first) > LN_2_TOLERANCE:
        wrong.append(f"the first loss is {losses[0]:.4f}, expected {first:.4f} within {LN_2_TOLERANCE}")
    if losses and not any(norms):
        wrong.append("no gradient reached the adapter")
    return wrong


def qlora(context: Context) -> dict[str, Any]:
    """Two DPO steps of a 4-bit policy that is its own reference: starts at ln 2, trains, is saved."""
    need("bitsandbytes")
    return _four_bits(context, "qlora", math.log(2), load_in_4bit=True)


def nf4(context: Context) -> dict[str, Any]:
    """Two DPO steps against a separate 4-bit reference model, whose bias is measured first."""
    need("bitsandbytes")
    return _four_bits(context, "nf4", None, reference="nf4", max_reference_bias_nats=1000, reference_cache=None)


def _four_bits(context: Context, name: str, first: float | None, **values: Any) -> dict[str, Any]:
    file, out = recipe(context, context.folder(name), name, use_cpu=context.device == "cpu", **values)
    code, shown = train("dpo", file)
    rows = steps_of(out) if code == 0 else []
    wrong = check_steps(rows, first) if code == 0 else [f"exit code {code}"]
    if name == "nf4" and code == 0 and "nats" not in shown:
        wrong.append("the bias of the 4-bit reference was not printed")
    losses = ", ".join(f"{row['loss']:.4f}" for row in rows)
    return {"ok": not wrong, "summary": "; ".join(wrong) or f"losses {losses}", "losses": [row["loss"] for row in rows]}


# --- launch files ----------------------------------------------------------------------------------------------------


def launch(context: Context, name: str) -> dict[str, Any]:
    """DPO of two steps under a launch file: cached reference, checkpoint, stop after the first step, resume, finish."""
    if name.startswith("zero"):
        need("deepspeed")
    processes = 1 if name == "single" else max(1, min(2, context.gpus)) if context.device == "cuda" else 2
    if name == "fsdp2_hsdp":
        if context.device == "cuda" and context.gpus < 4:
            raise NotHere(
                f"two copies of two shards need 4 GPUs; there {'is' if context.gpus == 1 else 'are'} {context.gpus}"
            )
        processes = 4
    folder = context.folder(f"launch-{name}")
    file, out = recipe(context, folder, name)
    out.mkdir()
    (out / "stop").touch()  # a stop file that is there already: stop after the first step
    code, shown = _launched(context, name, processes, file)
    wrong = [] if "Stopped after step 1 of 2" in shown else [f"it did not stop after the first step (exit code {code})"]
    if not wrong:
        code, shown = _launched(context, name, processes, file)
        wrong = [] if code == 0 else [f"the resumed run ended with exit code {code}"]
        if code == 0 and "resuming from" not in shown:
            wrong.append("the second start did not resume")
        if code == 0 and not (out / "complete.json").is_file():
            wrong.append("the run did not finish")
    rows = steps_of(out)
    wrong += check_steps(rows, math.log(2)) if not wrong else []
    used = "1 process" if processes == 1 else f"{processes} processes"
    losses = [row["loss"] for row in rows]
    summary = f"{used}: losses {', '.join(f'{x:.4f}' for x in losses)}; stopped, resumed, finished"
    return {"ok": not wrong, "summary": "; ".join(wrong) or summary, "losses": losses, "processes": processes}


def _launched(context: Context, name: str, processes: int, file: Path) -> tuple[int, str]:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "launch" / f"{name}.yaml"),
    ]
    command += ["--num_processes", str(processes)]
    if name == "fsdp2_hsdp":
        command += ["--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(
        [*command, "-m", "rlhf", "dpo", str(file)], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )  # fmt: skip
    print(done.stdout, flush=True)
    return done.returncode, done.stdout
