"""The project's own Slurm scripts on a real Slurm of four nodes, with tiny models on CPUs."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import NODES, PREFIX, SCRIPT
from safetensors.torch import load_file, save_file

from rlhf.runs.metrics import read_metrics

ROOT = Path(__file__).parent.parent.parent
TRAIN = ROOT / "slurm" / "train.sbatch"
QUICK = "--skip-preflight"
# With --dist loadgroup one worker runs them all. What the scripts decide is in tests/test_slurm_scripts.py too, without Slurm.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cluster")]

STEPS = 60


def write(file, **values):
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
    return str(file)


@pytest.fixture
def recipe(tiny_llama, few_pairs, tmp_path):
    """recipe("dpo", …) -> the path of one whose steps do not depend on the number of processes."""

    def make(stage, **values):
        common = {
            "stage": stage, "model_name_or_path": tiny_llama, "dataset_name": few_pairs, "output_dir": str(tmp_path / stage),
            "max_length": 256, "global_batch_size": 5, "max_tokens_per_device": 800, "max_steps": STEPS, "use_peft": True,
            "lora_r": 4, "lora_target_modules": "all-linear", "lora_dropout": 0.0, "gradient_checkpointing": False,
            "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 10, "save_total_limit": 2, "disable_tqdm": True, "seed": 1,
        }  # fmt: skip
        if stage == "dpo":
            common["reference_cache"] = str(tmp_path / "reference")
        folder = tmp_path / "recipes"
        folder.mkdir(exist_ok=True)
        return write(folder / f"{stage}.yaml", **common | values)

    return make


def losses(folder):
    return [(row["step"], row["loss"]) for row in read_metrics(folder) if "loss" in row]


def steps_are_past(folder, step):
    return lambda: (found := losses(folder)) and found[-1][0] >= step


def train_for_a_while(cluster, file, out, *options, **variables):
    """Submit the DPO recipe; returns the job's id when it has done 13 steps, and waits there for `cluster.hold(None)`."""
    cluster.hold(13)
    job = cluster.sbatch(*options, TRAIN, "dpo", file, QUICK, **variables)
    cluster.until(steps_are_past(out, 13), [job])
    return job


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama, few_pairs, tmp_path_factory):
    """Losses and weights of the DPO recipe, by two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    found = []

    def get(file):
        if not found:
            command = ["--num_processes", "2", "-m", "rlhf", "dpo", file, "--output_dir", str(folder / "dpo")]
            launch(*command, "--reference_cache", str(folder / "reference"))
            found.extend((losses(folder / "dpo"), load_file(folder / "dpo" / "model.safetensors")))
        return found

    return get


def launch(*words):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "ddp.yaml")]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=600, cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def is_the_same(folder, whole):
    """To the last bit."""
    assert losses(folder) == whole[0]
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == whole[1].keys()
    assert all(torch.equal(weights[name], whole[1][name]) for name in weights)


# --- stop and go ------------------------------------------------------------------------------------------------------


def test_signal_and_preemption_with_grace(cluster, recipe, uninterrupted, tmp_path):
    """What a time limit sends, and then a preemption that gives time: both save the step they are at. Exact resumption."""
    file, out = recipe("dpo"), tmp_path / "dpo"
    whole = uninterrupted(file)
    asked = "asking the run to save and stop"
    cluster.hold(11)
    job = cluster.sbatch("--nodes=2", "--partition=patient", TRAIN, "dpo", file, QUICK)
    cluster.until(steps_are_past(out, 11), [job])
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    cluster.until((out / "stopped.json").exists, [job])  # the stop file has ended the holding (tests/hold.py)
    assert asked in cluster.log(job)
    stopped = json.loads((out / "stopped.json").read_text())["step"]
    cluster.hold(stopped + 5)
    cluster.until(lambda: "attempt 2:" in cluster.log(job), [job])
    cluster.until(steps_are_past(out, stopped + 5), [job])
    urgent = cluster.sbatch(f"--nodes={NODES}", "--exclusive", "--partition=urgent", "--wrap", "sleep 1")
    assert cluster.wait(urgent, job) == ("COMPLETED", 0)
    log = cluster.log(job)
    assert (
        "got USR1: asking the run to save and stop" in log
        and "it was told to stop (USR1): requeued (number 1 of" in log
    )
    assert f"attempt 2: 2 node(s) x 1 process(es) on CPUs, {PREFIX}1 {PREFIX}2" in log
    assert f"dpo: stopped at step {stopped} of {STEPS}" in log and f"resuming from {out}/checkpoint-{stopped}\n" in log
    assert "it is being preempted: requeued (number 2 of" in log and "attempt 3:" in log
    assert "lost" not in log and "Traceback" not in log
    assert len(list((tmp_path / "logs" / f"rlhf-{job}").glob("attempt-?-*.log"))) == 6  # 3 attempts on 2 nodes
    is_the_same(out, whole)


def test_lost_nodes_and_preemption_at_once(cluster, recipe, uninterrupted, tmp_path):
    """A node that dies in the midst of a step, and a preemption with 10 s (KillWait) to end."""
    file, out = recipe("dpo"), tmp_path / "dpo"
    whole = uninterrupted(file)
    job = train_for_a_while(cluster, file, out, "--nodes=2")
    cluster.script("kill", f"{PREFIX}2")
    cluster.hold(None)
    cluster.until(lambda: "attempt 2:" in cluster.log(job), [job])
    at = losses(out)[-1][0]
    assert f"Node failure on {PREFIX}2" in cluster.log(job)
    assert f"dpo: interrupted at step {at} of {STEPS}" in cluster.log(job)
    assert f"resumes after step {at // 10 * 10}" in cluster.log(job)
    cluster.hold(at + 5)
    cluster.until(steps_are_past(out, at + 5), [job])
    urgent = cluster.sbatch("--nodes=3", "--exclusive", "--partition=urgent", "--wrap", "sleep 1")
    cluster.until(lambda: "DUE TO PREEMPTION" in cluster.log(job), [job, urgent])
    cluster.hold(None)
    assert cluster.wait(urgent, job) == ("COMPLETED", 0)
    log = cluster.log(job)
    assert "DUE TO PREEMPTION" in log and "attempt 3:" in log
    assert "Slurm decides what comes next" in log and "requeued (number" not in log  # by itself, both times
    is_the_same(out, whole)


def test_the_first_node_is_gone_at_once(cluster, recipe, uninterrupted, tmp_path):
    """The node of the batch script falls silent: Slurm misses it, and requeues the job elsewhere."""
    file, out = recipe("dpo"), tmp_path / "dpo"
    whole = uninterrupted(file)
    job = train_for_a_while(cluster, file, out, "--nodes=2")
    cluster.script("crash", f"{PREFIX}1")
    cluster.hold(None)
    assert cluster.wait(job) == ("COMPLETED", 0)
    log = cluster.log(job)
    assert f"attempt 2: 2 node(s) x 1 process(es) on CPUs, {PREFIX}2 {PREFIX}3" in log
    is_the_same(out, whole)


def test_from_four_nodes_to_two(cluster, recipe, uninterrupted, tmp_path):
    """8 processes (two fake GPUs a node) stop; the bound of requeues is told; the same recipe goes on with 2."""
    file, out = recipe("dpo"), tmp_path / "dpo"
    job = train_for_a_while(cluster, file, out, "--nodes=4", "--gres=gpu:2", RLHF_MAX_REQUEUES="0")
    cluster.run("scancel", "--signal=USR1", job)  # to the nodes, not to the batch script
    assert cluster.wait(job) == ("FAILED", 85)
    assert "4 node(s) x 2 process(es)," in cluster.log(job)
    assert "it has been requeued 0 times (RLHF_MAX_REQUEUES): not again" in cluster.log(job)
    again = cluster.sbatch("--nodes=2", TRAIN, "dpo", file, QUICK)
    assert cluster.wait(again) == ("COMPLETED", 0)
    assert f"resuming from {out}/checkpoint-" in cluster.log(again)
    for (step, loss), (other_step, other) in zip(losses(out), uninterrupted(file)[0], strict=True):
        assert step == other_step and loss == pytest.approx(other, abs=5e-6)


def test_a_waiting_job_is_made_smaller(cluster, recipe):
    """With the command that slurm/README.md gives, from three nodes to two."""
    command = re.search(r"`(scontrol update JobId=… [^`]*)`", (ROOT / "slurm" / "README.md").read_text())[1]
    job = cluster.sbatch("--hold", "--nodes=3", TRAIN, "sft", recipe("sft", max_steps=1), QUICK)
    cluster.run(*command.replace("…", job).split())
    shown = cluster.run("scontrol", "show", "job", "-o", job)
    assert re.search(r" NumNodes=2(-2)? ", shown) and " NumTasks=2 " in shown, shown
    cluster.run("scontrol", "release", job)
    assert cluster.wait(job) == ("COMPLETED", 0), cluster.log(job)
    assert "attempt 1: 2 node(s) x 1 process(es)" in cluster.log(job)


def test_cancelled_and_stopped_by_hand_stay_away(cluster, recipe, tmp_path):
    """Whoever cancels a job or makes the file `stop` does not want it back."""
    file, out = recipe("sft"), tmp_path / "sft"
    cluster.hold(3)
    job = cluster.sbatch("--nodes=1", TRAIN, "sft", file, QUICK)
    cluster.until(steps_are_past(out, 3), [job])
    (out / "stop").touch()
    time.sleep(1.1)  # the run looks for it once a second
    cluster.hold(None)
    assert cluster.wait(job) == ("FAILED", 85)
    assert "stopped by hand" in cluster.log(job)
    before = losses(out)[-1][0]
    cluster.hold(before + 3)
    job = cluster.sbatch("--nodes=1", TRAIN, "sft", file, QUICK)
    cluster.until(lambda: "resuming from" in cluster.log(job), [job])
    cluster.until(steps_are_past(out, before + 3), [job])
    cluster.run("scancel", job)
    assert cluster.wait(job)[0] == "CANCELLED"
    assert "Slurm decides what comes next" in cluster.log(job) and "requeued (number" not in cluster.log(job)
    stopped = json.loads((out / "stopped.json").read_text())
    assert stopped["step"] > before  # and yet what it had done is saved


# --- chains -----------------------------------------------------------------------------------------------------------


def jobs_of(shown):
    """{stage: job number} of what pipeline.sh prints."""
    return {line.split(":")[0]: line.split()[2].strip(",") for line in shown.splitlines() if ": job " in line}


def test_pipeline(cluster, recipe, few_pairs, tmp_path):
    """sft -> reward -> dpo -> evaluate on two nodes, a signal in the midst; DPO's losses are one process's."""
    sft = str(tmp_path / "sft")
    recipe("sft", max_steps=12)
    recipe("reward", model_name_or_path=sft, max_steps=4)
    dpo = recipe("dpo", model_name_or_path=sft, max_steps=12)
    evaluate = {"stage": "evaluate", "sft_model": sft, "dpo_model": str(tmp_path / "dpo"), "dataset_name": few_pairs,
                "reward_model": str(tmp_path / "reward"), "output_dir": str(tmp_path / "evaluation"), "max_eval_examples": 4,
                "dataset_test_split": "train", "max_new_tokens": 4}  # fmt: skip
    write(tmp_path / "recipes" / "evaluate.yaml", **evaluate)
    pipeline = [
        ROOT / "slurm" / "pipeline.sh",
        tmp_path / "recipes",
        "--nodes",
        "2",
        "--launch",
        ROOT / "launch" / "ddp.yaml",
        QUICK,
    ]
    cluster.hold(1)
    jobs = jobs_of(cluster.run(*pipeline))
    assert list(jobs) == ["sft", "reward", "dpo", "evaluate"]
    logs = tmp_path / "logs"
    log = logs / f"sft-recipes-{jobs['sft']}.out"
    # by then the script has set its traps, and the run is at its first step or before it
    cluster.until(lambda: log.exists() and "attempt 1:" in log.read_text())
    cluster.run("scancel", "--signal=USR1", "--batch", jobs["sft"])
    cluster.until(lambda: "attempt 2:" in log.read_text())
    cluster.hold(None)
    assert cluster.wait(*jobs.values()) == ("COMPLETED", 0)
    assert "it was told to stop (USR1): requeued (number 1 of" in log.read_text()
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text())
    shown = cluster.run(*pipeline)  # again
    assert shown.count(": complete") == 4 and "All stages of" in shown and not jobs_of(shown)
    (tmp_path / "evaluation" / "complete.json").unlink()
    assert list(jobs_of(cluster.run(*pipeline))) == ["evaluate"]
    launch("--num_processes", "1", "-m", "rlhf", "dpo", dpo, "--output_dir", str(tmp_path / "alone"))
    assert [step for step, _ in losses(tmp_path / "dpo")] == list(range(1, 13))
    for (_, loss), (_, alone) in zip(losses(tmp_path / "dpo"), losses(tmp_path / "alone"), strict=True):
        assert loss == pytest.approx(alone, abs=5e-6)


def test_rounds(cluster, recipe, few_pairs, tmp_path):
    """Stages, then two rounds in one job on two nodes: each round's recipes and results are kept; again: nothing to do."""
    sft = str(tmp_path / "sft")
    recipe("sft", max_steps=2)
    recipe("reward", model_name_or_path=sft, max_steps=2)
    recipe("dpo", model_name_or_path=sft, max_steps=2)
    write(tmp_path / "recipes" / "evaluate.yaml", stage="evaluate", sft_model=sft, dpo_model=str(tmp_path / "dpo"),
          reward_model=str(tmp_path / "reward"), dataset_name=few_pairs, dataset_test_split="train", max_eval_examples=4,
          max_new_tokens=4, output_dir=str(tmp_path / "evaluation"))  # fmt: skip
    write(
        tmp_path / "recipes" / "rounds.yaml",
        stage="rounds",
        num_answers=3,
        max_new_tokens=8,
        keep_cut=True,
        max_prompts=6,
    )
    pipeline = [ROOT / "slurm" / "pipeline.sh", tmp_path / "recipes", "--nodes", "2", "--rounds", "2", "--launch",
                ROOT / "launch" / "ddp.yaml", QUICK]  # fmt: skip
    jobs = jobs_of(cluster.run(*pipeline))
    assert list(jobs) == ["sft", "reward", "dpo", "evaluate", "rounds"]
    assert cluster.wait(*jobs.values()) == ("COMPLETED", 0), (
        tmp_path / "logs" / f"rounds-recipes-{jobs['rounds']}.out"
    ).read_text()
    record = json.loads((tmp_path / "rounds" / "rounds.json").read_text())
    assert [found["round"] for found in record["rounds"]] == [1, 2]
    assert len(losses(tmp_path / "rounds" / "round-2" / "dpo")) == 2
    shown = cluster.run(*pipeline)
    assert "rounds: complete" in shown and "All stages of" in shown and not jobs_of(shown)


