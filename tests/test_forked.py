"""tests/forked.py: what its server does when a caller, or the process that started it, is killed; which signals are ignored."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest

LIGHT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import forked
forked.import_all = lambda: None
"""  # for a server that starts at once: what it forks has imported nothing
SERVE = f"{LIGHT}forked.serve(sys.argv[1])"
DIES = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def light():
    """(program, server)"""
    program, server = forked.start_server(sys.executable, "-c", SERVE)
    yield program, server
    with server:
        server.stdin.close()


def changed(program, place, line, *before):
    """A copy of the program that does `before` before one of its lines."""
    text = Path(program).read_text()
    assert text.count(f"\n    {line}") == 1
    file = place / f"program-{len(list(place.iterdir()))}"
    file.write_text(text.replace(f"\n    {line}", "".join(f"\n    {each}" for each in (*before, line))))
    file.chmod(0o755)
    return file


# Before which line it is killed, and what it does just before that
UNANSWERED = [
    ("files = [",),  # connected
    ("files = [", 'server.sendall((9).to_bytes(8, "big"))'),  # without its files
    ("server.sendall(asked)",),
    ("server.sendall(asked)", "server.sendall(asked[:99])"),
    ("pid = server.recv(8)",),
]
ANSWERED = [("for number in handed_on",), ("code = ",)]


def test_callers_that_are_killed_take_nobody_with_them(light, tmp_path):
    """A burst of 12 at 7 moments, 10 of them before the server has looked; then one that lives."""
    program, server = light

    def start(line, *before):
        broken = changed(program, tmp_path, line, *before, DIES)
        words = [broken, "-c", "import time; time.sleep(600)"]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={})

    server.send_signal(signal.SIGSTOP)
    burst = [start(*moment) for moment in UNANSWERED * 2]
    assert [caller.wait(300) for caller in burst] == [-signal.SIGKILL] * 10
    burst += [start(*moment) for moment in ANSWERED]
    server.send_signal(signal.SIGCONT)
    for caller in burst:  # an output ends when all who hold it have: what was forked for the caller is killed too
        assert caller.communicate(timeout=300) == (b"", b"") and caller.returncode == -signal.SIGKILL
    done = subprocess.run([program, "-c", "print('here')"], capture_output=True, text=True, timeout=300, env={})
    assert (done.returncode, done.stdout, done.stderr) == (0, "here\n", "")


def ignore_nothing():
    """Whatever the tests' own process was started with."""
    for number in forked.HANDED_ON:
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("names", ["", "TERM USR1 INT", "HUP"])
def test_what_a_caller_ignores_is_ignored(names, light):
    """As `trap '' TERM` leaves it, which slurm/node.sh has; the same in a real interpreter."""
    code = """if True:
        import json, signal
        names = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
        found = [name for name in names if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN]
        print(json.dumps(found), flush=True)
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
        input()
    """
    shell = ["bash", "-c", f"trap '' {names or 'CHLD'}; exec \"$@\"", "bash"]
    for python in (sys.executable, light[0]):
        process = subprocess.Popen([*shell, python, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                   preexec_fn=ignore_nothing)  # fmt: skip
        found = json.loads(process.stdout.readline())
        assert sorted(found) == sorted(f"SIG{name}" for name in names.split()), python
        for name in found:
            process.send_signal(getattr(signal, name))
        process.communicate("\n", timeout=300)
        assert process.returncode == 0, python


def test_an_ignored_signal_that_comes_at_once(light, tmp_path):
    """Before the forked process has done anything."""
    eager = changed(light[0], tmp_path, "code = ", "os.kill(os.getpid(), signal.SIGTERM)")
    for words, code in ((["trap '' TERM; exec \"$@\""], 0), (['exec "$@"'], -signal.SIGTERM)):
        with subprocess.Popen(["bash", "-c", *words, "bash", eager, "-c", "input()"], stdin=subprocess.PIPE,
                              preexec_fn=ignore_nothing) as process:  # fmt: skip
            if code == 0:  # else it waits for a line that never comes, until the signal ends it
                process.communicate(b"\n", timeout=300)
            assert process.wait(timeout=300) == code


def test_a_sitecustomize_is_run_first(light, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('first')")
    for python in (sys.executable, light[0]):
        done = subprocess.run([python, "-c", "print('then')"], env={"PYTHONPATH": f"/none:{tmp_path}"},
                              capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.stdout == "first\nthen\n", python


def test_the_folder_goes_with_the_process_that_started_the_server():
    """Also when that is killed."""
    code = f"""{LIGHT}
import os, signal
print(forked.start_server(sys.executable, "-c", {SERVE!r})[0], flush=True)
{DIES}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )  # till both have ended
    assert done.returncode == -signal.SIGKILL and done.stderr == ""
    folder = Path(done.stdout.strip()).parent
    assert folder.name.startswith("forked-") and not folder.exists()
