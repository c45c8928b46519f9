"""Stopping when asked to: which requests are heard, that processes agree, that the run says how to go on."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import psutil
import pytest
import torch
from safetensors.torch import load_file

from rlhf.__main__ import main
from rlhf.runs.metrics import read_metrics
from rlhf.runs.stop import EXIT_STOPPED, Stopper

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_are_heard_and_then_left_alone(number, tmp_path, capfd):
    before = signal.getsignal(number)
    with Stopper(tmp_path) as stopper:
        assert stopper.agree() == ""
        os.kill(os.getpid(), number)
        assert (stopper.asked_by, stopper.agreed) == (number.name, "")  # one process knows, all have yet to agree
        assert stopper.agree() == stopper.agreed == number.name
    assert signal.getsignal(number) == before
    assert f"{number.name}: stopping after this step" in capfd.readouterr().err


def test_the_stop_file(tmp_path):
    with Stopper(tmp_path) as stopper:
        (tmp_path / "stop").touch()
        assert stopper.agree() == f"the file {tmp_path}/stop"


def test_a_second_interrupt_stops_at_once(tmp_path, monkeypatch):
    """But not the one that a launcher hands on right after the terminal's."""
    monkeypatch.setattr("rlhf.runs.stop.SAME_INTERRUPT_S", 1000.0)  # longer than any machine takes for two lines
    with Stopper(tmp_path) as stopper:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stopper.agree() == "SIGINT"
        stopper._asked_at -= 1000.1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_a_request_is_heard_by_another_rank_without_a_collective(tmp_path, monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    asked, other = Stopper(tmp_path / "a"), Stopper(tmp_path / "b")
    assert not asked.heard() and not other.heard()
    asked.asked_by = "SIGTERM"
    assert not other.heard()  # until the rank that was asked comes by
    assert asked.heard() and other.heard()


def test_what_is_not_finite_is_no_request(tmp_path):
    with Stopper(tmp_path) as stopper:
        assert (stopper.agree("loss"), stopper.agreed) == ("loss", "")


@pytest.mark.parametrize("asked", [0, 1])
def test_a_request_to_one_process_is_one_to_all(asked, tmp_path):
    file = tmp_path / "worker.py"
    file.write_text(
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from rlhf.runs.stop import Stopper\n"
        "rank = int(os.environ['RANK'])\n"
        "torch.distributed.init_process_group('gloo', f'file://{sys.argv[1]}', rank=rank, world_size=2)\n"
        "stopper = Stopper(Path(sys.argv[1]).parent)\n"
        "print(repr(stopper.agree()), end=' ')\n"
        "stopper.asked_by = 'SIGTERM' if rank == int(sys.argv[2]) else ''\n"
        "print(stopper.agree(), stopper.agreed)\n"
    )
    started = [
        subprocess.Popen([sys.executable, str(file), str(tmp_path / "store"), str(asked)], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                         env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in (0, 1)
    ]  # fmt: skip
    assert [each.communicate(timeout=600)[0] for each in started] == ["'' SIGTERM SIGTERM\n"] * 2


LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "merge_adapter": False, "lora_dropout": 0.1}


def stop_when(monkeypatch, event, step, ask):
    """Let `ask()` be called when the trainer comes to `event` of a step."""
    from transformers import TrainerCallback

    from rlhf.training import run

    add_callbacks = run.add_callbacks

    class Ask(TrainerCallback):
        pass

    def at(self, args, state, control, **kwargs):
        if state.global_step == step:
            ask()

    setattr(Ask, event, at)
    monkeypatch.setattr(run, "add_callbacks", lambda t, *a: (add_callbacks(t, *a), t.add_callback(Ask()))[0])


@pytest.mark.parametrize("event", ["on_step_begin", "on_prediction_step"])
def test_stopped_and_gone_on(event, recipe, tiny_llama, few_pairs, tmp_path, monkeypatch, capsys):
    """Exit code 85 with a checkpoint of that step; the same command ends with the same weights and the same metrics. A stop
    while evaluating leaves the evaluation to the next start."""
    values = dict(model_name_or_path=tiny_llama, dataset_name=few_pairs, max_steps=6, save_strategy="steps", save_steps=5,
                  eval_dataset_name="embedded:sample", dataset_test_split="heldout", max_eval_examples=7,
                  eval_strategy="steps", eval_steps=3, global_batch_size=5, max_tokens_per_device=800)  # fmt: skip

    def written(name):
        file = Path(recipe("dpo", name=name, output_dir=str(tmp_path / name), **values, **LORA))
        file.write_text("".join(x for x in file.read_text().splitlines(True) if "per_device_train" not in x))
        return str(file)

    assert main(["dpo", written("whole")]) == 0
    with monkeypatch.context() as patched:
        stop_when(patched, event, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(["dpo", written("stopped")]) == EXIT_STOPPED
    step = 3 if event == "on_prediction_step" else 4
    shown = capsys.readouterr().out
    assert f"Stopped after step {step} of 6 (SIGTERM); saved as {tmp_path}/stopped/checkpoint-{step}" in shown
    assert "Run the same command to resume." in shown
    note = json.loads((tmp_path / "stopped" / "stopped.json").read_text())
    assert (note["step"], note["of"], note["by"]) == (step, 6, "SIGTERM")
    assert not (tmp_path / "stopped" / "complete.json").exists()
    assert main(["dpo", str(tmp_path / "stopped.yaml")]) == 0
    assert f"resuming from {tmp_path}/stopped/checkpoint-{step}" in capsys.readouterr().out
    assert not (tmp_path / "stopped" / "stopped.json").exists()
    rows = [
        [{k: row.get(k) for k in ("step", "loss", "eval_loss", "grad_norm")} for row in read_metrics(tmp_path / name)]
        for name in ("whole", "stopped")
    ]
    assert rows[0] == [row for row in rows[1] if row in rows[0]] and len(rows[0]) == len(rows[1])
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("by", ["SIGUSR1", "the file stop"])
def test_stopped_while_the_reference_is_computed(by, recipe, tiny_llama, few_pairs, tmp_path, monkeypatch, capsys):
    """What is done by then is in the cache. The folder says that the run was stopped, and the next start is not."""
    from rlhf.training import reference

    monkeypatch.setattr(reference, "MAX_TOKENS", 600)
    forward = reference.forward_logps
    ask = (tmp_path / "o" / "stop").touch if "file" in by else lambda: os.kill(os.getpid(), signal.SIGUSR1)
    monkeypatch.setattr(reference, "forward_logps", lambda *a: (ask(), forward(*a))[1])
    file = recipe("dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "o"), **LORA)
    assert main(["dpo", file]) == EXIT_STOPPED == main(["dpo", file, "--status"])
    assert json.loads((tmp_path / "o" / "stopped.json").read_text())["step"] == 0
    assert not (tmp_path / "o" / "stop").exists()
    done = int(re.search(r"Stopped: (\d+) of 12 pairs of the reference are in the cache", capsys.readouterr().out)[1])
    monkeypatch.setattr(reference, "forward_logps", forward)
    assert 0 < done < 12 and main(["dpo", file]) == 0
    assert f"reference 12 pairs, {done} of them in the cache" in capsys.readouterr().out


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_loss_that_is_not_finite_ends_the_run(pieces, recipe, tiny_llama, few_pairs, tmp_path, monkeypatch, capsys):
    """Also where only the first of the step's micro-batches had it."""
    from trl import DPOTrainer

    loss, steps = DPOTrainer._compute_loss, []

    def broken(self, model, inputs, return_outputs):
        found = loss(self, model, inputs, return_outputs)
        first = model.training and self.state.global_step == 2 and 2 not in steps
        if model.training:
            steps.append(self.state.global_step)
        return found * float("nan") if first else found

    monkeypatch.setattr(DPOTrainer, "_compute_loss", broken)
    file = Path(recipe("dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "o"), max_steps=5,
                       save_strategy="steps", save_steps=2, global_batch_size=4,
                       max_tokens_per_device=100_000 if pieces == 1 else 500, **LORA))  # fmt: skip
    file.write_text("".join(x for x in file.read_text().splitlines(True) if "per_device_train" not in x))
    assert main(["dpo", str(file)]) == 2
    assert (steps.count(2) == 1) == (pieces == 1)
    error = capsys.readouterr().err
    assert (
        "the loss of step 3 is not a finite number" in error
        and f"the last checkpoint before it is {tmp_path}/o/checkpoint-2" in error
    )
    assert not (tmp_path / "o" / "complete.json").exists() and not (tmp_path / "o" / "checkpoint-4").exists()


def test_a_gradient_that_is_far_off_ends_the_run(recipe, tiny_llama, few_pairs, tmp_path, monkeypatch, capsys):
    """Nothing for 20 steps, for want of a history; then the one of 5,000 times the median, and with 0 never."""
    from trl import DPOTrainer

    norm = DPOTrainer._get_grad_norm

    def spiked(self, model, grad_norm=None):
        found = norm(self, model, grad_norm=grad_norm)
        return found * 5000 if self.state.global_step in (10, 21) else found

    monkeypatch.setattr(DPOTrainer, "_get_grad_norm", spiked)
    values = dict(
        model_name_or_path=tiny_llama,
        dataset_name=few_pairs,
        max_steps=23,
        save_strategy="steps",
        save_steps=20,
        learning_rate=1e-5,
    )
    file = recipe("dpo", output_dir=str(tmp_path / "o"), **values, **LORA)
    assert main(["dpo", file]) == 2
    error = capsys.readouterr().err
    assert re.search(r"the gradient norm of step 22 is \S+, more than max_gradient_spike=1000 times the median of the 21 steps before it, ", error)  # fmt: skip
    assert f"the last checkpoint before it is {tmp_path}/o/checkpoint-20" in error
    assert main(["dpo", file, "--max_gradient_spike", "0"]) == 0


@pytest.mark.parametrize("method", ["__init__", "compute_loss"])
def test_out_of_memory_is_one_sentence_of_that_process(
    method, recipe, tiny_llama, few_pairs, tmp_path, monkeypatch, capsys
):
    """In a step, and already while the trainer moves its model to the GPU."""
    from trl import RewardTrainer

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(RewardTrainer, method, full)
    file = recipe(
        "reward", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "o"), **LORA
    )
    assert main(["reward", file]) == 1
    error = capsys.readouterr().err
    assert "rlhf: rank 0 is out of GPU memory (CUDA out of memory. Tried to allocate 20.00 GiB.). Lower max_tokens_per_device (it is 4096)" in error  # fmt: skip


def test_a_second_run_is_refused_while_one_writes(recipe, tiny_llama, few_pairs, tmp_path, monkeypatch, capsys):
    file = recipe("dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "o"), **LORA)
    found = []

    def second():
        done = forked.run("-m", "rlhf", "dpo", file)
        found.append((done.returncode, done.stderr))

    with monkeypatch.context() as patched:
        stop_when(patched, "on_step_begin", 1, second)
        assert main(["dpo", file]) == 0
    assert found[0][0] == 2 and "is being written by another run (process " in found[0][1]


def test_fresh_begins_in_a_new_folder(recipe, tiny_llama, few_pairs, tmp_path, capsys):
    out = tmp_path / "o"
    file = recipe(
        "dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(out), max_steps=1, **LORA
    )
    assert main(["dpo", file]) == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert main(["dpo", file, "--beta", "0.5"]) == 2
    assert (
        "it differs in beta: 0.1 (default) -> 0.5. Give --output_dir another folder, or --fresh"
        in capsys.readouterr().err
    )
    assert main(["dpo", file, "--beta", "0.5", "--fresh", "--check"]) == 0
    shown = capsys.readouterr().out
    assert f"--fresh: the run would go to {out}-2\n" in shown and not Path(f"{out}-2").exists()
    assert main(["dpo", file, "--beta", "0.5", "--fresh"]) == 0
    assert (tmp_path / "o-2" / "complete.json").is_file()
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}


def test_the_watchdog_ends_a_process_that_hangs_and_shows_where():
    code = "import time; from rlhf.runs.stop import watch; watch(600); watch(0.5)\ndef hang(): time.sleep(600)\nhang()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1  # and not the 0 of its own end after ten minutes
    assert "Timeout" in done.stderr and "in hang" in done.stderr


def test_the_watchdog_can_be_called_off():
    code = "import time; from rlhf.runs.stop import watch; watch(3); watch(None); time.sleep(3.5); print('alive')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "alive\n"


@pytest.mark.parametrize(("to", "number"), [("second process", signal.SIGUSR1), ("launcher", signal.SIGTERM)])
def test_two_processes_stop_at_the_same_step(to, number, hold, recipe, tiny_llama, few_pairs, tmp_path):
    """The launcher tells a failure where a process ends with 85, and that it got a signal where it did."""
    out = tmp_path / "o"
    file = recipe(
        "dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(out), max_steps=12, **LORA
    )
    hold(3)
    run = forked.start(
        *forked.launch_command(2, "dpo", file), stderr=subprocess.STDOUT, env={"PYTHONPATH": hold.pythonpath}
    )
    shown = []
    reader = threading.Thread(target=lambda: shown.append(run.stdout.read()))
    reader.start()
    try:
        end = time.monotonic() + 600
        while len(read_metrics(out)) < 3 and time.monotonic() < end and run.poll() is None:
            time.sleep(0.1)
        same = [p for p in psutil.process_iter(["cmdline"]) if file in (p.info["cmdline"] or ())]
        second = [p for p in same if p.environ().get("RANK") == "1"]
        assert len(second) == 1, shown
        os.kill(run.pid if to == "launcher" else second[0].pid, number)
        assert run.wait(timeout=600) != 0
    finally:
        run.terminate()  # and not kill: it ends its ranks
        reader.join(timeout=300)
    steps = json.loads((out / "stopped.json").read_text())["step"]
    assert f"Stopped after step {steps} of 12 ({number.name})" in shown[0]
    assert ("exitcode  : 85" if to == "second process" else "got signal: 15") in shown[0]
    assert (out / f"checkpoint-{steps}" / "manifest.json").is_file()


@pytest.mark.parametrize("processes", [1, 2])
def test_one_of_several_processes_leaves_without_a_tear_down(processes, tmp_path):
    """An abort in the tear-down, as of gloo's threads, is not come by; what Python's libraries registered is called."""
    file = tmp_path / "worker.py"
    file.write_text(
        "import atexit, ctypes, os, sys, torch\n"
        "from rlhf.runs.stop import leave\n"
        "rank, processes = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])\n"
        "if processes > 1:\n"
        "    torch.distributed.init_process_group('gloo', f'file://{sys.argv[1]}', rank=rank, world_size=processes)\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)\n"
        "atexit.register(print, 'registered')\n"
        "print('last words', end=' ')\n"
        "leave(85)\n"
    )
    started = [
        subprocess.Popen([sys.executable, str(file), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(processes)})
        for rank in range(processes)
    ]  # fmt: skip
    ends = [(each.communicate(timeout=600)[0], each.returncode) for each in started]
    assert ends == [("last words registered\n", 85 if processes > 1 else -signal.SIGABRT)] * processes
