"""Plant a defect in a copy of the project, run the tests that should find it, and take the next: a table of who found what.

    python tests/planted/planted.py                     all defects, each against the tests that defects.py names
    python tests/planted/planted.py --only NAME         one of them (may be repeated)
    python tests/planted/planted.py --only NAME --all-tests   against the whole suite but what is slow
    python tests/planted/planted.py --list

The exit code is 1 if a defect is not found, if its text is not in its file exactly once (code has moved: bring defects.py
up to date), or if the named tests fail without a defect. The working tree is never written to.

Each defect has a process of its own, forked from one that has imported torch, transformers and TRL, but nothing of this
project: that saves the nine seconds which these imports take.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from defects import DEFECTS, Defect

ROOT = Path(__file__).parent.parent.parent
LIMIT_S = 300  # for the tests of one defect: one that hangs is not found
SUITE = ["-m", "not slow", "--ignore", "tests/planted", "tests"]
# Imported once for all; what is not installed is passed over.
HEAVY = """
torch transformers accelerate datasets peft trl.trainer.sft_trainer trl.trainer.dpo_trainer trl.trainer.reward_trainer
trl.kernels.chunked_logprob transformers.models.llama.modeling_llama transformers.models.gpt2.modeling_gpt2 tokenizers
safetensors.torch hypothesis jinja2 matplotlib.figure rich yaml pyarrow pandas deepspeed tensorboard pytest
""".split()


@dataclass
class Found:
    """What the tests said.

    Attributes:
        failed: ids of the tests that failed.
        passed: how many passed.
        trouble: why there is no answer: a file of tests that can't be collected, a process that died or hung.
        output: pytest's.
    """

    failed: list[str] = field(default_factory=list)
    passed: int = 0
    trouble: str = ""
    output: str = ""


class Listener:
    """A plugin for pytest that writes down what fails."""

    def __init__(self):
        self.failed, self.uncollected, self.passed = [], [], 0

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed += 1

    def pytest_collectreport(self, report):
        if report.failed:
            self.uncollected.append(report.nodeid)


def occurrences(defect: Defect, root: Path = ROOT) -> int:
    """How often a defect's text is in its file; 0 where there is no such file."""
    file = root / defect.file
    return file.read_text(encoding="utf-8").count(defect.old) if file.is_file() else 0


@contextlib.contextmanager
def planted(defect: Defect, root: Path):
    """The defect is in the copy at `root`, and is taken out again."""
    file = root / defect.file
    text = file.read_text(encoding="utf-8")
    try:
        write_source(file, text.replace(defect.old, defect.new))
        yield
    finally:
        write_source(file, text)


def write_source(file: Path, text: str) -> None:
    """Write source text, and remove its bytecode: Python takes it for current where size and second are the same."""
    file.write_text(text, encoding="utf-8")
    if file.suffix == ".py":
        Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)


def copy_project(place: Path) -> Path:
    """A copy of what the tests read; nothing of it is a link to the working tree."""

    def skipped(folder: str, names: list[str]) -> set[str]:
        at_the_top = {"runs", "models", "data"} if Path(folder) == ROOT else set()  # what a user's runs leave there
        return {n for n in names if n.startswith(".") or n == "__pycache__" or n.endswith(".egg-info")} | at_the_top

    copy = place / "project"
    shutil.copytree(ROOT, copy, ignore=skipped)
    return copy


