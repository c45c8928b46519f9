"""An error of the main rank while it writes, compares or finishes ends all ranks at once, with one message.

The ranks are started by hand, as nodes are: no launcher kills the others.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from forked import finish, free_port, start

from rlhf.distributed.processes import on_main
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


@pytest.mark.parametrize(("error", "code"), [(UserError("a mistake"), 2), (OSError(28, "full"), 1), (None, 0)])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_ranks_are_told_before_an_error_is_raised(rank, error, code, monkeypatch):
    """The exchange of two ranks with a stand-in for the broadcast: who isn't told would wait for the main rank."""
    sent, done = [], []

    def work():
        done.append(rank)
        if error:
            raise error

    def broadcast(objects):
        sent.extend(objects)
        return objects if rank == 0 else [code]

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", broadcast)
    raised = type(None)
    try:
        on_main(work)
    except Exception as found:
        raised = type(found)
        assert rank == 0 or found.code == code
    assert raised is (type(error) if rank == 0 or error is None else RankFailed)
    assert done == ([0] if rank == 0 else []) and sent == [code if rank == 0 else 0]


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
