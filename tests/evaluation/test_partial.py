"""An evaluation that is stopped or killed: what it has measured is kept, and the same command ends as if nothing had been."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import forked
import psutil
import pytest

from rlhf.__main__ import main
from rlhf.evaluation.partial import Measured, key_of
from rlhf.runs.stop import EXIT_STOPPED, Stopped, Stopper

WORKER = Path(__file__).with_name("holding_worker.py")
RESULTS = ("results.json", "pairs.jsonl", "answers.jsonl")


# --- one batch after the other ---------------------------------------------------------------------------------------


class Run:
    """Measures rows in a folder; a batch's values are its rows times ten."""

    def __init__(self, folder, key="k"):
        self.folder, self.key, self.computed, self.begun = folder, key, [], 0

    def measure(self, batches, task="t", stop_before=None, fail_at=None):
        def work(batch):
            if batch == fail_at:
                raise ValueError("killed")
            self.computed.append(batch)
            if stop_before is not None and batches.index(batch) + 1 == stop_before:
                stopper.asked_by = "SIGTERM"
            return [10 * row for row in batch]

        def begin():
            self.begun += 1

        with Stopper(self.folder) as stopper, Measured(self.folder, self.key, stopper, begin) as measured:
            return measured.compute(task, batches, work)


BATCHES = [[3, 1], [0], [2]]
VALUES = {3: 30, 1: 10, 0: 0, 2: 20}


def test_everything_is_computed_once(tmp_path):
    run = Run(tmp_path)
    assert run.measure(BATCHES) == VALUES and run.computed == BATCHES and run.begun == 1
    assert Run(tmp_path).measure([], "other") == {}
    again = Run(tmp_path)
    assert again.measure(BATCHES) == VALUES and again.computed == [] and again.begun == 0


def test_a_stop_keeps_the_batches_before_it(tmp_path, capsys):
    run = Run(tmp_path)
    with pytest.raises(Stopped):
        run.measure(BATCHES, stop_before=2)
    assert run.computed == BATCHES[:2]
    assert json.loads((tmp_path / "stopped.json").read_text())["by"] == "SIGTERM"
    assert (
        "Stopped (SIGTERM); what has been measured is kept. Run the same command to resume." in capsys.readouterr().out
    )
    again = Run(tmp_path)
    assert again.measure(BATCHES) == VALUES and again.computed == BATCHES[2:]


def test_an_error_loses_its_batch_only(tmp_path):
    with pytest.raises(ValueError, match="killed"):
        Run(tmp_path).measure(BATCHES, fail_at=[2])
    again = Run(tmp_path)
    assert again.measure(BATCHES) == VALUES and again.computed == [[2]]


def test_a_model_that_was_written_again_is_measured_again(recipe, tiny_llama, tmp_path, monkeypatch):
    """Under its name, with files of the same names and sizes."""
    keys, folder = [], shutil.copytree(tiny_llama, tmp_path / "model")
    monkeypatch.setattr("rlhf.evaluation.evaluate.prepare", lambda *args: stop())
    monkeypatch.setattr("rlhf.evaluation.evaluate.key_of", lambda *inputs: keys.append(key_of(*inputs)))

    def stop():
        raise Stopped

    file = recipe(
        "evaluate",
        dataset_name="embedded:sample",
        max_eval_examples=2,
        sft_model=str(folder),
        dpo_model=str(folder),
        output_dir=str(tmp_path / "o"),
    )
    for _ in range(2):
        assert main(["evaluate", file]) == EXIT_STOPPED
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-100] ^= 1
        (folder / "model.safetensors").write_bytes(content)
    assert len(keys) == 2 and keys[0] != keys[1]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"task": "t", "rows": [2], "val',
        b"\x00\xff",
        b'{"task": "t", "rows": [2], "values": []}',
        b'{"rows": [2]}',
        b"[1]",
    ],
)
def test_a_line_that_is_cut_or_damaged_is_computed_again(damage, tmp_path):
    """Also what is written after it counts."""
    Run(tmp_path).measure(BATCHES[:2])
    file = tmp_path / ".partial" / "k-0.jsonl"
    file.write_bytes(file.read_bytes() + damage)
    again, third = Run(tmp_path), Run(tmp_path)
    assert again.measure(BATCHES) == VALUES and again.computed == [[2]]
    assert third.measure(BATCHES) == VALUES and third.computed == []


