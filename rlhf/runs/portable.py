"""A training state that any engine can read: trained weights and optimizer state, in ranges of flattened parameters.

Under every engine a rank holds one contiguous range of a flattened parameter and of its optimizer state
(runs/trained_state.py). So each rank writes what it holds, at the same time as the others and without exchanging anything,
and each rank of a later run reads what it needs, under whatever engine and world size: one process, DDP, ZeRO-1 to 3, FSDP2.
torch's distributed checkpoints could hold the same, but their index is a pickle, and they know nothing of DeepSpeed.

A checkpoint `checkpoint-N` holds, beside transformers' files (trainer_state.json, RNG states, configs):

    portable-RANK-of-WORLD-NUMBER.safetensors   at most 2 GB, by that rank; none of a rank that has nothing to write
        KIND:NAME[START:STOP]  elements START to STOP of parameter NAME, flattened and unsharded; KIND is `weight` (fp32 where
                               the engine keeps a master copy) or of the optimizer: `exp_avg`, `exp_avg_sq` (Adam's moments)
    portable-index.safetensors                  by rank 0
        ranges                 int64 (R, 4): parameter, START, STOP, file; every element of a parameter in one range
        metadata `state`       JSON: `format` 2; `parameters`: per parameter its name, shape, kinds with their dtypes, and
                               scalars (`step`); `files`: names; `last_epoch`: the position of the learning-rate schedule

Format 1 held unsharded tensors, all written by rank 0, in portable-NUMBER.safetensors: `KIND:NAME` and, 0-d, `step:NAME` and
`schedule:last_epoch`. It can be read, and is no longer written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from rlhf.distributed.processes import is_main, rank, world_size
from rlhf.distributed.ranges import Held, held_by_this_rank, local_values, refresh, uncovered, written_by_this_rank
from rlhf.distributed.sharding import is_zero3, reshard, unsharded_shape
from rlhf.errors import UserError
from rlhf.models.tensor_file import TensorFile
from rlhf.runs.portable_index import DATA, Files, join_index, read_index, rows_of, write_index
from rlhf.runs.trained_state import Part, make_state, trained_parts, why_not_ranges

MAX_FILE_BYTES = 2 << 30


# --- writing ---------------------------------------------------------------------------------------------------------


class Share(NamedTuple):
    """What this rank writes.

    Attributes:
        parts: from `trained_parts`.
        files: from `split_files`.
        ranges: int64 (R, 4) of all ranks, from `join_index`.
        names: of all ranks' files, from `join_index`.
    """

    parts: list[Part]
    files: Files
    ranges: np.ndarray
    names: list[str]


def plan_share(trainer) -> Share | str:
    """What this rank writes of the training state; or why the state can't be written so. A collective of all ranks."""
    from accelerate.utils import gather_object

    reason = why_not_ranges(trainer)
    parts = [] if reason else trained_parts(trainer)
    files = split_files(parts, written_by_this_rank([part.held for part in parts]))
    found = gather_object([(reason, rows_of(files))])
    if reason := next(filter(None, (theirs for theirs, _ in found)), ""):
        return reason
    ranges, names = join_index([theirs for _, theirs in found])
    if (wrong := uncovered([math.prod(part.shape) for part in parts], ranges[:, :3])) is not None:
        return f"the ranks together do not hold {parts[wrong].name} exactly once"
    return Share(parts, files, ranges, names)


