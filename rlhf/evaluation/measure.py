"""Measure the models of an evaluation: log-probabilities and scores of the pairs, answers and their scores.

Imports torch only in functions, so that `rlhf evaluate --check` starts at once.
"""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass
from typing import Any

from rlhf.config.stage_config import EvaluateConfig
from rlhf.evaluation.partial import Measured
from rlhf.runs.results import POLICIES


@dataclass
class Subject:
    """A model to measure, before its weights load: the rows as its tokenizer has them.

    Attributes:
        short: `base`, `sft`, `dpo` or `reward`.
        pairs: the pairs, cut to max_length (a reward model's: both answers whole).
        prompts: the prompts that it answers, by row; a reward model's is empty.
    """

    short: str
    name: str
    tokenizer: Any
    pairs: list[Any]
    prompts: dict[int, list[int]]


def prepare(rows: list[dict], names: dict[str, str], config: EvaluateConfig) -> list[Subject]:
    """Tokenise the rows for every model, the reward model last.

    Raises:
        UserError: a prompt leaves no room for an answer.
    """
    from rlhf.inference.generate import encode_prompt
    from rlhf.inference.score import SIDES, encode_answer, encode_pair
    from rlhf.models.tokenizer import load_tokenizer

    subjects = []
    for key in (*(f"{short}_model" for short in POLICIES), "reward_model"):
        if key not in names:
            continue
        short = key.removesuffix("_model")
        tokenizer = load_tokenizer(names[key], encoder=short == "reward")
        if short == "reward":
            pairs: list[Any] = [
                [encode_answer(tokenizer, row["prompt"], row[side], row) for side in SIDES] for row in rows
            ]
            prompts = {}
        else:
            pairs = [encode_pair(tokenizer, row, config.max_length) for row in rows]
            asked = config.num_shown if short == "base" else len(rows)
            prompts = {i: encode_prompt(tokenizer, row["prompt"], row) for i, row in enumerate(rows[:asked])}
        subjects.append(Subject(short, names[key], tokenizer, pairs, prompts))
    return subjects


def measure(
    rows: list[dict], subjects: list[Subject], config: EvaluateConfig, measured: Measured
) -> tuple[list[dict], list[dict]]:
    """Score the pairs and answer the prompts with every model, one model in memory at a time.

    Returns:
        (pairs, answers), in the order of `rows`: log-probabilities and rewards of both answers per pair, and each
        policy's own answer to each prompt with its reward.

    Raises:
        Stopped: a stop was requested.
    """
    from transformers import set_seed

    set_seed(config.seed)
    pairs: list[dict] = [
        {"row": i, **{key: row[key] for key in ("prompt", "subset", "tools", "chat_template_kwargs") if key in row}}
        for i, row in enumerate(rows)
    ]
    answers: list[dict] = [dict(pair) for pair in pairs]
    for subject in subjects:
        if subject.short == "reward":
            measure_rewards(subject, config, measured, pairs, answers)
        else:
            measure_policy(subject, config, measured, pairs, answers)
        free_memory()  # the model was a local of these
    return pairs, answers


def measure_policy(subject: Subject, config: EvaluateConfig, measured: Measured, pairs: list, answers: list) -> None:
    """Add a policy's log-probabilities to `pairs` and its answers to `answers`."""
    from rlhf.inference.generate import generate, prompt_batches
    from rlhf.inference.score import pair_batches, pair_logps

    short, tokenizer, prompts = subject.short, subject.tokenizer, subject.prompts
    model = functools.cache(lambda: _load(subject.name, config, reward=False))  # not loaded if nothing is missing
    logps = measured.compute(
        f"{short}: pairs",
        pair_batches(subject.pairs, len(tokenizer)),
        lambda batch: pair_logps(model(), [subject.pairs[i] for i in batch]),
    )
    texts = measured.compute(
        f"{short}: answers",
        prompt_batches(prompts, config.batch_size),
        lambda batch: generate(model(), tokenizer, [prompts[i] for i in batch], config),
    )
    for i, value in logps.items():
        pairs[i][short] = value
    for i, (text, is_cut) in texts.items():
        answers[i] |= {short: text, f"{short}_cut": is_cut}


def measure_rewards(subject: Subject, config: EvaluateConfig, measured: Measured, pairs: list, answers: list) -> None:
    """Add the reward model's scores to `pairs` and to `answers`."""
    from rlhf.inference.score import SIDES, encode_answer, scores, token_batches

    tokenizer = subject.tokenizer
    model = functools.cache(lambda: _load(subject.name, config, reward=True))

    def score_pairs(batch: list[int]) -> list[dict[str, float]]:
        found = scores(model(), tokenizer, [subject.pairs[i][side] for side in range(2) for i in batch])
        longer = [len(subject.pairs[i][0]) - len(subject.pairs[i][1]) for i in batch]  # the prompt is the same
        return [
            dict(zip(SIDES, found[at :: len(batch)], strict=True)) | {"longer": longer[at]} for at in range(len(batch))
        ]

    padded = {i: 2 * max(map(len, both)) for i, both in enumerate(subject.pairs)}
    for i, value in measured.compute("reward: pairs", token_batches(padded), score_pairs).items():
        pairs[i]["reward"] = value
    for short in POLICIES:
        asked = {
            i: encode_answer(tokenizer, answer["prompt"], answer[short], answer)
            for i, answer in enumerate(answers) if answer.get(short)
        }  # fmt: skip
        score = lambda batch, asked=asked: scores(model(), tokenizer, [asked[i] for i in batch])  # noqa: E731
        batches = token_batches({i: len(ids) for i, ids in asked.items()})
        for i, value in measured.compute(f"reward: {short}'s answers", batches, score).items():
            answers[i][f"{short}_reward"] = value


def _load(name: str, config: EvaluateConfig, reward: bool):
    """A finished model on this process's device or devices, packed if it can be."""
    from accelerate import PartialState

    from rlhf.inference.score import pack
    from rlhf.models.inference import load_finished

    device = PartialState().device
    model, _ = load_finished(
        name, reward=reward, dtype=_dtype(config, device), device=device, load_in_4bit=config.load_in_4bit
    )
    pack(model, config.max_length)
    return model


def check_room(names: dict[str, str], config: EvaluateConfig) -> None:
    """Raise UserError if one of the models does not fit on this process's GPUs: before the first one is measured."""
    from accelerate import PartialState

    from rlhf.models.inference import check_bitsandbytes, placement

    if config.load_in_4bit:
        check_bitsandbytes()
    device = PartialState().device
    for name in names.values():
        placement(name, _dtype(config, device), device, config.load_in_4bit)


def _dtype(config: EvaluateConfig, device) -> str | None:
    return config.dtype or (None if device.type == "cuda" else "float32")


def free_memory() -> None:
    """Give the memory of dropped models back: on a GPU to the driver, and never by way of host memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
