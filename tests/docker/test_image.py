"""The image is built, looked through, and trained in: as any uid, stopped at unkind moments, in two containers."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
from engine import ROOT, Docker, client, until
from safetensors.torch import load_file

from rlhf.runs.metrics import read_metrics
from rlhf.runs.stop import EXIT_STOPPED

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("docker")]
STEPS = 60
LAUNCH = ("accelerate", "launch", "--config_file", "launch/ddp.yaml", "--num_processes", "2", "-m")


class Box:
    """Folders on this machine that containers see, and containers.

    Attributes:
        place: data/ (model, pairs, recipes) and runs/, both owned by `uid`.
    """

    def __init__(self, daemon: Docker, image: str, place, uid: int):
        self.docker, self.image, self.place, self.uid, self.names = daemon, image, place, uid, []

    def words(self, name):
        volumes = [f"--volume={self.place}/{folder}:/rlhf/{folder}" for folder in ("data", "runs")]
        return ["--network=host", "--name", name, f"--user={self.uid}:{self.uid}", "--env=OMP_NUM_THREADS=1",
                "--env=PYTHONPATH=/rlhf/data", *volumes]  # fmt: skip

    def start(self, name, *command, options=()):
        self.names.append(name)
        self.docker("run", "--detach", *self.words(name), *options, self.image, *command)

    def steps(self, run="dpo"):
        rows = [row["step"] for row in read_metrics(self.place / "runs" / run) if "loss" in row]
        return rows[-1] if rows else 0

    def hold(self, step):
        """Let no run go past a step (hold.py); None: let it go on."""
        file = self.place / "data" / "hold"
        file.write_text(str(step)) if step else file.unlink(missing_ok=True)

    def until_step(self, step, name, run="dpo"):
        until(lambda: self.steps(run) >= step, say=lambda: self.docker.logs(name))

    def signal(self, name, number):
        """To every process in a container that trains, but not to the init, whose command line has the same words."""
        found = "for p in $(grep -lzx dpo /proc/[0-9]*/cmdline | cut -d/ -f3); do case $(cat /proc/$p/comm) in tini|bash|rlhf-entry*) ;; "
        self.docker("exec", "--user=0", name, "bash", "-c", f"{found} *) kill -{number} $p;; esac; done", check=False)

    def result(self, run="dpo"):
        folder = self.place / "runs" / run
        losses = [(row["step"], row["loss"]) for row in read_metrics(folder) if "loss" in row]
        return losses, load_file(folder / "model.safetensors")


def same(found, expected):
    assert [step for step, _ in found[0]] == list(range(1, STEPS + 1))
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all((found[1][name] == expected[1][name]).all() for name in expected[1])


@pytest.fixture
def box(daemon, image, tiny_llama, few_pairs, tmp_path):
    yield from make_box(daemon, image, tiny_llama, few_pairs, tmp_path)


@pytest.fixture(scope="module")
def module_box(daemon, image, tiny_llama, few_pairs, tmp_path_factory):
    yield from make_box(daemon, image, tiny_llama, few_pairs, tmp_path_factory.mktemp("uninterrupted"))


def make_box(daemon, image, tiny_llama, few_pairs, place, uid=1234):
    data = place / "data"
    shutil.copytree(tiny_llama, data / "model")
    shutil.copy(few_pairs, data / "pairs.jsonl")
    (place / "runs").mkdir()
    shutil.copy(ROOT / "tests" / "hold.py", data / "sitecustomize.py")
    write_recipe(data, "dpo")
    try:
        subprocess.run(["chown", "-R", f"{uid}:{uid}", str(place)], check=True)
    except subprocess.CalledProcessError:
        uid = os.getuid()
    found = Box(daemon, image, place, uid)
    yield found
    for name in found.names:
        daemon("rm", "--force", "--volumes", name, check=False)


def write_recipe(folder, stage, **values):
    recipe = {
        "stage": stage, "model_name_or_path": "data/model", "dataset_name": "data/pairs.jsonl", "output_dir": f"runs/{stage}",
        "max_length": 256, "global_batch_size": 6, "max_tokens_per_device": 800, "max_steps": STEPS, "use_peft": True,
        "lora_r": 4, "lora_target_modules": "all-linear", "lora_dropout": 0.0, "gradient_checkpointing": False,
        "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 10, "save_total_limit": 2, "disable_tqdm": True, "seed": 1,
    }  # fmt: skip
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in (recipe | values).items()]
    (folder / f"{stage}.yaml").write_text("".join(lines))


@pytest.fixture(scope="module")
def uninterrupted(module_box):
    """By number of processes: losses and weights of a run that nothing happened to."""
    found = {}

    def get(processes):
        if processes not in found:
            command = ("rlhf",) if processes == 1 else (*LAUNCH, "rlhf")
            run = f"dpo{processes}"
            module_box.start(f"rlhf-test-{run}", *command, "dpo", "data/dpo.yaml", "--output_dir", f"runs/{run}")
            code = module_box.docker.wait(f"rlhf-test-{run}")
            assert code == 0, module_box.docker.logs(f"rlhf-test-{run}")
            found[processes] = module_box.result(run)
        return found[processes]

    return get


# --- the image itself ------------------------------------------------------------------------------------------------


def test_its_settings(daemon, image):
    config = daemon.inspect(image)["Config"]
    assert config["User"] == "1000:1000"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Entrypoint"][:3] == ["/usr/bin/tini", "-s", "--"]
    assert config["Healthcheck"]["Test"] == ["CMD", "/usr/local/bin/rlhf-healthcheck"]
    assert config["Labels"]["org.opencontainers.image.revision"] == "abc123"
    assert {name.split(".")[-1] for name in config["Labels"]} >= {"title", "licenses", "source", "created", "version"}


def test_nothing_is_in_it_that_should_not_be(daemon, image, base):
    """No caches, no packages' files, no secrets, no runs beside what the base has brought; of the project what is needed."""
    unwanted = [
        "/root/.cache/*", "/cache/*", "/tmp/*", "/var/cache/apt/*", "/var/lib/apt/lists/*", "/var/log/apt/*", "/build/*",
        "/rlhf/runs/*", "*.deb", "*.whl", "*/.git/*", "*/.env", "*/.netrc",
    ]  # fmt: skip
    paths = " -o ".join(f"-path '{path}'" for path in unwanted)
    look = f"find / -xdev \\( -path /proc -o -path /sys \\) -prune -o \\( {paths} \\) -type f -print"

    def inside(image, command):
        words = ("run", "--rm", "--network=none", "--user=0", "--entrypoint=bash", image, "-c", command)
        return set(daemon(*words).stdout.splitlines())

    pythons_own = {path for path in inside(image, look) if re.search(r"/(python-wheels|_bundled)/[^/]+\.whl$", path)}
    assert inside(image, look) - inside(base, look) - pythons_own == set()
    assert inside(image, "ls -A /rlhf") == {
        "LICENSE", "README.md", "configs", "data", "launch", "models", "pyproject.toml", "requirements.lock", "rlhf", "runs",
    }  # fmt: skip


