"""Atomic checkpoints and graceful stopping for TRL's trainers."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
import statistics
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback

from rlhf.distributed.processes import is_main, say
from rlhf.distributed.sharding import plain_class
from rlhf.errors import UserError
from rlhf.files import is_disk_error, sync_file, write_file
from rlhf.runs.best import BestCheckpoint
from rlhf.runs.card import write_card
from rlhf.runs.checkpoints import digest_files, newest_checkpoint, place_checkpoint, read_manifest, rotate_checkpoints
from rlhf.runs.portable import PortableState, Share, plan_share, write_share
from rlhf.runs.portable_index import IS_DATA
from rlhf.runs.stop import NOT_FINITE, SPIKE, STOP_FILE, Stopped, Stopper, watch

if TYPE_CHECKING:
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, RewardConfig, SFTConfig

    class Trainer(transformers.Trainer):
        """What the mixins are mixed into: one of TRL's trainers, with what all three have."""

        args: SFTConfig | RewardConfig | DPOConfig
        model: transformers.PreTrainedModel
        train_dataset: Dataset
        _metrics: dict[str, defaultdict[str, list[float]]]
        _total_train_tokens: int
else:
    Trainer = object


@dataclass
class FaultTolerance:
    """What a trainer needs to save and to stop safely.

    Attributes:
        folder: the run folder.
        stopper: receives the requests to stop.
        layout: world size and engine, for the manifest.
        watchdog_s: a step that takes longer than this many seconds counts as a hang; None disables the watchdog.
        saving_to: where the current checkpoint is written, in place of `folder`; None while none is being written.
        evaluation_pending: the stop skipped this step's evaluation; run it on resume.
        max_spike: abort when the gradient norm exceeds this multiple of its recent median; None disables.
        finite: whether all losses of the current step are finite, 0-d bool; None before its first loss.
        norms: the gradient norms of the recent steps.
        disk_error: disk error raised on this rank while writing the current checkpoint.
        portable: checkpoints hold the training state for any engine, not as the engine itself saves it.
        share: what this rank writes of the current checkpoint's training state; None: nothing, or none is being written.
        written: the files of it that are on disk: bytes and sha256.
        restore: the checkpoint to resume from, if any engine can read it; None: there is none.
    """

    folder: Path
    stopper: Stopper
    layout: dict[str, Any]
    watchdog_s: float | None = None
    max_spike: float | None = None
    saving_to: Path | None = None
    evaluation_pending: bool = False
    finite: torch.Tensor | None = None
    norms: deque = field(default_factory=lambda: deque(maxlen=HISTORY))
    disk_error: str = ""
    portable: bool = True
    share: Share | None = None
    written: dict[str, list] = field(default_factory=dict)
    restore: PortableState | None = None

    def failure(self) -> str:
        """The failure of the step that has just ended (NOT_FINITE or SPIKE), or ''."""
        *before, norm = self.norms or [0.0]
        finite, self.finite = self.finite, None
        if finite is not None and not finite:
            return NOT_FINITE
        if self.max_spike and len(before) >= HISTORY // 5 and norm > self.max_spike * statistics.median(before):
            return SPIKE
        return ""


HISTORY = 100  # steps whose gradient norms are kept; the spike check starts after HISTORY / 5 steps


class EvaluationStopped(Exception):
    """A stop was requested during evaluation."""


class AllStepsDone(Exception):
    """The checkpoint that training resumes from is that of its last step."""


