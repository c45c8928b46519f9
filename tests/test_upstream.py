"""The list of foreign names: each one is missed by its name, the versions hold, and none of ours is left out of it."""

import ast
import functools
import importlib
import inspect
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from transformers import TrainerCallback

from rlhf import upstream
from rlhf.__main__ import main
from rlhf.errors import UserError
from rlhf.upstream import NAMES, TRAINERS, VERIFIED, check_upstream, what_is_wrong

ROOT = Path(__file__).parent.parent
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "rlhf").rglob("*.py"))}
PRIVATE = re.compile(r"_[a-zA-Z]")
TRAINER_METHODS = set().union(*(dir(getattr(trl, name)) for name in TRAINERS.values()))
# What we hang on objects of other libraries ourselves.
HUNG_ON = {"_packing_mode", "_plain_in_files", "_reported_at"}
PUBLIC = {"_asdict"}  # of a named tuple


def owner_of(name):
    path = name.path.rpartition(".")[0]
    return functools.reduce(getattr, filter(None, path.split(".")), importlib.import_module(name.module))


def renamed_code(code, word):
    """The code with another word in its place, also in functions within it."""
    swap = lambda x: f"{x}_renamed" if x == word else x  # noqa: E731
    constants = []
    for constant in code.co_consts:
        if inspect.iscode(constant):
            constant = renamed_code(constant, word)
        elif isinstance(constant, (tuple, frozenset)):
            constant = type(constant)(swap(x) for x in constant)
        constants.append(swap(constant) if isinstance(constant, str) else constant)
    return code.replace(co_names=tuple(map(swap, code.co_names)), co_consts=tuple(constants))


def functions_of(owner):
    for value in vars(owner).values():
        for function in (value.fget, value.fset) if isinstance(value, property) else (value,):
            function = inspect.unwrap(getattr(function, "__func__", function))
            if hasattr(function, "__code__"):
                yield function


def rename(name, monkeypatch):
    """As a new release of the library would."""
    owner, last = owner_of(name), name.path.rpartition(".")[2]
    if name.in_code:
        for function in functions_of(owner):
            monkeypatch.setattr(function, "__code__", renamed_code(function.__code__, last))
        if last in getattr(owner, "__annotations__", ()):
            monkeypatch.delitem(owner.__annotations__, last)
    for holder in (*getattr(owner, "__mro__", ()), owner):
        if last in vars(holder) and not {"aten", "Tensor"} & set(name.path.split(".")):
            monkeypatch.delattr(holder, last)
    if "aten" in name.path:  # torch looks its operators up again
        monkeypatch.setattr(importlib.import_module(name.module).ops, "aten", SimpleNamespace())
    if name.path.startswith("Tensor."):  # a class that can't be changed
        monkeypatch.setattr(importlib.import_module(name.module), "Tensor", SimpleNamespace())


def needs(name):
    if name.only in ("deepspeed", "bitsandbytes"):
        pytest.importorskip(name.only, reason=f"the extra for {name.only} is not installed")


@pytest.mark.parametrize("name", NAMES, ids=lambda n: f"{n.used_by.split('/')[-1]}-{n.path}")
def test_each_name_is_missed(name, monkeypatch):
    needs(name)
    assert what_is_wrong(name) == ""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true" if name.only == "deepspeed" else "false")
    monkeypatch.setattr(upstream, "NAMES", (name,))  # others may be of the same name
    stage = name.only if name.only in TRAINERS else "dpo"
    rename(name, monkeypatch)
    with pytest.raises(UserError) as stopped:
        check_upstream(stage, quantised=name.only == "bitsandbytes")
    verified = VERIFIED[name.package]
    assert str(stopped.value) == (
        f"{name.package} {upstream.version_of(name.package)} has no {name.path} ({name.lost}, {name.used_by}); this version of "
        f"rlhf-dpo was verified with {name.package} {verified}; install {'one of these' if ' to ' in verified else 'that'}"
    )


@pytest.mark.parametrize("name", [n for n in NAMES if n.parameters], ids=lambda n: n.path)
def test_each_parameter_is_missed(name, monkeypatch):
    needs(name)
    monkeypatch.setattr(
        inspect, "signature", lambda found: SimpleNamespace(parameters=["self", "other", *name.parameters])
    )
    assert f"expected ({', '.join(name.parameters)})" in what_is_wrong(name)


