"""Wrap the forward of a model's backbone so that it computes on one packed row.

Trainers call `model(...)`, which calls its backbone (`model.base_model`, a LlamaModel for example) on a padded batch and
takes `last_hidden_state`. Only the backbone's forward is replaced, so loss, metrics, LM heads, reward heads and
reference passes are unchanged.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.packing.attention import NAME, Segments, register
from rlhf.packing.collate import packed_batch
from rlhf.packing.known import plain
from rlhf.packing.layout import MODES, Layout, is_right_padded, longest_sequence, packed_layout, unpack

# Model types whose packed log-probabilities, rewards and gradients tests/packing/test_families.py compares with those of
# transformers' padded model. An allow-list, because many unsupported models can't be detected: transformers 5.23's
# falcon, gpt_neo, nemotron and stablelm choose their attention at construction, gptj and codegen have none of
# transformers' interface; they would ignore the segments, and log-probabilities would be off by several nats.
VERIFIED = frozenset(
    "apertus arcee cohere cohere2 deepseek_v3 dots1 ernie4_5 exaone4 flex_olmo gemma gemma3_text glm glm4 glm4_moe gpt2 "
    "gpt_bigcode gpt_neox granite granitemoe granitemoeshared helium hunyuan_v1_dense llama ministral mistral mixtral "
    "nanochat olmo olmo2 olmo3 olmoe opt persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 "
    "starcoder2".split()
)
# Arguments that a packed call may have besides input_ids and attention_mask; with any other, the call is not packed.
# `margin` is a column of TRL's reward data, which RewardTrainer passes to the model with everything else.
HARMLESS = frozenset({"return_dict", "output_router_logits", "num_items_in_batch", "margin"})


def why_not(model, longest: int | None = None) -> str | None:
    """Why this model can't be packed, in one sentence; None if it can.

    Call it once the trainer is built: TRL's DPO and reward trainers disable dropout modules (GPT-2's attention has 0.1
    by default).

    Args:
        longest: tokens of the longest row that the model will be given; None if that isn't known. A sliding window that
            no row exceeds is plain causal attention.
    """
    for config in getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning:
            return f"its PEFT method {config.peft_type.value} puts virtual tokens before each row"
    if (backbone := find_backbone(model)) is None:
        return f"{type(model).__name__} is not a transformers model with a backbone"
    config = backbone.config
    if getattr(config, "is_encoder_decoder", False):
        return f"{type(backbone).__name__} is an encoder-decoder"
    attention = [module for module in backbone.modules() if hasattr(module, "is_causal")]
    if attention and not all(module.is_causal for module in attention):
        return f"{type(backbone).__name__} is an encoder: its tokens attend to later ones"
    if kinds := sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}):
        return f"{type(backbone).__name__} has layers of type {', '.join(kinds)}"
    if any(getattr(module, "sinks", None) is not None for module in attention):
        return f"{type(backbone).__name__}'s attention has sinks: learned scores beside those of the keys"
    if getattr(backbone, "_is_stateful", False):
        return f"{type(backbone).__name__} is recurrent: its state can't branch into two answers"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention scores are soft-capped"
    if getattr(config, "alibi", False) or "position_ids" not in inspect.signature(type(backbone).forward).parameters:
        return f"{type(backbone).__name__} does not take token positions from position_ids"
    if config._attn_implementation not in ("sdpa", "eager", NAME):
        return f"its attention implementation is {config._attn_implementation}, not sdpa or eager"
    if config.model_type not in VERIFIED or not type(backbone).__module__.startswith("transformers."):
        return f"packing has not been verified for {type(backbone).__name__} (model type {config.model_type})"
    if dropout := max((_attention_dropout(module) for module in attention), default=0.0):
        return f"its attention has a dropout of {dropout}; set attention_dropout (GPT-2: attn_pdrop) to 0"
    window = attention_window(backbone)  # last: the only reason that a recipe's max_length removes
    if window is not None and (longest is None or longest > window):
        rows = "rows may have any length" if longest is None else f"rows may have {longest:,}"
        return (
            f"its attention has a sliding window of {window:,} tokens, and {rows}; set `max_length: {window}` or less to "
            "pack them"
        )
    return None


def attention_window(backbone) -> int | None:
    """The smallest sliding window of a backbone's layers, in tokens; None if there is none.

    With a window of W tokens a token attends to itself and the W - 1 before it, in each family of transformers
    (`sliding_window_overlay`; tests/packing/test_windows.py), so that rows of up to W tokens are as without.
    """
    config = backbone.config
    windows = {getattr(module, "sliding_window", None) for module in backbone.modules() if hasattr(module, "is_causal")}
    kinds = getattr(config, "layer_types", None)
    if not kinds or "sliding_attention" in kinds:  # Mistral, Mixtral, Phi-3, Starcoder2: only in the config
        windows.add(getattr(config, "sliding_window", None))
    return min((window for window in windows if window), default=None)


def pack_backbone(model, mode: str, longest: int | None = None) -> None:
    """Make a model's backbone compute padded batches as one packed row (this instance only, not reversible).

    A call is packed if it has a right-padded 2-D batch of input_ids, no cache (`use_cache=False`), no row longer than a
    sliding window, and requests only last hidden states and router logits; it returns them as the padded call does, with zeros for padding. Every other
    call (generation, inputs_embeds, left padding, hidden states of all layers) runs the original forward, with
    attention "sdpa". Weights, parameter names and the output of `save_pretrained` are unchanged. Calling this again
    only sets the mode.

    Args:
        model: a transformers model with a backbone, or a PeftModel around one; before or after TRL's trainer wrapped it.
        mode: `pairs` (DPO, rewards) or `rows` (everything else), see `packed_layout`.
        longest: tokens of the longest row that it will be given, see `why_not`.

    Raises:
        ValueError: an unknown mode, or a model that can't be packed (`why_not`).
    """
    if mode not in MODES:
        raise ValueError(f"packing mode '{mode}' is unknown; expected {' or '.join(MODES)}")
    if reason := why_not(model, longest):
        raise ValueError(f"this model can't be packed: {reason}")
    register()
    backbone = find_backbone(model)
    assert backbone is not None  # `why_not` has looked
    for config in (backbone.config, _without_peft(model).config):  # usually the same object
        config._attn_implementation = NAME
    if not hasattr(backbone, "_packing_mode"):
        packed = packed_forward(_unbound_forward(backbone), attention_window(backbone))
        backbone.forward = MethodType(packed, backbone)
    backbone._packing_mode = mode  # type: ignore[assignment]  # torch takes what it does not know for a module


def packing_mode(model) -> str | None:
    """The packing mode of a model's backbone; None if it computes padded batches."""
    return getattr(find_backbone(model), "_packing_mode", None)


