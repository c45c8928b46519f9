"""The best checkpoint by a held-out metric (`load_best_model_at_end`): saved, kept, verified, and written in the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.distributed.processes import rank, say, world_size
from rlhf.runs.checkpoints import checkpoint_damage
from rlhf.runs.records import CHECKPOINT

if TYPE_CHECKING:
    import transformers

    class Trainer(transformers.Trainer):
        """What the mixin is mixed into: one of TRL's trainers."""

        model: transformers.PreTrainedModel
else:
    Trainer = object


class BestCheckpoint(Trainer):
    """Mixin: transformers' best checkpoint, made safe. A part of CheckpointMixin.

    transformers 5.23 compares every evaluation, but has the best one's weights only if that step happens to be saved;
    deletes the newest checkpoint before the best weights are written; and trusts a path that a moved folder has changed.
    """

    fault_tolerance: Any = None  # a FaultTolerance of checkpointing.py

    def _determine_best_metric(self, metrics, trial) -> bool:
        """Save whatever is the best so far, also between two `save_steps`."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.fault_tolerance is not None and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _finalize_training(self, trial, num_train_samples, start_time):
        """Keep the newest checkpoint until the model is written: a kill before that must not cost the steps after the best."""
        if self.fault_tolerance is None:
            return super()._finalize_training(trial, num_train_samples, start_time)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    def _load_best_model(self) -> None:
        """Also from a checkpoint for any engine, which holds nothing for the engine's own loading; verified before."""
        if self.fault_tolerance is None:
            return super()._load_best_model()
        if self.fault_tolerance.stopper.agreed and self.state.global_step < self.state.max_steps:
            return None  # stopped on request: it resumes from its newest checkpoint
        from accelerate.utils import gather_object

        from rlhf.runs.portable import PortableState
        from rlhf.runs.portable_index import is_portable

        best = Path(str(self.state.best_model_checkpoint))
        damage = checkpoint_damage(best, verify=True, part=rank(), parts=world_size())
        if damage := next(filter(None, gather_object([damage])), ""):
            say(
                f"\nwarning: {best}, the best by {metric_name(self.args)}, can't be used: {damage}; the weights of step "
                f"{self.state.global_step}, the last one, are written instead"
            )
            self.state.best_model_checkpoint = None
            return None
        if not is_portable({path.name for path in best.iterdir()}):
            return super()._load_best_model()
        PortableState(best).restore_weights(self.model)

    def best_is(self, folder: Path) -> None:
        """Note that `folder` holds the weights of the best evaluation so far, if that was after the current step."""
        if self.state.best_global_step and self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)

    def find_best_again(self) -> None:
        """After a resume: the best checkpoint lies beside the one resumed from, wherever the folder is now."""
        assert self.fault_tolerance is not None
        folder, state = self.fault_tolerance.folder, self.state
        name = Path(state.best_model_checkpoint or f"checkpoint-{state.best_global_step}").name
        state.best_model_checkpoint = str(folder / name) if (folder / name).is_dir() else None


def metric_name(args: Any) -> str:
    """The held-out metric that decides, as metrics.jsonl names it; '' if none does."""
    name = args.metric_for_best_model or ""
    return name if not name or name.startswith("eval_") else f"eval_{name}"


def best_record(args: Any, state: Any) -> dict[str, Any] | None:
    """Which checkpoint's weights are written, for complete.json: `{step, metric, value}`; None if they are the last ones."""
    if not (args.load_best_model_at_end and state.best_model_checkpoint):
        return None
    found = CHECKPOINT.fullmatch(Path(state.best_model_checkpoint).name)
    step, metric = int(found[1]) if found else 0, metric_name(args)
    values = [row[metric] for row in state.log_history if row.get("step") == step and metric in row]
    return {"step": step, "metric": metric, "value": values[-1] if values else None}
