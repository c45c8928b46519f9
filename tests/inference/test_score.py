"""Scoring many rows per forward pass against one row at a time, by transformers alone."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.errors import UserError
from rlhf.inference import score
from rlhf.inference.score import Pair, encode_pair, pack, pair_batches, pair_logps, scores, token_batches
from rlhf.models.tokenizer import fit_tokenizer, load_tokenizer

MAX_LENGTH = 250  # cuts some of the answers


@pytest.fixture(scope="module")
def rows(few_pairs):
    return [json.loads(line) for line in Path(few_pairs).read_text().splitlines()]


def policy(folder, packed):
    tokenizer = load_tokenizer(folder)
    model = fit_tokenizer(AutoModelForCausalLM.from_pretrained(folder), tokenizer).eval()
    assert not packed or pack(model)
    return model, tokenizer


def logp(model, prompt_ids, answer_ids):
    """One row, no padding, all logits."""
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([prompt_ids + answer_ids])).logits[0].double().log_softmax(-1)
    return sum(float(logps[len(prompt_ids) + j - 1, token]) for j, token in enumerate(answer_ids))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("folder", ["tiny_llama", "tiny_gpt2"])
def test_a_batch_of_pairs_is_each_answer_alone(folder, packed, rows, request):
    folder = request.getfixturevalue(folder)
    plain, tokenizer = policy(folder, packed=False)
    pairs = [encode_pair(tokenizer, row, MAX_LENGTH) for row in rows]
    assert (
        any(len(p.prompt_ids) + len(p.chosen_ids) == MAX_LENGTH for p in pairs)
        and len({p.num_padded for p in pairs}) > 3
    )
    found = pair_logps(policy(folder, packed)[0], pairs)
    for pair, value in zip(pairs, found, strict=True):
        for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            assert value[side] == pytest.approx(logp(plain, pair.prompt_ids, ids), rel=1e-5)
            assert value[f"{side}_tokens"] == len(ids)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_any_split_into_batches_gives_the_same(packed, rows, tiny_llama):
    model, tokenizer = policy(tiny_llama, packed)
    pairs = [encode_pair(tokenizer, row, MAX_LENGTH) for row in rows]
    together = pair_logps(model, pairs)
    halves = pair_logps(model, pairs[:5]) + pair_logps(model, pairs[5:])
    for one, other in zip(together, halves, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_packed_batch_computes_each_prompt_once(rows, tiny_llama):
    model, tokenizer = policy(tiny_llama, packed=True)
    pairs = [encode_pair(tokenizer, row, MAX_LENGTH) for row in rows]
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(args[0].numel()))
    scored = []
    model.lm_head.register_forward_hook(lambda _m, args, _o: scored.append(args[0].shape[1]))
    pair_logps(model, pairs)
    assert seen == [sum(len(p.prompt_ids) + p.num_scored for p in pairs)] and scored == [
        sum(p.num_scored for p in pairs)
    ]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_without_a_prompt_the_first_token_is_not_scored(packed, tiny_llama):
    model, _ = policy(tiny_llama, packed)
    plain, _ = policy(tiny_llama, packed=False)
    found = pair_logps(model, [Pair([], [5, 6, 7], [8]), Pair([9], [10], [11, 12])])
    expected = [(logp(plain, [5], [6, 7]), 2), (0.0, 0), (logp(plain, [9], [10]), 1), (logp(plain, [9], [11, 12]), 2)]
    told = [(value[side], value[f"{side}_tokens"]) for value in found for side in ("chosen", "rejected")]
    assert [n for _, n in told] == [n for _, n in expected]
    assert [x for x, _ in told] == pytest.approx([x for x, _ in expected], rel=1e-5)


def test_padded_logits_are_computed_in_parts_that_fit(rows, tiny_llama, monkeypatch):
    model, tokenizer = policy(tiny_llama, packed=False)
    pairs = [encode_pair(tokenizer, row, MAX_LENGTH) for row in rows[:3]]
    whole = pair_logps(model, pairs)
    passes = []
    model.lm_head.register_forward_hook(lambda _m, args, _o: passes.append(args[0].shape[0]))
    kept = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs) - min(
        len(p.prompt_ids) for p in pairs) + 1  # fmt: skip
    monkeypatch.setattr(score, "MAX_LOGIT_BYTES", 2 * 4 * kept * 600)  # two rows of a vocabulary of 600, in fp32
    for one, other in zip(pair_logps(model, pairs), whole, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert passes == [2, 2, 2]


def test_adapters_are_scored_unmerged(rows, tiny_llama):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, tokenizer = policy(tiny_llama, packed=False)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    pairs = [encode_pair(tokenizer, row, MAX_LENGTH) for row in rows[:4]]
    expected = [logp(adapted, p.prompt_ids, p.chosen_ids) for p in pairs]
    assert pack(adapted)
    assert [value["chosen"] for value in pair_logps(adapted, pairs)] == pytest.approx(expected, rel=1e-5)


def test_a_prompt_that_leaves_no_room(rows, tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    length = len(encode_pair(tokenizer, rows[0], 1000).prompt_ids)
    assert len(encode_pair(tokenizer, rows[0], length + 1).chosen_ids) == 1
    with pytest.raises(
        UserError, match=f"a held-out prompt has {length} tokens, which leaves no room .* max_length={length}"
    ):
        encode_pair(tokenizer, rows[0], length)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_scores_of_a_batch_are_those_of_each_row(packed, tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    fit_tokenizer(model, tokenizer).eval()
    texts = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 20], [12], [5, 6]]
    with torch.no_grad():
        alone = [float(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in texts]
    assert not packed or pack(model)
    assert scores(model, tokenizer, texts) == pytest.approx(alone, abs=1e-5)
    assert max(alone) - min(alone) > 1e-2


def test_scores_of_an_encoder(tiny_distilbert):
    tokenizer = load_tokenizer(tiny_distilbert, encoder=True)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_distilbert, num_labels=1, attn_implementation="eager"
    )
    model.classifier.weight.data.mul_(1000)
    assert not pack(model.eval())
    texts = [[2, 6, 7, 8, 9, 10, 3], [2, 6, 3], [2, 20, 21, 22, 3]]
    with torch.no_grad():
        alone = [float(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in texts]
    assert scores(model, tokenizer, texts) == pytest.approx(alone, abs=1e-5)
    assert max(alone) - min(alone) > 1e-3


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_by_hand(monkeypatch):
    assert token_batches({0: 1000, 1: 3000, 2: 1200, 3: 9000}) == [[3], [1], [2, 0]]  # 2 * 3000 and 9000 exceed 4096
    assert token_batches({0: 10, 1: 10, 2: 10}) == [[0, 1, 2]] and token_batches({}) == []
    monkeypatch.setattr(score, "MAX_LOGIT_BYTES", 4 * 600 * 7)  # 7 tokens of a vocabulary of 600
    assert token_batches({0: 10, 1: 10, 2: 10}, {0: 4, 1: 3, 2: 1}, 600) == [[0, 1], [2]]
    assert token_batches({0: 10, 1: 10}, {0: 99, 1: 99}, 600) == [[0], [1]]


def test_pair_batches_hold_every_pair_once_within_the_budget(rows, tiny_llama, monkeypatch):
    monkeypatch.setattr(score, "MAX_TOKENS", 1000)
    tokenizer = load_tokenizer(tiny_llama)
    pairs = [encode_pair(tokenizer, row, MAX_LENGTH) for row in rows]
    batches = pair_batches(pairs, len(tokenizer))
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows))) and 1 < len(batches) < len(rows)
    assert all(len(batch) * max(pairs[i].num_padded for i in batch) <= 1000 for batch in batches)
