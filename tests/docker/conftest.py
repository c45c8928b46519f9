"""A Docker daemon, a base image and the project's image built on it; all of it real, and skipped with the reason elsewhere.

What is used, in this order: a daemon that runs already, or, as root, one that is started here, in a folder of its own. The
base: RLHF_TEST_BASE (say python:3.12-slim, where a registry can be reached), or a Debian 12 that debootstrap makes.
RLHF_TEST_DOCKER names a folder for the daemon's data that is kept, so that the next time is quick.
"""

import functools
import http.server
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from engine import ROOT, Docker, client

NEEDED = "apt-get install -y --no-install-recommends docker.io debootstrap docker-compose"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"  # this machine's, for builds behind a proxy that has its own
MAKE_BASE = r"""
set -e
debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$1/rootfs" "$2"
cp "$3" "$1/rootfs/etc/ssl/certs/ca-certificates.crt"
rm -rf "$1"/rootfs/var/cache/apt/archives/*.deb
tar -C "$1/rootfs" -cf "$1/base.tar" .
rm -rf "$1/rootfs"
"""


@pytest.fixture(scope="session")
def daemon():
    if not client():
        pytest.skip(f"no docker here ({NEEDED})")
    found = Docker()
    if found("info", check=False).returncode == 0:
        yield found
        return
    if os.geteuid() != 0:
        pytest.skip("no Docker daemon answers, and only root can start one")
    if not shutil.which("dockerd"):
        pytest.skip(f"no Docker daemon answers, and dockerd is not installed ({NEEDED})")
    kept = os.environ.get("RLHF_TEST_DOCKER")
    place = Path(kept or tempfile.mkdtemp(prefix="rlhf-docker-"))
    place.mkdir(parents=True, exist_ok=True)
    host = f"unix://{place}/docker.sock"
    with open(place / "dockerd.log", "wb") as log:  # it ends with this process, whatever becomes of that
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "dockerd", "--storage-driver=overlay2", "--iptables=false", "--bridge=none",
             f"--data-root={place}/data", f"--exec-root={place}/exec", f"--pidfile={place}/dockerd.pid", f"--host={host}"],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    found = Docker(host)
    end = time.monotonic() + 600
    while found("info", check=False).returncode != 0:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.skip(f"dockerd does not start here: {(place / 'dockerd.log').read_text()[-300:].strip()}")
        time.sleep(0.2)
    yield found
    process.terminate()
    process.wait(timeout=600)
    if not kept:
        shutil.rmtree(place, ignore_errors=True)


def debian_mirror() -> str:
    files = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    text = "\n".join(f.read_text() for f in files if f.is_file())
    found = re.search(r"^(?:deb|URIs:)\s+(?:\[[^]]*\]\s*)?(https?://\S+/debian)\b", text, re.MULTILINE)
    return found[1] if found else "http://deb.debian.org/debian"


@pytest.fixture(scope="session")
def base(daemon):
    """The name of a base image without Python packages."""
    if os.environ.get("RLHF_TEST_BASE"):
        return os.environ["RLHF_TEST_BASE"]
    if daemon("image", "inspect", "rlhf-test-base", check=False).returncode == 0:
        return "rlhf-test-base"
    if os.geteuid() != 0:
        pytest.skip("no base image, and only root can make one; name one in RLHF_TEST_BASE")
    if not shutil.which("debootstrap"):
        pytest.skip(f"no base image: debootstrap makes one ({NEEDED}), or name one in RLHF_TEST_BASE")
    with tempfile.TemporaryDirectory() as folder:
        words = ["bash", "-c", MAKE_BASE, "-", folder, debian_mirror(), CERTIFICATES]
        done = subprocess.run(words, capture_output=True, text=True, timeout=3600)
        if done.returncode != 0:
            pytest.skip(f"debootstrap can't make a Debian here: {done.stdout[-300:]}{done.stderr[-300:]}")
        variables = [f"--change=ENV {name}={CERTIFICATES}" for name in ("PIP_CERT", "SSL_CERT_FILE")]
        daemon("import", *variables, f"{folder}/base.tar", "rlhf-test-base")
    return "rlhf-test-base"


@pytest.fixture(scope="session")
def wheels(daemon):
    """What PIP_FIND_LINKS names here, served to builds; '' where it names no folder."""
    folder = os.environ.get("PIP_FIND_LINKS", "")
    if not os.path.isdir(folder):
        return
    handler = functools.partial(Quiet, directory=folder)
    try:  # the same port each time: its number is a build argument, and a new one would fetch all packages anew
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 18080), handler)
    except OSError:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        daemon.links = f"http://127.0.0.1:{server.server_port}/"
        yield
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture(scope="session")
def context(tmp_path_factory):
    """A copy of what the image is built from, which tests may change."""
    folder = tmp_path_factory.mktemp("context")
    for name in ("configs", "docker", "launch", "rlhf", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.lock", "README.md", "LICENSE", ".dockerignore"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def image(daemon, base, wheels, context):
    """The project's image: its name."""
    # what must not get into it
    (context / ".env").write_text("TOKEN=secret\n")
    (context / "rlhf" / ".netrc").write_text("secret\n")
    (context / "runs").mkdir()
    (context / "runs" / "model.safetensors").write_text("weights\n")
    seconds, _ = daemon.build(context, "rlhf-test", "--build-arg", f"BASE={base}", "--build-arg", "REVISION=abc123")
    size, below = daemon.inspect("rlhf-test")["Size"], daemon.inspect(base)["Size"]
    print(f"\nimage: {size / 1e9:.2f} GB, of which the base is {below / 1e9:.2f} GB; built in {seconds:.0f} s")
    yield "rlhf-test"
    daemon("image", "rm", "--force", "rlhf-test", "rlhf-test-changed", "rlhf-test-tests", check=False)
