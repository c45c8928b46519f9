"""Tokenizers, policies and reward models: loading them for training, loading finished ones, writing them whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.data_utils import common_prefix_length

from rlhf import embedded
from rlhf.errors import RunFailed, UserError
from rlhf.files import read_json
from rlhf.model_folder import check_model_folder
from rlhf.precision import compute_dtype

TEMPLATES = Path(__file__).parent / "chat_templates"
PAD_CANDIDATES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")
NEW_PAD_TOKEN = "<|pad|>"
PROBE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]


# --- names -----------------------------------------------------------------------------------------------------------


def is_adapter(name: str) -> bool:
    """Whether a local folder holds a PEFT adapter instead of a whole model."""
    return (Path(name) / "adapter_config.json").is_file()


def base_of(name: str) -> str:
    """The model itself: an adapter's base, where the name is an adapter's folder."""
    if not is_adapter(name):
        return name
    base = (read_json(Path(name) / "adapter_config.json") or {}).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{Path(name) / 'adapter_config.json'} is damaged: it names no base_model_name_or_path")
    return base


def is_reward_model(name: str) -> bool:
    """Whether a local folder holds a sequence classifier, or an adapter for one."""
    for file, key, mark in (
        ("adapter_config.json", "task_type", "SEQ_CLS"),
        ("config.json", "architectures", "SequenceClassification"),
    ):
        if (Path(name) / file).is_file():
            return mark in str((read_json(Path(name) / file) or {}).get(key))
    return False


def locate(name: str, asked_by: str, made_by: str = "", say=print) -> str:
    """Check that a model is there before anything loads, and fetch the embedded one.

    Args:
        name: `embedded:…`, a local folder, or a hub id.
        asked_by: `recipe:line` where the name was given.
        made_by: the command that makes this folder, if it is known.

    Returns:
        A name that `from_pretrained` takes; local folders become absolute, so that adapters find their base later.

    Raises:
        UserError: a folder without a model, or a hub id that can't be reached.
    """
    name = embedded.resolve(name, say)
    path = Path(name).expanduser()
    if os.path.isdir(path):
        check_model_folder(path, asked_by, made_by)
        return str(path.resolve())
    if made_by:
        raise UserError(f"{asked_by}: no model at {name}; it is made by: {made_by}")
    try:
        AutoConfig.from_pretrained(name)
    except Exception as error:  # the hub's client raises a dozen kinds: offline, 404, gated, no config
        if "trust_remote_code" in str(error):
            return name
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{asked_by}: '{name}' is no local folder, and could not be loaded from the hub: {reason}"
        ) from None
    return name


# --- tokenizers ------------------------------------------------------------------------------------------------------


def load_tokenizer(name: str, chat_template: str | None = None, trust_remote_code: bool = False, encoder: bool = False):
    """A tokenizer with a chat template, and with a pad token that is not its end-of-sequence token.

    Args:
        name: a model that `locate` returned.
        chat_template: `alpaca`, `chatml` or a .jinja file; None takes the model's own, or alpaca where it has none.
        encoder: a BERT-like reward model, whose answers need not end with EOS.

    Raises:
        UserError: an unknown template, or one that never writes EOS, so that a policy would never learn to stop.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    elif not tokenizer.chat_template:
        tokenizer.chat_template = read_template("alpaca")
    ensure_pad_token(tokenizer)
    if not encoder:
        _check_template_ends(tokenizer)
    return tokenizer


def read_template(name: str) -> str:
    """The text of a chat template: `alpaca`, `chatml`, or a .jinja file."""
    path = TEMPLATES / f"{name}.jinja" if "/" not in name and not name.endswith(".jinja") else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
        raise UserError(f"chat_template: no template '{name}'; expected {known} or the path of a .jinja file")
    return path.read_text(encoding="utf-8")


