"""Recipe YAML -> validated keys -> TRL's own config classes.

A recipe is flat: `key: value`. The keys are the fields of TRL's SFTConfig, RewardConfig or DPOConfig, of TRL's
ModelConfig, and of the small dataclasses below for what those lack. Everything is checked here, with the file and the
line, before torch is even imported: the names, types and choices of TRL's fields are read from the source of the
installed version (`_library_keys`), so that a misspelt key costs a user half a second and not a model load.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib.util
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf.errors import UserError, pip_install, quote  # noqa: F401

STAGES = ("sft", "reward", "dpo", "evaluate")
TRAINING_STAGES = ("sft", "reward", "dpo")


@dataclass
class StageConfig:
    """What SFT, reward and DPO recipes need beyond TRL's classes."""

    stage: str = field(default="", metadata={"choices": list(STAGES), "help": "Which stage this recipe is for."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, directory, or .jsonl/.json/.csv/.parquet file, or embedded:sample."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Held-out split of the same data set."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out data from another place."})
    chosen_dataset_name: str | None = field(
        default=None, metadata={"help": "Accepted answers (prompt, response), joined by prompt with the rejected ones."}
    )
    rejected_dataset_name: str | None = field(default=None, metadata={"help": "Rejected answers (prompt, response)."})
    max_train_examples: int | None = field(default=None, metadata={"help": "Use only the first N training rows."})
    max_eval_examples: int | None = field(default=None, metadata={"help": "Use only the first N held-out rows."})
    chat_template: str | None = field(
        default=None,
        metadata={"help": "alpaca, chatml or a .jinja file; default: the model's own, alpaca where it has none."},
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "Compute on one row without padding, in which a pair shares its prompt (same numbers, faster)."
        },
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples an optimizer step, over all processes; replaces per_device_train_batch_size and "
            "gradient_accumulation_steps. The same steps on any number of processes."
        },
    )
    max_tokens_per_device: int = field(
        default=4096, metadata={"help": "With global_batch_size: packed tokens a process computes at a time at most."}
    )
    reference: str = field(
        default="cached",
        metadata={
            "choices": ["cached", "online", "nf4"],
            "help": "DPO: the policy's log-probabilities before its first update, computed once and kept on disk "
            "(cached); the reference's pass in every step (online); or that of a second model in 4 bits (nf4).",
        },
    )
    reference_model: str | None = field(
        default=None,
        metadata={"help": "DPO with `reference: nf4`: another model than the policy before its first update."},
    )
    max_reference_bias_nats: float = field(
        default=1.0,
        metadata={
            "help": "DPO with `reference: nf4`: stop if quantising moves an answer's log-probability by more on average."
        },
    )
    reference_cache: str | None = field(
        default=None,
        metadata={"help": "DPO: folder for cached reference log-probabilities; default: the user's cache."},
    )
    max_gradient_spike: float = field(
        default=1000.0,
        metadata={"help": "End a run whose gradient norm is more than so many times its median of late; 0: never."},
    )
    watchdog_minutes: float = field(
        default=30.0,
        metadata={"help": "End a run whose step hangs for so long, with the stacks of all processes; 0: never."},
    )
    portable_checkpoints: bool | None = field(
        default=None,
        metadata={
            "help": "Save the training state in one piece, not as DeepSpeed or FSDP splits it, so that the run can go on under "
            "any launch file; default: with LoRA."
        },
    )
    continue_adapter: bool = field(
        default=True,
        metadata={"help": "The input model is a LoRA adapter: train it further (true) or merge it first (false)."},
    )
    merge_adapter: bool | None = field(
        default=None,
        metadata={"help": "Write the finished model merged (true) or as an adapter; default: merged unless 4/8-bit."},
    )


@dataclass
class EvaluateConfig:
    """Keys of an evaluate recipe."""

    stage: str = field(default="", metadata={"choices": list(STAGES)})
    base_model: str | None = field(default=None, metadata={"help": "The model before SFT."})
    sft_model: str | None = field(default=None, metadata={"help": "Output of the sft stage."})
    reward_model: str | None = field(default=None, metadata={"help": "Output of the reward stage."})
    dpo_model: str | None = field(default=None, metadata={"help": "Output of the dpo stage."})
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_test_split: str = "test"
    max_eval_examples: int | None = None
    output_dir: str | None = None
    max_new_tokens: int = 96
    max_length: int = 1024
    num_shown: int = field(default=3, metadata={"help": "Prompts answered side by side by base, SFT and DPO."})
    batch_size: int = field(default=16, metadata={"help": "Prompts generated, or pairs scored, at a time."})
    dtype: str = field(default="float32", metadata={"choices": ["float32", "bfloat16", "float16"]})
    use_cpu: bool = False
    seed: int = 42


