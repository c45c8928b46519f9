"""Probes of a rank's own host before training: versions, devices, paths, disks. No communication."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import shutil
import socket
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

import psutil
import torch

from rlhf.config.evaluated import model_keys
from rlhf.config.recipe import Recipe
from rlhf.data.folders import is_data_name
from rlhf.files import cache_dir
from rlhf.models.embedded import NAME, PREFIX
from rlhf.runs.lineage import maker_of, sibling_that_makes
from rlhf.runs.provenance import environment
from rlhf.runs.records import read_recipe

MODEL_KEYS = ("model_name_or_path", "reference_model", "base_model", "sft_model", "reward_model", "dpo_model")
DATA_KEYS = ("dataset_name", "eval_dataset_name", "chosen_dataset_name", "rejected_dataset_name")
CANARY_WAIT_S = 5.0  # on network file systems a new file appears on other hosts with a delay
FEW_INODES = 1000


def describe(local_rank: int, on_cpu: bool) -> dict[str, Any]:
    """Versions, device and network of this process, as JSON types."""
    about = environment()
    versions = about["versions"] | {"python": platform.python_version(), "CUDA": torch.version.cuda}
    return {
        "versions": versions | {"code": about["git_commit"]},
        "executable": sys.executable,
        "cores": len(os.sched_getaffinity(0)),
        "memory": [psutil.virtual_memory().available, psutil.virtual_memory().total],
        "device": describe_device(local_rank, on_cpu),
        "driver": driver_version(),
        "hostname_address": address_of(platform.node()),
        "interfaces": sorted(psutil.net_if_addrs()),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", ""),
        "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", ""),
        "route": interface_to(os.environ.get("MASTER_ADDR", "")),
    }


def describe_device(local_rank: int, on_cpu: bool) -> dict[str, Any]:
    """The device that this process will train on: {kind: cpu | cuda, problem: '' or why a GPU can't be used, ...}."""
    if on_cpu or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return {"kind": "cpu", "problem": ""}
    if not torch.cuda.is_available():
        return {"kind": "cpu", "problem": why_no_gpu() if Path("/dev/nvidia0").exists() else ""}
    count = torch.cuda.device_count()
    if local_rank >= count:
        return {"kind": "cpu", "problem": f"local rank {local_rank} (from 0), but the host has only {count} GPUs"}
    try:
        free, total = torch.cuda.mem_get_info(local_rank)
        properties = torch.cuda.get_device_properties(local_rank)
        return {
            "kind": "cuda", "problem": "", "name": properties.name, "memory": [free, total], "count": count,
            "uuid": str(getattr(properties, "uuid", "")),
        }  # fmt: skip
    except RuntimeError as error:  # a GPU in exclusive use by another process, or one that has fallen off the bus
        return {"kind": "cpu", "problem": str(error).splitlines()[0][:200]}


def why_no_gpu() -> str:
    """Why torch finds none of the host's GPUs."""
    if torch.version.cuda is None:
        return "there is a GPU, but this torch is a CPU build; install the CUDA build of the same version"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"torch (CUDA {torch.version.cuda}) can't use the GPU: {str(error).splitlines()[0][:200]}"
    return f"torch (CUDA {torch.version.cuda}) can't use the GPU"


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of NVIDIA's kernel module; None without one."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", file.read_text())
    except OSError:
        return None
    return found and found.group()


def address_of(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def interface_to(address: str) -> str:
    """The interface through which this host reaches an address; '' if there is no route."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing: UDP only looks up the route
        own = probe.getsockname()[0]
        return next((n for n, found in psutil.net_if_addrs().items() if any(a.address == own for a in found)), "")
    return ""


# --- paths -----------------------------------------------------------------------------------------------------------


def look_at_paths(recipe: Recipe) -> dict[str, list]:
    """`[state, detail]` of each model and data file of a recipe, by key, as this host sees it.

    States: `there` (with its size in bytes), `cached` (by the hub's client), `absent` (no such path), `hub` (not
    cached, but the hub is reachable) or `no hub`.
    """
    found = {}
    named = {key: recipe.get(key) for key in (*MODEL_KEYS, *DATA_KEYS, "chat_template")}
    models = set(MODEL_KEYS)
    if recipe.stage == "evaluate":
        named |= model_keys(recipe.values)
        models |= set(model_keys(recipe.values))
    for key, name in named.items():
        if not name or (key == "chat_template" and not name.endswith(".jinja")) or name.startswith(PREFIX):
            continue
        found[key] = look_at(name, "model" if key in models else "dataset", bool(maker_of(recipe, name)))
    return found


def look_at(name: str, kind: str, is_output: bool) -> list:
    path = Path(name).expanduser()
    if path.exists():
        return ["there", path_bytes(path)]
    is_path = is_output or name.startswith((".", "/", "~")) or is_data_name(path.name) or path.suffix == ".jinja"
    if is_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return ["absent", 0]
    if hub_cache(name, kind):
        return ["cached", 0]
    return ["hub" if hub_answers() else "no hub", 0]


def path_bytes(path: Path) -> int:
    """Bytes of a file, or of the files directly in a folder."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file())


def hub_cache(name: str, kind: str) -> Path | None:
    """The newest snapshot of a model or data set in the hub client's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    snapshots = [s for s in folder.iterdir() if any(s.iterdir())] if folder.is_dir() else []
    return max(snapshots, key=lambda s: s.stat().st_mtime, default=None)


def hub_answers() -> bool:
    """Whether the model hub, or the proxy to it, accepts a connection."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    proxy = next(
        (os.environ[n] for n in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy") if n in os.environ), ""
    )
    url = urllib.parse.urlsplit(proxy or os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=5).close()
        return True
    except (OSError, ValueError):
        return False


# --- disks -----------------------------------------------------------------------------------------------------------


def nearest_folder(path: str) -> str:
    """The folder itself, or its nearest existing parent."""
    folder = Path(path).expanduser().absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return str(folder)


def disk_facts(folder: str) -> dict[str, Any]:
    """Free and total bytes, and free inodes (None: the file system doesn't count them)."""
    usage, inodes = shutil.disk_usage(folder), os.statvfs(folder)
    return {"free": usage.free, "total": usage.total, "inodes": inodes.f_favail if inodes.f_files else None}


def write_canary(folder: str, name: str) -> str:
    """Write a small file that other ranks will look for; returns '' or the system's error."""
    try:
        with open(Path(folder) / name, "w", encoding="utf-8") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
        return ""
    except OSError as error:
        return disk_words(error)


def sees_canary(folder: str, name: str, wait_s: float = CANARY_WAIT_S) -> bool:
    """Whether another host's canary can be read here within `wait_s`."""
    deadline = time.monotonic() + wait_s
    while True:
        with contextlib.suppress(OSError):
            if (Path(folder) / name).read_text(encoding="utf-8") == name:
                return True
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(OSError):
            os.listdir(folder)  # makes NFS refresh its cache
        time.sleep(0.2)


def remove_canary(folder: str, name: str) -> None:
    with contextlib.suppress(OSError):
        (Path(folder) / name).unlink(missing_ok=True)


def write_speed(folder: str, name: str, num_bytes: int, most_s: float = 10.0) -> tuple[float, str]:
    """Measure writing a file with fsync, as for a checkpoint.

    Returns:
        (bytes per second, '') or (0, the system's error). On a slow disk it stops after `most_s` seconds.
    """
    block, written = os.urandom(1 << 20), 0  # random: some file systems compress
    started = time.perf_counter()
    path = Path(folder) / name
    try:
        with open(path, "wb") as file:
            while written < num_bytes and time.perf_counter() - started < most_s:
                written += file.write(block)
                if written % (16 << 20) == 0:
                    file.flush()
                    os.fsync(file.fileno())
            file.flush()
            os.fsync(file.fileno())
        return written / (time.perf_counter() - started), ""
    except OSError as error:
        return 0.0, disk_words(error)
    finally:
        remove_canary(folder, name)


def disk_words(error: OSError) -> str:
    """A short description of a disk error, with the fix."""
    fixes = {
        errno.ENOSPC: "the disk is full (or has no free inodes): free some space",
        errno.EDQUOT: "your disk quota is exceeded: free some space",
        errno.EROFS: "it is mounted read-only",
        errno.EACCES: "this user has no write permission there",
        errno.EPERM: "this user has no write permission there",
        errno.ESTALE: "a stale network mount: remount it",
    }
    return fixes.get(error.errno or 0, error.strerror or str(error))


# --- the model -------------------------------------------------------------------------------------------------------


def model_folder(recipe: Recipe) -> Path | None:
    """The folder with the weights of the recipe's model; if that has yet to be made, of the model it starts from."""
    name = recipe.get("model_name_or_path")
    for _ in range(3):
        if not name:
            return None
        path = cache_dir() / "models" / NAME.removeprefix(PREFIX) if name == NAME else Path(name).expanduser()
        path = path if path.is_dir() else hub_cache(name, "model") or path
        if path.is_dir() and any(path.glob("*.safetensors")):
            return path
        made_by = sibling_that_makes(recipe, name)
        if not made_by:
            return None
        name = (read_recipe(made_by[1]) or {}).get("model_name_or_path")
        name = name if isinstance(name, str) else ""
    return None
