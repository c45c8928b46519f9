"""Each verified model family as the trainers call it, packed, against transformers' own padded model in float32.

The references are plain copies: no fused head, no packing. Other families stay padded, and some have to.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from tiny_models import (
    CAUSAL,
    LONGEST,
    REWARD,
    UNEVEN,
    WINDOWS,
    Calls,
    assert_same,
    gradients_of,
    hidden_and_gradients,
    tiny_model,
)
from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from trl.trainer.utils import add_fused_lm_head

from rlhf.packing import backbone as packing
from rlhf.packing import lm_head, pack_backbone, why_not

VERIFIED = sorted(packing.VERIFIED)
WITH_A_SCORE = [name for name in VERIFIED if CONFIG_MAPPING[name] in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING]
# 6 + 8 + 7 + 3 tokens of UNEVEN without padding, less the shared prompts 5 6 7 and 11 12; padded: 4 rows of 9
PACKED, PADDED = 19, 36
LABELS = UNEVEN[0].masked_fill(UNEVEN[1] == 0, -100)
LABELS[:, :2] = -100  # a prompt is not scored; a token that both rows share is, in each of them


def weighted(values):
    """A sum of values with random weights: its gradient shows each of them."""
    return (values * torch.randn(values.shape, generator=torch.Generator().manual_seed(1))).sum()


def plain_logps(model):
    """Log-probabilities of the labelled tokens and gradients, from the logits of transformers' padded model."""
    logits = model(input_ids=UNEVEN[0], attention_mask=UNEVEN[1], use_cache=False).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, LABELS[:, 1:].clamp(min=0)[..., None])[..., 0]
    logps = logps[LABELS[:, 1:] != -100]
    weighted(logps).backward()
    return logps.detach(), gradients_of(model)


@pytest.fixture
def cpu_head(monkeypatch):
    """What the stages install on a CPU; TRL's own functions come back afterwards."""
    from trl.trainer import utils

    for name in ("_use_triton", "_ChunkedLogProbFunction"):
        monkeypatch.setattr(utils, name, getattr(utils, name))
    lm_head.install()


@pytest.mark.parametrize("model_type", VERIFIED)
def test_log_probabilities_of_the_fused_head(model_type, cpu_head):
    """As SFTTrainer and DPOTrainer compute them: TRL's fused LM head over the packed backbone."""
    model = tiny_model(model_type)
    expected = plain_logps(copy.deepcopy(model))
    pack_backbone(model, "pairs", LONGEST)
    add_fused_lm_head(model)
    calls = Calls(model)
    found = model(input_ids=UNEVEN[0], attention_mask=UNEVEN[1], labels=LABELS, fused_lm_head=True).log_probs
    found = found[LABELS[:, 1:] != -100] if found.dim() == 2 else found
    weighted(found).backward()
    assert_same((found.detach(), gradients_of(model)), expected)
    assert calls.tokens == [PACKED]


@pytest.mark.parametrize("model_type", VERIFIED)
def test_hidden_states(model_type):
    model = tiny_model(model_type)
    expected = hidden_and_gradients(copy.deepcopy(model), *UNEVEN)
    pack_backbone(model, "pairs", LONGEST)
    calls = Calls(model)
    assert_same(hidden_and_gradients(model, *UNEVEN), expected)
    assert calls.tokens == [PACKED]


@pytest.mark.parametrize("model_type", VERIFIED)
def test_logits_of_a_plain_call(model_type):
    """As without the fused head: whatever the model calls inside, it is packed (OPT calls a part of its backbone)."""
    model = tiny_model(model_type)
    expected = plain_logps(copy.deepcopy(model))
    pack_backbone(model, "pairs", LONGEST)
    calls = Calls(model)
    assert_same(plain_logps(model), expected)
    assert calls.tokens == [PACKED]


@pytest.mark.parametrize("model_type", WITH_A_SCORE)
def test_rewards(model_type):
    model = tiny_model(model_type, REWARD)
    plain = copy.deepcopy(model)
    pack_backbone(model, "pairs", LONGEST)
    calls, results = Calls(model), []
    for each in (model, plain):
        rewards = each(input_ids=UNEVEN[0], attention_mask=UNEVEN[1], use_cache=False).logits
        weighted(rewards).backward()
        results.append((rewards.detach(), gradients_of(each)))
    assert_same(*results)
    assert calls.tokens == [PACKED]


def test_most_families_have_a_reward_model():
    assert len(WITH_A_SCORE) >= 30 and "deepseek_v3" in WITH_A_SCORE


