"""The life of a run around TRL's trainer, for every stage: plan, open the run folder, build, train, finish.

The stages (sft.py, reward.py, dpo.py) define how their rows are read and how their trainer is built. Mistakes in the
recipe, in the data or on disk are found before a model loads (plan.py).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config.recipe import Recipe, load_recipe
from rlhf.console import quiet_libraries
from rlhf.data.heldout import write_train_prompts
from rlhf.data.prepare import write_skipped
from rlhf.data.rows import StageData
from rlhf.data.sources import Source
from rlhf.distributed.processes import is_main, on_main, rank, say
from rlhf.distributed.topology import Topology, check_topology, topology_of_environment, topology_of_file
from rlhf.models.counts import count_parameters
from rlhf.runs.checkpoints import read_manifest
from rlhf.runs.folder import RunFolder, check_disk, fresh_folder, start_run
from rlhf.runs.metrics import add_callbacks
from rlhf.runs.records import describe_complete
from rlhf.runs.resume import find_checkpoint, lock_folder
from rlhf.runs.stop import OutOfMemory, Stopped, Stopper, watch
from rlhf.training.checks import bytes_needed, on_cpu
from rlhf.training.finish import finish
from rlhf.training.model_checks import less_activations
from rlhf.training.plan import Inputs, make_plan, read_inputs, unknown_yet
from rlhf.training.stage import Plan, Stage
from rlhf.training.tokens import load_plan_tokenizer, with_tokens

if TYPE_CHECKING:
    from rlhf.runs.checkpointing import CheckpointMixin


def run_stage(stage: Stage, recipe_path: str, overrides: list[str], fresh: bool = False) -> None:
    """Plan, then train the stage unless its folder is already complete.

    Args:
        fresh: train in a new folder beside the recipe's.

    Raises:
        Stopped: it was asked to stop and can be resumed.
        UserError: with the place and the fix, before a model loads.
    """
    recipe = _load(stage, recipe_path, overrides, fresh)
    run_recipe(stage, recipe)


def run_recipe(stage: Stage, recipe: Recipe, given: Mapping[str, Source] | None = None) -> None:
    """`run_stage` of a recipe that is read already.

    Args:
        given: rows that Python code holds, by the key that would name their file.
    """
    inputs = read_inputs(stage, recipe, given=given)
    if inputs.run.complete:
        return announce_complete(stage, inputs.run)
    say(f"\n=== {stage.title}: {recipe.path}")
    for text in inputs.data.describe():
        say(text)
    quiet_libraries(len(inputs.data.train))
    with Stopper(inputs.run.folder) as stopper:
        plan = make_plan(stage, recipe, topology_of_environment(), inputs)
        with open_folder(plan, inputs.run) as run, reporting_out_of_memory(plan):
            trainer = build(stage, plan, run, inputs.digests, stopper)
            seconds = train(plan, trainer, run, stopper)
            finish(stage, plan, trainer, run, seconds)


def check_stage(
    stage: Stage, recipe_path: str, overrides: list[str], launch_file: str | None = None, fresh: bool = False
) -> None:
    """`--check`: everything that `run_stage` does before weights load, without changing anything.

    Args:
        launch_file: the one the run will be started with.

    Raises:
        UserError: what `run_stage` would raise.
    """
    recipe = _load(stage, recipe_path, overrides, fresh)
    if fresh:
        say(f"--fresh: the run would go to {recipe.values['output_dir']}")
    topology = Topology("one process")
    if launch_file:
        topology = topology_of_file(launch_file)
        check_topology(recipe, topology, topology.engine in ("DeepSpeed", "FSDP") and on_cpu(recipe))  # imports torch
    inputs = read_inputs(stage, recipe, may_wait=True)
    if inputs.run.complete:
        return announce_complete(stage, inputs.run)
    for text in inputs.data.describe():
        say(text)
    unknown = unknown_yet(inputs) or _check_plan(stage, recipe, inputs, topology)
    say(f"{recipe.path}: ok ({len(inputs.data.train)} training rows)" + (f"; {unknown}" if unknown else ""))


def _check_plan(stage: Stage, recipe: Recipe, inputs: Inputs, topology: Topology) -> str:
    """Make the plan; returns what can only be checked when the run starts."""
    name = inputs.starts_from
    say(f"  checking it with {name} (configs, tokenizer, lengths, module names; no weights) ...")
    quiet_libraries(len(inputs.data.train))
    check_room(make_plan(stage, recipe, topology, inputs), inputs.run)
    return f"its model will come from: {inputs.maker}; until then it is checked with {name}" if inputs.waits else ""


def _load(stage: Stage, recipe_path: str, overrides: list[str], fresh: bool) -> Recipe:
    recipe = load_recipe(recipe_path, stage.name, overrides)
    return recipe.replace("output_dir", str(fresh_folder(Path(recipe.values["output_dir"])))) if fresh else recipe


def announce_complete(stage: Stage, run: RunFolder) -> None:
    say(f"{stage.title:<12} complete: {run.folder}  ({describe_complete(run.complete or {})})")


@contextlib.contextmanager
def open_folder(plan: Plan, run: RunFolder) -> Iterator[RunFolder]:
    """Lock the run folder, find the checkpoint to resume from, and check the free disk space.

    Raises:
        UserError: another run writes there, the checkpoint can't be read under this launch file, or the disk is full.
    """
    lock = lock_folder(run.folder, plan.recipe.where("output_dir"))
    try:
        opened = find_checkpoint(run, plan.topology.record(plan.args.world_size))
        check_room(plan, opened)
        yield opened
    finally:
        if lock:
            lock.release()


def check_room(plan: Plan, run: RunFolder) -> None:
    needed = bytes_needed(
        plan.model_name, plan.model_args.use_peft, plan.merge, run.resume_from, plan.merged_start is not None
    )
    check_disk(run.folder, needed, "the rest of the run (a checkpoint beside the last one, and the finished model)")


def build(stage: Stage, plan: Plan, run: RunFolder, digests: dict[str, str], stopper: Stopper) -> CheckpointMixin:
    """Build the stage's trainer, write the run folder's first files, and describe the run on the screen.

    Raises:
        Stopped: a stop was requested while token ids or the reference were being made.
    """
    from rlhf.runs.checkpointing import note_stop
    from rlhf.training.watch import add_watch

    args, recipe = plan.args, plan.recipe
    try:
        plan = with_tokens(plan, load_plan_tokenizer(plan), stopper)
        trainer = stage.build(plan, stopper)
    except Stopped:  # before training
        if is_main():
            note_stop(run.folder, stopper.agreed)
        raise
    configured = {
        "model": vars(plan.model_args), "stage": vars(plan.stage_args), "model_commit": plan.model_commit,
        "data": plan.data.summary and plan.data.summary.record(),
    }  # fmt: skip
    on_main(lambda: _start(run, recipe, digests, args.to_dict() | configured, plan.data))
    _announce(plan, trainer, run)
    add_callbacks(trainer, run.folder, stage.title)
    add_watch(stage, plan, trainer, run.folder)
    return trainer


def _start(run: RunFolder, recipe: Recipe, digests: dict[str, str], arguments: dict[str, Any], data: StageData) -> None:
    start_run(run, recipe, digests, arguments)
    write_skipped(run.folder, data.skipped)
    write_train_prompts(run.folder, data.train)


def train(plan: Plan, trainer: CheckpointMixin, run: RunFolder, stopper: Stopper) -> float:
    """Train to the end; returns the seconds it took.

    Raises:
        Stopped: it was asked to stop and can be resumed.
    """
    from rlhf.runs.checkpointing import FaultTolerance, raise_if_stopped
    from rlhf.runs.portable import PortableState

    stage_args = plan.stage_args
    trainer.use_fault_tolerance(FaultTolerance(
        run.folder, stopper, plan.topology.record(plan.args.world_size),
        watchdog_s=60 * stage_args.watchdog_minutes or None, max_spike=stage_args.max_gradient_spike or None,
        portable=stage_args.portable_checkpoints,
        restore=PortableState(Path(run.resume_from)) if run.resume_from and run.resumes_anywhere else None,
    ))  # fmt: skip
    started = time.time()
    train_or_restore(trainer, run)
    watch(None)
    raise_if_stopped(trainer)
    return time.time() - started


@contextlib.contextmanager
def reporting_out_of_memory(plan: Plan) -> Iterator[None]:
    """Turn torch's error into one that names the rank and the remedies, also while the model or the reference loads.

    Raises:
        OutOfMemory: the GPU is out of memory.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, plan) from None


