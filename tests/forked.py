"""A Python whose processes are forked from one that has imported everything.

An import of torch, transformers and TRL is 6 s of CPU time in each process, most of what a run of a tiny model takes. `PYTHON`
is a program that is called as Python is (`PYTHON -m rlhf dpo …`, also by launch/*.sh, and by accelerate's launcher for its
ranks). It asks a server for the process, which is forked there with the caller's files, environment, folder and ignored
signals; signals are handed on, and its end is the caller's. A `sitecustomize.py` on PYTHONPATH is run first.

What a real interpreter has and this one lacks: a hash seed of its own. All forked processes iterate over a set of strings in
the server's order, whatever PYTHONHASHSEED says, so ranks that differ in it are not told from ranks that agree. Each launch
file is started with real interpreters too: `test_python_itself_starts_them` in tests/distributed/test_ddp.py.
"""

import array
import atexit
import contextlib
import ctypes
import functools
import gc
import importlib.machinery
import importlib.util
import json
import os
import pkgutil
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERVER_ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1"
}  # before a test has changed it; threads do not survive a fork
PR_SET_PDEATHSIG = 1
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# In place of `python`: no `import site`, which would be half of its 20 ms.
PROGRAM = """#!{python} -SE
import array, os, signal, socket, sys
words = sys.argv[1:]
while words[:1] == ["-u"]:
    del words[0]
if not words or words[0] not in ("-m", "-c") and not words[0].endswith(".py"):
    os.execv({python!r}, [{python!r}, *words])
import json
handed_on = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ignored = [int(number) for number in handed_on if signal.getsignal(number) == signal.SIG_IGN]
asked = json.dumps(dict(words=words, env=dict(os.environ), cwd=os.getcwd(), ignored=ignored)).encode()
def hand_on(number, frame):
    try:
        os.kill(int.from_bytes(pid, "big"), number)
    except ProcessLookupError:  # it has just ended
        pass
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    server.sendmsg([len(asked).to_bytes(8, "big")], files)
    server.sendall(asked)
    pid = server.recv(8)
    for number in handed_on:  # also what is ignored here: the process may have a handler of its own
        signal.signal(number, hand_on)
    code = int.from_bytes(server.recv(8) or bytes([0] * 7 + [70]), "big", signed=True)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


# --- the server ------------------------------------------------------------------------------------------------------


def serve(address: str) -> None:
    """Fork what is asked for, until standard input ends, or the process that holds its other end; then remove the folder."""
    try:
        sys.path.insert(0, str(ROOT))  # this project, and not another one that is installed
        import_all()
        _answer(address)
    finally:
        shutil.rmtree(Path(address).parent, ignore_errors=True)


def _answer(address: str) -> None:
    ended, wakeup = os.pipe()
    for end in (ended, wakeup):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(wakeup)
    callers: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(address)
        listener.listen(100)
        print("ready", flush=True)
        for source in (listener, ended, 0):
            selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == 0:
                    return
                elif key.fileobj == ended:
                    os.read(ended, 4096)
                    _tell_ends(callers, selector)
                elif key.fileobj is listener:
                    with contextlib.suppress(OSError):  # no more open files
                        _serve_caller(listener.accept()[0], callers, selector)
                elif key.data in callers:  # the caller is gone: it was killed
                    os.kill(key.data, signal.SIGKILL)
                    selector.unregister(key.fileobj)


def import_all() -> None:
    """What a run imports, and what it computes once in a process."""
    for name in ("accelerate.commands.launch", "peft", "pyarrow.parquet", "torch.distributed.run"):
        importlib.import_module(name)
    for stage in ("dpo", "reward", "sft"):
        importlib.import_module(f"trl.trainer.{stage}_trainer")
    rlhf = importlib.import_module("rlhf")
    for found in pkgutil.walk_packages(rlhf.__path__, "rlhf."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    if importlib.util.find_spec("deepspeed"):  # accelerate imports it in every run
        importlib.import_module("deepspeed")
    for stage in ("dpo", "reward", "sft"):
        rlhf.config.recipe.allowed_keys(stage)  # parses the source of three libraries
    transformers = importlib.import_module("transformers.conversion_mapping")
    transformers.get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns
    gc.freeze()  # or each child's first collection copies all of it


def _serve_caller(caller: socket.socket, callers: dict[int, socket.socket], selector) -> None:
    """Fork for a caller, which may be killed at any moment: then its process is too."""
    try:
        pid = _fork(caller)
    except OSError:  # it is gone before it has asked, or there can be no more processes
        caller.close()
        return
    callers[pid] = caller
    try:
        caller.sendall(pid.to_bytes(8, "big"))
    except OSError:
        os.kill(pid, signal.SIGKILL)
    else:
        selector.register(caller, selectors.EVENT_READ, pid)


def _tell_ends(callers: dict[int, socket.socket], selector) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        caller = callers.pop(pid)
        with contextlib.suppress(OSError):
            caller.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
        with contextlib.suppress(KeyError):
            selector.unregister(caller)
        caller.close()


def _fork(caller: socket.socket) -> int:
    """The process that a caller asks for; OSError where the caller is gone before it has asked."""
    length, rights, _, _ = caller.recvmsg(8, socket.CMSG_SPACE(12))
    files = array.array("i", rights[0][2] if rights else b"")
    try:
        if not files:
            raise ConnectionError
        asked = b""
        while len(asked) < int.from_bytes(length, "big"):
            if not (more := caller.recv(1 << 20)):
                raise ConnectionError
            asked += more
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)  # until the process ignores what its caller does
        try:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    code = _become(files, **json.loads(asked))
                finally:
                    os._exit(code)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
    finally:
        for file in files:
            os.close(file)
    return pid


def _become(files, words, env, cwd, ignored) -> int:
    """In the forked process: be what was asked for; returns the exit code."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives the tests
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in HANDED_ON:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in ignored else default)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
    os.setsid()
    for wanted, file in enumerate(files):
        os.dup2(file, wanted)
    os.closerange(3, max(files[-1] + 1, 64))  # the server's own, and the callers'
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode, closefd=False) for n, mode in enumerate("rww"))
    sys.stderr.reconfigure(line_buffering=True)
    before = json.loads(env.pop("FORKED_BEFORE", "[]"))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if words[:1] == ["-m"] and words[1].startswith("accelerate") or "FORKED_EXECUTABLE" in env:
        sys.executable = env["FORKED_PYTHON"]  # what a launcher starts
    folders = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    if custom := importlib.machinery.PathFinder.find_spec("sitecustomize", folders):
        custom.loader.exec_module(importlib.util.module_from_spec(custom))
    if before:
        runpy.run_path(before[0])[before[1]](*before[2:])
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
        return _ended(0)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return _ended(error.code if isinstance(error.code, int) else int(error.code is not None))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return _ended(1)


