"""Do to a run what clusters do to runs, and see that the same command finishes it as if nothing had been.

    python tests/faults/faults.py --count 200 --seed 7        (make faults N=200)

Each fault hits a real training run (DPO by LoRA with dropout, a tiny model; one process, or two under DDP, ZeRO-2 or FSDP2)
at a random moment. Then the same command is given until the run is complete. Its final weights must be those of an uninterrupted run to the last bit,
and so must every step's loss in metrics.jsonl. Prints a table, and exits with 1 if one was not.

Processes are forked from one that has imported everything, so that a run takes a second or two and not ten.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from forked import import_all  # noqa: E402

# Of the runs, and of `main`: threads do not survive a fork
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
LAUNCH = ("", "ddp.yaml", "zero2.yaml", "fsdp2.yaml")  # '': one process
STEPS, SAVE_EVERY = 12, 3
ATTEMPTS = 4  # a run must be complete after so many more starts
TIME_LIMIT_S = 240.0


class Job:
    """A training run of one or two processes.

    Attributes:
        recipe: the recipe's path.
        folder: where it writes.
        launch: the launch file that it runs under; '' for one process.
        log: what its processes print.
    """

    def __init__(self, recipe: Path, folder: Path, launch: str):
        self.recipe, self.folder, self.launch, self.pids = recipe, folder, launch, []
        self.processes = 2 if launch else 1
        self.log = folder.parent / f"{folder.name}.log"
        self.words = ["dpo", str(recipe), "--output_dir", str(folder)]

    def start(self, before=lambda: None) -> None:
        """Fork the processes; `before` is called in each of them first."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids = []
        for rank in range(self.processes):
            pid = os.fork()
            if pid == 0:
                _run(self.words, rank, self.processes, port, self.log, before, self.launch)
            self.pids.append(pid)

    def wait(self) -> list[int]:
        """Exit codes (negative: the signal that ended it); whatever lives after the time limit is a hang."""
        codes, failed, end = {}, 0.0, time.monotonic() + TIME_LIMIT_S
        while len(codes) < len(self.pids) and time.monotonic() < end:
            for pid in self.pids:
                if pid not in codes and os.waitpid(pid, os.WNOHANG)[0]:
                    codes[pid] = 0
            if codes and len(codes) < len(self.pids):  # a launcher ends the others when one fails
                time.sleep(0.5)
                failed = failed or time.monotonic()
                for pid in set(self.pids) - set(codes):
                    _kill(pid, signal.SIGTERM if time.monotonic() < failed + 10 else signal.SIGKILL)
            time.sleep(0.02)
        hung = set(self.pids) - set(codes)
        for pid in hung:
            _kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if hung:
            raise AssertionError(f"{len(hung)} processes hung for {TIME_LIMIT_S:.0f} s")
        return list(codes.values())

    def step(self) -> int:
        """The last step that metrics.jsonl tells of."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return max((json.loads(line)["step"] for line in lines), default=0)
        except (OSError, ValueError):
            return 0

    def until(self, condition) -> None:
        """Wait until `condition()`, or until a process has ended."""
        while not condition() and not (self.folder / "complete.json").exists():
            if any(_ended(pid) for pid in self.pids):
                return
            time.sleep(0.005)

    def complete(self) -> bool:
        return (self.folder / "complete.json").is_file()

    def result(self):
        """({step: loss}, weights)"""
        from safetensors.torch import load_file

        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        return losses, load_file(self.folder / "adapter_model.safetensors")


def _run(words, rank, processes, port, log, before, launch) -> None:
    """In the forked process: become a rank, and never return."""
    code = 1
    try:
        os.setsid()
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(ENVIRONMENT)
        import torch

        torch.set_num_threads(1)  # it was imported before the fork, perhaps with other variables
        if processes > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **environment_of(ROOT / "launch" / launch),
            )  # fmt: skip
        before()
        from rlhf.__main__ import main

        code = main(words)
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def environment_of(launch_file: Path) -> dict[str, str]:
    """What accelerate's launcher would set for the training processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    args = launch_command_parser().parse_args(["--config_file", str(launch_file), "script.py"])
    args, _, _ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""  # the launcher sets it on the way
        return {k: v for k, v in prepare_deepspeed_cmd_env(args)[1].items() if k.startswith("ACCELERATE")}
    return {k: v for k, v in prepare_multi_gpu_env(args).items() if k.startswith(("ACCELERATE", "FSDP", "PARALLELISM"))}


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