def test_a_failed_stage_stops_the_chain(cluster, recipe, tiny_llama, tmp_path):
    """A loss that is not finite is the run's own error: told with the node's log, not requeued, nothing after it runs. Before
    that, the preflight of both nodes."""
    broken = shutil.copytree(tiny_llama, tmp_path / "broken") / "model.safetensors"
    save_file({name: w * float("nan") for name, w in load_file(broken).items()}, broken, {"format": "pt"})
    recipe("sft", model_name_or_path=str(broken.parent), max_steps=5)
    recipe("reward", model_name_or_path=str(tmp_path / "sft"))
    jobs = jobs_of(cluster.run(ROOT / "slurm" / "pipeline.sh", tmp_path / "recipes", "--nodes", "2"))
    state, code = cluster.wait(jobs["sft"])
    assert (state, code) == ("FAILED", 2)  # the run's own, which accelerate's launcher has made 1
    log = (tmp_path / "logs" / f"sft-recipes-{jobs['sft']}.out").read_text()
    assert f"2 hosts: {PREFIX}1, {PREFIX}2" in log and "Ready: run the same command with `sft`" in log
    assert "is not a finite number" in log and "failed by its own error" in log and "attempt 2" not in log
    assert f"--- the end of {tmp_path}/logs/sft-recipes-{jobs['sft']}/attempt-1-{PREFIX}2.log" in log
    assert cluster.wait(jobs["reward"])[0] == "CANCELLED"


