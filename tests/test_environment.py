"""docs/environment.md names every environment variable that the project reads or sets, where it does, and no other."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "environment.md"
COMMON = "launch/common.sh"  # of the folders whose scripts call what in it reads variables
HOMES = {
    "rlhf": ["rlhf/**/*.py"],
    "launch": ["launch/*.sh"],
    "slurm": ["slurm/*.sh", "slurm/*.sbatch", COMMON],
    "docker": ["docker/Dockerfile", "docker/*.sh", "docker/*.yaml"],
    "launch/cloud": ["launch/cloud/*.sh", "launch/cloud/*.yaml", COMMON],
    "development": ["Makefile", ".ci/run", "bench/*.py", "tests/needed.py", "tests/docker/conftest.py"],
}
EVERYBODYS = {"BASH_SOURCE", "HOME", "IFS", "PATH", "PWD", "USER"}
NAME = r"[A-Z][A-Z0-9_]*"

if not TABLE.is_file():
    pytest.skip("this is an image, which holds a part of the project", allow_module_level=True)


def in_python(text):
    """What Python code takes from os.environ or puts there; `*` for what varies in a name that is put together."""
    tree, values = ast.parse(text), {}
    for node in ast.walk(tree):  # what a name stands for: NAME = "..."; for name in ("...", "...")
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                values.setdefault(ast.unparse(target), []).append(node.value)
        elif isinstance(node, ast.comprehension | ast.For) and isinstance(node.iter, ast.Tuple):
            values.setdefault(ast.unparse(node.target), []).extend(node.iter.elts)

    def names(node):
        if isinstance(node, ast.JoinedStr):
            return {"".join(part.value if isinstance(part, ast.Constant) else "*" for part in node.values)}
        if isinstance(node, ast.Name):
            return {name for value in values.get(node.id, []) for name in names(value)}
        if isinstance(node, ast.Constant) and re.fullmatch(rf"{NAME}|[a-z]+_proxy", str(node.value)):
            return {node.value}
        return set()

    def is_environment(node):
        return ast.unparse(node) in ("os.environ", "environ", "env")

    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_environment(node.value):
            found |= names(node.slice)
        elif isinstance(node, ast.Compare) and is_environment(node.comparators[0]):
            found |= names(node.left)
        elif isinstance(node, ast.Call) and node.args:
            of_environment = isinstance(node.func, ast.Attribute) and is_environment(node.func.value)
            if of_environment or re.search(r"getenv$|_environment$", ast.unparse(node.func)):
                found |= names(node.args[0])
        elif isinstance(node, ast.Constant) and re.fullmatch(r"RLHF_[A-Z0-9_]+", str(node.value)):
            found.add(node.value)  # however it gets to os.environ
    return found


def in_text(text, kind):
    """What a script, Dockerfile, Makefile or YAML file reads or sets. (Scripts' own variables are in lower case.)"""
    text = re.sub(r"(?m)(^|\s)#.*$", "", text)
    found = re.findall(rf"\$\{{?({NAME})\b", text)
    if kind == "yaml":  # keys of `envs`, `args` and the like; compose's and Kubernetes' lists
        found += re.findall(rf"(?m)^\s*({NAME}):", text)
        found += re.findall(rf"environment: \{{({NAME}):", text) + re.findall(rf"\bname: ({NAME})\b", text)
    elif kind == "Makefile":
        found += re.findall(rf"(?m)^({NAME}) *\?=", text) + re.findall(rf"\$\(or \$\(({NAME})\)", text)
    else:
        found += re.findall(rf"(?<![\w$.-])({NAME})\+?=(?!=)", text)
        for names in re.findall(r"(?m)^\s*(?:unset|ARG) (.*)$", text):
            found += re.findall(rf"(?<!\S){NAME}(?=[\s=]|$)", names)
    return set(found)


def in_sources(home):
    """{variable: a file that has it}"""
    found = {}
    for pattern in HOMES[home]:
        paths = sorted(ROOT.glob(pattern))
        assert paths, f"no {pattern}"
        for path in paths:
            text, kind = path.read_text(encoding="utf-8"), path.suffix[1:] or path.name
            for name in (in_python(text) if kind == "py" else in_text(text, kind)) - EVERYBODYS:
                found.setdefault(name, str(path.relative_to(ROOT)))
    return found


def in_table():
    """[(names, folders)] of each row."""
    rows = [line.split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", row[0]), row[1].split(", ")) for row in rows]


@pytest.mark.parametrize("home", HOMES)
def test_the_table_has_what_the_sources_have(home):
    found = in_sources(home)
    listed = {name for names, homes in in_table() for name in names if home in homes}
    assert {name: path for name, path in found.items() if name not in listed} == {}, "not in docs/environment.md"
    assert sorted(listed - set(found)) == [], f"in docs/environment.md, but not in {home}"


def test_the_table_names_each_once():
    names = [name for names, _ in in_table() for name in names]
    assert len(names) > 100 and sorted(names) == sorted(set(names))
    assert {home for _, homes in in_table() for home in homes} == set(HOMES)


def test_what_is_found_in_python():
    text = """
        A_FILE = "THE_FILE"
        env = os.environ
        env.get("ONE", 1), os.environ["TWO"], os.environ.setdefault("THREE", "x"), "FOUR" in os.environ, os.getenv("FIVE")
        os.environ.get(A_FILE), _from_environment("SIX", 1), any(os.environ.get(name) for name in ("SEVEN", "all_proxy"))
        os.environ.get(f"USE_{engine}"), {"NOT_THIS": 1}["NOT_THIS"], recipe.get("NOR_THIS"), {"RLHF_OWN": "1"}
    """
    expected = {"ONE", "TWO", "THREE", "FOUR", "FIVE", "THE_FILE", "SIX", "SEVEN", "all_proxy", "USE_*", "RLHF_OWN"}
    assert in_python("\n".join(line.strip() for line in text.splitlines())) == expected


def test_what_is_found_in_text():
    script = "# $NO NO=1\nexport A=${B:-$C} D=\nunset E F\n[ $a == X ] && G+=1 run --flag=Z$H  # $NO"
    assert in_text(script, "sh") == set("ABCDEFGH")
    assert in_text("ARG A B= C=1\nENV D=1 E=2\nRUN if [ -n ${F:-} ]; then X; fi", "Dockerfile") == set("ABCDEF")
    assert in_text("a: 1\nargs:\n  A: ${B:-}\n- {name: C, value: 1}\nenvironment: {D: 1}", "yaml") == set("ABCD")
    assert in_text("A ?= 1\nb:\n\t$(or $(B),1) $${C-0}", "Makefile") == set("ABC")


def test_the_tests_own_tools_leave_variables_alone_when_they_are_imported():
    """Or all tests of the process would run with them."""
    code = (
        "import os; before = dict(os.environ); import faults, forked, fuzz, planted; assert dict(os.environ) == before"
    )
    folders = [str(ROOT / "tests" / folder) for folder in ("", "faults", "fuzz", "planted")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *folders])}
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "TOKENIZERS_PARALLELISM"):
        env.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