def test_a_code_change_is_built_in_seconds(daemon, image, base, context):
    before = daemon.inspect(image)["RootFS"]["Layers"]
    with open(context / "rlhf" / "__init__.py", "a") as file:
        file.write("# changed\n")
    seconds, _ = daemon.build(
        context, "rlhf-test-changed", "--build-arg", f"BASE={base}", "--build-arg", "REVISION=def"
    )
    after = daemon.inspect("rlhf-test-changed")["RootFS"]["Layers"]
    same_layers = sum(a == b for a, b in zip(before, after, strict=True))
    print(
        f"\nrebuilt after a code change in {seconds:.1f} s; {len(after) - same_layers} of {len(after)} layers are new"
    )
    assert len(after) - same_layers == 2  # the code, its installation: no package
    shown = daemon("run", "--rm", "--network=none", "rlhf-test-changed", "tail", "-n1", "rlhf/__init__.py").stdout
    assert shown == "# changed\n"


def test_other_dependencies_are_no_code_change(daemon, image, base, context):
    """What is in pyproject.toml beside the dependencies does not install them anew."""
    text = (context / "pyproject.toml").read_text()
    (context / "pyproject.toml").write_text(text.replace("line-length = 120", "line-length = 121"))
    _, log = daemon.build(context, "rlhf-test-changed", "--build-arg", f"BASE={base}")
    (context / "pyproject.toml").write_text(text)
    assert re.search(r"COPY --from=packages /opt/venv.*\n.*\n#\d+ CACHED", log), log[-3000:]


