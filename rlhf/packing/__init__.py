"""Train on one padding-free row in which chosen and rejected share their prompt, under TRL's own trainers.

`why_not(model)` says why a model can't; `pack_backbone(model, mode)` does it.
"""

from rlhf.packing.attention import kernel_name
from rlhf.packing.backbone import pack_backbone, packing_mode, why_not
from rlhf.packing.layout import MODES, Layout, lay_out

__all__ = ["MODES", "Layout", "kernel_name", "lay_out", "pack_backbone", "packing_mode", "why_not"]
