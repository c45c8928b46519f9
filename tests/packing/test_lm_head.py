"""The LM head on a CPU against torch's log_softmax and against TRL's own function."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction
from trl.trainer import utils

from rlhf.packing import lm_head

ALL = ("log_probs", *OPTIONAL_OUTPUTS)
SIDES = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # in the order of TRL's results


def case(tokens=7, hidden=12, vocabulary=700, bias=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, generator=draw)
    weight = torch.randn(vocabulary, hidden, generator=draw)
    b = torch.randn(vocabulary, generator=draw) if bias else None
    return h, weight, b, torch.randint(0, vocabulary, (tokens,), generator=draw)


def test_by_hand():
    """Logits (0, ln 2, ln 5): probabilities 1/8, 2/8, 5/8."""
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    found = lm_head.log_prob_statistics(
        torch.tensor([[1.0]]), weight, None, torch.tensor([1]), 1.0, True, log_sum_sq=True
    )
    assert found["log_probs"].item() == pytest.approx(math.log(2 / 8))
    entropy = -(math.log(1 / 8) / 8 + 2 * math.log(2 / 8) / 8 + 5 * math.log(5 / 8) / 8)
    assert found["entropy"].item() == pytest.approx(entropy)
    assert found["mean_logits"].item() == pytest.approx(math.log(10) / 3)
    assert found["log_sum_sq_probs"].item() == pytest.approx(math.log((1 + 4 + 25) / 64))
    assert not found["is_top1"].item()
    # d log p_1 / dh = w_1 - sum p w = ln 2 - (2 ln 2 + 5 ln 5) / 8
    assert found["jacobian"].item() == pytest.approx(math.log(2) - (2 * math.log(2) + 5 * math.log(5)) / 8, rel=1e-5)


@pytest.mark.parametrize("trained", ["hidden", "head", "both"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("tokens", [1, 7, 3 * 512 + 5])
def test_equals_trl(trained, bias, scale, tokens, monkeypatch):
    monkeypatch.setattr(lm_head, "MAX_TOKENS", 512)
    monkeypatch.setattr(lm_head, "TILE_BYTES", 1 << 19)
    results = []
    for function in (ChunkedLogProbFunction, lm_head.LogProbs):
        h, weight, b, targets = case(tokens=tokens, bias=bias)
        leaves = [h] * (trained != "head") + [x for x in (weight, b) if x is not None] * (trained != "hidden")
        for leaf in leaves:
            leaf.requires_grad_()
        out = function.apply(h, weight, b, targets, 2.0, 300, None, 2 * scale, ALL)
        (out[0] * torch.linspace(-1, 1, tokens)).sum().backward()
        results.append((out, [leaf.grad for leaf in leaves]))
    (want, want_grads), (found, found_grads) = results
    for name, x, y in zip(SIDES, want, found, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    for x, y in zip(want_grads, found_grads, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 9), vocabulary=st.integers(1, 900), size=st.integers(-3, 4), seed=st.integers(0, 99)
)  # fmt: skip
def test_any_shape_and_size_of_logits(tokens, vocabulary, size, seed):
    h, weight, b, targets = case(tokens, 5, vocabulary, bias=True, seed=seed)
    h = h * 10.0**size
    found = lm_head.log_prob_statistics(h, weight, b, targets, 1.0, with_jacobian=False)
    logits = (h.double() @ weight.double().T) + b.double()
    want = logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    size = logits.abs().max().item()  # of what is subtracted
    torch.testing.assert_close(found["log_probs"].double(), want, rtol=1e-5, atol=3e-6 * max(size, 1))


def test_ties_go_to_the_first_token():
    weight = torch.zeros(600, 3)  # all logits equal, over three tiles
    found = lm_head.log_prob_statistics(torch.ones(3, 3), weight, None, torch.tensor([0, 1, 599]), 1.0, False)
    assert found["is_top1"].tolist() == [True, False, False]


def test_what_it_does_not_do_is_left_to_trl(monkeypatch):
    """bf16, soft-capped logits, autocast and empty batches: TRL's function, unchanged."""
    called = []
    monkeypatch.setattr(lm_head._LogProbs, "apply", lambda *a: called.append(a))
    h, weight, _, targets = case()
    run = lambda h, w, t, softcap=None: lm_head.LogProbs.apply(h, w, None, t, 1.0, 300, softcap, 1.0, ALL)  # noqa: E731
    run(h.bfloat16(), weight.bfloat16(), targets)
    run(h, weight, targets, softcap=30.0)
    run(h[:0], weight, targets[:0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(h, weight, targets)
    assert not called
    run(h, weight, targets)
    assert len(called) == 1


def test_a_gradient_of_the_entropy_is_refused():
    h, weight, _, targets = case()
    out = lm_head.LogProbs.apply(h.requires_grad_(), weight, None, targets, 1.0, 300, None, 1.0, ALL)
    with pytest.raises(NotImplementedError, match="no gradient of the entropy"):
        out[1].sum().backward()


def test_outputs_that_nobody_asked_for_are_none():
    h, weight, _, targets = case()
    out = lm_head.LogProbs.apply(h, weight, None, targets, 1.0, 300, None, 1.0, ("log_probs",))
    assert out[0].shape == (7,) and out[1:] == (None,) * 4


def test_installed_in_trls_head(tiny_llama, monkeypatch):
    """TRL's fused LM head on all positions, and with ours on the labelled ones: every output and gradient agrees."""
    for name in ("_use_triton", "_ChunkedLogProbFunction"):
        monkeypatch.setattr(utils, name, getattr(utils, name))
    ids = torch.randint(3, 600, (3, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(20) < 12, -100)
    found = []
    for install in (False, True):
        if install:
            lm_head.install()
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        utils.add_fused_lm_head(model, outputs=ALL)
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        out.loss.backward()
        weights = (model.model.layers[0].mlp.up_proj.weight.grad, model.get_input_embeddings().weight.grad)
        found.append([getattr(out, name).detach().float() for name in SIDES] + list(weights))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert found[0][0].abs().sum() > 0


def test_an_empty_answer_is_a_differentiable_zero(tiny_llama, monkeypatch):
    for name in ("_use_triton", "_ChunkedLogProbFunction"):
        monkeypatch.setattr(utils, name, getattr(utils, name))
    lm_head.install()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    utils.add_fused_lm_head(model)
    ids = torch.tensor([[5, 6, 7]])
    out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss.item() == 0 and model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() == 0
