"""Write a finished model as safetensors, piece by piece: every file by one rank, the files of a model by all ranks.

Beside a file that is complete stands NAME.json with its sha256; a finish that was interrupted keeps those that were made
from the same checkpoint, after reading them again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from rlhf.distributed.processes import on_main, rank, world_size
from rlhf.distributed.sharding import plain_class
from rlhf.errors import RunFailed
from rlhf.files import is_disk_error, read_json, sha256_of, write_file
from rlhf.models.pieces import Piece, Read, base_model, list_pieces
from rlhf.models.tensor_file import TensorFile

PARTIAL = ".partial-model"  # where a model is written, inside its folder
MAX_FILE_BYTES = 5_000_000_000  # what the hub and transformers use


class Written(NamedTuple):
    """What `write_model` has written: bytes by name, the dtype and the digest (`digest_of`) of the weights."""

    files: dict[str, int]
    dtype: str
    weights_sha256: str


class File(NamedTuple):
    name: str
    pieces: list[Piece]


def split_files(pieces: list[Piece], max_bytes: int = MAX_FILE_BYTES) -> list[File]:
    """The files of a model, filled in order to at most `max_bytes` (or one piece), named as transformers names them."""
    groups: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        needed = sum(tensor.nbytes for tensor in piece.tensors.values())
        if not groups or size + needed > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += needed
    if len(groups) == 1:
        return [File("model.safetensors", groups[0])]
    return [File(f"model-{i:05d}-of-{len(groups):05d}.safetensors", g) for i, g in enumerate(groups, 1)]


def write_model(
    model, tokenizer, partial: Path, dtype: torch.dtype, made_from: str, read: Read | None = None,
    compare: Callable[[Path], None] | None = None,
) -> Written | None:  # fmt: skip
    """Write a model for plain transformers to a folder of its own. A collective that all ranks must call.

    Args:
        model: a PreTrainedModel, or a PeftModel whose adapter is merged.
        partial: made if need be; what an interrupted call with another `made_from` has left there is removed.
        dtype, read: as of `list_pieces`.
        made_from: as of `write_files`.
        compare: called on the main rank with the folder, once a model can be loaded from it.

    Returns:
        What was written, on the main rank; None on the others.

    Raises:
        RunFailed, OSError: a file could not be written (on the main rank); what `compare` raises.
        RankFailed: the same on the others.
    """
    files, written = split_files(list_pieces(model, dtype, read)), list[Written]()
    on_main(lambda: clear(partial, files if made_from else []))
    failure = write_files(files, partial, made_from and f"{made_from} {dtype} {len(files)}")

    def complete() -> None:
        raise_failure(failure, partial)
        write_configs(model, tokenizer, partial, dtype)
        write_index(partial, files)
        if compare is not None:
            compare(partial)
        digest = digest_of(take_notes(partial, files))
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        written.append(Written(sizes, str(dtype).removeprefix("torch."), digest))

    on_main(complete)
    return written[0] if written else None


def clear(partial: Path, files: list[File]) -> None:
    """Make the folder, without what an interrupted call has left there, except `files`."""
    wanted = {file.name for file in files} | {f"{file.name}.json" for file in files}
    partial.mkdir(parents=True, exist_ok=True)
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in wanted:
            path.unlink()


def write_files(files: list[File], folder: Path, made_from: str = "") -> str:
    """Write the files of a model; a collective that all ranks must call. The folder must be one that all ranks see.

    As many files as ranks are written at a time, one by each rank, which holds one piece at a time (under ZeRO-3 and FSDP2
    beside the one that is being gathered).

    Args:
        made_from: identifies the weights; files of an earlier call with the same are kept if their checksum is right.
            '' keeps none.

    Returns:
        Why a file could not be written; '' if all were. The same on all ranks.
    """
    world, me = world_size(), rank()
    checked = {n: _is_kept(folder, file, made_from) for n, file in enumerate(files) if n % world == me}
    kept = {n: found for part in _gather(checked) for n, found in part.items()}
    left = [file for n, file in enumerate(files) if not kept[n]]
    for start in range(0, len(left), world):
        turn = left[start : start + world]
        failure = _write_turn(turn, turn[me] if me < len(turn) else None, folder, made_from)
        if reason := next(filter(None, _gather(failure)), ""):
            return reason
    return ""


def _write_turn(turn: list[File], own: File | None, folder: Path, made_from: str) -> str:
    """Take part in gathering the files of this turn, and write this rank's own; returns why it failed, or ''.

    An error here must not keep this rank from the collectives of the other files.
    """
    failure, writer = "", None
    try:
        if own is not None:
            folder.mkdir(parents=True, exist_ok=True)
            _note_of(folder / own.name).unlink(missing_ok=True)
            listed = {name: tensor for piece in own.pieces for name, tensor in piece.tensors.items()}
            writer = TensorFile(folder / own.name, listed)
    except OSError as error:
        failure = str(error)
    for step in range(max(len(file.pieces) for file in turn)):
        for file in (file for file in turn if step < len(file.pieces)):
            found = file.pieces[step].fetch(file is own and not failure)
            if found is None or writer is None:
                continue
            try:
                for name in file.pieces[step].tensors:
                    writer.write(name, found[name])
            except OSError as error:
                failure = str(error)
            del found  # before the next is made
    if writer is not None:
        try:
            if not failure:
                note = {"made_from": made_from, "sha256": writer.close()}
                write_file(_note_of(writer.path), json.dumps(note))
        except (OSError, RunFailed) as error:
            failure = str(error)
        writer.abandon()
    return failure


def _note_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _is_kept(folder: Path, file: File, made_from: str) -> bool:
    path = folder / file.name
    note = read_json(_note_of(path)) or {}
    try:
        return bool(made_from) and note.get("made_from") == made_from and sha256_of(path) == note.get("sha256")
    except OSError:
        return False


def _gather(value: Any) -> list[Any]:
    """The value of each rank."""
    if world_size() == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def take_notes(folder: Path, files: list[File]) -> dict[str, str]:
    """The sha256 of each file, from the notes beside them, which are removed.

    Raises:
        RunFailed: another rank has written a file that is not seen here.
    """
    found = {file.name: str((read_json(_note_of(folder / file.name)) or {}).get("sha256", "")) for file in files}
    if missing := [name for name, digest in found.items() if not digest or not (folder / name).is_file()]:
        raise RunFailed(
            f"{folder / missing[0]} was written by another process but is not there for this one: the output folder must be on a "
            "file system that all nodes share; copy it to one, and run the same command with that --output_dir"
        )
    for name in found:
        _note_of(folder / name).unlink()
    return found


def write_index(folder: Path, files: list[File]) -> None:
    """What transformers needs beside several files; last, since with it the model is complete."""
    if len(files) == 1:
        return
    where = {name: file.name for file in files for piece in file.pieces for name in piece.tensors}
    total = sum(t.nbytes for file in files for piece in file.pieces for t in piece.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_file(folder / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")


def digest_of(digests: dict[str, str]) -> str:
    """One sha256 for a model: of its file, or of the lines `sha256  name` of several (as `sha256sum` prints them)."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def write_configs(model, tokenizer, folder: Path, dtype: torch.dtype) -> None:
    """What stands beside the weights: config, generation config, tokenizer, and the code of a custom architecture."""
    base = base_model(model)
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = str(dtype).removeprefix("torch.")
    with plain_class(base):
        config.architectures = [type(base).__name__]
    if base.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        with plain_class(base):
            custom_object_save(base, str(folder), config=cast(Any, config))  # annotated as a dict, and takes a config
    config.save_pretrained(folder)
    if base.can_generate():
        base.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def raise_failure(failure: str, partial: Path) -> None:
    """Raise what `write_files` reports: a full disk is told as everywhere."""
    if failure:
        error = OSError(f"{partial}: {failure}")
        raise error if is_disk_error(error) else RunFailed(f"the model could not be written: {failure}")


def place(partial: Path, folder: Path) -> None:
    """Move the files into place, weights first and config.json last, without which nobody takes it for a model."""
    configs = ("config.json", "adapter_config.json")
    names = sorted(
        (path.name for path in partial.iterdir()), key=lambda n: (not n.endswith(".safetensors"), n in configs, n)
    )
    for name in names:
        os.replace(partial / name, folder / name)
    partial.rmdir()
