"""An error of the main rank while it writes, compares or finishes ends all ranks at once, with one message.

The ranks are started by hand, as nodes are: no launcher kills the others.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from forked import finish, free_port, start

from rlhf.distributed.processes import on_main, report_build_locks
from rlhf.errors import RankFailed, UserError

WORKER = str(Path(__file__).parent / "failing_worker.py")


def may_mount():
    return shutil.which("unshare") is not None and not subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
    ).returncode  # fmt: skip


def start_both(fault, recipe):
    """[(exit code, stdout, stderr)] of ranks 0 and 1."""
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [start(WORKER, fault, "sft", recipe, env=env | {"RANK": r, "LOCAL_RANK": r}) for r in ("0", "1")]
    return [(done.returncode, done.stdout, done.stderr) for done in map(finish, both)]


def messages(text):
    return [line for line in text.splitlines() if line.startswith("rlhf: ")]


class OtherRanks:
    """A process group's store as one of two ranks sees it, of which the other does its part at once."""

    def __init__(self, code):
        self.values = {} if code is None else {"code": str(code)}

    def set(self, key, value):
        self.values["code"] = value

    def get(self, key):
        return self.values["code"]

    def check(self, keys):
        return "code" in self.values

    def add(self, key, amount):
        return 1


@pytest.mark.parametrize(("error", "code"), [(UserError("a mistake"), 2), (OSError(28, "full"), 1), (None, 0)])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_ranks_are_told_before_an_error_is_raised(rank, error, code, monkeypatch):
    """The exchange of two ranks with a stand-in for the store: who isn't told would wait for the main rank."""
    store, done = OtherRanks(None if rank == 0 else code), []

    def work():
        done.append(rank)
        if error:
            raise error

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)
    raised = type(None)
    try:
        on_main(work)
    except Exception as found:
        raised = type(found)
        assert rank == 0 or found.code == code
    assert raised is (type(error) if rank == 0 or error is None else RankFailed)
    assert done == ([0] if rank == 0 else []) and store.values == {"code": str(code)}


def test_no_collective_waits_for_the_main_rank():
    """Work that takes longer than a collective may: as writing 70 B parameters does, with 30 minutes for a collective."""
    code = """
import datetime, os, sys, time, torch
from rlhf.distributed.processes import on_main, report_build_locks
torch.distributed.init_process_group("gloo")
from accelerate import PartialState
PartialState(cpu=True)
torch.distributed.barrier()
torch.distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1))  # only now: both have arrived
on_main(lambda: time.sleep(3))
on_main(lambda: time.sleep(3))
print("both done")
"""
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [start("-c", code, env=env | {"RANK": r, "LOCAL_RANK": r}) for r in ("0", "1")]
    assert [(done.returncode, done.stdout) for done in map(finish, both)] == [(0, "both done\n")] * 2


def test_a_lock_that_a_killed_compilation_left_is_named(tmp_path, monkeypatch, capsys):
    """torch waits for it in silence, for ever."""
    (tmp_path / "py311_cpu" / "deepspeed_shm_comm").mkdir(parents=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    report_build_locks()
    assert capsys.readouterr().out == ""
    (tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock").touch()
    report_build_locks()
    assert capsys.readouterr().out.startswith(
        f"note: {tmp_path}/py311_cpu/deepspeed_shm_comm/lock belongs to a process"
    )


@pytest.fixture
def written(recipe, tiny_llama, few_pairs, tmp_path):
    return recipe("sft", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "disk/sft"), max_steps=1)  # fmt: skip


@pytest.mark.skipif(not may_mount(), reason="may not mount (no root)")
def test_full_disk(written, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    try:
        main, other = start_both("full_disk", written)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert (main[0], other[0]) == (1, 1), main[2][-3000:]
    assert len(messages(main[2])) == 1 and "No space left on device" in messages(main[2])[0], main[2][-3000:]
    assert "fix it and run the same command to resume" in messages(main[2])[0]
    assert messages(other[2]) == [] and "Traceback" not in main[2] + other[2], other[2][-3000:]


def test_logit_mismatch(written):
    main, other = start_both("mismatch", written)
    assert (main[0], other[0]) == (1, 1), main[2][-3000:]
    assert len(messages(main[2])) == 1 and "differs from the trained one: its logits differ by" in messages(main[2])[0]
    assert messages(other[2]) == [] and "Traceback" not in main[2] + other[2], other[2][-3000:]


def test_first_file_of_the_run(written):
    main, other = start_both("provenance", written)
    assert (main[0], other[0]) == (1, 1), main[2][-3000:]
    assert "No space left on device" in messages(main[2])[0] and messages(other[2]) == []