def find_backbone(model) -> PreTrainedModel | None:
    """The decoder stack that a (PEFT-wrapped) model calls; the model itself if it is one."""
    backbone = getattr(_without_peft(model), "base_model", None)
    if not isinstance(backbone, PreTrainedModel):
        return None
    # OPTForCausalLM calls the decoder in OPTModel itself (transformers 5.17 to 5.23): OPTModel's forward is not on the way
    inner = getattr(backbone, "decoder", None) if backbone.config.model_type == "opt" else None
    return inner if isinstance(inner, PreTrainedModel) else backbone


def _without_peft(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _unbound_forward(backbone) -> Callable:
    """The forward of this instance as a function of `self`, so that a deep copy of the model uses its own weights."""
    forward = backbone.forward
    if getattr(forward, "__self__", None) is backbone:
        return forward.__func__
    return functools.wraps(forward)(lambda self, *args, **kwargs: forward(*args, **kwargs))  # a hook of accelerate


def _attention_dropout(module) -> float:
    dropout = getattr(module, "attn_dropout", None) or getattr(module, "attention_dropout", None)
    return float(getattr(dropout, "p", dropout) or 0.0)


# --- the wrapped forward ---------------------------------------------------------------------------------------------


def packed_forward(forward: Callable, window: int | None = None) -> Callable:
    """Wrap a backbone's `forward` in one that packs the calls that it can pack; `window` as in `attention_window`."""
    names = [name for name in inspect.signature(forward).parameters if name != "self"]

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if not can_pack(self, arguments):
            given = ", ".join(sorted(name for name, value in arguments.items() if value is not None))
            _warn_padded(self, f"because of its arguments ({given}) or because it is not right-padded")
            return forward(self, *map(plain, args), **{name: plain(value) for name, value in kwargs.items()})
        input_ids, attention_mask = arguments["input_ids"], arguments.get("attention_mask")
        layout, segments = layout_of(input_ids, attention_mask, self._packing_mode)
        if window is not None and (longest := longest_sequence(layout.segments)) > window:
            _warn_padded(self, f"because a row of {longest} tokens exceeds the sliding window of {window}")
            return forward(self, *map(plain, args), **{name: plain(value) for name, value in kwargs.items()})
        input_ids = plain(input_ids)
        packed = {
            "input_ids": input_ids.flatten().index_select(0, layout.token_index_T)[None],
            "position_ids": layout.position_ids_T[None],
            "attention_mask": no_mask(input_ids.device),
            "packed_segments": segments,
        }
        outputs = forward(self, **(arguments | packed))
        outputs.last_hidden_state = unpack(outputs.last_hidden_state[0], layout, *input_ids.shape)
        if getattr(outputs, "router_logits", None) is not None:  # (T, experts) per layer, padded: (R * L, experts)
            outputs.router_logits = tuple(
                unpack(logits, layout, *input_ids.shape).flatten(0, 1) for logits in outputs.router_logits
            )
        return outputs

    return wrapper


def _warn_padded(backbone, why: str) -> None:
    if backbone.training and torch.is_grad_enabled():
        warnings.warn(f"packing: a training batch is computed padded, {why}", stacklevel=3)


def layout_of(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, mode: str) -> tuple[Layout, Segments]:
    """The layout that the collator has made; for batches of other callers it is computed, which waits for a GPU."""
    if (made := packed_batch(input_ids, mode)) is not None:
        if made.layout.token_index_T.device != input_ids.device:  # a model that is spread over several
            made = made.to(input_ids.device)
        return made.layout, made.segments(input_ids.device)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    layout = packed_layout(input_ids, attention_mask, mode)
    return layout, Segments(layout.segments, input_ids.device)


def no_mask(device: torch.device) -> torch.Tensor:
    """A dummy 4-D attention mask.

    transformers (5.17 to 5.23, `_preprocess_mask_arguments`) passes a 4-D mask on unchanged, and packed attention
    ignores it. With None it would detect restarting positions and build the T x T mask of packed documents.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def can_pack(backbone, arguments: dict[str, Any]) -> bool:
    """Whether this call of a backbone is a right-padded batch that requests only last hidden states."""
    input_ids, attention_mask = arguments.get("input_ids"), arguments.get("attention_mask")
    use_cache = arguments.get("use_cache")
    if use_cache is None:
        use_cache = getattr(backbone.config, "use_cache", False)
    wants_more = any(getattr(backbone.config, f"output_{name}", False) for name in ("hidden_states", "attentions"))
    is_set = (name for name, value in arguments.items() if value is not None and value is not False)
    if use_cache or wants_more or set(is_set) - HARMLESS - {"input_ids", "attention_mask"}:
        return False
    if arguments.get("return_dict") is False or not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
        return False
    if attention_mask is None or packed_batch(input_ids, backbone._packing_mode) is not None:
        return True
    return attention_mask.shape == input_ids.shape and is_right_padded(attention_mask)
