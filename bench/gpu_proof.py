"""One command that proves this project on a GPU: packed = padded, every launch file, and TRL beside it. Writes one dated report.

    python bench/gpu_proof.py                          on the GPUs of this machine, 8 minutes at most; the same command resumes
    python bench/gpu_proof.py --only attention dpo-8b-hh
    python bench/gpu_proof.py --device cpu --minutes 30   each part as a toy, to see that the script itself works
    python bench/gpu_proof.py --collect wheels         on a machine with a registry: the wheels that a GPU machine may lack
    python bench/gpu_proof.py --wheels wheels          on a machine without one: use them (nothing is installed but in --out)

Each part is a process with a time limit. What it found is kept in --out, so a part that is done is not run again on the same
machine and versions; one that failed or ran out of time is. Timed parts run alone, others beside each other.
Exit code: 0 if all that ran is equal and finished, 1 if not, 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]
SAME = (
    "device",
    "gpus",
    "torch",
)  # of the machine, and the versions below: else an earlier result says nothing of this one
SAME_VERSIONS = ("transformers", "trl", "peft", "accelerate")


def main() -> int:
    args = parse_arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.collect:
        from gpu_proof_wheels import collect

        return collect(Path(args.collect), args.python)
    if args.part:
        from gpu_proof_parts import run_part

        run_part(args.part, Path(args.job))
        return 0
    if args.list:
        from gpu_proof_parts import PARTS

        print("\n".join(f"{name:<26} {part.what}" for name, part in PARTS.items()))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from gpu_proof_device import roomy_folder

    with contextlib.ExitStack() as stack:
        scratch = args.scratch or stack.enter_context(
            tempfile.TemporaryDirectory(dir=roomy_folder(), prefix="gpu-proof-")
        )
        proof = Proof(args, Path(args.out), scratch)
        try:
            proof.run()
        except KeyboardInterrupt:
            print("\nstopped; the same command resumes with the parts that are not done", file=sys.stderr)
        finally:
            proof.end_all()
        return proof.report()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="for all parts together (default 8)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts (--list names them)")
    parser.add_argument("--list", action="store_true", help="list the parts in their order, and exit")
    parser.add_argument(
        "--fresh", action="store_true", help="run parts that are done again; what they found before is moved aside"
    )
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: toy sizes; nothing of it is a measurement"
    )
    parser.add_argument(
        "--jobs", type=int, help="untimed parts beside each other (default: a quarter of the cores, 1 to 6)"
    )
    parser.add_argument(
        "--out", default="runs/gpu-proof", help="what the parts found, and their logs (default runs/gpu-proof)"
    )
    parser.add_argument(
        "--report", help="the report's file; default: bench/results/gpu-DEVICE-DATE.md, on a CPU in --out"
    )
    parser.add_argument("--go-on-from", metavar="FILE", help="results.json of an earlier call on such a machine")
    parser.add_argument("--wheels", metavar="DIR", help="use these wheels for what is not installed")
    parser.add_argument("--collect", metavar="DIR", help="download those wheels (needs a registry), and exit")
    parser.add_argument("--python", default="3.12", help="with --collect: the GPU machine's Python (default 3.12)")
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes:g}: expected more than 0")
    return args


@dataclass
class Running:
    """A part's process."""

    name: str
    process: subprocess.Popen
    ends: float
    out: Path


