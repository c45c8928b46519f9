"""Tensors on a device whose values the host knows too: reading them, or selecting by them, waits for no GPU.

TRL's losses select answer tokens with boolean masks (`hidden_states[mask]`). On a GPU each such selection stops the host
until the GPU has counted the mask. But masks and labels come from a collator, on the CPU, so their values are known:
`Known` keeps both copies through the few operations that TRL applies to them, and selects by indices made on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Done on both copies; a tensor that any other function returns is known to the device only.
MIRRORED = frozenset(
    "__getitem__ __and__ __or__ __invert__ __eq__ __ne__ logical_and logical_or logical_not eq ne gt ge lt le masked_fill chunk split cat "
    "stack sum cumsum minimum maximum clamp clamp_min bool long int float double to clone detach contiguous unsqueeze squeeze "
    "flatten reshape view any all".split()
)
READ = frozenset("item tolist numpy cpu __bool__ __int__ __float__ __contains__".split())


class Known(torch.Tensor):
    """A tensor of integers or booleans with a copy on the host.

    Attributes:
        plain: the same tensor as an ordinary one, on its device.
        packed: what the collator has made for the batch that these are the `input_ids` of (`PackedBatch`), or None.
    """

    plain: torch.Tensor
    packed: Any
    _host: torch.Tensor
    _at: int  # the version of `plain` that `_host` and `_positions` are of
    _positions: tuple[torch.Tensor, ...] | None

    @staticmethod
    def of(plain: torch.Tensor, host: torch.Tensor, packed: Any = None) -> Known:
        """`plain` with the values that the host knows it to have."""
        return plain.as_subclass(Known)._keep(plain, host, packed)

    def _keep(self, plain: torch.Tensor, host: torch.Tensor, packed: Any = None) -> Known:
        self.plain, self.packed = plain, packed
        self._host, self._at, self._positions = host, version(plain), None
        return self

    def _look(self) -> None:
        """Forget what was known of values that have been changed in place, be it through a view."""
        if (now := version(self.plain)) != self._at:
            self._host, self._at, self._positions = self.plain, now, None

    @property
    def host(self) -> torch.Tensor:
        """Its values on the CPU; `plain` itself if that is where it is, or if only the device has them after a change in place."""
        self._look()
        return self._host

    @property
    def positions(self) -> tuple[torch.Tensor, ...]:
        """Of a boolean mask: the positions that it selects, one int64 tensor per dimension, on its device."""
        self._look()
        if self._positions is None:
            device = self.plain.device
            self._positions = tuple(to_device(found, device) for found in self._host.nonzero(as_tuple=True))
        return self._positions

    @classmethod
    def __torch_function__(cls, func: Callable, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in READ:
            return func(*_each(args, _host), **_each(kwargs, _host))
        if (selected := _select(name, args)) is not None:
            return selected
        found = func(*_each(args, plain), **_each(kwargs, plain))
        if name not in MIRRORED or not all(isinstance(x, Known) for x in _tensors((args, kwargs))):
            return found
        if name == "to":  # keeps its place on the host, and its layout
            return Known.of(found, args[0].host.to(found.dtype), args[0].packed)
        known = [x for x in _tensors((args, kwargs)) if isinstance(x, Known)]
        on_host = all(x.host is x.plain for x in known)
        if not on_host and any(x.host is x.plain for x in known):  # changed in place: only the device has its values
            return found
        host = found if on_host else func(*_each(args, _host), **_each(kwargs, _host))
        if isinstance(found, torch.Tensor):
            return Known.of(found, host)
        return type(found)(Known.of(*both) for both in zip(found, host, strict=True))


def plain(x: Any) -> Any:
    """An ordinary tensor for a known one; anything else as it is."""
    return x.plain if isinstance(x, Known) else x


def version(x: torch.Tensor) -> int:
    """Which number it has been changed in place up to, also through its views; 0 for a tensor of inference mode, which has none."""
    return 0 if x.is_inference() else x._version


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a CPU tensor that the host does not wait for: pinned first, if the device is a GPU of CUDA."""
    if device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=may_not_wait(device))


def may_not_wait(device: torch.device) -> bool:
    """Whether the host may go on while a copy to the device runs; not with Apple's GPUs, which may read what has changed."""
    return device.type != "mps"


def _host(x: Any) -> Any:
    return x.host if isinstance(x, Known) else x


def _select(name: str, args) -> torch.Tensor | None:
    """The result of a function that selects by a known mask, from its indices; None for any other function."""
    mask = args[1] if len(args) > 1 else None
    if not isinstance(mask, Known) or mask.host.dtype != torch.bool:
        return None
    shape = args[0].shape
    if name == "__getitem__" and shape[: mask.dim()] == mask.shape:
        return plain(args[0])[mask.positions]
    if shape != mask.shape:  # torch broadcasts these, or refuses
        return None
    if name == "masked_select":
        return plain(args[0])[mask.positions]
    if name == "masked_scatter":
        return plain(args[0]).index_put(mask.positions, plain(args[2]).reshape(-1)[: len(mask.positions[0])])
    return None


def _each(x: Any, change: Callable) -> Any:
    """`x` with `change` applied to each tensor in its tuples, lists and dicts."""
    if isinstance(x, (tuple, list)) and type(x) in (tuple, list):
        return type(x)(_each(part, change) for part in x)
    if type(x) is dict:
        return {key: _each(part, change) for key, part in x.items()}
    return change(x)


def _tensors(x: Any) -> list[torch.Tensor]:
    if isinstance(x, (tuple, list)):
        return [found for part in x for found in _tensors(part)]
    if isinstance(x, dict):
        return _tensors(list(x.values()))
    return [x] if isinstance(x, torch.Tensor) else []
