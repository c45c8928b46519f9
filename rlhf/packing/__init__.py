"""Train on one padding-free row in which chosen and rejected share their prompt, with TRL's own trainers.

`pack_backbone(model, mode)` enables it; `why_not(model)` says why a model can't be packed.
"""

from rlhf.packing.attention import kernel_name
from rlhf.packing.backbone import attention_window, pack_backbone, packing_mode, why_not
from rlhf.packing.collate import PackedCollator, known_inputs, move_batch
from rlhf.packing.layout import MODES, Layout, packed_layout

__all__ = [
    "MODES", "Layout", "PackedCollator", "attention_window", "kernel_name", "known_inputs", "move_batch", "pack_backbone",
    "packed_layout", "packing_mode", "why_not",
]  # fmt: skip
