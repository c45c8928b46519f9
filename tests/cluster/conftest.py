"""A real Slurm of four nodes, brought up by cluster.sh, and what the tests ask it."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).parent / "cluster.sh"
NODES, PREFIX = 4, "gpu-a0"  # gpu-a[01-04], as clusters call them


def why_no_cluster():
    """What is missing here; '' if nothing is."""
    if os.geteuid() != 0:
        return "a cluster in namespaces needs root"
    programs = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    missing = [name for name in programs if not shutil.which(name, path=path)]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge iproute2 util-linux)"
    spaces = ["unshare", "--fork", "--pid", "--mount-proc", "--mount", "--uts", "--net", "true"]
    done = subprocess.run(spaces, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"no namespaces here: {done.stderr.strip()}"


class Cluster:
    """Commands on the login node, in `folder`, with an environment for tiny models on CPUs."""

    def __init__(self, place: Path, folder: Path):
        self.place, self.folder = place, folder
        self.env = os.environ | {
            "PYTHON": sys.executable, "RLHF_LOGS": str(folder / "logs"), "RLHF_SITE_ENV": "/none", "OMP_NUM_THREADS": "1",
            "RLHF_ROOT": "", "PYTHONPATH": f"{folder}/site:{ROOT}",
        }  # fmt: skip
        (folder / "site").mkdir()
        shutil.copy(ROOT / "tests" / "hold.py", folder / "site" / "sitecustomize.py")

    def hold(self, step):
        """Let no run go past a step (tests/hold.py); None: let it go on."""
        file = self.folder / "site" / "hold"
        file.write_text(str(step)) if step else file.unlink(missing_ok=True)

    def script(self, *words):
        return subprocess.run([str(SCRIPT), words[0], str(self.place), *words[1:]], env=self.env, cwd=self.folder,
                              capture_output=True, text=True, timeout=600)  # fmt: skip

    def run(self, *words, **env):
        """What a command prints."""
        done = subprocess.run([str(SCRIPT), "run", str(self.place), *map(str, words)], env=self.env | env, cwd=self.folder,
                              capture_output=True, text=True, timeout=600)  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *words, **env):
        """The job's number; its log is `log(number)`."""
        return self.run("sbatch", "--parsable", f"--output={self.folder}/%j.out", *words, **env).strip()

    def log(self, job):
        file = self.folder / f"{job}.out"
        return file.read_text() if file.exists() else ""

    def state(self, job):
        """Slurm's word for it, and the exit code."""
        found = self.run("scontrol", "show", "job", "-o", job)
        return re.search(r"JobState=(\w+)", found)[1], int(re.search(r"ExitCode=(\d+):", found)[1])

    def wait(self, *jobs, seconds=1200):
        """Until they have ended; the state of the last one."""
        self.until(
            lambda: all(self.state(j)[0] not in ("PENDING", "RUNNING", "COMPLETING") for j in jobs), jobs, seconds
        )
        return self.state(jobs[-1])

    def until(self, holds, jobs=(), seconds=600):
        end = time.monotonic() + seconds
        while not holds():
            logs = "".join(self.log(job)[-4000:] for job in jobs)
            assert time.monotonic() < end, f"after {seconds} s:\n{logs}\n{self.run('squeue')}"
            time.sleep(0.2)


@pytest.fixture(scope="session")
def started(tmp_path_factory):
    if reason := why_no_cluster():
        pytest.skip(reason)
    place = tmp_path_factory.mktemp("cluster")
    # it ends with its standard input: whatever becomes of this process, nothing stays behind
    session = subprocess.Popen([str(SCRIPT), "session", str(place), str(NODES), PREFIX], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    shown = session.stdout.readline()
    assert shown == "ready\n", shown + session.stdout.read()
    yield place
    session.stdin.close()
    session.wait(timeout=600)


@pytest.fixture
def cluster(started, tmp_path):
    found = Cluster(started, tmp_path)
    yield found
    found.script("run", "scancel", "--user=root", "--signal=KILL", "--full")
    found.script("run", "scancel", "--user=root")
    for number in range(1, NODES + 1):
        if not (started / f"{PREFIX}{number}.pid").exists():
            found.script("start", f"{PREFIX}{number}")
