"""Packed backbones against padded ones: hidden states, gradients, saving, generation; and what can't be packed."""

import copy
import json
import math
import re
import warnings

import pytest
import torch
from tiny_models import (
    BATCHES,
    CAUSAL,
    REWARD,
    SIZES,
    UNEVEN,
    Calls,
    assert_same,
    hidden_and_gradients,
    tiny_model,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    T5Config,
)

from rlhf.packing import backbone as packing
from rlhf.packing import pack_backbone, why_not

# --- packed = padded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", packing.MODES)
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "phi"])
def test_batches(model_type, name, mode):
    model = tiny_model(model_type)
    expected = hidden_and_gradients(model, *BATCHES[name])
    pack_backbone(model, mode)
    assert_same(hidden_and_gradients(model, *BATCHES[name]), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_gradient_checkpointing(model_type, reentrant):
    model = tiny_model(model_type)
    expected = hidden_and_gradients(model, *UNEVEN)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    pack_backbone(model, "pairs")
    calls = Calls(model)
    assert_same(hidden_and_gradients(model, *UNEVEN), expected)
    assert calls.tokens == [19]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])
def test_reward_model(model_type):
    model = tiny_model(model_type, REWARD)
    ids, mask = UNEVEN
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    pack_backbone(model, "pairs")
    calls = Calls(model)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, expected)
    assert calls.tokens == [19]


def test_peft_adapter_on_and_off():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))  # fmt: skip
    expected = hidden_and_gradients(model, *UNEVEN)
    with model.disable_adapter(), torch.no_grad():
        off = model(input_ids=UNEVEN[0], attention_mask=UNEVEN[1], use_cache=False).logits[UNEVEN[1].bool()]
    pack_backbone(model, "pairs")
    calls = Calls(model)
    assert_same(hidden_and_gradients(model, *UNEVEN), expected)
    with model.disable_adapter(), torch.no_grad():
        found = model(input_ids=UNEVEN[0], attention_mask=UNEVEN[1], use_cache=False).logits[UNEVEN[1].bool()]
    torch.testing.assert_close(found, off, rtol=1e-5, atol=1e-5)
    assert calls.tokens == [19, 19]


def test_4_bit_base(tmp_path):
    """QLoRA: packed and padded read the same quantised base."""
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    tiny_model("llama", hidden_size=64).save_pretrained(tmp_path)
    torch.manual_seed(0)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    assert "Linear4bit" in {type(module).__name__ for module in model.modules()}
    expected = hidden_and_gradients(model, *UNEVEN)
    pack_backbone(model, "pairs")
    calls = Calls(model)
    assert_same(hidden_and_gradients(model, *UNEVEN), expected)
    assert calls.tokens == [19]


def test_bfloat16():
    """Packed bf16 is as far from fp32 as padded bf16 is."""
    exact, model = tiny_model("llama"), tiny_model("llama").bfloat16()
    hidden, _ = hidden_and_gradients(exact, *UNEVEN)
    padded, _ = hidden_and_gradients(model, *UNEVEN)
    pack_backbone(model, "pairs")
    packed, _ = hidden_and_gradients(model, *UNEVEN)
    assert packed.dtype == torch.bfloat16
    assert (packed - hidden).abs().max() <= 2 * (padded - hidden).abs().max()


def test_no_dense_mask():
    """Nothing of T x T is made: at 2 x 1500 tokens a bool mask alone would be 9 MB."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    model = tiny_model("llama", max_position_embeddings=2048, num_hidden_layers=1)
    pack_backbone(model, "pairs")
    ids = torch.randint(3, 64, (2, 1500))
    ids[1, :1480] = ids[0, :1480]
    with torch.no_grad(), Largest() as largest:
        packing.find_backbone(model)(input_ids=ids, use_cache=False)
    assert largest.numel < 2 * 1500 * 64


def test_chosen_does_not_reach_rejected():
    """Mutation: other chosen tokens after the prompt leave the rejected rows' hidden states bit for bit alone."""
    model = tiny_model("llama")
    pack_backbone(model, "pairs")
    ids, mask = UNEVEN
    changed = ids.clone()
    changed[0, 4:6] += 20  # the prefix stays 5 6 7
    before, after = (model.model(input_ids=x, attention_mask=mask, use_cache=False).last_hidden_state for x in (ids, changed))  # fmt: skip
    assert torch.equal(before[1:], after[1:]) and torch.equal(before[0, :4], after[0, :4])
    assert not torch.allclose(before[0, 4:6], after[0, 4:6], atol=1e-2)


