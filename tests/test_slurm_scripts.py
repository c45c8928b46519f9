"""What the Slurm scripts refuse and print, where there is no Slurm; tests/cluster/ runs them on a real one."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parent.parent
SLURM = ROOT / "slurm"
INSIDE = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2"}


@pytest.fixture
def script(tmp_path):
    """script("train.sbatch", …, **environment) -> exit code, what was printed. Slurm's commands are stand-ins."""
    tools = tmp_path / "tools"
    tools.mkdir()

    def tool(name, text):
        (tools / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/calls\n{text}\n')
        (tools / name).chmod(0o755)

    tool("scontrol", '[ "$2" != hostnames ] || printf "n1\\nn2\\n"')
    tool(
        "srun",
        'case "$*" in --help) echo --container-image ;; *--status) echo "dpo: not started"; exit 3 ;; '
        '*node.sh*) eval "${TRAINS:-}" ;; esac',
    )
    tool("sbatch", "echo 41")

    def run(name, *words, **env):
        blank = {key: "" for key in os.environ if key.startswith(("SLURM_", "SBATCH_", "RLHF_"))}
        env = blank | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": forked.python(), "RLHF_SITE_ENV": "/none",
                       "RLHF_LOGS": str(tmp_path / "logs"), "RLHF_ROOT": str(ROOT)} | env  # fmt: skip
        done = subprocess.run(["bash", str(SLURM / name), *map(str, words)], env=forked.environment(**env), cwd=tmp_path,
                              capture_output=True, text=True, timeout=600)  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    run.calls = lambda: (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return run


@pytest.fixture
def recipes(recipe, tmp_path, few_pairs):
    folder = tmp_path / "recipes"
    folder.mkdir()
    for stage in ("sft", "dpo"):
        model = "embedded:smollm2-135m-instruct" if stage == "sft" else str(tmp_path / "sft")
        file = recipe(stage, model_name_or_path=model, dataset_name=few_pairs, output_dir=str(tmp_path / stage))
        shutil.move(file, folder)
    return folder


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dpo"], "usage: sbatch [...] slurm/train.sbatch STAGE RECIPE.yaml"),
        (["chat", "dpo.yaml"], "'chat' is no stage; use sft, reward, dpo or evaluate; or rounds"),
        (["dpo", "dpo.yaml", "--fresh"], "--fresh would start from scratch after every requeue"),
        (["dpo", "dpo.yaml", "--procs-per-node", "many"], "--procs-per-node takes a number, not 'many'"),
        (["dpo", "dpo.yaml", "--launch"], "--launch needs a value"),
        (["dpo", "nowhere.yaml"], "no recipe at nowhere.yaml"),
        (["sft", "recipes/sft.yaml", "--launch", "zero9.yaml"], "no launch file at zero9.yaml; launch/ has cpu.yaml ddp"),
        (["sft", "recipes/sft.yaml", "--launch", ROOT / "launch" / "single.yaml"], "is for one process, and this job has 2"),
        (["sft", "recipes/sft.yaml", "--container", "no.sif"], "no image at no.sif"),
        (["sft", "recipes/sft.yaml", "--learing_rate", "1"], "--learing_rate: unknown key 'learing_rate'"),
    ],
)  # fmt: skip
def test_mistakes_end_with_code_2_before_anything_starts(words, says, script, recipes):
    code, shown = script("train.sbatch", *words, **INSIDE, RLHF_CONTAINER_RUNTIME="apptainer")
    assert code == 2 and says in shown, shown
    assert not any("node.sh" in call for call in script.calls())


def test_how_a_waiting_job_is_made_smaller():
    """`NumNodes=2` alone leaves a job of three nodes as it is (seen on Slurm 22.05; tests/cluster has the real thing)."""
    for file in [*SLURM.iterdir(), ROOT / "README.md", *(ROOT / "rlhf").rglob("*.py")]:
        for command in re.findall(r"scontrol update [^`\n]*NumNodes=[^`\n]*", file.read_text(encoding="utf-8")):
            assert command == "scontrol update JobId=… NumNodes=2-2 NumTasks=2", file


