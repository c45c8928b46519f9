"""Constraints between the keys of a recipe, and on its paths. No torch, no data: fast."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.config.key_effects import without_effect
from rlhf.config.keys import scheduler_arguments
from rlhf.config.stage_config import CHAT_ROLES, COLUMN_NAMES
from rlhf.errors import UserError, quote

# Keys that may name a file or a folder; `~` that the shell has not expanded is expanded here.
PATHS = (
    "output_dir", "dataset_name", "eval_dataset_name", "chosen_dataset_name", "rejected_dataset_name",
    "model_name_or_path", "reference_model", "reference_cache", "chat_template", "base_model", "sft_model", "reward_model",
    "dpo_model", "reward_benchmarks", "benchmark_tasks",
)  # fmt: skip
MAX_NAME = 255  # bytes of one name in a path, on every file system in use
MAX_PATH = 4096


def expand_paths(values: dict[str, Any], where: Callable[[str], str]) -> None:
    """Expand `~` and reject what can't be a path.

    Raises:
        UserError: an unknown user's home, a name that is too long, or an output_dir that can't be created.
    """
    for key in PATHS:
        value = values.get(key)
        if isinstance(value, str):
            values[key] = _expanded(value, key, where)
        elif isinstance(value, list) and key in ("dataset_name", "reward_benchmarks"):
            values[key] = [
                _expanded(item, key, where) if isinstance(item, str)
                else {**item, "name": _expanded(item["name"], key, where)} if isinstance(item.get("name"), str) else item
                for item in value
            ]  # fmt: skip
    _check_output_dir(values.get("output_dir"), lambda: where("output_dir"))


def _expanded(value: str, key: str, where: Callable[[str], str]) -> str:
    if value.startswith("~"):
        value = os.path.expanduser(value)
        if value.startswith("~"):
            raise UserError(f"{where(key)}: {key} {quote(value)}: no such user; write the full path")
    size = max(len(part) for part in value.encode().split(b"/"))
    if size > MAX_NAME or len(value.encode()) > MAX_PATH:
        raise UserError(
            f"{where(key)}: {key} {quote(value)} has a name of {size} bytes; the maximum is {MAX_NAME} "
            f"(and {MAX_PATH} for the path)"
        )
    return value


def _check_output_dir(value: str | None, where: Callable[[], str]) -> None:
    if value is None or value == "" or "://" in value:  # checked elsewhere
        return
    if not value.strip():
        raise UserError(f"{where()}: output_dir {quote(value)} is blank; name the folder for the results")
    path = Path(value)
    for part in (path, *path.parents):
        if os.path.islink(part) and not os.path.exists(part):
            raise UserError(
                f"{where()}: output_dir {quote(value)} goes through the link {quote(str(part))} to "
                f"{quote(os.readlink(part))}, which doesn't exist; remove the link, or name another folder"
            )


def check_effects(stage: str, values: dict[str, Any], where: Callable[[str], str], decided: set[str]) -> None:
    """Reject keys without effect.

    Args:
        decided: keys that were set on the command line.

    Raises:
        UserError: the first such key, and what would give it an effect.
    """
    for key in values:
        if reason := without_effect(key, stage, values, decided):
            raise UserError(f"{where(key)}: '{key}' has no effect {reason}")


def _check_heldout(values: dict[str, Any], where: Callable[[str], str]) -> None:
    heldout = values.get("heldout")
    if heldout is None:
        return
    if heldout > 1 and heldout != int(heldout):
        raise UserError(
            f"{where('heldout')}: heldout {heldout:g} is neither a fraction below 1 nor an integer number of prompts"
        )
    for key in ("dataset_test_split", "eval_dataset_name"):
        if values.get(key):
            raise UserError(
                f"{where('heldout')}: heldout and {key} both define the held-out data; remove one (heldout takes a part of "
                "the training data, which no other key changes)"
            )


def _check_benchmarks(values: dict[str, Any], where: Callable[[str], str]) -> None:
    if values.get("reward_benchmarks") and not values.get("reward_model"):
        raise UserError(f"{where('reward_benchmarks')}: 'reward_benchmarks' has no effect without reward_model; set it")
    if values.get("benchmarks") and not any(values.get(f"{policy}_model") for policy in ("base", "sft", "dpo")):
        raise UserError(
            f"{where('benchmarks')}: 'benchmarks' has no effect without base_model, sft_model or dpo_model; a reward model "
            "answers nothing (reward_benchmarks measures it)"
        )
    for key in ("benchmark_limit", "benchmark_tasks"):
        if values.get(key) is not None and not values.get("benchmarks"):
            raise UserError(f"{where(key)}: '{key}' has no effect without benchmarks; change that, or remove {key}")
    for key in ("reward_benchmarks", "benchmarks"):
        names = values.get(key) or []
        if len(set(names)) < len(names):
            raise UserError(f"{where(key)}: {key} {quote(names)} names one twice; keep one")


def check_formats(values: dict[str, Any], where: Callable[[str], str]) -> None:
    """Check `columns` and `roles`: mappings of texts; roles of chat templates.

    Raises:
        UserError: with the place of the key.
    """
    for key, example in (("columns", "{prompt: question}"), ("roles", "{human: user, gpt: assistant}")):
        found = values.get(key)
        if found is None:
            continue
        texts = isinstance(found, dict) and all(isinstance(v, str) and v for pair in found.items() for v in pair)
        if not texts:
            raise UserError(f"{where(key)}: '{key}' is {quote(found)}; expected names, as in `{key}: {example}`")
        names = COLUMN_NAMES | {"subset"} if values.get("stage") == "evaluate" else COLUMN_NAMES
        allowed = CHAT_ROLES if key == "roles" else names
        for name in found.values() if key == "roles" else found:
            if name not in allowed:
                near = difflib.get_close_matches(name[:100], sorted(allowed), n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                what = (
                    f"expected one of {', '.join(allowed)}"
                    if key == "roles"
                    else "no format reads a column of that name"
                )
                raise UserError(f"{where(key)}: {key}: {quote(name)}: {what}{hint}")
    if values.get("format") == "plain" and values.get("chosen_dataset_name"):
        raise UserError(f"{where('format')}: `format: plain` takes one file of pairs, not chosen and rejected files")
    if values.get("format") == "plain" and values.get("stage") != "evaluate" and values.get("chat_template") != "plain":
        raise UserError(
            f"{where('format')}: `format: plain` keeps prompts and answers as plain texts, and a chat template would write turns "
            "around them; set `chat_template: plain` too"
        )


def check_combinations(values: dict[str, Any], where: Callable[[str], str]) -> None:
    """Reject incompatible values, which TRL would only report after seconds of imports."""
    _check_heldout(values, where)
    check_formats(values, where)
    if values.get("stage") == "evaluate":
        _check_benchmarks(values, where)
    get = values.get
    if get("bf16") and get("fp16"):
        raise UserError(f"{where('fp16')}: bf16 and fp16 are both true; keep one (bf16 if the GPU supports it)")
    if get("load_in_4bit") and get("load_in_8bit"):
        raise UserError(f"{where('load_in_8bit')}: load_in_4bit and load_in_8bit are both true; keep one")
    losses, weights = get("loss_type") or ["sigmoid"], get("loss_weights")
    if weights is not None and isinstance(losses, list) and len(weights) != len(losses):
        raise UserError(
            f"{where('loss_weights')}: loss_weights has {len(weights)} numbers and loss_type has {len(losses)}; give one weight per loss"
        )
    if isinstance(losses, list) and len(set(losses)) < len(losses):
        raise UserError(
            f"{where('loss_type')}: loss_type {quote(losses)} lists a loss twice; raise its loss_weights instead"
        )
    for old, new in (("gradient_checkpointing", "activation_checkpointing"),
                     ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")):  # fmt: skip
        if get(old) is not None and get(new) is not None:
            raise UserError(f"{where(new)}: {old} and {new} are two names of the same key; remove {new}")
    name = get("model_name_or_path") or ""
    if get("model_revision") not in (None, "main") and (name.startswith("embedded:") or os.path.isdir(name)):
        raise UserError(f"{where('model_revision')}: 'model_revision' has no effect on {quote(name)}; remove it")
    _check_scheduler(values, where)
    _check_optim_args(values, where)
    evaluates, saves = get("eval_strategy", "no"), get("save_strategy", "steps")
    if get("load_best_model_at_end") and saves != "best" and evaluates != saves:
        raise UserError(
            f"{where('load_best_model_at_end')}: load_best_model_at_end needs equal strategies, but eval_strategy is "
            f"{evaluates} and save_strategy is {saves}; set both to steps, or to epoch"
        )
    if get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy") and evaluates == "no":
        raise UserError(
            f"{where('lr_scheduler_type')}: {get('lr_scheduler_type')} follows the held-out loss; set eval_strategy"
        )


def _check_scheduler(values: dict[str, Any], where: Callable[[str], str]) -> None:
    """Check `lr_scheduler_kwargs`; transformers raises TypeError for them, but only after the model has loaded."""
    name, given, place = (
        values.get("lr_scheduler_type", "linear"),
        values.get("lr_scheduler_kwargs"),
        "lr_scheduler_kwargs",
    )
    takes = scheduler_arguments(name)
    if takes is None:
        return
    for key in given or {}:
        if key not in takes:
            known = f"takes {', '.join(takes)}" if takes else "takes none"
            raise UserError(f"{where(place)}: lr_scheduler_kwargs has {quote(key)}, but the scheduler {name} {known}")
    if given:
        values[place] = given = {key: _scheduler_value(where(place), key, value) for key, value in given.items()}
    missing = [key for key, needed in takes.items() if needed and key not in (given or {})]
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and not {"min_lr", "min_lr_rate"} & set(given or {}):
        missing = ["min_lr"]
    if missing:
        raise UserError(
            f"{where('lr_scheduler_type')}: the scheduler {name} needs {', '.join(missing)}; add "
            f"`lr_scheduler_kwargs: {{{missing[0]}: …}}`"
        )


def _scheduler_value(where: str, key: str, value: Any) -> Any:
    """A number, also if YAML 1.1 reads it as a string (1e-6); `*_type` is a string."""
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    if key.endswith("_type") and isinstance(value, str):
        return value
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: lr_scheduler_kwargs.{key} is {quote(value)}; expected a number")
    return number


def _check_optim_args(values: dict[str, Any], where: Callable[[str], str]) -> None:
    """Check `optim_args`: transformers splits `a=1,b=2` and raises a bare ValueError on anything else."""
    given = values.get("optim_args")
    if given and not all(len(part.split("=")) == 2 and all(part.split("=")) for part in given.split(",")):
        raise UserError(f"{where('optim_args')}: optim_args is {quote(given)}; expected name=value,name=value")