def test_other_tasks_batches_and_evaluations_are_not_taken(tmp_path):
    Run(tmp_path).measure(BATCHES)
    for run, task, batches in (
        (Run(tmp_path), "u", [[2]]),
        (Run(tmp_path), "t", [[2, 0]]),
        (Run(tmp_path, "l"), "t", [[0]]),
    ):
        run.measure(batches, task)
        assert run.computed == batches


def test_ranks_of_an_earlier_start_are_read(tmp_path):
    """With three processes before and one now."""
    Run(tmp_path).measure(BATCHES)
    (tmp_path / ".partial" / "k-0.jsonl").rename(tmp_path / ".partial" / "k-2.jsonl")
    again = Run(tmp_path)
    assert again.measure([*BATCHES, [4]]) == VALUES | {4: 40} and again.computed == [[4]]


def test_the_key_depends_on_all_that_it_is_given():
    assert key_of({"a": 1}, ["x"]) == key_of({"a": 1}, ["x"])
    assert len({key_of({"a": 1}, ["x"]), key_of({"a": 2}, ["x"]), key_of({"a": 1}, ["y"])}) == 3


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluation(recipe_in, tiny_llama, tiny_gpt2, few_pairs, tmp_path_factory):
    """Writes a recipe with two policies and a reward model into a folder: evaluation(folder) -> its path."""
    folder = tmp_path_factory.mktemp("evaluation")
    reward = recipe_in(folder, "reward", model_name_or_path=tiny_llama, dataset_name=few_pairs, max_steps=1,
                       output_dir=str(folder / "reward"))  # fmt: skip
    assert main(["reward", reward]) == 0

    def write(place):
        return recipe_in(place, "evaluate", sft_model=tiny_gpt2, dpo_model=tiny_llama, reward_model=str(folder / "reward"),
                         dataset_name=few_pairs, dataset_test_split="train", max_new_tokens=3, batch_size=5, max_length=512,
                         output_dir=str(place / "out"))  # fmt: skip

    return write


def start(folder, hold_after, *words, num_processes=1, **env):
    env = {"HOLD_AFTER": str(hold_after), "HELD": str(folder / "held"), "WRITES": str(folder / "writes"), **env}
    if num_processes > 1:
        words = forked.launch_command(num_processes, *words, program=(str(WORKER),))
        return forked.start(*words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return forked.start(WORKER, *words, env=env)


def wait_until_held(run, folder):
    while not (folder / "held").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)


def writes(folder):
    return (folder / "writes").read_text().splitlines()


@pytest.fixture(scope="module")
def whole(evaluation, tmp_path_factory):
    """The results of an evaluation that nothing interrupts, and the batches that it computed."""
    folder = tmp_path_factory.mktemp("whole")
    done = forked.finish(start(folder, 1000, "evaluate", evaluation(folder)))
    assert done.returncode == 0, done.stderr
    assert not (folder / "out" / ".partial").exists() and len(writes(folder)) > 10
    return [(folder / "out" / name).read_bytes() for name in RESULTS], writes(folder)


def assert_ends_as(whole, folder, file, num_processes=1):
    """The same command ends with the same bytes, and computes no batch twice."""
    done = forked.finish(start(folder, 1000, "evaluate", file, num_processes=num_processes))
    assert done.returncode == 0, done.stdout
    assert [(folder / "out" / name).read_bytes() for name in RESULTS] == whole[0]
    assert sorted(writes(folder)) == sorted(whole[1])
    assert not (folder / "out" / ".partial").exists() and not (folder / "out" / "stopped.json").exists()
    assert main(["evaluate", file, "--status"]) == 0


