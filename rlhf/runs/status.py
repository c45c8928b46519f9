"""The state of a run, read from its folder: an exit code for batch scripts, one line for people. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.config.recipe import load_recipe
from rlhf.config.stage_config import STAGES
from rlhf.errors import UserError, quote
from rlhf.files import lock_file, non_negative_int, read_json
from rlhf.runs.checkpoints import newest_checkpoint
from rlhf.runs.folder import refuse_other_run
from rlhf.runs.metrics import findings_of, read_metrics
from rlhf.runs.records import read_complete
from rlhf.runs.stop import EXIT_STOPPED

UNKNOWN = "?"  # a stage whose name can't be read
COMPLETE, STOPPED, INTERRUPTED, NOT_STARTED, RUNNING = "complete", "stopped", "interrupted", "not started", "running"
EXIT_CODES = {COMPLETE: 0, STOPPED: EXIT_STOPPED, INTERRUPTED: 1, NOT_STARTED: 3, RUNNING: 4}


@dataclass
class Status:
    """The state of a run.

    Attributes:
        stage: `sft`, `reward`, `dpo` or `evaluate`.
        folder: the run folder.
        kind: `complete`, `stopped` (on request, and saved), `interrupted`, `not started` or `running`.
        step: the last step that the run has logged; 0: none.
        of: the total number of steps; 0: unknown.
        saved: the step of the checkpoint to resume from; 0: none.
        by: what asked it to stop, or which process is running it.
        findings: what the run has said about itself, as sentences.
    """

    stage: str
    folder: Path
    kind: str
    step: int = 0
    of: int = 0
    saved: int = 0
    by: str = ""
    findings: list[str] = field(default_factory=list)

    def progress(self) -> str:
        """`step 12 of 40`, `step 12` if the total is unknown, or ''."""
        return (f"step {self.step}" + (f" of {self.of}" if self.of else "")) if self.step else ""

    def next(self) -> str:
        """What running the same command again will do."""
        if self.kind == RUNNING:
            return self.by
        if self.kind in (COMPLETE, NOT_STARTED):
            return ""
        if self.stage == "evaluate":  # it has no checkpoints: rlhf/evaluation/partial.py
            return "the same command resumes after the last batch that was measured"
        if not self.saved:
            return "no checkpoint yet: the same command starts from scratch"
        lost = self.step - self.saved
        return f"the same command resumes after step {self.saved}" + (f" ({_steps(lost)} lost)" if lost > 0 else "")

    def line(self) -> str:
        """The status in one line."""
        asked = f" ({self.by})" if self.kind == STOPPED and self.by else ""
        at = f"{' at' if self.kind in (STOPPED, INTERRUPTED) else ','} {self.progress()}" if self.progress() else ""
        return " · ".join(filter(None, (f"{self.stage}: {self.kind}{at}{asked}", str(self.folder), self.next())))


def _steps(number: int) -> str:
    return f"{number} step{'' if number == 1 else 's'}"


def status_of_recipe(recipe_path: str, stage: str, overrides: list[str] | None = None) -> Status:
    """The status of a recipe's run.

    Raises:
        UserError: a mistake in the recipe, or its folder holds another run.
    """
    recipe = load_recipe(recipe_path, stage, overrides or [])
    folder = Path(recipe.get("output_dir"))
    if os.path.lexists(folder / "recipe.yaml"):
        refuse_other_run(recipe, folder, {})
    return status_of_folder(folder, stage)


def status_of_folder(folder: Path, stage: str) -> Status:
    """The status of the run in a folder (`not started` if there is none)."""
    complete, stopped = read_complete(folder), read_json(folder / "stopped.json")
    metrics = read_metrics(folder)
    findings = [f"step {row['step']}: {row['sentence']}" for row in findings_of(metrics)]
    if complete:
        steps = int(complete.get("steps") or 0)
        return Status(stage, folder, COMPLETE, steps, steps, steps, findings=findings)
    checkpoint = newest_checkpoint(folder)
    saved = int(Path(checkpoint).name.removeprefix("checkpoint-")) if checkpoint else 0
    step = max([saved, *(int(row["step"]) for row in metrics)])
    state = (read_json(Path(checkpoint) / "trainer_state.json") or {}) if checkpoint else {}
    found = Status(
        stage, folder, INTERRUPTED, step, non_negative_int(state.get("max_steps")) or 0, saved, findings=findings
    )
    holder = holder_of(folder)
    if holder is not None:
        found.kind, found.by = RUNNING, holder
    elif stopped:
        found.kind, found.step, found.of = (
            STOPPED,
            non_negative_int(stopped.get("step")) or step,
            non_negative_int(stopped.get("of")) or found.of,
        )
        found.by = str(stopped.get("by") or "")
    elif not step and not (folder / "recipe.yaml").is_file():
        found.kind = NOT_STARTED
    return found


def holder_of(folder: Path) -> str | None:
    """The holder of the run folder's lock (process, host, start time), or None."""
    try:
        with open(folder / ".lock", encoding="utf-8") as file:
            return None if lock_file(file, shared=True) else file.read().strip() or "another process"
    except OSError:  # no lock there
        return None


# --- all stages of a folder -------------------------------------------------------------------------------------------


def statuses(folder: str) -> list[Status]:
    """The statuses in a folder of recipes, in a folder with the runs of several stages, or of one run folder.

    Raises:
        UserError: the folder is none of these.
    """
    place = Path(folder)
    if os.path.isfile(place / "provenance.json"):
        return [status_of_folder(place, _stage_of(place))]
    recipes = [stage for stage in STAGES if os.path.isfile(place / f"{stage}.yaml")]
    if recipes:
        return [status_of_recipe(str(place / f"{stage}.yaml"), stage) for stage in recipes]
    runs = [f.parent for f in place.glob("*/provenance.json")] if os.path.isdir(place) else []
    found = [status_of_folder(run, _stage_of(run)) for run in sorted(runs)]
    if not found:
        raise UserError(f"{quote(folder)} contains neither recipes (sft.yaml, ...) nor runs; give a folder that does")
    return sorted(found, key=lambda status: (*STAGES, UNKNOWN).index(status.stage))


def _stage_of(folder: Path) -> str:
    stage = (read_json(folder / "provenance.json") or {}).get("stage")
    return stage if stage in STAGES else UNKNOWN  # a damaged file must not hide this run or the others


def show_statuses(folder: str) -> None:
    """Print a table of the statuses in a folder."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for title in ("stage", "state", "step", "folder", ""):
        table.add_column(title, overflow="fold")
    found = statuses(folder)
    for status in found:
        step = f"{status.step}{f' of {status.of}' if status.of else ''}" if status.step else ""
        table.add_row(status.stage, status.kind, step, str(status.folder), status.next())
    console = Console()
    console.print(table)
    for status in found:
        for sentence in status.findings:
            console.print(f"{status.stage}, {sentence}", markup=False, highlight=False)


def print_status(recipe_path: str, stage: str, overrides: list[str]) -> int:
    """Print one line about a recipe's run; returns the exit code for its state."""
    status = status_of_recipe(recipe_path, stage, overrides)
    print(status.line())
    return EXIT_CODES[status.kind]