def ensure_pad_token(tokenizer) -> None:
    """Give the tokenizer a dedicated pad token, from its own vocabulary where that has a fitting one.

    With pad = EOS a reward model would read its score one token too early (transformers looks for the last token that
    is not padding), and collators that mask by token would drop EOS from the labels.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    vocabulary = tokenizer.get_vocab()
    for token in PAD_CANDIDATES:
        if token in vocabulary and token not in (tokenizer.eos_token, tokenizer.bos_token):
            tokenizer.pad_token = token
            return
    tokenizer.add_special_tokens({"pad_token": NEW_PAD_TOKEN})


def _check_template_ends(tokenizer) -> None:
    prompt = tokenizer.apply_chat_template(PROBE[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(PROBE, return_dict=True)["input_ids"]
    if tokenizer.eos_token_id not in whole[len(prompt) :]:
        raise UserError(
            f"the chat template does not end an answer with the end-of-sequence token {tokenizer.eos_token!r} (it ends "
            f"with {tokenizer.decode(whole[-2:])!r}), so the model would never learn to stop; set `chat_template` in "
            "the recipe to one that does"
        )


def tokenize_pair(tokenizer, row: dict[str, Any]) -> dict[str, list[int]]:
    """Token ids of a canonical pair, exactly as TRL's DPOTrainer cuts them.

    Returns:
        {"prompt_ids", "chosen_ids", "rejected_ids"}: the prompt ends where the prompt alone and the prompt with an
        answer begin to differ.
    """
    render = lambda messages, **kw: tokenizer.apply_chat_template(messages, return_dict=True, **kw)["input_ids"]  # noqa: E731
    prompt = render(row["prompt"], add_generation_prompt=True)
    chosen, rejected = (render(row["prompt"] + row[side]) for side in ("chosen", "rejected"))
    cut = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
    return {"prompt_ids": prompt[:cut], "chosen_ids": chosen[cut:], "rejected_ids": rejected[cut:]}


# --- loading for training --------------------------------------------------------------------------------------------


def load_policy(name: str, tokenizer, model_args, trust_remote_code: bool = False, continue_adapter: bool = True):
    """A causal language model to train.

    Returns:
        A PreTrainedModel; or, for an adapter folder with `continue_adapter`, a trainable PeftModel whose adapter goes on.
    """
    options = _load_options(model_args, trust_remote_code)
    if not is_adapter(name):
        model = AutoModelForCausalLM.from_pretrained(name, revision=_revision(name, model_args), **options)
        return _fit_tokenizer(keep_4bit_layout(model), tokenizer)
    from peft import PeftConfig, PeftModel

    base_name = PeftConfig.from_pretrained(name).base_model_name_or_path
    with contextlib.nullcontext() if continue_adapter else unsplit():
        base = AutoModelForCausalLM.from_pretrained(base_name, **options)
        base = _fit_tokenizer(keep_4bit_layout(base), tokenizer)
        model = PeftModel.from_pretrained(base, name, is_trainable=continue_adapter)
        return model if continue_adapter else model.merge_and_unload().requires_grad_(True)  # PEFT froze it


@contextlib.contextmanager
def unsplit():
    """What is loaded here is whole on each process under ZeRO-3 too, and is split when training starts."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def _editable(parameter):
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


@contextlib.contextmanager
def whole_parameter(parameter):
    """The whole of a parameter that ZeRO-3 or FSDP2 has split over processes, all of which must ask; else itself."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data
    elif hasattr(parameter, "full_tensor"):
        yield parameter.full_tensor()
    else:
        yield parameter


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
    with unsplit():
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
    model = _fit_tokenizer(keep_4bit_layout(model), tokenizer)
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
    return _fit_tokenizer(keep_4bit_layout(model), tokenizer).eval().requires_grad_(False)


def keep_4bit_layout(model):
    """Let bitsandbytes' layers on a CPU keep their weights in the layout that has a backward pass.

    bitsandbytes 0.50 lays 4-bit weights out anew in the first pass in eval mode, on CPUs with AVX512-BF16, and for good:
    from then on training goes through `gemv_4bit`, which gives no gradient, with a warning at most. Remove it once a layer
    in train mode goes back; tests/test_quant.py shows it.
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


def _fit_tokenizer(model, tokenizer):
    """Make room for an added pad token and tell the model's configs about pad and EOS."""
    weight = model.get_input_embeddings().weight
    rows = getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 leaves a parameter of no size
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():  # a definite value (the mean), so that two loads of one model are the same model
            for layer in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
                with _editable(layer.weight):
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


# --- finished models -------------------------------------------------------------------------------------------------


def load_finished(
    name: str,
    reward: bool = False,
    dtype: str | None = None,
    device: str | torch.device = "cpu",
    quantization_config=None,
):
    """A finished model for inference: a whole model, or an adapter merged into its base.

    With `quantization_config` an adapter stays an adapter, on the base quantised as it was in training.

    Returns:
        (model in eval mode on `device`, tokenizer)
    """
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    options = {"dtype": getattr(torch, dtype) if dtype else "auto", "use_safetensors": True}
    if is_adapter(name):
        from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

        peft_auto = AutoPeftModelForSequenceClassification if reward else AutoPeftModelForCausalLM
        extra = {"num_labels": 1} if reward else {}
        if quantization_config is not None:
            extra["quantization_config"] = quantization_config
        model = peft_auto.from_pretrained(name, **options, **extra)
        model = model if quantization_config is not None else model.merge_and_unload()
    else:
        model = auto.from_pretrained(name, **options)
    tokenizer = load_tokenizer(name, encoder=reward)
    return _fit_tokenizer(keep_4bit_layout(model), tokenizer).to(device).eval(), tokenizer


