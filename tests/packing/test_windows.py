"""Sliding windows: where they end in each family, and that rows within them are packed and others are not."""

import copy
import inspect
import warnings

import pytest
import torch
from tiny_models import ALL_SLIDING, LONGEST, UNEVEN, WINDOWS, Calls, assert_same, hidden_and_gradients, tiny_model

from rlhf.packing import attention_window, pack_backbone, why_not
from rlhf.packing import backbone as packing

# Packed attention has no soft-capping and no sinks; their windows end where the others' do.
REFUSED = {"gemma2": ALL_SLIDING | {"attn_logit_softcapping": 50.0}, "gpt_oss": ALL_SLIDING}


def windowed(model_type, window, **values):
    return tiny_model(model_type, **(WINDOWS | REFUSED)[model_type], sliding_window=window, **values)


def padded_hidden(model, ids):
    with torch.no_grad():
        return packing.find_backbone(model)(input_ids=ids, use_cache=False).last_hidden_state


def test_all_verified_families_with_windows_are_here():
    """`sliding_window` in the attention of the model's own source: nothing of it may be missing above."""
    found = set()
    for name in packing.VERIFIED:
        backbone = packing.find_backbone(tiny_model(name))
        attention = [type(module) for module in backbone.modules() if hasattr(module, "is_causal")]
        read = any("sliding_window" in inspect.getsource(kind) for kind in attention)
        if read and hasattr(backbone.config, "sliding_window"):  # OLMoE's has none
            found.add(name)
    assert found <= set(WINDOWS), found - set(WINDOWS)


@pytest.mark.parametrize("model_type", WINDOWS | REFUSED)
def test_a_token_sees_itself_and_window_minus_1_before_it(model_type):
    """From transformers' own masks: W tokens with the token itself. A row of W tokens is as without window, one of W + 1 not."""
    ids = torch.arange(3, 12)[None]  # 9 tokens
    window, none = windowed(model_type, 8).eval(), windowed(model_type, 60).eval()
    none.load_state_dict(window.state_dict())
    torch.testing.assert_close(padded_hidden(window, ids[:, :8]), padded_hidden(none, ids[:, :8]), rtol=0, atol=1e-6)
    nine, nine_without = padded_hidden(window, ids), padded_hidden(none, ids)
    torch.testing.assert_close(nine[:, :8], nine_without[:, :8], rtol=0, atol=1e-6)
    assert (nine[:, 8] - nine_without[:, 8]).abs().max() > 1e-3  # the last one no longer sees the first
    assert attention_window(packing.find_backbone(window)) == 8


@pytest.mark.parametrize("model_type", WINDOWS)
def test_rows_within_the_window_are_packed(model_type):
    """UNEVEN's longest row has 8 tokens: the window itself."""
    model = windowed(model_type, LONGEST)
    expected = hidden_and_gradients(copy.deepcopy(model), *UNEVEN)
    assert why_not(model, LONGEST) is None
    pack_backbone(model, "pairs", LONGEST)
    calls = Calls(model)
    assert_same(hidden_and_gradients(model, *UNEVEN), expected)
    assert calls.tokens == [19]
    assert why_not(model, LONGEST) is None


@pytest.mark.parametrize("model_type", WINDOWS)
def test_a_row_beyond_the_window_is_computed_padded(model_type):
    """Also if it was not announced: the batch is the padded one, bit for bit, and a warning has both numbers."""
    model = windowed(model_type, 7)
    plain = copy.deepcopy(model)
    packing.pack_backbone(model, "pairs", 7)
    calls = Calls(model)
    with pytest.warns(UserWarning, match="computed padded, because a row of 8 tokens exceeds the sliding window of 7"):
        found = hidden_and_gradients(model, *UNEVEN)
    plain.config._attn_implementation = "sdpa"
    expected = hidden_and_gradients(plain, *UNEVEN)
    assert torch.equal(found[0], expected[0]) and calls.tokens == [36]
    short = tuple(part[[0, 2], :7] for part in UNEVEN)  # 6 and 7 tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(hidden_and_gradients(model, *short), hidden_and_gradients(plain, *short))
    assert calls.tokens[1:] == [10]


@pytest.mark.parametrize(
    "longest, rows", [(9, "rows may have 9"), (None, "rows may have any length"), (4096, "rows may have 4,096")]
)
def test_both_numbers_and_what_to_set(longest, rows):
    model = windowed("mistral", 8)
    want = f"its attention has a sliding window of 8 tokens, and {rows}; set `max_length: 8` or less to pack them"
    assert why_not(model, longest) == want
    with pytest.raises(ValueError, match="this model can't be packed: its attention has a sliding window of 8 tokens"):
        pack_backbone(model, "rows", longest)


def test_other_reasons_come_first():
    """What max_length can't change."""
    assert why_not(windowed("gemma2", 8)) == "its attention scores are soft-capped"
    assert why_not(windowed("gpt_oss", 8)).startswith("GptOssModel's attention has sinks")
    assert why_not(tiny_model("lfm2", layer_types=["conv", "full_attention"]), 4) == "Lfm2Model has layers of type conv"


def test_layers_without_a_window_do_not_count():
    """A window in the config that no layer has: dots1's default, Qwen2's without use_sliding_window."""
    assert attention_window(packing.find_backbone(tiny_model("dots1", sliding_window=8, max_window_layers=2))) is None
    assert attention_window(packing.find_backbone(tiny_model("qwen2", sliding_window=8))) is None
    assert why_not(tiny_model("dots1", sliding_window=8, max_window_layers=2)) is None
