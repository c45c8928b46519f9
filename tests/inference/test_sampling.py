"""Sampled answers: exact samples, each with random numbers of its own, whatever the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rlhf.config.stage_config import EvaluateConfig
from rlhf.inference.generate import encode_prompt, generate
from rlhf.inference.sampling import DrawnTokens, Sampling, answer, pick, read, stops_of, uniforms
from rlhf.models.tokenizer import fit_tokenizer, load_tokenizer

PROMPTS = [
    "Hi",
    "Name a river.",
    "What is the capital of the largest country of the south?",
    "Why?",
    "Who are you",
    "One more",
]


@pytest.fixture(scope="module")
def policy(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    return fit_tokenizer(AutoModelForCausalLM.from_pretrained(tiny_llama), tokenizer).eval(), tokenizer


def ids(tokenizer):
    return [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in PROMPTS]


# --- one token -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, token", [(0.0, 0), (0.49, 0), (0.51, 1), (0.69, 1), (0.71, 2), (0.9999999999, 2)])
def test_a_token_is_picked_where_the_cumulated_probability_exceeds_the_number(number, token):
    scores = torch.log(torch.tensor([[0.5, 0.2, 0.3]]))
    assert pick(scores, torch.tensor([[number]], dtype=torch.float64)).tolist() == [[token]]


@given(st.integers(1, 40), st.integers(0, 10_000))
def test_a_grid_of_numbers_picks_each_token_as_often_as_its_probability_says(size, seed):
    scores = torch.from_numpy(np.random.default_rng(seed).normal(size=size) * 3).float()
    grid = torch.arange(1000, dtype=torch.float64)[:, None] / 1000
    counts = torch.bincount(pick(scores.expand(1000, -1), grid)[:, 0], minlength=size)
    assert torch.all((counts - 1000 * torch.softmax(scores.double(), 0)).abs() <= 1)


@given(st.integers(0, 10_000))
def test_a_token_without_probability_is_never_picked(seed):
    draw = np.random.default_rng(seed)
    scores = torch.from_numpy(draw.normal(size=30)).float()
    scores[torch.from_numpy(draw.random(30) < 0.6)] = -torch.inf
    scores[int(draw.integers(30))] = 0.0
    numbers = torch.from_numpy(np.append(draw.random(50), [0.0, np.nextafter(1, 0)]))[:, None]
    assert torch.isfinite(scores[pick(scores.expand(52, -1), numbers)[:, 0]]).all()


def test_the_streams_give_the_models_distribution():
    """4,000 first tokens: each frequency within 4.5 standard deviations of its probability."""
    scores = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03])).expand(4000, -1)
    numbers = np.stack([uniforms(7, row, sample, 1) for row in range(1000) for sample in range(4)])
    kept = DrawnTokens(torch.from_numpy(numbers), width=3)(torch.zeros((4000, 3), dtype=torch.long), scores)
    assert torch.all(torch.isfinite(kept).sum(1) == 1)
    share = torch.bincount(kept.argmax(1), minlength=5) / 4000
    probability = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03])
    assert torch.all((share - probability).abs() < 4.5 * (probability * (1 - probability) / 4000).sqrt())


def test_every_answer_has_numbers_of_its_own_and_a_longer_one_the_same_first_ones():
    assert uniforms(1, 2, 3, 50)[:20].tolist() == uniforms(1, 2, 3, 20).tolist()
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0), (0, 256, 0), (0, 2**40, 0)]
    assert len({uniforms(*key, 1)[0] for key in keys}) == len(keys)


def test_the_numbers_are_those_of_every_version():
    """Answers of a year ago can be drawn again: NumPy promises that Philox and SeedSequence don't change."""
    assert uniforms(42, 7, 1, 3).tolist() == [0.9486846570140349, 0.7271622325705577, 0.2815141363659561]


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=20, seed=5), Sampling(0.7, 0.9, 20, 5)], ids=["all", "top_p"]
)
def test_an_answer_does_not_depend_on_its_batch(policy, sampling):
    model, tokenizer = policy
    prompts, draws = ids(tokenizer), [(row, row % 2) for row in range(len(PROMPTS))]
    together = answer(model, tokenizer, prompts, draws, sampling, 20)
    alone = [answer(model, tokenizer, [p], [d], sampling, 20)[0] for p, d in zip(prompts, draws, strict=True)]
    turned = answer(model, tokenizer, prompts[::-1], draws[::-1], sampling, 20)[::-1]
    assert together == alone == turned and len({one.text for one in together}) == len(PROMPTS)


def test_samples_of_one_prompt_differ_and_a_seed_repeats_them(policy):
    model, tokenizer = policy

    def draw(seed):
        return answer(model, tokenizer, ids(tokenizer)[:1] * 4, [(0, n) for n in range(4)], Sampling(seed=seed), 12)

    assert len({one.text for one in draw(1)}) == 4 and draw(1) == draw(1) != draw(2)


def test_temperature_0_is_greedy_decoding(policy):
    model, tokenizer = policy
    greedy = generate(model, tokenizer, ids(tokenizer), EvaluateConfig(max_new_tokens=9))
    found = answer(model, tokenizer, ids(tokenizer), [(0, 0)] * 6, Sampling(temperature=0), 9)
    assert [(one.text, not one.finished) for one in found] == greedy


def test_a_low_temperature_comes_close_to_greedy(policy):
    model, tokenizer = policy
    cold = answer(model, tokenizer, ids(tokenizer), [(0, n) for n in range(6)], Sampling(temperature=1e-6), 9)
    assert cold == answer(model, tokenizer, ids(tokenizer), [(0, 0)] * 6, Sampling(temperature=0), 9)


def test_an_answer_ends_at_any_of_the_models_stops(policy):
    model, tokenizer = policy
    assert stops_of(model, tokenizer) == [tokenizer.eos_token_id]
    before = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [5, tokenizer.eos_token_id]
        assert stops_of(model, tokenizer) == [tokenizer.eos_token_id, 5]
    finally:
        model.generation_config.eos_token_id = before
    pad = tokenizer.pad_token_id
    assert (read(tokenizer, [9, 8, 5, pad, pad], [2, 5]).tokens, read(tokenizer, [9, 8, 5, pad], [2, 5]).finished) == (
        3,
        True,
    )
    assert (read(tokenizer, [9, 8, 7], [2, 5]).tokens, read(tokenizer, [9, 8, 7], [2, 5]).finished) == (3, False)
