"""The corpus and a short draw, by area; `make fuzz N=3000` runs more. And the fuzzer's own eyes."""

import json
import os
import sys

import fuzz
import pytest
from cases import AREAS, RECIPES, RUN_COMMANDS, Case, box, check, corpus, recipe_text, run_box
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutate import drawn


@pytest.fixture(scope="module")
def imported():
    had_torch = "torch" in sys.modules
    fuzz.import_all()
    assert had_torch or "torch" not in sys.modules


def wrong(cases, place):
    results = fuzz.run_cases(cases, place)
    print(fuzz.table(results))
    return list(fuzz.failures(results, place, small=False))


@pytest.mark.parametrize("area", AREAS)
def test_known_inputs_and_a_short_draw(imported, tmp_path, area):
    found = wrong([*(case for case in corpus() if case.area == area), *drawn(60, 1, (area,))], tmp_path)
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_three_thousand_inputs(imported, tmp_path, area):
    found = wrong(drawn(3000, 2, (area,)), tmp_path)
    assert not found, "\n".join(found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6,
)  # fmt: skip


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(["beta", "max_length", "run_name", "output_dir", "report_to", "lr_scheduler_kwargs"]),
    value=JSON,
)
def test_any_value_of_a_key(imported, tmp_path, key, value):
    case = Case(
        "recipes",
        "hypothesis",
        box() | {"dpo.yaml": recipe_text({**RECIPES["dpo"], key: value})},
        check(),
    )
    assert wrong([case], tmp_path) == []


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.fixed_dictionaries({"prompt": JSON, "chosen": JSON}, optional={"rejected": JSON, "margin": JSON}))
def test_any_row(imported, tmp_path, row):
    case = Case("data", "hypothesis", box("reward") | {"d.jsonl": json.dumps(row).encode()}, check("reward"))
    assert wrong([case], tmp_path) == []


# --- the fuzzer itself -----------------------------------------------------------------------------------------------


def test_right_boxes_are_accepted(imported, tmp_path):
    cases = [Case("recipes", stage, box(stage), check(stage)) for stage in ("sft", "reward", "dpo")]
    cases += [
        Case("run folders", str(words), run_box(complete), words, ("out/report.html", "report.html"))
        for words in RUN_COMMANDS
        for complete in (True, False)
    ]
    results = fuzz.run_cases(cases, tmp_path)
    assert {(case.name, outcome.kind, outcome.said if outcome.kind != "ok" else "") for case, outcome in results} == {
        (case.name, "ok", "") for case in cases
    }


TRACEBACK = 'Traceback (most recent call last):\n  File "/x/rlhf/config/recipe.py", line 7, in f\nKeyError: 1\n'


@pytest.mark.parametrize(
    "code, said, complaint, kind, where",
    [
        (0, "ok\n", "", "ok", ""),
        (2, "", "rlhf: a.yaml:1: no\n", "sentence", ""),
        (2, "", "usage: rlhf\nrlhf: error: x\n", "usage", "usage"),
        (1, "", TRACEBACK, "traceback", "rlhf/config/recipe.py:7 KeyError"),
        (2, "", f"rlhf: {'x' * 600}\n", "unreadable", "more than 600 characters"),
        (2, "", "rlhf: a\nb\n", "unreadable", "2 lines on stderr"),
        (2, "", "rlhf: \x1b[31m\n", "unreadable", "control characters"),
        (2, "", "warning\n", "unreadable", "no `rlhf:` before it"),
        (3, "", "rlhf: a\n", "other code", "exit 3"),
        (0, "\x1b[31m", "", "unreadable", "stdout of 5 characters"),
    ],
)
def test_classes(code, said, complaint, kind, where):
    found = fuzz.classify(Case("", "", {}, ["dpo"]), code << 8, said, complaint)
    assert (found.kind, found.where) == (kind, where)


def child(monkeypatch, tmp_path, main, **more):
    monkeypatch.setattr("rlhf.__main__.main", main)
    return fuzz.run_case(Case("", "", {"a": b"x"}, ["dpo"], **more), tmp_path / "x")


def test_what_hangs_writes_dies_or_raises_is_seen(imported, monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        patched.setattr(fuzz, "TIME_LIMIT_S", 1)
        assert child(patched, tmp_path, lambda words: __import__("time").sleep(600)).kind == "hang"
    assert child(monkeypatch, tmp_path, lambda words: os.kill(os.getpid(), 9)).where == "SIGKILL"
    assert child(monkeypatch, tmp_path, lambda words: bytearray(13 * 2**30)).where.endswith("MemoryError")

    def write(words):
        with open("a", "w") as file:
            file.write("y")

    found = child(monkeypatch, tmp_path, write)
    assert (found.kind, found.where) == ("wrote outside", "a")
    assert child(monkeypatch, tmp_path, write, writes=("a",)).kind == "ok"


def test_the_same_seed_draws_the_same_cases():
    assert drawn(60, 5) == drawn(60, 5) != drawn(60, 6)