def warm_up() -> None:
    """Import what is heavy, and nothing of ours."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["OMP_NUM_THREADS"] = "1"  # threads would not be there after a fork
    for name in HEAVY:
        with contextlib.suppress(ImportError), contextlib.ExitStack() as quiet:  # DeepSpeed and bitsandbytes miss a GPU
            for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
                quiet.enter_context(redirect(io.StringIO()))
            importlib.import_module(name)
    ours = sorted(name for name in sys.modules if name.partition(".")[0] == "rlhf")
    assert not ours, f"already imported: {ours[:3]}"


def run_tests(copy: Path, selected: list[str], first: bool, limit_s: float = LIMIT_S) -> Found:
    """Run tests of the copy in a process of their own, up to the first failure or all of them."""
    report, output = copy.parent / "report.json", copy.parent / "output.txt"
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        code = 1
        try:
            _in_the_child(copy, ["-x", *selected] if first else selected, report, output)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    trouble = "" if _wait(child, limit_s) else "no answer in time"
    if not report.is_file():
        return Found(trouble=trouble or "the process died", output=_read(output))
    return Found(**json.loads(report.read_text()), output=_read(output))


def _in_the_child(copy: Path, words: list[str], report: Path, output: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(copy)
    others = (p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests" / "planted"))
    sys.path[:] = [str(copy), *others]
    os.environ["PYTHONPATH"] = str(copy)
    import pytest

    listener = Listener()
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--no-header", "--rootdir", str(copy), "--tb=short"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning", "--basetemp", str(copy.parent / "tests")]
    code = pytest.main([*options, *words], plugins=[listener])
    import rlhf

    assert Path(rlhf.__file__).is_relative_to(copy), f"the tests ran on {rlhf.__file__}"
    trouble = ""
    if listener.uncollected or code not in (0, 1):
        where = ", ".join(listener.uncollected) or f"pytest ended with {int(code)}"
        trouble = f"could not be collected or run: {where}"
    report.write_text(json.dumps({"failed": listener.failed, "passed": listener.passed, "trouble": trouble}))


def _wait(child: int, seconds: float) -> bool:
    """Whether the child ended by itself; if not, it and all that it has started are killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _read(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""


def commit() -> str:
    """The commit that is looked at, `+changes` where the working tree differs from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+changes", "--exclude", "*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def run(defects: list[Defect], everything: bool = False, tell=print) -> list[str]:
    """Plant them one after the other and tell the table; returns what is wrong, a line each."""
    if wrong := [f"{d.name}: its text is {n} times in {d.file}" for d in defects if (n := occurrences(d)) != 1]:
        return wrong
    started = time.monotonic()
    warm_up()
    names, whats = (max(len(getattr(d, key)) for d in defects) for key in ("name", "what"))
    with tempfile.TemporaryDirectory(prefix="planted-") as place:
        copy = copy_project(Path(place))
        selected = list(dict.fromkeys(test for defect in defects for test in defect.tests))
        selected = SUITE if everything else selected
        limit_s = LIMIT_S * (20 if everything else 1)
        sound = run_tests(copy, selected, first=False, limit_s=4 * limit_s)
        if sound.trouble or (sound.failed and not everything):
            return [f"without a defect: {sound.trouble or sound.failed}\n{sound.output[-3000:]}"]
        tell(f"{len(defects)} defects planted in {commit()}; without one {sound.passed} tests pass\n")
        tell(f"{'defect':<{names}}  {'what it does':<{whats}}  CPU s  found by")
        for defect in defects:
            before = cpu_seconds()
            with planted(defect, copy):
                found = run_tests(copy, SUITE if everything else list(defect.tests), not everything, limit_s)
            failed = [test for test in found.failed if test not in sound.failed]
            if found.trouble or not failed:
                wrong.append(f"{defect.name}: not caught ({found.trouble or f'{found.passed} tests pass'})")
            found_by = "NOT CAUGHT" + f": {found.trouble}" * bool(found.trouble)
            if failed and not found.trouble:
                found_by = f"\n{'':{names + whats + 11}}".join(failed)
            tell(f"{defect.name:<{names}}  {defect.what:<{whats}}  {cpu_seconds() - before:5.1f}  {found_by}")
    counts = f"{len(defects) - len(wrong)} of {len(defects)} caught"
    tell(f"\n{counts}; {cpu_seconds():.0f} s of CPU time, {time.monotonic() - started:.0f} s")
    return wrong


def cpu_seconds() -> float:
    """Of this process and of those that have ended."""
    return sum(os.times()[:4])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plant defects in a copy of the project; do the tests find them?")
    parser.add_argument("--only", action="append", metavar="NAME", help="this defect (may be repeated)")
    parser.add_argument("--all-tests", action="store_true", help="run the default suite on each, not the named tests")
    parser.add_argument("--list", action="store_true", help="list the defects and their tests")
    options = parser.parse_args(words)
    known = {defect.name: defect for defect in DEFECTS}
    if unknown := [name for name in options.only or () if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; --list lists the names")
    defects = [known[name] for name in options.only or known]
    if options.list:
        for defect in defects:
            print(f"{defect.name:<34} {defect.file:<28} {defect.what}\n{'':34} {' '.join(defect.tests)}")
        return 0
    wrong = run(defects, options.all_tests, lambda text: print(text, flush=True))
    for text in wrong:
        print(text, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
