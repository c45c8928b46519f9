"""Recipe YAML -> validated keys -> TRL's own config classes.

A recipe is flat: `key: value`. The keys are the fields of TRL's SFTConfig, RewardConfig or DPOConfig, of TRL's
ModelConfig, and of our StageConfig for what those lack. Everything is checked here, with file and line, before torch
is imported, so that a misspelt key costs half a second and not a model load: yaml_reader.py reads the file, keys.py has
the names, keys_foreign.py the names of other projects, key_ranges.py the values, key_effects.py which keys have an
effect, recipe_checks.py the constraints between keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from dataclasses import dataclass
from typing import Any

from rlhf.config.evaluated import check_evaluated
from rlhf.config.key_effects import REFUSED
from rlhf.config.key_ranges import check_value, split_union
from rlhf.config.keys import Key, library_keys, own_keys
from rlhf.config.keys_foreign import answer
from rlhf.config.recipe_checks import check_combinations, check_effects, expand_paths
from rlhf.config.stage_config import OWN_KEYS, STAGES, StageConfig
from rlhf.config.yaml_reader import quote_path, read_flat, read_word
from rlhf.errors import UserError, quote

# Keys that may differ when a run resumes in its folder: they change output or speed, not what is learnt.
HARMLESS = frozenset(
    "logging_steps logging_first_step logging_strategy logging_dir report_to run_name disable_tqdm log_level "
    "log_level_replica save_steps save_total_limit save_strategy eval_steps eval_strategy dataloader_num_workers "
    "dataloader_pin_memory dataset_num_proc per_device_eval_batch_size output_dir max_tokens_per_device "
    "reference_cache watchdog_minutes max_gradient_spike portable_checkpoints".split()
)


@dataclass(frozen=True)
class Recipe:
    """A validated recipe: `values` as given (file plus command line) and the line of each; never modified.

    Attributes:
        call: of `rlhf.train`, where Python code gave the recipe; '' on the command line.
    """

    stage: str
    path: str
    values: dict[str, Any]
    lines: dict[str, int | None]
    call: str = ""

    def where(self, key: str) -> str:
        """`file:line` of a key, its command-line flag, or the file alone if the key is not set."""
        if key not in self.lines:
            return self.path
        line, name = self.lines[key], key if len(key) <= 80 else key[:79] + "…"
        if line:
            return f"{self.path}:{line}"
        return f"train({name}=…)" if self.call else f"--{name}"

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    @functools.cached_property
    def ours(self) -> StageConfig:
        """Our own keys of a training stage, with their defaults."""
        names = {field.name for field in dataclasses.fields(StageConfig)}
        return StageConfig(**{key: value for key, value in self.values.items() if key in names})

    @property
    def is_quantised(self) -> bool:
        """The trained model's base is in 4 or 8 bits."""
        return bool(self.get("load_in_4bit") or self.get("load_in_8bit"))

    @property
    def uses_lora(self) -> bool:
        return bool(self.get("use_peft"))

    def replace(self, key: str, value: Any) -> Recipe:
        """The same recipe with another value of a key."""
        return dataclasses.replace(self, values={**self.values, key: value})


def load_recipe(
    path: str, stage: str, overrides: list[str] | None = None, default: dict[str, Any] | None = None
) -> Recipe:
    """Read a recipe and override it with the command line's `--key value` pairs.

    Args:
        default: instead of the file's content, where there is no file.

    Raises:
        UserError: no such file, bad YAML, unknown or repeated key, wrong type, value outside the choices, a recipe of
            another stage; each with file, line and the closest valid key or value.
    """
    values, lines = (dict(default), {}) if default is not None else read_flat(path)
    path, found = quote_path(path), values.get("stage")
    if found is None:
        raise UserError(f"{path}:1: the recipe has no stage; add the line `stage: {stage}` (if that is its stage)")
    if found in STAGES and found != stage:
        raise UserError(f"{path}:{lines['stage']}: this is a recipe for `rlhf {found}`, not for `rlhf {stage}`")
    keys = allowed_keys(stage)
    for key, word in _read_overrides(overrides or []).items():
        values[key], lines[key] = _read_word(word, key, keys.get(key)), None
    if values["stage"] in STAGES and values["stage"] != stage:
        raise UserError(f"--stage: this is a recipe for `rlhf {values['stage']}`, not for `rlhf {stage}`")
    return check_recipe(Recipe(stage, path, values, lines))


