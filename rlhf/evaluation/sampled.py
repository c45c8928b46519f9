"""Answers sampled from a policy at temperature 1, and log-probabilities of given answers: for its KL divergence.

KL(policy || reference) is the mean of log policy(y) - log reference(y) over answers y that the policy samples from its
own distribution, not its greedy answers. An answer ends with its EOS token, whose probability counts, or at
max_new_tokens: what is estimated is the divergence of the first max_new_tokens tokens.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhf.config.stage_config import EvaluateConfig
from rlhf.inference.score import MAX_LOGIT_BYTES, pad_right, token_batches, token_logps


class GumbelNoise(LogitsProcessor):
    """Makes greedy decoding sample from the softmax: the largest of logits plus Gumbel noise is distributed so.

    Every row has noise of its own seed, drawn on the CPU, so that its answer does not depend on the other rows of the batch,
    on the number of processes or on the device (as far as the logits don't).

    Source: Gumbel, Statistical Theory of Extreme Values, 1954.
    """

    def __init__(self, seeds: list[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        noise = torch.empty(scores.shape)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.clamp_min(torch.finfo(torch.float32).tiny).log().to(scores.device)


def seed_of(seed: int, row: int) -> int:
    """The seed of a row's noise."""
    return int.from_bytes(hashlib.sha256(f"sample {seed} {row}".encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def sample(model, tokenizer, prompts: dict[int, list[int]], config: EvaluateConfig) -> list[dict[str, Any]]:
    """One answer to each prompt of a batch, sampled from the model's own distribution: temperature 1, nothing else.

    Args:
        prompts: token ids by row; the row decides the noise.

    Returns:
        {"ids": with the EOS token if it ended, "cut": whether it did not}, one per prompt
    """
    padded = tokenizer.pad({"input_ids": list(prompts.values())}, padding_side="left", return_tensors="pt")
    padded = {k: padded[k].to(next(model.parameters()).device) for k in ("input_ids", "attention_mask")}
    noise = GumbelNoise([seed_of(config.seed, row) for row in prompts])
    with _plain_generation(model):
        out = model.generate(
            **padded, max_new_tokens=config.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, logits_processor=LogitsProcessorList([noise]),
        )  # fmt: skip
    found = []
    for ids in out[:, padded["input_ids"].shape[1] :].tolist():
        ends = tokenizer.eos_token_id in ids
        found.append({"ids": ids[: ids.index(tokenizer.eos_token_id) + 1] if ends else ids, "cut": not ends})
    return found


class _plain_generation:
    """A model without the generation settings of its checkpoint: a repetition penalty would change its distribution."""

    def __init__(self, model):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.models = list({id(m): m for m in (model, inner) if "generation_config" in vars(m)}.values())

    def __enter__(self):
        self.kept = [model.generation_config for model in self.models]
        for model in self.models:
            model.generation_config = GenerationConfig()

    def __exit__(self, *error) -> None:
        for model, kept in zip(self.models, self.kept, strict=True):
            model.generation_config = kept


def answer_batches(prompts: dict[int, list[int]], answers: dict[int, list[int]], vocabulary: int) -> list[list[int]]:
    """Batches of rows for `answer_logps`."""
    padded = {i: len(prompts[i]) + len(answers[i]) for i in answers}
    return token_batches(padded, {i: len(answers[i]) for i in answers}, vocabulary)


@torch.no_grad()
def answer_logps(model, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
    """Log-probability of each answer after its prompt, summed over the answer's tokens (nats)."""
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    longest, first = max(map(len, rows)), min(len(prompt) for prompt in prompts)
    keep = longest - first + 1  # position t predicts token t + 1
    at_once = max(1, MAX_LOGIT_BYTES // (4 * keep * model.get_output_embeddings().weight.shape[0]))
    device, sums = next(model.parameters()).device, []
    for start in range(0, len(rows), at_once):
        input_ids, mask = pad_right(rows[start : start + at_once], longest, 0, device)
        logits = model(input_ids=input_ids, attention_mask=mask, logits_to_keep=keep, use_cache=False).logits[:, :-1]
        for z, tokens, prompt, ids in zip(logits, input_ids, prompts[start:], rows[start:], strict=False):
            begin = len(prompt)
            logps = token_logps(z[begin - first : len(ids) - first], tokens[begin : len(ids)])
            sums.append(float(logps.double().sum()))
    return sums
