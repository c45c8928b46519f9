"""The wheel holds all that the package needs: its file list is compared with the sources, and it runs from where it is unpacked."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from rlhf import __version__

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
# What a move of files looks like: a package in a package, and a folder of data in it.
NEW = {
    "rlhf/new/__init__.py",
    "rlhf/new/inner/__init__.py",
    "rlhf/new/templates/a.jinja",
    "rlhf/new/inner/rows/b.jsonl",
}


def files_of(folder):
    paths = (folder / "rlhf").rglob("*")
    return {str(p.relative_to(folder)) for p in paths if p.is_file() and "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(a copy of the sources with more files in it, the wheel built of it). No network: setuptools is in the lock."""
    pytest.importorskip("setuptools", minversion="77", reason="older ones don't read a licence expression")
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(ROOT / "rlhf", folder / "rlhf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in NEW:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    words = [sys.executable, "-c", BUILD, str(folder / "dist")]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(folder / "dist" / done.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(folder / "unpacked")
    return folder, folder / "unpacked"


def test_the_wheel_holds_every_file_of_the_package(built):
    sources, wheel = built
    assert files_of(wheel) == files_of(sources) == files_of(ROOT) | NEW
    kinds = {Path(name).suffix for name in files_of(ROOT)}
    assert {".py", ".jinja", ".jsonl", ".typed"} <= kinds


def test_the_metadata(built):
    """The licence is said once, by its expression; a classifier for it beside that is refused by setuptools."""
    (info,) = built[1].glob("*.dist-info")
    metadata = Parser().parsestr((info / "METADATA").read_text(encoding="utf-8"))
    assert (metadata["Name"], metadata["Version"], metadata["License-Expression"]) == ("rlhf-dpo", __version__, "Apache-2.0")  # fmt: skip
    assert (ROOT / "LICENSE").read_text().split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert not [c for c in metadata.get_all("Classifier") if c.startswith("License")]
    assert metadata["Author"] == "The rlhf-dpo developers" and metadata["Keywords"]


def test_the_package_runs_from_its_wheel(built, tmp_path):
    """With its own data: the sample is read from beside the code that was unpacked."""
    code = (
        "import rlhf.__main__ as m, rlhf.data.sources as s; print(s.SAMPLE_DIR); m.main(['pairs', 'embedded:sample'])"
    )
    environment = os.environ | {"PYTHONPATH": str(built[1])}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[0]).is_relative_to(built[1])
    assert len((tmp_path / "data" / "processed" / "preference_data.jsonl").read_text().splitlines()) == 200
