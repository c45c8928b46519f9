"""The wheels that a GPU machine without a registry may lack: downloaded where there is one, used there from a folder.

A machine with GPUs usually has torch, transformers, accelerate and peft in builds of its own, which must stay as they are. So
only the packages below are brought along, without what they need in turn, and go into a folder that the parts' processes find
first: nothing of the machine changes.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
# In the versions of requirements.lock; liger-kernel (pure Python) is not among this project's own, and any version will do.
NEEDED = (
    "trl", "peft", "datasets", "dill", "multiprocess", "bitsandbytes", "gguf",
    "deepspeed", "hjson", "pydantic", "pydantic-core", "annotated-types", "typing-inspection",
)  # fmt: skip
OPTIONAL = ("liger-kernel",)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)] + ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64", "linux_x86_64"]  # fmt: skip


def collect(folder: Path, python: str) -> int:
    """Download or build the wheels into a folder; returns the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.M))
    failed = []
    for name in (*NEEDED, *OPTIONAL):
        wanted = f"{name}=={locked[name]}" if name in locked else name
        if not download(wanted, folder, python) and not build(wanted, folder):
            failed.append(wanted)
    for wheel in sorted(folder.glob("*.whl")):
        print(f"{wheel.stat().st_size / 1e6:8.1f} MB  {wheel.name}")
    needed = [wanted for wanted in failed if wanted.split("==")[0] in NEEDED]
    if failed:
        print(f"gpu_proof.py: not found: {', '.join(failed)}", file=sys.stderr)
    return 1 if needed else 0


def download(wanted: str, folder: Path, python: str) -> bool:
    """Fetch a wheel for another machine's Python."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        python,
    ]
    command += [
        "--implementation",
        "cp",
        *(word for name in PLATFORMS for word in ("--platform", name)),
        "--dest",
        str(folder),
        wanted,
    ]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def build(wanted: str, folder: Path) -> bool:
    """Build a wheel of a package that has only sources, if it is one for any Python (DeepSpeed compiles when it is used)."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            scratch,
            wanted,
        ]
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
            return False
        made = [wheel for wheel in Path(scratch).glob("*.whl") if wheel.name.endswith("-none-any.whl")]
        for wheel in made:
            (folder / wheel.name).write_bytes(wheel.read_bytes())
        return bool(made)


def install(wheels: Path, site: Path) -> Path:
    """Unpack those of the wheels that are not installed here in their version into `site`, with no index.

    Raises:
        SystemExit: there is no wheel, or pip fails.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise SystemExit(
            f"gpu_proof.py: --wheels {wheels} holds no wheels; --collect {wheels} makes it, where there is a registry"
        )
    missing = [str(wheel) for wheel in found if not is_installed(wheel, site)]
    if missing:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--upgrade",
            "--target",
            str(site),
        ]
        done = subprocess.run([*command, *missing], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"gpu_proof.py: pip could not install the wheels of {wheels}:\n{done.stderr[-2000:]}")
    return site


def is_installed(wheel: Path, site: Path) -> bool:
    """Whether this Python, or `site`, has the package of a wheel (`trl-1.16.0-py3-none-any.whl`) in a version that will do: within
    this project's bounds or, if it has none for the package, that of the wheel."""
    from packaging.requirements import Requirement

    name, version = wheel.name.split("-")[:2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    bounds = {plain(needs.name): needs.specifier for needs in map(Requirement, lines)}
    found = [
        d.version for d in importlib.metadata.distributions(path=[str(site), *sys.path]) if plain(d.name) == plain(name)
    ]
    if plain(name) in bounds:
        return any(
            bounds[plain(name)].contains(one, prereleases=True) for one in found[:1]
        )  # the first is what is imported
    return version in found[:1]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
