"""A run's output: lines and progress bars on the screen, metrics.jsonl beside the model."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rlhf.console import log_line, metrics, seconds_left, training_bar
from rlhf.files import non_negative_int, read_json_lines, write_file


def add_callbacks(trainer, run_folder: Path, title: str) -> None:
    """Replace the trainer's printed dicts by our progress bar (lines without a terminal), and write metrics.jsonl."""
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    class Metrics(TrainerCallback):
        path = run_folder / "metrics.jsonl"
        waiting = ""  # lines not yet written because the disk is full

        def on_train_begin(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                kept = [m for m in read_metrics(run_folder) if m["step"] <= state.global_step and state.global_step > 0]
                kept = [m for m in kept if "train_runtime" not in m]  # the summary of a run that was stopped
                write_file(self.path, "".join(json.dumps(m) + "\n" for m in kept))

        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.is_world_process_zero and logs:
                line = {"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 2)}
                line |= {
                    k: float(v) if isinstance(v, (int, float)) or _is_number(v) else v
                    for k, v in logs.items()
                    if k != "epoch"
                }
                self.waiting += json.dumps(line) + "\n"
                if append(self.path, self.waiting):
                    self.waiting = ""

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    for callback in ([] if trainer.args.disable_tqdm else [_progress(title)]) + [Metrics]:
        trainer.add_callback(callback)


def _progress(title: str) -> type:
    """The callback that shows progress: a bar in a terminal, lines in a log file."""
    from transformers import ProgressCallback

    class Progress(ProgressCallback):
        """The trainer's own callback, with our bar."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.current_step, self.logs = state.global_step, {}
            if state.is_world_process_zero:
                self.training_bar = training_bar(title, state.max_steps, state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.training_bar is not None and logs:
                self.logs |= logs  # held-out metrics and the final summary lack those of training
                self.training_bar.parts = metrics(self.logs)
                self.training_bar.refresh()

    class Lines(ProgressCallback):
        """For log files: one line per log instead of a bar."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.first, self.started = state.global_step, time.monotonic()

        def on_step_end(self, args, state, control, **kwargs):
            pass

        def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)
            if self.prediction_bar is not None:
                self.prediction_bar.desc = f"{title}, held-out batches"

        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.is_world_process_zero and logs and metrics(logs):
                step, total = state.global_step, state.max_steps
                left = seconds_left(step - self.first, total - step, time.monotonic() - self.started)
                print(log_line(title, step, total, logs, left), file=sys.stderr, flush=True)

        def on_train_end(self, args, state, control, **kwargs):
            pass

    return Progress if sys.stderr.isatty() else Lines


def append(path: Path, text: str) -> bool:
    """Append text to a file: all of it, or nothing if the disk is full or read-only. Returns whether it was written."""
    try:
        with open(path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            written = file.write(text.encode())
            if written < len(text.encode()):
                file.truncate(end)
            return written == len(text.encode())
    except OSError:
        return False


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without damaged ones (a kill truncates the last one)."""
    return [
        row for row in read_json_lines(Path(folder) / "metrics.jsonl") if non_negative_int(row.get("step")) is not None
    ]


def findings_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the run said about itself (rlhf/training/watch.py), the last of each kind, by step.

    Returns:
        `{step, finding, sentence, turn, size, since}`; since: the step at which it was said first.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if isinstance(key := row.get("finding"), str) and _is_finding(row):
            found[key] = row | {"since": found.get(key, {}).get("since", row["step"])}
    return sorted(found.values(), key=lambda row: row["step"])


def _is_finding(row: dict[str, Any]) -> bool:
    texts = [row.get("sentence"), *(row["turn"] if isinstance(row.get("turn"), list) else [None])]
    size = row.get("size")
    return (
        all(isinstance(text, str) for text in texts) and isinstance(size, (int, float)) and not isinstance(size, bool)
    )


def _is_number(value: Any) -> bool:
    try:
        float(value)
        return True
    except (TypeError, ValueError):
        return False
