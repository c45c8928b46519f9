"""The end of training: write the model, reload and compare it, and mark the run as complete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf.distributed.processes import is_main, on_main, say
from rlhf.distributed.sharding import is_sharded, unsharded
from rlhf.runs.card import write_card
from rlhf.runs.folder import RunFolder, finish_run
from rlhf.runs.records import describe_complete
from rlhf.training.stage import Plan, Stage

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from rlhf.runs.checkpointing import CheckpointMixin


def finish(stage: Stage, plan: Plan, trainer: CheckpointMixin, run: RunFolder, seconds: float) -> None:
    """Write the model on the main rank, reload and compare it; an error there ends all ranks (`on_main`).

    Args:
        seconds: the duration of training.
    """
    probe = stage.probe(trainer.train_dataset)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # without autocast
    trained, expected = gather_trained(model, probe) if any(map(is_sharded, model.parameters())) else (None, None)

    def write() -> None:
        say("Writing the model, reloading it and comparing ...")
        finished = model if trained is None else load_trained(stage, plan, trained)
        saved = save_finished_model(stage, plan, trainer, run, finished, expected, probe)
        summary = summarise_training(stage, trainer, run, seconds) | saved
        write_card(run.folder, summary)
        finish_run(run, summary)
        announce_finished(stage, run, summary)

    on_main(write)
    trainer.accelerator.end_training()


def save_finished_model(
    stage: Stage, plan: Plan, trainer: CheckpointMixin, run: RunFolder, model, expected, probe
) -> dict[str, Any]:
    """Write the files; returns what `save_finished` reports about them."""
    import torch

    from rlhf.models.finished import save_finished
    from rlhf.models.precision import compute_dtype

    exact = compute_dtype(trainer.model, trainer.accelerator.mixed_precision) == torch.float32
    return save_finished(
        model, trainer.processing_class, run.folder, reward=stage.name == "reward", merge=plan.merge,
        probe=probe, expected=expected, exact=expected is None or exact,
    )  # fmt: skip


def summarise_training(stage: Stage, trainer: CheckpointMixin, run: RunFolder, seconds: float) -> dict[str, Any]:
    """The entries of complete.json about the training; those about the files come from `save_finished`."""
    from rlhf.models.folder import is_adapter

    history = [h for h in trainer.state.log_history if "loss" in h]
    return {
        "stage": stage.name, "steps": trainer.state.global_step, "train_examples": len(trainer.train_dataset),
        "seconds": round(seconds, 1), "first_loss": history[0]["loss"] if history else None,
        "last_loss": history[-1]["loss"] if history else None,
        "kind": "adapter" if is_adapter(str(run.folder)) else "merged model"
    }  # fmt: skip


def announce_finished(stage: Stage, run: RunFolder, summary: dict[str, Any]) -> None:
    say(f"{stage.title} is complete: {run.folder}  ({describe_complete(summary)})")
    say(f"  written and reloaded: largest logit difference {summary['max_logit_difference']:.1e}")
    if before := summary["bytes_before_dequantising"]:
        merged = sum(size for name, size in summary["files"].items() if name.endswith(".safetensors"))
        say(
            f"  merged into the dequantised base: {merged / 1e6:.0f} MB instead of {before / 1e6:.0f} MB; "
            "`merge_adapter: false` keeps the adapter on 4 bits"
        )


def gather_trained(model, probe: list[list[int]]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Of a sharded model: the trained parameters, unsharded and on the main rank only, and the logits on `probe`.

    A collective: all ranks must call it.
    """
    from rlhf.models.finished import probe_logits

    expected = probe_logits(model, probe)
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with unsharded(parameter) as full:
                if is_main():
                    trained[name] = full.detach().cpu().clone()
    return trained, expected


def load_trained(stage: Stage, plan: Plan, trained: dict[str, torch.Tensor]) -> PreTrainedModel | PeftModel:
    """The stage's model loaded again, unsharded, with the trained parameters in it."""
    from peft import get_peft_model
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # or ZeRO-3 would shard it
    loaded = stage.load(plan)
    model: PreTrainedModel | PeftModel = loaded.model
    if loaded.peft_config is not None:
        model = get_peft_model(loaded.model, loaded.peft_config)
    missing = model.load_state_dict(trained, strict=False)
    assert not missing.unexpected_keys, f"trained parameters that a new model lacks: {missing.unexpected_keys[:3]}"
    return model
