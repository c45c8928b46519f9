"""The plan of a run: everything that can be decided and checked without weights, once, for `--check` and for the start.

`read_inputs` needs no torch: for a complete run it returns within a second. `make_plan` builds TRL's configs, reads the
model's config, tokenizer and module names, and rejects what would fail later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from rlhf.config.build import build_configs
from rlhf.config.recipe import Recipe
from rlhf.config.stage_config import StageConfig
from rlhf.data.rows import StageData, read_data
from rlhf.data.sources import Source
from rlhf.distributed.processes import prepare_processes, say
from rlhf.distributed.topology import Topology, check_devices, check_topology
from rlhf.models.embedded import is_fetched
from rlhf.models.folder import check_model_folder, is_adapter, revision_of
from rlhf.runs.folder import MERGED_START, RunFolder, open_run
from rlhf.runs.lineage import maker_of, starting_model, waits_for
from rlhf.runs.provenance import model_digest
from rlhf.training.checks import check_extras
from rlhf.training.model_checks import check_checkpointing, check_compiled, check_experts, check_offloading
from rlhf.training.plan_checks import (
    check_examples,
    check_hub_login,
    check_merge,
    check_modules,
    check_optimizer,
    check_reporters,
    check_scheduler,
    decide_max_length,
    note_disabled,
)
from rlhf.training.room import check_memory, tell_replicated
from rlhf.training.stage import Plan, Stage
from rlhf.training.tokens import load_plan_tokenizer


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run, read without torch.

    Attributes:
        digests: sha256 of data and input model, by recipe key; without the model's while that does not exist yet.
        maker: the command that makes the input model, if a recipe of the same folder does; else ''.
        waits: that command has not been run to completion yet.
        starts_from: the input model's name; if that is yet to be made, the model that it will be made from.
        run: the output folder.
    """

    data: StageData
    digests: dict[str, str]
    maker: str
    waits: bool
    starts_from: str
    run: RunFolder


def read_inputs(
    stage: Stage, recipe: Recipe, may_wait: bool = False, given: Mapping[str, Source] | None = None
) -> Inputs:
    """Read the rows, and inspect the input model's files and the output folder.

    Args:
        may_wait: the input model need not exist yet if a recipe of the same folder will make it.
        given: rows that Python code holds, by the key that would name their file.

    Raises:
        UserError: bad data, a damaged model folder, an output folder that is not this run's, a missing package.
    """
    name = recipe.values["model_name_or_path"]
    maker, waits = maker_of(recipe, name), bool(may_wait and waits_for(recipe, name))
    starts_from = starting_model(recipe) if waits else name
    data = read_data(recipe, stage.kind, given)
    digests = dict(data.digests)
    if not waits:
        digests["model_name_or_path"] = model_digest(name)
    if reference := recipe.values.get("reference_model"):
        digests["reference_model"] = model_digest(reference)
    run = open_run(recipe, digests)
    if not run.complete:
        check_extras(recipe)
        if not waits and os.path.isdir(folder := Path(name).expanduser()):
            check_model_folder(folder, recipe.where("model_name_or_path"), maker)
    return Inputs(data, digests, maker, waits, starts_from, run)


def make_plan(stage: Stage, recipe: Recipe, topology: Topology, inputs: Inputs | None = None) -> Plan:
    """Make all decisions of a run before its weights load, cheap checks first.

    Args:
        topology: of this process's own launch, or of the launch file of a later run.
        inputs: from `read_inputs`, which is called if None.

    Raises:
        UserError: with the place and the fix.
    """
    inputs = inputs or read_inputs(stage, recipe)
    plan = draft_plan(stage, recipe, topology, inputs)
    for check in (
        check_scheduler, check_optimizer, check_reporters, check_hub_login, check_merge, check_offloading, check_checkpointing,
        check_compiled, check_experts, stage.check,
    ):  # fmt: skip
        check(plan)
    if topology.started:
        check_memory(plan)
    tell_replicated(plan)
    tokenizer = load_plan_tokenizer(plan)
    packs_up_to = check_modules(plan)
    check_examples(plan, tokenizer, packs_up_to)
    return plan


def draft_plan(stage: Stage, recipe: Recipe, topology: Topology, inputs: Inputs) -> Plan:
    """The decisions of `make_plan` without its checks: enough to tokenise the rows as the run does."""
    from rlhf.models.folder import locate

    note_disabled(recipe)
    args, model_args, stage_args = build_configs(recipe)
    if topology.started:
        check_devices(args, recipe)
    check_topology(recipe, topology, args.use_cpu)
    if topology.started:
        prepare_processes(args)
    model_name = locate(
        inputs.starts_from, recipe.where("model_name_or_path"), "" if inputs.waits else inputs.maker, say
    )
    args.max_length, commit = decide_max_length(
        recipe, args, model_name, revision_of(model_name, model_args.model_revision)
    )
    reference = cast(Reference, stage_args.reference)
    if stage.name == "dpo":
        args.precompute_ref_log_probs = reference == "cached"
    continues = continues_adapter(stage.name, model_name, stage_args, model_args.use_peft)
    merged_start = inputs.run.folder / MERGED_START if is_adapter(model_name) and not continues else None
    return Plan(
        recipe, args, model_args, stage_args, topology, inputs.data, model_name, commit, reference,
        continues_adapter=continues, merge=merges(stage_args, recipe.is_quantised), merged_start=merged_start,
        packing_mode=stage.packing_mode if stage_args.packing else None,
    )  # fmt: skip


def unknown_yet(inputs: Inputs) -> str:
    """Why a plan can't be made before the run starts; '' if it can."""
    if inputs.starts_from.startswith("embedded:") and not is_fetched():
        return f"not checked yet: tokenizer, lengths and module names, as {inputs.starts_from} is downloaded when a run starts"
    return ""


# --- decisions -------------------------------------------------------------------------------------------------------


Reference = Literal["cached", "online", "nf4"]


def continues_adapter(stage: str, model_name: str, stage_args: StageConfig, use_peft: bool) -> bool:
    """Whether the input model is an adapter that is trained further; the reward stage merges it first."""
    return stage != "reward" and is_adapter(model_name) and stage_args.continue_adapter and use_peft


def merges(stage_args: StageConfig, quantised: bool) -> bool:
    """Whether the finished model is written merged; the default is yes, unless it is quantised."""
    return not quantised if stage_args.merge_adapter is None else stage_args.merge_adapter
