"""What every training stage does around TRL's trainer: check, open the run folder, train with progress, finish whole.

The stages (sft.py, reward.py, dpo.py) say how their rows are read and how their trainer is built; the order of things
is here: everything that can be wrong in a recipe, in the data or on the disk is found before a model loads.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

from rlhf.config.build import build_configs
from rlhf.config.recipe import Recipe, load_recipe
from rlhf.console import quiet_libraries
from rlhf.data.heldout import write_train_prompts
from rlhf.data.reading import write_skipped
from rlhf.distributed.processes import on_main, prepare_processes, say
from rlhf.distributed.topology import check_topology, topology_of_environment, topology_of_file
from rlhf.errors import UserError
from rlhf.models.counts import count_parameters
from rlhf.models.folder import check_model_folder
from rlhf.runs.checkpoints import read_manifest
from rlhf.runs.folder import RunFolder, begin_run, check_disk, fresh_folder, open_run
from rlhf.runs.metrics import add_callbacks
from rlhf.runs.provenance import model_digest
from rlhf.runs.records import describe_complete
from rlhf.runs.resume import take_over
from rlhf.runs.stop import OutOfMemory, Stopper, watch
from rlhf.training import plan
from rlhf.training.checks import check_devices, check_extras, on_cpu
from rlhf.training.finish import finish
from rlhf.training.stage import Context, Stage, StageData, maker_of, read_data, waits_for


def run_stage(
    stage: Stage, recipe_path: str, overrides: list[str], check_only: bool = False, launch_file: str | None = None,
    fresh: bool = False,
) -> None:  # fmt: skip
    """Check everything, then train the stage unless its folder is already complete.

    Args:
        check_only: check recipe, data and output folder; train nothing.
        launch_file: to be checked with them.
        fresh: begin anew in a new folder beside the recipe's.

    Raises:
        Stopped: it was asked to stop, and can go on.
        UserError: with the place and the fix, before a model loads.
    """
    recipe = load_recipe(recipe_path, stage.name, overrides)
    if fresh:
        recipe.values["output_dir"] = str(fresh_folder(Path(recipe.values["output_dir"])))
        if check_only:
            say(f"--fresh: the run would go to {recipe.values['output_dir']}")
    if launch_file:
        layout = topology_of_file(launch_file)
        check_topology(recipe, layout, layout.engine in ("DeepSpeed", "FSDP") and on_cpu(recipe))  # that imports torch
    made_by = maker_of(recipe, recipe.get("model_name_or_path"))
    data = read_data(stage, recipe)
    inputs = dict(data.digests)
    waits = check_only and waits_for(recipe, recipe.get("model_name_or_path"))
    if not waits:
        inputs["model_name_or_path"] = model_digest(recipe.get("model_name_or_path"))
    run = open_run(recipe, inputs)
    if run.complete:
        say(f"{stage.title:<12} complete: {run.folder}  ({describe_complete(run.complete)})")
        return
    check_extras(recipe)
    if not waits and os.path.isdir(folder := Path(recipe.get("model_name_or_path")).expanduser()):
        check_model_folder(folder, recipe.where("model_name_or_path"), made_by)
    if check_only:
        describe_data(recipe, data)
        unknown = plan.check_only(stage, recipe, data, run)
        say(f"{recipe.path}: ok ({len(data.train)} training rows)" + (f"; {unknown}" if unknown else ""))
        return
    with Stopper(run.folder) as stopper:
        try:
            _train(stage, recipe, data, run, inputs, made_by, stopper)
        finally:
            if run.lock:
                run.lock.release()


def _train(
    stage: Stage,
    recipe: Recipe,
    data: StageData,
    run: RunFolder,
    inputs: dict[str, str],
    made_by: str,
    stopper: Stopper,
) -> None:
    say(f"\n=== {stage.title}: {recipe.path}")
    describe_data(recipe, data)
    quiet_libraries(len(data.train))
    import torch

    from rlhf.models.folder import locate
    from rlhf.runs.checkpointing import FaultTolerance, end_if_stopped
    from rlhf.runs.portable import PortableState

    configs = args, model_args, stage_args = build_configs(recipe)
    check_devices(args, recipe)
    check_topology(recipe, topology_of_environment(), args.use_cpu)
    prepare_processes(args)
    name = locate(recipe.get("model_name_or_path"), recipe.where("model_name_or_path"), made_by, say)
    prepared = plan.prepare(stage, recipe, data, configs, name, stopper)
    context = prepared.context
    layout = topology_of_environment().record(args.world_size)
    run.resume_from, unsharded = take_over(run, recipe.where("output_dir"), layout)
    check_disk(run.folder, prepared.bytes_needed(run.resume_from), plan.STILL_TO_WRITE)
    trainer = _build(stage, context)
    configured = {"model": vars(model_args), "stage": vars(stage_args), "model_commit": prepared.model_commit}
    configured["data"] = data.summary and data.summary.record()
    on_main(lambda: _begin(run, recipe, inputs, args.to_dict() | configured, data))
    _announce(stage, context, trainer, run)
    add_callbacks(trainer, run.folder, stage.title)
    watchdog_s, max_spike = 60 * stage_args.watchdog_minutes or None, stage_args.max_gradient_spike or None
    safety = FaultTolerance(
        run.folder, stopper, layout, watchdog_s, max_spike, portable=prepared.portable,
        restore=PortableState(Path(run.resume_from)) if unsharded else None,
    )  # fmt: skip
    trainer.use_fault_tolerance(safety)
    started = time.time()
    try:
        train_or_restore(trainer, run)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, args.process_index, stage_args.max_tokens_per_device) from None
    watch(None)
    end_if_stopped(trainer)
    finish(stage, prepared, trainer, run, time.time() - started)


def _begin(run: RunFolder, recipe: Recipe, inputs: dict[str, str], arguments: dict[str, Any], data: StageData) -> None:
    begin_run(run, recipe, inputs, arguments)
    write_skipped(run.folder, data.skipped)
    write_train_prompts(run.folder, data.train)


def _build(stage: Stage, context: Context):
    """The stage's trainer, with at least one example to train on."""
    trainer = stage.build(context)
    if len(trainer.train_dataset) == 0:
        raise UserError(
            f"{context.recipe.where('max_length')}: max_length={context.args.max_length} leaves no training example; raise it"
        )
    return trainer


