"""The run read for the user: callbacks that report what the metrics mean (symptoms.py), and that stop early.

Each finding is a line on the screen and a line of metrics.jsonl, from which status, report and model card take it over.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback

from rlhf.distributed.processes import say
from rlhf.runs.best import metric_name
from rlhf.runs.metrics import append, findings_of, read_metrics
from rlhf.training.metric_history import Finding, History, Settings, Teller
from rlhf.training.stage import Plan, Stage
from rlhf.training.symptoms import find

if TYPE_CHECKING:
    from rlhf.runs.checkpointing import CheckpointMixin


def add_watch(stage: Stage, plan: Plan, trainer: CheckpointMixin, folder: Path) -> None:
    """Add the callbacks to a trainer, after that which writes metrics.jsonl; say what decides about the best checkpoint."""
    trainer.add_callback(Watch(settings_of(stage, plan, trainer), folder))
    args, patience = plan.args, plan.stage_args.early_stopping_patience
    if args.load_best_model_at_end:
        most = "highest" if args.greater_is_better else "lowest"
        say(f"  writes   the checkpoint with the {most} {metric_name(args)}, not the last one")
    if patience is None:
        return
    trainer.add_callback(EarlyStop(patience, plan.stage_args.early_stopping_threshold))
    if not args.load_best_model_at_end:
        say(
            "note: early stopping ends the run, but the weights of its last step are written; `load_best_model_at_end: true` "
            "writes those of the best"
        )


def settings_of(stage: Stage, plan: Plan, trainer: CheckpointMixin) -> Settings:
    """What the symptoms depend on, of a run whose trainer is built."""
    args: Any = plan.args
    losses = getattr(args, "loss_type", ["sigmoid"])
    plain = losses in ("sigmoid", ["sigmoid"]) and not getattr(args, "label_smoothing", 0)
    rows = trainer.eval_dataset
    return Settings(
        stage.name, args.learning_rate, beta=args.beta if stage.name == "dpo" else 1.0,
        heldout=len(rows) if rows is not None and hasattr(rows, "__len__") else 0, log_two=stage.name == "reward" or plain,
    )  # fmt: skip


class Watch(TrainerCallback):
    """Looks for symptoms with each log, on the main process; the cost does not grow with the run's training logs."""

    def __init__(self, settings: Settings, folder: Path):
        self.settings, self.folder = settings, folder
        self.history, self.teller = History(), Teller()
        self.waiting = ""  # lines not yet written because the disk is full

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.settings = dataclasses.replace(self.settings, total_steps=state.max_steps)
        rows = read_metrics(self.folder) if state.global_step else []
        for row in rows:
            self.history.add(row, self.settings)
        self.teller = Teller({f["finding"]: f["size"] for f in findings_of(rows)})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        row = {"step": state.global_step, "epoch": state.epoch} | {k: v for k, v in logs.items() if k != "epoch"}
        if not self.history.add(row, self.settings):
            return
        for finding in self.teller.news(find(self.history, self.settings)):
            say(told(finding))
            line = {"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 2)}
            line |= {
                "finding": finding.key,
                "sentence": finding.sentence,
                "turn": list(finding.turn),
                "size": finding.size,
            }
            self.waiting += json.dumps(line) + "\n"
        if self.waiting and append(self.folder / "metrics.jsonl", self.waiting):
            self.waiting = ""


def told(finding: Finding) -> str:
    """A finding as it stands on the screen."""
    return f"\nstep {finding.step}: {finding.sentence}.\n  turn: {'; or '.join(finding.turn)}. docs/tuning.md: {finding.key}"


class EarlyStop(EarlyStoppingCallback):
    """transformers' early stopping, with words; its count survives a stop and a resume, on any number of processes.

    Every rank counts: the metrics are the same on all of them, and so is the decision.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        saved = (state.stateful_callbacks or {}).get(type(self).__name__) if state.global_step else None
        if saved:
            self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_evaluate(self, args, state, control, metrics, **kwargs):  # type: ignore[override]  # as in transformers
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience and state.global_step < state.max_steps:
            say(
                f"\nstep {state.global_step}: early stopping: {metric_name(args)} has not been better than "
                f"{state.best_metric:.4g} (step {state.best_global_step}) in {self.early_stopping_patience} evaluation"
                f"{'' if self.early_stopping_patience == 1 else 's'}"
            )
