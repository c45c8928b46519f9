"""Finished models by name, for the commands that put them to work: found and checked before torch is imported, then loaded."""

from __future__ import annotations

import gc
import os
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.sources import use_cache_without_network
from rlhf.distributed.processes import is_main
from rlhf.errors import UserError, quote

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Found:
    """A model that is there.

    Attributes:
        name: as it is shown.
        path: for `load_finished`.
        reward: it is a reward model.
    """

    name: str
    path: str
    reward: bool


def find(name: str, beside: str = "", command: str = "chat") -> str:
    """Resolve a model's name without network access.

    Args:
        name: `embedded:…`, a folder, the name of a run in `runs` or next to `beside`, or `org/name` on the hub.
        beside: the folder of the first model of the chat.
        command: the one that messages start with.

    Raises:
        UserError: the name is none of these.
    """
    path = Path(name).expanduser()
    if name.startswith("embedded:") or path.is_dir():
        return name
    places = [Path(beside).parent] if beside and Path(beside).is_dir() else []
    for place in [*places, Path("runs")]:
        if any((place / name / file).is_file() for file in ("config.json", "adapter_config.json")):
            return str(place / name)
    if HUB_ID.fullmatch(name) and not path.parent.is_dir():
        return name
    raise UserError(
        f"{command}: {quote(name)} is neither a local folder nor a run in runs/; give a stage's output, such as "
        "runs/quickstart/dpo, or a model on the hub by its full name, such as org/name"
    )


def look_for_network(seconds: float = 1.5) -> None:
    """Make the hub client use its cache only if the hub's name can't be resolved in time: it would retry for 20 s."""
    lookup = threading.Thread(target=use_cache_without_network, daemon=True)  # a resolver may have a long time-out
    lookup.start()
    lookup.join(seconds)
    if lookup.is_alive() or os.environ.get("HF_HUB_OFFLINE") == "1":
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True  # the variable was read at import


def resolve(name: str, command: str, reward: bool, beside: str = "") -> Found:
    """Find a model and check that it is of the right kind; nothing is loaded.

    Raises:
        UserError: there is no such model, it is damaged, or it is a policy in place of a reward model, or the other way round.
    """
    from rlhf.models.folder import is_reward_model, locate

    name = find(name, beside, command)
    if not name.startswith("embedded:") and not Path(name).expanduser().is_dir():
        look_for_network()
    path = locate(name, command, say=lambda text: print(text, file=sys.stderr) if is_main() else None)
    if is_reward_model(path) == reward:
        return Found(name, path, reward)
    if reward:
        raise UserError(
            f"{name} is not a reward model; give the output of `rlhf reward`, such as runs/quickstart/reward"
        )
    what = "chat with a policy and add" if command == "chat" else "give a policy, and this one as"
    raise UserError(f"{name} is a reward model, which scores and can't generate; {what} --reward {name}")


def load(found: Found, *, device: Any = None, dtype: str | None = None, load_in_4bit: bool = False) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer)

    Args:
        device: default: a GPU if there is one.
        dtype: default: the checkpoint's on a GPU, float32 on a CPU.
    """
    import torch

    from rlhf.console import quiet_libraries
    from rlhf.models.inference import load_finished

    quiet_libraries()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return load_finished(
        found.path, reward=found.reward, device=device, dtype=dtype_on(device, dtype), load_in_4bit=load_in_4bit
    )


def dtype_on(device: Any, dtype: str | None) -> str | None:
    """What a model is loaded in: None for its checkpoint's dtype."""
    return dtype or (None if device.type == "cuda" else "float32")


def device_of_process() -> Any:
    """The device of this process, once the process group is there. A collective."""
    import torch
    from accelerate import PartialState

    from rlhf.console import quiet_libraries

    quiet_libraries()
    return PartialState(cpu=not torch.cuda.is_available() or None).device  # else unconnected processes on CPUs


def free_memory() -> None:
    """Give the memory of dropped models back, on a GPU to the driver."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
