"""Merge a LoRA adapter into its base from disk to disk: one tensor is in memory at a time, and no model is loaded.

The base is read as it was published, so an adapter that was trained on 4 bits is added to the original weights.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.console import quiet_libraries
from rlhf.distributed.processes import is_main, on_main, world_size
from rlhf.distributed.sharding import loading_unsharded
from rlhf.errors import UserError
from rlhf.files import free_bytes, lock_file
from rlhf.models.converted import unknown_operation
from rlhf.models.digests import local_folder, weights_digest
from rlhf.models.folder import base_of, is_adapter, is_reward_model, weight_files
from rlhf.models.on_disk import Index, index_of, read_part
from rlhf.models.pieces import base_model
from rlhf.models.place_holders import make_place_holders
from rlhf.models.tokenizer import fit_tokenizer, load_tokenizer
from rlhf.models.writing import Written, write_model

MADE_FROM = ".made-from"  # in the folder of merge_for_training: what it was merged from


def merge_command(adapter: str, out: str, dtype: str | None) -> None:
    """`rlhf merge`: check the adapter and the disk, merge, and say what was written.

    Raises:
        UserError: with the place and the fix.
    """
    from rlhf.models.folder import check_model_folder, locate

    quiet_libraries()
    if os.path.isdir(adapter):
        check_model_folder(Path(adapter), "ADAPTER")
    if is_adapter(adapter):
        base = locate(base_of(adapter), f"{adapter}/adapter_config.json")
        found = weight_files(Path(base)) if os.path.isdir(base) else []
        needed, free = sum(file.stat().st_size for file in found), free_bytes(Path(out).absolute())
        if free < needed:
            raise UserError(
                f"{out} has {free / 1e9:.2f} GB free, but the merged model needs about {needed / 1e9:.2f} GB"
            )
    done = merge(adapter, Path(out), getattr(torch, dtype) if dtype else None)
    if done is None:  # another rank reports
        return
    size = sum(size for name, size in done.files.items() if name.endswith(".safetensors"))
    print(
        f"{adapter} is merged into {base_of(adapter)}: {out} ({size / 1e9:.2f} GB in {done.dtype}, read again and equal)"
    )
    print(f"next: rlhf chat {out}")


def merge(adapter: str, out: Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Written | None:
    """Write `adapter` merged into its base, for plain transformers. A collective that all ranks must call.

    It is written to OUT.partial beside `out`, which it becomes at the end. A call that was interrupted is continued by the
    next with the same arguments; of another one nothing is kept.

    Args:
        adapter: a folder that PEFT can load.
        out: a folder that is empty or does not exist.
        dtype: of the written weights; None: of the base's files.

    Returns:
        What was written, on the main rank; None on the others.

    Raises:
        UserError: no adapter, `out` holds something, or the base's files can't be read one tensor at a time.
    """
    if not os.path.isdir(adapter):
        raise UserError(f"there is no folder {adapter}; give the output folder of a stage with `merge_adapter: false`")
    if not is_adapter(adapter):
        raise UserError(f"{adapter} holds no adapter (no adapter_config.json); only an adapter can be merged")
    if found := sorted(path.name for path in out.iterdir()) if out.is_dir() else []:
        raise UserError(f"{out} is not empty ({found[0]} is there); give a new folder")
    with _alone(out):
        return _merge(adapter, out, dtype, trust_remote_code, _source(adapter, dtype), noted=False)


def merge_for_training(adapter: str, out: Path, dtype: torch.dtype | None, trust_remote_code: bool = False) -> str:
    """The folder of the merged model that a run starts from, made when it is first asked for. A collective.

    It is then loaded as any other model: sharded where the engine shards. One that was made from something else, by an
    earlier run in the same output folder, is made again.
    """
    source = _source(adapter, dtype)
    kept = [(out / MADE_FROM).read_text(encoding="utf-8") if (out / MADE_FROM).is_file() else ""]
    if world_size() > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(kept)  # rank 0 may be making it already
    if kept[0] != source:
        on_main(lambda: shutil.rmtree(out, ignore_errors=True))
        _merge(adapter, out, dtype, trust_remote_code, source, noted=True)
    return str(out)


def _source(adapter: str, dtype: torch.dtype | None) -> str:
    """What a merged model is made from: a digest of the adapter and its base, and the dtype."""
    return f"{weights_digest(adapter)} {dtype}"


def _merge(
    adapter: str, out: Path, dtype: torch.dtype | None, trust_remote_code: bool, source: str, noted: bool
) -> Written | None:  # fmt: skip
    """Merge into OUT.partial and rename that. `noted`: with a file that tells what it was made from."""
    base, model, tokenizer = open_adapter(adapter, trust_remote_code)
    partial = out.with_name(f"{out.name}.partial")
    written = write_model(model, tokenizer, partial, dtype or base.dtype, source, base.read)

    def move() -> None:
        if noted:
            (partial / MADE_FROM).write_text(source, encoding="utf-8")
        if out.is_dir():
            out.rmdir()  # empty, as was checked
        os.replace(partial, out)

    on_main(move)
    return written


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second `rlhf merge` away meanwhile."""
    if not is_main():
        yield
        return
    path = out.with_name(f".{out.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        if not lock_file(file):
            raise UserError(f"{out} is being written by another `rlhf merge`; wait for it, or give another folder")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def open_adapter(adapter: str, trust_remote_code: bool = False) -> tuple[Checkpoint, Any, Any]:
    """(the base's files, a PeftModel without the base's weights, the tokenizer), ready to be merged.

    Raises:
        UserError: the base's files can't be merged tensor by tensor, or lack tokens of the adapter's tokenizer.
    """
    reward = is_reward_model(adapter)
    tokenizer = load_tokenizer(adapter, trust_remote_code=trust_remote_code, encoder=reward)
    base = Checkpoint(base_of(adapter))
    model = skeleton(adapter, base, reward, trust_remote_code)
    rows = len(cast(Any, base_model(model).get_input_embeddings()).weight)
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of {adapter} has {len(tokenizer)} tokens, but its base {base.name} only {rows} embeddings; set "
            "`merge_adapter: true` in the recipe that makes the adapter"
        )
    fit_tokenizer(base_model(model), tokenizer)
    return base, model, tokenizer


