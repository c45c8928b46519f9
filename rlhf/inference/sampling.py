"""Answers sampled with a random stream of their own: neither the batch nor the number of processes changes one.

transformers draws all rows of a batch from one generator, so an answer depends on its neighbours. Here each answer has its own
uniform numbers, one per token, of a counter-based generator (NumPy's Philox) whose key is (seed, row, sample). A token is
the one at which the cumulated probability, in the order of the vocabulary and in float64, exceeds its number: an exact
sample. That needs no state and is the same on CPUs and GPUs, as far as the logits are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from rlhf.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: 0 is greedy decoding, without any random number.
        top_p: only the most likely tokens with this total probability.
        max_new_tokens: of an answer; a longer one is cut there.
        seed: of all answers.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        tokens: how many were generated, the end of sequence among them.
        finished: it ended by itself, and was not cut.
    """

    text: str
    tokens: int
    finished: bool


def uniforms(seed: int, row: int, sample: int, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1): the random numbers of one answer, token by token; a longer answer has the same first ones."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, row, sample)))).random(count)


class DrawnTokens(LogitsProcessor):
    """Leaves each row of a batch the one token that its uniform number picks, for greedy decoding to take.

    Args:
        uniforms_RT: a row per sequence, a number per new token.
        width: tokens of the padded prompts.
    """

    def __init__(self, uniforms_RT: torch.Tensor, width: int):
        self.uniforms_RT, self.width = uniforms_RT, width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = input_ids.shape[1] - self.width
        token_R1 = pick(scores, self.uniforms_RT[:, step : step + 1])
        return torch.full_like(scores, -torch.inf).scatter_(-1, token_R1, 0.0)  # type: ignore[return-value]


def pick(scores_RV: torch.Tensor, uniform_R1: torch.Tensor) -> torch.Tensor:
    """(R, 1) int64: the first token at which the cumulated softmax exceeds the uniform number.

    Example: probabilities (0.5, 0.2, 0.3) and 0.6 -> token 1; 0.7 or more -> token 2.
    """
    below_RV = torch.softmax(scores_RV.double(), -1).cumsum(-1)
    token_R1 = (below_RV <= uniform_R1 * below_RV[:, -1:]).sum(-1, keepdim=True)
    return token_R1.clamp_(max=scores_RV.shape[-1] - 1)


def stops_of(model, tokenizer) -> list[int]:
    """The tokens that end an answer: the tokenizer's end of sequence, and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(token for token in (tokenizer.eos_token_id, *found) if token is not None))


def room_of(model) -> int | None:
    """The positions that a model has for prompt and answer; None if it says nothing of it."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def answer(
    model, tokenizer, prompts: list[list[int]], draws: list[tuple[int, int]], sampling: Sampling, limit: int
) -> list[Answer]:
    """Answers to one batch of prompts; see `draw_tokens`."""
    stops = stops_of(model, tokenizer)
    return [
        read(tokenizer, row, stops) for row in draw_tokens(model, tokenizer, prompts, draws, sampling, limit, stops)
    ]


@torch.no_grad()
def draw_tokens(
    model,
    tokenizer,
    prompts: list[list[int]],
    draws: list[tuple[int, int]],
    sampling: Sampling,
    limit: int,
    stops: list[int],
) -> list[list[int]]:
    """The new token ids of one batch of prompts; after one of `stops` comes padding.

    In fp32 an answer depends on its batch only where a uniform number lies within rounding (about 1e-6) of the border between
    two tokens. In bf16 the logits themselves depend on the batch's padding in the third digit, and so do some answers: each of
    them is a sample of the model all the same.

    Args:
        prompts: token ids (`encode_prompt`).
        draws: (row, sample) of each: which random numbers it has.
        limit: of new tokens, for all of this batch.

    Raises:
        UserError: out of GPU memory.
    """
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    device = next(model.parameters()).device
    input_ids, mask = padded["input_ids"].to(device), padded["attention_mask"].to(device)
    try:
        out = model.generate(
            input_ids=input_ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, temperature=None, top_p=None,
            top_k=None, pad_token_id=tokenizer.pad_token_id, eos_token_id=stops,
            logits_processor=_processors(sampling, draws, input_ids.shape[1], limit, device),
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of GPU memory with {len(prompts)} answers at a time; lower --batch_size: what has been computed is kept"
        ) from None
    return out[:, input_ids.shape[1] :].tolist()


def _processors(sampling: Sampling, draws: list[tuple[int, int]], width: int, limit: int, device: Any) -> Any:
    found = LogitsProcessorList()
    if sampling.temperature == 0:
        return found
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    numbers = np.stack([uniforms(sampling.seed, row, sample, limit) for row, sample in draws])
    found.append(DrawnTokens(torch.from_numpy(numbers).to(device), width))
    return found


def read(tokenizer, tokens: list[int], stops: list[int]) -> Answer:
    """The answer of generated token ids, which padding may follow."""
    end = next((n for n, token in enumerate(tokens) if token in stops), None)
    own = tokens if end is None else tokens[: end + 1]
    return Answer(tokenizer.decode(own, skip_special_tokens=True).strip(), len(own), end is not None)
