"""Load policies and reward models for training."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.distributed.sharding import loading_unsharded
from rlhf.models.folder import is_adapter, revision_of
from rlhf.models.place_holders import make_place_holders
from rlhf.models.tokenizer import fit_tokenizer


def load_policy(
    name: str, tokenizer, model_args, trust_remote_code: bool = False, continue_adapter: bool = True,
    merged: Path | None = None,
):  # fmt: skip
    """Load a causal language model for training.

    Args:
        merged: where an adapter that is not trained further is merged into its base, on disk.

    Returns:
        A PreTrainedModel; or, for an adapter folder with `continue_adapter`, a PeftModel with a trainable adapter.
    """
    options = _load_options(model_args, trust_remote_code)
    if not is_adapter(name) or not continue_adapter:
        revision = revision_of(name, model_args.model_revision)
        name = _merged(name, merged, options)
        return _load(AutoModelForCausalLM, name, tokenizer, options | {"revision": revision}, model_args.use_dora)[0]
    from peft import PeftConfig, PeftModel

    base_name = PeftConfig.from_pretrained(name).base_model_name_or_path
    base, _ = _load(AutoModelForCausalLM, base_name, tokenizer, options, model_args.use_dora)
    return PeftModel.from_pretrained(base, name, is_trainable=True)


def load_reward_model(name: str, tokenizer, model_args, trust_remote_code: bool = False, merged: Path | None = None):
    """Load a sequence classifier with one output, on the backbone of any model (policy, adapter or encoder).

    Args:
        merged: where an adapter is merged into its base, on disk.

    Returns:
        (model, names of the newly initialised modules, which must be fully trained and saved)
    """
    options = _load_options(model_args, trust_remote_code)
    options |= {"num_labels": 1, "revision": revision_of(name, model_args.model_revision)}
    name = _merged(name, merged, options)
    return _load(AutoModelForSequenceClassification, name, tokenizer, options, model_args.use_dora)


def _merged(name: str, folder: Path | None, options: dict[str, Any]) -> str:
    """The model itself; of an adapter the folder where it is merged, which loads, and is sharded, as any model."""
    if not is_adapter(name):
        return name
    from rlhf.models.merge import merge_for_training

    assert folder is not None  # the callers that may meet an adapter have a run folder
    dtype = options["dtype"] if isinstance(options["dtype"], torch.dtype) else None
    return merge_for_training(name, folder, dtype, options["trust_remote_code"])


def _load(auto, name: str, tokenizer, options: dict[str, Any], use_dora: bool = False) -> tuple[Any, list[str]]:
    """(model, names of its newly initialised modules); under FSDP2 its weights stay on disk until it is sharded."""
    from transformers.utils import logging

    from rlhf.models import four_bits, on_disk

    lazy = on_disk.stays_on_disk(name, auto, options, use_dora)
    quantisation = options.get("quantization_config") if lazy else None
    if quantisation is not None:
        options = {key: value for key, value in options.items() if key != "quantization_config"}
    elif "quantization_config" in options and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate leaves what is no float unsharded; it would shard other 4-bit weights, and cast their bytes
        options["quantization_config"].bnb_4bit_quant_storage = torch.uint8
    before = logging.get_verbosity()
    if auto is AutoModelForSequenceClassification:
        logging.set_verbosity_error()  # "score is newly initialised, you should probably train this": we do
    try:
        with on_disk.leaving_weights_on_disk() if lazy else _loading_on_every_rank() as more:
            model, info = auto.from_pretrained(name, output_loading_info=True, **options, **more)
    finally:
        logging.set_verbosity(before)
    if lazy:
        if quantisation is not None:
            four_bits.quantise_later(model, quantisation)
        make_place_holders(model)
        on_disk.read_buffers(model)
        if len(tokenizer) > len(model.get_input_embeddings().weight):
            on_disk.read_embeddings(model)
    new = {key.rsplit(".", 1)[0] for key in info["missing_keys"] if key not in (model.all_tied_weights_keys or ())}
    return fit_tokenizer(keep_4bit_layout(model), tokenizer), sorted(new)


@contextlib.contextmanager
def _loading_on_every_rank() -> Iterator[dict[str, Any]]:
    """Under FSDP: load on every rank alike. transformers would leave a new head of other ranks than 0 without values."""
    with loading_unsharded() if os.environ.get("ACCELERATE_USE_FSDP") == "true" else contextlib.nullcontext():
        yield {}


def load_nf4(name: str, tokenizer, dtype: torch.dtype, trust_remote_code: bool = False):
    """Load a frozen 4-bit copy of a full model (NF4, double quantisation) that computes in `dtype`."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    model, _ = _load(AutoModelForCausalLM, name, tokenizer, options | {"quantization_config": config})
    return model.eval().requires_grad_(False)


def keep_4bit_layout(model):
    """Keep bitsandbytes' 4-bit weights on CPUs in the layout that has a backward pass.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 converts the layout permanently in the first forward pass in eval mode:
    from then on training uses `gemv_4bit`, which has no gradient, with at most a warning. Remove this once layers in
    train mode convert back; tests/models/test_quant.py shows the problem.
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
