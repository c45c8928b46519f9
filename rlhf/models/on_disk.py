"""Models whose weights stay on disk until FSDP2 has sharded them: then each rank reads its own part of every tensor.

transformers 5.23 reads the whole model on every rank, and accelerate sends rank 0's to the others. Here the parameters are
place-holders of one element each while the trainer is built (LoRA, packing, the head), and accelerate's hand-over is replaced
by reading slices of the safetensors files. No rank holds more than its shards and the tensor that it is reading.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from packaging import version
from transformers import AutoConfig

from rlhf.distributed.processes import is_main, rank, say, world_size
from rlhf.distributed.sharding import is_sharded, loading_unsharded
from rlhf.models import four_bits
from rlhf.models.converted import Converted, Entry, Part, converts_tensors, noting_conversions, unknown_operation
from rlhf.models.digests import local_folder
from rlhf.models.folder import weight_files
from rlhf.models.pieces import ADAPTER, base_model
from rlhf.models.place_holders import is_place_holder

INDEX = "weights_on_disk"  # the attribute of a model: an Index
Index = dict[str, Entry | Converted]  # by a parameter's name


def stays_on_disk(name: str, auto, options: dict[str, Any], use_dora: bool = False) -> bool:
    """Whether a model's weights are read when it is sharded; says why if they can't be.

    Args:
        auto: `AutoModelForCausalLM`, ...
        options: for its `from_pretrained`.
        use_dora: whether DoRA's magnitudes will be computed from the weights.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if not fsdp and ("quantization_config" in options or not is_deepspeed_zero3_enabled()):
        return False
    if reason := _why_whole(name, auto, options, use_dora) if fsdp else _why_whole_under_zero3(name, auto, options):
        if is_main():
            always = " and then, in 4 bits," if "quantization_config" in options else ""
            size = sum(file.stat().st_size for file in weight_files(local_folder(name, options.get("revision"))))
            say(
                f"note: each process holds all of {name}, {size / 1e9:.2f} GB of files, while it loads{always}: {reason}"
            )
    return fsdp and not reason


def _why_whole(name: str, auto, options: dict[str, Any], use_dora: bool) -> str:
    """Why a model's weights can't be read when FSDP2 has sharded it; '' if they can."""
    config = _config(name, options)
    if hasattr(config, "quantization_config"):
        return "its files are quantised"
    model = _without_weights(config, auto, options)
    if operation := unknown_operation(model):
        return f"transformers converts its tensors by {operation}, which is not known to work on a part of them"
    if "quantization_config" not in options:
        return ""
    return "DoRA's magnitudes are those of the 4-bit weights" if use_dora else four_bits.why_whole(model)


def _why_whole_under_zero3(name: str, auto, options: dict[str, Any]) -> str:
    """transformers loads under ZeRO-3 itself: tensor by tensor, and since 5.23 conversion by conversion too."""
    if version.parse(transformers.__version__) >= version.parse("5.23.0"):
        return ""
    if not converts_tensors(_without_weights(_config(name, options), auto, options)):
        return ""
    return f"transformers {transformers.__version__} converts its tensors all at once; 5.23 does it one by one"


def _config(name: str, options: dict[str, Any]):
    given = {key: options[key] for key in ("trust_remote_code", "revision") if key in options}
    return AutoConfig.from_pretrained(name, **given)


def _without_weights(config, auto, options: dict[str, Any]):
    """A model on the meta device."""
    with loading_unsharded(), torch.device("meta"):
        return auto.from_config(config, trust_remote_code=options["trust_remote_code"])


@contextlib.contextmanager
def leaving_weights_on_disk() -> Iterator[dict[str, Any]]:
    """Inside the block `from_pretrained(**options)` reads no weights, for the yielded options.

    It is transformers' loading with every module on `disk`, without the hooks that would read a module when it computes.
    Parameters that are not in the files, such as a new head, are initialised as ever.
    """
    from transformers import modeling_utils

    def keep_index(model, hf_quantizer, device_map, offload_folder, offload_index, offload_buffers) -> None:
        setattr(model, INDEX, offload_index)

    before = modeling_utils.accelerate_dispatch
    modeling_utils.accelerate_dispatch = keep_index
    with loading_unsharded(), tempfile.TemporaryDirectory() as unused, noting_conversions():
        try:
            yield {"device_map": {"": "disk"}, "offload_folder": unused}
        finally:
            modeling_utils.accelerate_dispatch = before