@dataclass(frozen=True)
class Key:
    """One allowed key: its type as an annotation string, its allowed values (if closed) and the class that owns it."""

    name: str
    annotation: str
    choices: tuple | None
    owner: str


# Values that TRL and transformers check only after a model has loaded. tests/test_config.py compares each list with
# the installed library.
_LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
LATE_CHOICES = {
    ("TrainingArguments", "log_level"): _LOG_LEVELS,
    ("TrainingArguments", "log_level_replica"): _LOG_LEVELS,
    ("DPOConfig", "loss_type"): (
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    ),
    ("DPOConfig", "f_divergence_type"): ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    ("SFTConfig", "loss_type"): ("nll", "dft"),
    ("SFTConfig", "packing_strategy"): ("bfd", "bfd_split", "wrapped"),
}  # fmt: skip

# Keys that the stage decides or that make no sense in a recipe.
REFUSED = {
    "lora_task_type": "the stage sets it",
    "chat_template_path": "use chat_template, which takes a name or a .jinja file",
    "pad_token": "a dedicated pad token is chosen for the model",
    "model_init_kwargs": "use dtype, attn_implementation, model_revision or trust_remote_code",
    "deepspeed": "hardware belongs into a launch file: accelerate launch --config_file launch/...",
    "fsdp": "hardware belongs into a launch file: accelerate launch --config_file launch/...",
    "fsdp_config": "hardware belongs into a launch file: accelerate launch --config_file launch/...",
    "padding_free": "use packing, which is padding-free in every stage; TRL's flag is switched off for DPO in 1.16",
    "packing_strategy": "packing here lays each batch out in one row; TRL's packing of several examples is not used",
    "eval_packing": "packing here lays each batch out in one row; TRL's packing of several examples is not used",
    "precompute_ref_log_probs": "use `reference: cached`, the default, which keeps them on disk; or `reference: online`",
    "precompute_ref_batch_size": "batches of the reference pass are laid out by length",
    "hub_token": "a token in a recipe would end up in files; log in with `hf auth login` or set HF_TOKEN",
}

# Keys in which two runs of the same folder may differ: they change what is shown or how fast, not what is learnt.
HARMLESS = frozenset(
    "logging_steps logging_first_step logging_strategy logging_dir report_to run_name disable_tqdm log_level "
    "log_level_replica save_steps save_total_limit save_strategy eval_steps eval_strategy dataloader_num_workers "
    "dataloader_pin_memory dataset_num_proc per_device_eval_batch_size output_dir max_tokens_per_device "
    "reference_cache watchdog_minutes max_gradient_spike portable_checkpoints".split()
)


@dataclass
class Recipe:
    """A validated recipe: `values` as given (file plus command line), and where each came from."""

    stage: str
    path: str
    values: dict[str, Any]
    lines: dict[str, int | None]

    def where(self, key: str) -> str:
        """`file:line` of a key, the command line's flag, or the file alone where the key is not set."""
        if key not in self.lines:
            return self.path
        line = self.lines[key]
        return f"{self.path}:{line}" if line else f"--{key}"

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)


