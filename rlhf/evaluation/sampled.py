"""Answers sampled from a policy at temperature 1, and log-probabilities of given answers: for its KL divergence.

KL(policy || reference) is the mean of log policy(y) - log reference(y) over answers y that the policy samples from its
own distribution, not its greedy answers. An answer ends with its EOS token, whose probability counts, or at
max_new_tokens: what is estimated is the divergence of the first max_new_tokens tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

from rlhf.config.stage_config import EvaluateConfig
from rlhf.inference.sampling import Sampling, draw_tokens
from rlhf.inference.score import MAX_LOGIT_BYTES, pad_right, token_batches, token_logps


def sample(model, tokenizer, prompts: dict[int, list[int]], config: EvaluateConfig) -> list[dict[str, Any]]:
    """One answer to each prompt of a batch, sampled from the model's own distribution: temperature 1, nothing else.

    Args:
        prompts: token ids by row; the row and the seed decide what is drawn.

    Returns:
        {"ids": with the EOS token if it ended, "cut": whether it did not}, one per prompt
    """
    ending = tokenizer.eos_token_id
    drawn = Sampling(max_new_tokens=config.max_new_tokens, seed=config.seed)
    with _plain_generation(model):
        rows = draw_tokens(
            model,
            tokenizer,
            list(prompts.values()),
            [(row, 0) for row in prompts],
            drawn,
            config.max_new_tokens,
            [ending],
        )
    found = []
    for ids in rows:
        ends = ending in ids
        found.append({"ids": ids[: ids.index(ending) + 1] if ends else ids, "cut": not ends})
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
            start_of = len(prompt)
            logps = token_logps(z[start_of - first : len(ids) - first], tokens[start_of : len(ids)])
            sums.append(float(logps.double().sum()))
    return sums
