"""launch/cloud/: judged by SkyPilot's and Kubeflow's own schemas, and run here with the variables that they would set."""

import copy
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import yaml

from rlhf.files import cache_dir
from rlhf.runs.metrics import read_metrics

ROOT = Path(__file__).parent.parent
CLOUD = ROOT / "launch" / "cloud"
REQUIREMENTS = Path(__file__).parent / "cloud" / "requirements.txt"
VALIDATE = REQUIREMENTS.with_name("validate.py")
SKY = ("single.yaml", "spot.yaml", "multi-node.yaml")
KUBERNETES = ("kubernetes.yaml", "kubernetes-pytorchjob.yaml")
ENTRYPOINT = ["/usr/bin/tini", "-s", "--", "/usr/local/bin/rlhf-entrypoint"]

if not (ROOT / "docker" / "Dockerfile").is_file():
    pytest.skip("this is an image, which holds a part of the project", allow_module_level=True)


def documents(name):
    return list(yaml.safe_load_all((CLOUD / name).read_text()))


def of_kind(name, kind):
    return next(document for document in documents(name) if document["kind"] == kind)


# --- the schemas ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def validator(tmp_path_factory):
    """validator(documents) -> what is wrong with each, or None; by the packages of tests/cloud/requirements.txt.

    Their environment is made once (half a minute, 500 MB) and kept in the cache folder.
    """
    key = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = cache_dir() / "tests" / f"cloud-schemas-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "whole").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet"]
            done = subprocess.run([*pip, "install", "--requirement", REQUIREMENTS], capture_output=True, text=True)
            if done.returncode:
                ask = [*pip, "download", "--no-deps", "--no-cache-dir", "--dest", tmp_path_factory.mktemp("any"), "six"]
                reachable = subprocess.run(ask, capture_output=True).returncode == 0
                shutil.rmtree(folder, ignore_errors=True)
                assert not reachable, f"pip can't install {REQUIREMENTS.name}: {done.stderr.strip()[-1000:]}"
                pytest.skip("the schemas are packages, and no package index can be reached")
            (folder / "whole").touch()
    home = tmp_path_factory.mktemp("home")

    def validate(docs):
        done = subprocess.run([folder / "bin" / "python", VALIDATE], input=json.dumps(docs), text=True, timeout=120,
                              capture_output=True, cwd=ROOT, env=os.environ | {"HOME": str(home)})  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return validate


def places(document, path=()):
    """The paths of all mappings in a document."""
    if isinstance(document, dict):
        yield path
    pairs = (
        document.items() if isinstance(document, dict) else enumerate(document if isinstance(document, list) else [])
    )
    for key, value in pairs:
        yield from places(value, (*path, key))


def changed(document, path, key, value):
    document = copy.deepcopy(document)
    at = document
    for step in path:
        at = at[step]
    at[key] = value
    return document


# Names of the user's choice; and what SkyPilot 0.14 does not look into
FREE = {("envs",), ("secrets",), ("volumes",), ("file_mounts", "/bucket", "config"), ("config",)}


@pytest.mark.slow  # the schemas' packages are half a gigabyte
@pytest.mark.xdist_group("cloud-schemas")
@pytest.mark.parametrize("name", [*SKY, "volume.yaml", *KUBERNETES])
def test_schema(name, validator):
    """It is valid, and with an unknown key anywhere it is not."""
    good = documents(name)
    bad = [(doc, path) for doc in good for path in places(doc) if path not in FREE]
    assert bad
    found = validator(good + [changed(doc, path, "surprise", {"x": [1]}) for doc, path in bad])
    assert found[: len(good)] == [None] * len(good)
    assert [path for (_, path), error in zip(bad, found[len(good) :], strict=True) if error is None] == []


@pytest.mark.slow  # the schemas' packages are half a gigabyte
@pytest.mark.xdist_group("cloud-schemas")
def test_schema_refuses_wrong_values(validator):
    sky, (_, runtime, job) = documents("spot.yaml")[0], documents("kubernetes.yaml")
    torch_job = of_kind("kubernetes-pytorchjob.yaml", "PyTorchJob")
    pod = ("spec", "template", "spec", "replicatedJobs", 0, "template", "spec", "template", "spec")
    wrong = [
        changed(sky, (), "num_nodes", "two"),
        changed(sky, ("file_mounts", "/bucket"), "mode", "CACHED"),
        changed(sky, ("resources", "job_recovery"), "recover_on_exit_codes", [850]),
        changed(sky, ("resources", "job_recovery"), "strategy", "HOPE"),
        changed(sky, ("resources",), "accelerators", {"L4": "many"}),
        changed(runtime, pod, "terminationGracePeriodSeconds", "600"),
        changed(runtime, (*pod, "containers", 0, "livenessProbe", "exec"), "command", "rlhf-healthcheck"),
        changed(job, ("spec", "trainer"), "numNodes", "2"),
        changed(job, ("spec",), "runtimeRef", {"kind": "TrainingRuntime"}),
        changed(torch_job, ("spec",), "nprocPerNode", 8),
        changed(torch_job, ("spec", "pytorchReplicaSpecs", "Master"), "replicas", "1"),
    ]
    found = validator(wrong)
    assert [i for i, error in enumerate(found) if error is None] == []


