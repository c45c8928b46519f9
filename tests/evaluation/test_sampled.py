"""Answers sampled at temperature 1: from the model's own distribution, and not from another batch's."""

import copy
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf.config.stage_config import EvaluateConfig
from rlhf.evaluation.paired import divergence
from rlhf.evaluation.sampled import answer_batches, answer_logps, sample
from rlhf.inference.score import pack


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


def config(**values):
    return EvaluateConfig(**{"max_new_tokens": 6, "seed": 1, **values})


PROMPT = [5, 17, 101, 33]


def test_an_answer_depends_on_its_row_and_seed_alone(model, tokenizer):
    prompts = {row: PROMPT + [40 + row] * (row % 3) for row in range(6)}
    together = sample(model, tokenizer, prompts, config())
    alone = [sample(model, tokenizer, {row: ids}, config())[0] for row, ids in prompts.items()]
    assert together == alone and len({tuple(one["ids"]) for one in together}) > 3
    assert sample(model, tokenizer, prompts, config(seed=2)) != together


def test_an_answer_ends_with_its_eos_or_is_cut(model, tokenizer):
    often = Counter(
        token for one in sample(model, tokenizer, {row: PROMPT for row in range(50)}, config()) for token in one["ids"]
    )
    ending = copy.deepcopy(tokenizer)
    ending.eos_token = tokenizer.convert_ids_to_tokens(often.most_common(1)[0][0])
    found = sample(model, ending, {row: PROMPT for row in range(100)}, config(max_new_tokens=8))
    for one in found:
        assert one["cut"] == (ending.eos_token_id not in one["ids"]) and ending.eos_token_id not in one["ids"][:-1]
        assert one["cut"] is False or len(one["ids"]) == 8
    assert {one["cut"] for one in found} == {True, False}


def test_generation_settings_of_the_checkpoint_are_left_out_and_kept(model, tokenizer):
    prompts = {row: PROMPT for row in range(4)}
    plain = sample(model, tokenizer, prompts, config())
    kept = model.generation_config
    try:
        model.generation_config = GenerationConfig(repetition_penalty=5.0, suppress_tokens=list(range(3, 400)))
        assert sample(model, tokenizer, prompts, config()) == plain
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.generation_config = kept


@pytest.mark.parametrize("packed", [False, True])
def test_log_probabilities_are_those_of_each_answer_alone(packed, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    prompts, answers = [[5, 6, 7], [8, 9, 10, 11, 12], [3]], [[20, 21], [22], [23, 24, 2]]
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected.append(sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)))
    if packed:
        assert pack(model, 100)
    assert answer_logps(model, prompts, answers) == pytest.approx(expected, abs=1e-4)


def test_batches_hold_every_answer_once():
    prompts = {i: [1] * (i % 7 + 1) for i in range(50)}
    batches = answer_batches(prompts, {i: [2] * (i % 5 + 1) for i in prompts}, 600)
    assert sorted(i for batch in batches for i in batch) == list(range(50))


def test_the_estimate_is_the_divergence(model, tokenizer, tiny_llama):
    """Of one token: against the sum over the vocabulary, p log(p / q), from 600 samples, within 4 standard errors."""
    other = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        p, q = (m(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1) for m in (model, other))
    exact = float((p.exp() * (p - q)).sum())
    ones = sample(model, tokenizer, {row: PROMPT for row in range(600)}, config(max_new_tokens=1))
    answers = [one["ids"] for one in ones]
    logps, reference = (answer_logps(m, [PROMPT] * len(answers), answers) for m in (model, other))
    found = divergence([a - b for a, b in zip(logps, reference, strict=True)], [1] * len(answers))
    assert exact > 0.05 and abs(found["sum"] - exact) < 4 * found["sum_se"]