def test_array_shares_one_reference(cluster, recipe, tmp_path):
    """Two runs with other betas begin together: one computes the reference of the 12 pairs, the other finds all 12."""
    file = recipe("dpo", max_steps=2)
    job = cluster.sbatch(
        "--array=0-1", "--nodes=1", ROOT / "slurm" / "sweep.sbatch", file, "beta", "0.1", "0.5", "--", QUICK
    )
    cluster.until(lambda: not cluster.run("squeue", "--noheader").strip(), [job])
    logs = [file.read_text() for file in sorted(tmp_path.glob("*.out"))]
    assert sorted("12 pairs, 12 of them in the cache" in log for log in logs) == [False, True], logs
    assert sorted("12 pairs, 0 of them in the cache" in log for log in logs) == [False, True], logs
    for beta in (0.1, 0.5):
        made = tmp_path / f"dpo-beta{beta}"
        assert json.loads((made / "complete.json").read_text())["steps"] == 2
        assert json.loads((made / "provenance.json").read_text())["arguments"]["beta"] == beta
        assert losses(made)[0][1] == pytest.approx(0.693147, abs=1e-5)  # ln 2: it is this policy's reference


def test_container(cluster, recipe, tmp_path, monkeypatch):
    """A stand-in for Apptainer writes down how it is called, and runs the command without a container."""
    image, tools, calls = tmp_path / "images" / "host_image_1.sif", tmp_path / "tools", tmp_path / "calls"
    tools.mkdir()
    fake = '#!/bin/sh\necho "$*" >> CALLS\ncase $1 in\npull) touch "$2" ;;\nexec) while [ "$1" != IMAGE ]; do shift; done; shift; exec "$@" ;;\nesac\n'
    (tools / "apptainer").write_text(fake.replace("CALLS", str(calls)).replace("IMAGE", str(image)))
    (tools / "apptainer").chmod(0o755)
    job = cluster.sbatch(
        "--nodes=2", "--gpus-per-node=1", TRAIN, "sft", recipe("sft", max_steps=1), QUICK, "--container", "docker://host/image:1",
        PATH=f"{tools}:{os.environ['PATH']}", RLHF_CONTAINER_PYTHON=sys.executable, RLHF_BIND="/tmp",
    )  # fmt: skip
    assert cluster.wait(job) == ("COMPLETED", 0), cluster.log(job)
    shown = calls.read_text().splitlines()
    assert [c for c in shown if c.startswith("pull")] == [f"pull {image}.{job} docker://host/image:1"]  # once
    trained = sorted(c for c in shown if "accelerate.commands.launch" in c)
    for rank, call in enumerate(trained):
        assert call.startswith(
            f"exec --nv --bind {tmp_path} --bind {ROOT} --bind /tmp --pwd {tmp_path} {image} {sys.executable} -m"
        )
        assert f"--num_processes 2 --num_machines 2 --machine_rank {rank} --main_process_ip {PREFIX}1" in call
    assert len(trained) == 2


# --- the cluster itself -----------------------------------------------------------------------------------------------


def test_cluster_leaves_nothing(cluster, tmp_path):
    """A second one beside the first: up, its node back after a crash, gone when its standard input ends."""
    place = tmp_path / "other"
    session = subprocess.Popen([str(SCRIPT), "session", str(place), "2", "n"], text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert session.stdout.readline() == "ready\n"
    ask = lambda *words: subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, timeout=600).stdout  # noqa: E731
    assert ask("run", str(place), "srun", "-N2", "hostname").split() in (["n1", "n2"], ["n2", "n1"])
    ask("crash", str(place), "n2")
    ask("start", str(place), "n2")
    assert ask("run", str(place), "srun", "-w", "n2", "hostname") == "n2\n"
    session.stdin.close()  # as when its owner is killed
    assert session.wait(600) == 0
    found = subprocess.run(["pgrep", "-f", str(place)], capture_output=True, text=True).stdout.split()
    assert found == []
    shutil.rmtree(place)
