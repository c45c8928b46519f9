"""The unsharded training state: trained weights and optimizer state, by the parameters' names.

Checkpoints of DeepSpeed and FSDP2 can be read by the same engine only, and those of ZeRO only with the same world size.
These files can be read by any engine: one process, DDP, ZeRO-1 to 3 and FSDP2, with any world size. They hold, as
safetensors, for each trained parameter NAME `weight:NAME` (fp32 where the engine keeps a master copy) and its optimizer
state `exp_avg:NAME`, `exp_avg_sq:NAME` (Adam's moments) and `step:NAME`; and the position of the learning-rate
schedule, `schedule:last_epoch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlhf.distributed.processes import is_main
from rlhf.distributed.sharding import full_tensor, is_zero3, shard_like, writable
from rlhf.errors import UserError

NAME = "portable-{:05d}.safetensors"
SHARD_BYTES = 2 << 30  # maximum of the state that the main process holds at a time


def is_portable(files) -> bool:
    """Whether a checkpoint with these file names holds an unsharded state."""
    return NAME.format(0) in files


# --- writing ---------------------------------------------------------------------------------------------------------


def save_portable(trainer, folder: Path) -> str:
    """Write the state; a collective that all ranks must call.

    Returns:
        Why it can't be written (the optimizer keeps state other than one number per weight or per step); '' if it was.

    Raises:
        OSError, SafetensorError: a disk error, on the main process only, once the collective has ended on all ranks.
    """
    if reason := _why_not(trainer):
        return reason
    shard, size, number, failure = {}, 0, 0, None
    for key, tensor in _whole_state(trainer):
        if not is_main() or failure:
            continue
        shard[key] = tensor.detach().to("cpu", copy=True).contiguous()
        size += shard[key].nbytes
        if size >= SHARD_BYTES:
            failure, shard, size, number = _write(shard, folder, number), {}, 0, number + 1
    if shard and not failure:
        failure = _write(shard, folder, number)
    if failure:
        raise failure
    return ""


def _write(shard: dict[str, torch.Tensor], folder: Path, number: int) -> Exception | None:
    try:
        save_file(shard, folder / NAME.format(number))
    except Exception as error:  # raised later, when the other ranks no longer wait for this one
        return error
    return None


def _why_not(trainer) -> str:
    if trainer.is_deepspeed_enabled and trainer.args.fp16:
        return "DeepSpeed keeps its own loss scale for fp16"
    if not isinstance(trainer.lr_scheduler, torch.optim.lr_scheduler.LambdaLR):
        return f"{type(trainer.lr_scheduler).__name__} is not a pure function of the step"
    optimizer = _inner(trainer)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            plain = not torch.is_tensor(value) or value.dim() == 0 or value.is_floating_point()
            if not plain or (torch.is_tensor(value) and value.dim() and value.shape != parameter.shape):
                return f"{type(optimizer).__name__} keeps {key} in another shape or type than the parameter"
    return ""


def _whole_state(trainer) -> Iterator[tuple[str, torch.Tensor]]:
    """Keys and unsharded tensors, gathered one at a time, in the same order on all ranks."""
    yield "schedule:last_epoch", torch.tensor(trainer.lr_scheduler.last_epoch)
    zero, optimizer = _zero(trainer), _inner(trainer)
    if zero is None:
        for name, parameter in _trained(trainer):
            yield f"weight:{name}", full_tensor(parameter)
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"{key}:{name}", full_tensor(torch.as_tensor(value))
        return
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    flat = _flat_parameters(zero)[0]
    state = optimizer.state[flat]
    keys = [key for key, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape]
    for name, parameter in _trained(trainer):
        yield f"weight:{name}", safe_get_full_fp32_param(parameter)
        for key in keys:
            yield f"{key}:{name}", safe_get_full_optimizer_state(parameter, key)
        if "step" in state:
            yield f"step:{name}", torch.as_tensor(state["step"], dtype=torch.float32)


def _trained(trainer) -> list[tuple[str, torch.nn.Parameter]]:
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=True)
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _zero(trainer):
    """DeepSpeed's optimizer, or None under another engine."""
    return trainer.model_wrapped.optimizer if trainer.is_deepspeed_enabled else None


def _inner(trainer):
    """The torch optimizer that computes the update."""
    zero = _zero(trainer)
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer) if zero is None else zero.optimizer


