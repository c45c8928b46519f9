"""Greedy answers by plain batches in the data's order, by batches of similar length, and by transformers' continuous batching.

    python bench/generate.py [--model FOLDER] [--data pairs.jsonl] [--num 32] [--max_new_tokens 48] [--device cuda]

Prints answers per second of CPU time (on a GPU: of the wall clock) and how many answers differ from those of one prompt per batch.
Each way is run in turn, `--repeat` times, and the best counts.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from evaluate import read_pairs

from rlhf.config.stage_config import EvaluateConfig
from rlhf.console import quiet_libraries
from rlhf.data.sources import SAMPLE_DIR
from rlhf.inference.generate import encode_prompt, generate, prompt_batches
from rlhf.models.embedded import fetch
from rlhf.models.inference import load_finished

Prompts = dict[int, list[int]]


def in_batches(model, tokenizer, prompts: Prompts, config: EvaluateConfig, batches: list[list[int]]) -> dict[int, str]:
    found: dict[int, str] = {}
    for batch in batches:
        answers = generate(model, tokenizer, [prompts[i] for i in batch], config)
        found |= {i: text for i, (text, _) in zip(batch, answers, strict=True)}
    return found


def continuously(model, tokenizer, prompts: Prompts, config: EvaluateConfig) -> dict[int, str]:
    """By `generate_batch`, with as many prompts at a time as the batches have."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    blocks = -(-(max(map(len, prompts.values())) + config.max_new_tokens) // 256) * config.batch_size
    out = model.generate_batch(
        list(prompts.values()),
        generation_config=GenerationConfig(
            max_new_tokens=config.max_new_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            max_requests_per_batch=config.batch_size, num_blocks=2 * blocks + 8, max_batch_tokens=1024
        ),
    )  # fmt: skip
    texts = [tokenizer.decode(one.generated_tokens, skip_special_tokens=True).strip() for one in out.values()]
    return dict(zip(prompts, texts, strict=True))


def ways(model, tokenizer, prompts: Prompts, config: EvaluateConfig) -> dict[str, Callable[[], dict[int, str]]]:
    order, size = list(prompts), config.batch_size
    unsorted = [order[start : start + size] for start in range(0, len(order), size)]
    run = lambda batches: in_batches(model, tokenizer, prompts, config, batches)  # noqa: E731
    return {
        "one prompt per batch": lambda: run([[i] for i in order]),
        "in the data's order": lambda: run(unsorted),
        "of similar length": lambda: run(prompt_batches(prompts, size)),
        "continuous batching": lambda: continuously(model, tokenizer, prompts, config),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(SAMPLE_DIR / "train.jsonl"))
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--num", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    quiet_libraries()
    on_cpu = options.device == "cpu"
    model, tokenizer = load_finished(
        options.model or str(fetch()), device=options.device, dtype="float32" if on_cpu else None
    )
    config = EvaluateConfig(max_new_tokens=options.max_new_tokens, batch_size=options.batch_size)
    prompts = {
        i: encode_prompt(tokenizer, row["prompt"]) for i, row in enumerate(read_pairs(options.data, options.num))
    }
    lengths = sorted(map(len, prompts.values()))
    print(
        f"{len(prompts)} prompts of {Path(options.data).name} ({lengths[0]} to {lengths[-1]} tokens), at most {config.max_new_tokens} "
        f"new tokens, {config.batch_size} per batch; {model.dtype} on {options.device}, {torch.get_num_threads()} threads"
    )
    clock = time.process_time if on_cpu else time.perf_counter
    taken: dict[str, float] = {}
    found: dict[str, dict[int, str]] = {}
    for _ in range(options.repeat):
        for name, work in ways(model, tokenizer, prompts, config).items():
            started = clock()
            found[name] = work()
            taken[name] = min(clock() - started, taken.get(name, float("inf")))
    expected = found["one prompt per batch"]
    for name, seconds in taken.items():
        differ = sum(found[name].get(i) != expected[i] for i in prompts)
        print(f"{name:<22} {len(prompts) / seconds:6.2f} answers/s  {differ} of {len(prompts)} differ")


if __name__ == "__main__":
    main()
