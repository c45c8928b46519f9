"""Which recipe of the same folder produces a model, and whether its run is complete."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf.config.recipe import Recipe, load_recipe
from rlhf.config.stage_config import TRAINING_STAGES
from rlhf.runs.records import read_recipe


def maker_of(recipe: Recipe, name: str | None) -> str:
    """The command that produces this model, if a recipe of the same folder has it as output_dir; else ''."""
    return " ".join(("rlhf", *found)) if (found := sibling_that_makes(recipe, name)) else ""


def sibling_that_makes(recipe: Recipe, name: str | None) -> tuple[str, str] | None:
    """(stage, file) of the recipe of the same folder whose output_dir is `name`."""
    if not name:
        return None
    for stage in TRAINING_STAGES:
        sibling = Path(recipe.path).parent / f"{stage}.yaml"
        if stage == recipe.stage:
            continue
        output = (read_recipe(sibling) or {}).get("output_dir")  # its own --check reports an unreadable one
        if isinstance(output, str) and output and _same_path(output, name):
            return stage, str(sibling)
    return None


def _same_path(one: str, other: str) -> bool:
    return os.path.normpath(os.path.expanduser(one)) == os.path.normpath(other)


def waits_for(recipe: Recipe, name: str) -> str:
    """The command that still has to produce (or finish) this model; '' if it is complete or comes from elsewhere."""
    return "" if os.path.lexists(Path(name) / "complete.json") else maker_of(recipe, name)


def starting_model(recipe: Recipe) -> str:
    """The model that a recipe starts from; if a sibling recipe has yet to make it, the one that the sibling starts from."""
    name = recipe.values["model_name_or_path"]
    seen = set()
    while waits_for(recipe, name) and name not in seen and (found := sibling_that_makes(recipe, name)):
        seen.add(name)
        stage, file = found
        recipe = load_recipe(file, stage)
        name = recipe.values["model_name_or_path"]
    return name