def split_files(parts: list[Part], written: list[tuple[int, int]]) -> Files:
    """The files of a rank, of at most MAX_FILE_BYTES.

    Args:
        written: from `written_by_this_rank`.
    """
    files: Files = []
    room = 0
    for number, (part, (start, stop)) in enumerate(zip(parts, written, strict=True)):
        width = sum(tensor.element_size() for tensor in part.tensors.values())
        while start < stop:
            if room < width:
                files.append([])
                room = MAX_FILE_BYTES
            end = min(stop, start + max(room // width, 1))
            files[-1].append((number, start, end))
            room -= (end - start) * width
            start = end
    return files


def write_share(share: Share, trainer, folder: Path) -> dict[str, list]:
    """Write this rank's files, and the index on rank 0. No collective.

    Returns:
        `{name: [bytes, sha256]}` of the files, which are on disk.

    Raises:
        OSError: a disk error.
    """
    written = {}
    for number, ranges in enumerate(share.files):
        tensors = _tensors(share.parts, ranges)
        file = TensorFile(folder / DATA.format(rank(), world_size(), number), tensors)
        try:
            for key, tensor in tensors.items():
                file.write(key, tensor)
            digest = file.finish()
            written[file.path.name] = [file.path.stat().st_size, digest]
        finally:
            file.abandon()
    if is_main():
        write_index(folder, share.ranges, share.names, share.parts, trainer.lr_scheduler.last_epoch)
    return written


def _tensors(parts: list[Part], ranges: list[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    """The tensors of a file: those with the larger elements first, which keeps all aligned, and kind by kind."""
    found = []
    for number, start, stop in ranges:
        part = parts[number]
        for place, (kind, tensor) in enumerate(part.tensors.items()):
            view = tensor[start - part.held.start : stop - part.held.start]
            found.append((-tensor.element_size(), place, f"{kind}:{part.name}[{start}:{stop}]", view))
    return {key: view for _, _, key, view in sorted(found, key=lambda item: item[:2])}


# --- reading ---------------------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """A range of a parameter and where it goes: per kind a 1-d view of its `held.stop - held.start` elements."""

    name: str
    held: Held
    into: dict[str, torch.Tensor]


class PortableState:
    """A checkpoint's training state. Each rank reads the ranges that it needs, file by file.

    Attributes:
        folder: the checkpoint.
        parameters: the trained parameters by name, in the order of the index.
        last_epoch: the position of the learning-rate schedule.

    Raises:
        UserError: the index is none that this version can read.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.parameters, self._files, self._ranges, self.last_epoch = read_index(self.folder)

    def restore_weights(self, model) -> None:
        """Copy the trained weights into a model that no engine has wrapped yet, or ZeRO-3 or FSDP2 has sharded.

        Raises:
            UserError: the model trains other parameters than the saved ones.
        """
        reshard(model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._check_same({name: unsharded_shape(parameter) for name, parameter in trained.items()})
        wanted = []
        for name, parameter in trained.items():
            held = held_by_this_rank(parameter)
            assert held is not None and not parameter.is_meta  # the engines shard by rows, and weights are loaded
            wanted.append(Wanted(name, held, {"weight": local_values(parameter)}))
        self.read(wanted)
        if sharded := [parameter for parameter in trained.values() if is_zero3(parameter)]:
            refresh(sharded)

    def _check_same(self, shapes: dict[str, tuple[int, ...]]) -> None:
        different = sorted(shapes.keys() ^ self.parameters.keys())
        reshaped = [name for name in shapes if name in self.parameters and shapes[name] != self.parameters[name].shape]
        if different or reshaped:
            raise UserError(
                f"{self.folder} is from a run that trains other parameters than this one (such as {(different or reshaped)[0]}"
                f"{'' if different else ', which has another shape'}); start from scratch with --fresh"
            )

    def restore_optimizer(self, trainer) -> None:
        """Copy optimizer state, master weights and learning rates to where the current engine keeps them.

        Raises:
            UserError: the engine keeps its state in a way that can't be written to.
        """
        if reason := why_not_ranges(trainer):
            raise UserError(
                f"{self.folder} holds the training state in a form for any engine, but this run can't read it: {reason}; "
                "resume as before, or start from scratch with --fresh"
            )
        kinds = {name: saved.kinds for name, saved in self.parameters.items()}
        make_state(trainer, kinds, {name: saved.scalars for name, saved in self.parameters.items()})
        wanted = []
        for part in trained_parts(trainer):
            saved = ("weight", *self.parameters[part.name].kinds)
            into = {kind: tensor for kind, tensor in part.tensors.items() if kind in saved}
            wanted.append(Wanted(part.name, part.held, into))
        self.read(wanted)
        self._restore_schedule(trainer.lr_scheduler)

    def _restore_schedule(self, scheduler) -> None:
        scheduler.last_epoch = int(self.last_epoch)
        scheduler._step_count = scheduler.last_epoch + 1
        lambdas = zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)
        scheduler._last_lr = [base * of(scheduler.last_epoch) for of, base in lambdas]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    def read(self, wanted: Iterable[Wanted]) -> None:
        """Copy ranges to where they belong. One file is open at a time, and nothing is held but what is wanted.

        Raises:
            UserError: the checkpoint does not hold all of it.
        """
        wanted = [each for each in wanted if each.held.stop > each.held.start and each.into]
        number_of = {name: number for number, name in enumerate(self.parameters)}
        by_number = {number_of[each.name]: each for each in wanted}
        bounds = np.zeros((len(number_of), 2), dtype=np.int64)
        for number, each in by_number.items():
            bounds[number] = each.held.start, each.held.stop
        low, high = bounds[self._ranges[:, 0]].T
        rows = self._ranges[(self._ranges[:, 1] < high) & (self._ranges[:, 2] > low)]
        copied: dict[tuple[str, str], int] = {}
        rows = rows[np.argsort(rows[:, 3], kind="stable")]
        for group in np.split(rows, np.flatnonzero(np.diff(rows[:, 3])) + 1) if len(rows) else ():
            with safe_open(self.folder / self._files[group[0, 3]], "pt") as opened:
                keys = set(opened.keys())
                for number, start, stop, _ in group.tolist():
                    for kind, size in self._copy(opened, keys, by_number[number], start, stop):
                        copied[by_number[number].name, kind] = copied.get((by_number[number].name, kind), 0) + size
        for each in wanted:
            for kind in each.into:
                if copied.get((each.name, kind), 0) != each.held.stop - each.held.start:
                    raise UserError(
                        f"{self.folder} does not hold all of {kind} of {each.name}; start from scratch with --fresh"
                    )

    def _copy(self, file, keys: set[str], wanted: Wanted, start: int, stop: int) -> Iterator[tuple[str, int]]:
        """Copy what is wanted of the range `start` to `stop`; yields kinds and numbers of elements."""
        low, high = max(start, wanted.held.start), min(stop, wanted.held.stop)
        for kind, into in wanted.into.items():
            if (key := f"{kind}:{wanted.name}[{start}:{stop}]") in keys:
                values = file.get_slice(key)[low - start : high - start]
            elif (key := f"{kind}:{wanted.name}") in keys:  # format 1; a view of the file
                values = file.get_tensor(key).view(-1)[low:high]
            else:
                continue
            into[low - wanted.held.start : high - wanted.held.start].copy_(values)
            yield kind, high - low
