"""`rlhf preflight` in a process whose rank 1 has the trouble that TROUBLE names: what clusters do, done to one process."""

import ctypes
import os
import platform
import subprocess
import sys
import time
from importlib import metadata

RANK, TROUBLE = int(os.environ.get("RANK", 0)), os.environ.get("TROUBLE", "")


def other_version():
    honest = metadata.version
    metadata.version = lambda name: "5.0.1" if name == "transformers" else honest(name)


def never_comes():
    time.sleep(600)


def other_clock():
    honest = time.time
    time.time = lambda: honest() - 120


def other_disk(folder=None, options="rw", full=""):
    """A file system of its own over a folder, which no other process sees; empty, or with 4 KiB in a file `full`."""
    folder = folder or os.environ["FOLDER"]
    assert ctypes.CDLL(None, use_errno=True).unshare(0x00020000) == 0  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    if full:
        with open(f"{folder}/{full}", "wb") as file:
            file.write(bytes(4096))


def enter(pid):
    """Become a process of the host that `pid` runs on: its network, its name, its /etc/hosts and /sys."""
    for kind in ("net", "uts", "mnt"):
        space = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
        assert ctypes.CDLL(None, use_errno=True).setns(space, 0) == 0
        os.close(space)
    platform._uname_cache = None  # the host's name, as the server knew it


def hangs_in_all_reduce():
    import torch.distributed as dist

    dist.all_reduce = lambda *args, **kwargs: time.sleep(600)


def wrong_sum():
    import torch.distributed as dist

    honest = dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        honest(tensor, *args, **kwargs)
        tensor[7] += 1

    dist.all_reduce = all_reduce


if __name__ == "__main__":
    if RANK == 1 and TROUBLE:
        globals()[TROUBLE]()
    from rlhf.__main__ import main

    sys.exit(main(["preflight", *sys.argv[1:]]))
