"""What bench/dpo.py, bench/reward.py and bench/sft.py share: variants in turns, each in a process of its own.

Every round starts a fresh process a variant, which builds its trainer from the same recipe (the same model, weights,
LoRA initialisation, data, order and batches), takes one step to warm up and then the measured ones through the
trainer's own loop. Losses of the same step are compared, so that a speed-up that changes a number is seen.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
RESULTS = Path(__file__).parent / "results"
SHAPES = {  # as in the models' published configs
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
LENGTHS = {  # log-normal (median, sigma) of prompt, chosen and rejected, in words
    "hh-lengths": ((110, 0.7), (32, 0.9), (38, 0.9)),  # HH-RLHF: multi-turn prompts, short answers
    "completion-heavy": ((20, 0.6), (200, 0.5), (200, 0.5)),  # a short question, long answers
}


@dataclass
class Bench:
    """One comparison.

    Attributes:
        stage: `sft`, `reward` or `dpo`.
        variants: name to what it is; the first is the baseline of the ratios.
        modes: name to how its batches are packed (None: not at all), which is checked once its trainer is built.
        build: (variant, plan, clock) to a trainer; `clock` times what comes before the first step.
    """

    stage: str
    variants: dict[str, str]
    modes: dict[str, str | None]
    build: Callable[[str, Any, Callable], Any]


def main(bench: Bench) -> None:
    args = parse(bench)
    if args.worker:
        worker(bench, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(bench, args, Path(folder))
        peak = spawn(args, folder, "matmul-peak", 0)["flops"]
        runs: dict[str, list[dict]] = {name: [] for name in args.variants}
        for number in range(args.rounds):
            order = list(args.variants) if number % 2 == 0 else list(args.variants)[::-1]  # none is always first
            for name in order:
                found = spawn(args, folder, name, number)
                runs[name].append(found)
                print(f"  round {number + 1}  {name:<16} {rate(found):8.3f} examples/s", file=sys.stderr, flush=True)
    report(bench, args, runs, peak)


def parse(bench: Bench) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct", help=f"a folder, or {', '.join(SHAPES)}")
    parser.add_argument("--data", default="hh-lengths", help=f"a .jsonl(.gz) of preference pairs, or {', '.join(LENGTHS)}")  # fmt: skip
    parser.add_argument("--examples", type=int, default=4, help="pairs (SFT: answers) a step")
    parser.add_argument("--steps", type=int, default=2, help="measured steps a round, after one to warm up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", choices=["lora", "qlora", "full"], default="lora")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="weights and autocast")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="for all variants (TRL's default)")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--variants", nargs="+", choices=list(bench.variants), default=list(bench.variants))
    parser.add_argument("--profile", metavar="VARIANT", choices=list(bench.variants), help="print where its time goes")
    parser.add_argument("--no-result", action="store_true", help="print only, append nothing to bench/results/")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- what all variants get -------------------------------------------------------------------------------------------


def prepare(bench: Bench, args, folder: Path) -> None:
    """The model (shapes are given random weights), the rows and the recipe."""
    model = args.model
    if model in SHAPES:
        model = make_model(SHAPES[model], folder / "model")
    rows = read_rows(args)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "stage": bench.stage, "model_name_or_path": model, "dataset_name": str(folder / "pairs.jsonl"), "output_dir": str(folder / "out"),
        "max_length": args.max_length, "per_device_train_batch_size": args.examples, "max_steps": args.steps + 1,
        "learning_rate": 1e-4, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "seed": 1,
        "gradient_checkpointing": args.gradient_checkpointing, "disable_tqdm": True, "dtype": args.dtype,
    }  # fmt: skip
    if args.train != "full":
        recipe |= {"use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}  # fmt: skip
    if args.train == "qlora":
        recipe["load_in_4bit"] = True
    if args.device == "cpu":
        recipe["use_cpu"] = True
    if args.dtype == "bfloat16":
        recipe["bf16"] = True
    else:
        recipe["bf16"] = False
    recipe |= getattr(args, "recipe", {})  # of bench/gpu_proof_trl.py, for one variant
    (folder / "recipe.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in recipe.items()), encoding="utf-8")


def make_model(shape: dict[str, Any], folder: Path, tokenizer: Any = None, device: str = "cpu") -> str:
    """bf16 random weights in a shape, drawn on `device`, with a tokenizer; default: the embedded model's."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from rlhf.models.embedded import NAME, resolve

    tokenizer = tokenizer or AutoTokenizer.from_pretrained(resolve(NAME))
    config = LlamaConfig(
        **shape, max_position_embeddings=8192, rope_theta=500000.0, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def read_rows(args) -> list[dict[str, Any]]:
    """Just as many canonical pairs as are trained on; rows of a file that the data checks refuse are left out."""
    from rlhf.data.prepare import plain_rows, prepare
    from rlhf.data.sources import load_source

    count = args.examples * (args.steps + 1)
    if args.data in LENGTHS:
        return generate(count, LENGTHS[args.data])
    found = prepare(load_source(args.data), "pairs", bad_rows="skip")
    for row in found.skipped:
        print(f"left out: {row['place']}: {row['reason']}", file=sys.stderr)
    rows = plain_rows(found.rows.head(count))
    if len(rows) == count:
        return rows
    raise SystemExit(f"{args.data} holds {len(rows)} usable pairs; {count} are needed (--examples x (--steps + 1))")


def generate(count: int, lengths) -> list[dict[str, Any]]:
    """Pairs of random common words, their numbers drawn from log-normal distributions."""
    words = "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not what all were we when your can said there use an each which she do how their if will up other about out many then them these so some her would make like him into time has look two more write go see number no way could people my than first water been call who oil its now find long down day did get come made may part".split()  # fmt: skip
    draw = random.Random(0)

    def text(median: float, sigma: float) -> str:
        return " ".join(draw.choices(words, k=max(1, round(draw.lognormvariate(math.log(median), sigma)))))

    sides = [(role, *length) for role, length in zip(("user", "assistant", "assistant"), lengths, strict=True)]
    return [
        dict(zip(("prompt", "chosen", "rejected"), ([{"role": r, "content": text(m, s)}] for r, m, s in sides), strict=True))
        for _ in range(count)
    ]  # fmt: skip


# --- one variant, in its own process ---------------------------------------------------------------------------------


def spawn(args, folder: str, name: str, number: int) -> dict[str, Any]:
    """Run this script again as a worker; returns what it measured."""
    out = Path(folder) / f"{name}-{number}.json"
    command = [sys.executable, *sys.argv, "--worker", name, "--folder", folder, "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if not out.is_file():
        print(done.stdout[-4000:], file=sys.stderr)
        reason = "killed, out of memory?" if done.returncode < 0 else "the worker failed (its output is above)"
        raise SystemExit(f"{name}: {reason}, exit code {done.returncode}")
    if args.profile == name and number == 0:
        print(done.stdout[done.stdout.find("-----") :])
    return json.loads(out.read_text())


def worker(bench: Bench, args) -> None:
    import torch

    if args.worker == "matmul-peak":
        Path(args.out).write_text(json.dumps({"flops": matmul_peak(args)}))
        return
    clock = Clock()
    trainer = bench.build(args.worker, load_plan(bench, args), clock)
    check_variant(args.worker, bench.modes[args.worker], trainer)
    batches = watch_batches(trainer)
    ends, cuda = watch_steps(trainer)
    if args.profile == args.worker:
        profile(trainer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    seconds = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    config = trainer.model.config
    backbone = sum(p.numel() for n, p in trainer.model.named_parameters() if p.dim() == 2 and "layers." in n and "lora_" not in n)  # fmt: skip
    memory = torch.cuda.max_memory_allocated() if cuda else peak_rss()
    found = {
        "seconds": seconds, "examples": args.examples, "before_s": sum(clock.seconds), "before_examples": len(trainer.train_dataset),
        "losses": [log["loss"] for log in logs], "tokens": [b["tokens"] for b in batches[1 : len(seconds) + 1]],
        "padded": [b["padded"] for b in batches[1 : len(seconds) + 1]],
        "flops": [useful_flops(b, config, backbone, args.train == "full") for b in batches[1 : len(seconds) + 1]],
        "memory": memory, "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }  # fmt: skip
    Path(args.out).write_text(json.dumps(found))


def load_plan(bench: Bench, args):
    """The plan of the recipe that all variants share."""
    from rlhf.config.recipe import load_recipe
    from rlhf.console import quiet_libraries
    from rlhf.distributed.topology import topology_of_environment
    from rlhf.training.plan import make_plan

    quiet_libraries()
    scratch = Path(args.folder) / f"cache-{args.worker}-{os.getpid()}"  # nothing is found from an earlier round
    flags = ["--reference_cache", str(scratch)] if bench.stage == "dpo" else []
    recipe = load_recipe(f"{args.folder}/recipe.yaml", bench.stage, flags)
    stage = sys.modules[bench.build.__module__].STAGE
    return make_plan(stage, recipe, topology_of_environment())


class Clock:
    """Wraps functions, and keeps the seconds of each call."""

    def __init__(self):
        self.seconds: list[float] = []

    def __call__(self, function):
        def timed(*positional, **named):
            started = time.perf_counter()
            result = function(*positional, **named)
            self.seconds.append(time.perf_counter() - started)
            return result

        return timed


def check_variant(variant: str, expected: str | None, trainer) -> None:
    """Stop unless the trainer packs its batches as its variant's name says: losses are equal in all of them by design, so
    nothing else would show that a number stands under a wrong name."""
    from rlhf.packing import packing_mode

    found = packing_mode(trainer.model)
    if found != expected:
        raise SystemExit(
            f"{variant}: batches are packed as {found}, expected {expected} (None: not packed); its numbers would stand under a "
            "wrong name, so nothing was measured"
        )


def watch_batches(trainer) -> list[dict[str, Any]]:
    """Note for each collated batch its real tokens, its padded size, and what a perfect layout has to compute."""
    from rlhf.packing import packed_layout

    collate, seen = trainer.data_collator, []

    def noting(examples):
        batch = collate(examples)
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        if mask is None:  # TRL's padding-free rows
            seen.append({"tokens": ids.numel(), "padded": ids.numel(), "segments": None, "scored": 0})
            return batch
        layout = packed_layout(ids, mask, "pairs" if "labels" not in batch else "rows")
        answers = batch.get("completion_mask")
        if "labels" in batch:
            answers = batch["labels"] != -100
        seen.append(
            {"tokens": int(mask.sum()), "padded": ids.numel(), "segments": layout.segments,
             "scored": int(answers.sum()) if answers is not None else 0}
        )  # fmt: skip
        return batch

    trainer.data_collator = noting
    return seen


def watch_steps(trainer) -> tuple[list[float], bool]:
    """The time at the end of each optimizer step; and whether it runs on CUDA."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    ends: list[float] = []
    cuda = trainer.args.device.type == "cuda"

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Clock)
    return ends, cuda


def profile(trainer) -> None:
    """Print torch's profiler table of the last step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler
    from transformers import TrainerCallback

    class Profile(TrainerCallback):
        running = profiler(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (trainer.args.device.type == "cuda"))  # fmt: skip

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps - 1:
                self.running.start()

        def on_train_end(self, args, state, control, **kwargs):
            self.running.stop()
            key = "self_cuda_time_total" if args.device.type == "cuda" else "self_cpu_time_total"
            print(self.running.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=45))

    trainer.add_callback(Profile)


def useful_flops(batch, config, backbone: int, full: bool) -> float:
    """Floating-point operations that a step can't do without: real tokens, each shared prompt once, no recomputation.

    Matmuls of the backbone: 2 a weight and token forward, 2 backward for the hidden states, 2 more for the weights where
    they are trained (LoRA's own are left out). The LM head the same, for scored positions. Attention: 4 x heads x
    head_dim a query and key that it sees (QK^T and AV), twice that backward.
    """
    if batch["segments"] is None:
        return math.nan
    passes = 3 if full else 2
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    tokens = sum(sum(segment) for segment in batch["segments"])
    seen = sum((p + c) ** 2 / 2 + r * (p + r / 2) for p, c, r in batch["segments"])
    head = 2 * batch["scored"] * config.hidden_size * config.vocab_size * passes
    return 2 * tokens * backbone * passes + head + 4 * width * config.num_hidden_layers * seen * 3


def matmul_peak(args) -> float:
    """FLOP/s of the best of ten square matmuls in the bench's dtype."""
    import torch

    device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, args.dtype)) for _ in range(2))
    best = math.inf
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak_rss() -> int:
    """Bytes of memory this process had at most (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


# --- the table -------------------------------------------------------------------------------------------------------


def rate(run: dict[str, Any]) -> float:
    """Examples a second over the measured steps."""
    return run["examples"] * len(run["seconds"]) / sum(run["seconds"])


def first_epoch(run: dict[str, Any]) -> float:
    """Examples a second of an epoch in which the reference is computed too."""
    return 1 / (run["before_s"] / run["before_examples"] + 1 / rate(run))


def report(bench: Bench, args, runs: dict[str, list[dict]], peak: float) -> None:
    base_name, base = next(iter(runs.items()))
    flops = next((r[0]["flops"] for r in runs.values() if not any(math.isnan(f) for f in r[0]["flops"])), None)
    tokens = max(sum(r[0]["tokens"]) for r in runs.values())
    unit = "answers" if bench.stage == "sft" else "pairs"
    head = [bench.stage, f"{unit}/s", "(lowest to highest)", "tokens/s", "ratio", "first epoch", "peak memory", "of TRL's", "max loss difference", "of peak FLOP/s"]  # fmt: skip
    rows = []
    for name, found in runs.items():
        rates = [rate(r) for r in found]
        median = statistics.median(rates)
        ratio = statistics.median(rate(r) / rate(b) for r, b in zip(found, base, strict=True))
        epoch = statistics.median(first_epoch(r) for r in found)
        memory = max(r["memory"] for r in found)
        difference = max(abs(x - y) for r, b in zip(found, base, strict=True) for x, y in zip(r["losses"], b["losses"], strict=True))  # fmt: skip
        seconds = statistics.median(sum(r["seconds"]) for r in found)
        rows.append(
            [name, f"{median:.3f}", f"({min(rates):.3f} to {max(rates):.3f})", f"{tokens / seconds:.0f}", f"{ratio:.2f}x",
             f"{epoch:.3f} {unit}/s" if bench.stage == "dpo" else "", f"{memory / 2**30:.2f} GiB",
             f"{memory / max(r['memory'] for r in base):.2f}", f"{difference:.1e}",
             f"{sum(flops) / seconds / peak:.0%}" if flops else ""]
        )  # fmt: skip
    keep = [i for i, column in enumerate(zip(*rows, strict=True)) if any(column)]
    table = [[head[i] for i in keep], ["---"] * len(keep)] + [[row[i] for i in keep] for row in rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    text = describe(bench, args, runs, base_name, peak) + "\n\n" + text + "\n"
    print("\n" + text)
    if not args.no_result:
        RESULTS.mkdir(exist_ok=True)
        with open(RESULTS / f"{bench.stage}.md", "a", encoding="utf-8") as file:
            file.write("\n" + text)
        print(f"appended to {RESULTS.name}/{bench.stage}.md")


def describe(bench: Bench, args, runs, base_name: str, peak: float) -> str:
    from rlhf.runs.provenance import environment

    found = environment()
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if k in ("torch", "transformers", "trl", "peft", "bitsandbytes"))  # fmt: skip
    some = next(iter(runs.values()))[0]
    command = " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *(shlex.quote(_short(word)) for word in sys.argv[1:])])  # fmt: skip
    variants = "\n".join(f"- `{name}`: {bench.variants[name]}" for name in runs)
    return f"""## {datetime.now(UTC):%Y-%m-%d %H:%M} UTC: {bench.stage}, {_short(args.model)}, {_short(args.data)}, {args.train}, {args.dtype}

    {command}

{_hardware(found["hardware"])}; {versions}; commit {found["git_commit"]}. {some["parameters"] / 1e6:.0f} M parameters,
{args.examples} examples a step, {args.rounds} rounds of {args.steps} measured steps, each round in a fresh process a variant.
Padded batches hold {sum(some["padded"]) / len(some["padded"]):.0f} tokens a step, {sum(some["tokens"]) / len(some["tokens"]):.0f} of them real. Ratios and loss differences are
against `{base_name}`; the matmul peak is {peak / 1e9:.0f} GFLOP/s, measured.

{variants}"""


def _short(word: str) -> str:
    """A path of this machine is nobody else's: its last part."""
    return Path(word).name if "/" in word else word


def _hardware(found: dict[str, Any]) -> str:
    cpu = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
        flags = next((line for line in lines if line.startswith("flags")), "")
        cpu += "".join(f" {name}" for name in ("avx2", "avx512f", "amx_bf16") if f" {name}" in flags)
    gpus = ", ".join(found.get("gpus", []))
    return f"{gpus + '; ' if gpus else ''}{found['cpus']} cores ({cpu or platform.machine()}), {found.get('memory_gib')} GiB"  # fmt: skip