# --- faults: each is called with a fresh job and a random generator, and leaves the job's processes ended ------------


def kill_all(job: Job, dice: random.Random) -> str:
    """kill -9 of all processes at a random moment."""
    step = dice.randrange(STEPS)
    _kill_after(job, step, delay_s=dice.random() * 0.1)
    return f"after step {step}"


def _kill_after(job: Job, step: int, delay_s: float = 0.0, before=lambda: None) -> None:
    """Start it, and kill -9 all processes once it has told of `step`; `before` is called in each of them first."""
    job.start(before)
    job.until(lambda: job.step() >= step)
    time.sleep(delay_s)
    for pid in job.pids:
        _kill(pid, signal.SIGKILL)
    job.wait()


def kill_one(job: Job, dice: random.Random) -> str:
    """kill -9 of one process: the others end by themselves, or at the launcher's SIGTERM."""
    job.start()
    step, rank = dice.randrange(STEPS), dice.randrange(job.processes)
    job.until(lambda: job.step() >= step)
    time.sleep(dice.random() * 0.1)
    _kill(job.pids[rank], signal.SIGKILL)
    job.wait()
    return f"rank {rank} after step {step}"


def freeze_one(job: Job, dice: random.Random) -> str:
    """One process stands still: the others' watchdog shows their stacks and ends them, so that the launcher ends all."""
    words, job.words = job.words, [*job.words, "--watchdog_minutes", "0.2"]
    job.start()
    step, rank = dice.randrange(STEPS - 1), dice.randrange(job.processes)
    job.until(lambda: job.step() >= max(1, step))
    _kill(job.pids[rank], signal.SIGSTOP)
    job.wait()
    job.words = words
    log = job.log.read_text()
    assert job.complete() or ("Timeout (0:00:12)!" in log and "most recent call first" in log), "no stacks were shown"
    return f"rank {rank} after step {step}"


def kill_while_saving(job: Job, dice: random.Random) -> str:
    """kill -9 in a save that was slowed down: while files are written, summed up, or given their name."""
    from rlhf.runs import checkpointing

    place = dice.choice(["digest_files", "place_checkpoint", "rotate_checkpoints"])

    def slow():
        function = getattr(checkpointing, place)
        setattr(checkpointing, place, lambda *a, **k: (time.sleep(0.4), function(*a, **k))[1])

    job.start(slow)
    which = dice.randrange(1, STEPS // SAVE_EVERY)
    job.until(lambda: job.step() >= which * SAVE_EVERY)
    time.sleep(dice.random() * 0.8)
    for pid in job.pids:
        _kill(pid, signal.SIGKILL)
    job.wait()
    return f"in {place} of step {which * SAVE_EVERY}"


def ask(job: Job, dice: random.Random) -> str:
    """A signal to one of the processes, or the stop file: the run saves and ends."""
    job.start()
    step, rank, how = dice.randrange(STEPS - 1), dice.randrange(job.processes), dice.choice(["SIGTERM", "SIGINT", "SIGUSR1", "stop file"])  # fmt: skip
    job.until(lambda: job.step() >= max(1, step))
    if how == "stop file":
        (job.folder / "stop").touch()
    else:
        _kill(job.pids[rank], getattr(signal, how))
    job.wait()
    if not job.complete():
        stopped = json.loads((job.folder / "stopped.json").read_text())
        assert stopped["checkpoint"].endswith(f"checkpoint-{stopped['step']}"), (
            "a polite stop saves the step it stops at"
        )
    return f"{how} to rank {rank} after step {step}"


def damage(job: Job, dice: random.Random) -> str:
    """Ended by kill -9, and then a file of the newest checkpoint is cut short, changed by a bit, or gone."""
    _kill_after(job, dice.randrange(2 * SAVE_EVERY, STEPS))
    newest = max(job.folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), default=None)
    if newest is None:
        return "before the first checkpoint"
    file = dice.choice(sorted(f for f in newest.rglob("*") if f.is_file() and f.stat().st_size))
    how, content = dice.choice(["cut short", "a bit changed", "gone"]), bytearray(file.read_bytes())
    if how == "cut short":
        file.write_bytes(content[: dice.randrange(len(content))])
    elif how == "gone":
        file.unlink()
    else:
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        file.write_bytes(content)
    return f"{newest.name}/{file.name} {how}"


