"""Parameters that transformers makes of several tensors when it loads, or cuts from one: experts, fused projections.

Its own loading runs without weights. Each conversion that it does is kept, with the names of the tensors that it took, and
done again by the same operations once the model is sharded: parameter by parameter, and where the rows of the result come
from rows of the files (experts that a file holds one by one) for those of a shard alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

Part = tuple[slice, ...]
Entry = dict[str, str]  # of one tensor in a file: {"safetensors_file", "weight_name", "dtype"}
# The operations that move elements and compute nothing, so that they can be done twice, and on shapes alone.
KNOWN = (
    "Chunk", "Concatenate", "Conv3dToLinear", "ErnieFuseAndSplitTextVisionExperts", "Interleave", "LinearToConv3d",
    "MergeModulelist", "PermuteForRope", "Split", "Transpose",
)  # fmt: skip


def unknown_operation(model) -> str:
    """An operation of transformers for the tensors of a model that is none of KNOWN; '' if there is none.

    Args:
        model: a PreTrainedModel on the meta device.
    """
    from transformers import core_model_loading

    for kind in _operations(model):
        if kind.__module__ != core_model_loading.__name__ or kind.__name__ not in KNOWN:
            return kind.__name__
    return ""


def converts_tensors(model) -> bool:
    """Whether transformers may convert tensors of the files for a model, beyond their names."""
    return bool(_operations(model))


def _operations(model) -> list[type]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    entries = get_model_conversion_mapping(model)
    return [type(operation) for entry in entries for operation in getattr(entry, "operations", ())]


class Source(NamedTuple):
    """One tensor of the files that a conversion takes."""

    entry: Entry
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # that transformers casts it to before it converts


class Converted:
    """A parameter that is made of the files' tensors when it is asked for.

    Attributes:
        name, shape, dtype: the parameter's in the model.
    """

    def __init__(self, name: str, parameter: torch.Tensor, converter, sources: dict[str, list[Source]], model):
        """
        Args:
            converter: transformers' WeightConverter, without tensors.
            sources: what it takes, by its patterns, in transformers' order.
            model: what its operations may ask for: `get_parameter(name)`, which has a shape, and `config`.
        """
        self.name, self.shape, self.dtype = name, tuple(parameter.shape), parameter.dtype
        self._converter, self._sources, self._model = converter, sources, model

    def make(self, part: Part | None, read: Callable[[Entry, Part | None], torch.Tensor]) -> torch.Tensor:
        """A part of the parameter; None: all of it.

        Args:
            read: returns a part of a file's tensor.
        """
        first, *others = part or (slice(None),)
        rows = slice(*first.indices(self.shape[0]))
        wanted, rest = self._wanted(rows)
        converter, layer = copy.deepcopy(self._converter), next(iter(self._converter.layer_targets))
        for pattern, sources in wanted.items():
            for source, cut in sources:
                job = functools.partial(_read_cast, source, cut, read)
                converter.add_tensor(layer, source.entry["weight_name"], pattern, job)
        made = converter.convert(layer, model=self._model, config=self._model.config)[self.name]
        found = made[0] if isinstance(made, list) else made
        return found[(rest, *others)]

    def _wanted(self, rows: slice) -> tuple[dict[str, list[tuple[Source, Part | None]]], slice]:
        """(by pattern the sources and the part of each to read, the rows of what is then made)."""
        first, *later = self._converter.operations
        groups, everything = self._sources, slice(None)
        if _stacks(first) and all(map(_keeps_rows, later)) and all(len(g) == self.shape[0] for g in groups.values()):
            return {
                pattern: [(source, None) for source in group[rows]] for pattern, group in groups.items()
            }, everything
        sources = [source for group in groups.values() for source in group]
        if all(map(_keeps_rows, (first, *later))) and all(s.shape[:1] == self.shape[:1] for s in sources):
            return {pattern: [(source, (rows,)) for source in group] for pattern, group in groups.items()}, everything
        if not later and type(first).__name__ == "Concatenate" and first.dim == 0:
            return self._overlapping(rows), everything
        return {pattern: [(source, None) for source in group] for pattern, group in groups.items()}, rows

    def _overlapping(self, rows: slice) -> dict[str, list[tuple[Source, Part | None]]]:
        """What rows of tensors that are joined along their rows are made of."""
        wanted: dict[str, list[tuple[Source, Part | None]]] = {}
        start = 0
        for pattern in self._converter.source_patterns:
            for source in self._sources.get(pattern, ()):
                length = source.shape[0]
                low, high = max(rows.start - start, 0), min(rows.stop - start, length)
                if low < high:
                    wanted.setdefault(pattern, []).append((source, (slice(low, high),)))
                start += length
        return wanted


def _read_cast(source: Source, cut: Part | None, read: Callable[[Entry, Part | None], torch.Tensor]) -> torch.Tensor:
    found = read(source.entry, cut)
    return found if source.dtype is None else found.to(source.dtype)


def _stacks(operation) -> bool:
    return type(operation).__name__ == "MergeModulelist" and operation.dim == 0


def _keeps_rows(operation) -> bool:
    """Whether row i of the result is made of the rows i of what the operation takes."""
    name = type(operation).__name__
    if name == "Transpose":  # with `check_dims` it compares the shape of a part with the parameter's
        return not operation.check_dims and min(operation.dim0, operation.dim1) > 0
    return name in ("Chunk", "Concatenate", "Interleave", "Split") and operation.dim > 0


@contextlib.contextmanager
def noting_conversions() -> Iterator[None]:
    """Inside the block `from_pretrained` with every module on `disk` reads no weights.

    What it would convert and write to the offload folder is in its index as Converted instead.
    """
    from transformers import core_model_loading, modeling_utils

    loading, converter = _Loading(), core_model_loading.WeightConverter
    prepare, resave = modeling_utils.accelerate_disk_offload, core_model_loading.offload_and_maybe_resave_param
    add = converter.add_tensor

    def read_nothing(thread_pool, tensor, device=None, dtype=None, *args, **options):
        shape = tensor.get_shape()
        job: Any = functools.partial(torch.empty, shape, dtype=dtype, device="meta")
        job.source = tuple(shape), dtype
        return job

    def start(model, folder, files, *args, **options):
        loading.start(model, files)
        return prepare(model, folder, files, *args, **options)

    def add_tensor(mapping, layer, source, pattern, job) -> None:
        loading.note(layer, source, pattern, *job.source)
        add(mapping, layer, source, pattern, job)

    def offload(name, value, loading_info, folder, index, mapping):
        if not isinstance(mapping, converter):
            return resave(name, value, loading_info, folder, index, mapping)
        loading_info.missing_keys.discard(name)
        index[name] = loading.converted(name, mapping)
        if tuple(value.shape) != index[name].shape:
            loading_info.mismatched_keys.add((name, value.shape, torch.Size(index[name].shape)))
        return index

    with (
        _replaced(modeling_utils, accelerate_disk_offload=start),
        _replaced(core_model_loading, spawn_materialize=read_nothing, offload_and_maybe_resave_param=offload),
        _replaced(converter, add_tensor=add_tensor),
    ):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


class _Loading:
    """What is known of the model that transformers is loading."""

    def start(self, model, files: list[str]) -> None:
        # of a copy's names: those of the model itself change when PEFT wraps its modules
        tensors = dict(model.state_dict(keep_vars=True))
        self._tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        self._model = SimpleNamespace(get_parameter=self._tensors.__getitem__, config=model.config)
        self._file_of: dict[str, str] = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                self._file_of |= dict.fromkeys(opened.keys(), file)
        self._sources: dict[str, dict[str, list[Source]]] = {}

    def note(self, layer: str, source: str, pattern: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        entry = {
            "safetensors_file": self._file_of[source],
            "weight_name": source,
            "dtype": str(dtype).removeprefix("torch."),
        }
        self._sources.setdefault(layer, {}).setdefault(pattern, []).append(Source(entry, shape, dtype))

    def converted(self, name: str, converter) -> Converted:
        sources = self._sources[next(iter(converter.layer_targets))]
        return Converted(name, self._tensors[name], converter, sources, self._model)