def test_what_schemas_do_not_say():
    """Enough time to save, no other user's rights, the image's entrypoint, and the last line that waits for uploads."""
    image = re.search(r"^ENTRYPOINT (.*)$", (ROOT / "docker" / "Dockerfile").read_text(), re.M)[1]
    assert json.loads(image) == ENTRYPOINT
    runtime = of_kind("kubernetes.yaml", "TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"][0]
    assert runtime["name"] == "node"  # as is the container: Kubeflow Trainer looks for both
    torch_job = of_kind("kubernetes-pytorchjob.yaml", "PyTorchJob")["spec"]["pytorchReplicaSpecs"]
    assert torch_job["Master"]["template"] == torch_job["Worker"]["template"]
    for pod, name in (
        (runtime["template"]["spec"]["template"]["spec"], "node"),
        (torch_job["Master"]["template"]["spec"], "pytorch"),
    ):
        container = pod["containers"][0]
        assert container["name"] == name and container["command"] == ENTRYPOINT
        assert pod["terminationGracePeriodSeconds"] >= 600 and pod["securityContext"]["runAsNonRoot"] is True
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    for name in SKY:
        assert not re.search(r"\b(exec|exit|set -e)\b", documents(name)[0]["run"])


@pytest.mark.parametrize("name", SKY)
def test_shellcheck(name):
    task = documents(name)[0]
    for script in (task["setup"], task["run"]):
        command = [Path(sys.executable).with_name("shellcheck"), "--shell", "bash", "-"]
        done = subprocess.run(command, input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, recipe, tiny_llama, few_pairs):
    """project(name, **keys of both recipes) -> a copy of what SkyPilot brings to a machine, with an SFT and a DPO recipe."""

    def make(name, **keys):
        folder = tmp_path / name
        for part in ("launch", "docker"):
            shutil.copytree(ROOT / part, folder / part)
        (folder / "configs" / "tiny").mkdir(parents=True)
        for stage, model in (("sft", tiny_llama), ("dpo", "runs/tiny/sft")):
            file = recipe(stage, model_name_or_path=model, dataset_name=few_pairs, output_dir=f"runs/tiny/{stage}",
                          **{"save_strategy": "steps", "save_steps": 2, "max_steps": 3,
                             "global_batch_size": 4, "max_tokens_per_device": 800, **keys})  # fmt: skip
            lines = (
                Path(file).read_text().splitlines(keepends=True)
            )  # the same batches on 1 and 2; the cache at its own place
            text = "".join(line for line in lines if not line.startswith(("reference_cache", "per_device_train")))
            (folder / "configs" / "tiny" / f"{stage}.yaml").write_text(text)
        return folder

    return make


