"""The defaults of recipe keys, read from the source of the installed libraries: no torch."""

from __future__ import annotations

import ast
import dataclasses
import functools
from typing import Any

from rlhf.config.keys import source
from rlhf.config.stage_config import EvaluateConfig, StageConfig
from rlhf.errors import quote


def effective(recipe_values: dict[str, Any], stage: str, key: str) -> Any:
    """A key's value in a recipe, else its default; None if neither is known."""
    value = recipe_values.get(key)
    return _default(recipe_values, stage, key) if value is None else value


def describe(recipe_values: dict[str, Any], stage: str, key: str) -> str:
    """The same as text for a message. Example: `0.3`, `0.1 (default)`, `not set`."""
    value = recipe_values.get(key)
    if value is not None:
        return quote(value)
    default = _default(recipe_values, stage, key)
    return "not set" if default is None else f"{default!r} (default)"


def _default(recipe_values: dict[str, Any], stage: str, key: str) -> Any:
    if key == "dtype" and recipe_values.get("use_peft"):
        return None  # the device decides: config/build.py, default_dtype
    return defaults(stage).get(key)


@functools.cache
def defaults(stage: str) -> dict[str, Any]:
    """The defaults of a stage's keys, if they are literals."""
    if stage == "evaluate":
        return _of_ours(EvaluateConfig)
    trl_class = {"sft": "SFTConfig", "reward": "RewardConfig", "dpo": "DPOConfig"}[stage]
    found: dict[str, Any] = {}
    for package, file, name in (
        ("transformers", "training_args.py", "TrainingArguments"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("trl", f"trainer/{stage}_config.py", trl_class),
        ("trl", "trainer/model_config.py", "ModelConfig"),
    ):
        found |= _of_library(package, file, name)
    return found | _of_ours(StageConfig)


def _of_ours(config_class: type) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(config_class) if f.default is not dataclasses.MISSING}


def _of_library(package: str, file: str, class_name: str) -> dict[str, Any]:
    body = next(n for n in source(package, file).body if isinstance(n, ast.ClassDef) and n.name == class_name).body
    found = {}
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.value is None:
            continue
        value: ast.expr | None = node.value
        if isinstance(value, ast.Call):  # field(default=..., metadata=...)
            value = next((k.value for k in value.keywords if k.arg == "default"), None)
        try:
            found[node.target.id] = None if value is None else ast.literal_eval(value)
        except ValueError:  # computed by code, which is not run here
            found[node.target.id] = None
    return found
