"""Metrics of a micro-batch that are read later, all at once: on a GPU each `.item()` stops the host until the GPU is done.

TRL's losses log with `accelerator.gather_for_metrics(x).sum().item()` and the like, a dozen times per micro-batch. While
they run, `gather` returns a `Deferred` instead: it notes what is done with the value, and does it when all of them are read,
on the host, with the same functions in the same dtype. So the numbers are the same, bit by bit (but that a CPU may add in
another order than a GPU), with one collective and one copy for all metrics of all micro-batches.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rlhf.packing.known import Known, plain

MAX_PENDING = 4096  # values that wait at most, of some 300 micro-batches: a run may log every 10,000
METHODS = frozenset(
    "sum mean min max item float double long int bool detach cpu squeeze reshape flatten nanmean nansum abs".split()
)
COUNTING = frozenset("sum item long int detach cpu squeeze reshape flatten".split())  # of integers: these count still


class Deferred:
    """A value that is computed when it is needed: from one tensor of this rank, or from other such values."""

    def __init__(
        self, pending: Pending, compute: Callable[..., Any], inputs: tuple[Any, ...] = (), is_count: bool = False
    ):
        self._pending, self._inputs, self._is_count = pending, inputs, is_count
        self._compute: Callable[..., Any] | None = compute  # None once the result is known
        self._result: Any = None
        self._is_count_check = False

    @property
    def value(self) -> Any:
        """The number or CPU tensor; reads all that is pending first, a collective if the ranks' values are gathered."""
        if self._compute is not None:
            self._pending.read()
        waiting = [self]  # a count of tokens is a sum over all micro-batches, too deep for recursion
        while waiting:
            node = waiting[-1]
            unknown = [x for x in node._inputs if isinstance(x, Deferred) and x._compute is not None]
            if node._compute is not None and not unknown:
                node._result = node._compute(*(x._result if isinstance(x, Deferred) else x for x in node._inputs))
                node._compute, node._inputs = None, ()  # frees the tensors
            waiting.extend(unknown) if unknown else waiting.pop()
        return self._result

    def _then(self, compute: Callable[..., Any], *others: Any, is_count: bool = False) -> Deferred:
        return Deferred(self._pending, compute, (self, *others), is_count)

    def then(self, compute: Callable[[Any], Any]) -> Deferred:
        """`compute` of this value."""
        return self._then(compute)

    def origin(self) -> Deferred:
        """What this was computed from in the first place (its first input's, and so on), if it has not been read yet."""
        node = self
        while node._inputs and isinstance(node._inputs[0], Deferred):
            node = node._inputs[0]
        return node

    def __getattr__(self, name: str) -> Any:
        if name in METHODS:
            counts = self._is_count and name in COUNTING
            return lambda *args, **kwargs: self._then(lambda x: getattr(x, name)(*args, **kwargs), is_count=counts)
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.value, name)  # shape, dtype, anything TRL may come to use

    @classmethod
    def __torch_function__(cls, func: Callable, types, args=(), kwargs=None) -> Any:
        return func(*_values(args), **_values(kwargs or {}))

    def __add__(self, other: Any) -> Deferred:
        return self._then(operator.add, other)

    def __radd__(self, other: Any) -> Deferred:
        return self._then(lambda x: other + x)

    def __sub__(self, other: Any) -> Deferred:
        return self._then(operator.sub, other)

    def __rsub__(self, other: Any) -> Deferred:
        return self._then(lambda x: other - x)

    def __mul__(self, other: Any) -> Deferred:
        return self._then(operator.mul, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Deferred:
        return self._then(divide, other)

    def __rtruediv__(self, other: Any) -> Deferred:
        return self._then(lambda x: divide(other, x))

    def __floordiv__(self, other: Any) -> Deferred:
        return self._then(operator.floordiv, other)

    def __neg__(self) -> Deferred:
        return self._then(operator.neg)

    def __gt__(self, other: Any) -> Deferred:
        found = self._then(operator.gt, other)
        found._is_count_check = self._is_count and isinstance(other, int) and other == 0
        return found

    def __bool__(self) -> bool:
        """True for `count > 0`, unread: TRL 1.16 asks that before it divides by the count, else logs 0.0, as `divide` does.

        A count is gathered integers or their sum; of anything else, such as a loss, the value is read. A count of 0 is taken
        for one that is not: right only before a division, which is what tests/training/test_deferred.py finds in TRL.
        """
        return self._is_count_check or bool(self.value)

    # what can't wait

    def __lt__(self, other: Any) -> Any:
        return self.value < _values(other)

    def __ge__(self, other: Any) -> Any:
        return self.value >= _values(other)

    def __le__(self, other: Any) -> Any:
        return self.value <= _values(other)

    def __eq__(self, other: Any) -> Any:
        return self.value == _values(other)

    __hash__ = object.__hash__

    def __getitem__(self, key: Any) -> Any:
        return self.value[key]

    def __float__(self) -> float:
        return float(self.value)

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


def divide(one: Any, other: Any) -> Any:
    """one / other, and 0 if that is 0: `one / other if other > 0 else 0.0`."""
    if isinstance(other, torch.Tensor) and other.numel() != 1 or other:
        return one / other
    return torch.zeros_like(one / other) if isinstance(one, torch.Tensor) else 0.0


def _values(x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return type(x)(map(_values, x))
    if isinstance(x, dict):
        return {key: _values(part) for key, part in x.items()}
    return x.value if isinstance(x, Deferred) else x


class Pending:
    """The tensors of metrics that wait to be read together.

    Args:
        gather: gathers a (1, n) tensor to (world size, n), a collective; None if the ranks' values stay apart.
        copies: whether what a model returns is overwritten in its next pass (CUDA graphs).

    Attributes:
        num_added: tensors since the last reading; the same on all ranks, if their values are gathered.
    """

    def __init__(self, gather: Callable[[torch.Tensor], torch.Tensor] | None = None, copies: bool = False):
        self._gather, self._copies = gather, copies
        self.num_added = 0
        self._tensors: list[torch.Tensor] = []
        self._found: list[list[torch.Tensor]] = []  # a list with the value, once it is read

    @property
    def is_gathered(self) -> bool:
        return self._gather is not None

    def add(self, x: torch.Tensor) -> Deferred:
        """What `accelerator.gather(x)` will be: rows of all ranks after each other; of scalars a vector; alone `x` itself."""
        if isinstance(x, Known):
            x = x.host if self._gather is None else x.plain
        found: list[torch.Tensor] = []
        self.num_added += 1
        if self._gather is None and x.device.type == "cpu":
            found.append(x.detach())
        else:
            self._tensors.append(x.detach().clone() if self._copies else x.detach())
            self._found.append(found)
        return Deferred(self, lambda: found[0], is_count=not x.dtype.is_floating_point)

    def read(self) -> None:
        """Copy all that waits to the host: one collective, one synchronisation."""
        tensors, places = self._tensors, self._found
        self._tensors, self._found, self.num_added = [], [], 0
        if not tensors:
            return
        values = _flat(tensors)
        rows = (values[None] if self._gather is None else self._gather(values[None])).cpu()
        at = 0
        for x, found in zip(tensors, places, strict=True):
            part = rows[:, at : at + x.numel()].to(x.dtype)
            at += x.numel()
            found.append(part.reshape(x.shape) if self._gather is None else part.reshape(-1, *x.shape[1:]))


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All values in one float64 vector (exact for integers below 2^53), with one kernel per dtype and not per tensor."""
    device = torch.device("cpu") if tensors[0].device.type == "mps" else tensors[0].device  # MPS has no float64
    by_dtype: dict[torch.dtype, list[int]] = {}
    for number, x in enumerate(tensors):
        by_dtype.setdefault(x.dtype, []).append(number)
    parts: dict[int, torch.Tensor] = {}
    for numbers in by_dtype.values():
        joined = torch.cat([tensors[i].reshape(-1).to(device) for i in numbers]).double()
        parts |= dict(zip(numbers, joined.split([tensors[i].numel() for i in numbers]), strict=True))
    return torch.cat([parts[i] for i in range(len(tensors))])


@contextlib.contextmanager
def deferring(accelerator: Any, pending: Pending) -> Iterator[None]:
    """Inside the block `accelerator.gather` and `gather_for_metrics` return values that are read later."""
    gather, gather_for_metrics, own = accelerator.gather, accelerator.gather_for_metrics, vars(accelerator)
    before = {name: own[name] for name in ("gather", "gather_for_metrics") if name in own}

    def later(x: Any) -> Any:
        return pending.add(x) if isinstance(x, torch.Tensor) else gather(x)

    def later_for_metrics(x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, torch.Tensor) and not (pending.is_gathered and _truncates(accelerator.gradient_state)):
            return pending.add(x)
        own["gather"] = gather  # which it calls
        try:
            return gather_for_metrics(plain(x), *args, **kwargs)
        finally:
            own["gather"] = later

    own |= {"gather": later, "gather_for_metrics": later_for_metrics}
    try:
        yield
    finally:
        del own["gather"], own["gather_for_metrics"]
        own |= before


def _truncates(state: Any) -> bool:
    """Whether accelerate drops what the last batch of a loader repeats: now, as it depends on where the loader is."""
    return state.end_of_dataloader and state.remainder > 0
