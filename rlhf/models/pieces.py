"""The tensors of a trained model as plain transformers will load it, each made when it is asked for.

A model that is trained may be sharded, hold LoRA adapters, or be in 4 bits. Its finished form is listed here as pieces:
one tensor, or one adapted layer whose adapter is added to its weight. A piece holds nothing until it is fetched, so that a
finished model is never in memory: only the piece that is being written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rlhf.distributed.sharding import is_sharded, unsharded, unsharded_shape
from rlhf.models.counts import is_added
from rlhf.models.four_bits import ABSMAX, dequantised
from rlhf.models.place_holders import is_place_holder

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

Tensors = dict[str, torch.Tensor]
Read = Callable[[str], torch.Tensor]
ADAPTER = "default"  # PEFT's name of the one that is trained


class Piece(NamedTuple):
    """A part of the finished model.

    Attributes:
        tensors: its tensors by name, on the meta device: shape and dtype.
        fetch: makes them in host memory. All ranks must call it, in the same order; returns None where the argument is
            False, which is for ranks that only take part.
    """

    tensors: Tensors
    fetch: Callable[[bool], Tensors | None]


def list_pieces(model, dtype: torch.dtype, read: Read | None = None) -> list[Piece]:
    """The pieces of a model, in the order of its parameters, in the names and layout of its checkpoint's format.

    Args:
        model: a PreTrainedModel, or a PeftModel whose LoRA adapter is to be merged.
        dtype: of the finished floating-point tensors.
        read: returns a parameter's value by its name, where it has only a place-holder (place_holders.py).
    """
    base = base_model(model)
    return in_file_format(base, [*_parameters(base, dtype, read), *_buffers(base, dtype)])


def base_model(model) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _parameters(base, dtype: torch.dtype, read: Read | None) -> Iterator[Piece]:
    from peft.tuners.lora import LoraLayer

    layers = {f"{name}.": module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    tied, seen = set(getattr(base, "all_tied_weights_keys", None) or ()), set()
    parameters = list(base.named_parameters(remove_duplicate=False))
    count: dict[int, int] = {}
    for _, parameter in parameters:
        count[id(parameter)] = count.get(id(parameter), 0) + 1
    merged = set()
    for name, parameter in parameters:
        final = _final_name(name)
        if (prefix := _layer_of(name, layers)) is not None:
            if prefix not in merged:  # all of its base's parameters at once
                merged.add(prefix)
                yield _merged_layer(prefix, layers[prefix], dtype, read)
        elif final is None or _ignored(base, final):
            continue
        elif count[id(parameter)] > 1 and (final in tied or id(parameter) in seen):
            continue  # transformers ties it again when it loads
        else:
            yield _one(final, parameter, base.get_submodule(name.rpartition(".")[0]), dtype, read)
        seen.add(id(parameter))


def _layer_of(name: str, layers: dict[str, LoraLayer]) -> str | None:
    """The prefix of the LoRA layer that a parameter is in."""
    end = -1
    while (end := name.find(".", end + 1)) >= 0:
        if name[: end + 1] in layers:
            return name[: end + 1]
    return None


def _final_name(name: str) -> str | None:
    """Without PEFT's additions: of a fully trained module the trained copy counts; None for what is left out."""
    if ".original_module." in name or name.endswith(f".{ABSMAX}"):
        return None
    if ".modules_to_save." not in name:
        return name
    before, _, after = name.partition(".modules_to_save.")
    adapter, _, rest = after.partition(".")
    return f"{before}.{rest}" if adapter == ADAPTER else None


def _ignored(base, name: str) -> bool:
    return name in (base._keys_to_ignore_on_save or ())


def _buffers(base, dtype: torch.dtype) -> Iterator[Piece]:
    transient = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in base.named_modules()
        for name in module._non_persistent_buffers_set
    }
    for name, buffer in base.named_buffers():
        if name not in transient and not _ignored(base, name):
            yield _one(name, buffer, None, dtype)


def _one(name: str, tensor: torch.Tensor, module, dtype: torch.dtype, read: Read | None = None) -> Piece:
    quantised = _is_quantised(tensor)
    shape = _shape(tensor, module)
    dtype = dtype if quantised or tensor.is_floating_point() else tensor.dtype

    def fetch(keep: bool) -> Tensors | None:
        if quantised:
            found = dequantised(module) if keep or is_sharded(tensor) else None
            return {name: _to_host(found, dtype)} if keep and found is not None else None
        with unsharded(tensor) as full:
            return {name: _to_host(_real(full, name, read), dtype)} if keep else None

    return Piece({name: torch.empty(shape, dtype=dtype, device="meta")}, fetch)


def _is_quantised(tensor) -> bool:
    return getattr(tensor, "quant_state", None) is not None or hasattr(tensor, "CB") or hasattr(tensor, "num_weights")


def _shape(tensor, module) -> tuple[int, ...]:
    """As the finished model has it: of a 4-bit weight what its layer keeps."""
    state = getattr(module if hasattr(tensor, "num_weights") else tensor, "quant_state", None)
    return tuple(state.shape) if state is not None else unsharded_shape(tensor)


