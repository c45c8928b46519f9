"""Names of other libraries that we override, patch or read and that could vanish unnoticed: one list, checked at start.

If transformers renames `Trainer._get_grad_norm`, our override is never called: no error, and no guard against gradient
spikes. So every such name is listed with the file that relies on it and what would be lost, and `check_upstream` stops
a run whose libraries lack one, before a model loads. tests/test_upstream.py reads the source and fails where a private
name is missing from the list.

Upgrading to a new release: raise the upper bound in pyproject.toml, run the tests, raise VERIFIED here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import os
import platform
from dataclasses import dataclass
from types import CodeType
from typing import Any

from rlhf.errors import UserError

# Releases that the tests passed with. pyproject.toml has the same bounds, except for transformers, whose new releases
# add models: it allows later ones, and the list below decides whether one will do.
VERIFIED = {
    "Python": "3.11 to 3.12", "torch": "2.11 to 2.13", "transformers": "5.17 to 5.23", "trl": "1.16", "accelerate": "1.15",
    "peft": "0.21", "datasets": "5.2", "deepspeed": "0.19", "bitsandbytes": "0.50", "tqdm": "4.70", "lm_eval": "0.4",
}  # fmt: skip


@dataclass(frozen=True)
class Name:
    """One name that another library must have.

    Attributes:
        module, path: `transformers.trainer`, `Trainer._get_grad_norm`.
        used_by: our file that relies on it.
        lost: what would be lost without it.
        parameters: of the function, after `self`, the first ones in this order.
        in_code: an attribute of instances (or a string) used in the code of the class that `path` names.
        only: checked only for this stage (`sft`, `reward`, `dpo`) or this optional package; '' for always.
    """

    module: str
    path: str
    used_by: str
    lost: str
    parameters: tuple[str, ...] = ()
    in_code: bool = False
    only: str = ""

    @property
    def package(self) -> str:
        top = self.module.split(".")[0]
        return top if top in VERIFIED else "Python"


def _of(
    module: str, owner: str, used_by: str, names: dict[str, str], in_code: bool = False, only: str = ""
) -> list[Name]:
    """Names of a class (or, without `owner`, of a module): `name parameter parameter ...` -> what would be lost."""
    found = []
    for words, lost in names.items():
        name, *parameters = words.split()
        path = f"{owner}.{name}" if owner else name
        found.append(Name(module, path, f"rlhf/{used_by}", lost, tuple(parameters), in_code, only))
    return found


TRAINERS = {"sft": "SFTTrainer", "reward": "RewardTrainer", "dpo": "DPOTrainer"}

TRANSFORMERS = [
    *_of("transformers.trainer", "Trainer", "runs/checkpointing.py", {
        "training_step model inputs num_items_in_batch": "the check for a loss that is not finite",
        "_get_grad_norm model grad_norm": "gradient-spike guard",
        "_get_output_dir trial": "atomic checkpoints",
        "_save_checkpoint model trial": "atomic checkpoints",
        "save_model output_dir _internal_call": "checkpoints that hold the weights once",
        "_save output_dir state_dict": "continuing without a checkpoint when the disk is full",
        "_save_optimizer_and_scheduler output_dir": "checkpoints that any engine can read",
        "_prepare_for_training max_steps train_dataloader resume_from_checkpoint": "resuming under another engine",
        "_load_from_checkpoint resume_from_checkpoint model": "resuming under another engine",
        "_load_scaler checkpoint": "the loss scale of a resumed fp16 run",
        "_evaluate trial ignore_keys_for_eval skip_scheduler": "stopping during an evaluation",
    }),
    *_of("transformers.trainer", "Trainer", "runs/best.py", {
        "_load_best_model": "the best model of a run whose checkpoints any engine can read",
        "_determine_best_metric metrics trial": "saving the best checkpoint between two save_steps",
        "_finalize_training trial num_train_samples start_time": "keeping the newest checkpoint until the model is written",
    }),
    *_of("transformers.trainer_callback", "TrainerCallback", "runs/checkpointing.py", {
        "on_train_begin args state control": "the evaluation that a stop has postponed",
        "on_step_end args state control": "stopping on request, and the checks of loss and gradient",
        "on_epoch_end args state control": "stopping at the end of an epoch",
        "on_prediction_step args state control": "stopping during an evaluation",
        "on_save args state control": "the watchdog",
    }),
    *_of("transformers.trainer_callback", "EarlyStoppingCallback", "training/watch.py", {
        "on_evaluate args state control metrics": "early stopping",
    }),
    *_of("transformers.trainer_callback", "TrainerCallback", "runs/metrics.py", {
        "on_log args state control": "metrics.jsonl", "on_train_end args state control": "the last line of the progress bar",
    }),
    *_of("transformers.trainer_callback", "TrainerCallback", "training/watch.py", {
        "on_train_begin args state control": "what early stopping had counted before a stop",
        "on_log args state control": "the findings about a run", "on_evaluate args state control": "early stopping",
    }),
    *_of("tqdm.std", "tqdm", "console.py", {
        "_instances": "closing open progress bars before an error", "_decr_instances": "plain lines in log files",
    }),
    *_of("transformers.training_args", "TrainingArguments", "runs/checkpointing.py", {
        "logging_nan_inf_filter": "a loss of NaN in the log",
    }),
    *_of("transformers.trainer", "Trainer", "training/trainer.py", {
        "create_accelerator_and_postprocess": "fp32 gradients and log-probabilities under FSDP2 with bf16",
        "get_train_dataloader": "the global batch",
        "compute_loss model inputs return_outputs num_items_in_batch": "each micro-batch's weight in its global batch",
        "floating_point_ops inputs": "training on global batches",
        "_prepare_inputs inputs": "copies to a GPU that the host does not wait for",
        "evaluation_loop dataloader description prediction_loss_only ignore_keys metric_key_prefix": "evaluating each row once",
        "_set_signature_columns_if_needed": "the columns of a global batch",
        "_wrap_model model training": "evaluating under every engine",
    }),
    *_of("transformers.trainer", "Trainer", "training/step_metrics.py", {"log logs start_time": "metrics read once per step"}),
    *_of("transformers.trainer", "Trainer", "training/precision.py", {
        "_clip_grad_norm model": "the exact norm of a gradient on CPUs",
    }),
    *_of("transformers.trainer", "Trainer", "training/precision.py", {
        "is_deepspeed_enabled": "the exact norm of a gradient on CPUs",
    }, in_code=True),
    *_of("transformers.trainer", "Trainer", "training/trainer.py", {
        "_signature_columns": "the columns of a global batch",
        "is_deepspeed_enabled": "gradient all-reduce once per step",
        "current_gradient_accumulation_steps": "the scale of the loss",
    }, in_code=True),
    *_of("transformers.trainer", "Trainer", "runs/trained_state.py", {"model_wrapped": "checkpoints that any engine can read"}, in_code=True),
    *_of("transformers.trainer", "Trainer", "training/dpo.py", {
        "_prepare_inputs inputs": "exact reference log-probabilities under DeepSpeed with bf16",
    }),
    *_of("transformers.trainer", "Trainer", "training/start_check.py", {"compute_loss_context_manager": "the check of DPO's start"}),
    *_of("transformers.integrations.deepspeed", "", "distributed/sharding.py", {
        "_hf_deepspeed_config_weak_ref": "merging an adapter under ZeRO-3",
        "unset_hf_deepspeed_config": "merging an adapter under ZeRO-3",
    }),
    *_of("transformers.configuration_utils", "PreTrainedConfig", "packing/backbone.py", {
        "_attn_implementation": "packing",
    }),
    *_of("transformers.configuration_utils", "PreTrainedConfig", "models/loading.py", {
        "_name_or_path": "the base of a reward model",
    }, in_code=True),
    *_of("transformers.modeling_utils", "PreTrainedModel", "packing/backbone.py", {
        "_is_stateful": "refusing to pack recurrent models",
    }),
    *_of("transformers.modeling_utils", "PreTrainedModel", "models/pieces.py", {
        "_keys_to_ignore_on_save": "leaving out what a finished model does not need",
    }),
    *_of("transformers.modeling_utils", "PreTrainedModel", "models/pieces.py", {
        "all_tied_weights_keys": "writing tied weights once",
    }, in_code=True),
    *_of("transformers.modeling_utils", "", "models/on_disk.py", {
        "accelerate_dispatch model hf_quantizer device_map offload_folder offload_index": "loading a model in shards under FSDP2",
    }),
    *_of("transformers.modeling_utils", "", "models/saving.py", {
        "accelerate_dispatch model hf_quantizer device_map offload_folder offload_index": "comparing a finished model on the GPU",
    }),
    *_of("transformers.modeling_utils", "PreTrainedModel", "models/saving.py", {
        "_skip_keys_device_placement": "comparing a finished model on the GPU",
    }),
    *_of("accelerate", "", "models/saving.py", {"dispatch_model": "comparing a finished model on the GPU"}),
    *_of("transformers.modeling_utils", "", "models/converted.py", {
        "accelerate_disk_offload model disk_offload_folder checkpoint_files": "loading a model in shards under FSDP2",
    }),
    *_of("transformers.core_model_loading", "", "models/converted.py", {
        "spawn_materialize thread_pool tensor device dtype": "loading a model in shards under FSDP2",
        "offload_and_maybe_resave_param target_name param loading_info disk_offload_folder disk_offload_index applied_ops": "loading experts in shards under FSDP2",
    }),
    *_of("transformers.core_model_loading", "WeightConverter", "models/converted.py", {
        "add_tensor target_key source_key source_pattern future": "loading experts in shards under FSDP2",
        "convert layer_name model config": "loading experts in shards under FSDP2",
    }),
    *_of("transformers.core_model_loading", "WeightConverter", "models/converted.py", {
        name: "loading experts in shards under FSDP2" for name in ("layer_targets", "operations", "source_patterns")
    }),
    *_of("transformers.conversion_mapping", "", "models/converted.py", {
        "get_model_conversion_mapping model": "loading experts in shards under FSDP2",
    }),
    *_of("transformers.core_model_loading", "", "models/pieces.py", {
        "revert_weight_conversion model state_dict": "writing mixtures of experts in the layout of their files",
    }),
    *_of("transformers.modeling_utils", "PreTrainedModel", "models/embedded.py", {
        "hf_quantizer": "saving the embedded model",
    }, in_code=True),
    *_of("transformers.modeling_utils", "", "packing/attention.py", {"AttentionInterface": "packing"}),
    *_of("transformers.masking_utils", "", "packing/attention.py", {"AttentionMaskInterface": "packing"}),
]  # fmt: skip

TRL = [
    *(
        name
        for stage, trainer in TRAINERS.items()
        for name in _of(f"trl.trainer.{stage}_trainer", trainer, "training/step_metrics.py", {
            "_metrics": "the metrics of a global batch", "_total_train_tokens": "the count of tokens",
        }, in_code=True, only=stage)
    ),
    *(
        name
        for stage, trainer in TRAINERS.items()
        for name in _of(f"trl.trainer.{stage}_trainer", trainer, "training/trainer.py", {
            "_prepare_dataset dataset processing_class args": "training on the token ids that all processes made together",
        }, only=stage)
    ),
    *_of("trl.trainer.dpo_trainer", "DPOTrainer", "training/dpo.py", {
        "_precompute_ref_logps dataset name batch_size": "the reference cache",
    }, only="dpo"),
    *_of("trl.trainer.dpo_trainer", "DPOTrainer", "training/reference.py", {
        "compute_ref_log_probs model inputs": "the reference cache",
    }, only="dpo"),
    *_of("trl.trainer.dpo_trainer", "DPOTrainer", "training/dpo.py", {
        "ref": "the frozen copy of an adapter that DPO continues",  # the adapter's name
    }, in_code=True, only="dpo"),
    *_of("trl.trainer.dpo_trainer", "DPOTrainer", "training/start_check.py", {
        name: "the check of DPO's start"
        for name in ("loss_types", "loss_weights", "label_smoothing", "use_weighting", "ref_model", "precompute_ref_logps")
    }, in_code=True, only="dpo"),
    *_of("trl.trainer.utils", "FusedCausalLMOutput", "training/precision.py", {"log_probs": "log-probabilities summed in float64"}, only="dpo"),
    *_of("trl.trainer.dpo_config", "DPOConfig", "training/plan.py", {"precompute_ref_log_probs": "the reference cache"}, only="dpo"),
    *_of("trl.trainer.dpo_trainer", "DPOTrainer", "training/reference.py", {
        "ref_chosen_logps": "the reference cache", "ref_rejected_logps": "the reference cache",  # columns
        "ld_alpha": "the key of the reference cache",
    }, in_code=True, only="dpo"),
    *_of("trl.trainer.dpo_trainer", "", "training/dpo.py", {
        "prepare_fsdp model accelerator": "an online reference sharded by layer",
        "create_model_from_path model_id": "a cached reference without a second model under FSDP2",
    }, only="dpo"),
    *_of("trl.trainer.dpo_trainer", "", "training/dpo.py", {"hash_module": "skipping TRL's hash of all weights"}, only="dpo"),
    *_of("trl.trainer.base_trainer", "_BaseTrainer", "runs/checkpointing.py", {
        "create_model_card model_name dataset_name tags": "continuing without a checkpoint when the disk is full",
    }),
    *_of("trl.trainer.base_config", "", "config/recipe.py", {"_BaseConfig": "the keys of a recipe"}),
    *_of("trl.trainer.utils", "", "packing/lm_head.py", {
        "_use_triton": "the fast LM head on CPUs", "_ChunkedLogProbFunction": "the fast LM head on CPUs",
    }),
    *_of("torch", "Tensor", "packing/known.py", {"_version": "noticing that a mask was changed in place"}),
    *_of("trl.kernels.chunked_logprob", "", "packing/lm_head.py", {
        "_use_triton device": "the fast LM head on CPUs", "ChunkedLogProbFunction": "the fast LM head on CPUs",
    }),
]  # fmt: skip

ACCELERATE_AND_PEFT = [
    *_of("accelerate.state", "GradientState", "training/trainer.py", {
        "_set_sync_gradients sync_gradients": "gradient all-reduce once per step",
    }),
    *_of("accelerate", "Accelerator", "training/step_metrics.py", {
        "gather tensor": "extremes of rewards over all ranks", "reduce tensor reduction": "metrics of the global batch",
    }),
    *_of("accelerate", "Accelerator", "training/trainer.py", {
        "no_sync model": "gradient all-reduce once per step",
        "reduce tensor reduction": "metrics of the global batch",
    }),
    *_of("accelerate", "Accelerator", "training/deferred.py", {
        "gather tensor": "metrics read once per step", "gather_for_metrics input_data": "metrics read once per step",
    }),
    *_of("accelerate.state", "GradientState", "training/deferred.py", {
        "end_of_dataloader": "metrics without the rows that a last batch repeats", "remainder": "metrics without the rows that a last batch repeats",
    }),
    *_of("accelerate", "Accelerator", "training/trainer.py", {"dataloader_config": "copies to a GPU that the host does not wait for"}, in_code=True),
    *_of("accelerate", "FullyShardedDataParallelPlugin", "training/trainer.py", {
        "mixed_precision_policy": "fp32 gradients and log-probabilities under FSDP2 with bf16",
    }),
    *_of("accelerate.state", "AcceleratorState", "training/trainer.py", {
        "fsdp_plugin": "fp32 gradients and log-probabilities under FSDP2 with bf16",
    }, in_code=True),
    *_of("accelerate.utils.fsdp_utils", "", "models/on_disk.py", {
        name: "loading a model in shards under FSDP2" for name in ("fsdp2_load_full_state_dict accelerator model full_sd", "fsdp2_prepare_model accelerator model", "fsdp2_apply_ac accelerator model")
    }),
    *_of("accelerate", "Accelerator", "training/trainer.py", {"prepare_optimizer optimizer": "training a model that is sharded already"}),
    *_of("accelerate.accelerator", "Accelerator", "training/trainer.py", {"_models": "training a model that is sharded already"}, in_code=True),
    *_of("accelerate", "PartialState", "distributed/processes.py", {"distributed_type": "FSDP2 on CPUs"}, in_code=True),
    *_of("peft.tuners.lora.layer", "Linear", "models/pieces.py", {
        "get_delta_weight adapter": "merging into a 4-bit base", "merge safe_merge adapter_names": "merging adapters",
    }),
    *_of("datasets", "Dataset", "data/sources.py", {"_fingerprint": "knowing a data set again without reading it"}, in_code=True),
    *_of("peft.utils.integrations", "", "models/four_bits.py", {"dequantize_module_weight module": "merging into a 4-bit base"}),
    *_of("peft", "PeftConfig", "packing/backbone.py", {"is_prompt_learning": "refusing to pack virtual tokens"}),
]  # fmt: skip

TORCH_AND_PYTHON = [
    *_of("torch", "ops.aten", "packing/attention.py", {
        "_scaled_dot_product_flash_attention_for_cpu": "packed attention on CPUs",
        "_scaled_dot_product_flash_attention_for_cpu_backward": "packed attention on CPUs",
    }),
    *_of("torch.nn.utils.stateless", "", "models/pieces.py", {
        "_reparametrize_module module parameters_and_buffers": "merging adapters",
    }),
    *_of("torch.nn", "Module", "models/pieces.py", {"_non_persistent_buffers_set": "writing buffers"}, in_code=True),
    *_of("torch.optim.lr_scheduler", "LRScheduler", "runs/portable.py", {
        "_last_lr": "the learning rate of a resumed run", "_step_count": "the learning rate of a resumed run",
    }, in_code=True),
    *_of("torch.distributed.distributed_c10d", "", "distributed/processes.py", {
        "_get_default_store": "waiting for the main rank without a collective's time-out",
    }),
    *_of("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState", "models/on_disk.py", {
        "_lazy_init": "fp32 gradients of LoRA under FSDP2 with bf16",
    }),
    *_of("torch.distributed.fsdp", "FSDPModule", "models/on_disk.py", {"_get_fsdp_state": "fp32 gradients of LoRA under FSDP2 with bf16"}),
    *_of("torch.distributed.tensor._utils", "", "models/on_disk.py", {
        "compute_local_shape_and_global_offset global_shape mesh placements": "loading a model in shards under FSDP2",
    }),
    *_of("torch.distributed.tensor._utils", "", "distributed/ranges.py", {
        "compute_local_shape_and_global_offset global_shape mesh placements": "checkpoints that any engine can read, under FSDP2",
    }),
    *_of("torch.distributed.tensor", "DTensor", "distributed/sharding.py", {"full_tensor": "the unsharded model under FSDP2"}),
    *_of("torch.distributed.fsdp", "MixedPrecisionPolicy", "training/trainer.py", {
        "reduce_dtype": "fp32 gradients under FSDP2 with bf16", "output_dtype": "log-probabilities in fp32 under FSDP2 with bf16",
    }, in_code=True),
    *_of("threading", "", "runs/stop.py", {"_shutdown": "clean exit of one rank of several"}),
    *_of("atexit", "", "runs/stop.py", {"_run_exitfuncs": "clean exit of one rank of several"}),
    *_of("os", "", "runs/stop.py", {"_exit status": "clean exit of one rank of several"}),
]  # fmt: skip

OPTIONAL = [
    *_of("deepspeed.runtime.engine", "DeepSpeedEngine", "runs/checkpointing.py", {
        "_copy_recovery_script save_path": "continuing without a checkpoint when the disk is full",
        "save_checkpoint save_dir tag client_state save_latest": "continuing without a checkpoint when the disk is full",
    }, only="deepspeed"),
    *_of("deepspeed.runtime.engine", "DeepSpeedEngine", "runs/checkpointing.py", {
        "checkpoint_engine": "continuing without a checkpoint when the disk is full",
    }, in_code=True, only="deepspeed"),
    *_of("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3", "runs/trained_state.py", {
        name: "checkpoints that any engine can read, under ZeRO-3"
        for name in ("fp32_partitioned_groups_flat", "grad_position", "swap_optimizer")
    }, in_code=True, only="deepspeed"),
    *_of("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3", "runs/trained_state.py", {
        "get_param_id param": "checkpoints that any engine can read, under ZeRO-3",
    }, only="deepspeed"),
    *_of("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer", "runs/trained_state.py", {
        "_lazy_init_hp_params_optimizer_state": "checkpoints that any engine can read, under ZeRO-1 and 2",
    }, only="deepspeed"),
    *_of("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer", "runs/trained_state.py", {
        name: "checkpoints that any engine can read, under ZeRO-1 and 2"
        for name in ("single_partition_of_fp32_groups", "bit16_groups")
    }, in_code=True, only="deepspeed"),
    *_of("deepspeed.utils.mixed_precision_linkage", "", "runs/trained_state.py", {
        "_hp_mapping": "checkpoints that any engine can read, under ZeRO-1 and 2",
    }, in_code=True, only="deepspeed"),
    *_of("deepspeed.utils.tensor_fragment", "tensor_fragment", "runs/trained_state.py", {
        name: "checkpoints that any engine can read, under ZeRO-1 and 2" for name in ("lp_fragment_address", "hp_fragment_address")
    }, in_code=True, only="deepspeed"),
    *_of("deepspeed.runtime.zero.partition_parameters", "Init", "distributed/sharding.py", {
        "ds_id": "the unsharded model under ZeRO-3", "ds_shape": "the size of an embedding under ZeRO-3",
        "ds_numel": "the number of parameters under ZeRO-3",
    }, in_code=True, only="deepspeed"),
    *_of("deepspeed.runtime.zero.partition_parameters", "Init", "distributed/ranges.py", {
        name: "saving and resuming under ZeRO-3"
        for name in ("ds_tensor", "ds_process_group", "ds_status", "ds_secondary_tensor")
    }, in_code=True, only="deepspeed"),
    *_of("deepspeed.runtime.zero.parameter_offload", "DeepSpeedZeRoOffload", "training/reference.py", {
        name: "training under ZeRO-3 after the reference pass"
        for name in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt")
    }, in_code=True, only="deepspeed"),
    *_of("bitsandbytes.nn.modules", "Linear4bit", "models/loading.py", {
        "support_avx512bf16_for_cpu": "gradients of a 4-bit model on CPUs",
    }, in_code=True, only="bitsandbytes"),
    *_of("bitsandbytes.functional", "", "models/four_bits.py", {
        "get_4bit_type typename device": "4-bit weights under FSDP2",
        "quantize_blockwise A code absmax out blocksize": "4-bit weights under FSDP2",
        "quantize_4bit A absmax out blocksize compress_statistics quant_type": "4-bit weights under FSDP2",
        "dequantize_4bit A quant_state": "merging into a 4-bit base under FSDP2",
    }, only="bitsandbytes"),
    *_of("transformers.quantizers.base", "HfQuantizer", "models/four_bits.py", {
        "preprocess_model model": "4-bit weights under FSDP2", "postprocess_model model": "4-bit weights under FSDP2",
    }, only="bitsandbytes"),
    *_of("transformers.integrations.bitsandbytes", "Bnb4bitQuantize", "models/four_bits.py", {
        "source_cls": "4-bit weights of GPT-2 under FSDP2",
    }, in_code=True, only="bitsandbytes"),
    *_of("bitsandbytes.nn.modules", "Params4bit", "distributed/sharding.py", {
        "quant_state": "the number of weights of a 4-bit model",
    }, in_code=True, only="bitsandbytes"),
]  # fmt: skip

NAMES = (*TRANSFORMERS, *TRL, *ACCELERATE_AND_PEFT, *TORCH_AND_PYTHON, *OPTIONAL)


def check_upstream(stage: str, quantised: bool = False) -> None:
    """Stop unless the installed libraries have every name that this stage relies on (before a model loads, on all ranks).

    Args:
        stage: `sft`, `reward` or `dpo`.
        quantised: bitsandbytes is used.

    Raises:
        UserError: the first name that is missing or has other parameters, and what to install.
    """
    used = {"", stage}
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        used.add("deepspeed")
    if quantised:
        used.add("bitsandbytes")
    problems = [(name, found) for name in NAMES if name.only in used and (found := what_is_wrong(name))]
    if problems:
        name, found = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        verified = VERIFIED[name.package]
        raise UserError(
            f"{name.package} {version_of(name.package)} {found} ({name.lost}, {name.used_by}){more}; this version of rlhf-dpo was "
            f"verified with {name.package} {verified}; install {'one of these' if ' to ' in verified else 'that'}"
        )


def what_is_wrong(name: Name) -> str:
    """`has no Trainer._get_grad_norm`, or its new parameters; '' if nothing is wrong."""
    owner_path, _, last = name.path.rpartition(".")
    try:
        owner = functools.reduce(getattr, filter(None, owner_path.split(".")), importlib.import_module(name.module))
        if name.in_code:
            return "" if last in words_of(owner) else f"has no {name.path}"
        found = getattr(owner, last)
    except ModuleNotFoundError as error:
        return f"has no {error.name}"
    except AttributeError:
        return f"has no {name.path}"
    if name.parameters:
        parameters = [p for p in inspect.signature(found).parameters if p != "self"]
        if tuple(parameters[: len(name.parameters)]) != name.parameters:
            return f"has {name.path}({', '.join(parameters)}), expected ({', '.join(name.parameters)})"
    return ""


def version_of(package: str) -> str:
    """The installed version."""
    return platform.python_version() if package == "Python" else importlib.metadata.version(package)


def words_of(owner: Any) -> set[str]:
    """Attributes and strings used in the code of a class's functions, and its own attributes."""
    words = set(vars(owner)) | set(getattr(owner, "__annotations__", ()))
    for value in vars(owner).values():
        functions: tuple[Any, ...] = (value.fget, value.fset) if isinstance(value, property) else (value,)
        for function in functions:
            if (code := getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)) is not None:
                words |= _words(code)
    return words


def _words(code: CodeType) -> set[str]:
    words = set(code.co_names)
    for constant in code.co_consts:
        words |= _words(constant) if isinstance(constant, CodeType) else _strings(constant)
    return words


def _strings(constant: Any) -> set[str]:
    items = constant if isinstance(constant, (tuple, frozenset)) else (constant,)
    return {item for item in items if isinstance(item, str)}
