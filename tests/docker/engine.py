"""The command-line client of a Docker daemon, for the tests beside this file."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent


def client():
    """Debian's docker, which has BuildKit inside, before one that needs a plugin for it."""
    return "/usr/bin/docker" if os.path.exists("/usr/bin/docker") else shutil.which("docker")


class Docker:
    """The command-line client of one daemon.

    Attributes:
        env: the environment that its commands run in.
        links: where pip finds wheels that are on this machine; '' where there are none.
    """

    def __init__(self, host: str = ""):
        self.env = os.environ | {"DOCKER_BUILDKIT": "1"} | ({"DOCKER_HOST": host} if host else {})
        self.links = ""

    def __call__(self, *words, check=True, timeout=900, **env) -> subprocess.CompletedProcess:
        done = subprocess.run([client(), *map(str, words)], env=self.env | env, capture_output=True, text=True, timeout=timeout)  # fmt: skip
        assert not check or done.returncode == 0, f"docker {words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def inspect(self, name) -> dict:
        return json.loads(self("inspect", name).stdout)[0]

    def build(self, context, tag, *words) -> tuple[float, str]:
        """(seconds, log)"""
        if self.links:
            words += ("--build-arg", f"PIP_FIND_LINKS={self.links}", "--build-arg", "PIP_TRUSTED_HOST=127.0.0.1")
        elif "+cpu" in torch.__version__:  # or else gigabytes of CUDA, for a machine without
            words += ("--build-arg", "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu")
        start = time.monotonic()
        done = self("build", "--network", "host", "--progress", "plain", "--file", f"{context}/docker/Dockerfile",
                    "--tag", tag, *words, context, timeout=1800)  # fmt: skip
        return time.monotonic() - start, done.stderr

    def wait(self, name, seconds=600) -> int:
        """The exit code of a container."""
        return int(self("wait", name, timeout=seconds).stdout)

    def logs(self, name) -> str:
        done = self("logs", name, check=False)
        return done.stdout + done.stderr


def until(holds, seconds=600, say=lambda: ""):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not after {seconds} s: {say()[-3000:]}"
        time.sleep(0.1)
