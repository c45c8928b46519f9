"""Finished models: load them for inference, and save them with a check that the saved model equals the trained one."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.errors import RunFailed
from rlhf.models.folder import is_adapter
from rlhf.models.loading import fit_tokenizer, keep_4bit_layout
from rlhf.models.precision import compute_dtype
from rlhf.models.tokenizer import load_tokenizer


def load_finished(
    name: str,
    reward: bool = False,
    dtype: str | None = None,
    device: str | torch.device = "cpu",
    quantization_config=None,
):
    """Load a finished model for inference: a full model, or an adapter merged into its base.

    With `quantization_config` an adapter is not merged, and its base is quantised as in training.

    Returns:
        (model in eval mode on `device`, tokenizer)
    """
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": getattr(torch, dtype) if dtype else "auto", "use_safetensors": True}
    if is_adapter(name):
        from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

        peft_auto = AutoPeftModelForSequenceClassification if reward else AutoPeftModelForCausalLM
        extra: dict[str, Any] = {"num_labels": 1} if reward else {}
        if quantization_config is not None:
            extra["quantization_config"] = quantization_config
        model = peft_auto.from_pretrained(name, **options, **extra)
        model = model if quantization_config is not None else model.merge_and_unload()
    else:
        model = auto.from_pretrained(name, **options)
    tokenizer = load_tokenizer(name, encoder=reward)
    return fit_tokenizer(keep_4bit_layout(model), tokenizer).to(device).eval(), tokenizer


def probe_logits(model, token_ids: list[list[int]]) -> list[torch.Tensor]:
    """Logits of a few rows, one row at a time (no padding), in eval mode; returned as fp32 on the CPU."""
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
    """The base of a PeftModel with its adapter added to the weights; a 4-bit base is dequantised first, in host memory.

    PEFT would round the sum to 4 bits again, and lose most of an adapter's small changes in that. Beyond the dequantised
    weights one adapted matrix is held at a time, and nothing on the GPU, where training has left little room.
    """
    from peft.tuners.lora import LoraLayer

    if not is_quantised(model):
        return model.merge_and_unload()
    adapted: dict[str, Any] = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    merged = model.cpu().unload().dequantize()
    with torch.no_grad():
        for name, layer in adapted.items():
            merged.get_submodule(name).weight += layer.get_delta_weight("default").float().to(merged.dtype)
    return merged


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
    """Save a trained model for plain transformers (or PEFT): write it, load it again, compare, then move it into place.

    Args:
        model: the trained, unwrapped model; a PeftModel is merged first if `merge`.
        folder: where the files go; they appear there only after the comparison.
        probe: rows of token ids on which the saved and the trained model must agree.
        expected: the trained model's logits on them, if they were computed on a sharded model.
        exact: whether `expected` was computed in the dtype of the weights, without autocast.

    Returns:
        {"files": {name: bytes}, "weights_sha256": hex, "max_logit_difference": float, "max_logit": float,
        "bytes_before_dequantising": int, or None if nothing was dequantised}

    Raises:
        RunFailed: the saved model differs from the trained one.
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
    # PEFT's is full of [More Information Needed]; rlhf/runs/card.py writes one
    (partial / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(partial)
    model.cpu()
    quantised = None if merge else getattr(model.config, "quantization_config", None)
    dtype = str(model.dtype).removeprefix("torch.")  # an adapter's base may be stored in another dtype
    again, _ = load_finished(str(partial), reward=reward, dtype=dtype, device=device, quantization_config=quantised)
    difference = _largest(a - b for a, b in zip(expected, probe_logits(again, probe), strict=True))
    largest = _largest(expected)
    exact = (
        exact and quantised is None and next(again.parameters()).dtype == torch.float32
    )  # TRL trains QLoRA's adapter in bf16
    tolerance = (1e-3 if exact else 5e-2) * max(largest, 1.0)
    if not difference <= tolerance:
        raise RunFailed(
            f"the model in {partial} differs from the trained one: its logits differ by {difference:.3g} "
            f"(allowed {tolerance:.3g}); it was kept there for inspection, and the checkpoints are untouched"
        )
    files, digest = {}, hashlib.sha256()
    mode = (partial / "tokenizer_config.json").stat().st_mode  # safetensors writes files that only their owner can read
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


def _largest(tensors: Iterable[torch.Tensor]) -> float:
    """The largest absolute value; NaN if there is one, which Python's `max` finds only where it comes first."""
    return float(torch.stack([tensor.abs().max() for tensor in tensors]).max())
