"""Give the command line what users, editors and disks come up with, and see that it answers in a sentence, or is right.

    python tests/fuzz/fuzz.py --count 3000 --seed 1        (make fuzz N=3000 SEED=1)

Each case runs `rlhf ... --check` (or status, report, pairs) in a forked child, in a folder of its own, with 120 s and 6 GiB.
Right is: it is accepted; or one sentence of at most 600 characters and exit code 2; or argparse's usage. Everything else is
a failure, and is printed with the smallest input that still gives it. Exits with 1 if there was one.
"""

from __future__ import annotations

import argparse
import collections
import gc
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from cases import AREAS, FOLDER, PREFIX, Case, corpus  # noqa: E402
from mutate import drawn  # noqa: E402

# Of the cases, and of `main`: threads do not survive a fork
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
TIME_LIMIT_S = 120  # finds what hangs; most cases take 20 ms
MEMORY_LIMIT = 6 * 2**30  # more than what is mapped already
MAX_SENTENCE = 600
STATUS_CODES = (0, 85, 1, 3, 4)
RIGHT = ("ok", "sentence", "usage")
CLASSES = (*RIGHT, "traceback", "hang", "unreadable", "wrote outside", "killed", "other code")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass
class Outcome:
    """What a case came to: its class, where (for telling failures apart), and what was printed."""

    kind: str
    where: str = ""
    said: str = ""

    @property
    def right(self) -> bool:
        return self.kind in RIGHT


def import_all() -> None:
    """What `--check` needs, so that a forked child starts at once; torch is not among it."""
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401  its list of fonts too: made again for another HOME, it takes seconds
    import pyarrow.parquet  # noqa: F401
    import rich.table  # noqa: F401

    import rlhf.__main__
    import rlhf.data.pairs
    import rlhf.evaluation.evaluate
    import rlhf.evaluation.report
    import rlhf.evaluation.statistics
    import rlhf.runs.status
    import rlhf.training.dpo
    import rlhf.training.reward
    import rlhf.training.run
    import rlhf.training.sft

    gc.freeze()  # or each child's first collection copies all of it
    for stage in ("sft", "reward", "dpo"):
        rlhf.config.recipe.allowed_keys(stage)  # parses the source of three libraries


def write_box(case: Case, box: Path) -> None:
    """Put a case's files on the disk."""
    for name, content in case.files.items():
        path = box / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is FOLDER:
            path.mkdir(exist_ok=True)
        elif isinstance(content, str):
            path.symlink_to(content.removeprefix(PREFIX))
        else:
            path.write_bytes(content)


def tree(box: Path) -> dict[str, object]:
    """What lies in a folder, links not followed: by path the bytes, the link's target, or None for a folder."""
    found: dict[str, object] = {}
    for folder, folders, files in os.walk(box):
        for name in folders + files:
            path = Path(folder) / name
            link = os.readlink(path) if path.is_symlink() else None
            found[str(path.relative_to(box))] = link or (None if path.is_dir() else path.read_bytes())
    return found


def run_case(case: Case, place: Path) -> Outcome:
    """Run a case in a forked child and tell what came of it."""
    shutil.rmtree(place, ignore_errors=True)
    box, out, err = place / "box", place / "stdout", place / "stderr"
    box.mkdir(parents=True)
    write_box(case, box)
    before = tree(box)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(case, box, out, err)
    status = _wait(pid)
    said, complaint = (path.read_bytes().decode("utf-8", "replace") if path.exists() else "" for path in (out, err))
    after = tree(box)
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p, "absent") != after.get(p, "absent"))
    changed = [p for p in changed if p not in case.writes]
    outside = [path.name for path in place.iterdir() if path.name not in ("box", "stdout", "stderr", "home")]
    outcome = classify(case, status, said, complaint)
    if outcome.right and (changed or outside):
        return Outcome("wrote outside", ", ".join(changed[:3] + outside), complaint)
    return outcome


