"""Seconds a pair of one DPO training step with TRL's trainer: padded against packed, interleaved in one process.

    python bench/packing_step.py MODEL_DIR [--pairs 8]

LoRA r=16 on all linear layers, fp32, the embedded sample data, batches of 1 and of 4 pairs, the reference pass (adapter
off) in every step, TRL's head scoring answers only in both (`--trl-head`: TRL's own choice, which scores every position
on a CPU). Both start from the same weights and see the same batches, so that their losses can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from rlhf.data.sources import SAMPLE_DIR
from rlhf.models import load_tokenizer
from rlhf.packing import lay_out, pack_backbone
from rlhf.run import score_labelled_positions_only


def build(model_dir: str, rows: list[dict], folder: str, packed: bool):
    """(trainer, optimizer)"""
    torch.manual_seed(0)
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, max_length=1024, gradient_checkpointing=False, report_to="none",
            disable_tqdm=True, learning_rate=1e-4,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(model_dir),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    if packed:
        pack_backbone(trainer.model, "pairs")
    trainer.model.train()
    return trainer, trainer.create_optimizer()


def step(trainer, optimizer, examples: list[dict]) -> tuple[float, float]:
    """(seconds, loss) of forward, reference, backward and update."""
    inputs = trainer.data_collator(examples)
    start = time.perf_counter()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start, float(loss)


def compare(runs: dict, examples: list[dict], size: int) -> None:
    """Run all batches of `size` through both, in turns, and print a line."""
    collate = runs["padded"][0].data_collator
    batches = [examples[i : i + size] for i in range(0, len(examples), size)]
    seconds, losses = {name: [] for name in runs}, {name: [] for name in runs}
    padded_tokens = packed_tokens = 0
    for number, batch in enumerate(batches):
        inputs = collate(batch)
        padded_tokens += inputs["input_ids"].numel()
        packed_tokens += lay_out(inputs["input_ids"], inputs["attention_mask"], "pairs").num_tokens
        for name in sorted(runs, reverse=number % 2 == 1):  # neither is always first
            taken, loss = step(*runs[name], batch)
            seconds[name].append(taken / len(batch))
            losses[name].append(loss)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    difference = max(abs(a - b) for a, b in zip(losses["padded"], losses["packed"], strict=True))
    print(
        f"{size} a batch, {len(examples)} pairs, medians: padded {middle['padded']:.2f} s a pair, packed {middle['packed']:.2f} s a pair, "
        f"ratio {middle['padded'] / middle['packed']:.2f}; tokens {padded_tokens} -> {packed_tokens} "
        f"({padded_tokens / packed_tokens:.2f}); largest difference of loss {difference:.1e} "
        f"(last loss {losses['padded'][-1]:.4f})",
        flush=True,
    )
    print(
        f"   seconds a pair, step by step: { {name: [round(s, 2) for s in seconds[name]] for name in runs} }",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("--pairs", type=int, default=8, help="pairs a mode and batch size (default: 8)")
    parser.add_argument("--trl-head", action="store_true", help="let TRL score every position on a CPU, as it does")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    if not args.trl_head:
        score_labelled_positions_only()
    lines = (SAMPLE_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{key: json.loads(line)[key] for key in ("prompt", "chosen", "rejected")} for line in lines[: args.pairs]]
    print(
        f"{Path(args.model_dir).name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, trl {trl.__version__}, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: build(args.model_dir, rows, folder, name == "packed") for name in ("padded", "packed")}
        examples = list(runs["padded"][0].train_dataset)
        for run in runs.values():
            step(*run, examples[:1])  # warm up; the same update for both
        for size in (1, 4):
            compare(runs, examples, size)


if __name__ == "__main__":
    main()
