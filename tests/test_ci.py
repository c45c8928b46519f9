""".ci/run installs system packages: it asks a person first, and never stops where nobody is asked."""

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from needed import MAY_SKIP

ROOT = Path(__file__).parent.parent

if not (ROOT / ".ci" / "run").is_file():
    pytest.skip("this is an image, which holds a part of the project", allow_module_level=True)


@pytest.fixture
def machine(tmp_path):
    """A machine without make, and with an apt-get that only says what it was asked to do, and fails."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "env"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "apt-get").write_text(
        f'#!/bin/bash\necho "$*" >> {tmp_path}/asked\n[ "$1" != ${{FAILS:-install}} ] || exit 9\n'
    )
    (tools / "apt-get").chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key != "CI"} | {"PATH": str(tools)}
    return tmp_path / "asked", env


def at_a_terminal(words, env):
    """(exit code, what is shown)"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # Linux's way to say that nobody is left on the other side
        pass
    os.close(ours)
    return process.wait(600), shown.decode()


def test_a_person_is_asked_before_the_system_is_changed(machine):
    asked, env = machine
    code, shown = at_a_terminal([str(ROOT / ".ci" / "run")], env)
    assert code == 2 and not asked.exists()
    assert re.fullmatch(
        r"\.ci/run: this would install make .* on this machine with apt-get; \.ci/run --yes allows it\r\n", shown
    )


@pytest.mark.parametrize(("words", "more"), [(["--yes"], {}), ([], {"CI": "true"})])
def test_a_person_may_allow_it(words, more, machine):
    asked, env = machine
    assert at_a_terminal([str(ROOT / ".ci" / "run"), *words], env | more)[0] == 9
    assert asked.read_text().splitlines()[1].startswith("install -y -qq --no-install-recommends make ")


@pytest.mark.parametrize("terminal", [False, True])
def test_ci_is_not_asked(terminal, machine):
    """Neither without a terminal, nor with one that only its input or its output is."""
    asked, env = machine
    ours, theirs = pty.openpty()
    done = subprocess.run([str(ROOT / ".ci" / "run")], stdin=theirs if terminal else subprocess.DEVNULL, env=env,
                          capture_output=True, timeout=600)  # fmt: skip
    os.close(ours), os.close(theirs)
    assert done.returncode == 9 and "install" in asked.read_text()


def test_a_package_list_that_can_not_be_fetched_ends_it(machine):
    """Tests of what is then missing would be skipped."""
    asked, env = machine
    done = subprocess.run([str(ROOT / ".ci" / "run"), "--yes"], env=env | {"FAILS": "update"}, capture_output=True)
    assert done.returncode == 9 and asked.read_text() == "update -qq\n"


SKIPS = """
import pytest

def test_program():
    pytest.skip("no docker here (apt-get install docker.io)")

@pytest.mark.skipif(True, reason="may not mount (no root)")
def test_kernel(): pass

@pytest.mark.skipif(True, reason="not installed: slurmd")
def test_mark(): pass

@pytest.fixture
def package():
    pytest.importorskip("no_such_package")

def test_fixture(package): pass

@pytest.mark.xfail
def test_expected(): assert False

def test_passes(): pass
"""


@pytest.mark.parametrize(
    ("needed", "code", "expected"),
    [
        ("", 0, ["1 passed, 6 skipped, 1 xfailed"]),
        ("1", 1, ["FAILED test_some.py::test_program", "ERROR test_some.py::test_mark", "ERROR test_some.py::test_fixture",
                  "ERROR test_module.py", "RLHF_TEST_ALL=1 wants every test to run: no docker here",
                  "1 failed, 1 passed, 2 skipped, 1 xfailed, 3 errors"]),
    ],
)  # fmt: skip
def test_ci_fails_where_a_test_is_skipped_for_want_of_a_program(needed, code, expected, tmp_path):
    (tmp_path / "test_some.py").write_text(SKIPS)
    (tmp_path / "test_module.py").write_text('import pytest\npytest.importorskip("no_such_package")\n')
    (tmp_path / "test_image.py").write_text(
        'import pytest\npytest.skip("this is an image, which holds a part of the project", allow_module_level=True)\n'
    )
    words = ["-p", "needed", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-q", "-rfEs"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "RLHF_TEST_ALL": needed}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout
    assert [text for text in expected if text not in done.stdout] == [], done.stdout


def test_ci_wants_every_test_to_run():
    assert "\nexport RLHF_TEST_ALL=1 " in (ROOT / ".ci" / "run").read_text()


def test_reasons_that_stay_skips_are_those_of_the_tests():
    """A reason that nobody gives any more is taken off the list."""
    texts = [file.read_text() for file in (ROOT / "tests").rglob("*.py") if file.name != "needed.py"]
    assert [reason for reason in MAY_SKIP if not any(reason in text for text in texts)] == []


def test_ci_knows_one_word(machine):
    asked, env = machine
    done = subprocess.run([str(ROOT / ".ci" / "run"), "--no"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "usage: .ci/run [--yes]\n") and not asked.exists()