class CheckpointMixin(BestCheckpoint, Trainer):
    """Precedes TRL's trainer among the bases of a class; does nothing until `use_fault_tolerance` is called."""

    fault_tolerance: FaultTolerance | None = None

    def use_fault_tolerance(self, fault_tolerance: FaultTolerance) -> None:
        """Write checkpoints atomically and honour requests to stop from now on."""
        self.fault_tolerance = fault_tolerance
        self.args.logging_nan_inf_filter = False  # it would log the mean of earlier losses instead of NaN
        self.add_callback(StopCallback(self))

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.fault_tolerance is not None:  # per micro-batch; read once per step, as that synchronises with the GPU
            before, now = self.fault_tolerance.finite, torch.isfinite(loss)
            self.fault_tolerance.finite = now if before is None else before & now
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.fault_tolerance is not None and found is not None:
            self.fault_tolerance.norms.append(float(found))
        return found

    def _get_output_dir(self, trial) -> str:
        saving_to = self.fault_tolerance and self.fault_tolerance.saving_to
        return str(saving_to) if saving_to else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Write to a folder beside the checkpoints, sync it to disk with checksums, then rename it."""
        if self.fault_tolerance is None:
            super()._save_checkpoint(model, trial)
            return
        folder = self.fault_tolerance.folder / f"checkpoint-{self.state.global_step}"
        partial, best_before = self.fault_tolerance.folder / ".partial", self.state.best_model_checkpoint
        reason = self._why_no_room() or self._write_checkpoint(model, trial, partial)
        if not reason:
            reason = self._place(partial / folder.name, folder)
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
        if reason:
            self.state.best_model_checkpoint = best_before
            newest = newest_checkpoint(self.fault_tolerance.folder)
            kept = f"{Path(newest).name} is kept" if newest else "there is no earlier one"
            say(f"\nwarning: no checkpoint of step {self.state.global_step}: {reason}; {kept}, and training continues")

    def _why_no_room(self) -> str:
        assert self.fault_tolerance is not None
        reason = ""
        if is_main() and (newest := newest_checkpoint(self.fault_tolerance.folder)):
            needed = 1.02 * sum(f.stat().st_size for f in Path(newest).rglob("*") if f.is_file())
            free = shutil.disk_usage(self.fault_tolerance.folder).free
            if free < needed:
                reason = f"it needs {needed / 1e9:.2f} GB, but the disk has only {free / 1e9:.2f} GB free"
        return broadcast_object_list([reason])[0]

    def _write_checkpoint(self, model, trial, partial: Path) -> str:
        """The reason why at least one rank could not write its part; '' if all could."""
        assert self.fault_tolerance is not None
        reason = ""
        try:
            if is_main():
                shutil.rmtree(partial, ignore_errors=True)
                (partial / f"checkpoint-{self.state.global_step}").mkdir(parents=True)
        except OSError as error:
            reason = str(error)
        if reason := self._first(reason):
            return reason
        self.fault_tolerance.share, self.fault_tolerance.written = self._plan_share(), {}
        self.fault_tolerance.saving_to, self.fault_tolerance.disk_error = partial, ""
        try:
            with self._defer_disk_errors():
                super()._save_checkpoint(model, trial)
        finally:
            self.fault_tolerance.saving_to = self.fault_tolerance.share = None
        return self._first(self.fault_tolerance.disk_error)

    def _plan_share(self) -> Share | None:
        """What this rank writes of the training state; None if the engine saves it."""
        assert self.fault_tolerance is not None
        if not self.fault_tolerance.portable:
            return None
        share = plan_share(self)
        if isinstance(share, Share):
            return share
        self.fault_tolerance.portable = False
        say(f"\nnote: checkpoints can be resumed under this engine only, not with other launch files: {share}")
        return None

    @contextlib.contextmanager
    def _defer_disk_errors(self):
        """Defer disk errors while a checkpoint is written, so that no rank leaves the others in a collective."""
        try:
            yield
        except Exception as error:  # safetensors and torch have their own exceptions for a full disk
            if self.fault_tolerance is None or self.fault_tolerance.saving_to is None or not is_disk_error(error):
                raise
            self.fault_tolerance.disk_error = self.fault_tolerance.disk_error or " ".join(str(error).split())

    def create_model_card(self, *args, **kwargs) -> None:
        """Called by TRL with each checkpoint and before a push; TRL's card says `None` where ours has values."""
        if self.fault_tolerance is not None and is_main():
            with self._defer_disk_errors():
                write_card(self.fault_tolerance.folder)

    def save_model(self, output_dir=None, _internal_call=False):
        """In a checkpoint of full fine-tuning: no weights, if the training state or DeepSpeed's own files hold them.

        transformers 5.23 would write them a second time, through rank 0; under ZeRO-1 and 2 copy all of them on each rank;
        under ZeRO-3 write the whole checkpoint twice. A push to the hub with each checkpoint needs them.
        """
        writing = self.fault_tolerance is not None and self.fault_tolerance.saving_to is not None
        if self._has_adapter_at_hand():  # accelerate 1.15 would copy the base too, on each rank
            if self.args.should_save:
                self._save(output_dir)
            return None
        held = self.is_deepspeed_enabled or (self.fault_tolerance and self.fault_tolerance.share)
        if not (writing and held) or hasattr(self.model, "peft_config") or self._pushes_weights():
            return super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            with plain_class(self.model):
                self._save(output_dir, state_dict={})
            (Path(output_dir) / "model.safetensors").unlink(missing_ok=True)

    def _has_adapter_at_hand(self) -> bool:
        """Whether the main rank holds all of an adapter under DeepSpeed: ZeRO-1 and 2."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return plugin is not None and plugin.zero_stage < 3 and hasattr(self.model, "peft_config")

    def _pushes_weights(self) -> bool:
        """Whether weights go to the hub with each checkpoint, as they do where one rank holds all of them."""
        return self.args.push_to_hub and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _save(self, output_dir=None, state_dict=None) -> None:
        with self._defer_disk_errors():
            super()._save(output_dir, state_dict)
            if output_dir is not None:  # PEFT's card, full of [More Information Needed]
                (Path(output_dir) / "README.md").unlink(missing_ok=True)

    def _place(self, partial: Path, folder: Path) -> str:
        assert self.fault_tolerance is not None
        reason, files = "", {}
        try:
            self.best_is(folder)  # on all ranks, which load it in the end
            if self.state.best_model_checkpoint and is_main():
                self.state.save_to_json(str(partial / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if is_main() and (metrics := self.fault_tolerance.folder / "metrics.jsonl").is_file():
                sync_file(metrics)  # its lines up to this step must be as durable as the checkpoint
            rank, world = self.accelerator.process_index, self.accelerator.num_processes
            files = digest_files(partial, rank, world, IS_DATA) | self.fault_tolerance.written
        except OSError as error:
            reason = str(error)
        found = gather_object([files])
        if reason := self._first(reason):
            return reason
        if is_main():
            try:
                more = {
                    "layout": self.fault_tolerance.layout,
                    "evaluation_pending": self.fault_tolerance.evaluation_pending,
                }
                place_checkpoint(partial, folder, {k: v for part in found for k, v in part.items()}, **more)
                rotate_checkpoints(
                    self.fault_tolerance.folder, self.args.save_total_limit, self.state.best_model_checkpoint
                )
            except OSError as error:
                reason = str(error)
        return self._first(reason)

    def _save_optimizer_and_scheduler(self, output_dir) -> None:
        if self.fault_tolerance is not None and self.fault_tolerance.share is not None:
            with self._defer_disk_errors():
                self.fault_tolerance.written = write_share(self.fault_tolerance.share, self, Path(output_dir))
            return
        split = self.fault_tolerance is not None and self.is_deepspeed_enabled
        with self._deepspeed_defers_errors(output_dir) if split else contextlib.nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)

    @contextlib.contextmanager
    def _deepspeed_defers_errors(self, output_dir):
        """DeepSpeed interleaves file writes with collectives: an I/O error on one rank must not desynchronise all."""
        engine: Any = self.model_wrapped
        write = engine.checkpoint_engine.save

        def save(*args, **kwargs):
            with self._defer_disk_errors():
                write(*args, **kwargs)

        engine.checkpoint_engine.save = save
        engine._copy_recovery_script = lambda folder: None
        engine.save_checkpoint = functools.partial(engine.save_checkpoint, save_latest=False)
        try:
            yield
        finally:
            del engine.checkpoint_engine.save, engine._copy_recovery_script, engine.save_checkpoint
        if is_main():
            with self._defer_disk_errors():
                (Path(output_dir) / "latest").write_text(f"global_step{engine.global_steps}")

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Restore a state for any engine in two steps: the weights first, the rest when the engine has wrapped them."""
        if self.fault_tolerance is None or self.fault_tolerance.restore is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.fault_tolerance.restore.restore_weights(self.model)
        found = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.fault_tolerance.restore.restore_optimizer(self)
        self._load_scaler(resume_from_checkpoint)
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if self.fault_tolerance is None or self.fault_tolerance.restore is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _first(self, reason: str) -> str:
        """The reason of the lowest rank that has one, on all ranks; '' if none has."""
        return next(filter(None, gather_object([reason])), "")

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler: bool = False):
        if skip_scheduler and self.fault_tolerance is not None and self.state.global_step > 0:
            return {}  # eval_on_start of a resumed run: one evaluation more would count for early stopping
        try:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except EvaluationStopped:
            assert self.fault_tolerance is not None  # its callback has raised it
            self.fault_tolerance.evaluation_pending = True
            self.control.should_save = self.control.should_training_stop = True
            return {}


