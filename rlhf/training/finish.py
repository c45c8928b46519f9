"""The end of training: write the model, read it again and compare it, and mark the run as complete."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.distributed.processes import on_main, say
from rlhf.distributed.sharding import is_sharded
from rlhf.files import sha256_of
from rlhf.models.folder import base_of, revision_of
from rlhf.runs.card import write_card
from rlhf.runs.checkpoints import MANIFEST
from rlhf.runs.folder import RunFolder, finish_run
from rlhf.runs.records import describe_best, describe_complete
from rlhf.training.stage import Plan, Stage

if TYPE_CHECKING:
    import torch

    from rlhf.runs.checkpointing import CheckpointMixin


def finish(stage: Stage, plan: Plan, trainer: CheckpointMixin, run: RunFolder, seconds: float) -> None:
    """Write the model and compare it (all ranks), then mark the run as complete; an error ends all ranks (`on_main`).

    Args:
        seconds: the duration of training.
    """
    import torch

    from rlhf.models.precision import compute_dtype
    from rlhf.models.saving import save_finished

    say("Writing the model, reading it again and comparing ...")
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # without autocast
    sharded = any(map(is_sharded, model.parameters()))  # then autocast may be FSDP2's own
    saved = save_finished(
        model, trainer.processing_class, run.folder, reward=stage.name == "reward", merge=plan.merge,
        probe=stage.probe(trainer.train_dataset), dtype=output_dtype(plan, model),
        made_from=checkpoint_of(trainer, run), trust_remote_code=plan.args.trust_remote_code,
        exact=not sharded or compute_dtype(model, trainer.accelerator.mixed_precision) == torch.float32,
    )  # fmt: skip

    def complete() -> None:
        assert saved is not None  # on the main rank
        summary = summarise_training(stage, trainer, run, seconds) | saved._asdict()
        write_card(run.folder, summary)
        finish_run(run, summary)
        announce_finished(stage, run, summary)
        if plan.merged_start is not None:
            shutil.rmtree(plan.merged_start, ignore_errors=True)

    on_main(complete)
    trainer.accelerator.end_training()


def output_dtype(plan: Plan, model) -> torch.dtype:
    """Of the finished weights: the recipe's `dtype`, else that of the base's checkpoint, else that of the model."""
    import torch
    from transformers import AutoConfig

    from rlhf.models.pieces import base_model

    if plan.recipe.get("dtype") in (None, "auto"):
        revision = revision_of(plan.model_name, plan.model_args.model_revision)
        options: Any = {"trust_remote_code": plan.args.trust_remote_code, "revision": revision}
        found = AutoConfig.from_pretrained(base_of(plan.model_name), **options).get_text_config().dtype
        if isinstance(found, torch.dtype):
            return found
    return base_model(model).dtype


def checkpoint_of(trainer: CheckpointMixin, run: RunFolder) -> str:
    """Identifies the trained weights by the checksums of their checkpoint; '' if there is none of them."""
    state, folder = trainer.state, run.folder / f"checkpoint-{trainer.state.global_step}"
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        folder = Path(state.best_model_checkpoint)
    return sha256_of(folder / MANIFEST) if (folder / MANIFEST).is_file() else ""


def summarise_training(stage: Stage, trainer: CheckpointMixin, run: RunFolder, seconds: float) -> dict[str, Any]:
    """The entries of complete.json about the training; those about the files come from `save_finished`."""
    from rlhf.models.folder import is_adapter
    from rlhf.runs.best import best_record

    history = [h for h in trainer.state.log_history if "loss" in h]
    state = trainer.state
    found: dict[str, Any] = {"best": best} if (best := best_record(trainer.args, state)) else {}
    if state.global_step < state.max_steps:
        found |= {"stopped_early_of": state.max_steps}
    return found | {
        "stage": stage.name, "steps": trainer.state.global_step, "train_examples": len(trainer.train_dataset),
        "seconds": round(seconds, 1), "first_loss": history[0]["loss"] if history else None,
        "last_loss": history[-1]["loss"] if history else None,
        "kind": "adapter" if is_adapter(str(run.folder)) else "merged model"
    }  # fmt: skip


def announce_finished(stage: Stage, run: RunFolder, summary: dict[str, Any]) -> None:
    say(f"{stage.title} is complete: {run.folder}  ({describe_complete(summary)})")
    if text := describe_best(summary):
        say(f"  {text}")
    difference = summary["max_logit_difference"]
    how = "every tensor is equal" if difference is None else f"largest logit difference {difference:.1e}"
    say(f"  written in {summary['dtype']} and read again: {how}")
    if before := summary["bytes_before_dequantising"]:
        merged = sum(size for name, size in summary["files"].items() if name.endswith(".safetensors"))
        say(
            f"  merged into the dequantised base: {merged / 1e6:.0f} MB instead of {before / 1e6:.0f} MB; "
            "`merge_adapter: false` keeps the adapter on 4 bits"
        )
