"""The list of planted defects is up to date with the code; and, slowly, each of them is found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from defects import DEFECTS
from jinja2 import Environment
from planted import ROOT, occurrences


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_defect_can_be_planted(defect):
    """Its text is in its file exactly once, the changed file compiles, and the tests that should find it exist."""
    assert occurrences(defect) == 1, f"{defect.file}: bring {defect.name} in defects.py up to date"
    changed = (ROOT / defect.file).read_text(encoding="utf-8").replace(defect.old, defect.new)
    assert defect.new != defect.old
    if defect.file.endswith(".py"):
        compile(changed, defect.file, "exec")
    elif defect.file.endswith(".jinja"):
        Environment().parse(changed)
    else:
        assert subprocess.run(["bash", "-n"], input=changed, text=True).returncode == 0
    assert defect.tests
    for test in defect.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), test


def test_names():
    names = [defect.name for defect in DEFECTS]
    assert len(names) == len(set(names)) >= 20


def planted(*code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)])}
    done = subprocess.run([sys.executable, *code], cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")
    return done


@pytest.mark.slow
def test_every_defect_is_caught():
    done = planted("tests/planted/planted.py")
    assert done.returncode == 0 and f"{len(DEFECTS)} of {len(DEFECTS)} caught" in done.stdout


@pytest.mark.slow
def test_what_no_test_finds_is_told():
    """A change that changes nothing, beside one that does; neither is left in the working tree."""
    code = (
        "import dataclasses, sys, planted\n"
        "real = next(d for d in planted.DEFECTS if d.name == 'ties-are-wins')\n"
        "none = dataclasses.replace(real, name='no-defect', new='return 0.5 if b == a else float(a > b)')\n"
        "wrong = planted.run([none, real])\n"
        "print(wrong)\n"
        "moved = dataclasses.replace(real, name='moved', old='no such text')\n"
        "print(planted.run([moved]))\n"
    )
    file = ROOT / next(defect.file for defect in DEFECTS if defect.name == "ties-are-wins")
    before = file.read_bytes()
    done = planted("-c", code)
    shown = done.stdout.splitlines()
    assert [line.partition(" ")[0] for line in shown if "NOT CAUGHT" in line] == ["no-defect"]
    assert "1 of 2 caught" in done.stdout and "['no-defect: not caught (3 tests pass)']" in shown
    assert shown[-1] == f"['moved: its text is 0 times in {file.relative_to(ROOT)}']"
    assert file.read_bytes() == before