def check_recipe(recipe: Recipe) -> Recipe:
    """Check the keys and values of a recipe that was just read, and bring the values to their types.

    Raises:
        UserError: with the place of the key, and the nearest valid key or value.
    """
    stage, values, keys = recipe.stage, recipe.values, allowed_keys(recipe.stage)
    for key in list(values):
        if key in REFUSED:
            raise UserError(f"{recipe.where(key)}: key '{key}' can't be set here: {REFUSED[key]}")
        if key not in keys:
            raise UserError(f"{recipe.where(key)}: unknown key {quote(key)}{hint(key, stage, keys)}")
        values[key] = check_value(recipe.where(key), keys[key], values[key])
    expand_paths(values, recipe.where)
    _check_required(recipe)
    check_effects(stage, values, recipe.where, {key for key, line in recipe.lines.items() if line is None})
    check_combinations(values, recipe.where)
    return recipe


def stage_of(path: str) -> str:
    """Which stage a recipe is for.

    Raises:
        UserError: no such file, bad YAML, or no stage.
    """
    values, lines = read_flat(path)
    if values.get("stage") not in STAGES:
        place = f"{path}:{lines.get('stage', 1)}"
        raise UserError(f"{place}: the recipe has no stage; add a line `stage: ` with one of {', '.join(STAGES)}")
    return values["stage"]


def _check_required(recipe: Recipe) -> None:
    if recipe.stage == "rounds":
        return
    if not recipe.get("output_dir"):
        raise UserError(f"{recipe.path}: key 'output_dir' is missing; it names the folder for the results")
    if "://" in str(recipe.get("output_dir")):  # checkpoints are renamed into place, which object storage can't do
        raise UserError(
            f"{recipe.where('output_dir')}: output_dir {quote_path(recipe.get('output_dir'))} is not a folder; train into one and copy it to "
            "object storage (docker/README.md has the commands)"
        )
    if recipe.stage == "evaluate":
        if not recipe.get("dataset_name"):
            raise UserError(f"{recipe.path}: key 'dataset_name' is missing; it names the held-out preference pairs")
        check_evaluated(recipe.values, recipe.path, recipe.where)
        return
    if not recipe.get("model_name_or_path"):
        raise UserError(f"{recipe.path}: key 'model_name_or_path' is missing; it names the model to start from")
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if recipe.get("global_batch_size") and recipe.get(key):
            raise UserError(
                f"{recipe.where(key)}: {key} and global_batch_size set the same thing; remove {key} "
                "(max_tokens_per_device limits the micro-batch)"
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
    """Parse `--key value`, `--key=value` and a bare `--flag` (None) into a dict."""
    values: dict[str, str | None] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected {quote(word)} on the command line; recipe keys are given as --key value")
        key, equals, text = word[2:].partition("=")
        key, value = key.replace("-", "_"), text if equals else None
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        if key in values:
            raise UserError(f"--{quote(key)[1:-1]} is given twice on the command line; keep one")
        values[key] = value
    return values


def _read_word(word: str | None, name: str, key: Key | None) -> Any:
    """A command-line value as YAML reads it, but verbatim if the key takes a string."""
    if word is None:
        return True
    if key is not None and set(split_union(key.annotation)) <= {"str", "None"}:
        return None if word in ("", "~", "null", "Null", "NULL") else word
    return read_word(word, f"--{name}") if key is not None else word


def hint(key: str, stage: str, keys: dict[str, Key]) -> str:
    """What to write instead of a key that a stage doesn't have, as the end of a sentence."""
    if stage not in OWN_KEYS and (known := answer(key)):
        return f"; {known}"
    for other in STAGES:
        if other != stage and key in allowed_keys(other):
            return f"; it belongs to the {other} stage, and this is a {stage} recipe"
    near = difflib.get_close_matches(key[:100], keys, n=1, cutoff=0.7)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; `rlhf {stage} --keys` lists the keys of this stage"


@functools.cache
def allowed_keys(stage: str) -> dict[str, Key]:
    """All keys a recipe of this stage may set, by name."""
    if stage in OWN_KEYS:
        return own_keys(OWN_KEYS[stage])
    trl_class = {"sft": "SFTConfig", "reward": "RewardConfig", "dpo": "DPOConfig"}[stage]
    return {
        **library_keys("transformers", "training_args.py", "TrainingArguments", trl_class),
        **library_keys("trl", "trainer/base_config.py", "_BaseConfig", trl_class),
        **library_keys("trl", f"trainer/{stage}_config.py", trl_class, trl_class),
        **library_keys("trl", "trainer/model_config.py", "ModelConfig", "ModelConfig"),
        **own_keys(StageConfig),
    }