class StopCallback(TrainerCallback):
    """Checks after each step whether to stop, and resets the watchdog."""

    def __init__(self, trainer):
        self.trainer = trainer

    @property
    def fault_tolerance(self) -> FaultTolerance:
        return self.trainer.fault_tolerance

    def on_train_begin(self, args, state, control, **kwargs):
        watch(self.fault_tolerance.watchdog_s)
        self.trainer.find_best_again()
        checkpoint = self.fault_tolerance.folder / f"checkpoint-{state.global_step}"
        if (read_manifest(checkpoint) or {}).get("evaluation_pending") and state.global_step > 0:
            metrics = self.trainer._evaluate(None, None)
            if metrics and self.trainer._determine_best_metric(metrics, None):
                self.trainer.best_is(checkpoint)
            self.fault_tolerance.evaluation_pending = False
        if state.global_step >= state.max_steps or control.should_training_stop:  # the latter: early stopping
            raise AllStepsDone

    def on_step_end(self, args, state, control, **kwargs):
        watch(self.fault_tolerance.watchdog_s)
        request = self.fault_tolerance.stopper.agree(self.fault_tolerance.failure())
        if request in (NOT_FINITE, SPIKE):
            raise UserError(failure_message(request, self.fault_tolerance, state.global_step))
        if request and state.global_step < state.max_steps:
            at_end = args.eval_strategy == "epoch" and math.isclose(state.epoch, round(state.epoch))
            self.fault_tolerance.evaluation_pending = control.should_evaluate or at_end
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopping(state):
            control.should_evaluate = control.should_save = control.should_log = False

    def on_prediction_step(self, args, state, control, **kwargs):
        watch(self.fault_tolerance.watchdog_s)
        best_counts = args.metric_for_best_model is not None  # transformers needs its result
        if not best_counts and self.fault_tolerance.stopper.agree() and state.global_step < state.max_steps:
            raise EvaluationStopped

    def on_save(self, args, state, control, **kwargs):
        watch(self.fault_tolerance.watchdog_s)

    def stopping(self, state) -> bool:
        return bool(self.fault_tolerance.stopper.agreed) and state.global_step < state.max_steps


