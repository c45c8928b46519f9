"""The tokenizer and the settings by which a target's rows become token ids."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.curation.batches import batches
from rlhf.curation.target import Target
from rlhf.data.rows import StageData
from rlhf.data.store import Rows
from rlhf.errors import UserError
from rlhf.runs.folder import RunFolder
from rlhf.runs.lineage import maker_of, starting_model, waits_for
from rlhf.training.stage import Plan, Stage
from rlhf.training.tokenise import Counts, Settings, Tokenise


@dataclass(frozen=True)
class Encoder:
    """How rows become token ids.

    Attributes:
        settings: with the run's max_length; None where there is no recipe.
        model: whose tokenizer it is.
    """

    tokenizer: Any
    settings: Settings
    model: str


def stage_named(name: str) -> Stage:
    """The stage of that name."""
    if name == "sft":
        from rlhf.training.sft import SFT as stage
    elif name == "reward":
        from rlhf.training.reward import REWARD as stage
    else:
        from rlhf.training.dpo import DPO as stage
    return stage


def encoder_of(target: Target, data: StageData, max_length: int | None = None) -> Encoder | str:
    """The encoder of a target's rows, or why there is none yet.

    Args:
        max_length: for data alone.

    Raises:
        UserError: the model's tokenizer can't be loaded, or its template doesn't end answers.
    """
    from rlhf.models.embedded import is_fetched

    name = target.recipe.get("model_name_or_path")
    if not name:
        return "--model NAME adds tokens and the chat template"
    waits = target.is_recipe and bool(waits_for(target.recipe, name))
    name = starting_model(target.recipe) if waits else name
    if name.startswith("embedded:") and not is_fetched():
        return f"no tokens yet: {name} is not here; `rlhf fetch` fetches it"
    with messages_aside():
        if target.is_recipe:
            return _of_recipe(target, data, name, waits)
        return _of_data(target, name, max_length)


def _of_recipe(target: Target, data: StageData, name: str, waits: bool) -> Encoder:
    from rlhf.training.tokens import load_plan_tokenizer, settings_of

    plan = plan_of(target, data, name, waits)
    return Encoder(load_plan_tokenizer(plan), settings_of(plan), name)


def plan_of(target: Target, data: StageData, name: str, waits: bool) -> Plan:
    """The plan of the recipe's run, as far as tokens need it; its output folder is not looked at."""
    from rlhf.distributed.topology import Topology
    from rlhf.training.plan import Inputs, draft_plan

    recipe = target.recipe
    maker = maker_of(recipe, recipe.get("model_name_or_path"))
    run = RunFolder(Path(recipe.values["output_dir"]), None, None)
    inputs = Inputs(data, {}, maker, waits, name, run)
    return draft_plan(stage_named(recipe.stage), recipe, Topology("one process"), inputs)


def _of_data(target: Target, name: str, max_length: int | None) -> Encoder:
    from rlhf.models.folder import locate
    from rlhf.models.tokenizer import load_tokenizer

    located = locate(name, "--model")
    try:
        tokenizer = load_tokenizer(located, target.recipe.get("chat_template"))
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--model: the tokenizer of {name} can't be loaded: {reason}") from None
    return Encoder(tokenizer, Settings(target.stage, max_length), name)


@contextlib.contextmanager
def messages_aside() -> Iterator[None]:
    """What is said meanwhile goes to stderr: stdout is for the command's own output, which may be JSON."""
    from rlhf.console import quiet_libraries

    quiet_libraries()
    with contextlib.redirect_stdout(sys.stderr):
        yield


@dataclass
class Noted(Counts):
    """Counts that keep the numbers of the first rows of each kind.

    Attributes:
        most: how many of each; None: all.
    """

    most: int | None = None
    found: dict[str, list[int]] = field(default_factory=dict)

    def note(self, name: str, row: int) -> None:
        super().note(name, row)
        kept = self.found.setdefault(name, [])
        if self.most is None or len(kept) < self.most:
            kept.append(row)


def count_cuts(rows: Rows, encoder: Encoder, most: int | None) -> Noted:
    """What max_length and the chat template do to rows."""
    settings = encoder.settings
    if settings.too_long == "error":
        settings = dataclasses.replace(settings, too_long="drop")
    tokenise, counts = Tokenise(encoder.tokenizer, settings), Noted(most=most)
    for start, batch in batches(rows, "Tokenising"):
        tokenise(batch, start, counts)
    return counts