def out_of_memory(error: Exception, process: int, max_tokens: int) -> OutOfMemory:
    """What to do about it, in a sentence."""
    return OutOfMemory(
        f"process {process} is out of GPU memory ({' '.join(str(error).split())[:200]}). Lower max_tokens_per_device (it is "
        f"{max_tokens}), set `gradient_checkpointing: true`, or use a launch file that splits the model (launch/zero3.yaml, "
        "launch/fsdp2.yaml); with the first two the same command goes on from its last checkpoint"
    )


def train_or_restore(trainer, run: RunFolder) -> None:
    """Train; or, where the checkpoint is already the last step's, only load it.

    transformers 5.23 takes one step more when it resumes a run that max_steps ended in the middle of an epoch.
    """
    from transformers import TrainerState

    if run.resume_from:
        state = TrainerState.load_from_json(str(Path(run.resume_from) / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            if trainer.fault_tolerance.restore:
                trainer.fault_tolerance.restore.restore_weights(trainer.model)
            trainer._load_from_checkpoint(run.resume_from)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=run.resume_from)


def describe_data(recipe: Recipe, data: StageData) -> None:
    """Report what the training rows are like: duplicates, contradictions, columns that are not used, rows left out."""
    name = recipe.get("dataset_name") or recipe.get("chosen_dataset_name")
    for text in data.describe():
        say(f"{name}: {text}")


def _announce(stage: Stage, context: Context, trainer, run: RunFolder) -> None:
    args, data = trainer.args, context.data
    model = trainer.model
    total, trained = count_parameters(model)
    kind = f"LoRA r={context.model_args.lora_r}" if context.model_args.use_peft else "full fine-tuning"
    world = trainer.accelerator.num_processes
    batch = context.stage_args.global_batch_size or (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    )
    steps = (
        args.max_steps if args.max_steps > 0 else math.ceil(len(trainer.train_dataset) / batch) * args.num_train_epochs
    )
    heldout = f", {len(data.heldout)} held out" if data.heldout else ""
    say(f"  model    {context.recipe.get('model_name_or_path')}  ({_count(total)} parameters)")
    say(f"  trains   {_count(trained)} parameters ({trained / total:.1%}), {kind}")
    say(f"  data     {len(trainer.train_dataset)} examples{heldout}")
    say(f"  steps    {steps:g} of {batch} examples ({world} process{'es' if world > 1 else ''} on {args.device.type})")
    say(f"  output   {run.folder}")
    if args.max_steps > 0 and context.recipe.get("num_train_epochs"):
        say(f"note: max_steps={args.max_steps} ends the run, and num_train_epochs has no effect")
    dropped = len(data.train) - len(trainer.train_dataset)
    if dropped:
        kept = set(trainer.train_dataset["place"])
        first = next(row["place"] for row in data.train if row["place"] not in kept)
        say(
            f"note: {dropped} of {len(data.train)} examples are longer than max_length={args.max_length} and were left out "
            f"(the first: {first})"
        )
    if run.resume_from:
        before = (read_manifest(Path(run.resume_from)) or {}).get("layout") or {}
        engine = topology_of_environment().record(world)["engine"]
        other = (before.get("processes"), before.get("engine")) not in ((None, None), (world, engine))
        by = f" (of {before['processes']} process{'es' if before['processes'] > 1 else ''}, {before['engine']})"
        say(f"  resuming from {run.resume_from}{by if other else ''}")


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.1f} K"
