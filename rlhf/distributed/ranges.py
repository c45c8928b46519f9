"""Which elements of each parameter a rank holds, and which of them it writes: ranges of the flattened, unsharded parameter.

Every engine gives a rank one contiguous range of a parameter: all of it under DDP, rows under FSDP2, a partition under
ZeRO-3; ZeRO-1 and 2 shard only the optimizer's copy (runs/trained_state.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from rlhf.distributed.processes import rank, world_size
from rlhf.distributed.sharding import is_zero3

MIN_ELEMENTS = 4 << 20  # that a rank writes of what others hold too: a small adapter is not written in a thousand files


class Held(NamedTuple):
    """The elements of a parameter that this rank holds.

    Attributes:
        start, stop: of the flattened parameter; equal where the rank holds nothing.
        copies: the number of ranks that hold the same range.
        copy: which of them this one is, from 0.
    """

    start: int
    stop: int
    copies: int = 1
    copy: int = 0


def held_by_this_rank(parameter) -> Held | None:
    """What the engine leaves of a parameter on this rank; None if that is not one range."""
    if is_zero3(parameter):
        group, partition = parameter.ds_process_group, parameter.ds_tensor.numel()
        start = min(partition * torch.distributed.get_rank(group), parameter.ds_numel)
        return Held(start, min(start + partition, parameter.ds_numel))
    if hasattr(parameter, "device_mesh"):
        return _rows(parameter)
    return Held(0, parameter.numel(), world_size(), rank())


def _rows(parameter) -> Held | None:
    """Of a DTensor: rows, which under hybrid sharding several ranks hold."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, shape = parameter.device_mesh, parameter.shape
    if not all(placement.is_replicate() or placement.is_shard(0) for placement in parameter.placements):
        return None
    copies, copy = 1, 0
    for size, place, placement in zip(mesh.shape, mesh.get_coordinate(), parameter.placements, strict=True):
        if placement.is_replicate():
            copies, copy = copies * size, copy * size + place
    (rows, *_), (first, *_) = compute_local_shape_and_global_offset(shape, mesh, parameter.placements)
    width, first = math.prod(shape[1:]), min(first, shape[0])
    return Held(first * width, (first + rows) * width, copies, copy)


def local_values(parameter) -> torch.Tensor:
    """The elements that `held_by_this_rank` names, as a 1-d view of where the engine keeps them."""
    if is_zero3(parameter):
        held = held_by_this_rank(parameter)
        assert held is not None
        return parameter.ds_tensor.detach().view(-1)[: held.stop - held.start]
    return local_view(parameter)


def local_view(tensor) -> torch.Tensor:
    """This rank's elements of a DTensor, or all of any other tensor, as a 1-d view."""
    local = tensor.to_local() if hasattr(tensor, "device_mesh") else tensor
    return local.detach().view(-1)


def is_one_range(tensor) -> bool:
    """Whether the flattened local part of a tensor is a view of its memory."""
    return (tensor.to_local() if hasattr(tensor, "device_mesh") else tensor).is_contiguous()


def refresh(parameters: Sequence[Any]) -> None:
    """Forget what ZeRO-3 has gathered of parameters whose partitions were written; a collective that all ranks must call."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for parameter in parameters:
        parameter.ds_secondary_tensor = None  # of zero_hpz_partition_size; made again from the next gathering
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # small ones stay gathered
            parameter.partition()
            parameter.all_gather()


def written_by_this_rank(held: Sequence[Held], least: int = MIN_ELEMENTS) -> list[tuple[int, int]]:
    """The part of each held range that this rank writes, so that all ranks together write every element once.

    What several ranks hold is laid out in one line and cut into as many equal pieces as there are copies, of at least
    `least` elements: each rank writes few parameters, most of them whole.

    Args:
        held: of all parameters, in the same order on all ranks.

    Returns:
        (start, stop) per parameter; equal where this rank writes nothing of it.
    """
    totals, found = dict[int, int](), []
    for copies in {each.copies for each in held}:
        totals[copies] = sum(each.stop - each.start for each in held if each.copies == copies)
    passed = dict.fromkeys(totals, 0)
    for each in held:
        first = passed[each.copies]
        passed[each.copies] += each.stop - each.start
        writers = min(each.copies, max(1, totals[each.copies] // least))
        low, high = (totals[each.copies] * min(n, writers) // writers for n in (each.copy, each.copy + 1))
        start, stop = (min(max(edge - first, 0), each.stop - each.start) for edge in (low, high))
        found.append((each.start + start, each.start + stop))
    return found


def uncovered(sizes: Sequence[int], ranges: np.ndarray) -> int | None:
    """The first parameter whose elements are not covered exactly once; None if all are.

    Args:
        sizes: the number of elements of each parameter.
        ranges: (R, 3) int64 in any order: parameter, start, stop.
    """
    ranges = ranges[ranges[:, 1] != ranges[:, 2]]
    ranges = ranges[np.lexsort((ranges[:, 1], ranges[:, 0]))]
    numbers, starts, stops = ranges.T
    first = np.diff(numbers, prepend=-1) != 0
    last = np.roll(first, -1) if len(first) else first
    expected_start = np.where(first, 0, np.roll(stops, 1))
    ends_right = np.where(last, stops == np.asarray([*sizes, -1])[numbers], True)
    wrong = set(numbers[(starts != expected_start) | ~ends_right].tolist())
    wrong |= {number for number, size in enumerate(sizes) if size} - set(numbers.tolist())
    return min(wrong, default=None)
