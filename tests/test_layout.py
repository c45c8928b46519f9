"""The house keeps its order: imports go one way, the command line is quick, launch files and the pipeline hold."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf.__main__ import main, parser

ROOT = Path(__file__).parent.parent
LAUNCH_FILES = sorted((ROOT / "launch").glob("*.yaml"))
COMMANDS = sorted(next(a for a in parser()._actions if a.dest == "command").choices)


# --- who may import whom ---------------------------------------------------------------------------------------------

# A folder (or a file beside them) may import only from those above it.
ORDER = ("errors", "files", "upstream", "config", "data", "distributed", "console", "models", "packing", "runs", "training",
         "curation", "inference", "evaluation", "rounds", "preflight", "bundle", "api", "__main__")  # fmt: skip


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted((ROOT / "rlhf").rglob("*.py"))}


def imported(source):
    """Modules of this package that a source text imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & set(MODULES)) or {node.module}  # `from rlhf import models`, `from rlhf.files import Lock`
    return {name for name in found if name.split(".")[0] == "rlhf"}


@pytest.mark.parametrize(
    "source, names",
    [
        ("import rlhf.config", {"rlhf.config"}),
        ("from rlhf import config, models", {"rlhf.config", "rlhf.models"}),
        ("from rlhf import __version__", {"rlhf"}),
        ("def f():\n    from rlhf.data.sources import Source", {"rlhf.data.sources"}),
        ("import torch, yaml\nfrom pathlib import Path", set()),
    ],
)
def test_imports_are_found(source, names):
    assert imported(source) == names


IMPORTS = {name: imported(path.read_text(encoding="utf-8")) - {name, "rlhf"} for name, path in MODULES.items()}


def room(module):
    return module.split(".")[1]


def test_every_folder_has_its_place():
    assert {room(name) for name in MODULES if name != "rlhf"} == set(ORDER)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "rlhf"])
def test_a_folder_imports_only_from_those_above_it(name):
    others = {other for other in IMPORTS[name] if room(other) != room(name)}
    assert {other for other in others if ORDER.index(room(other)) > ORDER.index(room(name))} == set()


@pytest.mark.parametrize("folder", ORDER)
def test_no_cycle_inside_a_folder(folder):
    inside = {
        name: {n for n in IMPORTS[name] if room(n) == folder}
        for name in MODULES
        if name != "rlhf" and room(name) == folder
    }
    assert tuple(graphlib.TopologicalSorter(inside).static_order())  # CycleError names the files


