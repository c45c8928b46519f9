"""Real processes (gloo) through accelerate launch and launch/ddp.yaml."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from rlhf.runs.metrics import read_metrics

ROOT = Path(__file__).parent.parent.parent


SHARDED = ("zero2.yaml", "zero3.yaml", "fsdp2.yaml")


def need(launch_file):
    """Skip where this machine lacks what a launch file needs."""
    if launch_file.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
        if shutil.which("g++") is None:
            pytest.skip("there is no g++, with which DeepSpeed compiles what its processes on a CPU talk through")


def launch(processes, *words, launch_file="ddp.yaml", **options):
    done = forked.launch(processes, *words, launch_file=launch_file, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("launch_file", ["cpu.yaml", "single.yaml"])
def test_one_process(launch_file, recipe, tiny_llama, few_pairs, tmp_path):
    file = recipe(
        "sft", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "sft"), max_steps=1
    )
    assert "(1 process on cpu)" in launch(1, "sft", file, launch_file=launch_file)


@pytest.mark.parametrize("launch_file", ["ddp.yaml", *(pytest.param(f, marks=pytest.mark.slow) for f in SHARDED)])
def test_python_itself_starts_them(launch_file, recipe, tiny_llama, few_pairs, tmp_path):
    """Nothing forked, as users start it; all other tests here fork (tests/forked.py), and so share one hash seed."""
    need(launch_file)
    out = tmp_path / "dpo"
    file = recipe("dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(out), max_steps=2)
    command = [sys.executable, *forked.launch_command(2, "dpo", file, launch_file=launch_file)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}  # unset: random in each rank
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=env)
    assert done.returncode == 0 and "(2 processes on cpu)" in done.stdout, done.stderr[-3000:]
    assert json.loads((out / "complete.json").read_text())["steps"] == 2
    assert read_metrics(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_two_processes_train_what_one_does(recipe, tiny_llama, few_pairs, tmp_path):
    """12 pairs, 4 a step: 2 processes x 2 pairs, and 1 process x 2 pairs x 2 accumulated: the same three steps."""
    common = dict(model_name_or_path=tiny_llama, dataset_name=few_pairs, use_peft=True, lora_r=4,
                  lora_target_modules="all-linear", per_device_train_batch_size=2)  # fmt: skip
    losses = {}
    for processes, accumulation in ((1, 2), (2, 1)):
        out = tmp_path / f"dpo{processes}"
        file = recipe(
            "dpo", name=f"dpo{processes}", output_dir=str(out), gradient_accumulation_steps=accumulation, **common
        )
        shown = launch(processes, "dpo", file)
        assert f"({processes} process{'es' if processes > 1 else ''} on cpu)" in shown
        assert shown.count("=== DPO") == 1  # only one process speaks
        losses[processes] = [m["loss"] for m in read_metrics(out) if "loss" in m]
        assert json.loads((out / "provenance.json").read_text())["hardware"]["processes"] == processes
        assert json.loads((out / "complete.json").read_text())["steps"] == 3
    assert losses[2][0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[1] == pytest.approx(losses[2], abs=1e-4)


@pytest.mark.parametrize("launch_file", ["ddp.yaml", "zero2.yaml"])
def test_two_machines(launch_file, recipe, tiny_llama, few_pairs, tmp_path):
    """As README says: the same command on both, with accelerate's flags for several machines."""
    need(launch_file)
    out = tmp_path / "dpo"
    file = recipe(
        "dpo", output_dir=str(out), model_name_or_path=tiny_llama, dataset_name=few_pairs, use_peft=True, lora_r=4
    )
    command = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "launch" / launch_file, "--num_machines", 2,
               "--main_process_ip", "127.0.0.1", "--main_process_port", forked.free_port(), "--num_processes", 2]  # fmt: skip
    started = [forked.start(*command, "--machine_rank", rank, "-m", "rlhf", "dpo", file) for rank in (0, 1)]
    machines = [forked.finish(machine) for machine in started]
    assert [machine.returncode for machine in machines] == [0, 0], machines[0].stderr[-3000:]
    assert "(2 processes on cpu)" in machines[0].stdout and "===" not in machines[1].stdout  # only one process speaks
    assert json.loads((out / "complete.json").read_text())["steps"] == 3
    assert read_metrics(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_evaluation_does_not_depend_on_the_number_of_processes(recipe, tiny_llama, tiny_gpt2, tmp_path):
    results = {}
    for processes in (1, 3):
        out = tmp_path / f"evaluation{processes}"
        file = recipe("evaluate", name=f"evaluate{processes}", sft_model=tiny_llama, dpo_model=tiny_llama,
                      dataset_name="embedded:sample", dataset_test_split="heldout", max_eval_examples=7, max_new_tokens=4,
                      batch_size=2, output_dir=str(out))  # fmt: skip
        launch(processes, "evaluate", file)
        results[processes] = [(out / name).read_text() for name in ("results.json", "pairs.jsonl", "answers.jsonl")]
    assert results[1] == results[3]


def test_a_mistake_is_told_once(recipe, tiny_llama, few_pairs, tmp_path):
    file = recipe(
        "sft", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "o"), learing_rate=1
    )
    done = forked.launch(2, "sft", file)
    assert done.returncode != 0
    assert done.stderr.count("unknown key 'learing_rate'; did you mean 'learning_rate'?") == 1
