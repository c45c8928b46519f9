"""Which keys have an effect, in which stage and with which other keys: no key is silently ignored.

Every key of the installed libraries is in exactly one of REFUSED, ONLY_WITH and EFFECTIVE; tests/config/test_config.py compares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf.config.stage_config import OWN_KEYS

_LAUNCH = "hardware belongs in a launch file: accelerate launch --config_file launch/..."
_NO_METRICS = "held-out data is evaluated by its loss and the stage's own metrics; nothing else is collected"
_ALWAYS_TRAINS = "every stage trains, and evaluates if the recipe has held-out data (eval_strategy)"
_OWN_ROWS = "packing here puts each batch into one row; TRL's packing of several examples is not used"

# Keys that the stage sets itself, that nothing here reads, or that would break a guarantee of the project.
REFUSED = {
    "lora_task_type": "the stage sets it",
    "chat_template_path": "use chat_template, which takes a name or a .jinja file",
    "pad_token": "a dedicated pad token is chosen for the model",
    "model_init_kwargs": "use dtype, attn_implementation, model_revision or trust_remote_code",
    "deepspeed": _LAUNCH,
    "fsdp": _LAUNCH,
    "fsdp_config": _LAUNCH,
    "parallelism_config": "tensor, context and sequence parallelism are not supported; to shard a model use launch/fsdp2.yaml "
    "or launch/zero3.yaml",
    "local_rank": "the launcher sets each process's rank",
    "padding_free": "use packing, which is padding-free in every stage; TRL's flag is switched off for DPO in 1.16",
    "packing_strategy": _OWN_ROWS,
    "eval_packing": _OWN_ROWS,
    "precompute_ref_log_probs": "use `reference: cached`, the default, which caches them on disk; or `reference: online`",
    "precompute_ref_batch_size": "batches of the reference pass are formed by length",
    "hub_token": "a token in a recipe would end up in files; log in with `hf auth login` or set HF_TOKEN",
    "resume_from_checkpoint": "the same command resumes from its newest complete checkpoint; --fresh starts in a new folder",
    "ignore_data_skip": "a resumed run continues with the data that it has not seen; else it would differ from an uninterrupted one",
    "restore_callback_states_from_checkpoint": "no callback of this project has state",
    "save_only_model": "a checkpoint without the optimizer's state can't be resumed; save_total_limit saves disk space",
    "save_on_each_node": "all nodes share the output folder, and each file is written once",
    "enable_jit_checkpoint": "a run that gets SIGTERM or SIGUSR1 already saves and stops, at the same step on all ranks",
    "do_train": _ALWAYS_TRAINS,
    "do_eval": _ALWAYS_TRAINS,
    "do_predict": _ALWAYS_TRAINS,
    "auto_find_batch_size": "use global_batch_size, and max_tokens_per_device for what fits on a GPU",
    "average_tokens_across_devices": "a token always has the same weight, whichever rank it is on",
    "remove_unused_columns": "rows hold only what the loss needs",
    "label_names": "the stage sets its labels",
    "dataset_text_field": "prompts and answers are found under any of the names in docs/data.md; there is no text column",
    "dataset_kwargs": "data is prepared by this project (prompts, templates, lengths)",
    "use_cache": "training needs no key/value cache, and one would switch packing off",
    "logging_nan_inf_filter": "a loss that is not finite aborts the run instead",
    "include_num_input_tokens_seen": "num_tokens is always logged",
    "bf16_full_eval": "held-out data is computed in the training precision; else its losses could not be compared",
    "fp16_full_eval": "held-out data is computed in the training precision; else its losses could not be compared",
    "prediction_loss_only": _NO_METRICS,
    "include_for_metrics": _NO_METRICS,
    "batch_eval_metrics": _NO_METRICS,
    "eval_do_concat_batches": _NO_METRICS,
    "eval_use_gather_object": _NO_METRICS,
    "eval_accumulation_steps": _NO_METRICS,
}

# Keys of StageConfig and TRL that only one or two stages have.
STAGES_OF = {
    "reference": ("dpo",),
    "reference_model": ("dpo",),
    "reference_cache": ("dpo",),
    "max_reference_bias_nats": ("dpo",),
    "continue_adapter": ("sft", "dpo"),
    "chosen_dataset_name": ("reward", "dpo"),
    "rejected_dataset_name": ("reward", "dpo"),
    "label_smoothing_factor": ("sft",),
}


@dataclass(frozen=True)
class Needs:
    """The condition under which a key has an effect.

    Attributes:
        keys: the keys that decide.
        holds: whether it has an effect with a recipe's values.
        fix: the end of the message: without what it has no effect.
    """

    keys: tuple[str, ...]
    holds: Callable[[dict[str, Any]], bool]
    fix: str


def _given(key: str, fix: str = "") -> Needs:
    return Needs((key,), lambda values: bool(values.get(key)), fix or f"without {key}")


def _among(key: str, default: str, allowed: tuple[str, ...], fix: str) -> Needs:
    def holds(values):
        found = values.get(key, default)
        return bool(set(found if isinstance(found, list) else [found]) & set(allowed))

    return Needs((key,), holds, fix)


_BY_TOKENS = Needs(
    ("global_batch_size",), lambda values: not values.get("global_batch_size"),
    "with global_batch_size, whose batches are built and loaded by this project",
)  # fmt: skip
# `use_peft: false` is deliberate: LoRA's keys may stay for when it becomes true again.
_LORA = Needs(("use_peft",), lambda values: "use_peft" in values, "without `use_peft: true`: all weights are trained")
_FOUR_BITS = _given("load_in_4bit", "without `load_in_4bit: true`")
_HELD_OUT = ("dataset_test_split", "eval_dataset_name", "heldout")
_EVALUATES = Needs(
    ("eval_strategy",), lambda values: values.get("eval_strategy", "no") != "no" or bool(values.get("eval_on_start")),
    "without eval_strategy (steps or epoch)",
)  # fmt: skip
_ADAM = Needs(
    ("optim",),
    lambda values: any(part in values.get("optim", "adamw") for part in ("adam", "lion", "mix")),
    "with this `optim`, which is not an Adam",
)
_PADDED = Needs(
    ("packing",), lambda values: values.get("packing") is False, "without `packing: false`: packed rows have no padding"
)
_COMPILED = Needs(
    ("packing",), lambda values: values.get("packing") is False,
    "that is worth its price without `packing: false`: packed rows have another length in every micro-batch, for each of "
    "which torch.compile builds anew, until it gives up after eight and computes as without",
)  # fmt: skip
_CHECKPOINTING = Needs(  # TRL switches it on
    ("gradient_checkpointing", "activation_checkpointing"),
    lambda values: values.get("activation_checkpointing", values.get("gradient_checkpointing")) is not False,
    "without `gradient_checkpointing: true`",
)
_HUB = _given("push_to_hub", "without `push_to_hub: true`")
_TRACKIO = Needs(
    ("report_to",), lambda values: bool({"trackio", "all"} & set(values.get("report_to") or ())),
    "without `report_to: trackio`",
)  # fmt: skip
_NO_WARM_UP = ("constant", "reduce_lr_on_plateau", "greedy")
_SMOOTH = ("robust", "exo_pair", "aot", "aot_unpaired")

ONLY_WITH = {
    "max_tokens_per_device": _given("global_batch_size"),
    "dataset_config": _given("dataset_name"),
    "max_eval_examples": Needs(
        _HELD_OUT, lambda values: any(values.get(key) for key in _HELD_OUT), "without heldout, dataset_test_split or eval_dataset_name"
    ),
    "reference_model": _among("reference", "cached", ("cached", "nf4"), "without `reference: cached` or `nf4`"),
    "max_reference_bias_nats": _among("reference", "cached", ("nf4",), "without `reference: nf4`"),
    "reference_cache": _among("reference", "cached", ("cached",), "without `reference: cached`"),
    # LoRA and quantisation
    **dict.fromkeys(
        ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
         "use_rslora", "use_dora"), _LORA
    ),
    **dict.fromkeys(("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"), _FOUR_BITS),
    # batches that the Trainer makes
    **dict.fromkeys(
        ("per_device_eval_batch_size", "train_sampling_strategy", "length_column_name", "dataloader_drop_last",
         "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
         "dataloader_in_order", "accelerator_config"), _BY_TOKENS
    ),
    # losses
    "label_smoothing": _among("loss_type", "sigmoid", _SMOOTH, f"without a loss_type that smooths ({', '.join(_SMOOTH)})"),
    "discopop_tau": _among("loss_type", "sigmoid", ("discopop",), "without `loss_type: discopop`"),
    "f_alpha_divergence_coef": _among(
        "f_divergence_type", "reverse_kl", ("alpha_divergence",), "without `f_divergence_type: alpha_divergence`"
    ),
    "ref_model_mixup_alpha": _given("sync_ref_model", "without `sync_ref_model: true`"),
    "ref_model_sync_steps": _given("sync_ref_model", "without `sync_ref_model: true`"),
    # NEFTune scales its noise by the length of the row, and packing makes rows longer
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "pad_to_multiple_of": _PADDED,
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILED),
    "neftune_noise_alpha": Needs(
        ("packing",), lambda values: values.get("packing") is False,
        "of a known size without `packing: false`: its noise depends on the length of the row",
    ),
    # optimizer
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), _ADAM),
    "warmup_steps": Needs(
        ("lr_scheduler_type",), lambda values: values.get("lr_scheduler_type") not in _NO_WARM_UP,
        f"with a scheduler that does not warm up ({', '.join(_NO_WARM_UP)}); constant_with_warmup does",
    ),
    "optim_target_modules": Needs(
        ("optim",), lambda values: any(part in values.get("optim", "") for part in ("galore", "apollo")),
        "without a GaLore or APOLLO `optim`",
    ),
    # evaluating, logging, saving
    "eval_steps": _among("eval_strategy", "no", ("steps",), "without `eval_strategy: steps`"),
    "eval_delay": _EVALUATES,
    "metric_for_best_model": _EVALUATES,
    "early_stopping_patience": _among("eval_strategy", "no", ("steps", "epoch"), "without eval_strategy (steps or epoch)"),
    "early_stopping_threshold": _given("early_stopping_patience"),
    "greater_is_better": _given("metric_for_best_model"),
    "save_steps": _among("save_strategy", "steps", ("steps", "best"), "without `save_strategy: steps`"),
    "logging_steps": Needs(
        ("logging_strategy",),
        lambda values: values.get("logging_strategy", "steps") == "steps" or values.get("eval_strategy") == "steps",
        "without `logging_strategy: steps`",
    ),
    **dict.fromkeys(
        ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"), _HUB
    ),
    **dict.fromkeys(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _TRACKIO),
    "liger_kernel_config": _given("use_liger_kernel", "without `use_liger_kernel: true`"),
}  # fmt: skip

# Keys that have an effect whatever the others are.
EFFECTIVE = frozenset(
    # model, precision, memory
    "model_name_or_path model_revision dtype attn_implementation trust_remote_code use_peft load_in_8bit load_in_4bit "
    "bf16 fp16 tf32 activation_checkpointing gradient_checkpointing activation_offloading "
    "use_liger_kernel torch_empty_cache_steps use_cpu disable_dropout eos_token "
    # data
    "packing max_length truncation_mode dataset_num_proc shuffle_dataset completion_only_loss "
    "assistant_only_loss dataloader_num_workers dataloader_pin_memory seed data_seed full_determinism "
    # losses
    "loss_type loss_weights ld_alpha f_divergence_type beta use_weighting sync_ref_model center_rewards_coefficient "
    "router_aux_loss_coef label_smoothing_factor "
    # optimizer
    "learning_rate lr_scheduler_type lr_scheduler_kwargs optim optim_args weight_decay max_grad_norm "
    "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps "
    # evaluating, logging, saving
    "output_dir eval_strategy eval_on_start load_best_model_at_end logging_strategy logging_first_step log_on_each_node "
    "log_level log_level_replica disable_tqdm report_to run_name save_strategy save_total_limit push_to_hub "
    "skip_memory_metrics debug "
    # processes
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout".split()
)


_TRUE_BY_DEFAULT = ("dataloader_in_order",)  # keys of ONLY_WITH; any other key set to false counts as unset


def without_effect(key: str, stage: str, values: dict[str, Any], decided: set[str]) -> str:
    """Why a key has no effect, as the end of `'key' has no effect …`; '' if it has one.

    Args:
        decided: keys set on the command line: the file's keys that they disable need not be deleted.
    """
    stages = STAGES_OF.get(key, (stage,))
    if stage not in OWN_KEYS and stage not in stages:
        return f"in {stage}: it belongs to {' and '.join(stages)}; remove it"
    needs = ONLY_WITH.get(key)
    unset = values.get(key) is None or (values[key] is False and key not in _TRUE_BY_DEFAULT)
    if stage in OWN_KEYS or needs is None or unset or needs.holds(values):
        return ""
    if decided & set(needs.keys) or (key == "label_smoothing" and values[key] == 0):
        return ""
    return f"{needs.fix}; change that, or remove {key}"
