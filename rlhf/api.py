"""Python instead of the command line: `pack` for a trainer of TRL's own, `train` for a recipe and rows that Python holds.

    from rlhf import pack, train

`score`, `generate` and `label` for finished models are in rlhf/inference/python.py.

Nothing heavy is imported before one of them is called.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from rlhf.config.recipe import Recipe, check_recipe
from rlhf.config.stage_config import TRAINING_STAGES
from rlhf.config.yaml_reader import quote_path, read_flat
from rlhf.console import ended_bars
from rlhf.data.sources import PYTHON, Source, source_of
from rlhf.errors import UserError, quote
from rlhf.runs.checkpoints import newest_checkpoint
from rlhf.runs.command import CALL, TOKEN
from rlhf.runs.folder import RunFolder, fresh_folder
from rlhf.runs.records import read_complete
from rlhf.training.stage import Stage

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel
    from trl import DPOConfig, DPOTrainer, RewardTrainer, SFTTrainer

    Rows: TypeAlias = Dataset | list[dict[str, Any]]


# --- a trainer of TRL's own ------------------------------------------------------------------------------------------


def pack(
    trainer: DPOTrainer | RewardTrainer | SFTTrainer,
    *,
    cached_reference: bool = True,
    reference_cache: str | os.PathLike[str] | None = None,
) -> str | None:
    """Let a trainer that TRL built train without padding, with the same losses; call it between constructor and `train()`.

    It packs the backbones of the model and of the reference (`rlhf.packing`), puts the quick LM head on CPUs in the place of
    TRL's (in this Python process, for every trainer), and gives DPO's rows their reference log-probabilities: one pass over
    the data now, kept on disk for later runs, instead of one in every step.

    Args:
        cached_reference: False leaves DPO's reference to the steps; quicker where `max_steps` ends the run long before
            all of the data was seen.
        reference_cache: the folder of the cached log-probabilities; default: `reference` in the user's cache folder.

    Returns:
        None if all of this is applied; else what is not, and why, in a sentence. The rest is applied, and the trainer trains
        what it would have trained without.
    """
    from trl import DPOTrainer, RewardTrainer, SFTTrainer

    if not isinstance(trainer, (DPOTrainer, RewardTrainer, SFTTrainer)):
        return (
            f"trainer is of type {type(trainer).__name__}; expected TRL's DPOTrainer, RewardTrainer or SFTTrainer (nothing was "
            "changed)"
        )
    if trainer.args.device.type == "cpu":
        from rlhf.packing import lm_head

        lm_head.install()
    reasons = [_pack_backbones(trainer, "rows" if isinstance(trainer, SFTTrainer) else "pairs")]
    if isinstance(trainer, DPOTrainer) and cached_reference and not trainer.precompute_ref_logps:
        reasons.append(_cache_reference(trainer, Path(reference_cache) if reference_cache else None))
    return "; ".join(filter(None, reasons)) or None


def _pack_backbones(trainer: DPOTrainer | RewardTrainer | SFTTrainer, mode: str) -> str:
    """Pack model and reference; returns '' or why they can't be."""
    from rlhf.packing import attention_window, pack_backbone, why_not
    from rlhf.packing.backbone import find_backbone

    for option in ("packing", "padding_free"):
        if mode == "rows" and getattr(trainer.args, option, False):
            return f"batches stay TRL's own: `{option}=True` lays them out in one row already"
    models = [trainer.model]
    if (reference := getattr(trainer, "ref_model", None)) is not None:
        models.append(trainer.accelerator.unwrap_model(reference))
    longest = cast("DPOConfig", trainer.args).max_length
    windows = [
        window for model in models if (backbone := find_backbone(model)) and (window := attention_window(backbone))
    ]
    if windows and (longest is None or longest > min(windows)):
        longest = _longest_row(trainer)
    for model in models:
        if reason := why_not(model, longest):
            return f"batches are padded, not packed: {reason}"
    for model in models:
        pack_backbone(model, mode, longest)
    return ""