def failure_message(failure: str, fault_tolerance: FaultTolerance, step: int) -> str:
    """The error message for a loss or a gradient norm after which training must not continue."""
    kept = newest_checkpoint(fault_tolerance.folder)
    kept = f"the last checkpoint before it is {kept}" if kept else "no checkpoint had been written"
    if failure == SPIKE:
        *before, norm = fault_tolerance.norms
        limit = f"max_gradient_spike={fault_tolerance.max_spike:g}"
        return (
            f"the gradient norm of step {step} is {norm:.3g}, more than {limit} times the median of the {len(before)} "
            f"steps before it, {statistics.median(before):.3g}; {kept}. Inspect the data of this step, or raise "
            "max_gradient_spike (0 disables the check), and run the same command to resume"
        )
    return (
        f"the loss of step {step} is not a finite number, and more training would only damage the model; {kept}. Usual "
        "causes: a learning rate that is too high, fp16 where bf16 is possible, a broken input model. Change the recipe and "
        "start with --fresh"
    )


def raise_if_stopped(trainer) -> None:
    """After training: if it was stopped before its last step, write stopped.json and raise Stopped."""
    fault_tolerance, state = trainer.fault_tolerance, trainer.state
    if not fault_tolerance.stopper.agreed or state.global_step >= state.max_steps:
        return
    checkpoint = newest_checkpoint(fault_tolerance.folder)
    if is_main():
        stopper = fault_tolerance.stopper
        note_stop(fault_tolerance.folder, stopper.agreed, state.global_step, state.max_steps, checkpoint)
    trainer.accelerator.wait_for_everyone()
    say(
        f"\nStopped after step {state.global_step} of {state.max_steps} ({fault_tolerance.stopper.agreed}); "
        f"{'saved as ' + checkpoint if checkpoint else 'no checkpoint could be written'}. "
        "Run the same command to resume."
    )
    raise Stopped


def note_stop(folder: Path, by: str, step: int = 0, of: int = 0, checkpoint: str | None = None) -> None:
    """Write stopped.json and remove the file `stop`, so that it does not stop the next start too."""
    note = {"step": step, "of": of, "by": by, "checkpoint": checkpoint}
    write_file(folder / "stopped.json", json.dumps(note) + "\n")
    (folder / STOP_FILE).unlink(missing_ok=True)