def _real(tensor: torch.Tensor, name: str, read: Read | None) -> torch.Tensor:
    return read(name) if read is not None and is_place_holder(tensor) else tensor


def _to_host(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _merged_layer(prefix: str, layer: Any, dtype: torch.dtype, read: Read | None) -> Piece:
    """An adapted layer: its base's parameters with the adapters added in float32, then rounded once.

    Adapters of single parameters (experts) wrap each other: `layer` is the outermost.
    """
    own = {n: p for n, p in layer.named_parameters() if not is_added(n) or f".{ADAPTER}" in n}
    own = {n: p for n, p in own.items() if not n.endswith(f".{ABSMAX}")}
    final = {name: prefix + name.replace("base_layer.", "") for name in own if not is_added(name)}
    tensors = {
        final[name]: torch.empty(_shape(own[name], layer.get_base_layer()), dtype=dtype, device="meta") for name in final
    }  # fmt: skip
    weight = getattr(layer.get_base_layer(), "weight", None)
    quantised = weight is not None and _is_quantised(weight)
    others = {name: p for name, p in own.items() if not (quantised and name == "base_layer.weight")}

    def fetch(keep: bool) -> Tensors | None:
        with contextlib.ExitStack() as stack:
            full = {name: stack.enter_context(unsharded(p)) for name, p in others.items()}
            base = dequantised(layer.get_base_layer()) if quantised and (keep or is_sharded(weight)) else None
            if not keep:
                return None
            values = {
                name: _real(tensor, final.get(name, name), read).detach().to("cpu", torch.float32, copy=True)
                for name, tensor in full.items()
            }
            found = _merge(layer, values) if base is None else _merge_quantised(layer, values, base)
        return {final[name]: _to_host(found[name], dtype) for name in final}

    return Piece(tensors, fetch)


def _merge(layer, values: Tensors) -> Tensors:
    """PEFT's own merge, on `values` in place of the layer's parameters; returns them."""
    from peft.tuners.lora import LoraLayer
    from torch.nn.utils.stateless import _reparametrize_module

    with torch.no_grad(), _reparametrize_module(layer, values):
        for part in (module for module in layer.modules() if isinstance(module, LoraLayer)):
            part.merge(adapter_names=[ADAPTER])
            part.merged_adapters.remove(ADAPTER)
    return values


def _merge_quantised(layer, values: Tensors, base: torch.Tensor) -> Tensors:
    """The dequantised weight plus the adapter: PEFT would round the sum to 4 bits again, and lose most of the adapter."""
    from torch.nn.utils.stateless import _reparametrize_module

    weight = base.detach().to("cpu", torch.float32, copy=True)
    with torch.no_grad(), _reparametrize_module(layer, values):
        weight += layer.get_delta_weight(ADAPTER)
    return values | {"base_layer.weight": weight}


# --- the layout of files ---------------------------------------------------------------------------------------------


def in_file_format(base: PreTrainedModel, pieces: list[Piece]) -> list[Piece]:
    """Pieces in the names and layout of the architecture's files, which transformers converts when it loads.

    A conversion that joins tensors (of experts, of a fused projection) needs all of them: then a piece is a layer, or the
    whole model if even that is not enough.
    """
    from transformers.core_model_loading import revert_weight_conversion

    def revert(tensors: Tensors) -> Tensors:
        return revert_weight_conversion(base, dict(tensors))

    def converted(piece: Piece) -> Piece:
        def fetch(keep: bool) -> Tensors | None:
            found = piece.fetch(keep)
            return None if found is None else {name: t.contiguous() for name, t in revert(found).items()}

        return Piece(revert(piece.tensors), fetch)

    whole = {name: tensor for piece in pieces for name, tensor in piece.tensors.items()}
    wanted = _signature(revert(whole))
    if wanted == _signature(whole):
        return pieces
    for group in (pieces, _by_layer(pieces), [_joined(pieces)]):
        with contextlib.suppress(Exception):  # whatever a conversion raises that misses a tensor
            found = [converted(piece) for piece in group]
            if _signature({name: t for piece in found for name, t in piece.tensors.items()}) == wanted:
                return found
    raise ValueError(f"transformers can't convert {type(base).__name__} to the layout of its files")


def _signature(tensors: Tensors) -> dict[str, tuple]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _by_layer(pieces: list[Piece]) -> list[Piece]:
    """Joined where names agree up to their first number: `model.layers.3.`."""
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        words = next(iter(piece.tensors)).split(".")
        number = next((i for i, word in enumerate(words) if word.isdigit()), None)
        groups.setdefault(".".join(words[: number + 1] if number is not None else words), []).append(piece)
    return [_joined(group) for group in groups.values()]


def _joined(pieces: list[Piece]) -> Piece:
    def fetch(keep: bool) -> Tensors | None:
        found = [piece.fetch(keep) for piece in pieces]
        return {name: t for part in found if part for name, t in part.items()} if keep else None

    return Piece({name: t for piece in pieces for name, t in piece.tensors.items()}, fetch)
