"""Lay a batch out where it is collated: on the CPU, in the loader's workers, so that the forward pass only follows indices.

`PackedCollator` adds a `PackedBatch` to what TRL's collator returns. It goes with the batch through the loader (pinned,
if the loader pins) to the device, without the host waiting for it; `known_inputs` then gives it to the backbone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from rlhf.packing.attention import Segments, VarlenPlan, varlen_plan
from rlhf.packing.known import Known, may_not_wait, to_device
from rlhf.packing.layout import MODES, Layout, is_right_padded, packed_layout

KEY = "packed_batch"  # of a collated batch
# What TRL's losses select tokens by, and what they make it from. Other tensors of a batch stay ordinary ones.
KNOWN = ("input_ids", "labels", "completion_mask")


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """What the CPU knows about a padded batch.

    Attributes:
        mode, shape: what the layout is for: the packing mode, and the rows and length of `input_ids`.
        layout: its index tensors are on the device that the batch was moved to.
        varlen: the sequences of one varlen call, likewise; None where attention does not use it.
        host: the tensors of the batch that losses select by (`KNOWN`), on the CPU always.
    """

    mode: str
    shape: tuple[int, int]
    layout: Layout
    varlen: VarlenPlan | None
    host: dict[str, torch.Tensor]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """With its index tensors on a device; accelerate's loaders call it. The host never waits for the copies."""
        target = torch.device(device)
        return self._with_each(lambda x: to_device(x, target))

    def pin_memory(self) -> PackedBatch:
        """With its index tensors in pinned memory; torch's loaders call it."""
        return self._with_each(lambda x: x.pin_memory())

    def _with_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        def changed(part: Any) -> Any:
            found = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
            return dataclasses.replace(
                part, **{name: change(x) for name, x in found.items() if isinstance(x, torch.Tensor)}
            )

        varlen = None if self.varlen is None else changed(self.varlen)
        return dataclasses.replace(self, layout=changed(self.layout), varlen=varlen)

    def segments(self, device: torch.device) -> Segments:
        return Segments(self.layout.segments, device, self.varlen)


class PackedCollator:
    """A collator that adds the layout of each batch, as `packed_batch`.

    Args:
        collate: TRL's collator.
        mode: `pairs` or `rows`, as in `packed_layout`.
        varlen: whether attention makes varlen calls (on GPUs).

    A batch that can't be packed (not right-padded) is returned as it is; the backbone then says so.

    Example:
        >>> collate = PackedCollator(lambda rows: {"input_ids": torch.tensor(rows)}, "pairs")
        >>> collate([[5, 6, 7], [5, 6, 8]])["packed_batch"].layout.segments  # 5 6 | 7 | 8
        [(2, 1, 1)]
    """

    def __init__(self, collate: Callable[[list], dict[str, Any]], mode: str, varlen: bool = False):
        if mode not in MODES:
            raise ValueError(f"packing mode '{mode}' is unknown; expected {' or '.join(MODES)}")
        self.collate, self.mode, self.varlen = collate, mode, varlen

    def __call__(self, examples: list) -> dict[str, Any]:
        batch = self.collate(examples)
        input_ids = batch.get("input_ids")
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
            return batch
        mask = batch.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        if mask.shape != input_ids.shape or not is_right_padded(mask):
            return batch
        layout = packed_layout(input_ids, mask, self.mode)
        plan = varlen_plan(layout.segments, input_ids.device) if self.varlen else None
        host = {name: batch[name] for name in KNOWN if isinstance(batch.get(name), torch.Tensor)}
        shape = (input_ids.shape[0], input_ids.shape[1])
        return {**batch, KEY: PackedBatch(self.mode, shape, layout, plan, host)}


def move_batch(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The tensors of a collated batch, and its layout, on a device; the host does not wait for what is pinned."""
    return {
        name: x.to(device, non_blocking=may_not_wait(device)) if isinstance(x, (torch.Tensor, PackedBatch)) else x
        for name, x in batch.items()
    }


def known_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch on its device for TRL's loss: without `packed_batch`, which its `input_ids` bring to the backbone."""
    packed = batch.get(KEY)
    if not isinstance(packed, PackedBatch):
        return batch
    rest = {name: x for name, x in batch.items() if name != KEY}
    known = {
        name: Known.of(rest[name], host, packed if name == "input_ids" else None)
        for name, host in packed.host.items()
        if name in rest
    }
    return rest | known


def packed_batch(input_ids: Any, mode: str) -> PackedBatch | None:
    """What the collator has made for these `input_ids`; None for an ordinary tensor, or another mode or shape."""
    packed = getattr(input_ids, "packed", None)
    fits = isinstance(packed, PackedBatch) and packed.mode == mode and packed.shape == tuple(input_ids.shape)
    return packed if fits else None
