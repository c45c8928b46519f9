"""What the scripts of launch/, slurm/ and docker/ share (launch/common.sh): found from anywhere, said in one place."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.__main__ import parser

ROOT = Path(__file__).parent.parent

if not (ROOT / "docker" / "Dockerfile").is_file():
    pytest.skip("this is an image, which holds a part of the project", allow_module_level=True)

PATTERNS = ("launch/*.sh", "launch/cloud/*.sh", "slurm/*.sh", "slurm/*.sbatch", "docker/*.sh")
SCRIPTS = [path for pattern in PATTERNS for path in ROOT.glob(pattern)]


def bash(text, **options):
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=600, **options)
    return done.returncode, done.stdout, done.stderr


def shared(text, **options):
    """Run a text after launch/common.sh."""
    start = f'set -euo pipefail\nroot={ROOT}\ndie() {{ echo "$*" >&2; exit 2; }}\nsource $root/launch/common.sh\n'
    return bash(start + text, **options)


def test_the_stages_are_listed_once():
    for script in SCRIPTS:
        text = re.sub(r"(?m)(^|\s)#.*$", "", script.read_text())
        lists = re.findall(r"sft\W+reward\W+dpo", text)
        assert len(lists) == (script.name in ("common.sh", "entrypoint.sh") and script.parent.name != "slurm"), script
    code, stages, _ = shared('echo "${all_stages[@]}"')  # entrypoint.sh has all commands: tests/docker/test_files.py
    commands = next(action for action in parser()._actions if action.dest == "command").choices
    assert code == 0 and set(stages.split()) <= set(commands)


def test_stages_of_a_folder(tmp_path):
    for name in ("evaluate.yaml", "sft.yaml", "chat.yaml"):
        (tmp_path / name).touch()
    assert shared(f"find_stages {tmp_path}; echo ${{stages[@]}}") == (0, "sft evaluate\n", "")
    sentence = f"{tmp_path}/x has none of sft.yaml, reward.yaml, dpo.yaml, evaluate.yaml\n"
    assert shared(f"find_stages {tmp_path}/x") == (2, "", sentence)
    assert shared("is_stage dpo && ! is_stage 'sft reward' && ! is_stage chat && ! is_stage ''")[0] == 0


def test_launch_files_for_one_process():
    for name, processes, code in (("single", 1, 0), ("single", 2, 2), ("cpu", 2, 2), ("ddp", 2, 0), ("zero3", 8, 0)):
        found = shared(f"need_launch_file {ROOT}/launch/{name}.yaml {processes}")
        assert found[0] == code, found
        if code:
            assert (
                found[2] == f"{ROOT}/launch/{name}.yaml is for one process, and this job has 2; use launch/ddp.yaml\n"
            )


@pytest.mark.parametrize(
    ("cores", "processes", "given", "threads"), [(8, 2, "", 4), (7, 2, "", 3), (1, 4, "", 1), (8, 2, "5", 5)]
)
def test_cores_are_shared(cores, processes, given, threads):
    ask = f"share_cores {cores} {processes}; bash -c 'echo $OMP_NUM_THREADS'"
    assert shared(ask, env=os.environ | {"OMP_NUM_THREADS": given}) == (0, f"{threads}\n", "")


def test_which_python(tmp_path):
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch(mode=0o755)
    blank = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VIRTUAL_ENV")}
    for env, root, python in (
        ({}, tmp_path, str(own)),
        ({}, tmp_path / "none", "python"),
        ({"VIRTUAL_ENV": "/v"}, tmp_path, "python"),
        ({"PYTHON": "/p", "VIRTUAL_ENV": "/v"}, tmp_path, "/p"),
    ):
        assert shared(f"root={root}; find_python; echo $python", env=blank | env) == (0, f"{python}\n", ""), env


def test_signals_end_a_wait_but_not_what_is_waited_for(tmp_path):
    """Three signals while it waits; the exit code is that of the process in the end."""
    script = f"""
        trap 'echo signal >> {tmp_path}/log' USR1
        (trap '' USR1; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; exit 7) &
        touch {tmp_path}/waits
        wait_for_exit $!
    """
    text = f"set -euo pipefail; source {ROOT}/launch/common.sh\n{script}"
    process = subprocess.Popen(["bash", "-c", text])
    end = time.monotonic() + 600
    while not (tmp_path / "waits").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    for number in range(3):
        process.send_signal(signal.SIGUSR1)
        while not (tmp_path / "log").exists() or len((tmp_path / "log").read_text().split()) <= number:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
    (tmp_path / "go").touch()
    assert process.wait(600) == 7


def test_words_of_running_processes(tmp_path):
    word = f"word-{os.getpid()}"
    process = subprocess.Popen([sys.executable, "-c", "input()", word], stdin=subprocess.PIPE)
    try:
        assert shared(f"is_running sft-{word} {word}")[0] == 0
        assert shared(f"is_running {word[:-1]} x{word}")[0] != 0  # complete words
    finally:
        process.kill()
        process.wait()


# --- found from anywhere --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["launch/pipeline.sh", "slurm/pipeline.sh"])
def test_a_pipeline_through_a_link_from_another_folder(script, tmp_path):
    (tmp_path / "pipe").symlink_to(ROOT / script)
    code, _, error = bash("./pipe nowhere", cwd=tmp_path)
    assert (code, error) == (2, "pipeline: no recipe folder at nowhere; try configs/quickstart\n")


@pytest.mark.parametrize("name", ["train.sbatch", "sweep.sbatch"])
def test_a_batch_script_that_slurm_has_copied(name, tmp_path):
    """slurmd runs a copy in its spool folder, and the job was submitted elsewhere: only scontrol knows the project."""
    spool, tools, folder = tmp_path / "spool", tmp_path / "tools", tmp_path / "submitted"
    for place in (spool, tools, folder):
        place.mkdir()
    shutil.copy(ROOT / "slurm" / name, spool / "slurm_script")
    (tools / "scontrol").write_text(f"#!/bin/sh\necho JobId=7 UserId=a Command={ROOT}/slurm/{name} WorkDir={folder}\n")
    (tools / "scontrol").chmod(0o755)
    (folder / "dpo.yaml").write_text("output_dir: runs/x\n")
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "RLHF_"))}
    env |= {"PATH": f"{tools}:{env['PATH']}", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(folder)}
    words = "dpo dpo.yaml --launch zero9.yaml"
    if name == "sweep.sbatch":
        env |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
        words = "dpo.yaml beta 0.1 -- --launch zero9.yaml"
    code, shown, error = bash(f"bash slurm_script {words}", cwd=spool, env=env)
    assert (code, shown) == (2, "") and error.startswith(
        "train.sbatch: no launch file at zero9.yaml; launch/ has cpu.yaml ddp"
    )
    if name == "train.sbatch":
        code, _, error = bash("bash slurm_script chat dpo.yaml", cwd=spool, env=env)
        assert (code, error) == (2, "train.sbatch: 'chat' is no stage; use sft, reward, dpo or evaluate; or rounds\n")


@pytest.fixture
def image(tmp_path):
    """The files of the image's /usr/local, as the Dockerfile lays them out."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    for sources, target in re.findall(r"^COPY ((?:docker|launch)/\S+(?: \S+)*) /usr/local/(\S+/)$", text, re.M):
        (tmp_path / target).mkdir(parents=True)
        for source in sources.split():
            shutil.copy(ROOT / source, tmp_path / target)
    links = re.search(r"for name in .*; do ln -s .*; done", text)[0]
    (tmp_path / "bin").mkdir()
    assert bash(links.replace("/usr/local", str(tmp_path)))[0] == 0
    return tmp_path


