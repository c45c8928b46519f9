"""Keys of our own: what a recipe may set beyond TRL's and transformers' arguments."""

from __future__ import annotations

from dataclasses import dataclass, field

STAGES = ("sft", "reward", "dpo", "evaluate")
TRAINING_STAGES = ("sft", "reward", "dpo")


@dataclass(frozen=True)
class StageConfig:
    """What SFT, reward and DPO recipes need beyond TRL's classes."""

    stage: str = field(default="", metadata={"choices": list(STAGES), "help": "Which stage this recipe is for."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, directory, or .jsonl/.json/.csv/.parquet file, or embedded:sample."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Held-out split of the same data set."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out data from another place."})
    heldout: float | None = field(
        default=None,
        metadata={
            "help": "A part of the data that no stage trains on, chosen by the prompt alone: a share (0.05) or a count of prompts (200). "
            "Every stage and evaluation of the same data that says the same holds out the same prompts."
        },
    )
    chosen_dataset_name: str | None = field(
        default=None, metadata={"help": "Accepted answers (prompt, response), joined by prompt with the rejected ones."}
    )
    rejected_dataset_name: str | None = field(default=None, metadata={"help": "Rejected answers (prompt, response)."})
    bad_rows: str = field(
        default="error",
        metadata={
            "choices": ["error", "skip"],
            "help": "A row that can't be used ends the run (error), or is left out, counted and named (skip).",
        },
    )
    max_train_examples: int | None = field(default=None, metadata={"help": "Use only the first N training rows."})
    max_eval_examples: int | None = field(default=None, metadata={"help": "Use only the first N held-out rows."})
    chat_template: str | None = field(
        default=None,
        metadata={"help": "alpaca, chatml or a .jinja file; default: the model's own, alpaca where it has none."},
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "Compute on one row without padding, in which a pair shares its prompt (same numbers, faster)."
        },
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples an optimizer step, over all processes; replaces per_device_train_batch_size and "
            "gradient_accumulation_steps. The same steps on any number of processes."
        },
    )
    max_tokens_per_device: int = field(
        default=4096, metadata={"help": "With global_batch_size: packed tokens a process computes at a time at most."}
    )
    reference: str = field(
        default="cached",
        metadata={
            "choices": ["cached", "online", "nf4"],
            "help": "DPO: the policy's log-probabilities before its first update, computed once and kept on disk "
            "(cached); the reference's pass in every step (online); or that of a second model in 4 bits (nf4).",
        },
    )
    reference_model: str | None = field(
        default=None,
        metadata={"help": "DPO with `reference: nf4`: another model than the policy before its first update."},
    )
    max_reference_bias_nats: float = field(
        default=1.0,
        metadata={
            "help": "DPO with `reference: nf4`: stop if quantising moves an answer's log-probability by more on average."
        },
    )
    reference_cache: str | None = field(
        default=None,
        metadata={"help": "DPO: folder for cached reference log-probabilities; default: the user's cache."},
    )
    max_gradient_spike: float = field(
        default=1000.0,
        metadata={"help": "End a run whose gradient norm is more than so many times its median of late; 0: never."},
    )
    watchdog_minutes: float = field(
        default=30.0,
        metadata={"help": "End a run whose step hangs for so long, with the stacks of all processes; 0: never."},
    )
    portable_checkpoints: bool | None = field(
        default=None,
        metadata={
            "help": "Save the training state in one piece, not as DeepSpeed or FSDP splits it, so that the run can go on under "
            "any launch file; default: with LoRA."
        },
    )
    continue_adapter: bool = field(
        default=True,
        metadata={"help": "The input model is a LoRA adapter: train it further (true) or merge it first (false)."},
    )
    merge_adapter: bool | None = field(
        default=None,
        metadata={"help": "Write the finished model merged (true) or as an adapter; default: merged unless 4/8-bit."},
    )


@dataclass(frozen=True)
class EvaluateConfig:
    """Keys of an evaluate recipe."""

    stage: str = field(default="", metadata={"choices": list(STAGES)})
    base_model: str | None = field(default=None, metadata={"help": "The model before SFT."})
    sft_model: str | None = field(default=None, metadata={"help": "Output of the sft stage."})
    reward_model: str | None = field(default=None, metadata={"help": "Output of the reward stage."})
    dpo_model: str | None = field(default=None, metadata={"help": "Output of the dpo stage."})
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str | None = field(
        default=None, metadata={"help": "Split that `heldout` is taken from; default: train, or all of a file."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; default: test, or all of a file."}
    )
    heldout: float | None = field(
        default=None,
        metadata={
            "help": "A part of the data that no stage trains on, chosen by the prompt alone: a share (0.05) or a count of prompts (200). "
            "Every stage and evaluation of the same data that says the same holds out the same prompts."
        },
    )
    bad_rows: str = field(default="error", metadata={"choices": ["error", "skip"]})
    max_eval_examples: int | None = None
    output_dir: str | None = None
    max_new_tokens: int = 96
    max_length: int = 1024
    num_shown: int = field(default=3, metadata={"help": "Prompts answered side by side by base, SFT and DPO."})
    batch_size: int = field(default=16, metadata={"help": "Prompts generated, or pairs scored, at a time."})
    dtype: str = field(default="float32", metadata={"choices": ["float32", "bfloat16", "float16"]})
    use_cpu: bool = False
    seed: int = 42