class Nodes:
    """Machines in small: each is a process in `folder`, with its own variables and its own stop file."""

    def __init__(self, folder, command, variables, **more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        engine = re.compile(r"SKYPILOT_|PET_|RLHF_|(RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|VIRTUAL_ENV)$")
        blank = {key: value for key, value in forked.environment().items() if not engine.match(key)}
        blank |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)}
        blank |= {"RLHF_CACHE": str(folder / "cache")} if "RLHF_STORE" not in more else {}
        self.outputs, self.processes = [], []
        for i, own in enumerate(variables):
            own = {key: port if value == "PORT" else str(value) for key, value in own.items()}
            env = blank | {"RLHF_STOP_FILE": f"{folder}/stop-{i}", "RECIPES": "configs/tiny"} | more | own
            self.outputs.append(folder / f"out-{i}")
            with open(self.outputs[-1], "a") as out:
                self.processes.append(subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out, text=True))

    def wait(self, timeout=600):
        try:
            return [process.wait(timeout=timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def shown(self, i=0):
        return self.outputs[i].read_text()


def sky_command(name):
    return ["bash", "-c", documents(name)[0]["run"]]


def pod_command(container):
    """A container's command and arguments, on this machine, where the entrypoint is a file of the project."""
    assert container["command"] == ENTRYPOINT
    return ["bash", "docker/entrypoint.sh", *container["args"]]


def sky_variables(nodes, gpus):
    ips = "\n".join(["127.0.0.1"] * nodes)
    return [
        {
            "SKYPILOT_NODE_RANK": i,
            "SKYPILOT_NODE_IPS": ips,
            "SKYPILOT_NUM_NODES": nodes,
            "SKYPILOT_NUM_GPUS_PER_NODE": gpus,
        }
        for i in range(nodes)
    ]


def trainjob_variables(nodes, procs):
    """What Kubeflow Trainer's Torch plugin gives each Pod."""
    return [
        {"PET_NNODES": nodes, "PET_NPROC_PER_NODE": procs, "PET_NODE_RANK": i, "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "PORT"}
        for i in range(nodes)
    ]  # fmt: skip


def torchjob_variables(nodes, procs):
    """What Training Operator 1.7 to 1.9 gives each Pod; its WORLD_SIZE counts processes."""
    return [
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "PORT", "RANK": i, "WORLD_SIZE": nodes * procs, "PYTHONUNBUFFERED": 0,
         "PET_NNODES": nodes, "PET_NPROC_PER_NODE": procs, "PET_NODE_RANK": i}
        for i in range(nodes)
    ]  # fmt: skip


def losses(folder, stage):
    return [row["loss"] for row in read_metrics(folder / "runs" / "tiny" / stage) if "loss" in row]


@pytest.mark.slow
def test_one_machine_and_two_of_skypilot_train_the_same(project, tmp_path):
    one = project("one")
    nodes = Nodes(
        one,
        sky_command("single.yaml"),
        sky_variables(1, 0),
        **documents("single.yaml")[0]["envs"] | {"RECIPES": "configs/tiny"},
    )
    assert nodes.wait() == [0], nodes.shown()[-3000:]
    assert "(1 process on cpu)" in nodes.shown() and (one / "runs" / "tiny" / "report.html").exists()

    two, store = project("two"), tmp_path / "shared"
    envs = documents("multi-node.yaml")[0]["envs"] | {"RECIPES": "configs/tiny", "RLHF_STORE": str(store)}
    nodes = Nodes(two, sky_command("multi-node.yaml"), sky_variables(2, 1), **envs)
    assert nodes.wait() == [0, 0], nodes.shown()[-3000:] + nodes.shown(1)[-3000:]
    assert "2 processes on 1 host" in nodes.shown()  # the preflight's table
    assert nodes.shown().count("(2 processes on cpu)") == 2 and "===" not in nodes.shown(1)
    assert (store / "runs" / "tiny" / "dpo" / "complete.json").exists() and (store / "cache" / "reference").is_dir()
    for stage in ("sft", "dpo"):
        assert len(losses(one, stage)) == 3
        assert losses(two, stage) == pytest.approx(losses(one, stage), abs=1e-4)

    again = Nodes(two, sky_command("multi-node.yaml"), sky_variables(2, 1), **envs)
    assert again.wait() == [0, 0] and "sft: complete" in again.shown()


@pytest.mark.slow
def test_pods_of_the_training_operator(project):
    """Two Pods train what one process does."""
    pods, one = project("pods"), project("one")
    replicas = of_kind("kubernetes-pytorchjob.yaml", "PyTorchJob")["spec"]["pytorchReplicaSpecs"]
    command = pod_command(replicas["Worker"]["template"]["spec"]["containers"][0])
    nodes = Nodes(pods, command, torchjob_variables(2, 1), STAGES="sft", LAUNCH="launch/ddp.yaml", RLHF_PREFLIGHT="no")
    assert nodes.wait() == [0, 0], nodes.shown()[-3000:] + nodes.shown(1)[-3000:]
    assert "(2 processes on cpu)" in nodes.shown()
    nodes = Nodes(one, command, [{"PROCS_PER_NODE": 1}], STAGES="sft")
    assert nodes.wait() == [0], nodes.shown()[-3000:]
    assert len(losses(one, "sft")) == 3
    assert losses(pods, "sft") == pytest.approx(losses(one, "sft"), abs=1e-4)


@pytest.mark.slow
def test_one_pod_of_two_is_evicted(project, hold):
    """SIGTERM to one Pod: both save and end with 85, Kubernetes starts both anew, and the losses are as without a break."""
    folder, whole = (project(name, max_steps=12, save_steps=4) for name in ("evicted", "whole"))
    runtime = of_kind("kubernetes.yaml", "TrainingRuntime")["spec"]["template"]["spec"]
    pods = runtime["replicatedJobs"][0]["template"]["spec"]
    policy = pods["podFailurePolicy"]["rules"][1]["onExitCodes"]
    command = pod_command(pods["template"]["spec"]["containers"][0])
    common = dict(STAGES="sft", LAUNCH="launch/ddp.yaml", RLHF_PREFLIGHT="no")
    hold(5)
    nodes = Nodes(folder, command, trainjob_variables(2, 1), PYTHONPATH=hold.pythonpath, **common)
    end = time.monotonic() + 600
    while not (folder / "runs" / "tiny" / "sft").is_dir() or len(losses(folder, "sft")) < 5:
        assert time.monotonic() < end and nodes.processes[0].poll() is None, nodes.shown()[-3000:]
        time.sleep(0.1)
    nodes.processes[1].send_signal(signal.SIGTERM)
    assert nodes.wait() == policy["values"] * 2, nodes.shown()[-3000:] + nodes.shown(1)[-3000:]
    stopped_at = json.loads((folder / "runs" / "tiny" / "sft" / "stopped.json").read_text())["step"]
    assert 5 <= stopped_at < 12
    nodes = Nodes(folder, command, trainjob_variables(2, 1), **common)
    assert nodes.wait() == [0, 0], nodes.shown()[-3000:] + nodes.shown(1)[-3000:]
    nodes = Nodes(whole, command, trainjob_variables(2, 1), **common)
    assert nodes.wait() == [0, 0]
    assert len(losses(whole, "sft")) == 12 and losses(folder, "sft") == losses(whole, "sft")


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RECIPES": "configs/nowhere"}, "no recipe folder at configs/nowhere (RECIPES)"),
        ({"STAGES": "sft chat"}, "'chat' is no stage"),
        ({"STAGES": "evaluate"}, "no configs/tiny/evaluate.yaml"),
        ({"LAUNCH": "launch/zero9.yaml"}, "no launch file at launch/zero9.yaml; launch/ has cpu.yaml ddp"),
        ({"LAUNCH": "launch/single.yaml", "PROCS_PER_NODE": "2"}, "is for one process, and this job has 2"),
        ({"PROCS_PER_NODE": "many"}, "PROCS_PER_NODE takes a number, not 'many'"),
        ({"PREFLIGHT": "no"}, "RLHF_PREFLIGHT is read in place of PREFLIGHT"),
        # "yes" is what multi-node.yaml says
        ({"PREFLIGHT": "no", "RLHF_PREFLIGHT": "yes"}, "RLHF_PREFLIGHT is read in place of PREFLIGHT"),
        ({"PET_NNODES": "1:4"}, "an elastic job (1:4) is not supported"),
        ({"RLHF_STORE": "store", "PROCS_PER_NODE": "1"}, "holds files; move them to store/runs"),
    ],
)
def test_mistakes(env, says, project):
    folder = project("wrong")
    if "RLHF_STORE" in env:
        (folder / "runs").mkdir()
        (folder / "runs" / "mine").touch()
    nodes = Nodes(folder, ["bash", "launch/cloud/node.sh"], [env])
    assert nodes.wait() == [2] and says in nodes.shown(), nodes.shown()