def clock_jump(job: Job, dice: random.Random) -> str:
    """The clock jumps by a day, forwards or back, at each look; then kill -9."""
    real = time.time
    jump = dice.choice([-86400.0, 86400.0])
    step = dice.randrange(SAVE_EVERY, STEPS)
    _kill_after(
        job, step, before=lambda: setattr(time, "time", lambda: real() + (jump if int(real() * 3) % 2 else 0.0))
    )
    return f"by {jump / 3600:+.0f} h, killed after step {step}"


def full_disk(job: Job, dice: random.Random) -> str:
    """The disk (a tmpfs) fills up in mid-run, and has room again before the next start."""
    with _small_disk(job.folder) as mounted:
        if not mounted:
            return "left out: a tmpfs needs root"
        job.start()
        step = dice.randrange(1, STEPS - 1)
        job.until(lambda: job.step() >= step)
        filler = job.folder / "stop-gap"
        with open(filler, "wb", buffering=0) as file:
            try:
                while file.write(b"x" * 65536):
                    pass
            except OSError:
                pass
        job.wait()
        filler.unlink()
        _finish(job)
        _move_out(job)
    return f"after step {step}, {_saves_refused(job)} saves refused"


def read_only_folder(job: Job, dice: random.Random) -> str:
    """The run folder can't be written to for a while in mid-run."""
    job.start(_obey_permissions)
    step = dice.randrange(1, STEPS - 1)
    job.until(lambda: job.step() >= step)
    job.folder.chmod(0o555)
    if dice.random() < 0.5:
        job.until(lambda: job.step() >= step + SAVE_EVERY)
    else:
        job.wait()
    job.folder.chmod(0o755)
    _wait_if_any(job)
    return f"after step {step}, {_saves_refused(job)} saves refused"


