"""Small files read as large ones are: row by row, in ranges, through a cache of their own."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf.data import prepare as preparing
from rlhf.data import sources
from rlhf.data.convert import convert_range
from rlhf.data.prepare import prepare
from rlhf.data.sources import load_source
from rlhf.errors import UserError


@contextlib.contextmanager
def processes_that_stop():
    """Gives a function that starts Python with these words and returns when the process has printed `half`: it then waits for a
    line on its stdin. All are killed in the end."""
    started = []

    def start(*words, **environment):
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "half\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


class Here:
    """Stands in for `subprocess.Popen` where prepare.py converts a range: the same job and report, without a process."""

    def __init__(self, command, **_):
        assert command[-2:] == ["-m", "rlhf.data.convert"]
        self.stdin, self.stdout, self.stderr, self.returncode = self, iter(()), io.StringIO(), 0

    def write(self, text):
        self.job = json.loads(text)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        Path(self.job["report"]).write_text(json.dumps(asdict(convert_range(self.job))))

    def poll(self):
        return 0

    wait = poll


@contextlib.contextmanager
def as_large(cache=None, range_bytes=None, processes=False):
    """No file is small; JSON Lines files are converted in ranges of `range_bytes` (None: whole).

    Args:
        cache: RLHF_CACHE; None: a new folder.
        processes: ranges are converted by processes, as in a run.
    """
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("RLHF_CACHE", str(cache or folder))
        for module in (sources, preparing):
            patch.setattr(module, "SMALL_BYTES", 0)
        patch.setattr(preparing, "RANGE_BYTES", range_bytes or 1 << 40)
        patch.setattr(preparing, "POLL_S", 0.01)
        if not processes:
            patch.setattr(preparing, "subprocess", SimpleNamespace(Popen=Here, PIPE=-1))
        yield Path(os.environ["RLHF_CACHE"])


def described(prepared, digest=""):
    """All of what was prepared that a later step sees."""
    rows = prepared.rows
    names = ("chars", "flags", "opening", "own", "flipped")
    return {
        "rows": list(rows), "places": [rows.place(i) for i in range(len(rows))], "skipped": prepared.skipped,
        "unused": prepared.num_unused, "stripped": prepared.stripped, "digest": digest,
        "features": {name: rows.column(name).tolist() for name in names}, "prompts": [x.tolist() for x in rows.prompts()],
    }  # fmt: skip


def outcome(path, kind="pairs", bad_rows="error", split=None):
    """What a file gives: `described`, or the error's text."""
    try:
        source = load_source(str(path), split)
        return described(prepare(source, kind, bad_rows=bad_rows, can_skip=True), source.digest)
    except UserError as error:
        return str(error)
