"""Recipe YAML -> validated keys -> TRL's own config classes.

A recipe is flat: `key: value`. The keys are the fields of TRL's SFTConfig, RewardConfig or DPOConfig, of TRL's
ModelConfig, and of the small dataclasses below for what those lack. Everything is checked here, with the file and the
line, before torch is even imported, so that a misspelt key costs a user half a second and not a model load:
yaml_reader.py reads the file, keys.py knows the names, keys_foreign.py the names of other projects, key_ranges.py the
values, key_effects.py what has an effect, recipe_checks.py what must hold between keys.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import UserError, quote
from rlhf.key_effects import REFUSED
from rlhf.key_ranges import ATTENTION, check_value, split_union
from rlhf.keys import LATE_CHOICES, Key, library_keys, own_keys
from rlhf.keys_foreign import answer
from rlhf.recipe_checks import check_combinations, check_effects, expand_paths
from rlhf.yaml_reader import quote_path, read_flat, read_word

__all__ = ["ATTENTION", "LATE_CHOICES", "REFUSED", "Key", "UserError", "quote"]

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
    heldout: float | None = field(
        default=None,
        metadata={
            "help": "A part of the data that no stage trains on, chosen by the prompt alone: a share (0.05) or a count of prompts (200). "
            "Every stage and evaluation of the same data that says the same holds out the same prompts."
        },
    )
    chosen_dataset_name: str | None = field(
        default=None, metadata={"help": "Accepted answers (prompt, response), joined by prompt with the rejected ones."}
    )
    rejected_dataset_name: str | None = field(default=None, metadata={"help": "Rejected answers (prompt, response)."})
    bad_rows: str = field(
        default="error",
        metadata={
            "choices": ["error", "skip"],
            "help": "A row that can't be used ends the run (error), or is left out, counted and named (skip).",
        },
    )
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
    dataset_train_split: str | None = field(
        default=None, metadata={"help": "Split that `heldout` is taken from; default: train, or all of a file."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; default: test, or all of a file."}
    )
    heldout: float | None = field(
        default=None,
        metadata={
            "help": "A part of the data that no stage trains on, chosen by the prompt alone: a share (0.05) or a count of prompts (200). "
            "Every stage and evaluation of the same data that says the same holds out the same prompts."
        },
    )
    bad_rows: str = field(default="error", metadata={"choices": ["error", "skip"]})
    max_eval_examples: int | None = None
    output_dir: str | None = None
    max_new_tokens: int = 96
    max_length: int = 1024
    num_shown: int = field(default=3, metadata={"help": "Prompts answered side by side by base, SFT and DPO."})
    batch_size: int = field(default=16, metadata={"help": "Prompts generated, or pairs scored, at a time."})
    dtype: str = field(default="float32", metadata={"choices": ["float32", "bfloat16", "float16"]})
    use_cpu: bool = False
    seed: int = 42


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
        return f"{self.path}:{line}" if line else f"--{key if len(key) <= 80 else key[:79] + '…'}"

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)


def load_recipe(path: str, stage: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and the command line's `--key value` pairs over it.

    Raises:
        UserError: no such file, bad YAML, unknown or repeated key, wrong type, value outside the choices, a recipe of
            another stage; each with file, line and the nearest valid key or value.
    """
    values, lines = read_flat(path)
    path, found = quote_path(path), values.get("stage")
    if found is None:
        raise UserError(f"{path}:1: the recipe does not say its stage; add the line `stage: {stage}` (if it is one)")
    if found in STAGES and found != stage:
        raise UserError(f"{path}:{lines['stage']}: this is a recipe for `rlhf {found}`, not for `rlhf {stage}`")
    keys = allowed_keys(stage)
    for key, word in _read_overrides(overrides or []).items():
        values[key], lines[key] = _read_word(word, key, keys.get(key)), None
    if values["stage"] in STAGES and values["stage"] != stage:
        raise UserError(f"--stage: this is a recipe for `rlhf {values['stage']}`, not for `rlhf {stage}`")
    recipe = Recipe(stage, path, values, lines)
    for key in list(values):
        if key in REFUSED:
            raise UserError(f"{recipe.where(key)}: key '{key}' can't be set here: {REFUSED[key]}")
        if key not in keys:
            raise UserError(f"{recipe.where(key)}: unknown key {quote(key)}{hint(key, stage, keys)}")
        values[key] = check_value(recipe.where(key), keys[key], values[key])
    expand_paths(values, recipe.where)
    _check_required(recipe)
    check_effects(stage, values, recipe.where, {key for key, line in lines.items() if line is None})
    check_combinations(values, recipe.where)
    return recipe


def stage_of(path: str) -> str:
    """Which stage a recipe is for.

    Raises:
        UserError: no such file, bad YAML, or it doesn't say.
    """
    values, lines = read_flat(path)
    if values.get("stage") not in STAGES:
        place = f"{path}:{lines.get('stage', 1)}"
        raise UserError(f"{place}: the recipe does not say its stage; add a line `stage: ` with {', '.join(STAGES)}")
    return values["stage"]