@pytest.mark.parametrize("user", [[], ["--user=1234:1234"], ["--user=0"], ["--read-only", "--tmpfs=/tmp"]])
def test_help(daemon, image, user):
    assert daemon("run", "--rm", "--network=none", *user, image).stdout.startswith("usage: rlhf")


def test_a_shell(daemon, image):
    done = subprocess.run(
        [client(), "run", "--rm", "--interactive", "--network=none", image, "bash"],
        input="rlhf --version; whoami; exit 3\n", env=daemon.env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("rlhf-dpo 0.1.0\nrlhf\n", 3)


def test_the_quick_tests_pass_in_it(daemon, image, base, context):
    daemon.build(context, "rlhf-test-tests", "--build-arg", f"BASE={base}", "--target", "test")
    files = [
        f"tests/{name}"
        for name in (
            "config/test_config.py",
            "data/test_data.py",
            "models/test_models.py",
            "packing/test_packed_layout.py",
        )
    ]
    done = daemon("run", "--rm", "--network=none", "--user=1234:1234", "--env=OMP_NUM_THREADS=1", "rlhf-test-tests",
                  "python", "-m", "pytest", "-q", "-n2", "-p", "no:cacheprovider", "-m", "not slow", "-k", "not smollm2",
                      *files, check=False)  # fmt: skip
    print("\n" + done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-2000:]


def apptainer_sections():
    """By name ('' for the header): the lines of docker/apptainer.def."""
    found, name = {"": []}, ""
    for line in (ROOT / "docker" / "apptainer.def").read_text().splitlines():
        if line.startswith("%"):
            name = line[1:].strip()
            found[name] = []
        elif not line.startswith("#"):
            found[name].append(line.strip())
    return {name: "\n".join(lines).strip() for name, lines in found.items()}


def test_the_apptainer_file_s_scripts_run_in_the_image(daemon, image):
    """Apptainer itself is in no Debian; what it would run is run in the image that it starts from."""
    sections = apptainer_sections()
    values = dict(line.split("=", 1) for line in sections["arguments"].splitlines())
    header = re.sub(r"{{ (\w+) }}", lambda found: values[found[1]], sections[""])
    assert header == "Bootstrap: docker-daemon\nFrom: rlhf:latest"
    for script, words, expected in (("test", (), "torch 2"), ("runscript", ("dpo", "--help"), "usage: rlhf dpo")):
        done = daemon("run", "--rm", "--network=none", "--user=1234:1234", "--read-only", "--tmpfs=/tmp", "--entrypoint=sh", image, "-ec",
                      sections[script], "sh", *words)  # fmt: skip
        assert expected in done.stdout, done.stdout + done.stderr


# --- training --------------------------------------------------------------------------------------------------------


def test_two_steps_as_any_uid(box):
    box.start("rlhf-test-two", "rlhf", "dpo", "data/dpo.yaml", "--max_steps", "2")
    assert box.docker.wait("rlhf-test-two") == 0, box.docker.logs("rlhf-test-two")
    written = [path for path in (box.place / "runs").rglob("*") if path.is_file()]
    assert {"complete.json", "model.safetensors", "metrics.jsonl"} <= {path.name for path in written}
    assert {(path.stat().st_uid, path.stat().st_gid) for path in written} == {(box.uid, box.uid)}
    provenance = json.loads((box.place / "runs" / "dpo" / "provenance.json").read_text())
    assert provenance["git_commit"] == "abc123"


def test_a_folder_that_docker_made_is_told(box):
    (box.place / "runs").chmod(0o755)
    os.chown(box.place / "runs", 0, 0)
    box.start("rlhf-test-roots", "rlhf", "dpo", "data/dpo.yaml")
    assert box.docker.wait("rlhf-test-roots") != 0
    assert "rlhf: /rlhf/runs can't be written by uid 1234" in box.docker.logs("rlhf-test-roots")


COMMANDS = {
    "one process": (1, ("dpo", "data/dpo.yaml")),
    "accelerate": (2, (*LAUNCH, "rlhf", "dpo", "data/dpo.yaml")),
    "pipeline": (1, ("launch/pipeline.sh", "data")),
    "shell": (1, ("bash", "-c", "rlhf dpo data/dpo.yaml && echo and then")),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_docker_stop_saves_and_the_same_container_goes_on(box, uninterrupted, kind):
    processes, command = COMMANDS[kind]
    steps = (7, 35) if processes == 2 else (20,)
    box.hold(steps[0])
    box.start("rlhf-test-stop", *command)
    for step, following in zip(steps, (*steps[1:], None), strict=True):
        box.until_step(step, "rlhf-test-stop")
        box.docker("stop", "--time=300", "rlhf-test-stop")
        state = box.docker.inspect("rlhf-test-stop")["State"]
        box.hold(following)
        assert state["ExitCode"] == EXIT_STOPPED, box.docker.logs("rlhf-test-stop")
        stopped = json.loads((box.place / "runs" / "dpo" / "stopped.json").read_text())
        assert step <= stopped["step"] < STEPS
        assert (box.place / "runs" / "dpo" / f"checkpoint-{stopped['step']}").is_dir()
        box.docker("start", "rlhf-test-stop")
    assert box.docker.wait("rlhf-test-stop") == 0, box.docker.logs("rlhf-test-stop")
    same(box.result(), uninterrupted(processes))


def test_docker_stop_while_it_begins(box, uninterrupted):
    """At moments when nothing is there to be saved: it ends in time, and the same container goes on."""
    box.hold(30)
    box.start("rlhf-test-begin", *COMMANDS["pipeline"][1])
    for delay in (0.0, 1.0, 3.0):
        time.sleep(delay)
        box.docker("stop", "--time=300", "rlhf-test-begin")
        assert box.docker.inspect("rlhf-test-begin")["State"]["ExitCode"] in (EXIT_STOPPED, 128 + signal.SIGTERM)
        box.hold(30 if delay < 3 else None)
        box.docker("start", "rlhf-test-begin")
    assert box.docker.wait("rlhf-test-begin") == 0, box.docker.logs("rlhf-test-begin")
    same(box.result(), uninterrupted(1))


MOMENTS = [  # from which step on (0: it may still import or load), after how many seconds, what
    (0, 2.0, ("stop", "--time=60")), (1, 0.0, ("kill",)), (8, 0.05, ("stop", "--time=0")), (15, 0.0, ("restart", "--time=1")),
    (22, 0.1, ("kill", "--signal=USR1")), (32, 0.02, ("kill",)), (42, 0.0, ("pause",)),
]  # fmt: skip


def test_at_unkind_moments(box, uninterrupted):
    """Two processes, told and killed while they import, load, train and save: in the end nothing of it can be seen."""
    name = "rlhf-test-unkind"
    box.hold(50)  # or it has ended before the last of them
    box.start(name, *COMMANDS["accelerate"][1])
    for step, delay, words in MOMENTS:
        box.until_step(step, name)
        time.sleep(delay)
        box.docker(*words, name)
        if words[0] == "pause":
            time.sleep(2)
            box.docker("unpause", name)
        if words[0] in ("kill", "stop"):
            box.docker.wait(name)
            box.hold(50)  # a signal has ended it
            box.docker("start", name)
    box.hold(None)
    assert box.docker.wait(name) == 0, box.docker.logs(name)
    same(box.result(), uninterrupted(2))


def test_docker_kill_and_restart(box, uninterrupted):
    """Out of memory, a crash: the restart policy starts it again, and it goes on from the last checkpoint."""
    box.hold(25)
    box.start("rlhf-test-kill", "rlhf", "dpo", "data/dpo.yaml", options=["--restart=on-failure:3"])
    box.until_step(25, "rlhf-test-kill")
    box.signal("rlhf-test-kill", "KILL")  # from within, as the kernel would: what `docker kill` ends stays down
    box.hold(None)
    until(lambda: box.docker.inspect("rlhf-test-kill")["RestartCount"] == 1)
    assert box.docker.wait("rlhf-test-kill") == 0, box.docker.logs("rlhf-test-kill")
    same(box.result(), uninterrupted(1))


def test_the_health_check_sees_that_training_advances(box):
    def health():
        done = box.docker("exec", "rlhf-test-health", "rlhf-healthcheck", check=False)
        return done.returncode, done.stdout

    options = ["--env=RLHF_HEALTH_MINUTES=0.1"]
    box.start("rlhf-test-health", "rlhf", "dpo", "data/dpo.yaml", "--max_steps", "1000000", options=options)
    box.until_step(5, "rlhf-test-health")
    time.sleep(7)  # longer than since its start
    code, said = health()
    assert (code, said.startswith("healthy: /rlhf/runs/dpo/metrics.jsonl was written")) == (0, True), said
    box.signal("rlhf-test-health", "STOP")
    time.sleep(7)
    code, said = health()
    assert (code, said.startswith("unhealthy: no metrics.jsonl below")) == (1, True), said


# --- two containers --------------------------------------------------------------------------------------------------


@pytest.fixture
def compose(box, daemon):
    """docker-compose with the project's file, the box's folders in place of the project's."""
    if not shutil.which("docker-compose"):
        pytest.skip("docker-compose is not installed")
    project = box.place / "project"
    shutil.copytree(ROOT / "docker", project / "docker")
    (project / "models").mkdir()
    os.chown(project / "models", box.uid, box.uid)
    for name, target in (("configs", "data"), ("data", "data"), ("runs", "runs")):
        (project / name).symlink_to(box.place / target)
    env = daemon.env | {
        "RLHF_IMAGE": box.image, "RLHF_UID": str(box.uid), "RLHF_GID": str(box.uid), "COMPOSE_PROJECT_NAME": "rlhf-test",
        "RLHF_STAGE": "dpo", "RECIPES": "data", "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    hold = project / "docker" / "hold.yaml"
    services = {name: {"environment": {"PYTHONPATH": "/rlhf/data"}} for name in ("train", "node-0", "node-1")}
    hold.write_text(json.dumps({"services": services}))

    def run(*words, check=True):
        command = ["docker-compose", "--file", str(project / "docker" / "compose.yaml"), "--file", str(hold), *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    yield run
    run("--profile", "two-node", "down", "--volumes", "--timeout", "1", check=False)


def test_two_containers_train_and_one_is_lost_then_stopped(box, compose, uninterrupted):
    """A lost one takes the other with it, and both are started again; one that is stopped makes both save and stay down."""
    two = ("--profile", "two-node")
    up = (*two, "up", "--detach", "--no-build", "node-0", "node-1")
    box.hold(15)
    compose(*up)
    names = [compose(*two, "ps", "--quiet", f"node-{n}").strip() for n in (0, 1)]

    def logs():
        return "".join(f"--- {name}\n{box.docker.logs(name)[-3000:]}" for name in names)

    box.until_step(15, names[0])
    box.signal(names[1], "KILL")
    box.hold(35)  # the other one goes on, to where it misses this one
    until(lambda: all(box.docker.inspect(name)["RestartCount"] for name in names), seconds=300, say=logs)
    box.until_step(35, names[0])
    compose(*two, "stop", "node-1")
    assert [box.docker.wait(name, 300) for name in names] == [0, 0], logs()
    assert json.loads((box.place / "runs" / "dpo" / "stopped.json").read_text())["step"] < STEPS
    assert "Traceback" not in box.docker.logs(names[1]).split("got SIGTERM")[1]
    compose(*up)
    for name in names:
        assert box.docker.wait(name, 600) == 0, logs()
    same(box.result(), uninterrupted(2))


def test_a_run_that_was_asked_to_stop_is_not_restarted(box, compose):
    box.hold(5)
    compose("up", "--detach", "--no-build", "train")
    name = compose("ps", "--quiet", "train").strip()
    box.until_step(5, name)
    (box.place / "runs" / "dpo" / "stop").touch()
    box.hold(None)
    assert box.docker.wait(name, 300) == 0, box.docker.logs(name)
    assert "Stopped after step" in box.docker.logs(name)
    assert box.docker.inspect(name)["RestartCount"] == 0 and not box.docker.inspect(name)["State"]["Running"]