# --- what stays the model's own --------------------------------------------------------------------------------------


def test_generation_is_unchanged():
    model = tiny_model("llama").eval()
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])  # left padding
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **options)
    pack_backbone(model, "pairs")
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, **options, use_cache=False), expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_cache": True},
        {"output_hidden_states": True},
        {"position_ids": torch.arange(9)[None]},
        {"attention_mask": torch.tensor([[0] + [1] * 8] * 4)},  # left padding
        {"attention_mask": torch.ones(4, 1, 9, 9, dtype=torch.bool).tril()},
    ],
    ids=["cache", "all hidden states", "positions", "left padding", "4-D mask"],
)
def test_other_calls_pass_through(arguments):
    model = tiny_model("llama").eval()
    ids = UNEVEN[0]
    arguments = {"attention_mask": UNEVEN[1], "use_cache": False} | arguments
    expected = model(input_ids=ids, **arguments)
    pack_backbone(model, "pairs")
    calls = Calls(model)
    found = model(input_ids=ids, **arguments)
    assert calls.tokens == [36]
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)
    if arguments.get("output_hidden_states"):
        assert len(found.hidden_states) == 3


def test_a_padded_batch_in_training_is_told():
    """Never a silent change: an argument that packing does not know makes the batch padded, with a warning."""
    model = tiny_model("llama").train()
    pack_backbone(model, "pairs")
    ids, mask = UNEVEN
    with pytest.warns(UserWarning, match="computed padded, because of its arguments .*position_ids"):
        model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(9)[None], use_cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        model.eval()
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(9)[None], use_cache=False)


def test_embeddings_pass_through():
    model = tiny_model("llama").eval()
    embeds = model.get_input_embeddings()(UNEVEN[0])
    expected = model(inputs_embeds=embeds, attention_mask=UNEVEN[1], use_cache=False).logits
    pack_backbone(model, "pairs")
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=UNEVEN[1], use_cache=False).logits, expected)


def test_documents_in_one_row_stay_apart():
    """Restarting positions without segments (TRL's own padding_free) still get transformers' mask of packed documents."""
    model = tiny_model("llama").eval()
    ids, positions = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 2, 0, 1]])
    expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    pack_backbone(model, "rows")
    assert torch.equal(model(input_ids=ids, position_ids=positions, use_cache=False).logits, expected)


def test_odd_rows_and_a_single_row_under_pairs():
    model = tiny_model("llama").eval()
    ids, mask = UNEVEN[0][:3], UNEVEN[1][:3]
    expected = hidden_and_gradients(model, ids, mask)
    pack_backbone(model, "pairs")
    assert_same(hidden_and_gradients(model, ids, mask), expected)


@pytest.mark.parametrize("auto", [CAUSAL, REWARD], ids=["causal", "reward"])
def test_saved_model_is_plain(tmp_path, auto):
    model = tiny_model("llama", auto).eval()
    names = list(model.state_dict())
    pack_backbone(model, "pairs")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "rlhf" not in json.dumps(config) and "packed" not in json.dumps(config)
    again = auto.from_pretrained(tmp_path).eval()
    assert again.config._attn_implementation == "sdpa" and list(again.state_dict()) == names
    ids, mask = UNEVEN
    want = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = again(input_ids=ids, attention_mask=mask).logits
    if auto is CAUSAL:
        want, found = want[mask.bool()], found[mask.bool()]
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_deep_copy_runs_its_own_weights():
    """TRL copies policies to make references."""
    model = tiny_model("llama")
    pack_backbone(model, "pairs")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert model.model(input_ids=UNEVEN[0], use_cache=False).last_hidden_state.abs().max() == 0
    assert twin.model(input_ids=UNEVEN[0], use_cache=False).last_hidden_state.abs().max() > 0.1


