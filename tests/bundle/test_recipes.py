"""Paths in recipes are replaced as values; every other character, comment and line number stays."""

import json
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rlhf.bundle.places import Places
from rlhf.bundle.recipes import check_no_secrets, named, rewrite
from rlhf.config.recipe import Recipe
from rlhf.config.yaml_reader import Loader
from rlhf.errors import UserError


def read(text):
    """{key: (value, line)} of a text."""
    loader = Loader(text)
    root = loader.get_single_node()
    return {k.value: (loader.construct_object(v, deep=True), k.start_mark.line) for k, v in root.value}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a: /x/y  # why\nb: 1\n", "a: new/path  # why\nb: 1\n"),
        ("a: '/x/y'\n", 'a: "new/path"\n'),
        ("a:   /x/y", "a:   new/path"),
        ("a: [/x/y, /z, '/x/y']\n", 'a: [new/path, /z, "new/path"]\n'),
        ("a: {n: /x/y}\n", "a: {n: new/path}\n"),
        ("a: |-\n  /x/y\nb: 2\n", 'a: "new/path"\n\nb: 2\n'),
        ('a: "/x\\\n  /y"  # c\nb: 2\n', 'a: "new/path"\n  # c\nb: 2\n'),
        ("\ufeffa: /x/y\r\nb: 2\r\n", "\ufeffa: new/path\r\nb: 2\r\n"),
        ("# /x/y\nb: /x/y/z\n", "# /x/y\nb: /x/y/z\n"),
    ],
)
def test_only_the_value_changes(before, after):
    text, changes = rewrite(before, lambda key, value: "new/path" if value == "/x/y" else None)
    assert text == after
    assert read(text).keys() == read(before).keys()
    assert all(read(text)[key][1] == read(before)[key][1] for key in read(text))
    assert [change["from"] for change in changes] == ["/x/y"] * len(changes)


def test_a_change_is_told_with_its_line():
    _, changes = rewrite("# one\n\noutput_dir: /x\n", lambda key, value: f"{key}/y")
    assert changes == [{"line": 3, "key": "output_dir", "from": "/x", "to": "output_dir/y"}]


WORDS = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Cn", "Co", "Zl", "Zp")), max_size=30)
PATHS_OF_ANYBODY = st.one_of(WORDS, st.from_regex(r"\A[/~]?[a-z #:'\"\[\]{}&*!|>%@`,?é-]{1,20}\Z"))


@st.composite
def recipes(draw):
    """A recipe's text in any of YAML's ways to write a string, its values, and new ones for some."""
    lines, values, new = [], {}, {}
    for key in draw(st.lists(st.from_regex(r"\A[a-z_]{1,8}\Z"), unique=True, min_size=1, max_size=5)):
        if yaml.safe_load(key) != key:  # `no`, `on`
            continue
        value = draw(PATHS_OF_ANYBODY)
        style = draw(st.sampled_from(["plain", "'", '"', "|-", "list"]))
        shown = json.dumps(value, ensure_ascii=False)
        if style == "plain" and re.fullmatch(r"[a-z/][a-z/.]*", value) and yaml.safe_load(value) == value:
            shown = value
        elif style == "'":
            shown = "'" + value.replace("'", "''") + "'"
        elif style == "|-" and value.strip() and value[0] not in " \t#":
            shown = f"|-\n  {value}"
        elif style == "list":
            shown = f"[{shown}, 7]"
        comment = draw(st.sampled_from(["", "  # a: comment"])) if "|-" not in shown[:3] else ""
        lines.append(f"{key}: {shown}{comment}\n{draw(st.sampled_from(['', '# b', chr(10)]))}\n")
        values[key] = value
        if draw(st.booleans()):
            new[value] = draw(PATHS_OF_ANYBODY)
    return "".join(lines), values, new


@given(recipes())
def test_any_recipe_keeps_its_lines_comments_and_other_values(drawn):
    before, values, new = drawn
    if not values:
        return
    text, changes = rewrite(before, lambda key, value: new.get(value))
    found, was = read(text), read(before)
    for key, value in values.items():
        wanted = new.get(value, value)
        assert was[key][0] in (value, [value, 7])  # the text says what it was made of
        assert found[key] == ([wanted, 7] if isinstance(was[key][0], list) else wanted, was[key][1])
    assert text.count("# a: comment") == before.count("# a: comment") + sum(
        change["to"].count("# a: comment") - change["from"].count("# a: comment") for change in changes
    )
    assert len(text.splitlines()) == len(before.splitlines())
    assert rewrite(text, lambda key, value: None) == (text, [])


def test_paths_below_the_current_folder_stay(tmp_path):
    (tmp_path / "data").mkdir()
    given = [("data/a.jsonl", "data"), (f"{tmp_path}/runs/x", "runs"), ("./b.jsonl", "data"), ("/else/a.jsonl", "data")]
    places = Places(given, tmp_path)
    assert [places.of(path) for path, _ in given] == ["data/a.jsonl", "runs/x", "b.jsonl", "data/a-2.jsonl"]
    assert places.of("runs/x/checkpoint") == "runs/x/checkpoint"


def test_a_path_by_two_names_has_one_place(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "here").mkdir()
    places = Places([(f"{tmp_path}/real", "models"), ("../link", "models")], tmp_path / "here")
    assert places.of("../link") == places.of(f"{tmp_path}/real/") == "models/real"


@pytest.mark.parametrize("name", ["wheels/a.jsonl", "hub/x", "launch/a", "bundle.json", "SHA256SUMS", "..", "."])
def test_the_bundles_own_names_are_taken(name, tmp_path):
    assert Places([(name, "data")], tmp_path).of(name).startswith("data/")


@given(st.lists(st.from_regex(r"\A(\.\./|/|\./|[a-c]/)*[a-c]{1,2}(\.jsonl)?\Z"), min_size=1, max_size=8))
def test_no_two_paths_share_a_place(paths):
    places = Places([(path, "data") for path in paths], __import__("pathlib").Path("/none/x"))
    found = {places._key(path): places.of(path) for path in paths}
    assert len(set(found.values())) == len(found)
    assert not any(place.startswith(("/", "..")) for place in found.values())


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 12,
        "ghp_" + "x" * 36,
        "AKIA" + "A" * 16,
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "https://me:pass@pypi.example/simple",
        "export WANDB_API_KEY=" + "0" * 40,
    ],
)
def test_a_secret_is_refused_with_its_line_and_not_repeated(secret, tmp_path):
    with pytest.raises(UserError, match=r"a\.yaml:2: looks like a token") as refused:
        check_no_secrets(f"stage: sft\n# {secret}\n", tmp_path / "a.yaml")
    assert secret not in str(refused.value) or len(secret) < 7


def test_what_is_no_secret_passes(tmp_path):
    check_no_secrets("# set HF_TOKEN or WANDB_API_KEY\nHF_TOKEN=\nurl: https://host/path\n", tmp_path / "a")


def test_the_data_sets_of_a_mix_are_all_named():
    values = {"dataset_name": ["a.jsonl", {"name": "org/b", "fraction": 0.5}], "eval_dataset_name": "c.jsonl"}
    recipe = Recipe("dpo", "dpo.yaml", values, {"dataset_name": 3})
    found = [(item.value, item.where) for item in named([recipe], ("dataset_name", "eval_dataset_name"))]
    assert found == [("a.jsonl", "dpo.yaml:3"), ("org/b", "dpo.yaml:3"), ("c.jsonl", "dpo.yaml")]