def _flat_parameters(zero) -> list[torch.Tensor]:
    """DeepSpeed's flat fp32 partitions, which its optimizer updates."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
        return zero.fp32_partitioned_groups_flat
    return [flat for group in zero.optimizer.param_groups for flat in group["params"]]


# --- reading ---------------------------------------------------------------------------------------------------------


class PortableState:
    """The files of a checkpoint, read one tensor at a time.

    Attributes:
        folder: the checkpoint.
        names: the trained parameters.
        kept: the kinds of optimizer state that have the weight's shape (`exp_avg`, ...).
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._files = [safe_open(file, "pt") for file in sorted(self.folder.glob("portable-*.safetensors"))]
        self._place = {key: file for file in self._files for key in file.keys()}
        kinds = {key.split(":", 1)[0] for key in self._place}
        self.names = [key.split(":", 1)[1] for key in self._place if key.startswith("weight:")]
        self.kept = sorted(kinds - {"weight", "step", "schedule"})

    def get(self, kind: str, name: str) -> torch.Tensor | None:
        """`weight`, `step`, `exp_avg`, ... of a parameter, on the CPU; None if the optimizer had no such state."""
        key = f"{kind}:{name}"
        return self._place[key].get_tensor(key) if key in self._place else None

    def restore_weights(self, model) -> None:
        """Copy the trained weights into a model that no engine has wrapped yet, or FSDP2 has sharded.

        Raises:
            UserError: the model trains other parameters than the saved ones.
        """
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if different := sorted(trained.keys() ^ set(self.names)):
            raise UserError(
                f"{self.folder} is from a run that trains other parameters than this one (such as {different[0]}); "
                "start from scratch with --fresh"
            )
        for name, parameter in trained.items():
            with writable(parameter), torch.no_grad():
                if not parameter.is_meta and parameter.numel():
                    parameter.copy_(shard_like(self.get("weight", name), parameter))

    def restore_optimizer(self, trainer) -> None:
        """Copy optimizer state, master weights and learning rates to where the current engine keeps them."""
        if _zero(trainer) is None:
            self._into_torch(trainer)
        else:
            self._into_zero(trainer)
        scheduler, last_epoch = trainer.lr_scheduler, self.get("schedule", "last_epoch")
        assert last_epoch is not None  # save_portable writes it
        scheduler.last_epoch = int(last_epoch)
        scheduler._step_count = scheduler.last_epoch + 1
        lambdas = zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)
        scheduler._last_lr = [base * of(scheduler.last_epoch) for of, base in lambdas]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    def _into_torch(self, trainer) -> None:
        optimizer = _inner(trainer)
        name_of = {id(parameter): name for name, parameter in _trained(trainer)}
        states, parameters = {}, [p for group in optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(parameters):
            found = {kind: self.get(kind, name_of[id(parameter)]) for kind in ("step", *self.kept)}
            states[number] = {
                kind: shard_like(value, parameter) if value.dim() else value
                for kind, value in found.items()
                if value is not None
            }
        optimizer.load_state_dict(optimizer.state_dict() | {"state": states})

    def _into_zero(self, trainer) -> None:
        zero = _zero(trainer)
        steps = [step for name in self.names if (step := self.get("step", name)) is not None]
        for flat in _flat_parameters(zero):
            state = {kind: torch.zeros_like(flat) for kind in self.kept}
            if steps:
                state["step"] = _step_for(zero.optimizer, float(max(steps)), flat)
            zero.optimizer.state[flat] = state
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # ZeRO-1 and 2 call it after their first step
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in _trained(trainer):
            for kind in ("weight", *self.kept):
                if (value := self.get(kind, name)) is not None:
                    _set_zero(parameter, kind, value)


def _step_for(optimizer, step: float, flat: torch.Tensor):
    """The step count in this optimizer's type; one object per partition, as each partition increments its own."""
    if type(optimizer).__name__ == "DeepSpeedCPUAdam":
        return int(step)
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(step, dtype=torch.float32, device=flat.device if on_device else "cpu")


def _set_zero(parameter, kind: str, value: torch.Tensor) -> None:
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    value = value.float().to(parameter.device)
    if is_zero3(parameter):  # its full setter does not pad the shard of the last rank
        part, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
        padded = torch.nn.functional.pad(
            value.flatten(), (0, part * torch.distributed.get_world_size() - value.numel())
        )
        value = padded[part * rank : part * (rank + 1)]
        setters = safe_set_local_fp32_param, safe_set_local_optimizer_state
    else:
        setters = safe_set_full_fp32_param, safe_set_full_optimizer_state
    if kind == "weight":
        setters[0](parameter, value)
    else:
        setters[1](parameter, value, kind)
