"""From a file of pairs to the first batch: this project beside plain TRL, first and second start; memory; --check; a step.

    python bench/data.py                       # 100,000 pairs (HH lengths), beside TRL
    python bench/data.py --rows 1000000 --only rlhf check   # a million, without TRL's half hour

Every figure is a process of its own. `first` starts with an empty cache, `second` finds what the first has left. Times are
wall seconds and CPU seconds (of all its processes) up to the first collated batch; memory is what the process does not share
(USS) then, over that of the same process with an empty data set. TRL's side is its documented use: `load_dataset` of the same
file, DPOTrainer, its first batch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import compare

SIDES = ("rlhf", "trl", "check")
DATED = Path(__file__).parent / "results" / "data.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--data", help="a .jsonl file of prompt, chosen, rejected, instead of generated pairs")
    parser.add_argument("--only", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--model", help="default: a one-layer model with the embedded model's tokenizer")
    parser.add_argument("--folder", help="for the generated file and the caches; default: a temporary one")
    parser.add_argument("--save", action="store_true", help="append the table to bench/results/data.md")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*args.worker)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        table(args, folder)


def table(args, folder: Path) -> None:
    data = Path(args.data) if args.data else write_pairs(folder / f"pairs-{args.rows}.jsonl", args.rows)
    empty = write_pairs(folder / "one.jsonl", 8)
    model = args.model or tiny_model(folder / "model")
    lines = []
    for side in args.only:
        cache = folder / f"cache-{side}"
        shutil.rmtree(cache, ignore_errors=True)
        base = measure(side, empty, model, cache)
        for start in ("first", "second"):
            found = measure(side, data, model, cache)
            print(f"{side} {start}: {json.dumps(found)}", flush=True)
            lines.append((side, start, found, found["uss_mb"] - base["uss_mb"], found["seconds"] - base["seconds"]))
    size = data.stat().st_size / 1e9
    text = [f"{args.rows:,} pairs, {size:.2f} GB, {os.cpu_count()} cores", "",
            "| side | start | s to the first batch | beyond an empty data set | CPU s | own memory beyond an empty data set | peak RSS |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for side, start, found, memory, seconds in lines:
        text.append(
            f"| {side} | {start} | {found['seconds']:.1f} | {seconds:.1f} | {found['cpu']:.1f} | {memory:.0f} MB | {found['rss_mb']:.0f} MB |"
        )
    text += ["", step_line(args.rows)]
    print("\n".join(text))
    if args.save:
        command = " ".join(["python bench/data.py", *(word for word in sys.argv[1:] if word != "--save")])
        with open(DATED, "a", encoding="utf-8") as file:
            file.write(f"\n## {time.strftime('%Y-%m-%d')}, `{command}`\n\n" + "\n".join(text) + "\n")


def step_line(rows: int) -> str:
    """The cost of choosing a step's rows."""
    from rlhf.training.batching import step_examples

    started = time.perf_counter()
    step_examples(0, rows, 64, 1)
    first = time.perf_counter() - started
    started = time.perf_counter()
    for step in range(1, 101):
        step_examples(step, rows, 64, 1)
    return f"rows of a step: {10 * (time.perf_counter() - started):.3f} ms, once an epoch {1000 * first:.1f} ms"


def write_pairs(path: Path, count: int) -> Path:
    """Generated pairs with HH-RLHF's lengths; each prompt is its own."""
    if not path.exists():
        drawn = compare.generate(min(count, 20_000), compare.LENGTHS["hh-lengths"])
        partial = path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8") as file:
            for number in range(count):
                row = drawn[number % len(drawn)]
                prompt = [{"role": "user", "content": f"({number}) {row['prompt'][0]['content']}"}]
                file.write(json.dumps({**row, "prompt": prompt}) + "\n")
        partial.rename(path)
    return path


def tiny_model(folder: Path) -> str:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from rlhf.models.embedded import NAME, resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve(NAME))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048,
    )).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return str(folder)


def measure(side: str, data: Path, model: str, cache: Path) -> dict[str, float]:
    environment = {**os.environ, "RLHF_CACHE": str(cache), "HF_DATASETS_CACHE": str(cache / "hf"), "HF_HUB_OFFLINE": "1",
                   "TOKENIZERS_PARALLELISM": "true"}  # fmt: skip
    found = cache.with_name("found.json")
    command = [sys.executable, __file__, "--worker", side, json.dumps([str(data), model, str(found)])]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return json.loads(found.read_text())


def work(side: str, job: str) -> None:
    """In a process of its own: to the first batch, and print what it took."""
    data, model, found = json.loads(job)
    started = time.time()
    batch = {"rlhf": rlhf_batch, "trl": trl_batch, "check": check}[side](data, model)
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    Path(found).write_text(json.dumps({
        "seconds": time.time() - started, "uss_mb": private_mb(), "rss_mb": compare.peak_rss() / 1e6,
        "cpu": sum(r.ru_utime + r.ru_stime for r in (own, children)), "batch": batch,
    }))  # fmt: skip


def private_mb() -> float:
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_Dirty")) / 1e3


def recipe(data: str, model: str):
    from rlhf.config.recipe import Recipe, check_recipe

    values = {"stage": "dpo", "model_name_or_path": model, "dataset_name": data, "output_dir": tempfile.mkdtemp(), "use_cpu": True,
              "bf16": False, "dtype": "float32", "max_length": 512, "global_batch_size": 8, "max_tokens_per_device": 4096,
              "max_steps": 1, "reference": "online", "learning_rate": 1e-6}  # fmt: skip
    return check_recipe(Recipe("dpo", "bench", values, {}))


def rlhf_batch(data: str, model: str) -> str:
    from rlhf.distributed.topology import Topology
    from rlhf.training.dpo import DPO
    from rlhf.training.plan import make_plan
    from rlhf.training.tokens import load_plan_tokenizer, with_tokens

    plan = make_plan(DPO, recipe(data, model), Topology("one process"))
    plan = with_tokens(plan, load_plan_tokenizer(plan))
    return digest(next(iter(DPO.build(plan, None).get_train_dataloader()))["micro_batches"][0]["batch"])


def trl_batch(data: str, model: str) -> str:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = load_dataset("json", data_files=data, split="train")
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, max_length=512, per_device_train_batch_size=8, max_steps=1,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model), args=args, train_dataset=rows, processing_class=tokenizer
    )
    return digest(next(iter(trainer.get_train_dataloader())))


def check(data: str, model: str) -> str:
    """What `rlhf dpo RECIPE --check` reads of the data."""
    from rlhf.data.rows import read_data

    found = read_data(recipe(data, model), "pairs")
    return " ".join(found.describe())[:200]


def digest(batch: dict) -> str:
    """Of the tensors that TRL's collator makes; ours adds what it knows of their layout."""
    tensors = [batch[name] for name in sorted(batch) if hasattr(batch[name], "numpy")]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:8]


if __name__ == "__main__":
    main()