def _longest_row(trainer: DPOTrainer | RewardTrainer | SFTTrainer) -> int | None:
    """Tokens of the longest row among the trainer's; max_length if they are not tokenised yet."""
    from datasets import Dataset

    from rlhf.training.tokenise import count_tokens

    most, heldout, longest = cast("DPOConfig", trainer.args).max_length, trainer.eval_dataset, 0
    for dataset in (trainer.train_dataset, *(heldout.values() if isinstance(heldout, dict) else (heldout,))):
        if dataset is None:
            continue
        if not isinstance(dataset, Dataset):
            return most
        names = [n for n in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids") if n in dataset.column_names]
        if not names:
            return most
        sides, rows = 1 if "input_ids" in names else 2, dataset.select_columns(names)
        longest = max(longest, max((count_tokens(row, most, padded=True) // sides for row in rows), default=0))
    return longest


def _cache_reference(trainer: DPOTrainer, folder: Path | None) -> str:
    """Give the rows of a DPOTrainer their reference log-probabilities; returns '' or why not."""
    from rlhf.models.digests import weights_in_memory
    from rlhf.packing import packing_mode
    from rlhf.training.reference import add_reference_logps

    if reason := _why_online(trainer):
        return f"the reference is asked in every step: {reason}"
    model = cast("PreTrainedModel", trainer.model)
    path = "packed" if packing_mode(model) else str(model.config._attn_implementation)
    source = weights_in_memory(trainer.accelerator.unwrap_model(trainer.ref_model or model))

    def add(dataset: Dataset, name: str = "", batch_size: int = 0) -> Dataset:
        known = [c for c in ("ref_chosen_logps", "ref_rejected_logps") if c in dataset.column_names]  # TRL ignored them
        return add_reference_logps(trainer, dataset.remove_columns(known), source, path, folder)

    trainer.train_dataset = add(trainer.train_dataset)
    if isinstance(trainer.eval_dataset, dict):
        trainer.eval_dataset = {name: add(dataset) for name, dataset in trainer.eval_dataset.items()}
    elif trainer.eval_dataset is not None:
        trainer.eval_dataset = add(trainer.eval_dataset)
    trainer.precompute_ref_logps = True
    trainer._precompute_ref_logps = add  # type: ignore[method-assign]  # of a data set that is given to `evaluate`
    return ""


def _why_online(trainer: DPOTrainer) -> str:
    """Why reference log-probabilities of before training would not be those that TRL's steps use; '' if they would."""
    from datasets import Dataset

    if trainer.state.global_step:
        return "the trainer has started to train"
    if cast("DPOConfig", trainer.args).sync_ref_model:
        return "sync_ref_model moves it during training"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return (
            "under FSDP and DeepSpeed only a recipe caches it"  # rows in bf16, and weights that are not on the GPU yet
        )
    policy = cast("PreTrainedModel", trainer.model)
    if trainer.ref_model is None and any(_drops_out(*named) for named in policy.named_modules()):
        return "it has dropout, and TRL does not switch that off for it"
    heldout = trainer.eval_dataset
    for dataset in (trainer.train_dataset, *(heldout.values() if isinstance(heldout, dict) else (heldout,))):
        if dataset is not None and not isinstance(dataset, Dataset):
            return f"the rows are of type {type(dataset).__name__}, which can't be gone over beforehand"
        if dataset is not None and "prompt_ids" not in dataset.column_names:
            return "the rows are tokenized in every step"
    return ""


def _drops_out(name: str, module: torch.nn.Module) -> bool:
    """Whether a module of the policy has dropout while the policy is asked as the reference: a new adapter is off then."""
    import torch

    if isinstance(module, torch.nn.Dropout):
        return module.p > 0 and ("lora_dropout" not in name or name.endswith(".ref"))
    return isinstance(found := getattr(module, "attention_dropout", 0.0), float) and found > 0


# --- a recipe --------------------------------------------------------------------------------------------------------


def train(
    recipe: Mapping[str, Any] | str | os.PathLike[str],
    train_dataset: Rows | None = None,
    eval_dataset: Rows | None = None,
    *,
    fresh: bool = False,
    **keys: Any,
) -> RunFolder:
    """Run a training stage as `rlhf sft`, `rlhf reward` and `rlhf dpo` do: the same checks, files, checkpoints and resume.

    Args:
        recipe: the keys of a recipe, `stage` among them, or the path of a recipe's file.
        train_dataset: training rows in any format that a file may have, instead of `dataset_name`: a `datasets.Dataset`
            or a list of dicts.
        eval_dataset: held-out rows, instead of `eval_dataset_name`.
        fresh: train in a new folder beside `output_dir`.
        keys: of the recipe, over those it has.

    Returns:
        The run folder: `folder`, and `complete` with steps, losses and checksums. A run that is complete already is not
        trained again; one that was interrupted resumes.

    Raises:
        UserError: a mistake in recipe, rows or output folder, with its place, before a model loads; a ValueError.
        rlhf.runs.stop.Stopped: it was asked to stop (Ctrl-C, SIGTERM) and has saved; the same call resumes.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError(
            "rlhf.train stops and saves on signals, which Python gives to its main thread only: call it there"
        )
    given = {
        key: source_of(name, rows)
        for key, name, rows in (("dataset_name", "train_dataset", train_dataset), ("eval_dataset_name", "eval_dataset", eval_dataset))
        if rows is not None
    }  # fmt: skip
    read = _read_recipe(recipe, given, keys)
    if fresh:
        read = read.replace("output_dir", str(fresh_folder(Path(read.values["output_dir"]))))
    from rlhf.training.run import run_recipe

    with ended_bars():
        run_recipe(_stage(read.stage), read, given)
    folder = Path(read.values["output_dir"])
    return RunFolder(folder, read_complete(folder), newest_checkpoint(folder))


def _read_recipe(recipe: Any, given: Mapping[str, Source], keys: dict[str, Any]) -> Recipe:
    """The recipe with the keys of the call over it, checked."""
    lines: dict[str, int | None] = {}
    if isinstance(recipe, Mapping):
        path, values = "recipe", {str(key): _plain(value) for key, value in recipe.items()}
    elif isinstance(recipe, (str, os.PathLike)):
        values, lines = read_flat(os.fspath(recipe))
        path = quote_path(os.fspath(recipe))
    else:
        raise UserError(f"recipe is of type {type(recipe).__name__}; expected a dict of keys, or the path of a recipe")
    for key, value in keys.items():
        values[key], lines[key] = _plain(value), None
    for key, source in given.items():
        values[key] = PYTHON + source.name
        lines.pop(key, None)
    stage = values.get("stage")
    if stage not in TRAINING_STAGES:
        found = f"stage is {quote(stage)}" if stage is not None else "the recipe does not say its stage"
        raise UserError(f"{path}: {found}; rlhf.train runs {', '.join(TRAINING_STAGES)}")
    checked = check_recipe(Recipe(stage, path, values, lines, _call(recipe, given, keys)))
    for key, others in _NAME_PARTS.items():
        for other in others if key in given else ():
            if checked.get(other) is not None:
                raise UserError(f"{checked.where(other)}: {other} has no effect on rows that are given; remove it")
    return checked


_NAME_PARTS = {
    "dataset_name": ("dataset_train_split", "dataset_config"), "eval_dataset_name": ("dataset_test_split",),
}  # fmt: skip


def _plain(value: Any) -> Any:
    """A value as YAML would have it: paths are texts, tuples lists, NumPy's numbers Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return (
        value.item() if hasattr(value, "dtype") and hasattr(value, "item") and getattr(value, "size", 0) == 1 else value
    )


def _call(recipe: Any, given: Mapping[str, Source], keys: dict[str, Any]) -> str:
    """The call as provenance.json records it; recipe.yaml beside it has all keys."""
    words = ["recipe" if isinstance(recipe, Mapping) else repr(os.fspath(recipe))]
    words += [f"{source.name}=<{source.num_rows} rows>" for source in given.values()]
    words += [f"{key}={'...' if TOKEN.fullmatch(f'--{key}') else repr(_plain(value))}" for key, value in keys.items()]
    return f"{CALL}{', '.join(words)})"


def _stage(name: str) -> Stage:
    if name == "sft":
        from rlhf.training.sft import SFT as stage
    elif name == "reward":
        from rlhf.training.reward import REWARD as stage
    else:
        from rlhf.training.dpo import DPO as stage
    return stage
