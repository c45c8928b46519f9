"""Checks before training: packages, devices, disk space, model folders."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from rlhf.config.recipe import Recipe
from rlhf.errors import UserError, pip_install
from rlhf.models.folder import base_of, check_model_folder, weight_files
from rlhf.runs.lineage import maker_of, waits_for
from rlhf.runs.records import read_complete
from rlhf.training.room import count_weights


def check_extras(recipe: Recipe) -> None:
    """Raise UserError if a package that a recipe key needs is not installed."""
    needs = {"load_in_4bit": "bitsandbytes", "load_in_8bit": "bitsandbytes"}
    for key, package in needs.items():
        if recipe.get(key) and importlib.util.find_spec(package) is None:
            raise UserError(f"{recipe.where(key)}: {key} needs {package}; run: {pip_install(package)}")
    if recipe.get("reference") == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{recipe.where('reference')}: reference: nf4 needs bitsandbytes; run: {pip_install('bitsandbytes')}"
        )
    if any(recipe.get(k) for k in needs) and not recipe.get("use_peft"):
        raise UserError(
            f"{recipe.where('load_in_4bit')}: a quantised model can only be trained with LoRA; add `use_peft: true`"
        )
    reporters = recipe.get("report_to") or []
    for name in [reporters] if isinstance(reporters, str) else reporters:
        if name in ("tensorboard", "wandb", "trackio", "mlflow", "swanlab") and importlib.util.find_spec(name) is None:
            raise UserError(
                f"{recipe.where('report_to')}: report_to {name} needs the package; run: {pip_install(name)}"
            )


def refuse_damaged(recipe: Recipe, model_keys: tuple[str, ...]) -> None:
    """Reject local models that can't be loaded, and a run folder whose complete.json is damaged.

    Raises:
        UserError: names the file.
    """
    for key in model_keys:
        name = recipe.get(key)
        if name and os.path.isdir(folder := Path(name).expanduser()) and not waits_for(recipe, name):
            check_model_folder(folder, recipe.where(key), maker_of(recipe, name))
    if recipe.get("output_dir"):
        read_complete(Path(recipe.get("output_dir")))


def on_cpu(recipe: Recipe) -> bool:
    """Whether this recipe will run on the CPU of this machine."""
    if recipe.get("use_cpu"):
        return True
    import torch  # takes seconds

    return not torch.cuda.is_available()


def bytes_needed(
    model_name: str, use_peft: bool, merge: bool, resume_from: str | None, merges_start: bool = False
) -> int:
    """Disk space for a checkpoint, the finished model (an adapter is small) and the merged model that the run starts from.

    The checkpoint is taken to be as large as the last one; without one, as for full fine-tuning: weights and Adam's moments
    in fp32.
    """
    folder = base_of(model_name)
    files = weight_files(Path(folder)) if os.path.isdir(folder) else []
    weights = sum(file.stat().st_size for file in files)
    finished = 0 if use_peft and not merge else 1.2 * weights
    start = weights if merges_start else 0
    if resume_from:
        checkpoint = sum(f.stat().st_size for f in Path(resume_from).rglob("*") if f.is_file())
    else:
        checkpoint = 0 if use_peft or not files else 12 * count_weights(Path(folder))[0]
    return int(start + finished + checkpoint) + 20_000_000
