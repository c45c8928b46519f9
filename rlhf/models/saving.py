"""Save a trained model: write it, read it again, compare it with the trained one, and only then move it into place."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.distributed.processes import is_main, on_main
from rlhf.distributed.sharding import is_sharded, loading_unsharded, reshard, unsharded
from rlhf.errors import RunFailed
from rlhf.files import sha256_of
from rlhf.models.finished import is_quantised, probe_logits
from rlhf.models.pieces import ADAPTER, Tensors, base_model
from rlhf.models.precision import compute_dtype
from rlhf.models.tokenizer import fit_tokenizer, load_tokenizer
from rlhf.models.writing import PARTIAL, Written, clear, place, write_model


class Saved(NamedTuple):
    """What `save_finished` has written.

    Attributes:
        files: bytes by name.
        dtype, weights_sha256: of the weights (writing.py).
        max_logit: the largest logit of the trained model on the probe.
        max_logit_difference: between it and the written model; None for the adapter of a sharded model, which was
            compared tensor by tensor instead.
        bytes_before_dequantising: of the 4- or 8-bit model that was merged; None if nothing was dequantised.
    """

    files: dict[str, int]
    dtype: str
    weights_sha256: str
    max_logit: float
    max_logit_difference: float | None
    bytes_before_dequantising: int | None


def save_finished(
    model,
    tokenizer,
    folder: Path,
    *,
    reward: bool,
    merge: bool,
    probe: list[list[int]],
    dtype: torch.dtype | None = None,
    made_from: str = "",
    exact: bool = True,
    trust_remote_code: bool = False,
) -> Saved | None:
    """Save a trained model for plain transformers (or PEFT). A collective that all ranks must call.

    No rank holds a second model: the weights are written piece by piece, the files by all ranks, and the written model is
    compared with each layer read from disk when it is computed.

    Args:
        model: the trained, unwrapped model, whatever shards it; a PeftModel is merged if `merge`.
        folder: where the files go, on a file system that all ranks see.
        probe: rows of token ids on which the saved and the trained model must agree.
        dtype: of the written weights; None: of the model's. An adapter keeps its own.
        made_from: identifies the trained weights, so that an interrupted call is continued; '' if nothing does.
        trust_remote_code: to read the model again.
        exact: whether the model computes in the dtype of its weights, without autocast.

    Returns:
        What was written, on the main rank; None on the others.

    Raises:
        RunFailed: the disk is full, or the saved model differs from the trained one (on the main rank).
        RankFailed: the same on the others.
    """
    expected = probe_logits(model, probe)
    reshard(model)
    exact = exact and compute_dtype(model) == torch.float32
    partial, found = folder / PARTIAL, dict[str, Any]()
    found["max_logit"] = float(torch.stack([logits.abs().max() for logits in expected]).max())

    def compare(written: Path) -> None:
        logits = offloaded_logits(written, probe, reward, next(model.parameters()).device, trust_remote_code)
        found["max_logit_difference"] = _compare(logits, expected, exact and dtype == torch.float32, written)

    def finish_adapter() -> None:
        assert kept is not None  # on the main rank
        clear(partial, [])
        write_adapter(model, tokenizer, partial, kept)
        found["max_logit_difference"] = None
        if not any(map(is_sharded, model.parameters())):
            logits = adapter_logits(model, partial, probe)
            found["max_logit_difference"] = _compare(logits, expected, exact and not is_quantised(model), partial)
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        held = str(next(iter(kept.values())).dtype).removeprefix("torch.")
        written.append(Written(files, held, sha256_of(partial / "adapter_model.safetensors")))

    written: list[Written] = []
    before = None
    if hasattr(model, "peft_config") and not merge:
        kept = gather_adapter(model)
        on_main(finish_adapter)
    else:
        dtype = dtype or base_model(model).dtype
        before = model.get_memory_footprint() if is_quantised(model) else None
        written += filter(None, [write_model(model, tokenizer, partial, dtype, made_from, compare=compare)])
    on_main(lambda: place(partial, folder))
    return Saved(*written[0], **found, bytes_before_dequantising=before) if written else None


# --- full models -----------------------------------------------------------------------------------------------------


def offloaded_logits(
    folder: Path, probe: list[list[int]], reward: bool, device, trust_remote_code: bool = False
) -> list[torch.Tensor]:
    """Logits of the written model, loaded as anyone would, but with each layer read from disk when it is computed.

    On the GPU, whose memory training has left almost full: where a layer finds no room, on the CPU.
    """
    try:
        return _offloaded_logits(folder, probe, reward, str(device), trust_remote_code)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    return _offloaded_logits(folder, probe, reward, "cpu", trust_remote_code)


def _offloaded_logits(
    folder: Path, probe: list[list[int]], reward: bool, device: str, trust_remote_code: bool
) -> list[torch.Tensor]:
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    beside = folder / "offloaded"  # only for layouts that transformers converts
    options: dict[str, Any] = {
        "device_map": {"": "disk"},
        "offload_folder": beside,
        "trust_remote_code": trust_remote_code,
    }
    with loading_unsharded(), _computing_on(device):
        model = auto.from_pretrained(folder, dtype="auto", use_safetensors=True, **options)
    try:
        fit_tokenizer(model, load_tokenizer(str(folder), trust_remote_code=trust_remote_code, encoder=reward))
        return probe_logits(model, probe, device)
    finally:
        del model
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def _computing_on(device: str) -> Iterator[None]:
    """Where a model that is all on disk computes. transformers 5.23 doesn't hand that on: it would be the CPU, for hours."""
    from accelerate import dispatch_model
    from transformers import modeling_utils

    def dispatch(model, hf_quantizer, device_map, offload_folder, offload_index, offload_buffers) -> None:
        skipped = model._skip_keys_device_placement
        dispatch_model(
            model, device_map, main_device=device, offload_dir=offload_folder, offload_index=offload_index, skip_keys=skipped
        )  # fmt: skip

    before = modeling_utils.accelerate_dispatch
    modeling_utils.accelerate_dispatch = dispatch
    try:
        yield
    finally:
        modeling_utils.accelerate_dispatch = before