def index_of(name: str, auto, options: dict[str, Any]) -> Index:
    """What each tensor of a model is read from, without reading any.

    Args:
        auto: `AutoModelForCausalLM`, ...
        options: for its `from_pretrained`.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # a head that is in the adapter's files
    try:
        with leaving_weights_on_disk() as more:
            return getattr(auto.from_pretrained(name, **options, **more), INDEX)
    finally:
        logging.set_verbosity(before)


def read_buffers(model) -> None:
    """Read the buffers that are in the files: FSDP2 does not shard them."""
    index = getattr(model, INDEX)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            module, _, own = name.rpartition(".")
            model.get_submodule(module)._buffers[own] = read_part(index[name], None).to(buffer.dtype)


def read_embeddings(model) -> None:
    """Read the embeddings and the LM head, which a new token will resize."""
    index = getattr(model, INDEX)
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False) if name in index}
    made: dict[int, torch.nn.Parameter] = {}
    for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
        key = id(layer.weight)
        if key not in made:
            made[key] = torch.nn.Parameter(read_part(index[names[key]], None).to(layer.weight.dtype))
        layer.weight = made[key]


def shard_model(model, accelerator) -> None:
    """Shard a model by accelerate's FSDP2 plugin, layer by layer; weights that are on disk are read as shards.

    A collective that all ranks must call.
    """
    from accelerate.utils import fsdp_utils

    plugin = accelerator.state.fsdp_plugin
    index = getattr(base_model(model), INDEX, None)
    if index is not None:
        plugin.cpu_ram_efficient_loading = True  # the path that shards on the meta device
        _compute_magnitudes(model, index, accelerator.device)
    if plugin.activation_checkpointing:
        plugin.set_auto_wrap_policy(model)
        fsdp_utils.fsdp2_apply_ac(accelerator, model)
    computed_in = plugin.mixed_precision_policy and plugin.mixed_precision_policy.param_dtype
    quantised = four_bits.make_shardable(model, computed_in or torch.float32)
    # TRL keeps an adapter on 4 bits in bf16 under every engine; accelerate would make it fp32 under this one
    kept = {n: p.dtype for n, p in model.named_parameters() if quantised and p.requires_grad and "lora_" in n}
    before = fsdp_utils.fsdp2_load_full_state_dict
    fsdp_utils.fsdp2_load_full_state_dict = lambda accelerator, model, values, cpu_offload=False: _load_shards(
        accelerator, model, values, _OnDisk(index or {}, quantised, kept), cpu_offload
    )
    try:
        fsdp_utils.fsdp2_prepare_model(accelerator, model)
    finally:
        fsdp_utils.fsdp2_load_full_state_dict = before
    four_bits.finish_loading(quantised)
    # torch notes the dtypes of trained parameters in the first forward pass: a reference's has LoRA switched off
    model._get_fsdp_state()._lazy_init()


def _compute_magnitudes(model, index: Index, device) -> None:
    """DoRA's magnitudes, which PEFT has computed from place-holders: each layer's by one rank, which reads its weight."""
    base = base_model(model)
    found = [
        (f"{name}.weight", layer, adapter)
        for name, layer in base.named_modules()
        for adapter, dora in (getattr(layer, "lora_magnitude_vector", None) or {}).items()
        if dora.weight.isnan().any()
    ]
    for number, (name, layer, adapter) in enumerate(found):
        if number % world_size() == rank():
            _compute_magnitude(layer, adapter, read_part(index[name], None))
    if world_size() > 1:
        for number, (_, layer, adapter) in enumerate(found):
            magnitudes = layer.lora_magnitude_vector[adapter].weight.data
            sent = magnitudes.to(device)  # NCCL sends no host memory
            torch.distributed.broadcast(sent, src=number % world_size())
            magnitudes.copy_(sent)


def _compute_magnitude(layer, adapter: str, weight: torch.Tensor) -> None:
    """By PEFT, in the dtype of the base's weights, as where they are loaded whole."""
    base, dora = layer.get_base_layer(), layer.lora_magnitude_vector[adapter]
    place_holder, before = base.weight, dora.weight
    kind = "lora_" if adapter in layer.lora_A else "lora_embedding_"
    factors = {side: getattr(layer, f"{kind}{side}")[adapter] for side in "AB"}
    factors = {f"lora_{side}": getattr(f, "weight", f).to(place_holder.dtype) for side, f in factors.items()}
    base.weight = torch.nn.Parameter(weight.to(place_holder.dtype), requires_grad=False)
    try:
        with torch.no_grad():
            dora.update_layer(base_layer=base, scaling=layer.scaling[adapter], **factors)
    finally:
        base.weight = place_holder
    before.data = dora.weight.data.to(before.dtype)
    dora.weight = before


