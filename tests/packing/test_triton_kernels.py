"""TRL's Triton kernels, which the LM head of every stage runs on a GPU, in Triton's interpreter: values and gradients."""

import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.files import cache_dir

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).with_name("interpreted_kernels.py")


@pytest.fixture
def triton():
    """A folder with the locked Triton for PYTHONPATH: a CPU build of torch comes without. Made once (200 MB) and kept."""
    if importlib.util.find_spec("triton") is not None:
        return ""
    (version,) = re.findall(r"^triton==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    folder = cache_dir() / "tests" / f"triton-{version}-{sys.version_info[0]}.{sys.version_info[1]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "whole").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
            done = subprocess.run(
                [*pip, "install", "--no-deps", "--no-cache-dir", "--target", folder, f"triton=={version}"],
                capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                shutil.rmtree(folder, ignore_errors=True)
                pytest.skip(
                    f"triton is a package, and no package index that can be reached has it: {done.stderr[-300:]}"
                )
            (folder / "whole").touch()
    return str(folder)


@pytest.mark.slow
def test_kernels_of_the_lm_head(triton):
    path = os.pathsep.join(filter(None, [str(ROOT), triton]))
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["calls"] == {"forward": 4 * 3, "backward": 4 * 3}  # four cases of three tiles of the vocabulary
    assert [row for row in found["rows"] if not row["equal"]] == [] and len(found["rows"]) == 4
