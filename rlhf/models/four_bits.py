"""4-bit weights that FSDP2 shards: each rank reads its part of a weight, packs it, and holds no more.

bitsandbytes packs two weights into a byte and keeps the largest magnitude of each block of 64. FSDP2 shards parameters of
floats along their first dimension, and what it gathers are plain tensors, without what bitsandbytes keeps beside them. So a
sharded `Linear4bit` has two frozen parameters whose bytes FSDP2 takes for floats, `weight` (packed) and `absmax` (the
magnitudes), and a hook that makes a Params4bit of the two before the layer computes. The packed bytes are those that
bitsandbytes makes of the unsharded weight.

FSDP2 casts parameters to the dtype that it computes in, which would change the bytes: so they are taken for that dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlhf.distributed.sharding import is_sharded, unsharded

BLOCK = 64  # weights per magnitude: bitsandbytes' default, which transformers doesn't change
ABSMAX = "absmax"  # the parameter's name
Part = tuple[slice, ...]
Read = Callable[[Part | None], torch.Tensor]


def why_whole(model) -> str:
    """Why the linear layers of a model on the meta device can't be sharded in 4 bits; '' if they can.

    Args:
        model: not quantised yet.
    """
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if type(module) in (torch.nn.Linear, Conv1D) and module.weight.numel() % 8:
            return f"{name} has {module.weight.numel()} weights, which don't fill 4-byte numbers"
    return ""


def quantise_later(model, quantisation) -> None:
    """Replace the linear layers of a model on the meta device by 4-bit ones without weights, as transformers does.

    Args:
        quantisation: a BitsAndBytesConfig.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.quantizers.auto import AutoHfQuantizer

    biases = {f"{name}.bias": module.bias for name, module in model.named_modules() if hasattr(module, "bias")}
    quantizer: Any = AutoHfQuantizer.from_config(quantisation, pre_quantized=False)
    quantizer.validate_environment(device_map=None)
    quantizer.preprocess_model(model=model, device_map=None)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            layer.bias = biases[f"{name}.bias"]  # of the model's dtype
            before: Any = layer.weight
            number = before.numel()
            packed = torch.zeros(1, 1, dtype=torch.uint8).expand(number // 2, 1)
            place_holder: Any = Params4bit(
                packed, requires_grad=False, compress_statistics=before.compress_statistics, quant_type=before.quant_type,
                bnb_quantized=True,
            )  # fmt: skip
            place_holder.num_weights = number
            layer.weight = place_holder


def make_shardable(model, storage: torch.dtype) -> dict[str, Any]:
    """Give the 4-bit layers of `quantise_later` the parameters that FSDP2 shards, still without values.

    Args:
        storage: the dtype that FSDP2 casts to, or any of floats if it casts to none.

    Returns:
        The layers by name.
    """
    own = ((name, module, module._parameters.get("weight")) for name, module in model.named_modules())
    layers: dict[str, Any] = {name: module for name, module, weight in own if hasattr(weight, "num_weights")}
    for layer in layers.values():
        weights, nested = layer.weight.num_weights, layer.weight.compress_statistics
        layer.num_blocks, layer.nested, layer.quant_type = -(-weights // BLOCK), nested, layer.weight.quant_type
        layer.quant_storage = storage
        magnitudes = layer.num_blocks * (1 if nested else 4)
        layer.weight = _place_holder((weights // 2 // storage.itemsize, 1), storage)
        layer.register_parameter(ABSMAX, _place_holder((-(-magnitudes // storage.itemsize),), storage))
    return layers


def _place_holder(shape: tuple[int, ...], dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros((1,) * len(shape), dtype=dtype).expand(shape), requires_grad=False)


class Packer:
    """One layer's 4-bit weight, of which any part is read and packed when it is asked for.

    With double quantisation all ranks must make it, in the same order: it gathers the magnitudes, of which each rank reads a
    part, since they are quantised around their mean.
    """

    def __init__(self, layer, read: Read, dtype: torch.dtype, device):
        """
        Args:
            read: returns a part of the weight as it is in the file.
            dtype: that the model loads in, of which the weight is quantised.
            device: that quantises.
        """
        from bitsandbytes.functional import QuantState, get_4bit_type
        from transformers.pytorch_utils import Conv1D

        self._layer, self._read, self._dtype, self._device = layer, read, dtype, device
        self._transposed = issubclass(layer.source_cls, Conv1D)
        self._shape = torch.Size((layer.out_features, layer.in_features))
        state = QuantState(
            absmax=None, shape=self._shape, dtype=dtype, blocksize=BLOCK, quant_type=layer.quant_type,
            code=get_4bit_type(layer.quant_type, device=device),
        )  # fmt: skip
        self._nested = self._gather_and_compress(state) if layer.nested else None
        layer.quant_state = state

    def weight(self, part: Part) -> torch.Tensor:
        """Rows of the packed weight, (rows, 1) in the dtype that FSDP2 takes it for."""
        storage = self._layer.quant_storage
        start, stop = (2 * storage.itemsize * row for row in (part[0].start, part[0].stop))
        first, last = start // BLOCK, -(-stop // BLOCK)
        packed = self._quantise(first, last)[0].view(-1)
        return packed[(start - first * BLOCK) // 2 :][: (stop - start) // 2].clone().view(storage).view(-1, 1)

    def absmax(self, part: Part) -> torch.Tensor:
        """Entries of the magnitudes' bytes, in the dtype that FSDP2 takes them for."""
        storage = self._layer.quant_storage
        start, stop = (storage.itemsize * entry for entry in (part[0].start, part[0].stop))
        if self._nested is not None:
            found, offset = self._nested, start
        else:
            first, last = start // 4, min(-(-stop // 4), self._layer.num_blocks)
            found, offset = self._quantise(first, last)[1].view(torch.uint8), start - 4 * first
        found = found[offset:][: stop - start]
        return torch.nn.functional.pad(found, (0, stop - start - len(found))).view(storage)

    def _quantise(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(packed bytes, fp32 magnitudes) of blocks `first` to `last`."""
        from bitsandbytes.functional import quantize_4bit

        columns, stop = self._shape[1], min(last * BLOCK, self._shape.numel())
        rows = slice(first * BLOCK // columns, -(-stop // columns))
        read = self._read((slice(None), rows)).T if self._transposed else self._read((rows,))
        values = read.to(self._device, self._dtype).reshape(-1)[first * BLOCK - rows.start * columns :]
        values = values[: stop - first * BLOCK].contiguous()
        packed, state = quantize_4bit(values, blocksize=BLOCK, quant_type=self._layer.quant_type)
        return packed, state.absmax

    def _gather_and_compress(self, state) -> torch.Tensor:
        """The magnitudes in 8 bits, all of them; their own scales, a four-thousandth of the model's bytes, go into `state`."""
        from bitsandbytes.functional import quantize_blockwise

        from rlhf.distributed.processes import rank, world_size

        blocks, world = self._layer.num_blocks, world_size()
        share = -(-blocks // world)
        first, last = min(rank() * share, blocks), min((rank() + 1) * share, blocks)
        own = torch.zeros(share, device=self._device)
        if last > first:
            own[: last - first] = self._quantise(first, last)[1]
        found = [torch.empty_like(own) for _ in range(world)]
        if world > 1:
            torch.distributed.all_gather(found, own)
        absmax = torch.cat(found if world > 1 else [own])[:blocks]
        state.offset = absmax.mean()
        compressed, state.state2 = quantize_blockwise(absmax - state.offset, blocksize=256)
        state.nested = True
        return compressed


def finish_loading(layers: dict[str, Any]) -> None:
    """Let sharded layers compute, and be counted."""
    for layer in layers.values():
        layer.weight.num_weights, layer.absmax.num_weights = layer.quant_state.shape.numel(), 0
        layer.register_forward_pre_hook(_assemble)


def _assemble(layer, args) -> None:
    """Make what bitsandbytes computes with of the two parameters, once FSDP2 has gathered them.

    It shares their memory, which FSDP2 frees after the layer and fills again, for the backward pass too.
    """
    from bitsandbytes.nn import Params4bit

    if not isinstance(layer.weight, Params4bit):
        state = layer.quant_state
        state.absmax = _magnitudes(layer, layer.absmax)
        layer.weight = Params4bit(
            layer.weight.detach(), requires_grad=False, quant_state=state, compress_statistics=layer.nested,
            quant_type=layer.quant_type, quant_storage=layer.quant_storage, bnb_quantized=True,
        )  # fmt: skip


def _magnitudes(layer, absmax: torch.Tensor) -> torch.Tensor:
    found = absmax.detach().view(torch.uint8)[: layer.num_blocks * (1 if layer.nested else 4)]
    return found if layer.nested else found.view(torch.float32)


def dequantised(layer) -> torch.Tensor:
    """The weights of a quantised layer. A collective that all ranks must call if it is sharded."""
    from peft.utils.integrations import dequantize_module_weight

    if not is_sharded(layer.weight):
        return dequantize_module_weight(layer)
    from bitsandbytes.functional import dequantize_4bit

    with unsharded(layer.weight) as packed, unsharded(layer.absmax) as absmax:
        layer.quant_state.absmax = _magnitudes(layer, absmax)
        found = dequantize_4bit(packed, layer.quant_state)
        layer.quant_state.absmax = None  # it would keep them alive
    return found