def _ended(code: int) -> int:
    """What Python does at its end."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    return code


# --- the tests' side -------------------------------------------------------------------------------------------------


def start_server(*command) -> tuple[str, subprocess.Popen]:
    """The program and its server, which `command` and an address start. It ends with this process or with its standard input."""
    folder = tempfile.mkdtemp(prefix="forked-")
    program, address = Path(folder) / "python", f"{folder}/socket"
    program.write_text(PROGRAM.format(python=sys.executable, address=address))
    program.chmod(0o755)
    server = subprocess.Popen(
        [*command, address], cwd=ROOT, env=SERVER_ENVIRONMENT | {"FORKED_PYTHON": str(program)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "ready\n" in iter(server.stdout.readline, ""), "the server has not started"  # libraries print before it
    return str(program), server


@functools.cache
def python() -> str:
    """The program; its server is started at the first call, and ends with this process."""
    program, server = start_server(sys.executable, __file__)
    atexit.register(lambda: (server.stdin.close(), server.wait()))
    return program


def environment(**more) -> dict[str, str]:
    """For a process that starts `PYTHON`, or whose children do."""
    return (
        os.environ
        | {"FORKED_PYTHON": python(), "PYTHON": python(), "PYTHON_EXEC": python(), "OMP_NUM_THREADS": "1"}
        | more
    )


def start(*words, before=(), **options) -> subprocess.Popen:
    """`PYTHON words`, its output in pipes. `before`: a file, a function of it and what to call it with first."""
    env = environment(**options.pop("env", {}))
    if before:
        env["FORKED_BEFORE"] = json.dumps([str(word) for word in before])
    command = [python(), *map(str, words)]
    options = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, env=env, **options)


def finish(process: subprocess.Popen, typed=None, timeout=600) -> subprocess.CompletedProcess:
    with process:
        try:
            out, err = process.communicate(typed, timeout=timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(*words, typed="", **options) -> subprocess.CompletedProcess:
    """What `python words` comes to, with `typed` as its standard input."""
    return finish(start(*words, stdin=subprocess.PIPE, **options), typed)


def launch_command(num_processes: int, *words, launch_file="ddp.yaml", program=("-m", "rlhf")) -> list[str]:
    """Words for `start` or `run`: accelerate's launcher, whose processes are forked as it is."""
    file = str(ROOT / "launch" / launch_file)  # or an absolute path
    return ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", str(num_processes), *program, *words]  # fmt: skip


def launch(num_processes: int, *words, launch_file="ddp.yaml", program=("-m", "rlhf"), **options):
    """What `accelerate launch --config_file FILE --num_processes N -m rlhf words` comes to."""
    return run(*launch_command(num_processes, *words, launch_file=launch_file, program=program), **options)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    serve(sys.argv[1])