@pytest.fixture
def inside(tmp_path):
    """A container's environment: its folders are this test's."""
    own = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "RLHF_HEALTH_DIRS": str(tmp_path / "runs")}
    for folder in own.values():
        Path(folder).mkdir()
    return {key: value for key, value in os.environ.items() if not key.startswith("RLHF_")} | own


def test_the_image_s_entrypoint_passes_on_an_exit_code(image, inside):
    done = bash(f"{image}/bin/rlhf-entrypoint bash -c 'echo $RLHF_STOP_FILE; exit 7'", cwd="/", env=inside)
    assert done == (7, f"{inside['TMPDIR']}/rlhf-stop\n", "")
    assert [file.name for file in Path(inside["TMPDIR"]).iterdir()] == ["rlhf-started"]


def test_the_image_s_entrypoint_needs_a_temporary_folder(image, inside):
    none = f"{inside['TMPDIR']}/none"
    code, _, error = bash(f"{image}/bin/rlhf-entrypoint bash -c 'exit 7'", cwd="/", env=inside | {"TMPDIR": none})
    assert code == 2 and f"rlhf: {none} can't be written; with --read-only give --tmpfs {none}\n" in error


def test_the_image_s_entrypoint_hands_a_stop_to_a_run(image, inside, tmp_path):
    """SIGTERM to the entrypoint: the stop file for what trains; the exit code says so."""
    script = tmp_path / "script"  # `sft` among its words makes it a run
    script.write_text(
        f"touch {tmp_path}/trains; "
        'while [ ! -e "$RLHF_STOP_FILE" ]; do sleep 0.05; done; touch "$RLHF_STOP_FILE.done"; exit 3\n'
    )
    env = inside | {"RLHF_STOP_FILE": str(tmp_path / "stop"), "RLHF_EXIT_STOPPED": "85"}
    command = [image / "bin" / "rlhf-entrypoint", "bash", script, "sft"]
    process = subprocess.Popen(command, env=env, cwd="/", stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 600
    while not (tmp_path / "trains").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=600)[1]
    assert (process.returncode, error) == (85, "rlhf: got SIGTERM: the run saves and stops after this step\n")


def test_the_image_s_health_check(image, inside):
    """Nothing has been logged: it is healthy while its start is recent, and for a run that has just logged."""

    def health():
        code, shown, error = bash(f"{image}/bin/rlhf-healthcheck", cwd="/", env=inside)
        assert error == "" and code == (not shown.startswith("healthy: ")), shown
        return shown

    metrics, started = Path(inside["RLHF_HEALTH_DIRS"]) / "metrics.jsonl", Path(inside["TMPDIR"]) / "rlhf-started"
    process = subprocess.Popen([sys.executable, "-c", "input()", "sft"], stdin=subprocess.PIPE)  # something trains
    try:
        assert health().startswith("unhealthy: no metrics.jsonl below")
        assert bash(f"{image}/bin/rlhf-entrypoint bash -c 'exit 7'", cwd="/", env=inside)[0] == 7
        assert health() == "healthy: it began less than 30 minutes ago\n"
        hour_ago = time.time() - 3600
        os.utime(started, (hour_ago, hour_ago))
        assert health().startswith("unhealthy: ")
        metrics.touch()
        assert health() == f"healthy: {metrics} was written within 30 minutes\n"
    finally:
        process.kill()
        process.wait()