def _obey_permissions() -> None:
    """Give up root's right to write where permissions forbid it (capabilities 1 and 2, CAP_DAC_*)."""
    libc, header, data = ctypes.CDLL(None), struct.pack("=Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    libc.capget(header, data)
    effective, *rest = struct.unpack("=6I", data.raw)
    libc.capset(header, struct.pack("=6I", effective & ~0b110, *rest))


def _wait_if_any(job: Job) -> None:
    if any(Path(f"/proc/{pid}").exists() for pid in job.pids):
        job.wait()


def _saves_refused(job: Job) -> int:
    return job.log.read_text().count("warning: no checkpoint of step")


class _small_disk:
    """A tmpfs of 100 MB on the run's folder; False where it can't be mounted."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> bool:
        self.folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(self.folder)]
        return subprocess.run(command, capture_output=True).returncode == 0

    def __exit__(self, *error) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], capture_output=True)


def _move_out(job: Job) -> None:
    kept = job.folder.with_name(f"{job.folder.name}-kept")
    shutil.copytree(job.folder, kept)
    job.folder = kept


FAULTS = (kill_all, kill_one, freeze_one, kill_while_saving, ask, damage, clock_jump, full_disk, read_only_folder)


# --- the comparison ---------------------------------------------------------------------------------------------------


def _finish(job: Job) -> int:
    """Give the same command until the run is complete; how often that took."""
    for attempt in range(ATTEMPTS):
        if job.complete():
            return attempt
        job.start()
        job.wait()
    assert job.complete(), f"not complete after {ATTEMPTS} more starts"
    return ATTEMPTS


def difference(want, found) -> str:
    """What differs between two results; '' if nothing does."""
    import torch

    if [step for step, _ in found[0]] != [step for step, _ in want[0]]:
        return f"metrics.jsonl has the steps {[step for step, _ in found[0]]}"
    for (step, loss), (_, other) in zip(want[0], found[0], strict=True):
        if loss != other:
            return f"the loss of step {step} is {other}, not {loss}"
    changed = [name for name in want[1] if not torch.equal(want[1][name], found[1][name])]
    return f"{len(changed)} weights differ" if changed else ""


def write_recipe(folder: Path, model: str, data: str) -> Path:
    recipe = {
        "stage": "dpo", "model_name_or_path": model, "dataset_name": data, "output_dir": "unused", "max_length": 128,
        "max_train_examples": 8, "global_batch_size": 3, "max_steps": STEPS, "learning_rate": 1e-3, "use_peft": True,
        "lora_r": 4, "lora_dropout": 0.1, "lora_target_modules": "all-linear", "merge_adapter": False,
        "gradient_checkpointing": False, "save_steps": SAVE_EVERY, "save_total_limit": 2, "logging_steps": 1,
        "reference_cache": str(folder / "reference"), "disable_tqdm": True, "seed": 1,
    }  # fmt: skip
    file = folder / "dpo.yaml"
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in recipe.items()))
    return file


def run_faults(folder: Path, model: str, data: str, count: int, seed: int, tell=print) -> list[str]:
    """Inject `count` faults, in turns under each launch file; what went wrong, a line each."""
    launch_files = usable_launch_files(tell)
    import_all()  # once, before the first fork
    recipe = write_recipe(folder, model, data)
    whole = {}
    for launch in launch_files:
        job = Job(recipe, folder / f"whole-{launch}", launch)
        job.start()
        job.wait()
        assert job.complete(), job.log.read_text()[-3000:]
        whole[launch] = job.result()
    tell(f"{'':>3}  {'fault':<18} {'under':<11}  {'starts':>6}  {'seconds':>7}  result")
    wrong = []
    for number in range(count):
        dice = random.Random(f"{seed} {number}")
        fault = FAULTS[number % len(FAULTS)]
        usable = launch_files[1:] if fault in (kill_one, freeze_one) else launch_files
        launch = usable[(number + number // len(FAULTS)) % len(usable)]
        job = Job(recipe, folder / f"run-{number}", launch)
        if dice.random() < 0.3:  # as the engine splits it
            job.words += ["--portable_checkpoints", "false"]
        started = time.monotonic()
        what, starts = "", 0
        try:
            what = fault(job, dice)
            starts = _finish(job) if not what.startswith("left out") else 0
            result = difference(whole[launch], job.result()) if not what.startswith("left out") else ""
        except AssertionError as error:
            result = str(error)
        if result:
            wrong.append(f"{fault.__name__} {what}: {result} ({job.log})")
        told = result or ("-" if what.startswith("left out") else "equal")
        tell(
            f"{number + 1:>3}  {fault.__name__:<18} {launch or 'one process':<11}  {1 + starts:>6}  {time.monotonic() - started:7.1f}  {told}: {what}"
        )
        if not result:
            shutil.rmtree(job.folder, ignore_errors=True)
    return wrong


def usable_launch_files(tell) -> list[str]:
    """Those that this machine has the packages for."""
    if importlib.util.find_spec("deepspeed") and shutil.which("g++"):
        return list(LAUNCH)
    tell("without ZeRO-2: deepspeed or g++ is missing")
    return [launch for launch in LAUNCH if not launch.startswith("zero")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=27)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a folder; default: a tiny Llama with random weights")
    parser.add_argument("--data", default="embedded:sample")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)  # before the libraries are imported
    sys.path.insert(0, str(ROOT / "bench"))
    from rlhf.console import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = args.model
        if model is None:
            from scale_proof import make_tiny_model

            model = make_tiny_model(folder / "model")
        wrong = run_faults(folder, model, args.data, args.count, args.seed)
        print(f"\n{args.count} faults, {len(wrong)} of them lost something")
        for line in wrong:
            print(f"  {line}")
        if wrong:
            logs = [Path(line.rsplit("(", 1)[1].rstrip(")")) for line in wrong]
            print(logs[0].read_text()[-3000:])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