# --- adapters --------------------------------------------------------------------------------------------------------


def gather_adapter(model) -> Tensors | None:
    """The trained tensors of a PeftModel, unsharded, in host memory of the main rank; None on the others.

    With resized embeddings also those, which PEFT saves beside the adapter. A collective that all ranks must call.
    """
    embeddings = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
    kept = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad or f".{ADAPTER}." in name or id(parameter) in embeddings:
            with unsharded(parameter) as full:
                if is_main():
                    kept[name] = full.detach().to("cpu", copy=True)
    return kept if is_main() else None


def write_adapter(model, tokenizer, folder: Path, kept: Tensors) -> None:
    """Write the adapter as PEFT does, read it again, and compare every tensor.

    Raises:
        RunFailed: a tensor differs.
    """
    from peft import get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    model.save_pretrained(folder, selected_adapters=[ADAPTER], state_dict=kept)
    (folder / "README.md").unlink(missing_ok=True)  # full of [More Information Needed]; rlhf/runs/card.py writes one
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):  # which safetensors writes for their owner only
        path.chmod((folder / "tokenizer_config.json").stat().st_mode)
    written, wanted = load_peft_weights(str(folder), device="cpu"), get_peft_model_state_dict(model, kept, ADAPTER)
    for name in wanted.keys() | written.keys():
        same = name in wanted and name in written and torch.equal(wanted[name].cpu(), written[name])
        if not same:
            raise RunFailed(f"{name} of the adapter in {folder} differs from the trained one; check the disk")


def adapter_logits(model, folder: Path, probe: list[list[int]]) -> list[torch.Tensor]:
    """Logits with the adapter that was written, loaded beside the trained one on the same base."""
    model.load_adapter(str(folder), adapter_name="written")
    model.set_adapter("written")
    try:
        return probe_logits(model, probe)
    finally:
        model.set_adapter(ADAPTER)
        model.delete_adapter("written")


# --- comparing -------------------------------------------------------------------------------------------------------


def _compare(found: list[torch.Tensor], expected: list[torch.Tensor], exact: bool, partial: Path) -> float:
    """The largest absolute difference; NaN if there is one, which Python's `max` finds only where it comes first.

    Raises:
        RunFailed: it is more than rounding.
    """
    difference = float(torch.stack([(a - b).abs().max() for a, b in zip(found, expected, strict=True)]).max())
    largest = float(torch.stack([logits.abs().max() for logits in expected]).max())
    tolerance = (1e-3 if exact else 5e-2) * max(largest, 1.0)
    if not difference <= tolerance:
        raise RunFailed(
            f"the model in {partial} differs from the trained one: its logits differ by {difference:.3g} "
            f"(allowed {tolerance:.3g}); it was kept there for inspection, and the checkpoints are untouched"
        )
    return difference