def load_recipe(path: str, stage: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and the command line's `--key value` pairs over it.

    Raises:
        UserError: no such file, bad YAML, unknown or repeated key, wrong type, value outside the choices, a recipe of
            another stage; each with file, line and the nearest valid key or value.
    """
    values, lines = _read_yaml(path)
    found = values.get("stage")
    if found is None:
        raise UserError(f"{path}:1: the recipe does not say its stage; add the line `stage: {stage}` (if it is one)")
    if found in STAGES and found != stage:
        raise UserError(f"{path}:{lines['stage']}: this is a recipe for `rlhf {found}`, not for `rlhf {stage}`")
    keys = allowed_keys(stage)
    for key, word in _read_overrides(overrides or []).items():
        values[key], lines[key] = _read_word(word, keys.get(key)), None
    if values["stage"] in STAGES and values["stage"] != stage:
        raise UserError(f"--stage: this is a recipe for `rlhf {values['stage']}`, not for `rlhf {stage}`")
    recipe = Recipe(stage, path, values, lines)
    for key in list(values):
        if key in REFUSED:
            raise UserError(f"{recipe.where(key)}: key '{key}' can't be set here: {REFUSED[key]}")
        if key not in keys:
            raise UserError(f"{recipe.where(key)}: unknown key '{key}'{_hint(key, stage, keys)}")
        values[key] = _check(recipe.where(key), keys[key], values[key])
    _check_required(recipe)
    return recipe


def stage_of(path: str) -> str:
    """Which stage a recipe is for.

    Raises:
        UserError: no such file, bad YAML, or it doesn't say.
    """
    values, lines = _read_yaml(path)
    if values.get("stage") not in STAGES:
        place = f"{path}:{lines.get('stage', 1)}"
        raise UserError(f"{place}: the recipe does not say its stage; add a line `stage: ` with {', '.join(STAGES)}")
    return values["stage"]


def _check_required(recipe: Recipe) -> None:
    if not recipe.get("output_dir"):
        raise UserError(f"{recipe.path}: key 'output_dir' is missing; it says where the results go")
    if "://" in str(recipe.get("output_dir")):  # checkpoints are renamed into place, which no object storage can do
        raise UserError(
            f"{recipe.where('output_dir')}: output_dir {recipe.get('output_dir')} is no folder; train into one, and copy it to "
            "object storage (docker/README.md has the commands)"
        )
    if recipe.stage == "evaluate":
        if not recipe.get("dataset_name"):
            raise UserError(f"{recipe.path}: key 'dataset_name' is missing; it names the held-out preference pairs")
        if not recipe.get("sft_model") or not (recipe.get("dpo_model") or recipe.get("reward_model")):
            raise UserError(
                f"{recipe.path}: nothing to evaluate; set 'sft_model' and 'dpo_model' and/or 'reward_model'"
            )
        return
    if not recipe.get("model_name_or_path"):
        raise UserError(f"{recipe.path}: key 'model_name_or_path' is missing; it names the model to start from")
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if recipe.get("global_batch_size") and recipe.get(key):
            raise UserError(
                f"{recipe.where(key)}: {key} and global_batch_size say the same in two ways; remove {key} "
                "(max_tokens_per_device bounds what a process computes at a time)"
            )
    halves = [bool(recipe.get(f"{side}_dataset_name")) for side in ("chosen", "rejected")]
    if any(halves) and (not all(halves) or recipe.get("dataset_name")):
        raise UserError(
            f"{recipe.path}: give either 'dataset_name', or both 'chosen_dataset_name' and 'rejected_dataset_name'"
        )
    if any(halves) and recipe.stage == "sft":
        raise UserError(
            f"{recipe.where('chosen_dataset_name')}: sft takes 'dataset_name', not chosen and rejected files"
        )
    if not any(halves) and not recipe.get("dataset_name"):
        raise UserError(f"{recipe.path}: key 'dataset_name' is missing; it names the training data")


def _read_yaml(path: str) -> tuple[dict[str, Any], dict[str, int | None]]:
    """Parse a flat YAML mapping and remember the line of each key."""
    file = Path(path)
    if not file.is_file():
        near = sorted(str(p) for p in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        known = f"; in {file.parent} there are {', '.join(near)}" if near else ""
        raise UserError(f"no recipe at {path}{known or '; recipes of this project are in configs/'}")
    try:
        text = file.read_text(encoding="utf-8")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}:1: a recipe is a list of `key: value` lines; found none")
        values, lines = {}, {}
        for key_node, value_node in node.value:
            key, line = str(loader.construct_object(key_node)), key_node.start_mark.line + 1
            if key in values:
                raise UserError(f"{path}:{line}: key '{key}' is set twice (first in line {lines[key]}); keep one")
            try:
                values[key], lines[key] = loader.construct_object(value_node, deep=True), line
            except ValueError as error:  # looks like a date or a number to YAML, and is none
                raise UserError(f"{path}:{line}: '{key}' can't be read: {error}; put a text in quotes") from None
        return values, lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        raise UserError(f"{place}: not valid YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{path}:{line}: not valid YAML: character #x{error.character:04x} can't stand in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the recipe as UTF-8") from None


def _read_overrides(words: list[str]) -> dict[str, str | None]:
    """`--key value`, `--key=value` and a bare `--flag` (None) as a dict."""
    values: dict[str, str | None] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected '{word}' on the command line; recipe keys are given as --key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else None
        values[key.replace("-", "_")] = value
    return values


def _read_word(word: str | None, key: Key | None) -> Any:
    """A word of the command line as YAML reads it, but as it was typed where the key takes a text."""
    if word is None:
        return True
    try:
        value = yaml.safe_load(word)
    except (yaml.YAMLError, ValueError):
        return word
    is_text = key is not None and set(_split_union(key.annotation)) <= {"str", "None"}
    return word if is_text and value is not None else value


def _hint(key: str, stage: str, keys: dict[str, Key]) -> str:
    for other in STAGES:
        if other != stage and key in allowed_keys(other):
            return f"; it belongs to the {other} stage, and this is a {stage} recipe"
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; `rlhf {stage} --keys` lists the keys of this stage"


# --- keys, read from the source of the installed libraries -----------------------------------------------------------


@functools.cache
def allowed_keys(stage: str) -> dict[str, Key]:
    """All keys a recipe of this stage may set, by name."""
    if stage == "evaluate":
        return _own_keys(EvaluateConfig)
    trl_class = {"sft": "SFTConfig", "reward": "RewardConfig", "dpo": "DPOConfig"}[stage]
    keys = _library_keys("transformers", "training_args.py", "TrainingArguments", trl_class)
    keys |= _library_keys("trl", "trainer/base_config.py", "_BaseConfig", trl_class)
    keys |= _library_keys("trl", f"trainer/{stage}_config.py", trl_class, trl_class)
    keys |= _library_keys("trl", "trainer/model_config.py", "ModelConfig", "ModelConfig")
    return keys | _own_keys(StageConfig)


def _own_keys(config_class: type) -> dict[str, Key]:
    return {
        f.name: Key(f.name, str(f.type), tuple(f.metadata["choices"]) if "choices" in f.metadata else None,
                    config_class.__name__)
        for f in dataclasses.fields(config_class)
    }  # fmt: skip


@functools.cache
def _source(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package '{package}' is not installed; run `make setup`, or: {pip_install('rlhf-dpo')}")
    return ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))


def _library_keys(package: str, file: str, class_name: str, owner: str) -> dict[str, Key]:
    """Fields of a config class in a library, read from its source: importing it would cost seconds (torch)."""
    body = next(n for n in _source(package, file).body if isinstance(n, ast.ClassDef) and n.name == class_name).body
    keys = {}
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        name, annotation = node.target.id, ast.unparse(node.annotation)
        choices = LATE_CHOICES.get((class_name, name)) or _literal_choices(node) or _enum_choices(annotation)
        keys[name] = Key(name, annotation, tuple(choices) if choices else None, owner)
    return keys


def _literal_choices(node: ast.AnnAssign) -> list | None:
    """The literal list in `metadata={"choices": [...]}`."""
    for part in ast.walk(node):
        if isinstance(part, ast.Dict):
            for key, value in zip(part.keys, part.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                    return ast.literal_eval(value)
    return None


def _enum_choices(annotation: str) -> list[str] | None:
    """The values of an enum named in an annotation such as `SchedulerType | str`."""
    name = annotation.split(" | ")[0]
    for file in ("trainer_utils.py", "training_args.py"):
        for node in _source("transformers", file).body:
            if isinstance(node, ast.ClassDef) and node.name == name and name.endswith(("Type", "Strategy", "Names")):
                return [
                    n.value.value for n in node.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)
                ]
    return None


# --- types -----------------------------------------------------------------------------------------------------------


def _check(where: str, key: Key, value: Any) -> Any:
    """Return the value in its field's type, or raise UserError with what was found and what was expected."""
    members = [m.strip() for m in _split_union(key.annotation)]
    members = ["str" if m.endswith(("Type", "Strategy", "Names")) else m for m in members]
    if key.annotation == "list[str] | None" or "list[str]" in members:
        value = [value] if isinstance(value, str) else value
    checked = _coerce(members, value, bool(key.choices))
    if checked is _WRONG:
        expected = " or ".join(dict.fromkeys(_TYPE_NAMES.get(m.split("[")[0], m) for m in members))
        raise UserError(f"{where}: '{key.name}' is {value!r}; expected {expected}")
    for item in checked if isinstance(checked, list) else [checked]:
        if key.choices and item is not None and item not in key.choices:
            near = difflib.get_close_matches(str(item), [str(c) for c in key.choices], n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(
                f"{where}: '{key.name}' is {item!r}; expected one of {', '.join(map(str, key.choices))}{hint}"
            )
    if isinstance(checked, float) and not math.isfinite(checked):
        raise UserError(f"{where}: '{key.name}' is {value!r}; expected a finite number")
    if isinstance(checked, (int, float)) and not isinstance(checked, bool) and key.name in _POSITIVE and checked <= 0:
        raise UserError(f"{where}: '{key.name}' is {value!r}; expected a number above 0")
    return checked


_WRONG = object()
_TYPE_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "None": "null",
               "list": "a list", "dict": "a mapping"}  # fmt: skip
_POSITIVE = frozenset(
    "learning_rate num_train_epochs per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "max_length lora_r lora_alpha beta logging_steps save_steps eval_steps max_train_examples max_eval_examples "
    "max_new_tokens batch_size num_shown global_batch_size max_tokens_per_device max_reference_bias_nats".split()
)


def _split_union(annotation: str) -> list[str]:
    return re.split(r" \| (?![^\[]*\])", annotation)


def _coerce(members: list[str], value: Any, closed: bool) -> Any:
    if value is None:
        return None if "None" in members else _WRONG
    if isinstance(value, bool):
        # YAML 1.1 reads a bare `no` as false; transformers writes save_strategy: "no".
        if "bool" in members or "Literal[False]" in members:
            return value
        return "no" if closed and value is False else _WRONG
    if isinstance(value, (int, float)) and ("int" in members or "float" in members):
        if "float" in members:
            return float(value) if "int" not in members else value
        return int(value) if float(value).is_integer() else _WRONG
    if isinstance(value, str):
        # YAML 1.1 reads 1e-4 as a text (it wants 1.0e-4).
        if "str" not in members and "float" in members:
            try:
                return float(value)
            except ValueError:
                return _WRONG
        return value if "str" in members else _WRONG
    if isinstance(value, list):
        inner = next((m[5:-1] for m in members if m.startswith("list[")), None)
        if inner is None:
            return _WRONG
        items = [_coerce([inner], item, closed) for item in value]
        return _WRONG if any(i is _WRONG for i in items) else items
    if isinstance(value, dict):
        return value if any(m.startswith("dict") for m in members) else _WRONG
    return _WRONG


# --- from a recipe to TRL's classes (imports torch) ------------------------------------------------------------------


def build_configs(recipe: Recipe):
    """Make TRL's config of the stage, TRL's ModelConfig and our StageConfig from a validated recipe.

    Returns:
        (SFTConfig | RewardConfig | DPOConfig, ModelConfig, StageConfig)

    Raises:
        UserError: TRL refuses a combination of values (its own sentence, with the recipe's name).
    """
    import torch
    from trl import DPOConfig, ModelConfig, RewardConfig, SFTConfig

    config_class = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig}[recipe.stage]
    keys = allowed_keys(recipe.stage)
    groups: dict[str, dict[str, Any]] = {config_class.__name__: {}, "ModelConfig": {}, "StageConfig": {}}
    for key, value in recipe.values.items():
        groups[keys[key].owner][key] = value
    training = groups[config_class.__name__]
    if not torch.cuda.is_available():
        training.setdefault("use_cpu", True)
    if training.get("use_cpu"):
        training.setdefault("bf16", False)  # TRL's default is true; a CPU without AMX is slower in bf16
        training.setdefault("dataloader_pin_memory", False)
    elif "bf16" not in training and "fp16" not in training:
        training["bf16"] = torch.cuda.is_bf16_supported()
    training.setdefault("report_to", "none")
    try:
        args, model_args = config_class(**training), ModelConfig(**groups["ModelConfig"])
        stage_args = StageConfig(**groups["StageConfig"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{recipe.path}: {' '.join(str(error).split())}") from error
    named = recipe.get("lora_target_modules")
    if isinstance(named, list) and named != ["all-linear"]:
        model_args.lora_target_modules = named  # TRL 1.16 makes a list of one a pattern, which then matches no module
    return args, model_args, stage_args