def test_outside_of_a_job(script):
    assert script("train.sbatch", "dpo", "dpo.yaml") == (
        2,
        "train.sbatch: this is a batch script; give it to sbatch (slurm/README.md shows how)\n",
    )
    code, shown = script("sweep.sbatch", "dpo.yaml", "beta", "0.1")
    assert code == 2 and "give sbatch --array 0-N" in shown


def test_pyxis(script, recipes, tmp_path):
    """srun's own flags; the image's name as enroot has it; questions to the run are asked in the container too."""
    words = ["dpo", recipes / "dpo.yaml", "--beta", "0.2", "--container", "docker://host/image:1", "--skip-preflight"]
    script("train.sbatch", *words, **INSIDE, RLHF_CONTAINER_RUNTIME="pyxis", RLHF_BIND="/data")
    image = f"--container-image=host/image:1 --container-mounts={tmp_path}:{tmp_path},{ROOT}:{ROOT},/data:/data --container-workdir={tmp_path}"
    calls = [call for call in script.calls() if call.startswith("srun")]
    assert f"{image} python -m rlhf dpo {recipes}/dpo.yaml --beta 0.2 --status" in calls[0]
    main = next(call for call in calls if "node.sh" in call)
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in main and f"{image} bash {ROOT}/slurm/node.sh" in main
    assert main.endswith(f"python dpo {recipes}/dpo.yaml --beta 0.2")
    code, shown = script("train.sbatch", *words[:-3], "--container", "x.sif", **INSIDE, RLHF_CONTAINER_RUNTIME="pyxis")
    assert code == 2 and "pyxis can't run x.sif" in shown


TORCH = "E1125 13:00:00.000 71 torch/distributed/elastic/multiprocessing/api.py:1003] failed (exitcode: {}) local_rank: 0 (pid: 9) of binary: /p"  # fmt: skip
SIMPLE = "subprocess.CalledProcessError: Command '['/p', '-m', 'rlhf', 'dpo']' {}."


@pytest.mark.parametrize(
    ("srun", "logs", "code"),
    [
        (1, [TORCH.format(2)], 2),
        (137, [TORCH.format(2), ""], 2),  # srun has killed the node that was slow to end
        (137, ["", TORCH.format(2)], 2),
        (137, [TORCH.format(2), TORCH.format(1)], 2),
        (137, [TORCH.format(1), TORCH.format(2)], 2),
        (143, [TORCH.format(1), TORCH.format(-6)], 1),
        (137, [TORCH.format(-9), TORCH.format(1)], 137),  # out of memory there, and here the connection was lost
        (1, [TORCH.format(1), TORCH.format(-9)], 137),
        (9, [TORCH.format(-9), ""], 137),
        (9, ["", ""], 9),
        (137, ["", ""], 137),
        (127, [TORCH.format(1), ""], 127),  # node.sh's own: a program is not there
        (2, [TORCH.format(1), ""], 2),
        (0, ["", ""], 1),  # the launcher has ended well, and the run is not complete
        (1, [SIMPLE.format("returned non-zero exit status 2")], 2),
        (1, [SIMPLE.format("died with <Signals.SIGKILL: 9>")], 137),
    ],
)
def test_a_failed_run_ends_with_the_code_of_its_own_error(srun, logs, code, script, recipes):
    """Whatever srun's code is when it ends the other nodes; and with the code of what was killed, where that was it."""
    trains = "cd $RLHF_LOGS/rlhf-7\n" + "".join(
        f"cat > attempt-1-n{number + 1}.log <<< {shlex.quote(line)}\n" for number, line in enumerate(logs)
    )
    found, shown = script("train.sbatch", "dpo", recipes / "dpo.yaml", "--container", "x.sqsh", "--skip-preflight",
                          **INSIDE, RLHF_CONTAINER_RUNTIME="pyxis", TRAINS=f"{trains}exit {srun}")  # fmt: skip
    killed = ", killed, as a rule for lack of memory" if code in (9, 137) else ""
    assert found == code and f"failed by its own error (code {code}{killed}); not requeued" in shown, shown


