"""Tiny models of every family, and the batches that packed and padded computations are compared on."""

import inspect

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.packing.backbone import find_backbone

SIZES = {  # whatever a config calls them
    "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8, "ffn_dim": 48,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2,
    "sliding_window": None, "attention_dropout": 0.0, "dropout": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0,
    "embd_pdrop": 0.0, "hidden_dropout": 0.0, "embedding_dropout": 0.0, "residual_dropout": 0.0,
}  # fmt: skip
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# Multi-head latent attention: queries and keys have 12 numbers per head, values 8.
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4,
    "head_dim": None,
}  # fmt: skip
OWN_SIZES = {
    "gpt2": GPT2_SIZES, "gpt_bigcode": GPT2_SIZES | {"n_inner": 48},
    "gptj": GPT2_SIZES | {"rotary_dim": 4}, "codegen": GPT2_SIZES | {"rotary_dim": 4, "n_ctx": 64},
    "deepseek_v3": MLA, "falcon": {"alibi": False},
}  # fmt: skip
# Their configurations have no form without windows. Half of the layers have one: as long as the longest row of `UNEVEN`.
WINDOWED = {
    "cohere2": {}, "exaone4": {"sliding_window_pattern": 2}, "gemma3_text": {}, "ministral": {}, "olmo3": {},
}  # fmt: skip
ALL_SLIDING = {"layer_types": ["sliding_attention"] * 2}
# Families with windows, and what gives one to the tiny model's layers. Mistral 7B v0.1 has 4096, Phi-3-mini 2047.
WINDOWS = {
    "mistral": {}, "mixtral": {}, "phi3": {}, "starcoder2": {}, "ministral": {},
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), {"use_sliding_window": True, "max_window_layers": 1}),
    "smollm3": {"use_sliding_window": True} | ALL_SLIDING, "dots1": {"max_window_layers": 1},
    **dict.fromkeys(("cohere2", "exaone4", "gemma3_text", "olmo3"), ALL_SLIDING),
}  # fmt: skip
LONGEST = 8  # the longest row of `UNEVEN`
CAUSAL, REWARD = AutoModelForCausalLM, AutoModelForSequenceClassification


def tiny_config(model_type, **values):
    cls = CONFIG_MAPPING[model_type]
    known = set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "__dataclass_fields__", {}))
    if model_type in WINDOWED:
        values = {"sliding_window": LONGEST, "layer_types": ["sliding_attention", "full_attention"]} | WINDOWED[model_type] | values  # fmt: skip
    values = OWN_SIZES.get(model_type, {}) | values
    sizes = {k: v for k, v in SIZES.items() if k in known and not (k == "hidden_size" and "n_embd" in values)}
    return cls(**{k: v for k, v in {**sizes, **values}.items() if not (k == "head_dim" and v is None)})


def tiny_model(model_type, auto=CAUSAL, **values):
    """With weights so large that an error in attention shows."""
    if auto is REWARD:
        values["num_labels"] = 1
    config = tiny_config(model_type, **values)
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.train()


def batch(chosen, rejected):
    rows = chosen + rejected
    length = max(map(len, rows)) + 1
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return ids, (ids != 0).long()


BATCHES = {
    "uneven": batch([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 17, 18]], [[5, 6, 7, 20, 21, 22, 23], [11, 12, 24]]),
    "identical": batch([[5, 6, 7, 8]], [[5, 6, 7, 8]]),
    "one begins the other": batch([[5, 6, 7], [9, 8, 7, 6]], [[5, 6, 7, 8, 9], [9, 8]]),
    "one-token completions": batch([[5, 6, 7], [4]], [[5, 6, 8], [3]]),
    "nothing in common": batch([[5, 6, 7]], [[8, 9]]),
}
UNEVEN = BATCHES["uneven"]


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def hidden_and_gradients(model, ids, mask):
    """Last hidden states at the real positions, and the gradients of a random weighting of them."""
    model.zero_grad()
    hidden = find_backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    hidden = hidden[mask.bool()]
    hidden.backward(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)))
    return hidden.detach(), gradients_of(model)


def assert_same(found, expected):
    """Values and gradients to 1e-5 of the largest entry (fp32; a key bias has a gradient of 0, in rounding)."""
    pairs = [(found[0], expected[0])] + [(found[1][name], grad) for name, grad in expected[1].items()]
    scale = max(float(grad.abs().max()) for grad in expected[1].values())
    assert found[1].keys() == expected[1].keys()
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, scale))


class Calls:
    """Counts the tokens that a model's embedding sees, call by call."""

    def __init__(self, model):
        self.tokens = []
        model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: self.tokens.append(args[0].numel()))