def out_of_memory(error: Exception, plan: Plan) -> OutOfMemory:
    """The error that names the rank and the remedies."""
    return OutOfMemory(
        f"rank {rank()} is out of GPU memory ({' '.join(str(error).split())[:200]}). Lower max_tokens_per_device (it is "
        f"{plan.stage_args.max_tokens_per_device}), {less_activations(plan)}or use a launch file that shards the model "
        "(launch/zero3.yaml, launch/fsdp2.yaml); with the same launch file the same command resumes from the last checkpoint"
    )


def train_or_restore(trainer: CheckpointMixin, run: RunFolder) -> None:
    """Train; or, if the checkpoint is that of the last step, only load it into the engine.

    transformers 5.23 runs one step too many when it resumes a run that max_steps ended in the middle of an epoch.
    """
    from rlhf.runs.checkpointing import AllStepsDone

    try:
        trainer.train(resume_from_checkpoint=run.resume_from)
    except AllStepsDone:
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()


def _announce(plan: Plan, trainer: CheckpointMixin, run: RunFolder) -> None:
    args, data = plan.args, plan.data
    model = trainer.model
    total, trained = count_parameters(model)
    kind = f"LoRA r={plan.model_args.lora_r}" if plan.model_args.use_peft else "full fine-tuning"
    world = trainer.accelerator.num_processes
    batch = plan.stage_args.global_batch_size or (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    )
    steps = (
        args.max_steps if args.max_steps > 0 else math.ceil(len(trainer.train_dataset) / batch) * args.num_train_epochs
    )
    heldout = f", {len(data.heldout)} held out" if data.heldout else ""
    held = (
        "a 4- or 8-bit base" if plan.recipe.is_quantised else str(next(model.parameters()).dtype).removeprefix("torch.")
    )
    say(f"  model    {plan.recipe.get('model_name_or_path')}  ({_count(total)} parameters, {held})")
    say(f"  trains   {_count(trained)} parameters ({trained / total:.1%}), {kind}")
    say(f"  data     {len(trainer.train_dataset)} examples{heldout}")
    say(f"  steps    {steps:g} of {batch} examples ({world} process{'es' if world > 1 else ''} on {args.device.type})")
    say(f"  output   {run.folder}")
    if args.max_steps > 0 and plan.recipe.get("num_train_epochs"):
        say(f"note: max_steps={args.max_steps} ends the run; num_train_epochs has no effect")
    dropped, first = plan.tokens["train"].counts.left_out if plan.tokens else (0, 0)
    if dropped:
        say(
            f"note: {dropped:,} of {len(data.train):,} examples are longer than max_length={args.max_length} and were left out "
            f"(the first: {data.train.place(first)})"
        )
    if repeated := _repeated(plan, len(trainer.train_dataset), world):
        say(
            f"note: {world} processes take {args.per_device_train_batch_size * world} examples at a time, and "
            f"{len(trainer.train_dataset):,} is no multiple of it: TRL's own batches repeat {repeated} from the epoch's start at "
            f"its end; `global_batch_size: {batch}` takes each once, with the same losses on any number of processes"
        )
    if run.resume_from:
        before = (read_manifest(Path(run.resume_from)) or {}).get("layout") or {}
        engine = plan.topology.record(world)["engine"]
        other = (before.get("processes"), before.get("engine")) not in ((None, None), (world, engine))
        by = f" (of {before['processes']} process{'es' if before['processes'] > 1 else ''}, {before['engine']})"
        say(f"  resuming from {run.resume_from}{by if other else ''}")


def _repeated(plan: Plan, examples: int, world: int) -> int:
    """Examples that accelerate (`even_batches`) takes twice per epoch, so that all ranks have equally large batches."""
    args = plan.args
    together = args.per_device_train_batch_size * world
    if plan.stage_args.global_batch_size or world == 1 or args.dataloader_drop_last:
        return 0
    if 0 < args.max_steps * args.gradient_accumulation_steps <= examples // together:
        return 0  # ends before
    return -examples % together


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.1f} K"
