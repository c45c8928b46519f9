"""`rlhf data prepare`: rows and token ids of recipes made beforehand, so that a run's processes find them."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from rlhf.config.recipe import load_recipe, stage_of
from rlhf.console import duration
from rlhf.curation.encoder import stage_named
from rlhf.curation.screen import plural, shown, size
from rlhf.data.store import Rows
from rlhf.errors import UserError
from rlhf.files import cache_dir


def prepare_recipes(options: Any, rest: list[str]) -> None:
    """Prepare the data of recipes, one after the other, as their runs would.

    Raises:
        UserError: what the run would raise; after the recipes before it are done.
    """
    for name in options.recipe:
        if not name.endswith((".yaml", ".yml")):
            raise UserError(f"{shown(name, 200)} is no recipe (.yaml); `rlhf data prepare` takes recipes")
    for name in options.recipe:
        _prepare(name, rest)
    print(
        f"\nA run finds this in {cache_dir()}: set RLHF_CACHE to the same folder there, on a disk that its machines can read."
    )


def _prepare(name: str, rest: list[str]) -> None:
    from rlhf.distributed.topology import Topology
    from rlhf.training.plan import make_plan, read_inputs, unknown_yet
    from rlhf.training.tokens import load_plan_tokenizer, with_tokens

    stage_name = stage_of(name)
    if stage_name == "evaluate":
        print(f"{shown(name, 200)}: an evaluation, which tokenises its few prompts itself; nothing to prepare")
        return
    recipe, stage, started = load_recipe(name, stage_name, rest), stage_named(stage_name), time.time()
    before = _folders()
    inputs = read_inputs(stage, recipe, may_wait=True)
    print(f"{shown(name, 200)}: {plural(len(inputs.data.train), 'training row')}"
          + (f", {len(inputs.data.heldout):,} held out" if inputs.data.heldout is not None else ""), flush=True)  # fmt: skip
    for line in inputs.data.describe():
        print(f"  {shown(line, 600)}")
    if inputs.run.complete:
        print(f"  its run is complete ({inputs.run.folder}): nothing to prepare")
        return
    if not inputs.data.keys.get("train"):
        print("  small: each start reads and tokenises it in moments; nothing to prepare")
        return
    used = {"rows": _of_rows(inputs.data.train) | _of_rows(inputs.data.heldout)}
    if why := unknown_yet(inputs):
        print(f"  {why}; `rlhf fetch` fetches it")
    else:
        from rlhf.console import quiet_libraries

        quiet_libraries(len(inputs.data.train))
        with contextlib.redirect_stdout(sys.stderr):
            plan = make_plan(stage, recipe, Topology("one process"), inputs)
        used["token ids"] = set(_token_folders(plan))
        started_before = _folders()
        plan = with_tokens(plan, load_plan_tokenizer(plan))
        done = plan.tokens["train"].counts
        print(f"  {done.kept:,} of {done.rows:,} rows stay within max_length={plan.args.max_length}")
        before &= started_before
    for what, folders in used.items():
        for folder in sorted(folders):
            print(f"  {what:<10} {folder}  ({size(_size(folder))}){'' if folder not in before else ', there already'}")
    if not set().union(*used.values()) - before:
        print("  everything was there: nothing to do")
    else:
        print(f"  took {duration(time.time() - started)}")
    if inputs.waits:
        print(
            f"  its model is yet to be made ({inputs.maker}); token ids hold if that keeps the tokenizer of {inputs.starts_from}"
        )


def _folders() -> set[Path]:
    """The finished folders of the cache."""
    data = {path.parent for path in (cache_dir() / "data").glob("*/prepared.json")}
    return data | {path for path in (cache_dir() / "tokens").glob("*") if any(path.glob("chunk-*.json"))}


def _of_rows(rows: Rows | None) -> set[Path]:
    return {part.path.parent for part in rows.parts if part.path is not None} if rows is not None else set()


def _token_folders(plan: Any) -> list[Path]:
    from rlhf.training.tokens import Job, load_plan_tokenizer

    tokenizer = load_plan_tokenizer(plan)
    sides = (("train", plan.data.train), ("heldout", plan.data.heldout))
    return [
        Job.make(plan, tokenizer, rows, side).folder
        for side, rows in sides
        if rows is not None and plan.data.keys.get(side)
    ]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