def test_a_mistake_in_a_recipe_is_told_by_each_node(project):
    """Also by the second Pod: without its RANK, which would keep `rlhf` silent there."""
    folder = project("wrong")
    with open(folder / "configs" / "tiny" / "dpo.yaml", "a") as file:
        file.write("learing_rate: 1\n")
    nodes = Nodes(folder, ["bash", "launch/cloud/node.sh"], torchjob_variables(2, 1))
    assert nodes.wait() == [2, 2]
    for i in (0, 1):
        assert "unknown key 'learing_rate'; did you mean 'learning_rate'?" in nodes.shown(i)
    assert not (folder / "runs").exists()


def test_setup_looks_for_a_python_that_is_new_enough(tmp_path):
    """Where only 3.10 is there, uv brings one; here uv and make are stand-ins."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {
        **{f"python3.{minor}": "exit 1" for minor in (11, 12, 13)},
        "python3": "exit 1",
        "uv": '[ "$1 $2" != "python find" ] || echo /opt/python3.12',
        "make": f'echo "$@" > {tmp_path}/made; exit 7',
        "g++": "",
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    env = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(["bash", str(CLOUD / "setup.sh")], env=env, capture_output=True, text=True)
    assert done.returncode in (2, 7), done.stderr
    assert (tmp_path / "made").read_text() == "setup PYTHON=/opt/python3.12\n"
    (tools / "rlhf").write_text("#!/bin/bash\n")
    (tools / "rlhf").chmod(0o755)
    (tmp_path / "made").unlink()
    done = subprocess.run(["bash", str(CLOUD / "setup.sh")], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not (tmp_path / "made").exists()