def test_packing_again_sets_the_mode():
    model = tiny_model("llama")
    pack_backbone(model, "pairs")
    forward = model.model.forward
    pack_backbone(model, "rows")
    assert model.model.forward == forward
    calls = Calls(model)
    model(input_ids=UNEVEN[0], attention_mask=UNEVEN[1], use_cache=False)
    assert calls.tokens == [24]  # no sharing


# --- what can't be packed --------------------------------------------------------------------------------------------


def from_config(config, auto=AutoModel):
    return auto.from_config(config)


SMALL = {k: SIZES[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}  # fmt: skip
REASONS = [
    (lambda: from_config(BertConfig(**SMALL), REWARD), "BertModel is an encoder: its tokens attend to later ones"),
    (lambda: from_config(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)), "T5Model is an encoder-decoder"),
    (lambda: from_config(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, layer_types=["full_attention"] * 2)), "attention scores are soft-capped"),
    (lambda: from_config(AutoConfig.for_model("mamba", vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)), "linear_attention|recurrent|encoder"),
    (lambda: from_config(AutoConfig.for_model("lfm2", **SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"])), "layers of type conv"),
    (lambda: from_config(AutoConfig.for_model("bloom", vocab_size=32, hidden_size=16, n_layer=1, n_head=2)), "BloomModel does not take token positions"),
    (lambda: from_config(AutoConfig.for_model("stablelm", **SMALL, num_key_value_heads=2)), "packing has not been verified for StableLmModel .model type stablelm."),
    (lambda: tiny_model("gpt2", attn_pdrop=0.1), r"attention has a dropout of 0.1; set attention_dropout .GPT-2: attn_pdrop. to 0"),
    (lambda: tiny_model("llama", attention_dropout=0.2), "attention has a dropout of 0.2"),
    (lambda: tiny_model("llama", attn_implementation="flex_attention"), "attention implementation is flex_attention, not sdpa or eager"),
    (lambda: torch.nn.Linear(2, 2), "Linear is not a transformers model"),
]  # fmt: skip


@pytest.mark.parametrize("make, reason", REASONS, ids=[reason[:30] for _, reason in REASONS])
def test_why_not(make, reason):
    model = make()
    assert re.search(reason, why_not(model))
    assert "\n" not in why_not(model)
    with pytest.raises(ValueError, match="this model can't be packed: "):
        pack_backbone(model, "rows")


def test_prompt_learning():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert why_not(model) == "its PEFT method PROMPT_TUNING puts virtual tokens before each row"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gpt2", "phi"])
def test_can_be_packed(model_type, implementation):
    model = tiny_model(model_type, attn_implementation=implementation)
    assert why_not(model) is None
    pack_backbone(model, "pairs")
    assert why_not(model) is None


def test_unknown_mode():
    with pytest.raises(ValueError, match="packing mode 'pair' is unknown"):
        pack_backbone(tiny_model("llama"), "pair")


def test_log_probs_by_hand():
    """The example of the layout through a model: log p(8 | 5 6) of the rejected row is the plain model's."""
    model = tiny_model("llama").eval()
    plain = model(input_ids=torch.tensor([[5, 6, 8, 9]])).logits.log_softmax(-1)
    pack_backbone(model, "pairs")
    ids = torch.tensor([[5, 6, 7, 0], [5, 6, 8, 9]])
    found = model(input_ids=ids, attention_mask=(ids != 0).long(), use_cache=False).logits.log_softmax(-1)
    assert math.isclose(found[1, 1, 8].item(), plain[0, 1, 8].item(), rel_tol=1e-5)
    assert math.isclose(found[1, 2, 9].item(), plain[0, 2, 9].item(), rel_tol=1e-5)