class _OnDisk(NamedTuple):
    """What `_load_shards` reads.

    Attributes:
        entries: of the model (INDEX).
        quantised: the 4-bit layers by name.
        dtypes: of parameters that accelerate has cast.
    """

    entries: Index
    quantised: dict[str, Any]
    dtypes: dict[str, torch.dtype]


def _load_shards(accelerator, model, values: dict[str, Any], on_disk: _OnDisk, cpu_offload: bool) -> None:
    """In place of accelerate's `fsdp2_load_full_state_dict`, which sends rank 0's `values` to all.

    Args:
        values: by name, the same on all ranks, or place-holders for what is on disk.
    """
    loaded, tied = {}, dict[Any, Any]()  # by the value's memory: what a file maps shares a storage, and is not tied
    packers = _packers(accelerator, on_disk)
    for name, parameter in model.state_dict().items():
        value, device = values[name], "cpu" if cpu_offload else accelerator.device
        layer, _, last = name.rpartition(".")
        if layer in on_disk.quantised and last in ("weight", four_bits.ABSMAX):
            loaded[name] = _shard(parameter, device, getattr(packers(layer), last))
            continue
        if not is_sharded(parameter):
            loaded[name] = value.to(device)
        elif value.numel() and (place := (value.data_ptr(), value.shape)) in tied:
            loaded[name] = tied[place]
        elif (entry := on_disk.entries.get(_name_on_disk(name))) and is_place_holder(value):
            loaded[name] = _shard(parameter, device, functools.partial(read_part, entry))
        else:
            loaded[name] = _shard(parameter, device, value.__getitem__, on_disk.dtypes.get(name))
        tied[value.data_ptr(), value.shape] = loaded[name]
    model.load_state_dict(loaded, assign=True)


def _packers(accelerator, on_disk: _OnDisk) -> Callable[[str], four_bits.Packer]:
    """By a 4-bit layer's name what packs its weight; of the last one, since it may hold all magnitudes of the layer."""

    @functools.lru_cache(maxsize=1)
    def packer(name: str) -> four_bits.Packer:
        entry = on_disk.entries[_name_on_disk(f"{name}.weight")]
        dtype = entry.dtype if isinstance(entry, Converted) else getattr(torch, entry["dtype"])
        read = functools.partial(read_part, entry)
        return four_bits.Packer(on_disk.quantised[name], read, dtype, accelerator.device)

    return packer


def _name_on_disk(name: str) -> str:
    """A parameter's name without what PEFT and activation checkpointing put into it."""
    name = name.replace("_checkpoint_wrapped_module.", "").removeprefix("base_model.model.")
    name = name.replace("base_layer.", "")  # several of experts, of which each tensor has an adapter
    return name.replace(".original_module.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")


def _shard(parameter, device, part_of: Callable[[tuple[slice, ...]], torch.Tensor], dtype: torch.dtype | None = None):
    """This rank's shard of a tensor, in the place of a DTensor on the meta device.

    Args:
        part_of: returns a part of the unsharded tensor.
        dtype: if it is not the parameter's.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    part = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    local = part_of(part) if all(shape) else torch.empty(shape)
    local = local.to(device, dtype or parameter.dtype, copy=True)  # a view would keep the whole tensor alive
    return DTensor.from_local(
        local.contiguous(), mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def read_part(entry: Entry | Converted, part: Part | None) -> torch.Tensor:
    """A part of a parameter, as the model has it; None: all of it."""
    return entry.make(part, _read) if isinstance(entry, Converted) else _read(entry, part)


def _read(entry: Entry, part: Part | None) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(entry["safetensors_file"], "pt") as file:
        if part is None or not part:
            return file.get_tensor(entry["weight_name"])
        return file.get_slice(entry["weight_name"])[part]
