"""Direct Preference Optimization (DPO): trains the policy towards chosen and away from rejected answers.

The reference model is exactly the policy before its first update. With `reference: cached` (the default) its
log-probabilities are computed at that point, once, and cached on disk (reference.py). With `reference: online` every
step runs the reference model, which depends on the policy:
    a full model, trained with LoRA      the model with the new adapter disabled
    an SFT adapter, trained further      a frozen copy of that adapter, named `ref` (TRL makes it); with the adapter
                                         disabled it would be the model before SFT
    a full model, fully fine-tuned       a second copy of it
Either way the run first checks it (start_check.py): at step 0 the loss must be ln 2, up to numerical noise.
With `reference_model:` the cached log-probabilities are those of another model, which is loaded, sharded as the engine
shards, for that one pass (another_reference); the loss then need not start at ln 2.
`reference: nf4` loads a separate 4-bit reference model, for references other than the policy's starting point. It is
never exact, so its bias is measured, printed and bounded before training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlhf.distributed.processes import is_main, say
from rlhf.distributed.sharding import num_elements
from rlhf.errors import UserError, quote
from rlhf.runs.folder import MERGED_REFERENCE
from rlhf.runs.stop import Stopper
from rlhf.training.model_checks import use_experts
from rlhf.training.sft import load
from rlhf.training.stage import Plan, Stage
from rlhf.upstream import check_upstream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import DPOConfig, DPOTrainer

    from rlhf.runs.checkpointing import CheckpointMixin
    from rlhf.training.start_check import CheckedTrainer


def build(plan: Plan, stopper: Stopper | None = None) -> CheckpointMixin:
    """TRL's DPOTrainer for this plan, with the check at step 0."""
    from rlhf.models.loading import load_nf4, load_policy
    from rlhf.packing import lm_head
    from rlhf.training.trainer_setup import trainer_arguments, use_global_batches

    args, model_args = plan.args, plan.model_args
    check_upstream("dpo", plan.recipe.is_quantised or plan.reference == "nf4")
    if args.use_cpu:
        lm_head.install()
    loaded = load(plan)
    reference = None
    if not model_args.use_peft and plan.reference == "online":
        reference = load_policy(
            plan.model_name, loaded.tokenizer, model_args, args.trust_remote_code, False, merged=plan.merged_start
        )
        use_experts(reference, plan)
    elif plan.reference == "nf4":
        reference = load_nf4(reference_name(plan), loaded.tokenizer, loaded.model.dtype, args.trust_remote_code)
    trainer = trainer_class(plan, stopper)(ref_model=reference, **trainer_arguments(plan, loaded))
    if plan.reference == "nf4":
        check_bias(trainer, plan, loaded.tokenizer)
    use_global_batches(trainer, plan, trainer.is_packed)
    return trainer


@contextlib.contextmanager
def another_reference(trainer: DPOTrainer, plan: Plan, packed: bool) -> Iterator[str]:
    """Inside the block `trainer.ref_model` is the recipe's reference_model, in full precision; yields its files' digest.

    A collective that all ranks must call.
    """
    from trl.models import prepare_deepspeed
    from trl.trainer.utils import add_fused_lm_head

    from rlhf.models.digests import weights_digest
    from rlhf.models.folder import is_adapter
    from rlhf.models.loading import load_policy
    from rlhf.models.on_disk import shard_model
    from rlhf.packing import pack_backbone, why_not
    from rlhf.training.precision import adds_in_float64, sum_logps_in_float64
    from rlhf.training.trainer_setup import known_longest

    args, name = cast("DPOConfig", plan.args), reference_name(plan)
    merged = Path(str(args.output_dir)) / MERGED_REFERENCE
    full = dataclasses.replace(plan.model_args, load_in_4bit=False, load_in_8bit=False, model_revision="main")
    say(f"  reference {plan.stage_args.reference_model}, loaded for one pass; the loss need not start at ln 2")
    model: Any = load_policy(name, trainer.processing_class, full, args.trust_remote_code, False, merged)
    model = use_experts(model, plan).eval().requires_grad_(False)
    add_fused_lm_head(model)  # as TRL's trainer calls it
    if adds_in_float64(trainer.args):
        sum_logps_in_float64(model)
    if trainer.is_fsdp_enabled:
        shard_model(model, trainer.accelerator)
    if packed and (reason := why_not(model, longest := known_longest(plan))):
        say(f"note: the reference model computes padded batches: {reason}")
    elif packed:
        pack_backbone(model, "pairs", longest)
    engine: Any = None
    if trainer.is_deepspeed_enabled:
        model = engine = prepare_deepspeed(model, trainer.accelerator)
    elif not trainer.is_fsdp_enabled:
        model = model.to(args.device)
    trainer.ref_model = model
    try:
        yield weights_digest(str(merged) if is_adapter(name) else name)
    finally:
        trainer.ref_model = None
        if engine is not None:
            engine.destroy()
        del model, engine
        gc.collect()
        if is_main():  # no collective: this may be an error of one rank
            shutil.rmtree(merged, ignore_errors=True)