def skeleton(adapter: str, base: Checkpoint, reward: bool, trust_remote_code: bool):
    """A PeftModel whose base holds no weights, and whose adapter is real."""
    from peft import PeftConfig, PeftModel

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(base.name, **options)
    if hasattr(config, "quantization_config"):
        raise UserError(f"the base {base.name} is stored quantised; an adapter can only be merged into full weights")
    auto: Any = AutoModelForCausalLM
    if reward:
        auto, config.num_labels = AutoModelForSequenceClassification, 1
    with loading_unsharded(), torch.device("meta"):
        model = auto.from_config(config, **options)
    trained = tuple(getattr(PeftConfig.from_pretrained(adapter), "modules_to_save", None) or ())
    needed = [name for name, _ in model.named_parameters() if not any(part in trained for part in name.split("."))]
    if not all(map(base.holds, needed)) and not unknown_operation(model):
        base.convert(auto, options | ({"num_labels": 1} if reward else {}))
    if missing := [name for name in needed if not base.holds(name)]:
        raise UserError(
            f"the files of {base.name} hold no {missing[0]}, nor what is known to be converted to it, so an adapter can't be "
            "merged tensor by tensor; set `merge_adapter: true` in the recipe that makes the adapter"
        )
    make_place_holders(model)
    _read_buffers(model, base)
    return PeftModel.from_pretrained(model, adapter)


def _read_buffers(model, base: Checkpoint) -> None:
    """Buffers that a file holds are copied from it; what it lacks is computed when the model loads, and not written."""
    for prefix, module in model.named_modules():
        for name in set(module._buffers) - module._non_persistent_buffers_set:
            full = f"{prefix}.{name}".lstrip(".")
            if base.holds(full):
                module._buffers[name] = base.read(full)
            else:
                module._non_persistent_buffers_set.add(name)


class Checkpoint:
    """The safetensors files of a model, read one tensor at a time; where transformers converts them, one parameter.

    Attributes:
        name: a local folder or a hub id.
        dtype: of the first floating-point tensor.
    """

    def __init__(self, name: str):
        self.name = name
        folder = local_folder(name)
        opened = [safe_open(file, "pt") for file in weight_files(folder)]
        self._file_of = {key: file for file in opened for key in file.keys()}
        self._prefixes = sorted({key.partition(".")[0] for key in self._file_of})
        dtypes = (file.get_slice(key).get_dtype() for key, file in self._file_of.items())
        self.dtype = next((_DTYPES[dtype] for dtype in dtypes if dtype in _DTYPES), torch.float32)
        self._index: Index | None = None

    def convert(self, auto, options: dict[str, Any]) -> None:
        """From now on names are those of the loaded model, which transformers makes of the files' tensors.

        Args:
            auto: `AutoModelForCausalLM`, ...
            options: for its `from_pretrained`.
        """
        self._index = index_of(self.name, auto, options | {"dtype": torch.float32})  # it casts before it converts

    def holds(self, name: str) -> bool:
        return name in self._index if self._index is not None else self.key(name) is not None

    def key(self, name: str) -> str | None:
        """A parameter's name in the files, which may lack the backbone's prefix (`model.`) or have one; None: not there."""
        candidates = [name, name.partition(".")[2], *(f"{prefix}.{name}" for prefix in self._prefixes)]
        return next((key for key in candidates if key in self._file_of), None)

    def read(self, name: str) -> torch.Tensor:
        if self._index is not None:
            return read_part(self._index[name], None)
        key = self.key(name)
        assert key is not None, name
        return self._file_of[key].get_tensor(key)


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
