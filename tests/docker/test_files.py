"""What can be said of the container files without building anything: compose's settings, the Apptainer file's sections."""

import json
import os
import re
import shutil
import subprocess

import pytest
import yaml
from engine import ROOT

from rlhf.__main__ import parser

DOCKER = ROOT / "docker"


def compose_command():
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    pytest.skip("neither docker-compose nor `docker compose` is installed")


def settings(*files, **variables):
    """What compose makes of its files: validated against its own schema, variables filled in."""
    words = [f"--file={DOCKER / file}" for file in files]
    for profile in ("quickstart", "train", "tensorboard", "two-node"):
        words.append(f"--profile={profile}")
    done = subprocess.run(
        [*compose_command(), *words, "config"], env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["services"]


def test_compose_files_are_valid():
    services = settings(
        "compose.yaml", RECIPES="configs/mine", LAUNCH="launch/zero3.yaml", RLHF_PROCESSES="8", RLHF_UID="7"
    )
    assert set(services) == {"quickstart", "train", "tensorboard", "node-0", "node-1"}
    command = services["train"]["command"]
    words = command if isinstance(command, str) else " ".join(command)
    assert words == "launch/pipeline.sh configs/mine launch/zero3.yaml --num_processes 8"
    for name, service in services.items():
        assert service["user"].startswith("7:")
        assert service["stop_grace_period"] in (("5s",) if name == "tensorboard" else ("10m", "10m0s"))
        assert any("cache" in json.dumps(volume) for volume in service["volumes"])


def test_compose_gives_gpus():
    for name, service in settings("compose.yaml", "compose.gpu.yaml").items():
        reserved = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        assert (name == "tensorboard") == (reserved == [])


GPUS = ("compose.yaml", "compose.gpu.yaml")


@pytest.mark.parametrize(
    ("files", "variables", "refused", "warned"),
    [
        (GPUS, {"PROCESSES": "8"}, {"train": "PROCESSES", "node-0": "PROCESSES", "node-1": "PROCESSES"}, {}),
        (GPUS, {"PROCESSES": "8", "RLHF_PROCESSES": "4"}, {}, {}),
        (GPUS, {"NODE_0_GPUS": "0,1"}, {"node-0": "NODE_0_GPUS"}, {}),
        (GPUS, {"NODE_1_GPUS": "2,3"}, {"node-1": "NODE_1_GPUS"}, {}),
        (GPUS, {"TENSORBOARD_PORT": "7007"}, {"tensorboard": "TENSORBOARD_PORT"}, {}),
        (GPUS, {"STAGE": "production", "GPU": "1"}, {}, {"node-0": "STAGE", "node-1": "STAGE", "quickstart": "GPU"}),
        (GPUS[:1], {"NODE_0_GPUS": "0,1", "GPU": "1"}, {}, {}),  # without GPUs they never had an effect
    ],
)
def test_variables_under_their_old_names(files, variables, refused, warned, tmp_path):
    """What the services' containers say first; for two names that may be anybody's it is a warning."""
    old = {name: "" for name in ("PROCESSES", "NODE_0_GPUS", "NODE_1_GPUS", "TENSORBOARD_PORT", "STAGE", "GPU")}
    blank = old | {f"RLHF_{name}": "" for name in old}
    for name, service in settings(*files, **blank | variables).items():
        env = {key: value for key, value in os.environ.items() if not key.startswith("RLHF_")}
        env |= {key: value for key, value in service["environment"].items() if value} | {"TMPDIR": str(tmp_path)}
        done = subprocess.run([str(DOCKER / "entrypoint.sh"), "bash", "-c", "exit 7"], env=env, cwd=tmp_path,
                              capture_output=True, text=True)  # fmt: skip
        lines = []
        if name in refused:
            lines = [f"docker/compose*.yaml reads RLHF_{refused[name]} in place of {refused[name]}; set that, or unset {refused[name]}"]  # fmt: skip
        elif name in warned:
            lines = [f"{warned[name]} is set and not read; if it is meant for docker/compose*.yaml: RLHF_{warned[name]}"]  # fmt: skip
        assert done.stderr == "".join(f"rlhf: {line}\n" for line in lines), name
        assert done.returncode == (2 if name in refused else 7), name


def test_what_the_files_call_is_there():
    """Recipes, launch files and commands that the documentation names."""
    for text in [(DOCKER / name).read_text() for name in ("README.md", "compose.yaml", "Dockerfile", "apptainer.def")]:
        for path in re.findall(r"(?<![\w/-])(?:launch|configs|docker|slurm)/[\w./-]*\w", text):
            if not path.startswith("configs/mine"):
                assert (ROOT / path).exists(), path


def test_the_tests_that_the_image_runs_need_nothing_that_is_not_in_it():
    text = (DOCKER / "Dockerfile").read_text()
    copied = {name for names in re.findall(r"^COPY ((?:[\w.]+ )+)(?:\./|\w+/)$", text, re.M) for name in names.split()}
    assert {"rlhf", "launch", "configs", "tests", "LICENSE"} <= copied and not copied & {"slurm", "docker", "docs"}
    command = json.loads(re.search(r'CMD (\["python", "-m", "pytest"[^]]*\])', text)[1].replace("\\\n", ""))
    paths = [ROOT / word for word in command if word.startswith("tests/")]
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
    assert len(paths) == 12 and all(path.exists() for path in paths) and len(files) > 40
    for file in files:
        # ROOT / "slurm", Path(__file__).parent.parent / "docs" / ...
        used = re.findall(r'(?:\bROOT|\.parent\.parent) / "([^"/]+)', file.read_text(encoding="utf-8"))
        assert set(used) <= copied, file


def test_nothing_but_what_is_named_goes_to_the_daemon():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")][0] == "*"


def test_the_entrypoint_knows_every_command():
    known = re.search(r"^    (.*) \| -\*\) set -- rlhf", (DOCKER / "entrypoint.sh").read_text(), re.MULTILINE)[1].split(
        " | "
    )
    assert sorted(known) == sorted(next(a for a in parser()._actions if a.dest == "command").choices)


# --- a mirror of Debian's or Ubuntu's packages ------------------------------------------------------------------------

SOURCES = {
    "sources.list": (
        "# see http://example/ubuntu\ndeb [arch=amd64 signed-by=/k.gpg] http://apt.corp.example:8081/proxy/ubuntu/ noble main\n"
        "deb-src https://archive.ubuntu.com/ubuntu noble main\ndeb http://ports.ubuntu.com/ubuntu-ports noble main\n",
        "deb [arch=amd64 signed-by=/k.gpg] {}/ubuntu/ noble main\ndeb-src {}/ubuntu noble main\n"
        "deb {}/ubuntu-ports noble main\n",
    ),
    "sources.list.d/debian.sources": (
        "Types: deb\nURIs: http://ftp.de.debian.org/debian https://security.debian.org/debian-security\n"
        "Suites: bookworm\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
        "Types: deb\nURIs: {}/debian {}/debian-security\n"
        "Suites: bookworm\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
    ),
    "mirrors/debian.list": ("https://deb.debian.org/debian\n", "{}/debian\n"),
    "sources.list.d/cuda.list": (
        "deb [signed-by=/k.gpg] https://developer.example/compute/cuda/repos/ubuntu2404/x86_64/ /\n",
        "deb [signed-by=/k.gpg] https://developer.example/compute/cuda/repos/ubuntu2404/x86_64/ /\n",
    ),
    "preferences": ("http://deb.debian.org/debian\n", "http://deb.debian.org/debian\n"),
}


def apt_mirror(*words):
    return subprocess.run(["sh", str(DOCKER / "apt-mirror.sh"), *words], capture_output=True, text=True)


@pytest.mark.parametrize("address", ["http://mirror.example", "https://a&b.example:8443/x#y\\z/"])
def test_a_mirror_takes_the_place_of_any_host(address, tmp_path):
    for name, (before, _) in SOURCES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(before)
    for _ in range(2):  # twice is the same
        done = apt_mirror(address, str(tmp_path))
        assert done.returncode == 0, done.stderr
        for name, (_, after) in SOURCES.items():
            found = "".join(line for line in (tmp_path / name).read_text().splitlines(True) if not line.startswith("#"))
            assert found == after.replace("{}", address.rstrip("/")), name
        left = "https://developer.example/compute/cuda/repos/ubuntu2404/x86_64/"
        assert done.stdout == f"apt-mirror.sh: not on the mirror: {left}\n"


@pytest.mark.parametrize(
    ("address", "sentence"), [("mirror.example", "expected an address"), ("http://m", "no *.list")]
)
def test_a_mirror_that_can_not_be_used(address, sentence, tmp_path):
    done = apt_mirror(address, str(tmp_path))
    assert done.returncode == 2 and sentence in done.stderr


def test_the_build_uses_the_mirror():
    text = (DOCKER / "Dockerfile").read_text()
    assert (
        'sh /run/apt-mirror.sh "$APT_MIRROR"' in text
        and "source=docker/apt-mirror.sh,target=/run/apt-mirror.sh" in text
    )
    assert "deb.debian.org" not in text and "archive.ubuntu.com" not in text
    assert "!docker/apt-mirror.sh" in (ROOT / ".dockerignore").read_text().splitlines()
