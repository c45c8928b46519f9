"""A bundle is unpacked elsewhere, and its recipe trains the same weights where there is no network and nothing of the original."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from rlhf import __version__
from rlhf.bundle import pack, wheels

NETLESS = Path(__file__).with_name("netless.py")


def can_leave_the_network():
    return shutil.which("unshare") and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0


needs_namespace = pytest.mark.skipif(not can_leave_the_network(), reason="may not make network namespaces (no root)")


@needs_namespace
def test_the_same_weights_without_a_network(job):
    """SFT, then DPO of its output, once at home and once from the bundle, when all that the recipes named is gone."""
    for stage in ("sft", "dpo"):
        done = forked.run("-m", "rlhf", stage, job.recipes / f"{stage}.yaml", cwd=job.root / "here")
        assert done.returncode == 0, done.stderr
    weights = {stage: (job.away / "out" / stage / "model.safetensors").read_bytes() for stage in ("sft", "dpo")}
    assert weights["sft"] != weights["dpo"]
    assert (job.bundle(), job.unbundle()) == (0, 0)
    shutil.rmtree(job.away)
    for stage in ("sft", "dpo"):
        done = forked.run(
            "-m", "rlhf", stage, f"configs/mine/{stage}.yaml", cwd=job.there, before=(NETLESS, "enter")
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert (job.there / "runs/mine" / stage / "model.safetensors").read_bytes() == weights[stage]


@needs_namespace
@pytest.mark.slow
def test_its_own_script_runs_the_whole_pipeline_without_a_network(job, tmp_path):
    """Real interpreters, a hub model out of the cache, `run.sh` as it is printed, and again: all is complete then."""
    cache = tmp_path / "cache" / "models--org--tiny"
    shutil.copytree(job.away / "tiny llama", cache / "snapshots" / "c0ffee")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("c0ffee")
    job.edit("sft", "^model_name_or_path: .*", "model_name_or_path: org/tiny")
    environment = {**os.environ, "HF_HUB_CACHE": str(cache.parent), "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable}
    words = [sys.executable, "-m", "rlhf", "bundle", job.recipes, "--no-wheels", "-o", job.file]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and job.unbundle() == 0, done.stderr
    shutil.rmtree(job.away)
    shutil.rmtree(cache)
    for _ in range(2):
        done = subprocess.run(
            ["unshare", "-n", "./run.sh"], cwd=job.there, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (job.there / "runs/mine/dpo/complete.json").is_file()


@pytest.fixture
def small_wheels(job, monkeypatch):
    """`rlhf-dpo` as a wheel that requires nothing, in the place of what pip makes."""

    def build(project, folder):
        source = job.root / "source"
        (source / "rlhf_stand_in").mkdir(parents=True)
        (source / "rlhf_stand_in" / "__init__.py").write_text("")
        (source / "setup.py").write_text(
            f"import setuptools\nsetuptools.setup(name='rlhf-dpo', version='{__version__}', packages=['rlhf_stand_in'], "
            "extras_require={'deepspeed': [], 'quant': []})\n"
        )
        code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, str(folder)], cwd=source, check=True, capture_output=True)
        return sorted(folder.glob("*.whl"))

    monkeypatch.setattr(wheels, "build", build)
    words = ["bundle", str(job.recipes), "-o", str(job.file)]
    from rlhf.__main__ import main

    assert main(words) == 0 and job.unbundle() == 0
    assert not list(job.root.glob("mine.tar.*")) and len(list((job.there / "wheels").iterdir())) == 1
    return job


@pytest.mark.slow
def test_set_up_installs_from_the_wheels_alone(small_wheels):
    environment = {**os.environ, "PYTHON": sys.executable, "PIP_INDEX_URL": "https://index.invalid/simple"}
    done = subprocess.run(["./setup.sh"], cwd=small_wheels.there, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    python = small_wheels.there / ".venv/bin/python"
    found = subprocess.run([python, "-c", "import rlhf_stand_in"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("damaged", [False, True])
def test_set_up_names_another_python_and_verifies_what_tar_unpacked(small_wheels, damaged):
    other = small_wheels.root / "python"
    other.write_text("#!/bin/sh\necho 3.9 linux riscv64\n")
    other.chmod(0o755)
    if damaged:
        (small_wheels.there / ".verified").unlink()
        (small_wheels.there / "data/pairs.jsonl").write_text("x")
    environment = {**os.environ, "PYTHON": str(other)}
    done = subprocess.run(["./setup.sh"], cwd=small_wheels.there, capture_output=True, text=True, env=environment)
    if damaged:
        assert done.returncode == 1 and "data/pairs.jsonl: FAILED" in done.stdout
    else:
        here = " ".join(wheels.target().values())
        assert done.returncode == 2
        assert done.stderr == f"setup: {other} is Python 3.9 linux riscv64; these wheels are for Python {here}\n"
    assert not (small_wheels.there / ".venv").exists()


def test_the_work_folder_of_a_kill_is_replaced(job, monkeypatch):
    left = job.root / "mine.tar.partial.wheels"
    left.mkdir()
    (left / "half.whl").write_text("x")
    with pack._work_folder(job.root / "mine.tar.partial") as folder:
        assert folder == left and list(folder.iterdir()) == []
    assert not left.exists()