def test_pipeline_submits_what_it_shows(script, recipes, tmp_path):
    words = [recipes, "--nodes", "2", "--time=1:00:00", "--launch", ROOT / "launch" / "zero3.yaml", "--skip-preflight"]
    code, shown = script("pipeline.sh", *words, "--dry-run")
    assert code == 0 and not (tmp_path / "logs").exists() and not (tmp_path / "calls").exists()
    first, second = shown.replace("\\", "").splitlines()
    same = f"--nodes 2 --time=1:00:00 {SLURM}/train.sbatch"
    launch = f"--launch {ROOT}/launch/zero3.yaml --skip-preflight"
    assert first.strip().endswith(f"--dependency=singleton {same} sft {recipes}/sft.yaml {launch}")
    assert second.strip().endswith(f"--dependency=singleton,afterok:JOB_OF_sft {same} dpo {recipes}/dpo.yaml {launch}")
    assert "--kill-on-invalid-dep=yes" in first and "--kill-on-invalid-dep=yes" in second
    code, shown = script("pipeline.sh", *words)
    assert code == 0 and f"squeue --jobs 41,41; rlhf status {recipes}" in shown
    assert f"dpo: job 41 after 41, log {tmp_path}/logs/dpo-recipes-41.out" in shown
    assert script.calls()[0] == f"sbatch {first.strip().removeprefix('sbatch ')}"


@pytest.mark.parametrize("called", ["linked/slurm/pipeline.sh", "pipe", "other/pipe"])
def test_paths_are_those_by_which_a_folder_was_called(called, script, recipes, tmp_path):
    """A folder that is a link is not resolved: it may lead elsewhere on another node. A link to the script is."""
    (tmp_path / "linked").symlink_to(ROOT)
    (tmp_path / "other").mkdir()
    (tmp_path / "pipe").symlink_to(tmp_path / "linked" / "slurm" / "pipeline.sh")
    (tmp_path / "other" / "pipe").symlink_to("../linked/slurm/pipeline.sh")
    code, shown = script(tmp_path / called, recipes, "--nodes", "2", "--dry-run")
    assert code == 0 and shown.count(f" {tmp_path}/linked/slurm/train.sbatch ") == 2, shown


@pytest.mark.parametrize("logs", ["linked/logs", "/linked/logs", ""])
def test_logs_are_where_they_were_asked_for(logs, script, recipes, tmp_path):
    """Likewise: all nodes write there, and look for the stop file."""
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    asked = f"{tmp_path}{logs}" if logs.startswith("/") else logs
    words = ["dpo", recipes / "dpo.yaml", "--container", "x.sqsh", "--skip-preflight"]
    script("train.sbatch", *words, **INSIDE, RLHF_CONTAINER_RUNTIME="pyxis", RLHF_LOGS=asked)
    main = next(call for call in script.calls() if "node.sh" in call)
    assert f"node.sh {tmp_path}/{logs.lstrip('/') or 'logs'}/rlhf-7/attempt-1 " in main


def test_pipeline_submits_nothing_where_a_recipe_is_wrong(script, recipes, tmp_path):
    with open(recipes / "dpo.yaml", "a", encoding="utf-8") as file:
        file.write("learing_rate: 1\n")
    code, shown = script("pipeline.sh", recipes, "--nodes", "2")
    assert code == 2 and "did you mean 'learning_rate'" in shown and not (tmp_path / "calls").exists()
    code, shown = script("pipeline.sh", tmp_path / "nothing")
    assert code == 2 and "no recipe folder at" in shown
    code, shown = script("pipeline.sh", recipes, "--launch", "nothing.yaml")
    assert code == 2 and "no launch file at nothing.yaml" in shown


def test_gpus_of_a_node(script):
    """In whichever way a job has asked for them, and whatever Slurm's age."""
    ask = f"root={ROOT}; source {SLURM}/common.sh; gpus_here"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    for env, found in (
        ({}, "0"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "8"),
        ({"SLURM_JOB_GPUS": "0,1,5"}, "3"),
        ({"SLURM_STEP_GPUS": "4", "SLURM_JOB_GPUS": "0,1"}, "1"),
    ):
        done = subprocess.run(["bash", "-c", ask], env=clean | env, capture_output=True, text=True)
        assert done.stdout.strip() == found, env