@pytest.mark.parametrize("asked", [signal.SIGTERM, "stop", "RLHF_STOP_FILE"], ids=str)
def test_an_evaluation_that_is_asked_to_stop_resumes(asked, evaluation, whole, tmp_path, capsys):
    file, outside = evaluation(tmp_path), tmp_path / "stop file"
    hold_after = {signal.SIGTERM: 1, "stop": 8}.get(asked, len(whole[1]) - 2)  # in pairs, answers, rewards
    env = {"RLHF_STOP_FILE": str(outside)} if asked == "RLHF_STOP_FILE" else {}
    run = start(tmp_path, hold_after, "evaluate", file, **env)
    wait_until_held(run, tmp_path)
    assert main(["evaluate", file, "--status"]) == 4  # it is running
    if isinstance(asked, str):
        (tmp_path / "out" / "stop" if asked == "stop" else outside).touch()
    else:
        os.kill(run.pid, asked)
    done = forked.finish(run)
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert "what has been measured is kept. Run the same command to resume." in done.stdout
    assert len(writes(tmp_path)) == hold_after and not (tmp_path / "out" / "stop").exists()
    assert outside.with_name("stop file.done").exists() == (asked == "RLHF_STOP_FILE")
    capsys.readouterr()
    assert main(["evaluate", file, "--status"]) == EXIT_STOPPED
    told = capsys.readouterr().out
    assert told.startswith("evaluate: stopped (") and "the same command resumes" in told
    assert_ends_as(whole, tmp_path, file)


def test_an_evaluation_that_is_killed_loses_no_batch_that_was_written(evaluation, whole, tmp_path, capsys):
    file = evaluation(tmp_path)
    run = start(tmp_path, 7, "evaluate", file)
    wait_until_held(run, tmp_path)
    run.kill()
    forked.finish(run)
    capsys.readouterr()
    while main(["evaluate", file, "--status"]) == 4:  # the forked process, which dies after its caller
        time.sleep(0.05)
    assert "the same command resumes" in capsys.readouterr().out.splitlines()[-1]
    assert_ends_as(whole, tmp_path, file)


def test_a_second_evaluation_is_refused_while_one_writes(evaluation, whole, tmp_path, capsys):
    file = evaluation(tmp_path)
    run = start(tmp_path, 3, "evaluate", file)
    wait_until_held(run, tmp_path)
    assert main(["evaluate", file]) == 2
    assert "is being written by another run (process " in capsys.readouterr().err
    os.kill(run.pid, signal.SIGTERM)
    assert forked.finish(run).returncode == EXIT_STOPPED
    changed = file.replace("evaluate.yaml", "changed.yaml")
    Path(changed).write_text(Path(file).read_text().replace("max_new_tokens: 3", "max_new_tokens: 4"))
    assert main(["evaluate", changed]) == 2
    assert "holds another run; it differs in max_new_tokens: 3 -> 4" in capsys.readouterr().err


def test_a_prompt_that_does_not_fit_leaves_no_folder(evaluation, tmp_path, capsys):
    file = evaluation(tmp_path)
    assert main(["evaluate", file, "--max_length", "9"]) == 2
    assert "leaves no room for an answer in max_length=9" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_processes_stop_together_and_one_resumes(evaluation, whole, tmp_path):
    """The second is asked; what both have computed counts."""
    file = evaluation(tmp_path)
    run = start(tmp_path, 3, "evaluate", file, num_processes=2, HOLD_RANK="1")
    wait_until_held(run, tmp_path)
    ranks = [p for p in psutil.process_iter(["cmdline"]) if file in (p.info["cmdline"] or ())]
    second = [p for p in ranks if p.environ().get("RANK") == "1"]
    os.kill(second[0].pid, signal.SIGTERM)
    shown = forked.finish(run).stdout
    assert "Stopped (SIGTERM); what has been measured is kept" in shown
    assert len(writes(tmp_path)) == 6
    assert_ends_as(whole, tmp_path, file)
