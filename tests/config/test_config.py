"""Recipes: what is accepted, and the exact sentence for everything that is not."""

import ast
import copy
import dataclasses
import enum
import importlib.util
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlhf.config.build import build_configs, complete_deepspeed, default_dtype
from rlhf.config.key_effects import REFUSED
from rlhf.config.keys import LATE_CHOICES
from rlhf.config.recipe import HARMLESS, Recipe, allowed_keys, load_recipe
from rlhf.config.stage_config import STAGES, TRAINING_STAGES, StageConfig
from rlhf.errors import UserError, quote

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))

# Four lines, so that the first key that a test adds stands in line 5.
BASE = "model_name_or_path: some/model\noutput_dir: runs/x\ndataset_name: some/data\n"
EVALUATE = "stage: evaluate\noutput_dir: o\ndataset_name: d\nsft_model: s\ndpo_model: d\n"


def write(folder, text, stage="sft"):
    """A whole recipe of `stage` with `text` from line 5 on; its path."""
    path = folder / f"{stage}.yaml"
    path.write_text(f"stage: {stage}\n{BASE}{text}", encoding="utf-8")
    return str(path)


def load(folder, text, stage="sft", words=()):
    return load_recipe(write(folder, text, stage), stage, list(words))


def error(path, stage="sft", words=()):
    """The sentence a user gets."""
    with pytest.raises(UserError) as caught:
        load_recipe(str(path), stage, list(words))
    return str(caught.value)


# --- the recipes of this project -------------------------------------------------------------------------------------


def test_configs_holds_recipes():
    assert len(RECIPES) >= 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_loads_for_the_stage_of_its_file_name(path):
    assert load_recipe(str(path), path.stem).get("stage") == path.stem