@pytest.mark.parametrize("model_type", VERIFIED)
def test_scored_pairs(model_type):
    """An evaluation hands them the packed row itself, and takes the logits of the answers only."""
    from rlhf.inference.score import Pair, pair_logps

    model = tiny_model(model_type).eval()
    pairs = [Pair([5, 6, 7], [8, 9, 10], [20, 21, 22, 23]), Pair([11, 12], [13, 14], [24])]
    expected = pair_logps(model, pairs)
    pack_backbone(model, "pairs", LONGEST)
    calls = Calls(model)
    for value, want in zip(pair_logps(model, pairs), expected, strict=True):
        assert value == pytest.approx(want, rel=1e-5)
    assert calls.tokens == [15]


# --- mixtures of experts ---------------------------------------------------------------------------------------------


ROUTED = [name for name in VERIFIED if "output_router_logits" in CONFIG_MAPPING[name].__dataclass_fields__]


@pytest.mark.parametrize("model_type", ROUTED)
def test_router_logits(model_type):
    """The loss that balances experts is a mean over real tokens: padding has no part in it, packed or padded."""
    model = tiny_model(model_type, output_router_logits=True)
    arguments = {"input_ids": UNEVEN[0], "attention_mask": UNEVEN[1], "labels": LABELS, "use_cache": False}
    expected = model(**arguments)
    pack_backbone(model, "pairs", LONGEST)
    found = model(**arguments)
    torch.testing.assert_close(found.loss, expected.loss)
    if getattr(expected, "aux_loss", None) is not None:
        torch.testing.assert_close(found.aux_loss, expected.aux_loss)


VARIANTS = {  # of mixtures of experts: dense layers among them, weights that are not normalised, one kernel for all experts
    "dense layers by list": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "every second layer": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "weights as they are": ("qwen3_moe", {"norm_topk_prob": False}),
    "normalised weights": ("qwen3_moe", {"norm_topk_prob": True}),
    "all layers sparse": ("deepseek_v3", {"first_k_dense_replace": 0}),
    "groups of experts": ("deepseek_v3", {"n_group": 2, "topk_group": 1}),
    "queries as they are": ("deepseek_v3", {"q_lora_rank": None}),
    "values as wide as keys": ("deepseek_v3", {"v_head_dim": 12}),
    "groups of glm's experts": ("glm4_moe", {"n_group": 2, "topk_group": 1}),
    "queries and keys normalised": ("glm4_moe", {"use_qk_norm": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_experts(variant):
    model_type, values = VARIANTS[variant]
    model = tiny_model(model_type, **values)
    expected = hidden_and_gradients(copy.deepcopy(model), *UNEVEN)
    pack_backbone(model, "pairs")
    assert_same(hidden_and_gradients(model, *UNEVEN), expected)


# --- families that must stay padded ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["falcon", "stablelm", "nemotron", "gptj", "codegen"])
def test_what_would_be_wrong_is_refused(model_type, monkeypatch):
    """The list is what protects them: nothing about them can be seen from outside, and their log-probabilities would be off."""
    model = tiny_model(model_type)
    assert re.search(r"packing has not been verified for \w+ .model type " + model_type, why_not(model, LONGEST))
    with pytest.raises(ValueError, match="this model can't be packed: "):
        pack_backbone(model, "pairs", LONGEST)
    expected, _ = plain_logps(copy.deepcopy(model))
    monkeypatch.setattr(packing, "VERIFIED", packing.VERIFIED | {model_type})
    pack_backbone(model, "pairs", LONGEST)
    found, _ = plain_logps(model)
    assert (found - expected).abs().max() > 0.5


@pytest.mark.parametrize("model_type, auto", [("gpt_oss", CAUSAL), ("gpt_oss", REWARD)])
def test_attention_with_sinks_is_refused(model_type, auto):
    model = tiny_model(model_type, auto, sliding_window=LONGEST)
    assert why_not(model, LONGEST) == "GptOssModel's attention has sinks: learned scores beside those of the keys"


def test_the_documentation_names_them():
    lines = (Path(__file__).parents[2] / "docs/performance.md").read_text(encoding="utf-8").splitlines()
    told = [
        set(re.findall(r"[a-z]\w+", line.split("|")[2].split(";")[0])) for line in lines if line.startswith("| packed")
    ]
    assert told[0] | told[1] == packing.VERIFIED and told[1] == set(WINDOWS)
