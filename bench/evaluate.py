"""Scoring an evaluation's pairs: packed batches against one pair per forward pass.

python bench/evaluate.py --data pairs.jsonl [--model FOLDER] [--num 64] [--device cuda]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from rlhf.data.prepare import plain_rows, prepare
from rlhf.data.sources import Source
from rlhf.inference.generate import encode_prompt, generate, prompt_batches
from rlhf.inference.score import SIDES, encode_pair, pack, pair_batches, pair_logps
from rlhf.models.embedded import fetch
from rlhf.models.inference import load_finished


def read_pairs(path: str, num: int) -> list[dict]:
    """The first pairs of a .jsonl or .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(num), strict=False)]
    return plain_rows(prepare(Source(path, rows, None, ""), "pairs").rows)


def timed(work) -> tuple[float, list[dict]]:
    """(seconds, what `work` returns), with a GPU's work done."""
    started = time.perf_counter()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, found


def in_batches(model, pairs, batches) -> list[dict]:
    found: dict[int, dict] = {}
    for batch in batches:
        found |= dict(zip(batch, pair_logps(model, [pairs[i] for i in batch]), strict=True))
    return [found[i] for i in range(len(pairs))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--num", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--answers", type=int, default=0, metavar="N", help="also compare N greedy answers of 1 and of 16 per batch"
    )
    options = parser.parse_args()
    model, tokenizer = load_finished(options.model or str(fetch()), device=options.device,
                                     dtype="float32" if options.device == "cpu" else None)  # fmt: skip
    rows = read_pairs(options.data, options.num)
    pairs = [encode_pair(tokenizer, row, options.max_length) for row in rows]
    one = [[i] for i in range(len(pairs))]
    batches = pair_batches(pairs, len(tokenizer))
    print(
        f"{len(pairs)} pairs of {Path(options.data).name}, {model.dtype} on {options.device}, {torch.get_num_threads()} threads; {len(batches)} batches"
    )
    in_batches(model, pairs[:2], one[:2])  # warm-up
    seconds = {"one pair per pass, padded": timed(lambda: in_batches(model, pairs, one))}
    assert pack(model)
    in_batches(model, pairs[:2], one[:2])
    seconds["one pair per pass, packed"] = timed(lambda: in_batches(model, pairs, one))
    seconds["packed batches"] = timed(lambda: in_batches(model, pairs, batches))
    baseline, expected = seconds["one pair per pass, padded"]
    for name, (taken, found) in seconds.items():
        off = max(abs(a[side] - b[side]) / abs(b[side]) for a, b in zip(found, expected, strict=True) for side in SIDES)
        print(
            f"{name:<28} {len(pairs) / taken:7.2f} pairs/s  {baseline / taken:5.2f}x  largest relative difference {off:.1e}"
        )
    if options.answers:
        compare_answers(model, tokenizer, rows[: options.answers])


def compare_answers(model, tokenizer, rows: list[dict]) -> None:
    """Greedy answers of one prompt per batch against 16: how many differ, and how much faster they are."""
    from rlhf.config.stage_config import EvaluateConfig

    config = EvaluateConfig(max_new_tokens=48)
    prompts = {i: encode_prompt(tokenizer, row["prompt"]) for i, row in enumerate(rows)}
    taken, found = {}, {}
    for size in (1, 16):

        def work(size=size):
            texts = {}
            for batch in prompt_batches(prompts, size):
                texts |= dict(zip(batch, generate(model, tokenizer, [prompts[i] for i in batch], config), strict=True))
            return texts

        taken[size], found[size] = timed(work)
    differ = sum(found[1][i] != found[16][i] for i in prompts)
    print(
        f"greedy answers: {differ} of {len(prompts)} differ between 1 and 16 per batch, which are {taken[1] / taken[16]:.1f}x as fast"
    )


if __name__ == "__main__":
    main()