def test_trainers_are_typed_where_a_run_hands_them_on():
    """mypy looks into a function's body only as far as it knows what it is given."""
    missing = [
        f"{name}.{node.name}"
        for name, path in MODULES.items() if room(f"{name}.") == "training"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
        for argument in node.args.args if argument.arg in ("trainer", "plan", "stage") and argument.annotation is None
    ]  # fmt: skip
    assert missing == []


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_command(command):
    assert f"\n  rlhf {command} " in parser().format_help()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert (done.value.code, capsys.readouterr().out.split("\n")[0].startswith(f"usage: rlhf {command} ")) == (0, True)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("sft", "Run an SFT recipe."),
        ("reward", "Run a reward-model recipe."),
        ("dpo", "Run a DPO recipe."),
        ("evaluate", "Run an evaluation recipe."),
    ],
)
def test_help_is_grammatical(command, sentence, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert sentence in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    """And so it is there at once: its imports are argparse's and few more."""
    heavy = ("torch", "transformers", "trl", "datasets", "accelerate", "peft", "numpy", "matplotlib", "yaml")
    code = (
        f"import sys, rlhf.__main__ as m; m.main([]); print([m for m in {heavy} if m in sys.modules], len(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    found, number = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert (found, done.returncode) == ("[]", 0) and int(number) < 200, done.stdout + done.stderr


def test_mistake_is_one_sentence_and_exit_code_2(capsys, tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("stage: sft\nlearing_rate: 1\n")
    assert main(["sft", str(path)]) == 2
    expected = f"rlhf: {path}:2: unknown key 'learing_rate'; did you mean 'learning_rate'?\n"
    assert capsys.readouterr() == ("", expected)


def test_mistake_is_told_by_the_first_process_only(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert (main(["sft", "none.yaml"]), capsys.readouterr().err) == (2, "")


def test_missing_recipe_names_one(capsys):
    assert main(["dpo"]) == 2
    assert capsys.readouterr().err == "rlhf: no recipe given; for example: rlhf dpo configs/quickstart/dpo.yaml\n"


def test_no_command_shows_the_help(capsys):
    assert (main([]), capsys.readouterr().out) == (0, parser().format_help())


@pytest.mark.parametrize(
    "words", [["--beta", "-1"], ["--beta=-1"], ["--no-such", "x", "--use_peft"], ["--run_name", "a b"]]
)
def test_recipe_keys_on_the_command_line_are_left_for_the_recipe(words):
    options, rest = parser().parse_known_args(["dpo", "r.yaml", *words])
    assert (options.recipe, rest) == ("r.yaml", words)


def test_other_commands_take_no_recipe_keys(capsys):
    with pytest.raises(SystemExit) as done:
        main(["report", "runs/x", "--beta", "1"])
    assert done.value.code == 2
    assert capsys.readouterr().err.endswith("unknown argument '--beta'; see `rlhf report --help`\n")


def test_keys_lists_types_and_choices_and_no_refused_key(capsys):
    assert main(["dpo", "--keys"]) == 0
    shown = capsys.readouterr().out
    lines = {line.split()[1]: line.split(maxsplit=2) for line in shown.splitlines() if not line.startswith(" ")}
    bounds = "above 0 and at most 1000 (0.01 to 1 is usual)"
    assert lines["beta"] == ["DPOConfig", "beta", f"float  {bounds}  default: 0.1"]
    assert lines["bnb_4bit_quant_type"][2] == "str  one of: fp4, nf4  default: 'nf4'"
    assert lines["global_batch_size"][2].endswith("default: None")
    assert "deepspeed" not in lines and "label_smoothing_factor" not in lines
    assert "Parameter controlling the deviation from the reference model." in shown


def test_keys_takes_a_name(capsys):
    assert main(["dpo", "--keys", "beta"]) == 0
    lines = [line.split()[1] for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert lines == ["adam_beta1", "adam_beta2", "beta"]
    assert main(["dpo", "--keys", "lora_rank"]) == 2
    assert capsys.readouterr().err == "rlhf: no key 'lora_rank' in dpo: use lora_r\n"


# --- launch files ----------------------------------------------------------------------------------------------------


def test_launch_holds_files():
    assert {"cpu.yaml", "single.yaml", "ddp.yaml"} <= {path.name for path in LAUNCH_FILES}


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda p: p.name)
def test_accelerate_reads_every_launch_file(path):
    """Accelerate's own loader raises on unknown keys."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]


# --- the pipeline ----------------------------------------------------------------------------------------------------


def pipeline(*words, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "pipeline.sh"), *map(str, words)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip


def test_pipeline_is_bash():
    done = subprocess.run(["bash", "-n", str(ROOT / "launch" / "pipeline.sh")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_pipeline_may_be_executed():
    assert os.access(ROOT / "launch" / "pipeline.sh", os.X_OK)


def test_pipeline_without_arguments_shows_its_usage():
    done = pipeline()
    lines = done.stdout.splitlines()
    assert (done.returncode, lines[0], lines[-1]) == (
        2,
        "Run the stages of a recipe folder in order: sft -> reward -> dpo -> evaluate -> report.",
        "environment's, or else that of .venv beside this folder.",
    )


def test_pipeline_with_a_missing_folder(tmp_path):
    done = pipeline(tmp_path / "none")
    message = f"pipeline: no recipe folder at {tmp_path}/none; try configs/quickstart\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_pipeline_with_a_missing_launch_file(tmp_path):
    done = pipeline(tmp_path, tmp_path / "none.yaml")
    message = (
        f"pipeline: no launch file at {tmp_path}/none.yaml; launch/ has {' '.join(p.name for p in LAUNCH_FILES)}\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_pipeline_with_a_folder_without_recipes(tmp_path):
    done = pipeline(tmp_path)
    message = f"pipeline: {tmp_path} has none of sft.yaml, reward.yaml, dpo.yaml, evaluate.yaml\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.fixture
def recorded(tmp_path):
    """Run the pipeline over empty recipes with a stand-in for Python, and tell what that was asked to do."""

    def run(stages, *words, fails_at="nothing", stopped_at="nothing"):
        folder = tmp_path / "my recipes"  # a space, since users have them
        folder.mkdir()
        for stage in stages:
            (folder / f"{stage}.yaml").write_text("")
        python, log = tmp_path / "python", tmp_path / "log"
        python.write_text(
            f'#!/bin/sh\necho "$*" >> "{log}"\ncase "$*" in *"{fails_at}") exit 2 ;; esac\n'
            f'case "$*" in *" -m rlhf "*"{stopped_at}") touch "$RLHF_STOP_FILE.done" ;; esac\n'
        )
        python.chmod(0o755)
        done = pipeline(folder, *words, PYTHON=str(python))
        return done.returncode, [line.replace(str(folder), "R") for line in log.read_text().splitlines()]

    return run


STAGES = ("sft", "reward", "dpo", "evaluate")


def test_pipeline_checks_all_recipes_and_then_runs_the_stages_in_order(recorded):
    expected = [f"-m rlhf {stage} R/{stage}.yaml --check" for stage in STAGES]
    for stage in STAGES:
        expected += [f"-m rlhf {stage} R/{stage}.yaml --check", f"-m rlhf {stage} R/{stage}.yaml"]
    assert recorded(reversed(STAGES)) == (0, [*expected, "-m rlhf report R"])


def test_pipeline_runs_only_the_stages_that_have_a_recipe(recorded):
    check, train = "-m rlhf dpo R/dpo.yaml --check", "-m rlhf dpo R/dpo.yaml"
    assert recorded(["dpo"]) == (0, [check, check, train, "-m rlhf report R"])


def test_pipeline_trains_through_accelerate_with_a_launch_file(recorded):
    code, calls = recorded(["sft"], ROOT / "launch" / "ddp.yaml", "--num_processes", "4")
    launch = f"-m accelerate.commands.launch --config_file {ROOT}/launch/ddp.yaml --num_processes 4 -m rlhf"
    assert (code, calls[2]) == (0, f"{launch} sft R/sft.yaml")


def test_pipeline_trains_nothing_if_a_later_recipe_is_wrong(recorded):
    code, calls = recorded(STAGES, fails_at="dpo.yaml --check")
    assert (code, calls) == (2, [f"-m rlhf {stage} R/{stage}.yaml --check" for stage in ("sft", "reward", "dpo")])


def test_pipeline_stops_at_the_stage_that_fails(recorded):
    code, calls = recorded(["sft", "dpo"], fails_at="sft.yaml")
    assert (code, calls[-1]) == (2, "-m rlhf sft R/sft.yaml")


def test_pipeline_ends_with_the_stage_that_was_stopped(recorded):
    """Under a launcher, which knows success and failure only: the stage ends with 0, and says by a file that it was stopped."""
    code, calls = recorded(["sft", "dpo"], ROOT / "launch" / "ddp.yaml", stopped_at="sft.yaml")
    assert code == 85 and calls[-1].endswith(" -m rlhf sft R/sft.yaml") and calls[-1].startswith("-m accelerate")


def test_a_check_starts_without_torch():
    """A mistake in a recipe or its data costs a second; torch takes several."""
    code = "import sys, rlhf.training.run, rlhf.data.rows, rlhf.evaluation.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