def reference_name(plan: Plan) -> str:
    """The located model that the reference is, or is quantised from."""
    from rlhf.models.folder import locate

    name = plan.stage_args.reference_model
    return locate(name, plan.recipe.where("reference_model"), say=say) if name else plan.model_name


def check_bias(trainer: DPOTrainer, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> None:
    """Report the size and the bias of the 4-bit reference model; reject it if the bias exceeds the recipe's limit.

    Raises:
        UserError: the bias is too large; states the measured value and the fix.
    """
    from trl.trainer.utils import add_fused_lm_head

    from rlhf.models.loading import load_policy
    from rlhf.models.on_disk import shard_model
    from rlhf.training.reference import measure_bias

    args, stage_args, recipe = cast("DPOConfig", plan.args), plan.stage_args, plan.recipe
    exact: Any = trainer.model
    if stage_args.reference_model:
        exact = load_policy(reference_name(plan), tokenizer, plan.model_args, args.trust_remote_code, False)
        if trainer.is_fsdp_enabled:
            shard_model(exact, trainer.accelerator)
        exact = exact.to(args.device).eval()
        add_fused_lm_head(exact)  # as TRL's trainer calls it
    small = trainer.accelerator.unwrap_model(trainer.ref_model).get_memory_footprint() / 1e6
    weights = [p for name, p in exact.named_parameters() if "lora_" not in name]
    full = sum(num_elements(p) * p.element_size() for p in weights) / 1e6
    found = measure_bias(trainer, exact, args.beta)
    say(
        f"  reference {reference_name(plan)} in 4 bits (NF4): {small:.0f} MB instead of {full:.0f} MB\n"
        f"            its bias on {found['pairs']} pairs: {found['mean_nats']:.2f} nats per answer (worst "
        f"{found['worst_nats']:.2f}), {found['mean_margin_nats']:.2f} nats per margin (worst "
        f"{found['worst_margin_nats']:.2f})\n"
        f"            DPO's loss at step 0 is {found['loss']:.3f} instead of {found['exact_loss']:.3f}"
    )
    if not stage_args.reference_model:
        say("note: the policy starts from these weights; `reference: cached` is exact and needs no second model")
    if not found["mean_nats"] <= stage_args.max_reference_bias_nats:
        fix = "quantise a larger model" if stage_args.reference_model else "use `reference: cached`"
        raise UserError(
            f"{recipe.where('reference')}: the 4-bit reference is off by {found['mean_nats']:.2f} nats per answer on "
            f"average, more than max_reference_bias_nats={stage_args.max_reference_bias_nats:g}: DPO would train "
            f"against a different model from the one named; {fix}, or raise max_reference_bias_nats. "
            "Nothing was trained"
        )


def check(plan: Plan) -> None:
    """Reject unsupported reference settings and adapter shapes, before the model loads."""
    check_reference(plan)
    if plan.continues_adapter:
        check_same_adapter(plan)


def check_reference(plan: Plan) -> None:
    """Reject unsupported reference settings."""
    args, stage_args, recipe = cast("DPOConfig", plan.args), plan.stage_args, plan.recipe
    if args.sync_ref_model and plan.model_args.use_peft:
        raise UserError(f"{recipe.where('sync_ref_model')}: sync_ref_model needs full fine-tuning; remove `use_peft`")
    if args.sync_ref_model and stage_args.reference == "cached":
        raise UserError(
            f"{recipe.where('sync_ref_model')}: sync_ref_model updates the reference during training; set "
            "`reference: online`"
        )
    if stage_args.reference_model:
        check_same_tokens(plan)
    if stage_args.reference == "nf4":
        from rlhf.models.folder import is_adapter

        if plan.recipe.is_quantised:
            raise UserError(
                f"{recipe.where('reference')}: a QLoRA policy already provides its exact 4-bit reference at no extra "
                "cost; use `reference: cached` or `reference: online`"
            )
        name = reference_name(plan)
        if is_adapter(name):
            raise UserError(
                f"{recipe.where('reference')}: {name} is an adapter, but only a full model can be quantised; set "
                "`merge_adapter: true` in the recipe that makes it"
            )
    local = sorted({"aot", "aot_unpaired", "sft"} & set(args.loss_type))
    if local and stage_args.global_batch_size:
        say(
            f"note: the loss {' and '.join(local)} is computed per micro-batch (it sorts the pairs or counts the "
            "tokens in it): its value depends on how the global batch is split into micro-batches"
        )


def check_same_tokens(plan: Plan) -> None:
    """Reject a reference model whose tokenizer gives the policy's tokens other ids: it would score other texts."""
    from transformers import AutoTokenizer

    names = plan.model_name, reference_name(plan)
    policy, reference = (
        AutoTokenizer.from_pretrained(name, trust_remote_code=plan.args.trust_remote_code).get_vocab() for name in names
    )
    shared = policy.keys() & reference.keys()
    differ = next((token for token in sorted(shared) if policy[token] != reference[token]), None)
    added = len(policy.keys() ^ reference.keys())
    if differ is not None or added > MAX_ADDED_TOKENS:
        found = f"{quote(differ)} has another id" if differ is not None else f"{added} tokens are in one of them only"
        raise UserError(
            f"{plan.recipe.where('reference_model')}: the tokenizer of {plan.stage_args.reference_model} is not that of the policy "
            f"({found}), so it would score other texts; name a reference of the same family"
        )


MAX_ADDED_TOKENS = 16  # special tokens that a chat template has added


def check_same_adapter(plan: Plan) -> None:
    """An adapter that is trained further keeps its shape: reject a recipe that names another one."""
    from peft import PeftConfig

    adapter = PeftConfig.from_pretrained(plan.model_name)
    for key, attribute in (("lora_r", "r"), ("lora_alpha", "lora_alpha")):
        wanted, found = plan.recipe.get(key), getattr(adapter, attribute)
        if wanted is not None and wanted != found:
            raise UserError(
                f"{plan.recipe.where(key)}: {key}={wanted}, but the adapter to be trained further has {found}; set "
                f"{found}, or `continue_adapter: false` to merge it and train a new one"
            )


def trainer_class(plan: Plan, stopper: Stopper | None = None):
    """A DPOTrainer on packed rows, with the cached reference, that runs `check_start` before its first step."""
    from trl import DPOTrainer

    from rlhf.models.digests import weights_digest
    from rlhf.packing import known_inputs, move_batch
    from rlhf.training.precision import (
        Float64References,
        adds_in_float64,
        sum_logps_in_float64,
        train_adapter_in_float32,
    )
    from rlhf.training.reference import add_reference_logps
    from rlhf.training.start_check import check_start
    from rlhf.training.trainer import GlobalBatches
    from rlhf.training.trainer_setup import pack

    class CheckedDPOTrainer(GlobalBatches, DPOTrainer):
        _start_checked = False
        _other_model = (
            contextlib.ExitStack()
        )  # holds a reference_model while TRL's constructor has the reference computed
        _source = ""  # the digest of the reference's files, for training and held-out rows
        reference_seconds = 0.0  # time spent on the cached reference, for bench/

        def __init__(self, **kwargs):
            with self._other_model, without_hashing(), sharding_by_layer():
                super().__init__(**kwargs)
            self._make_ready()
            if adds_in_float64(self.args):
                self.data_collator = Float64References(self.data_collator)

        def _make_ready(self) -> None:
            """Pack once, as soon as the model exists: TRL's constructor computes the reference before it returns."""
            if not hasattr(self, "is_packed"):
                train_adapter_in_float32(self.model)
                self.shard()
                self.is_packed = pack(self, plan)
                if adds_in_float64(self.args):
                    for model in filter(None, (self.model, self.ref_model)):
                        sum_logps_in_float64(self.accelerator.unwrap_model(model))

        def _precompute_ref_logps(self, dataset, name, batch_size):
            self._make_ready()
            path = "packed" if self.is_packed else str(self.model.config._attn_implementation)
            folder = plan.stage_args.reference_cache
            started = time.perf_counter()
            if plan.stage_args.reference_model and not self._source:
                self._source = self._other_model.enter_context(
                    another_reference(cast("DPOTrainer", self), plan, self.is_packed)
                )
            self._source = self._source or weights_digest(str(plan.merged_start or plan.model_name), plan.model_commit)
            found = add_reference_logps(self, dataset, self._source, path, Path(folder) if folder else None, stopper)
            self.reference_seconds += time.perf_counter() - started
            return found

        def compute_ref_log_probs(self, model, inputs):
            return super().compute_ref_log_probs(model, known_inputs(inputs))

        def _prepare_inputs(self, inputs):
            """Keep reference log-probabilities as they are.

            Under DeepSpeed transformers 5.23 casts all floats to the model's dtype: in bf16 -1021 nats become -1024.
            """
            exact = {name: inputs[name] for name in inputs if name.startswith("ref_")}
            return super()._prepare_inputs(inputs) | move_batch(exact, self.args.device)

        def training_step(self, model, inputs, *args, **kwargs):
            own = plan.reference != "nf4" and not plan.stage_args.reference_model
            if not self._start_checked and self.state.global_step == 0 and own:
                check_start(cast("CheckedTrainer", self), model, inputs)
            self._start_checked = True
            return super().training_step(model, inputs, *args, **kwargs)

    return CheckedDPOTrainer


@contextlib.contextmanager
def without_hashing():
    """Skip the hash of all weights for TRL 1.16's own cache, which reference.py replaces; it takes minutes for 8B."""
    from trl.trainer import dpo_trainer

    hash_module = dpo_trainer.hash_module
    dpo_trainer.hash_module = lambda module: ""
    try:
        yield
    finally:
        dpo_trainer.hash_module = hash_module


@contextlib.contextmanager
def sharding_by_layer():
    """Under FSDP2: shard a reference model layer by layer, as a policy, and make none for the cached reference.

    TRL 1.16 would load one whole on each rank for that, since its policy is not sharded yet, and gather all of an online
    reference in each pass.
    """
    from trl.trainer import dpo_trainer

    from rlhf.models.on_disk import shard_model

    def prepare_fsdp(model, accelerator):
        shard_model(model, accelerator)
        return model.eval()

    before = dpo_trainer.prepare_fsdp, dpo_trainer.create_model_from_path
    dpo_trainer.prepare_fsdp, dpo_trainer.create_model_from_path = (
        prepare_fsdp,
        cast(Any, lambda *args, **options: None),
    )
    try:
        yield
    finally:
        dpo_trainer.prepare_fsdp, dpo_trainer.create_model_from_path = before


def probe(dataset) -> list[list[int]]:
    return [row["prompt_ids"] + row["chosen_ids"] for row in dataset.select(range(min(2, len(dataset))))]


DPO = Stage("dpo", "DPO", "pairs", load, build, probe, packing_mode="pairs", check=check)
