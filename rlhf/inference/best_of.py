"""Best-of-n: of several sampled answers the one to which a reward model gives the highest score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf.inference.generate import encode_prompt
from rlhf.inference.sampling import Answer, Sampling, answer
from rlhf.inference.score import encode_answer, scores, token_batches

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Best:
    """The best answer to a prompt.

    Attributes:
        answer: with its text, and whether it ended by itself.
        score: the reward model's.
        scores: of all answers, in the order in which they were drawn.
    """

    answer: Answer
    score: float
    scores: list[float]


def best_of(
    policy: tuple[Any, Any], judge: tuple[Any, Any], prompts: list[Messages], n: int, sampling: Sampling,
    rows: list[dict[str, Any]] | None = None, first_row: int = 0,
) -> list[Best]:  # fmt: skip
    """The best of n answers to each prompt of one batch.

    The first of several with the highest score. What is drawn depends on (seed, row, sample) alone, so the best of 8 is at
    least as good as the best of 4 with the same seed.

    Args:
        policy, judge: (model, tokenizer) of a finished policy and of a finished reward model.
        prompts: conversations up to where the answer starts; n times as many are generated at a time.
        sampling: with a temperature above 0, or all answers are the same.
        rows: the canonical rows that the prompts are of, for their tools and the chat template's variables.
        first_row: the number of the first prompt: the others follow.
    """
    (model, tokenizer), (reward_model, reward_tokenizer) = policy, judge
    rows = rows or [{} for _ in prompts]
    ids = [encode_prompt(tokenizer, prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
    asked = [(at, sample) for at in range(len(prompts)) for sample in range(n)]
    draws = [(first_row + at, sample) for at, sample in asked]
    answers = answer(model, tokenizer, [ids[at] for at, _ in asked], draws, sampling, sampling.max_new_tokens)
    read = [
        encode_answer(reward_tokenizer, prompts[at], one.text, rows[at])
        for (at, _), one in zip(asked, answers, strict=True)
    ]
    given: dict[int, float] = {}
    for batch in token_batches({i: len(tokens) for i, tokens in enumerate(read)}):
        given |= dict(zip(batch, scores(reward_model, reward_tokenizer, [read[i] for i in batch]), strict=True))
    found = []
    for at in range(len(prompts)):
        own = [given[at * n + sample] for sample in range(n)]
        best = max(range(n), key=lambda sample: own[sample])
        found.append(Best(answers[at * n + best], own[best], own))
    return found
