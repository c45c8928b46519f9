"""The recorded command: it can be pasted, whatever started the run, and says so where a part is not known."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config.recipe import Recipe
from rlhf.runs.command import LAUNCH_FILE, command_of, is_complete, launcher_of, launcher_words, shell_line

RECIPE = Recipe("sft", "my recipes/sft.yaml", {"beta": 0.1, "run_name": "it's"}, {"beta": 3, "run_name": None})
ACCELERATE = ["accelerate", "launch", "--config_file", "launch/ddp.yaml", "--num_processes", "2"]
STARTED = ["-m", "rlhf", "sft", "x.yaml"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("program", ["/somewhere/rlhf", "/somewhere/rlhf/__main__.py"])
def test_the_command_is_rlhf_whatever_started_it(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "sft", "x.yaml", "--run_name", "two words"])
    assert shell_line({"command": command_of(RECIPE)}) == "rlhf sft x.yaml --run_name 'two words'"


def test_a_run_that_python_code_started_is_told_by_its_recipe(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook", "-q"])
    line = shell_line({"command": command_of(RECIPE)})
    assert shlex.split(line) == ["rlhf", "sft", "my recipes/sft.yaml", "--run_name", "it's"]


@pytest.mark.parametrize("given", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]])
def test_a_token_is_not_recorded(given, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rlhf", "sft", "x.yaml", *given, "--eos_token", "<e>", "--seed", "1"])
    line = " ".join(command_of(RECIPE))
    assert "hf_secret" not in line and line.endswith("--eos_token <e> --seed 1")


@pytest.mark.parametrize(
    "words, expected",
    [
        (["/x/python", "/x/accelerate", *ACCELERATE[1:], *STARTED], ACCELERATE),
        (["/x/python", "-m", "accelerate.commands.launch", *ACCELERATE[2:], *STARTED], ACCELERATE),
        (["/x/python", "/x/torchrun", "--nproc_per_node", "2", *STARTED], ["torchrun", "--nproc_per_node", "2"]),
        (["/x/python", *STARTED], []),
        (["bash", "launch/pipeline.sh", "configs/quickstart"], []),
        (["/x/accelerate", "launch", "train.py"], []),
    ],
)
def test_launcher_words(words, expected):
    assert launcher_words(words) == expected


def test_the_launcher_is_looked_for_above_the_shell_between():
    found = launcher_of(iter([["bash", "-c", "x"], ["python", "/x/accelerate", *ACCELERATE[1:], *STARTED]]))
    started = {"command": ["rlhf", "sft", "x.yaml"], "launcher": found}
    assert shell_line(started) == " ".join([*ACCELERATE, *STARTED]) and is_complete(started)


def test_a_launcher_that_cannot_be_read_is_not_made_up(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    started = {"command": ["rlhf", "sft", "x.yaml"], "launcher": launcher_of(iter([]))}
    assert f"--config_file {LAUNCH_FILE} --num_processes 4 -m rlhf sft x.yaml" in shell_line(started)
    assert not is_complete(started)


def test_without_a_launcher_there_is_none():
    assert launcher_of(iter([["bash"]])) is None
    assert is_complete({"launcher": None}) and is_complete({"hardware": {"processes": 1}})
    assert not is_complete({"hardware": {"processes": 2}})  # recorded before launchers were


def test_what_an_older_version_recorded_is_put_right():
    assert shell_line({"command": ["__main__.py", "sft", "x.yaml"]}) == "rlhf sft x.yaml"


def test_a_real_parent_is_read(tmp_path):
    """A process named as accelerate's launcher is starts one that asks for it."""
    child = "from rlhf.runs.command import launcher_of; print(launcher_of())"
    (tmp_path / "accelerate").write_text(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])\n")
    command = [sys.executable, str(tmp_path / "accelerate"), *ACCELERATE[1:], *STARTED]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)},
    )
    if not os.path.isdir("/proc/self"):
        pytest.skip("no /proc here")
    assert str(ACCELERATE) in done.stdout, done.stderr