def _check_required(recipe: Recipe) -> None:
    if not recipe.get("output_dir"):
        raise UserError(f"{recipe.path}: key 'output_dir' is missing; it says where the results go")
    if "://" in str(recipe.get("output_dir")):  # checkpoints are renamed into place, which no object storage can do
        raise UserError(
            f"{recipe.where('output_dir')}: output_dir {quote_path(recipe.get('output_dir'))} is no folder; train into one, and copy it to "
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


def _read_overrides(words: list[str]) -> dict[str, str | None]:
    """`--key value`, `--key=value` and a bare `--flag` (None) as a dict."""
    values: dict[str, str | None] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected {quote(word)} on the command line; recipe keys are given as --key value")
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else None
        if key in values:
            raise UserError(f"--{quote(key)[1:-1]} is given twice on the command line; keep one")
        values[key] = value
    return values


def _read_word(word: str | None, name: str, key: Key | None) -> Any:
    """A word of the command line as YAML reads it, but as it was typed where the key takes a text."""
    if word is None:
        return True
    if key is not None and set(split_union(key.annotation)) <= {"str", "None"}:
        return None if word in ("", "~", "null", "Null", "NULL") else word
    return read_word(word, f"--{name}") if key is not None else word


def hint(key: str, stage: str, keys: dict[str, Key]) -> str:
    """What to write in the place of a key that a stage doesn't have, as the end of a sentence."""
    if stage != "evaluate" and (known := answer(key)):
        return f"; {known}"
    for other in STAGES:
        if other != stage and key in allowed_keys(other):
            return f"; it belongs to the {other} stage, and this is a {stage} recipe"
    near = difflib.get_close_matches(key[:100], keys, n=1, cutoff=0.7)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; `rlhf {stage} --keys` lists the keys of this stage"


# --- keys, read from the source of the installed libraries -----------------------------------------------------------


@functools.cache
def allowed_keys(stage: str) -> dict[str, Key]:
    """All keys a recipe of this stage may set, by name."""
    if stage == "evaluate":
        return own_keys(EvaluateConfig)
    trl_class = {"sft": "SFTConfig", "reward": "RewardConfig", "dpo": "DPOConfig"}[stage]
    return {
        **library_keys("transformers", "training_args.py", "TrainingArguments", trl_class),
        **library_keys("trl", "trainer/base_config.py", "_BaseConfig", trl_class),
        **library_keys("trl", f"trainer/{stage}_config.py", trl_class, trl_class),
        **library_keys("trl", "trainer/model_config.py", "ModelConfig", "ModelConfig"),
        **own_keys(StageConfig),
    }


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
    _set_precision(training, recipe)
    if training.get("use_cpu"):
        training.setdefault("dataloader_pin_memory", False)
    training.setdefault("report_to", "none")
    try:
        args, model_args = config_class(**training), ModelConfig(**groups["ModelConfig"])
        stage_args = StageConfig(**groups["StageConfig"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{recipe.path}: {' '.join(str(error).split())}") from error
    named = recipe.get("lora_target_modules")
    if isinstance(named, list) and named != ["all-linear"]:
        model_args.lora_target_modules = named  # TRL 1.16 makes a list of one a pattern, which then matches no module
    if is_flash(model_args.attn_implementation):
        model_args.attn_implementation = _flash_or_packed(recipe, bool(args.use_cpu))
    return args, model_args, stage_args


def _set_precision(training: dict[str, Any], recipe: Recipe) -> None:
    """bf16 or fp16: the recipe's, else the launch file's, else bf16 where a GPU has it."""
    import torch

    on_cpu = training.get("use_cpu")
    asked = check_precision(recipe, os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), "the launch file")
    if asked:
        training |= {"bf16": asked == "bf16", "fp16": asked == "fp16"}
    elif "bf16" not in training and not training.get("fp16"):
        # TRL's default is true; a CPU without AMX is slower in bf16
        training["bf16"] = not on_cpu and torch.cuda.is_bf16_supported()
    if on_cpu and training.get("fp16"):
        place = recipe.where("fp16") if recipe.get("fp16") else "the launch file's mixed_precision"
        raise UserError(f"{place}: fp16 needs a GPU, and this run is on the CPU; use bf16, or neither")


def check_precision(recipe: Recipe, asked: str, name: str) -> str:
    """What a launch file's `mixed_precision` adds to a recipe: `bf16`, `fp16`, or '' where it says nothing.

    `no` says nothing: accelerate writes it into every file, and sets it where there is none.

    Raises:
        UserError: the recipe says something else.
    """
    if asked not in ("bf16", "fp16"):
        return ""
    decided = next((key for key in ("fp16", "bf16") if recipe.get(key)), None)
    if decided is None and recipe.get("bf16") is False:
        raise UserError(
            f"{recipe.where('bf16')}: the recipe says `bf16: false`, and {name} `mixed_precision: {asked}`; remove one"
        )
    if decided not in (None, asked):
        raise UserError(
            f"{recipe.where(decided)}: the recipe says `{decided}: true`, and {name} `mixed_precision: {asked}`; remove one"
        )
    return asked


def is_flash(attention: str | None) -> bool:
    """Whether an `attn_implementation` names a flash-attention package or kernel."""
    return "flash" in (attention or "").lower().replace("flex", "")


def _flash_or_packed(recipe: Recipe, on_cpu: bool) -> str | None:
    """What the model is loaded with where the recipe asks for flash attention.

    Who asks for it wants rows without padding, and no more: packed attention is that, on a varlen kernel on GPUs
    (packing/attention.py), and is put in the place of what the model has loaded with (None: transformers' choice).
    """
    asked, where = recipe.get("attn_implementation"), recipe.where("attn_implementation")
    if recipe.get("packing", True):
        return None
    if on_cpu:
        raise UserError(f"{where}: {asked} needs a GPU, and this run is on the CPU; remove it")
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(asked, "kernels")
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{where}: {asked} needs the package {package}, which is not installed; remove `packing: false`, and packed "
            "attention uses PyTorch's own varlen kernel"
        )
    return asked