def test_loading_a_recipe_imports_no_torch():
    code = (
        "import sys; from rlhf.config.recipe import load_recipe; load_recipe('configs/quickstart/dpo.yaml', 'dpo');"
        "print([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_where_names_line_flag_or_file(tmp_path):
    recipe = load(tmp_path, "beta: 0.2\nseed: 1\n", "dpo", words=["--seed", "2"])
    assert recipe.where("beta") == f"{recipe.path}:5"
    assert recipe.where("seed") == "--seed"
    assert recipe.where("max_length") == recipe.path


# --- the keys are those of the installed libraries -------------------------------------------------------------------


def trl_classes(stage):
    import trl

    return {"sft": trl.SFTConfig, "reward": trl.RewardConfig, "dpo": trl.DPOConfig}[stage], trl.ModelConfig


@pytest.mark.parametrize("stage", TRAINING_STAGES)
def test_keys_are_the_fields_of_trl_and_of_stage_config(stage):
    classes = (*trl_classes(stage), StageConfig)
    fields = [field.name for config_class in classes for field in dataclasses.fields(config_class) if field.init]
    if stage == "sft":
        fields.remove("packing")  # ours takes the name of SFTConfig's, and means padding-free rows in every stage
    assert sorted(allowed_keys(stage)) == sorted(fields)  # sorted lists: a field in two classes would show


@pytest.mark.parametrize("stage", TRAINING_STAGES)
def test_closed_choices_are_those_of_trl(stage):
    """A field is closed by `metadata["choices"]` or by an enum in its annotation."""
    expected = {}
    for config_class in trl_classes(stage):
        hints = typing.get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            for part in typing.get_args(hints[field.name]):
                if isinstance(part, type) and issubclass(part, enum.Enum):
                    expected[field.name] = {member.value for member in part}
            if "choices" in field.metadata:
                expected[field.name] = set(field.metadata["choices"])
    if stage == "sft":
        expected["loss_type"].remove("chunked_nll")  # TRL 1.16: a deprecated alias of nll
    found = {name: set(allowed_keys(stage)[name].choices or ()) for name in expected}
    assert found == expected


def trl_source(file):
    folder = Path(importlib.util.find_spec("trl").submodule_search_locations[0])
    return ast.parse((folder / file).read_text(encoding="utf-8"))


def compared_with(tree, name, operator):
    """Constants that `name` (a variable or an attribute) is compared with by `operator`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], operator):
            if name in (getattr(node.left, "id", None), getattr(node.left, "attr", None)):
                found.append(ast.literal_eval(node.comparators[0]))
    return found


def test_dpo_losses_are_those_of_trl():
    losses = compared_with(trl_source("trainer/dpo_trainer.py"), "loss_type", ast.Eq)
    assert LATE_CHOICES["DPOConfig", "loss_type"] == tuple(losses)  # `if loss_type == "sigmoid": … elif …`


def test_dpo_divergences_are_those_of_trl():
    divergences = compared_with(trl_source("trainer/dpo_trainer.py"), "f_divergence_type", ast.Eq)
    assert LATE_CHOICES["DPOConfig", "f_divergence_type"] == tuple(divergences)


def test_sft_losses_are_those_of_trl():
    losses = compared_with(trl_source("trainer/sft_trainer.py"), "loss_type", ast.NotIn)
    assert losses == [LATE_CHOICES["SFTConfig", "loss_type"]]  # `if args.loss_type not in ("nll", "dft")`


def test_packing_strategies_are_those_of_trl():
    tree = trl_source("data_utils.py")
    found = [
        set(ast.literal_eval(node.value))
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "valid_strategies"
    ]
    assert found == [set(LATE_CHOICES["SFTConfig", "packing_strategy"])]


def test_late_choices_has_no_list_without_a_test():
    """Those of TrainingArguments are compared by `test_closed_choices_are_those_of_trl`, as they stand in its fields."""
    assert {key for key in LATE_CHOICES if key[0] != "TrainingArguments"} == {
        ("DPOConfig", "loss_type"),
        ("DPOConfig", "f_divergence_type"),
        ("SFTConfig", "loss_type"),
        ("SFTConfig", "packing_strategy"),
    }


@pytest.mark.parametrize("names", [REFUSED, HARMLESS], ids=["refused", "harmless"])
def test_refused_and_harmless_keys_exist(names):
    known = set().union(*(allowed_keys(stage) for stage in STAGES))
    assert set(names) - known <= {"chat_template_path", "logging_dir"}  # of older TRL and transformers


# --- keys ------------------------------------------------------------------------------------------------------------


def test_unknown_key_with_its_near_one(tmp_path):
    path = write(tmp_path, "seed: 1\nlearing_rate: 1.0e-4\n")
    assert error(path) == f"{path}:6: unknown key 'learing_rate'; did you mean 'learning_rate'?"


def test_unknown_key_with_no_near_one(tmp_path):
    path = write(tmp_path, "zzz: 1\n")
    assert error(path) == f"{path}:5: unknown key 'zzz'; `rlhf sft --keys` lists the keys of this stage"


@pytest.mark.parametrize(
    "stage, key, owner",
    [("sft", "beta", "dpo"), ("reward", "max_new_tokens", "evaluate"), ("dpo", "completion_only_loss", "sft")],
)
def test_key_of_another_stage(tmp_path, stage, key, owner):
    message = error(write(tmp_path, f"{key}: 1\n", stage), stage)
    assert f":5: unknown key '{key}'; it belongs to the {owner} stage, and this is a {stage} recipe" in message


def test_repeated_key(tmp_path):
    path = write(tmp_path, "seed: 1\nlora_r: 8\nseed: 2\n")
    assert error(path) == f"{path}:7: key 'seed' is set twice (first in line 5); keep one"


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_refused_key_says_why(tmp_path, key):
    path = write(tmp_path, f"{key}: x\n")
    assert error(path) == f"{path}:5: key '{key}' can't be set here: {REFUSED[key]}"


@given(key=st.text(max_size=40))
@settings(deadline=None)
def test_any_unknown_key_is_a_user_error_with_its_line(tmp_path_factory, key):
    assume(key not in allowed_keys("sft") and key not in REFUSED)
    path = write(tmp_path_factory.mktemp("recipe"), yaml.safe_dump({key: 1}))
    message = error(path)
    assert message.startswith(f"{path}:5: unknown key {quote(key)}")


@given(text=st.text(max_size=60))
@settings(deadline=None, max_examples=300)
def test_any_text_is_a_user_error(tmp_path_factory, text):
    """No text of 60 characters is a whole recipe (output_dir, model and data are missing), so it must be refused."""
    path = tmp_path_factory.mktemp("recipe") / "sft.yaml"
    path.write_bytes(f"stage: sft\n{text}".encode("utf-8", "surrogatepass"))
    assert str(path) in error(path)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, value",
    [
        ("learning_rate: 1e-4", 0.0001),  # YAML 1.1 takes 1e-4 for a text
        ("learning_rate: 1.0e-4", 0.0001),
        ("learning_rate: '3e-5'", 0.00003),
        ("learning_rate: 1", 1.0),
        ("lora_r: 16.0", 16),
        ("f_alpha_divergence_coef: -0.1", -0.1),
        ("max_length: null", None),
        ("use_peft: yes", True),
        ("bf16: no", False),
        ("save_strategy: no", "no"),  # YAML 1.1 takes no for false
        ("save_strategy: off", "no"),
        ("eval_strategy: 'no'", "no"),
        ("lora_target_modules: all-linear", ["all-linear"]),
        ("lora_target_modules: [q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("report_to: none", ["none"]),
        ("gradient_checkpointing_kwargs: {use_reentrant: false}", {"use_reentrant": False}),
        ("run_name: 'no'", "no"),
    ],
)
def test_value_is_read_in_the_type_of_its_key(tmp_path, line, value):
    more = {"lora": "use_peft: true\n", "f_al": "f_divergence_type: alpha_divergence\n"}.get(line[:4], "")
    stage = "dpo" if line.startswith("f_") else "sft"
    found = load(tmp_path, f"{line}\n{more}", stage).values[line.split(":")[0]]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "line, message",
    [
        ("lora_r: true", "'lora_r' is True; expected an integer"),
        ("lora_r: 1.5", "'lora_r' is 1.5; expected an integer"),
        ("lora_r: '16'", "'lora_r' is '16'; expected an integer"),
        ("lora_r: null", "'lora_r' is None; expected an integer"),
        ("max_steps: .inf", "'max_steps' is inf; expected an integer"),
        ("max_length: long", "'max_length' is 'long'; expected an integer or null"),
        ("learning_rate: fast", "'learning_rate' is 'fast'; expected a number"),
        ("learning_rate: true", "'learning_rate' is True; expected a number"),
        ("learning_rate: [1]", "'learning_rate' is [1]; expected a number"),
        ("learning_rate: .nan", "'learning_rate' is nan; expected a finite number"),
        ("learning_rate: 1e400", "'learning_rate' is '1e400'; expected a finite number"),
        ("use_peft: 1", "'use_peft' is 1; expected true or false"),
        ("use_peft: 'yes'", "'use_peft' is 'yes'; expected true or false"),
        ("run_name: [a]", "'run_name' is ['a']; expected a string or null"),
        ("run_name: 7", "'run_name' is 7; expected a string or null"),
        ("run_name: {a: 1}", "'run_name' is {'a': 1}; expected a string or null"),
        ("run_name: no", "'run_name' is False; expected a string or null"),
        ("lora_target_modules: 3", "'lora_target_modules' is 3; expected a list or null"),
        ("lora_target_modules: [q, 3]", "'lora_target_modules' is ['q', 3]; expected a list or null"),
        ("lr_scheduler_kwargs: [1]", "'lr_scheduler_kwargs' is [1]; expected a mapping or null"),
        ("lora_r: 0", "'lora_r' is 0; expected an integer from 1 to 16384"),
        (
            "learning_rate: -1.0",
            "'learning_rate' is -1.0; expected a number above 0 and at most 1 (1e-6 to 1e-3 is usual)",
        ),
    ],
)
def test_wrong_value(tmp_path, line, message):
    path = write(tmp_path, line + "\n")
    assert error(path) == f"{path}:5: {message}"


@pytest.mark.parametrize(
    "stage, line, message",
    [
        ("sft", "loss_type: dtf", "'loss_type' is 'dtf'; expected one of nll, dft; did you mean 'dft'?"),
        ("sft", "loss_type: 1", "'loss_type' is 1; expected a string"),
        ("sft", "bnb_4bit_quant_type: int8", "'bnb_4bit_quant_type' is 'int8'; expected one of fp4, nf4"),
        ("sft", "dtype: no", "'dtype' is 'no'; expected one of auto, bfloat16, float16, float32"),
        ("dpo", "loss_type: sigmoyd", "; did you mean 'sigmoid'?"),
        ("dpo", "loss_type: [sigmoid, hing]", "'loss_type' is 'hing'; expected one of sigmoid, hinge, "),
        ("dpo", "lr_scheduler_type: cosin", "; did you mean 'cosine'?"),
    ],
)
def test_value_outside_the_choices(tmp_path, stage, line, message):
    found = error(write(tmp_path, line + "\n", stage), stage)
    assert f"{stage}.yaml:5: " in found and message in found


@pytest.mark.parametrize("value", ["2024-13-45", "0x_", "!!int many", "2024-02-30 10:00:00"])
def test_value_that_yaml_itself_chokes_on(tmp_path, value):
    """They look like a date or a number to YAML, and are none."""
    path = write(tmp_path, f"run_name: {value}\n")
    assert error(path).startswith(f"{path}:5:")


# --- the file --------------------------------------------------------------------------------------------------------


def test_bad_yaml_names_line_and_column(tmp_path):
    path = write(tmp_path, "  seed: 1\n")  # an indented line goes on with line 4, and "  seed" has 6 characters
    assert error(path) == f"{path}:5:7: not valid YAML: mapping values are not allowed here"


def test_control_character(tmp_path):
    path = write(tmp_path, "run_name: a\x07b\n")
    assert error(path).startswith(f"{path}:5")


def test_two_documents(tmp_path):
    path = write(tmp_path, "---\nseed: 1\n")
    assert error(path) == f"{path}:5:1: not valid YAML: but found another document"


@pytest.mark.parametrize("text", ["", "# only a remark\n", "- a\n- b\n", "just words\n"])
def test_no_mapping(tmp_path, text):
    path = tmp_path / "sft.yaml"
    path.write_text(text)
    assert error(path) == f"{path}:1: a recipe is a list of `key: value` lines; found none"


def test_not_utf8(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_bytes(b"stage: sft\nrun_name: caf\xe9\n")  # 11 bytes in the first line, then 13 before the é
    assert error(path) == f"{path}: not UTF-8 text (byte 24); save the recipe as UTF-8"


def test_byte_order_mark_is_no_mistake(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("\ufeffstage: sft\n" + BASE, encoding="utf-8")
    assert load_recipe(str(path), "sft").get("stage") == "sft"


def test_missing_file_lists_the_near_recipes(tmp_path):
    for name in ("sft.yaml", "dpo.yaml", "notes.txt"):
        (tmp_path / name).write_text("")
    path = tmp_path / "spt.yaml"
    assert error(path) == f"no recipe at {path}; in {tmp_path} there are {tmp_path}/dpo.yaml, {tmp_path}/sft.yaml"


def test_missing_folder_points_to_configs(tmp_path):
    path = tmp_path / "none" / "sft.yaml"
    assert error(path) == f"no recipe at {path}; this project's recipes are in configs/"


def test_recipe_of_another_stage(tmp_path):
    path = write(tmp_path, "", stage="dpo")
    assert error(path, "sft") == f"{path}:1: this is a recipe for `rlhf dpo`, not for `rlhf sft`"


def test_stage_that_does_not_exist(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("stage: dop\n" + BASE)
    assert error(path) == f"{path}:1: 'stage' is 'dop'; expected one of sft, reward, dpo, evaluate; did you mean 'dpo'?"


def test_missing_stage(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(BASE)
    assert error(path) == f"{path}:1: the recipe has no stage; add the line `stage: sft` (if that is its stage)"


def test_command_line_can_not_change_the_stage(tmp_path):
    assert error(write(tmp_path, ""), words=["--stage", "dpo"]).endswith("for `rlhf dpo`, not for `rlhf sft`")


# --- keys that must be there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["output_dir", "model_name_or_path", "dataset_name"])
@pytest.mark.parametrize("stage", TRAINING_STAGES)
def test_missing_key_of_a_training_recipe(tmp_path, stage, key):
    path = tmp_path / f"{stage}.yaml"
    kept = [line for line in BASE.splitlines(keepends=True) if not line.startswith(key)]
    path.write_text(f"stage: {stage}\n" + "".join(kept))
    assert error(path, stage).startswith(f"{path}: key '{key}' is missing; it ")


@pytest.mark.parametrize(
    "without, message",
    [
        ("output_dir", "key 'output_dir' is missing; it names the folder for the results"),
        ("dataset_name", "key 'dataset_name' is missing; it names the held-out preference pairs"),
        ("sft_model", "nothing to evaluate; set 'sft_model' and 'dpo_model' and/or 'reward_model', or 'models'"),
        ("dpo_model", "nothing to evaluate; set 'sft_model' and 'dpo_model' and/or 'reward_model', or 'models'"),
    ],
)
def test_missing_key_of_an_evaluate_recipe(tmp_path, without, message):
    path = tmp_path / "evaluate.yaml"
    path.write_text("".join(line for line in EVALUATE.splitlines(keepends=True) if not line.startswith(without)))
    assert error(path, "evaluate") == f"{path}: {message}"


def test_an_address_is_no_output_folder(tmp_path):
    path = tmp_path / "evaluate.yaml"
    path.write_text(re.sub("output_dir: .*", "output_dir: s3://bucket/run", EVALUATE))
    assert "output_dir s3://bucket/run is not a folder; train into one and copy it" in error(path, "evaluate")


def test_whole_evaluate_recipe_loads(tmp_path):
    path = tmp_path / "evaluate.yaml"
    path.write_text(EVALUATE)
    assert load_recipe(str(path), "evaluate").get("dpo_model") == "d"


BOTH_FILES = "chosen_dataset_name: a\nrejected_dataset_name: b\n"
HALF = "give either 'dataset_name', or both 'chosen_dataset_name' and 'rejected_dataset_name'"


@pytest.mark.parametrize(
    "data",
    [
        "chosen_dataset_name: a\n",
        "rejected_dataset_name: a\n",
        f"dataset_name: d\n{BOTH_FILES}",
    ],
)
def test_chosen_and_rejected_files_come_together_and_alone(tmp_path, data):
    path = tmp_path / "dpo.yaml"
    path.write_text(f"stage: dpo\nmodel_name_or_path: m\noutput_dir: o\n{data}")
    assert error(path, "dpo") == f"{path}: {HALF}"


def test_chosen_and_rejected_files_instead_of_one(tmp_path):
    path = tmp_path / "dpo.yaml"
    path.write_text(f"stage: dpo\nmodel_name_or_path: m\noutput_dir: o\n{BOTH_FILES}")
    assert load_recipe(str(path), "dpo").get("rejected_dataset_name") == "b"


def test_sft_takes_no_chosen_and_rejected_files(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(f"stage: sft\nmodel_name_or_path: m\noutput_dir: o\n{BOTH_FILES}")
    assert error(path) == f"{path}:4: sft takes 'dataset_name', not chosen and rejected files"


# --- the command line over the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, key, value",
    [
        (["--lora_r", "8"], "lora_r", 8),
        (["--lora_r=8"], "lora_r", 8),
        (["--lora-r", "8"], "lora_r", 8),
        (["--lora-r=8"], "lora_r", 8),
        (["--use_peft"], "use_peft", True),
        (["--use_peft", "--lora_r", "8"], "use_peft", True),
        (["--use_peft", "false"], "use_peft", False),
        (["--weight_decay", "0.5"], "weight_decay", 0.5),
        (["--weight_decay=0.5"], "weight_decay", 0.5),
        (["--max_steps=-1"], "max_steps", -1),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--learning_rate", "1e-4"], "learning_rate", 0.0001),
        (["--lora_target_modules", "[q_proj, v_proj]"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--lora_target_modules=q_proj"], "lora_target_modules", ["q_proj"]),
        (["--run_name", "a=b"], "run_name", "a=b"),
        (["--run_name=a=b"], "run_name", "a=b"),
        (["--run_name", "[half"], "run_name", "[half"),
        (["--run_name="], "run_name", None),
        (["--max_length", "null"], "max_length", None),
    ],
)
def test_override(tmp_path, words, key, value):
    more = [] if "--use_peft" in words else ["--use_peft"]
    found = load(tmp_path, "seed: 7\n", words=[*words, *more]).values[key]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("value", ["2024-13-45", "2024-01-02", "007", "a: b"])
def test_override_of_a_text_is_taken_as_it_is_typed(tmp_path, value):
    """A shell has taken the quotes away that would tell YAML that 007 is a text."""
    assert load(tmp_path, "", words=["--run_name", value]).values["run_name"] == value


def test_override_wins_over_the_file(tmp_path):
    assert load(tmp_path, "seed: 7\n", words=["--seed", "8"]).values["seed"] == 8


@pytest.mark.parametrize(
    "words, message",
    [
        (["seed"], "unexpected 'seed' on the command line; recipe keys are given as --key value"),
        (["-s", "1"], "unexpected '-s' on the command line; recipe keys are given as --key value"),
        (["--"], "unexpected '--' on the command line; recipe keys are given as --key value"),
        (["--seed", "1", "2"], "unexpected '2' on the command line; recipe keys are given as --key value"),
        (["--learing_rate", "1"], "--learing_rate: unknown key 'learing_rate'; did you mean 'learning_rate'?"),
        (["--lora_r", "many"], "--lora_r: 'lora_r' is 'many'; expected an integer"),
        (["--lora_r"], "--lora_r: 'lora_r' is True; expected an integer"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice on the command line; keep one"),
        (["--max-length=8", "--max_length", "9"], "--max_length is given twice on the command line; keep one"),
        (["--hub-token=abc"], f"--hub_token: key 'hub_token' can't be set here: {REFUSED['hub_token']}"),
    ],
)
def test_wrong_override(tmp_path, words, message):
    assert error(write(tmp_path, ""), words=words) == message


WORDS = st.text(max_size=12) | st.sampled_from(["--seed", "--run_name", "--output-dir", "2024-13-45", "0x_", "[", "-1"])


@given(words=st.lists(WORDS | st.builds("--{}={}".format, WORDS, WORDS), min_size=1, max_size=4))
@settings(deadline=None)
def test_any_command_line_loads_or_is_a_user_error(tmp_path_factory, words):
    path = write(tmp_path_factory.mktemp("recipe"), "")
    try:
        recipe = load_recipe(path, "sft", words)
    except UserError:
        return
    assert set(recipe.values) <= set(allowed_keys("sft"))


# --- from a recipe to TRL's classes ----------------------------------------------------------------------------------


def test_each_key_reaches_the_class_that_owns_it(tmp_path):
    recipe = load(tmp_path, "beta: 0.25\nuse_peft: true\nlora_r: 4\nchat_template: chatml\nuse_cpu: true\n", "dpo")
    training, model, stage = build_configs(recipe)
    assert (training.beta, model.lora_r, stage.chat_template) == (0.25, 4, "chatml")


def test_cpu_trains_in_full_precision(tmp_path):
    training, _, _ = build_configs(load(tmp_path, "use_cpu: true\n"))
    assert (training.bf16, training.fp16, training.dataloader_pin_memory) == (False, False, False)


def test_deepspeed_sums_in_fp32_unless_its_config_says_otherwise():
    filled = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    for stage in (2, 3):
        config = {"zero_optimization": {"stage": stage}}
        complete_deepspeed(config)
        assert config == filled | {"zero_optimization": {"stage": stage, "reduce_bucket_size": 50_000_000}}
    config = {"zero_optimization": {"stage": 1}}
    complete_deepspeed(config)
    assert "data_types" not in config
    given = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 7}, "communication_data_type": "bf16",
             "data_types": {"grad_accum_dtype": "bf16"}}  # fmt: skip
    config = copy.deepcopy(given)
    complete_deepspeed(config)
    assert config == given


def test_what_trl_refuses_names_the_recipe(tmp_path):
    recipe = load(tmp_path, "tf32: true\nuse_cpu: true\n")
    with pytest.raises(UserError) as caught:
        build_configs(recipe)
    assert str(caught.value).startswith(f"{recipe.path}: --tf32 requires Ampere")


# --- the dtype that weights load in ----------------------------------------------------------------------------------


def test_a_gpu_that_only_emulates_bf16_trains_in_fp32(monkeypatch):
    """torch says that a V100 or T4 supports bf16, unless it is asked for the hardware."""
    import torch

    from rlhf.config.build import _set_precision

    found = []
    for emulates in (False, True):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, e=emulates: including_emulation or not e
        )
        _set_precision(training := {}, Recipe("dpo", "r.yaml", {}, {}))
        found.append(training["bf16"])
    assert found == [True, False]


@pytest.mark.parametrize(
    ("values", "on_cpu", "bf16", "dtype"),
    [
        ({"use_peft": True}, False, True, "auto"),  # a frozen base: its checkpoint's
        ({"use_peft": True, "load_in_4bit": True}, False, True, "bfloat16"),  # what 4 bits compute in
        ({"use_peft": True, "dtype": "float32"}, False, True, None),  # the recipe decides
        ({"use_peft": True}, True, True, None),  # a CPU: float32, TRL's default
        ({"use_peft": True}, False, False, None),  # a GPU without bfloat16
        ({}, False, True, None),  # full fine-tuning: float32 masters
    ],
)
def test_default_dtype(values, on_cpu, bf16, dtype):
    assert default_dtype(Recipe("dpo", "r.yaml", values, {}), on_cpu, bf16) == dtype


@pytest.mark.parametrize("stage", TRAINING_STAGES)
def test_listed_defaults_are_those_of_build_configs(stage):
    """Not the libraries', where `build_configs` replaces them."""
    keys = allowed_keys(stage)
    assert keys["dtype"].default.startswith("float32; with LoRA on a GPU") and "float32'" not in keys["dtype"].help
    assert (keys["report_to"].default, keys["use_cpu"].default) == ("none", "True without a GPU")