def probe_logits(model, token_ids: list[list[int]]) -> list[torch.Tensor]:
    """Logits of a few rows, one row at a time (no padding): fp32 on the CPU, in eval mode."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([ids], device=device)).logits.float().cpu() for ids in token_ids]
    model.train(was_training)
    return found


def is_quantised(model) -> bool:
    """Whether a model's (or a PeftModel's base's) weights are in 4 or 8 bits."""
    return getattr(model.config, "quantization_config", None) is not None


def merge_adapter(model):
    """The base of a PeftModel with its adapter added to the weights; a 4-bit base is dequantised first.

    PEFT would round the sum to 4 bits again, and lose most of an adapter's small changes in that.
    """
    from peft.tuners.lora import LoraLayer

    if not is_quantised(model):
        return model.merge_and_unload()
    adapters = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").float()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    whole = model.unload().dequantize()
    with torch.no_grad():
        for name, delta in adapters.items():
            whole.get_submodule(name).weight += delta.to(whole.dtype)
    return whole


def save_finished(
    model,
    tokenizer,
    folder: Path,
    *,
    reward: bool,
    merge: bool,
    probe: list[list[int]],
    expected=None,
    exact: bool = True,
) -> dict[str, Any]:
    """Write a trained model so that plain transformers (or PEFT) loads it, load it again, compare, then put it in place.

    Args:
        model: the trained, unwrapped model; a PeftModel is merged first if `merge`.
        folder: where the files go; they appear there only after the comparison.
        probe: rows of token ids on which the written and the trained model must agree.
        expected: the trained model's logits on them, if they were taken from a model that is split over processes.
        exact: whether `expected` was computed in the dtype of the weights, without autocast.

    Returns:
        {"files": {name: bytes}, "weights_sha256": hex, "max_logit_difference": float, "max_logit": float,
        "bytes_before_dequantising": int, or None where nothing was}

    Raises:
        RunFailed: the written model disagrees with the trained one.
    """
    exact = exact and compute_dtype(model) == torch.float32
    expected = probe_logits(model, probe) if expected is None else expected
    device = next(model.parameters()).device
    is_peft = hasattr(model, "peft_config")
    if is_peft and "ref" in model.peft_config:
        model.delete_adapter("ref")
    quantised_bytes = model.get_memory_footprint() if is_quantised(model) else None
    if is_peft and merge:
        model = merge_adapter(model)
    partial = folder / ".partial-model"
    shutil.rmtree(partial, ignore_errors=True)
    options = {"selected_adapters": ["default"]} if is_peft and not merge else {}
    model.save_pretrained(partial, **options)
    (partial / "README.md").unlink(
        missing_ok=True
    )  # PEFT's, full of [More Information Needed]; rlhf/card.py writes one
    tokenizer.save_pretrained(partial)
    model.cpu()
    quantised = None if merge else getattr(model.config, "quantization_config", None)
    dtype = str(model.dtype).removeprefix("torch.")  # an adapter's base may be stored in another
    again, _ = load_finished(str(partial), reward=reward, dtype=dtype, device=device, quantization_config=quantised)
    difference = max(float((a - b).abs().max()) for a, b in zip(expected, probe_logits(again, probe), strict=True))
    largest = max(float(a.abs().max()) for a in expected)
    exact = (
        exact and quantised is None and next(again.parameters()).dtype == torch.float32
    )  # TRL trains QLoRA's adapter in bf16
    tolerance = (1e-3 if exact else 5e-2) * max(largest, 1.0)
    if not difference <= tolerance:
        raise RunFailed(
            f"the model in {partial} is not the one that was trained: its logits differ by {difference:.3g} "
            f"(allowed {tolerance:.3g}); it was left there for a look, the checkpoints are untouched"
        )
    files, digest = {}, hashlib.sha256()
    mode = (partial / "tokenizer_config.json").stat().st_mode  # safetensors lets nobody else read what it writes
    for file in sorted(partial.iterdir()):
        files[file.name] = file.stat().st_size
        if file.suffix == ".safetensors":
            with open(file, "rb") as weights:
                while block := weights.read(1 << 20):
                    digest.update(block)
        file.chmod(mode)
        os.replace(file, folder / file.name)
    partial.rmdir()
    return {
        "files": files, "weights_sha256": digest.hexdigest(),
        "max_logit_difference": difference, "max_logit": largest,
        "bytes_before_dequantising": quantised_bytes if merge else None,
    }  # fmt: skip
