"""The recipes of a folder, what they name, and their text with other paths."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.config.recipe import Recipe, load_recipe
from rlhf.config.recipe_checks import PATHS
from rlhf.config.stage_config import STAGES
from rlhf.config.yaml_reader import Loader, quote_path, read_flat
from rlhf.errors import UserError

DATA = ("dataset_name", "eval_dataset_name", "chosen_dataset_name", "rejected_dataset_name", "reward_benchmarks")
MODELS = ("model_name_or_path", "reference_model", "base_model", "sft_model", "reward_model", "dpo_model")
OUTPUTS = ("output_dir", "reference_cache")
TASKS = ("benchmark_tasks",)
assert {*DATA, *MODELS, *OUTPUTS, *TASKS, "chat_template"} == set(PATHS)

# What a token or a password looks like: those of Hugging Face, GitHub, AWS and others, private keys, addresses.
SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bAKIA[0-9A-Z]{16}\b|\bsk-[\w-]{32,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|\b(?:WANDB_API_KEY|HF_TOKEN|HUGGING_FACE_HUB_TOKEN|AWS_SECRET_ACCESS_KEY)['\"]?\s*[:=]\s*['\"]?[\w/+]{16,}"
    r"|://[^\s/:@]+:[^\s/@]+@"
)


@dataclass(frozen=True)
class Named:
    """Something that a recipe names under a key.

    Attributes:
        value: as the recipe is read, with `~` expanded.
    """

    recipe: Recipe
    key: str
    value: str

    @property
    def where(self) -> str:
        return self.recipe.where(self.key)


def read_recipes(folder: Path) -> list[Recipe]:
    """The recipes of a folder: its YAML files with a `stage`, checked, in the order of the stages.

    Raises:
        UserError: no such folder, none in it, a recipe with a mistake, or one with keys that a bundle can't carry.
    """
    if not folder.is_dir():
        what = "is a file, not a folder of recipes" if folder.exists() else "is no folder"
        raise UserError(f"{quote_path(str(folder))} {what}; give a recipe folder, for example configs/quickstart")
    found = []
    for file in sorted(p for p in folder.iterdir() if p.suffix in (".yaml", ".yml") and p.is_file()):
        try:
            stage = read_flat(str(file))[0].get("stage")
        except UserError:
            if file.stem in STAGES:
                raise
            continue  # YAML for something else
        if stage in STAGES:
            found.append(load_recipe(str(file), stage))
            _refuse_any_models(found[-1])
    if not found:
        raise UserError(f"{quote_path(str(folder))} has no recipe (a .yaml file with a line `stage: …`)")
    return sorted(found, key=lambda recipe: STAGES.index(recipe.stage))


def _refuse_any_models(recipe: Recipe) -> None:
    for key in ("models", "judge"):
        if recipe.get(key):
            raise UserError(
                f"{recipe.where(key)}: a bundle can't carry the models that '{key}' names; name them as base_model, sft_model, "
                f"dpo_model and reward_model, or move this recipe out of the folder"
            )


def named(recipes: list[Recipe], keys: tuple[str, ...]) -> Iterator[Named]:
    """What recipes name under these keys."""
    for recipe in recipes:
        for key in keys:
            value = recipe.get(key)
            for item in value if isinstance(value, list) else [value]:  # the data sets of a mix
                name = item.get("name") if isinstance(item, dict) else item
                if isinstance(name, str) and name:
                    yield Named(recipe, key, name)


def check_no_secrets(text: str, path: Path) -> None:
    """Reject a text with what looks like a token or a password: bundles are handed on.

    Raises:
        UserError: with the line.
    """
    if found := SECRETS.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise UserError(
            f"{quote_path(str(path))}:{line}: looks like a token, a key or a password ({found[0][:6]}…), which must not go "
            "into a bundle; remove it, and give it by an environment variable"
        )


def rewrite(text: str, replacement: Callable[[str, str], str | None]) -> tuple[str, list[dict[str, Any]]]:
    """A recipe's text with other values, and every other character, comment and line as it was.

    Args:
        replacement: (key, a string that is its value or in it) -> the new string, or None to leave it.

    Returns:
        (the text, the changes as {"line", "key", "from", "to"})

    Example: rewrite("a: /x/y  # why\\n", lambda key, value: "y") -> ("a: y  # why\\n", [{"line": 1, …}]).
    """
    changes, parts, at = [], [], 0
    root = Loader(text).get_single_node()
    for key_node, value_node in root.value if isinstance(root, yaml.MappingNode) else ():
        for node in _strings(value_node):
            new = replacement(key_node.value, node.value)
            if new is None or new == node.value:
                continue
            start, end = node.start_mark.index, node.end_mark.index
            # a value of several lines becomes one line, and those after it keep their numbers
            breaks = "".join(re.findall("\r\n|[\n\r\x85\u2028\u2029]", text[start:end]))
            parts += [text[at:start], _scalar(new, node.style), breaks]
            at = end
            line = node.start_mark.line + 1
            changes.append({"line": line, "key": key_node.value, "from": node.value, "to": new})
    return "".join([*parts, text[at:]]), changes


def _strings(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    """The strings in a value, in the order of the text."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:str":
            yield node
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _strings(value)
    else:
        for value in node.value:
            yield from _strings(value)


def _scalar(value: str, style: str | None) -> str:
    """A string in YAML on one line: plain if it was and may be, else in double quotes."""
    if (
        style is None
        and re.fullmatch(r"[A-Za-z0-9_][\w./-]*", value, flags=re.ASCII)
        and yaml.safe_load(value) == value
    ):
        return value
    return json.dumps(value, ensure_ascii=False)


def is_inside(path: str, folder: str) -> bool:
    """Whether a path is a folder or below it."""
    inner, outer = (os.path.realpath(os.path.expanduser(name)) for name in (path, folder))
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")
