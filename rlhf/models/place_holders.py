"""Parameters of one element of memory each, in the place of weights that are still on disk.

They are on the CPU, not on the meta device, to which PEFT would move an adapter after its base.
"""

from __future__ import annotations

import torch

from rlhf.distributed.sharding import is_sharded


def make_place_holders(model) -> None:
    """Replace the parameters on the meta device. The element is NaN, so that nothing computed from it passes for a value."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                tensor = torch.full((1,) * parameter.dim(), float("nan"), dtype=parameter.dtype).expand(parameter.shape)
                made[id(parameter)] = torch.nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]


def is_place_holder(tensor: torch.Tensor) -> bool:
    """Also a copy of one, which has all its memory: PEFT copies modules that are to be trained in full."""
    if tensor.is_meta or is_sharded(tensor) or not tensor.numel() or not tensor.is_floating_point():
        return False
    return bool(tensor.flatten()[0].isnan() and tensor.isnan().all())