class Proof:
    """One call: which parts there are to run, their processes, and what they found."""

    def __init__(self, args: argparse.Namespace, folder: Path, scratch: str):
        self.args, self.folder = args, folder
        self.deadline = time.monotonic() + 60 * args.minutes
        self.scratch, self.running, self.waiting = scratch, [], []
        self.about: dict[str, Any] = {}
        self.environment = dict(os.environ)
        if args.fresh and folder.is_dir():
            from gpu_proof_device import free_name

            folder.rename(free_name(folder))
        for name in ("parts", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        paths = [str(ROOT)]
        if self.args.wheels:
            from gpu_proof_wheels import install

            paths.insert(0, str(install(Path(self.args.wheels), self.folder / "site")))
        self.environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
        sys.path[:0] = paths
        programs = [
            str(Path(sys.executable).parent),
            os.environ.get("PATH", ""),
        ]  # ninja, where no environment is activated
        self.environment["PATH"] = os.pathsep.join(filter(None, programs))
        if self.args.device == "cpu":
            self.environment["CUDA_VISIBLE_DEVICES"] = ""
        self.look_at_machine()
        if self.args.go_on_from:
            self.take_over(Path(self.args.go_on_from))
        self.waiting = [name for name in self.chosen() if not self.is_done(name)]
        while self.waiting or self.running:
            self.start_what_may()
            time.sleep(0.05)
            self.collect_what_ended()

    def chosen(self) -> list[str]:
        from gpu_proof_parts import PARTS

        unknown = [name for name in self.args.only or () if name not in PARTS]
        if unknown:
            raise SystemExit(f"gpu_proof.py: there is no part {unknown[0]!r}; --list names them")
        return [name for name in PARTS if not self.args.only or name in self.args.only]

    def look_at_machine(self) -> None:
        """The first process: which GPU, driver and versions."""
        from gpu_proof_parts import ABOUT

        found = self.start(ABOUT, 120)
        found.process.wait()
        if not found.out.is_file():
            why = (
                "torch can't use a GPU here (--device cpu runs toys)"
                if self.args.device == "cuda"
                else "torch can't be used here"
            )
            raise SystemExit(f"gpu_proof.py: {why}, or a package is missing (--wheels)\n{self.tail(ABOUT)}")
        self.about = json.loads(found.out.read_text())["about"]
        print(
            f"{self.about['device']}, {self.about['gpus']} GPUs, torch {self.about['torch']}: {self.about['kernel']}",
            flush=True,
        )

    def take_over(self, file: Path) -> None:
        for name, found in json.loads(file.read_text(encoding="utf-8")).items():
            if not self.result_file(name).is_file():
                self.result_file(name).write_text(json.dumps(found))

    def result_file(self, name: str) -> Path:
        return self.folder / "parts" / f"{name}.json"

    def found(self, name: str) -> dict[str, Any] | None:
        """What a part has found on this machine and these versions."""
        from rlhf.files import read_json

        found = read_json(self.result_file(name))
        if found is None or "about" not in found:
            return None
        there, here = found["about"], self.about
        same = all(there.get(key) == here.get(key) for key in SAME)
        return (
            found if same and all(there["versions"].get(k) == here["versions"].get(k) for k in SAME_VERSIONS) else None
        )

    def is_done(self, name: str) -> bool:
        return (self.found(name) or {}).get("state") in ("done", "not here")

    # --- processes

    def start_what_may(self) -> None:
        """Start the next parts in their order: a timed one once nothing runs, others up to the number of jobs."""
        from gpu_proof_parts import PARTS

        jobs = self.args.jobs or max(1, min(6, (os.cpu_count() or 1) // 4))
        while self.waiting:
            part, left = PARTS[self.waiting[0]], self.deadline - time.monotonic()
            if left < part.least_s:
                self.waiting.pop(0)  # a shorter one may still fit
                continue
            busy = len(self.running) >= (1 if part.alone else jobs) or any(PARTS[r.name].alone for r in self.running)
            if busy:
                return
            self.running.append(self.start(self.waiting.pop(0), min(part.limit_s, left)))

    def start(self, name: str, seconds: float) -> Running:
        from gpu_proof_device import Context
        from gpu_proof_parts import PARTS

        cpu = self.args.device == "cpu"
        context = Context(self.args.device, cpu, self.scratch, self.about.get("gpus", 0))
        job, out = self.folder / "parts" / f"{name}.job", self.result_file(name)
        out.unlink(missing_ok=True)
        job.write_text(json.dumps({"context": asdict(context), "out": str(out.absolute())}))
        environment = dict(self.environment)
        if not cpu and name in PARTS and (name == "launch-single" or not name.startswith("launch-")):
            # one process that sees several GPUs would train on all of them (torch's DataParallel)
            environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        with open(self.folder / "logs" / f"{name}.log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).absolute()), "--part", name, "--job", str(job.absolute())], cwd=ROOT, env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return Running(name, process, time.monotonic() + seconds, out)

    def collect_what_ended(self) -> None:
        for part in list(self.running):
            late = time.monotonic() > part.ends
            if part.process.poll() is None and not late:
                continue
            self.end(part)
            if not part.out.is_file():  # killed, by us or by the system
                if late and time.monotonic() > self.deadline:
                    print(f"cut off   {part.name:<26} the {self.args.minutes:g} minutes are over", flush=True)
                    continue  # no failure of the part: the next call runs it
                self.record_failure(part, late)
            found = json.loads(part.out.read_text())
            if not found["ok"]:
                found["tail"] = self.tail(part.name)
                self.write(part.name, found)
            print(f"{found['state'] if found['ok'] else 'FAILED':<9} {part.name:<26} {found.get('seconds', 0):5.0f} s  {found['summary']}", flush=True)  # fmt: skip

    def record_failure(self, part: Running, late: bool) -> None:
        """Of a process that has left no result: late, or killed (a crash, no memory)."""
        words = "it ran out of time" if late else f"its process ended with exit code {part.process.returncode}"
        state = "timeout" if late else "failed"
        self.write(part.name, {"state": state, "ok": False, "summary": words, "part": part.name, "about": self.about})

    def write(self, name: str, found: dict[str, Any]) -> None:
        from rlhf.files import write_file

        write_file(self.result_file(name), json.dumps(found))

    def tail(self, name: str) -> str:
        log = self.folder / "logs" / f"{name}.log"
        return log.read_text(encoding="utf-8", errors="replace")[-3000:] if log.is_file() else ""

    def end(self, part: Running) -> None:
        """End a part's process and those it has started: they are a session of their own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(part.process.pid, signal.SIGKILL)
        part.process.wait()
        if part in self.running:
            self.running.remove(part)

    def end_all(self) -> None:
        for part in list(self.running):
            self.end(part)

    def report(self) -> int:
        """Write the report and results.json; returns the exit code."""
        if not self.about:
            return 1
        from gpu_proof_parts import PARTS
        from gpu_proof_report import file_name, text

        from rlhf.files import write_file

        found = {name: result for name in PARTS if (result := self.found(name))}
        write_file(self.folder / "results.json", json.dumps(found))
        default = self.folder if self.args.device == "cpu" else ROOT / "bench" / "results"
        file = Path(self.args.report) if self.args.report else default / file_name(self.about)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, text(self.about, found, {name: part.what for name, part in PARTS.items()}))
        missing = [name for name in self.chosen() if name not in found]
        print(
            f"\n{file}" + (f"\nnot run yet, the same command runs them: {' '.join(missing)}" if missing else ""),
            flush=True,
        )
        return 0 if all(result["ok"] for result in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