def _child(case: Case, box: Path, out: Path, err: Path) -> None:
    """Never returns."""
    code = 70
    try:
        for descriptor, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        mapped = (
            int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        )  # other tests import torch
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_LIMIT, mapped + MEMORY_LIMIT))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(box)
        home = box.parent / "home"
        home.mkdir()
        os.environ.update(ENVIRONMENT, HOME=str(home), RLHF_CACHE=str(home / "cache"), COLUMNS="200")
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", encoding="utf-8"), open(2, "w", encoding="utf-8")
        sys.argv = ["rlhf", *case.words]
        from rlhf.__main__ import main

        try:
            code = main(case.words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code or 0)


def _wait(pid: int) -> int | None:
    """The child's wait status, or None where it ran past the limit."""
    child = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(child, select.POLLIN)
        if poll.poll(TIME_LIMIT_S * 1000):
            return os.waitpid(pid, 0)[1]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return None
    finally:
        os.close(child)


def classify(case: Case, status: int | None, said: str, complaint: str) -> Outcome:
    """The class of what a child did."""
    if status is None:
        return Outcome("hang", " ".join(case.words)[:60], complaint)
    if os.WIFSIGNALED(status):
        return Outcome("killed", signal.Signals(os.WTERMSIG(status)).name, complaint)
    code = os.WEXITSTATUS(status)
    if "Traceback (most recent call last)" in complaint:
        return Outcome("traceback", traceback_place(complaint), complaint)
    if CONTROL.search(said) or (len(said) > 20_000 and "--keys" not in case.words):  # which has 200 to list
        return Outcome("unreadable", f"stdout of {len(said)} characters", said)
    if code == 0 or ("--status" in case.words and code in STATUS_CODES and said):
        return Outcome("ok", said=said)
    if code != 2:
        return Outcome("other code", f"exit {code}", complaint)
    if complaint.startswith("usage: "):
        right = len(complaint) <= 4000 and not CONTROL.search(complaint)
        return Outcome("usage" if right else "unreadable", "usage", complaint)
    problem = unreadable(complaint)
    return Outcome("unreadable", problem, complaint) if problem else Outcome("sentence", said=complaint)


def unreadable(complaint: str) -> str:
    """Why a complaint isn't one readable sentence; '' if it is one."""
    lines = complaint.splitlines()
    if CONTROL.search(complaint):
        return "control characters"
    if len(lines) != 1:
        return f"{len(lines)} lines on stderr" if len(lines) < 10 else "10 lines or more on stderr"
    if not complaint.startswith("rlhf: "):
        return "no `rlhf:` before it"
    return "" if len(lines[0]) <= MAX_SENTENCE else "more than 600 characters"


def traceback_place(text: str) -> str:
    """`file:line Kind` of the last frame in this package."""
    frames = re.findall(r'File "[^"]*?/(rlhf/[\w/]+\.py)", line (\d+)', text)
    kinds = re.findall(r"^([A-Za-z_][\w.]*)(?::|$)", text, re.MULTILINE)
    return f"{':'.join(frames[-1]) if frames else '?'} {kinds[-1] if kinds else '?'}"


# --- many ------------------------------------------------------------------------------------------------------------


def run_cases(cases: list[Case], place: Path, tell=lambda text: None) -> list[tuple[Case, Outcome]]:
    """Run cases one after the other."""
    found = []
    for number, case in enumerate(cases, 1):
        found.append((case, run_case(case, place / "x")))
        if number % 500 == 0:
            tell(f"{number} of {len(cases)}")
    return found


