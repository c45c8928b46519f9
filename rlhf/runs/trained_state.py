"""Where each engine keeps the trained weights and the optimizer's state: as views of ranges of flattened parameters.

| engine | the weight that the optimizer updates | on a rank |
|---|---|---|
| one process, DDP | the parameter | all of it |
| FSDP2 | the parameter, a DTensor | rows |
| ZeRO-1, ZeRO-2 | a flat fp32 partition of all parameters of a group | the fragments of the parameters in it |
| ZeRO-3 | flat fp32 partitions of sub-groups | a part of every parameter, as large on all ranks (the last ones are padded) |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from rlhf.distributed.ranges import Held, held_by_this_rank, is_one_range, local_view
from rlhf.distributed.sharding import is_zero3, reshard, unsharded_shape

Scalars = dict[str, int | float | torch.Tensor]


class Part(NamedTuple):
    """What this rank holds of a trained parameter.

    Attributes:
        name: without the engine's wrappers.
        shape: of the unsharded parameter.
        held: the range that the tensors are of.
        tensors: `weight` (fp32 where the engine keeps a master copy) and what the optimizer keeps per element (`exp_avg`,
            ...), 1-d, of `held.stop - held.start` elements; views, which can be written to.
        scalars: what the optimizer keeps per parameter (`step`): the same on all ranks.
    """

    name: str
    shape: tuple[int, ...]
    held: Held
    tensors: dict[str, torch.Tensor]
    scalars: Scalars


def why_not_ranges(trainer) -> str:
    """Why the training state is not ranges of parameters; '' if it is. The same on all ranks."""
    if trainer.is_deepspeed_enabled and trainer.args.fp16:
        return "DeepSpeed keeps its own loss scale for fp16"
    if not isinstance(trainer.lr_scheduler, torch.optim.lr_scheduler.LambdaLR):
        return f"{type(trainer.lr_scheduler).__name__} is not a pure function of the step"
    zero = zero_of(trainer)
    if zero is not None and not (_is_stage3(zero) or _is_stage1_or_2(zero)):
        return f"DeepSpeed's {type(zero).__name__} keeps its state in another way"
    if getattr(zero, "swap_optimizer", False):
        return "DeepSpeed keeps the optimizer's state on NVMe disks"
    for name, parameter in trained_parameters(trainer):
        if not is_zero3(parameter) and (held_by_this_rank(parameter) is None or not is_one_range(parameter)):
            return f"{name} is not sharded by rows"
    optimizer = inner_optimizer(trainer)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if torch.is_tensor(value) and value.dim():
                plain = value.is_floating_point() and value.shape == parameter.shape and is_one_range(value)
            else:
                plain = torch.is_tensor(value) or isinstance(value, int | float)
            if not plain:
                return f"{type(optimizer).__name__} keeps {key} in another shape or type than the parameter"
    return ""


def trained_parameters(trainer) -> list[tuple[str, torch.nn.Parameter]]:
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=True)
    reshard(model)  # an evaluation can leave FSDP2's parameters unsharded, which are no longer those of the optimizer
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def zero_of(trainer):
    """DeepSpeed's optimizer, or None under another engine."""
    return trainer.model_wrapped.optimizer if trainer.is_deepspeed_enabled else None


def inner_optimizer(trainer):
    """The torch optimizer that computes the update."""
    zero = zero_of(trainer)
    return getattr(trainer.optimizer if zero is None else zero, "optimizer", trainer.optimizer)


