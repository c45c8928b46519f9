"""The wheels of a bundle: this package and what it requires, in the versions of requirements.lock, for this Python."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rlhf import __version__
from rlhf.errors import UserError, one_line

DISTRIBUTION = "rlhf-dpo"
EXTRAS = {
    "deepspeed": "deepspeed",
    "quant": "bitsandbytes",
}  # of pyproject.toml, with the module that shows it is installed
SOURCES = ("pyproject.toml", "README.md", "LICENSE")


def extras() -> list[str]:
    """The extras of this package that are installed here: a recipe that runs here may need them."""
    return [extra for extra, module in EXTRAS.items() if importlib.util.find_spec(module)]


def requirement() -> str:
    """What is to be installed: `rlhf-dpo[deepspeed,quant]==0.1.0`."""
    chosen = ",".join(extras())
    return f"{DISTRIBUTION}{f'[{chosen}]' if chosen else ''}=={__version__}"


def target() -> dict[str, str]:
    """What the wheels are for."""
    version = "{}.{}".format(*sys.version_info[:2])
    return {"python": version, "system": sys.platform, "machine": platform.machine()}


def estimate() -> tuple[int, int]:
    """(number, bytes) of the packages here that the wheels will be of, as they are installed: wheels are smaller."""
    from packaging.requirements import Requirement

    chosen: list[tuple[str, tuple[str, ...]]] = [(DISTRIBUTION, tuple(extras()))]
    seen: dict[str, int] = {}
    asked = set()
    for name, wanted in chosen:  # grows
        if (name, wanted) in asked:
            continue
        asked.add((name, wanted))
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # another machine's
            continue
        seen[found.name.lower().replace("_", "-")] = sum(file.size or 0 for file in found.files or ())
        for line in found.requires or ():
            needs = Requirement(line)
            if needs.marker is None or any(needs.marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
                chosen.append((needs.name, tuple(sorted(needs.extras))))
    return len(seen), sum(seen.values())


def build(project: Path, folder: Path) -> list[Path]:
    """Fetch and build the wheels with pip, as its configuration says; none of that configuration goes into them.

    Args:
        project: the checkout: its package, and its requirements.lock for the versions.
        folder: an empty one.

    Raises:
        UserError: pip fails.
    """
    source = folder / "source"  # setuptools leaves files behind, and takes what it finds of earlier builds
    shutil.copytree(project / "rlhf", source / "rlhf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(project / name, source)
    chosen = ",".join(extras())
    command = [
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-input", "--disable-pip-version-check", "--wheel-dir", str(folder),
        "--constraint", str(project / "requirements.lock"), f"{source}[{chosen}]" if chosen else str(source),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    shutil.rmtree(source)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()[-1:]
        reason = re.sub(r"://[^\s/@]*@", "://", one_line(lines[-1] if lines else "it wrote no wheel", 300))
        raise UserError(
            f"pip could not fetch or build the wheels: {reason}; check the network or the package index, or leave them out "
            "with --no-wheels"
        )
    return found
