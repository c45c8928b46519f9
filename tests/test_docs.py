"""What the pages say can be done can be done: paths, links, commands, keys and names in them exist."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from rlhf import __version__
from rlhf.__main__ import parser
from rlhf.config.recipe import allowed_keys

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "rlhf|tests|docs|launch|slurm|docker|configs|bench|\\.ci"
PATH = re.compile(rf"(?<![\w/.$<-])(?:{FOLDERS})/[\w./*-]*[\w/*]")
PLACEHOLDER = re.compile(r"configs/(mine|X)\b|/(FOLDER|NAME)\b|_FILE\b")  # yours; tests/FOLDER/test_FILE.py
NAMED = re.compile(r"`((?:rlhf|tests|bench)/[\w/]+\.py)`: (`\w[^`]*`(?:(?:, | and )`\w[^`]*`)*)")
NAMED_IN = re.compile(r"(`\w+`(?:(?:, | and | or )`\w+`)*) (?:in|of)\s+`((?:rlhf|tests|bench)/[\w/]+\.py)`")
COMMANDS = next(action for action in parser()._actions if action.dest == "command").choices
STAGES = ("sft", "reward", "dpo", "evaluate")

if not (ROOT / "docs").is_dir():
    pytest.skip("this is an image, which holds a part of the project", allow_module_level=True)

IGNORED = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}  # made by whoever reads a page


def code(text):
    """Fenced blocks, line by line and without comments, and code spans."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"(^|\s)#.*", "", line) for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def missing_paths(text):
    found = {path for part in code(text) for path in PATH.findall(part) if not PLACEHOLDER.search(path)} - IGNORED
    return sorted(path for path in found if not (any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()))


def missing_names(text):
    """Of "`file.py`: `name` and `name`" and "`name` in `file.py`": functions, classes and constants that the file has not.

    A test's parameters are left out.
    """
    missing = []
    for path, names in [*NAMED.findall(text), *((path, names) for names, path in NAMED_IN.findall(text))]:
        source = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else ""
        for name in re.findall(r"`(\w+)(?=[`[])", names):
            if not re.search(rf"^\s*(?:def|class) {name}\b|^{name}\b.* = ", source, flags=re.MULTILINE):
                missing.append(f"{path}: {name}")
    return missing


def unknown_words(text):
    """Subcommands, options and keys of `rlhf`, and targets of `make`, that don't exist."""
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    unknown = []
    for part in code(text):
        unknown += [f"make {word}" for word in re.findall(r"(?:^|\s)make ([a-z][a-z-]*)", part) if word not in targets]
        for command, rest in re.findall(r"(?:^|[\s/])rlhf (?!import\b)([a-z]+)(?![\w/.])([^|;&]*)", part):
            if command not in COMMANDS:
                unknown.append(f"rlhf {command}")
                continue
            inner = [p for a in COMMANDS[command]._actions if isinstance(a.choices, dict) for n, p in a.choices.items()
                     if rest.split()[:1] == [n]]  # fmt: skip
            known = {
                flag for p in (COMMANDS[command], *inner) for action in p._actions for flag in action.option_strings
            }
            keys = {f"--{key}" for key in allowed_keys(command)} if command in STAGES else set()
            unknown += [f"rlhf {command} {flag}" for flag in re.findall(r"--\w+", rest) if flag not in known | keys]
    return unknown


def broken_links(text, page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        headings = (
            re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            if file.suffix == ".md" and file.is_file()
            else []
        )
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        if not file.exists() or (anchor and anchor not in slugs):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert (missing_paths(text), missing_names(text), unknown_words(text), broken_links(text, page)) == ([], [], [], [])


def test_every_test_that_a_page_names_is_there():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)(?:\[[^`]*\])?`", page.read_text(encoding="utf-8")):
            assert f"def {name}(" in tests, f"{page.name}: {name}"


@pytest.mark.parametrize(
    "text, found",
    [
        ("`rlhf/nothing.py`, `launch/*.yaml`, `launch/NOTHING.md`", (["launch/NOTHING.md", "rlhf/nothing.py"], [], [], [])),
        ("`tests/FOLDER/test_FILE.py`, `configs/mine/dpo.yaml`, `/rlhf/runs`, `slurm/site.env`", ([], [], [], [])),
        ("`rlhf/errors.py`: `UserError` and `Nobody`", ([], ["rlhf/errors.py: Nobody"], [], [])),
        ("`UserError` or `Noone` in `rlhf/errors.py`", ([], ["rlhf/errors.py: Noone"], [], [])),
        ("```bash\nmake setup   # make coffee\nmake tea\n```", ([], [], ["make tea"], [])),
        ("`rlhf dance`", ([], [], ["rlhf dance"], [])),
        ("`rlhf dpo x.yaml --beta 0.2 --batta 0.2 --check`", ([], [], ["rlhf dpo --batta"], [])),
        ("`rlhf chat runs/a --compare runs/b --beta 2`", ([], [], ["rlhf chat --beta"], [])),
        ("[a](README.md#try-it), [b](README.md#nowhere), [c](none.md)", ([], [], [], ["README.md#nowhere", "none.md"])),
    ],
)  # fmt: skip
def test_what_is_not_there_is_found(text, found):
    assert (
        missing_paths(text),
        missing_names(text),
        unknown_words(text),
        broken_links(text, ROOT / "README.md"),
    ) == found


def test_the_readme_is_short_and_begins_with_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    commands = [line.split("#")[0].strip() for line in lines]
    first = commands.index("git clone REPOSITORY rlhf-dpo && cd rlhf-dpo")
    assert commands[first + 1 : first + 3] == ["make setup", "make quickstart"]
    assert "launch/pipeline.sh configs/mine" in commands and any(line.startswith("`make test`") for line in lines)
    linked = {target.partition("#")[0] for line in lines for target in re.findall(r"\]\(([^)]+)\)", line)}
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked


def test_the_citation_file():
    """What version 1.2.0 of the format requires, in agreement with the package; each paper that the code cites is in it."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert all(citation[key] for key in ("message", "title", "authors"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (__version__, project["license"])
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
    for paper in citation["references"]:
        assert all(paper[key] for key in ("type", "title", "authors", "year", "url")), paper["title"]
    sources = [*(ROOT / "rlhf").rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    cited = {
        number for path in sources for number in re.findall(r"arXiv:(\d{4}\.\d{4,5})", path.read_text(encoding="utf-8"))
    }
    assert cited and cited <= {paper["url"].rpartition("/")[2] for paper in citation["references"]}


def test_the_changelog_has_the_version_that_the_package_says():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[([^\]]+)\]", text, flags=re.MULTILINE)
    assert sections[0] == "Unreleased" and (__version__ in sections or f"What will be {__version__}" in text)