def trained_parts(trainer) -> list[Part]:
    """What this rank holds of each trained parameter, in the same order on all ranks."""
    zero, optimizer, found = zero_of(trainer), inner_optimizer(trainer), []
    groups = _groups_of(zero)
    for name, parameter in trained_parameters(trainer):
        if zero is None:
            held = held_by_this_rank(parameter)
            assert held is not None  # why_not_ranges
            state = {"weight": parameter, **optimizer.state.get(parameter, {})}
            tensors = {key: local_view(value) for key, value in state.items() if _is_per_element(value)}
        else:
            flat, start, held = _place_in_zero(zero, parameter, groups)
            state = {"weight": flat, **optimizer.state.get(flat, {})}
            views = {key: value.detach() for key, value in state.items() if _is_per_element(value)}
            tensors = {key: view[start : start + held.stop - held.start] for key, view in views.items()}
        scalars = {key: value for key, value in state.items() if key not in tensors}
        found.append(Part(name, unsharded_shape(parameter), held, tensors, scalars))
    return found


def _is_per_element(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() > 0


# --- DeepSpeed -------------------------------------------------------------------------------------------------------


def _is_stage3(zero) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _is_stage1_or_2(zero) -> bool:
    return hasattr(zero, "single_partition_of_fp32_groups")


def flat_partitions(zero) -> list[torch.Tensor]:
    """DeepSpeed's flat fp32 partitions, which its optimizer updates."""
    return zero.fp32_partitioned_groups_flat if _is_stage3(zero) else zero.single_partition_of_fp32_groups


def _groups_of(zero) -> dict[int, int]:
    """The group of each parameter, by its id, under ZeRO-1 and 2."""
    if zero is None or _is_stage3(zero):
        return {}
    return {id(parameter): number for number, group in enumerate(zero.bit16_groups) for parameter in group}


def _place_in_zero(zero, parameter, groups: dict[int, int]) -> tuple[torch.Tensor, int, Held]:
    """The flat partition that a parameter's elements of this rank are in, where they start in it, and which they are."""
    if _is_stage3(zero):
        held = held_by_this_rank(parameter)
        assert held is not None
        number, start, _ = zero.grad_position[zero.get_param_id(parameter)]
        return zero.fp32_partitioned_groups_flat[number], start, held
    flat = zero.single_partition_of_fp32_groups[groups[id(parameter)]]
    if (mapping := parameter._hp_mapping) is None:  # all of it is on other ranks
        return flat, 0, Held(0, 0)
    first, inside = mapping.lp_fragment_address.start, mapping.hp_fragment_address
    return flat, inside.start, Held(first, first + inside.numel)


# --- restoring -------------------------------------------------------------------------------------------------------


def make_state(trainer, kinds: dict[str, dict[str, torch.dtype]], scalars: dict[str, Scalars]) -> None:
    """Make the optimizer's state as after its first step, with zeros for what it keeps per element.

    Args:
        kinds: by parameter name, what is kept per element (without `weight`), and its dtype.
        scalars: by parameter name, what is kept per parameter.
    """
    zero, optimizer = zero_of(trainer), inner_optimizer(trainer)
    if zero is not None:
        _make_zero_state(zero, {kind for each in kinds.values() for kind in each}, scalars)
        return
    name_of = {id(parameter): name for name, parameter in trained_parameters(trainer)}
    states = {}
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        name = name_of[id(parameter)]
        made = {kind: torch.zeros_like(parameter, dtype=dtype) for kind, dtype in kinds[name].items()}
        if made or scalars[name]:
            states[number] = {**scalars[name], **made}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


def _make_zero_state(zero, kinds: set[str], scalars: dict[str, Scalars]) -> None:
    steps = [float(each["step"]) for each in scalars.values() if "step" in each]
    for flat in flat_partitions(zero):
        state: dict[str, Any] = {kind: torch.zeros_like(flat) for kind in sorted(kinds)}
        if steps:
            state["step"] = _step_for(zero.optimizer, max(steps), flat)
        zero.optimizer.state[flat] = state
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # ZeRO-1 and 2 call it after their first step
        zero._lazy_init_hp_params_optimizer_state()


def _step_for(optimizer, step: float, flat: torch.Tensor):
    """The step count in this optimizer's type; one object per partition, as each partition increments its own."""
    if type(optimizer).__name__ == "DeepSpeedCPUAdam":
        return int(step)
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(step, dtype=torch.float32, device=flat.device if on_device else "cpu")
