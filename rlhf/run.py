"""What every training stage does around TRL's trainer: check, open the run folder, train with progress, finish whole.

The stages (sft.py, reward.py, dpo.py) say how their rows are read and how their trainer is built; the order of things
is here: everything that can be wrong in a recipe, in the data or on the disk is found before a model loads.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf import prepare
from rlhf.checks import check_devices, check_extras, on_cpu
from rlhf.config.build import build_configs, is_flash
from rlhf.config.recipe import Recipe, load_recipe
from rlhf.console import duration, quiet_libraries
from rlhf.data.heldout import write_train_prompts
from rlhf.data.reading import write_skipped
from rlhf.distributed.processes import is_main, say
from rlhf.distributed.topology import check_layout, layout_of_environment, layout_of_file
from rlhf.errors import RankFailed, UserError
from rlhf.files import Lock
from rlhf.models.counts import count_parameters
from rlhf.models.folder import check_model_folder
from rlhf.prepare import Prepared
from rlhf.runs.card import write_card
from rlhf.runs.checkpoints import newest_checkpoint, read_manifest
from rlhf.runs.folder import Run, begin_run, check_disk, finish_run, fresh_folder, open_run
from rlhf.runs.metrics import add_callbacks
from rlhf.runs.provenance import model_digest
from rlhf.runs.stop import OutOfMemory, Stopper, watch
from rlhf.stage import Context, Stage, StageData, maker_of, read_data, waits_for


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
        layout = layout_of_file(launch_file)
        check_layout(recipe, layout, layout.engine in ("DeepSpeed", "FSDP") and on_cpu(recipe))  # that imports torch
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
        unknown = prepare.check_only(stage, recipe, data, run)
        say(f"{recipe.path}: ok ({len(data.train)} training rows)" + (f"; {unknown}" if unknown else ""))
        return
    with Stopper(run.folder) as stopper:
        try:
            _train(stage, recipe, data, run, inputs, made_by, stopper)
        finally:
            if run.lock:
                run.lock.release()


def _train(
    stage: Stage, recipe: Recipe, data: StageData, run: Run, inputs: dict[str, str], made_by: str, stopper: Stopper
) -> None:
    say(f"\n=== {stage.title}: {recipe.path}")
    describe_data(recipe, data)
    quiet_libraries(len(data.train))
    import torch

    from rlhf.models.folder import locate
    from rlhf.runs.checkpointing import Safety, end_if_stopped
    from rlhf.runs.portable import PortableState

    configs = args, model_args, stage_args = build_configs(recipe)
    check_devices(args, recipe)
    check_layout(recipe, layout_of_environment(), args.use_cpu)
    prepare_processes(args)
    name = locate(recipe.get("model_name_or_path"), recipe.where("model_name_or_path"), made_by, say)
    prepared = prepare.prepare(stage, recipe, data, configs, name, stopper)
    context = prepared.context
    layout = layout_of_environment().record(args.world_size)
    run.resume_from, unsharded = take_over(run, recipe.where("output_dir"), layout)
    check_disk(run.folder, prepared.bytes_needed(run.resume_from), prepare.STILL_TO_WRITE)
    trainer = _build(stage, context)
    configured = {"model": vars(model_args), "stage": vars(stage_args), "model_commit": prepared.model_commit}
    configured["data"] = data.summary and data.summary.record()
    on_main(lambda: _begin(run, recipe, inputs, args.to_dict() | configured, data))
    _announce(stage, context, trainer, run)
    add_callbacks(trainer, run.folder, stage.title)
    watchdog_s, max_spike = 60 * stage_args.watchdog_minutes or None, stage_args.max_gradient_spike or None
    safety = Safety(
        run.folder, stopper, layout, watchdog_s, max_spike, portable=prepared.portable,
        restore=PortableState(Path(run.resume_from)) if unsharded else None,
    )  # fmt: skip
    trainer.make_safe(safety)
    started = time.time()
    try:
        train_or_restore(trainer, run)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, args.process_index, stage_args.max_tokens_per_device) from None
    watch(None)
    end_if_stopped(trainer)
    _finish(stage, prepared, trainer, run, time.time() - started)


def _begin(run: Run, recipe: Recipe, inputs: dict[str, str], arguments: dict[str, Any], data: StageData) -> None:
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


def _finish(stage: Stage, prepared: Prepared, trainer, run: Run, seconds: float) -> None:
    """Write the model on the main rank, load it again, compare; an error there ends all ranks."""
    probe = stage.probe(trainer.train_dataset)
    model, expected = finished_model(stage, prepared.context, trainer, probe)
    on_main(lambda: _write_model(stage, prepared, trainer, run, seconds, model, expected, probe))
    trainer.accelerator.end_training()


def _write_model(stage: Stage, prepared: Prepared, trainer, run: Run, seconds: float, model, expected, probe) -> None:
    import torch

    from rlhf.models.finished import save_finished
    from rlhf.models.folder import is_adapter
    from rlhf.models.precision import compute_dtype

    exact = compute_dtype(trainer.model, trainer.accelerator.mixed_precision) == torch.float32
    say("Writing the model, loading it again and comparing ...")
    saved = save_finished(
        model, trainer.processing_class, run.folder, reward=stage.name == "reward", merge=prepared.merge,
        probe=probe, expected=expected, exact=expected is None or exact,
    )  # fmt: skip
    history = [h for h in trainer.state.log_history if "loss" in h]
    summary = {
        "stage": stage.name, "steps": trainer.state.global_step, "train_examples": len(trainer.train_dataset),
        "seconds": round(seconds, 1), "first_loss": history[0]["loss"] if history else None,
        "last_loss": history[-1]["loss"] if history else None,
        "kind": "adapter" if is_adapter(str(run.folder)) else "merged model", **saved,
    }  # fmt: skip
    write_card(run.folder, summary)
    finish_run(run, summary)
    say(f"{stage.title} is complete: {run.folder}  ({describe_complete(summary)})")
    say(f"  written and reloaded: largest logit difference {saved['max_logit_difference']:.1e}")
    if saved["bytes_before_dequantising"]:
        merged = sum(size for name, size in saved["files"].items() if name.endswith(".safetensors"))
        say(
            f"  merged into the dequantised base: {merged / 1e6:.0f} MB instead of "
            f"{saved['bytes_before_dequantising'] / 1e6:.0f} MB; `merge_adapter: false` keeps the adapter on 4 bits"
        )


def on_main(work: Callable[[], None]) -> None:
    """Do `work` on the main rank while the others wait for its outcome: if it fails there, all ranks end at once.

    Raises:
        RankFailed: on the other ranks, with the exit code of the main rank's error, which that rank reports.
        Exception: on the main rank, what `work` raised.
    """
    import torch

    error: BaseException | None = None
    if is_main():
        try:
            work()
        except Exception as failure:  # of any kind: it is raised again below, once the other ranks know
            error = failure
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        from accelerate.utils import broadcast_object_list

        code = broadcast_object_list([0 if error is None else 2 if isinstance(error, UserError) else 1])[0]
        if code and error is None:
            raise RankFailed(code)
    if error is not None:
        raise error


def out_of_memory(error: Exception, process: int, max_tokens: int) -> OutOfMemory:
    """What to do about it, in a sentence."""
    return OutOfMemory(
        f"process {process} is out of GPU memory ({' '.join(str(error).split())[:200]}). Lower max_tokens_per_device (it is "
        f"{max_tokens}), set `gradient_checkpointing: true`, or use a launch file that splits the model (launch/zero3.yaml, "
        "launch/fsdp2.yaml); with the first two the same command goes on from its last checkpoint"
    )


def take_over(run: Run, where: str, layout: dict[str, Any]) -> tuple[str | None, bool]:
    """Lock the run folder for this run, and find the checkpoint to go on from, its checksums verified.

    Returns:
        The checkpoint's folder, the same on all processes, or None to begin; whether its state is in one piece.

    Raises:
        UserError: another run writes there, or the checkpoint is of a layout that this one can't read; on all processes.
    """
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, "", False]
    if is_main():
        try:
            run.lock = Lock(run.folder, where)
            found[0] = newest_checkpoint(run.folder, verify=True, tell=lambda text: say(f"warning: {text}"))
            if found[0]:
                found[2] = check_readable(found[0], layout)
            (run.folder / "stopped.json").unlink(missing_ok=True)
        except UserError as error:
            found[1] = str(error)
    found = broadcast_object_list(found)
    if found[1]:
        raise UserError(found[1])
    return found[0], found[2]


def check_readable(checkpoint: str, layout: dict[str, Any]) -> bool:
    """Refuse a checkpoint that another engine has split; returns whether its state is in one piece, which any engine reads."""
    from rlhf.runs.portable import is_portable

    manifest = read_manifest(Path(checkpoint)) or {}
    if is_portable(manifest.get("files", {})):
        return True
    before = manifest.get("layout")
    if before is None or {before["split"], layout["split"]} <= {"no"}:
        return False
    same = before["split"] == layout["split"] and (
        before["split"] == "FSDP" or before["processes"] == layout["processes"]
    )
    if not same:
        raise UserError(
            f"{checkpoint} was written by {before['processes']} processes under {before['engine']}, and can't be read by "
            f"{layout['processes']} under {layout['engine']}: it was saved without `portable_checkpoints: true` (the default "
            "with LoRA). Go on as before (with that key the next checkpoint can be read by any), or begin anew with --fresh"
        )
    return False


def prepare_processes(args) -> None:
    """What accelerate 1.15 and DeepSpeed 0.19 have to be told where processes are on CPUs; nothing elsewhere."""
    if not args.use_cpu:
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # before a model loads, or zero.Init sees one process
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # MULTI_CPU is never made FSDP: it would train DDP, in silence
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState().distributed_type = DistributedType.MULTI_GPU


def finished_model(stage: Stage, context: Context, trainer, probe: list[list[int]]):
    """The trained model in one piece on the main process, whatever it was split over.

    Returns:
        (model, None), or, where it was split: (model loaded anew with the trained parameters, on the main process only;
        the split model's logits on `probe`)
    """
    from rlhf.distributed.sharding import whole_parameter
    from rlhf.models.finished import probe_logits

    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # without autocast
    if not any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters()):
        return model, None
    expected = probe_logits(model, probe)
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with whole_parameter(parameter) as whole:
                if is_main():
                    trained[name] = whole.detach().cpu().clone()
    if not is_main():
        return None, None
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # or ZeRO-3 would split what is loaded now
    from peft import get_peft_model
    from trl import get_peft_config

    again = stage.load(context)[0]
    if context.model_args.use_peft and not hasattr(again, "peft_config"):
        again = get_peft_model(again, get_peft_config(context.model_args))
    missing = again.load_state_dict(trained, strict=False)
    assert not missing.unexpected_keys, f"trained parameters that a new model lacks: {missing.unexpected_keys[:3]}"
    return again, expected


def pack(trainer, context: Context, mode: str) -> bool:
    """Let the trainer's models compute on one padding-free row, or say why they can't (never a silent change).

    Returns:
        Whether they do.

    Args:
        mode: `pairs` where the batch is [chosen rows, rejected rows], whose prompts are then computed once; `rows` else.
    """
    if not context.stage_args.packing:
        return False
    from rlhf.packing import kernel_name, pack_backbone, why_not

    asked = context.recipe.get("attn_implementation") if context.recipe else None
    models = [trainer.model]
    if getattr(trainer, "ref_model", None) is not None:
        models.append(trainer.accelerator.unwrap_model(trainer.ref_model))
    for reason in filter(None, map(why_not, models)):
        say(f"note: batches are padded, not packed: {reason}")
        if is_flash(asked):
            found = trainer.model.config._attn_implementation
            say(
                f"note: attention is {found}: {asked} is for packed rows here; `packing: false` asks transformers for it"
            )
        return False
    for model in models:
        pack_backbone(model, mode)
    if asked not in (None, "sdpa"):  # flash attention, eager
        device = trainer.args.device
        say(f"note: {asked} means packed attention here; on {device.type} it is computed by {kernel_name(device)}")
    return True


def use_global_batches(trainer, context: Context, packed: bool) -> None:
    """Give the trainer the recipe's global batch size, if it has one, after a look at its longest example.

    Raises:
        UserError: an example alone has more tokens than max_tokens_per_device.
    """
    stage_args, args, recipe = context.stage_args, context.args, context.recipe
    if stage_args.global_batch_size is None:
        return
    from rlhf.trainer import count_tokens

    rows = trainer.train_dataset
    num_tokens = [count_tokens(row, args.max_length, not packed) for row in rows]
    longest = max(num_tokens, default=0)
    if longest > stage_args.max_tokens_per_device:
        place = rows[num_tokens.index(longest)]["place"]
        raise prepare.too_long(recipe, place, longest, stage_args.max_tokens_per_device)
    trainer.use_global_batches(stage_args.global_batch_size, stage_args.max_tokens_per_device, not packed, num_tokens)


def train_or_restore(trainer, run: Run) -> None:
    """Train; or, where the checkpoint is already the last step's, only load it.

    transformers 5.23 takes one step more when it resumes a run that max_steps ended in the middle of an epoch.
    """
    from transformers import TrainerState

    if run.resume_from:
        state = TrainerState.load_from_json(str(Path(run.resume_from) / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            if trainer.safety.restore:
                trainer.safety.restore.restore_weights(trainer.model)
            trainer._load_from_checkpoint(run.resume_from)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=run.resume_from)


def describe_data(recipe: Recipe, data: StageData) -> None:
    """Report what the training rows are like: duplicates, contradictions, columns that are not used, rows left out."""
    name = recipe.get("dataset_name") or recipe.get("chosen_dataset_name")
    for text in data.describe():
        say(f"{name}: {text}")


def describe_complete(summary: dict[str, Any]) -> str:
    losses = [summary.get("first_loss"), summary.get("last_loss")]
    arrow = " -> ".join(f"{float(x):.3f}" for x in losses if x is not None)
    return f"{summary.get('steps', '?')} steps, training loss {arrow or '?'}, {duration(summary.get('seconds', 0))}"


def _announce(stage: Stage, context: Context, trainer, run: Run) -> None:
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
        engine = layout_of_environment().record(world)["engine"]
        other = (before.get("processes"), before.get("engine")) not in ((None, None), (world, engine))
        by = f" (of {before['processes']} process{'es' if before['processes'] > 1 else ''}, {before['engine']})"
        say(f"  resuming from {run.resume_from}{by if other else ''}")


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.1f} K"
