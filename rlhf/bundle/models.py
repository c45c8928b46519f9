"""The models of a bundle: the files of a folder that loading reads, hub models out of the local cache, the embedded one."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from rlhf.bundle.archive import Item
from rlhf.data.heldout import TRAIN_PROMPTS
from rlhf.errors import UserError, quote
from rlhf.files import cache_dir, read_json
from rlhf.models import embedded
from rlhf.models.folder import base_of, check_model_folder, is_adapter, weight_files, weights_damage

HUB = "hub/models"  # HF_HUB_CACHE of a bundle, in the layout of the hub's client
EMBEDDED = f"cache/models/{embedded.NAME.removeprefix(embedded.PREFIX)}"
# Configurations, tokenizers, templates, code, licences: what transformers may read beside weights.
SMALL = frozenset((".json", ".txt", ".model", ".jinja", ".py", ".md", ".tiktoken", ".spm", ".bpe", ".vocab"))
NAMES = frozenset(("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY", TRAIN_PROMPTS))
TEMPLATES = "additional_chat_templates"


def folder_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(the files of a model folder that loading reads, what lies beside them)."""
    weights, taken, left = set(weight_files(folder)), [], []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name == TEMPLATES:
            taken += sorted(p for p in path.iterdir() if p.suffix == ".jinja" and p.is_file())
        elif not path.name.startswith(".") and path.is_file() and (
            path in weights or path.suffix.lower() in SMALL or path.name in NAMES
        ):  # fmt: skip
            taken.append(path)
        else:
            left.append(path)
    return taken, left


def folder_items(folder: Path, place: str, base: str | None = None) -> list[Item]:
    """The items of a local model.

    Args:
        place: its folder in the bundle.
        base: of an adapter: the new name of its base; None leaves it.
    """
    items = []
    for path in folder_files(folder)[0]:
        name = f"{place}/{path.relative_to(folder).as_posix()}"
        if path.name == "adapter_config.json" and base is not None:
            items.append(Item.text(name, "model", json.dumps(_with_base(path, base), indent=2) + "\n"))
        else:
            items.append(Item.copy(name, "model", path))
    return items


def _with_base(path: Path, base: str) -> dict[str, Any]:
    return {**(read_json(path) or {}), "base_model_name_or_path": base}


def check_folder(folder: Path, where: str) -> str:
    """Check a local model; returns the name of an adapter's base, or ''.

    Raises:
        UserError: what is missing or damaged.
    """
    check_model_folder(folder, where)
    return base_of(str(folder)) if is_adapter(str(folder)) else ""


def embedded_items(where: str) -> list[Item]:
    """The embedded model, out of the cache.

    Raises:
        UserError: it has not been fetched.
    """
    if not embedded.is_fetched():
        raise UserError(f"{where}: {embedded.NAME} is not in {cache_dir()}; fetch it with: rlhf fetch")
    folder = cache_dir() / "models" / Path(EMBEDDED).name
    return [Item.copy(f"{EMBEDDED}/{path.name}", "model", path) for path in sorted(folder.iterdir())]


def hub_items(name: str, revision: str, where: str) -> tuple[list[Item], list[tuple[str, str]]]:
    """A hub model's files in the local cache.

    Returns:
        (items, other models that it needs, as (name, revision): an adapter's base, and where its code is)

    Raises:
        UserError: not in the cache, or not all of it, with the command that fetches it.
    """
    command = f"hf download {name}" + (f" --revision {revision}" if revision != "main" else "")
    snapshot = cached_snapshot(name, revision)
    if snapshot is None:
        raise UserError(
            f"{where}: '{name}' is neither a local folder nor in the hub's local cache; fetch it with: {command}"
        )
    stem = "adapter_model" if is_adapter(str(snapshot)) else "model"
    if damage := weights_damage(snapshot, stem):
        raise UserError(
            f"{where}: '{name}' is not complete in the hub's local cache ({damage}); fetch it with: {command}"
        )
    needs = _code_repositories(snapshot)
    if stem == "adapter_model":
        needs.append((base_of(str(snapshot)), "main"))
    return snapshot_items(name, revision, snapshot), needs


def code_items(name: str, where: str) -> list[Item]:
    """The code of a hub repository that another model's configuration names."""
    snapshot = cached_snapshot(name, "main", "*.py")
    if snapshot is None:
        raise UserError(f"{where}: code of '{name}' is not in the hub's local cache; fetch it with: hf download {name}")
    return [
        item for item in snapshot_items(name, "main", snapshot) if item.name.endswith(".py") or "/refs/" in item.name
    ]


def cached_snapshot(name: str, revision: str, pattern: str = "*config.json") -> Path | None:
    """The folder of a hub model's revision in the local cache, if it has a file of this pattern."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / _cache_name(name)
    try:
        commit = (folder / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        commit = revision
    snapshot = folder / "snapshots" / commit
    return snapshot if re.fullmatch(r"[\w.-]+", commit) and any(snapshot.glob(pattern)) else None


def snapshot_items(name: str, revision: str, snapshot: Path) -> list[Item]:
    """A snapshot in the layout of the hub's cache, with files where that has links."""
    place = f"{HUB}/{_cache_name(name)}"
    items = [
        Item.copy(f"{place}/snapshots/{snapshot.name}/{path.relative_to(snapshot).as_posix()}", "model", path)
        for path in folder_files(snapshot)[0]
    ]
    # what the hub's client knows not to exist: transformers looks for these files
    absent = snapshot.parent.parent / ".no_exist" / snapshot.name
    if absent.is_dir():
        marks = sorted(path.name for path in absent.iterdir() if path.is_file())
        items += [Item.text(f"{place}/.no_exist/{snapshot.name}/{mark}", "model", "") for mark in marks]
    # `main` too: configurations are looked up without a revision; where a recipe wants the real one, it comes after this
    for reference in dict.fromkeys(("main", revision)):
        if reference != snapshot.name:
            items.append(Item.text(f"{place}/refs/{reference}", "model", snapshot.name))
    return items


def _cache_name(name: str) -> str:
    return "--".join(("models", *name.split("/")))


def _code_repositories(snapshot: Path) -> list[tuple[str, str]]:
    """Other repositories whose code a configuration names: `auto_map: {AutoModel: org/name--file.Class}`."""
    found = set()
    for file in ("config.json", "tokenizer_config.json"):
        values = (read_json(snapshot / file) or {}).get("auto_map")
        for value in json.dumps(values).split('"'):
            if "--" in value:
                found.add(value.split("--")[0])
    return [(name, "code") for name in sorted(found)]


def is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not name.startswith((".", "/", "~"))


def is_local(name: str) -> bool:
    return os.path.isdir(os.path.expanduser(name))


def no_such_model(name: str, where: str) -> UserError:
    return UserError(f"{where}: no model at {quote(name)[1:-1]}")