def shrink(case: Case, outcome: Outcome, place: Path, most: int = 40) -> Case:
    """A smaller case that fails alike: fewer words, then fewer lines, then fewer bytes."""
    left = most if outcome.kind != "hang" else 0

    def fails(smaller: Case) -> bool:
        nonlocal left
        left -= 1
        try:
            found = run_case(smaller, place / "x")
        except OSError:  # files that can't lie beside each other
            return False
        return (found.kind, found.where) == (outcome.kind, outcome.where)

    for name, content in list(case.files.items()):
        for piece in (b"\n", b""):
            parts = content.split(piece) if piece and isinstance(content, bytes) else None
            if not piece and isinstance(content, bytes):
                size = max(1, len(content) // 16)
                parts = [content[i : i + size] for i in range(0, len(content), size)]
            index = 0
            while parts and index < len(parts) and left > 0:
                fewer = parts[:index] + parts[index + 1 :]
                smaller = replace(case, files=case.files | {name: piece.join(fewer)})
                if fails(smaller):
                    case, parts = smaller, fewer
                else:
                    index += 1
            content = case.files[name]
    return case


def reproducer(case: Case) -> str:
    """A case as text: the command, and the files that are not those of the right box."""
    from cases import box

    usual = box("sft") | box("reward") | box("dpo")
    files = [f"{name} = {_short(content)}" for name, content in case.files.items() if usual.get(name) != content]
    gone = [
        f"no {name}"
        for name in box(case.words[0] if case.words[0] in ("sft", "reward") else "dpo")
        if name not in case.files
    ]
    words = " ".join(
        _short(word.encode("utf-8", "surrogatepass"))[1:] if len(word) > 60 else repr(word) for word in case.words
    )
    return "; ".join([f"rlhf {words}", *files, *gone])


def _short(content: object) -> str:
    text = "a folder" if content is FOLDER else repr(content)
    return text if len(text) <= 400 else f"{text[:250]} ... {text[-80:]} ({len(content)} bytes)"


def table(results: list[tuple[Case, Outcome]]) -> str:
    """How many of which class, by area."""
    counts = collections.Counter((case.area, outcome.kind) for case, outcome in results)
    kinds = [kind for kind in CLASSES if any(counts[area, kind] for area in AREAS) or kind in RIGHT]
    lines = [f"{'':14}" + "".join(f"{kind:>15}" for kind in kinds)]
    for area in AREAS:
        lines.append(f"{area:14}" + "".join(f"{counts[area, kind] or '':>15}" for kind in kinds))
    total = "".join(f"{sum(counts[area, kind] for area in AREAS):>15}" for kind in kinds)
    return "\n".join([*lines, f"{'all':14}{total}"])


def failures(results: list[tuple[Case, Outcome]], place: Path, small: bool = True) -> Iterator[str]:
    """A text about each kind of failure: how often, where, and the smallest case of the first."""
    groups: dict[tuple[str, str, str], list] = {}
    for case, outcome in results:
        if not outcome.right:
            groups.setdefault((case.area, outcome.kind, outcome.where), []).append((case, outcome))
    for (area, kind, where), members in groups.items():
        case, outcome = min(members, key=lambda member: _size(member[0]))
        last = (outcome.said.strip().splitlines() or [""])[-1][:160]
        shown = reproducer(shrink(case, outcome, place) if small else case)
        yield f"{area}: {kind} x{len(members)} at {where}\n    {last!r}\n    [{case.name[:80]!r}] {shown}"


def _size(case: Case) -> int:
    return sum(len(c) for c in (*case.files.values(), *case.words) if isinstance(c, (bytes, str)))


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--count", type=int, default=3000, help="inputs, those of the corpus among them")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--area", action="append", choices=AREAS)
    given = options.parse_args()
    areas = tuple(given.area or AREAS)
    started = time.time()
    os.environ.update(ENVIRONMENT)  # before the libraries are imported
    import_all()
    known = [case for case in corpus() if case.area in areas]
    cases = [*known, *drawn(max(0, given.count - len(known)), given.seed, areas)]
    with tempfile.TemporaryDirectory(prefix="f") as place:
        results = run_cases(cases, Path(place), lambda text: print(text, flush=True))
        print(
            f"{len(results)} inputs (seed {given.seed}) in {time.time() - started:.0f} s\n{table(results)}", flush=True
        )
        wrong = 0
        for text in failures(results, Path(place)):
            print(text, flush=True)
            wrong += 1
    print(f"{wrong} kinds of failure")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
