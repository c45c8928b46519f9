"""Check by names and headers whether a local folder has a loadable model: no torch, no weights are read."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from rlhf.errors import UserError, quote
from rlhf.files import read_json
from rlhf.models import embedded


def is_adapter(name: str) -> bool:
    """Whether a local folder holds a PEFT adapter instead of a full model."""
    return (Path(name) / "adapter_config.json").is_file()


def base_of(name: str) -> str:
    """The base of an adapter folder; any other name unchanged."""
    if not is_adapter(name):
        return name
    base = (read_json(Path(name) / "adapter_config.json") or {}).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{Path(name) / 'adapter_config.json'} is damaged: base_model_name_or_path is missing")
    return base


def revision_of(name: str, asked: str) -> str:
    """The hub's revision to load: the recipe's `model_revision`; of a folder, and so of an adapter's base, `main`."""
    return "main" if os.path.isdir(name) else asked


def commit_of(name: str, revision: str) -> str | None:
    """The commit of a hub's model whose config has been loaded; None for a folder."""
    if os.path.isdir(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def is_reward_model(name: str) -> bool:
    """Whether a local folder holds a sequence classifier, or an adapter for one."""
    for file, key, mark in (
        ("adapter_config.json", "task_type", "SEQ_CLS"),
        ("config.json", "architectures", "SequenceClassification"),
    ):
        if (Path(name) / file).is_file():
            return mark in str((read_json(Path(name) / file) or {}).get(key))
    return False


def locate(name: str, where: str, made_by: str = "", say=print) -> str:
    """Check that a model exists before anything loads, and fetch the embedded one.

    Args:
        name: `embedded:…`, a local folder, or a hub id.
        where: `recipe:line` where the name was given.
        made_by: the command that creates this folder, if known.

    Returns:
        A name for `from_pretrained`; local folders become absolute, so that adapters find their base later.

    Raises:
        UserError: a folder without a model, or a hub id that can't be reached.
    """
    name = embedded.resolve(name, say)
    path = Path(name).expanduser()
    if os.path.isdir(path):
        check_model_folder(path, where, made_by)
        return str(path.resolve())
    if made_by:
        raise UserError(f"{where}: no model at {name}; it is created by: {made_by}")
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name)
    except Exception as error:  # the hub's client raises a dozen types: offline, 404, gated, no config
        if "trust_remote_code" in str(error):
            return name
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{where}: '{name}' is not a local folder and could not be loaded from the hub: {reason}"
        ) from None
    return name


MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def check_model_folder(folder: Path, where: str, made_by: str = "") -> None:
    """Reject a folder whose model can't be loaded.

    Args:
        where: `recipe:line` where the folder was given.
        made_by: the command that creates it, if known.

    Raises:
        UserError: names the file that is missing, damaged or pickled.
    """
    is_adapter = os.path.isfile(folder / "adapter_config.json")
    config = "adapter_config.json" if is_adapter else "config.json"
    if not os.path.lexists(folder / config):
        hint = f"; its stage is not complete, run: {made_by}" if made_by else ""
        raise UserError(f"{where}: {folder} has no finished model (no config.json or adapter_config.json){hint}")
    values = read_json(folder / config)
    again = f"run: {made_by}" if made_by else "save or copy the model again, with safetensors"
    if values is None:
        raise UserError(f"{where}: {folder / config} can't be read as a JSON object; {again}")
    base = values.get("base_model_name_or_path")
    if is_adapter and not isinstance(base, str):
        raise UserError(
            f"{where}: {folder / config}: 'base_model_name_or_path' is {quote(base)}, expected a string; {again}"
        )
    damage = weights_damage(folder, "adapter_model" if is_adapter else "model")
    if damage:
        raise UserError(f"{where}: {damage}; {again}")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model's or an adapter's weights are loaded from; not what may lie beside them."""
    for stem in ("adapter_model", "model"):
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
        shards = (read_json(folder / f"{stem}.safetensors.index.json") or {}).get("weight_map")
        if isinstance(shards, dict):
            return [folder / name for name in sorted(set(shards.values())) if (folder / name).is_file()]
    return []


def weights_damage(folder: Path, stem: str) -> str:
    """The damage of a model folder's safetensors files; '' if none.

    Args:
        stem: `model`, or `adapter_model`.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if os.path.lexists(folder / f"{stem}.safetensors"):
        names = [f"{stem}.safetensors"]
    elif os.path.lexists(index):
        shards = (read_json(index) or {}).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            return f"{index} can't be read (expected 'weight_map', tensors to file names)"
        names = sorted(set(shards.values()))
    else:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
        what = f"has no {stem}.safetensors"
        if not pickled:
            return f"{folder} {what}"
        return f"{folder} {what}; pickled weights are not loaded ({quote(pickled[0])}: a pickle can run any code, safetensors can't)"
    found = (safetensors_damage(folder / name) for name in names)
    return next(filter(None, found), "") or ("" if names else f"{index} lists no files")


def safetensors_damage(path: Path) -> str:
    """The damage of a safetensors file, judged by header and size; '' if none.

    Source: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the tensors' bytes).
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(size - 8, MAX_HEADER_BYTES):
                return f"{path} is truncated or not a safetensors file"
            header = json.loads(file.read(length))
        end = max((_end(name, tensor) for name, tensor in header.items()), default=0)
    except FileNotFoundError:
        link = " (a dangling link)" if path.is_symlink() else ""
        return f"{path} is missing{link}"
    except OSError as error:
        return f"{path} can't be read: {error.strerror}"
    except (struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return f"{path} is not a safetensors file (its header can't be read)"
    if 8 + length + end != size:
        return f"{path} has {size} bytes, but its header requires {8 + length + end}"
    return ""


def _end(name: str, tensor: dict[str, Any]) -> int:
    return 0 if name == "__metadata__" else int(tensor["data_offsets"][1])
