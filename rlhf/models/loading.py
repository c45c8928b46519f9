"""Loading policies and reward models for training."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.distributed.sharding import loading_unsharded, unsharded_shape, writable
from rlhf.models.folder import is_adapter


def load_policy(name: str, tokenizer, model_args, trust_remote_code: bool = False, continue_adapter: bool = True):
    """A causal language model to train.

    Returns:
        A PreTrainedModel; or, for an adapter folder with `continue_adapter`, a trainable PeftModel whose adapter goes on.
    """
    options = _load_options(model_args, trust_remote_code)
    if not is_adapter(name):
        model = AutoModelForCausalLM.from_pretrained(name, revision=_revision(name, model_args), **options)
        return fit_tokenizer(keep_4bit_layout(model), tokenizer)
    from peft import PeftConfig, PeftModel

    base_name = PeftConfig.from_pretrained(name).base_model_name_or_path
    with contextlib.nullcontext() if continue_adapter else loading_unsharded():
        base = AutoModelForCausalLM.from_pretrained(base_name, **options)
        base = fit_tokenizer(keep_4bit_layout(base), tokenizer)
        model = PeftModel.from_pretrained(base, name, is_trainable=continue_adapter)
        return model if continue_adapter else model.merge_and_unload().requires_grad_(True)  # PEFT froze it


def load_reward_model(name: str, tokenizer, model_args, trust_remote_code: bool = False):
    """A sequence classifier with one output, on the backbone of any model (policy, adapter or encoder).

    Returns:
        (model, names of the modules that are newly made and so must be trained and saved whole)
    """
    options = _load_options(model_args, trust_remote_code) | {"num_labels": 1, "output_loading_info": True}
    if not is_adapter(name):
        options["revision"] = _revision(name, model_args)
        return _load_classifier(name, tokenizer, options)
    policy = load_policy(name, tokenizer, model_args, trust_remote_code, continue_adapter=False)
    with loading_unsharded():
        model, new = _load_classifier(policy.config._name_or_path, tokenizer, options)
    model.base_model.load_state_dict(policy.base_model.state_dict())
    return model, new


def _load_classifier(name: str, tokenizer, options: dict[str, Any]):
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # "score is newly initialised, you should probably train this": that is the plan
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(name, **options)
    finally:
        logging.set_verbosity(before)
    model = fit_tokenizer(keep_4bit_layout(model), tokenizer)
    return model, sorted({key.rsplit(".", 1)[0] for key in info["missing_keys"]})


def load_nf4(name: str, tokenizer, dtype: torch.dtype, trust_remote_code: bool = False):
    """A frozen 4-bit copy of a whole model (NF4, doubly quantised), which computes in `dtype`."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        name, quantization_config=config, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    return fit_tokenizer(keep_4bit_layout(model), tokenizer).eval().requires_grad_(False)


def keep_4bit_layout(model):
    """Let bitsandbytes' layers on a CPU keep their weights in the layout that has a backward pass.

    bitsandbytes 0.50 lays 4-bit weights out anew in the first pass in eval mode, on CPUs with AVX512-BF16, and for good:
    from then on training goes through `gemv_4bit`, which gives no gradient, with a warning at most. Remove it once a layer
    in train mode goes back; tests/models/test_quant.py shows it.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    return model


def _load_options(model_args, trust_remote_code: bool) -> dict[str, Any]:
    from trl import get_quantization_config

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "use_safetensors": True}
    options["dtype"] = model_args.dtype if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype)
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    if quantization := get_quantization_config(model_args):
        options["quantization_config"] = quantization
    return options


def _revision(name: str, model_args) -> str:
    return "main" if Path(name).is_dir() else model_args.model_revision


def fit_tokenizer(model, tokenizer):
    """Make room for an added pad token and tell the model's configs about pad and EOS."""
    weight = model.get_input_embeddings().weight
    rows = unsharded_shape(weight)[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():  # a definite value (the mean), so that two loads of one model are the same model
            for layer in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
                with writable(layer.weight):
                    layer.weight[rows:] = layer.weight[:rows].mean(dim=0)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        stops = model.generation_config.eos_token_id
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in (
            stops if isinstance(stops, list) else [stops]
        ):
            model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model
