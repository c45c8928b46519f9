"""Merge a LoRA adapter into its base from disk to disk: one tensor is in memory at a time, and no model is loaded.

The base is read as it was published, so an adapter that was trained on 4 bits is added to the original weights.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.console import plain_bars
from rlhf.distributed.processes import on_main
from rlhf.distributed.sharding import loading_unsharded
from rlhf.errors import UserError
from rlhf.files import free_bytes, read_json, sha256_of
from rlhf.models.digests import local_folder
from rlhf.models.folder import base_of, is_adapter, is_reward_model
from rlhf.models.pieces import base_model, list_pieces
from rlhf.models.tokenizer import load_tokenizer
from rlhf.models.writing import (
    PARTIAL,
    digest_of,
    place,
    raise_failure,
    split_files,
    take_notes,
    write_configs,
    write_files,
    write_index,
)


class Merged(NamedTuple):
    """What `merge` has written: bytes by name, the dtype and the digest of the weights."""

    files: dict[str, int]
    dtype: str
    weights_sha256: str


def merge_command(adapter: str, out: str, dtype: str | None) -> None:
    """`rlhf merge`: check the adapter and the disk, merge, and say what was written.

    Raises:
        UserError: with the place and the fix.
    """
    from rlhf.models.folder import check_model_folder, locate

    plain_bars()
    if os.path.isdir(adapter):
        check_model_folder(Path(adapter), "ADAPTER")
    if is_adapter(adapter):
        base = locate(base_of(adapter), f"{adapter}/adapter_config.json")
        found = Path(base).glob("*.safetensors") if os.path.isdir(base) else []
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


def merge(adapter: str, out: Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Merged | None:
    """Write `adapter` merged into its base, for plain transformers. A collective that all ranks must call.

    Args:
        adapter: a folder that PEFT can load.
        out: a folder that holds no model yet; the files appear there when all are written. A call that was interrupted is
            continued by the next with the same arguments.
        dtype: of the written weights; None: of the base's files.

    Returns:
        What was written, on the main rank; None on the others.

    Raises:
        UserError: no adapter, `out` holds something, or the base's files can't be read one tensor at a time.
    """
    if not is_adapter(adapter):
        raise UserError(f"{adapter} holds no adapter (no adapter_config.json); only an adapter can be merged")
    if found := [path.name for path in out.iterdir() if path.name != PARTIAL] if out.is_dir() else []:
        raise UserError(f"{out} is not empty ({sorted(found)[0]} is there); give a new folder")
    return _merge(adapter, out, dtype, trust_remote_code)


def merge_for_training(adapter: str, out: Path, dtype: torch.dtype | None, trust_remote_code: bool = False) -> str:
    """The folder of the merged model that a run starts from, made when it is first asked for. A collective.

    It is then loaded as any other model: sharded where the engine shards.
    """
    if not (out / "config.json").is_file():  # which is moved into place last
        _merge(adapter, out, dtype, trust_remote_code)
    return str(out)


def _merge(adapter: str, out: Path, dtype: torch.dtype | None, trust_remote_code: bool) -> Merged | None:
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
    dtype = dtype or base.dtype
    partial, merged = out / PARTIAL, list[Merged]()
    files = split_files(list_pieces(model, dtype, base.read))
    on_main(lambda: partial.mkdir(parents=True, exist_ok=True))
    made_from = f"{sha256_of(Path(adapter) / 'adapter_model.safetensors')} {base.name} {dtype}"
    failure = write_files(files, partial, made_from)

    def complete() -> None:
        raise_failure(failure, partial)
        write_configs(model, tokenizer, partial, dtype)
        write_index(partial, files)
        digest = digest_of(take_notes(partial, files))
        merged.append(Merged(place(partial, out), str(dtype).removeprefix("torch."), digest))

    on_main(complete)
    return merged[0] if merged else None


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
    missing = [name for name, _ in model.named_parameters() if base.key(name) is None]
    peft_config = PeftConfig.from_pretrained(adapter)
    trained = tuple(getattr(peft_config, "modules_to_save", None) or ())
    missing = [name for name in missing if not any(part in trained for part in name.split("."))]
    if missing:
        raise UserError(
            f"the files of {base.name} hold no {missing[0]}: transformers converts this architecture when it loads, so it can't be "
            "merged tensor by tensor; set `merge_adapter: true` in the recipe that makes the adapter"
        )
    _place_holders(model, trained)
    return PeftModel.from_pretrained(model, adapter)


def _place_holders(model, trained: tuple[str, ...]) -> None:
    """Give parameters on the meta device one element of memory each, or all of it where PEFT copies trained values to.

    PEFT would move an adapter to the device of its base: to meta.
    """
    made: dict[int, torch.nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                size = parameter.shape if set(trained) & set(module_name.split(".")) else (1,) * parameter.dim()
                tensor = torch.zeros(size, dtype=parameter.dtype).expand(parameter.shape)
                made[id(parameter)] = torch.nn.Parameter(tensor, requires_grad=False)
            module._parameters[name] = made[id(parameter)]


class Checkpoint:
    """The safetensors files of a model, read one tensor at a time.

    Attributes:
        name: a local folder or a hub id.
        dtype: of the first floating-point tensor.
    """

    def __init__(self, name: str):
        self.name = name
        folder = local_folder(name)
        index = read_json(folder / "model.safetensors.index.json")
        files = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
        opened = [safe_open(folder / file, "pt") for file in files]
        self._file_of = {key: file for file in opened for key in file.keys()}
        self._prefixes = sorted({key.partition(".")[0] for key in self._file_of})
        dtypes = (file.get_slice(key).get_dtype() for key, file in self._file_of.items())
        self.dtype = next((_DTYPES[dtype] for dtype in dtypes if dtype in _DTYPES), torch.float32)

    def key(self, name: str) -> str | None:
        """A parameter's name in the files, which may lack the backbone's prefix (`model.`) or have one; None: not there."""
        candidates = [name, name.partition(".")[2], *(f"{prefix}.{name}" for prefix in self._prefixes)]
        return next((key for key in candidates if key in self._file_of), None)

    def read(self, name: str) -> torch.Tensor:
        key = self.key(name)
        assert key is not None, name
        return self._file_of[key].get_tensor(key)

    def read_rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Some rows of a tensor; nothing else of it is read."""
        key = self.key(name)
        assert key is not None, name
        return self._file_of[key].get_slice(key)[start:end]


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
