"""For tests/forked.py: a process without any route, not even to itself."""

import ctypes
import errno
import os
import socket

CLONE_NEWNET = 0x40000000


def enter() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with socket.socket() as tried:
        assert tried.connect_ex(("192.0.2.1", 443)) == errno.ENETUNREACH