@pytest.mark.parametrize("stage", TRAINERS)
def test_a_run_stops_before_its_model_loads(stage, recipe, tiny_llama, few_pairs, tmp_path, monkeypatch, capsys):
    from transformers import Trainer

    import rlhf.models.loading

    monkeypatch.delattr(Trainer, "_get_grad_norm")
    for loader in ("load_policy", "load_reward_model"):
        monkeypatch.setattr(rlhf.models.loading, loader, lambda *a, **k: pytest.fail("a model was loaded"))
    file = recipe(stage, model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "out"))
    assert main([stage, file]) == 2
    told = capsys.readouterr().err
    assert (
        "has no Trainer._get_grad_norm (gradient-spike guard, rlhf/runs/checkpointing.py); this version of rlhf-dpo was verified"
        in told
    )
    assert "with transformers 5.17 to 5.23; install one of these" in told


def test_optional_packages_are_not_asked_when_they_are_not_used(monkeypatch):
    broken = tuple(n for n in NAMES if n.only in ("deepspeed", "bitsandbytes"))
    assert broken
    monkeypatch.setattr(upstream, "NAMES", broken)
    monkeypatch.setattr(upstream, "what_is_wrong", lambda name: "has no such thing")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    check_upstream("dpo")
    more = sum(n.only == "bitsandbytes" for n in broken) - 1
    with pytest.raises(UserError, match=f"bitsandbytes .* has no such thing .*and {more} more"):
        check_upstream("dpo", quantised=True)


# --- the list can't rot ----------------------------------------------------------------------------------------------


def words_of_the_list(path):
    """Names that the list has for a file of ours; shared ones may stand under another file."""
    return {n.path.rpartition(".")[2] for n in NAMES if n.used_by == str(path.relative_to(ROOT))}


LISTED = {n.path.rpartition(".")[2] for n in NAMES}


def overrides(tree):
    """Methods of trainer mixins and callbacks that stand in for a library's."""
    events = {name for name in dir(TrainerCallback) if name.startswith("on_")}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.bases:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name in TRAINER_METHODS | events:
                    if not method.name.startswith("__"):
                        yield method.name


@functools.cache
def own_names():
    """Names that are defined somewhere in this package: functions, classes, variables, attributes of self."""
    own = set()
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                own.add(node.attr)
    return own


def foreign_private_names(tree, own):
    """`x._name`, also as a string of getattr and hasattr, and `from library import _name`, that are not defined here."""
    for node in ast.walk(tree):
        found = ""
        if isinstance(node, ast.Attribute):
            found = node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            if node.func.id in ("getattr", "hasattr", "setattr") and isinstance(node.args[1], ast.Constant):
                found = str(node.args[1].value)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("rlhf"):
            yield from (alias.name for alias in node.names if PRIVATE.match(alias.name))
        by_super = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "super()"
        if PRIVATE.match(found) and (by_super or found not in own):
            yield found


@pytest.mark.parametrize("path", TREES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_override_and_private_name_is_listed(path):
    missing = set(overrides(TREES[path])) - words_of_the_list(path) - HUNG_ON
    # what a mixin above overrides too is listed for that one
    missing -= {name for name in missing if name in LISTED}
    missing |= set(foreign_private_names(TREES[path], own_names())) - LISTED - HUNG_ON - PUBLIC
    assert missing == set(), "list them in rlhf/upstream.py"


def test_the_scan_finds_what_it_should():
    source = (
        "from trl.trainer.utils import _pad\nclass A(B):\n    def _save(self): super()._save()\n"
        "    def training_step(self): self._own = x._foreign\n    def other(self): getattr(y, '_hidden', None)\n"
    )
    tree = ast.parse(source)
    assert set(foreign_private_names(tree, {"_own", "_save"})) == {"_pad", "_save", "_foreign", "_hidden"}
    assert set(overrides(tree)) == {"_save", "training_step"}


def test_the_files_that_the_list_names_use_the_names():
    for name in NAMES:
        assert name.path.rpartition(".")[2] in (ROOT / name.used_by).read_text(encoding="utf-8"), name


# --- versions --------------------------------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
REQUIREMENTS = [text for text in REQUIREMENTS if not text.startswith(PROJECT["name"])]


@pytest.mark.parametrize("text", REQUIREMENTS)
def test_every_dependency_has_bounds_that_the_locked_version_is_within(text):
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    assert {s.operator for s in requirement.specifier} == {">=", "<"}, "both bounds"
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked = re.findall(rf"^{re.escape(requirement.name)}==(\S+)", lock, re.M)
    assert locked and all(version in requirement.specifier for version in locked)
    if requirement.name in VERIFIED:
        first, _, last = VERIFIED[requirement.name].partition(" to ")
        assert f"{first}.99" in requirement.specifier and f"{last or first}.99" in requirement.specifier
        assert all(version.startswith(last or first) for version in locked)
        major, minor = (last or first).split(".")
        if requirement.name != "transformers":  # whose new releases bring new models
            assert f"{major}.{int(minor) + 1}" not in requirement.specifier, "bounded above by what was verified"
