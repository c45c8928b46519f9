"""Our own recipe keys, beyond TRL's and transformers' arguments."""

from __future__ import annotations

from dataclasses import dataclass, field

STAGES = ("sft", "reward", "dpo", "evaluate")
TRAINING_STAGES = ("sft", "reward", "dpo")
# How rows can be read; rlhf/data/format_table.py has their conversions.
FORMATS = (
    "messages", "sharegpt", "prompt-completion", "text", "pairs", "plain", "openai-preference", "alpaca-comparison", "stack-exchange-paired",
    "pku-saferlhf-better", "pku-saferlhf-safer", "shp", "helpsteer2-preference", "helpsteer3", "webgpt",
    "summarize-from-feedback", "chatbot-arena", "nectar", "ultrafeedback", "ultrafeedback-overall", "scored-list", "kto",
    "helpsteer2",
)  # fmt: skip
_FORMAT = {"choices": list(FORMATS), "help": "How rows are read; default: recognised by their content."}
_COLUMNS = {
    "help": "Columns of the file under other names: `{prompt: question, chosen: answers.good}`; a dot enters a mapping. "
    "`{margin: scores}` takes the difference of the answers' scores as margin."
}
_ROLES = {"help": "Roles of messages under other names: `{customer: user, agent: assistant}`."}
# What `columns` may name: the columns that some format reads.
COLUMN_NAMES = frozenset(
    "prompt question instruction input query context history system system_prompt chosen rejected completion response output "
    "answer messages conversations conversation text tools chat_template_kwargs margin label kto_tag train "
    "response_0 response_1 better_response_id safer_response_id response_j response_k human_ref_A human_ref_B labels score_A "
    "score_B response_1 response_2 preference_strength response1 response2 overall_preference preferred_output "
    "non_preferred_output answer_0 answer_1 score_0 score_1 info summaries choice conversation_a conversation_b winner "
    "completions responses generations answers candidates outputs scores ratings rating rewards ranks rankings helpfulness "
    "chosen_response rejected_response context_messages score_chosen score_rejected".split()
)
CHAT_ROLES = ("system", "developer", "user", "assistant", "tool")  # of messages, as chat templates know them


@dataclass(frozen=True)
class StageConfig:
    """Keys of SFT, reward and DPO recipes beyond those of TRL's classes."""

    stage: str = field(default="", metadata={"choices": list(STAGES), "help": "Which stage this recipe is for."})
    dataset_name: str | list[str | dict] | None = field(
        default=None,
        metadata={
            "help": "Hub id, directory, or .jsonl/.json/.csv/.parquet file, embedded:sample or embedded:judge; or a list of them to be mixed, "
            "each a name or a mapping of `name` and an amount (fraction, rows, epochs or weight)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Held-out split of the same dataset."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out data from another source."})
    heldout: float | None = field(
        default=None,
        metadata={
            "help": "Hold out a part of the data, selected by prompt: a fraction (0.05) or a number of prompts (200). "
            "Every stage and evaluation with the same value and data holds out the same prompts."
        },
    )
    chosen_dataset_name: str | None = field(
        default=None, metadata={"help": "Chosen answers (prompt, response), joined with the rejected ones by prompt."}
    )
    rejected_dataset_name: str | None = field(default=None, metadata={"help": "Rejected answers (prompt, response)."})
    format: str | None = field(default=None, metadata=_FORMAT)
    columns: dict | str | None = field(default=None, metadata=_COLUMNS)
    roles: dict | str | None = field(default=None, metadata=_ROLES)
    bad_rows: str = field(
        default="error",
        metadata={
            "choices": ["error", "skip"],
            "help": "Abort on an unusable row (error), or skip, count and list such rows (skip).",
        },
    )
    max_train_examples: int | None = field(default=None, metadata={"help": "Use only the first N training rows."})
    max_eval_examples: int | None = field(default=None, metadata={"help": "Use only the first N held-out rows."})
    too_long: str | None = field(
        default=None,
        metadata={
            "choices": ["error", "drop", "truncate"],
            "help": "A row beyond max_length: abort (error), leave it out (drop), or cut it (truncate, as truncation_mode "
            "says); default: sft and dpo truncate, and drop what would have no answer left; reward drops.",
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "alpaca, chatml, plain (texts as they are) or a .jinja file; default: the model's own, or alpaca if it has none."
        },
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "Pack each micro-batch into one row without padding; a pair shares its prompt (equal results)."
        },
    )
    experts_implementation: str | None = field(
        default=None,
        metadata={
            "choices": ["eager", "batched_mm", "grouped_mm"],
            "help": "How a mixture of experts is computed: expert by expert (eager), or all experts in one batched or grouped "
            "product; default: transformers' choice. The same results to rounding, packed or padded.",
        },
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples per optimizer step, over all ranks; replaces per_device_train_batch_size and "
            "gradient_accumulation_steps. The same steps at any world size."
        },
    )
    max_tokens_per_device: int = field(
        default=4096,
        metadata={"help": "Maximum packed tokens per micro-batch on one device (needs global_batch_size)."},
    )
    reference: str = field(
        default="cached",
        metadata={
            "choices": ["cached", "online", "nf4"],
            "help": "DPO: log-probabilities of the policy before its first update, computed once and cached on disk "
            "(cached); a reference pass in every step (online); or one of a separate model in 4-bit NF4 (nf4).",
        },
    )
    reference_model: str | None = field(
        default=None,
        metadata={
            "help": "DPO with `reference: cached` (in full precision) or `nf4`: a reference model other than the policy before "
            "its first update."
        },
    )
    max_reference_bias_nats: float = field(
        default=1.0,
        metadata={
            "help": "DPO with `reference: nf4`: abort if quantisation shifts log-probabilities by more than this per answer (mean)."
        },
    )
    reference_cache: str | None = field(
        default=None,
        metadata={"help": "DPO: folder for cached reference log-probabilities; default: the user's cache."},
    )
    max_gradient_spike: float = field(
        default=1000.0,
        metadata={
            "help": "Abort if the gradient norm exceeds this multiple of its recent median; 0 disables the check."
        },
    )
    watchdog_minutes: float = field(
        default=30.0,
        metadata={"help": "Abort and dump all stack traces if a step takes longer than this many minutes; 0 disables."},
    )
    portable_checkpoints: bool = field(
        default=True,
        metadata={
            "help": "Save the training state so that the run can resume under any launch file and world size; false: as "
            "DeepSpeed or FSDP saves it itself, for the same one only."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this many evaluations in a row without a better metric_for_best_model (by default the held-out "
            "accuracy, in SFT the held-out loss); with load_best_model_at_end the best checkpoint is what is written."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0,
        metadata={"help": "Early stopping: an evaluation counts as better only if it is better by more than this."},
    )
    continue_adapter: bool = field(
        default=True,
        metadata={"help": "If the input model is a LoRA adapter: train it further (true) or merge it first (false)."},
    )
    merge_adapter: bool | None = field(
        default=None,
        metadata={"help": "Save the finished model merged (true) or as an adapter; default: merged unless 4/8-bit."},
    )


@dataclass(frozen=True)
class RoundsConfig:
    """Keys of rounds.yaml: DPO in rounds, on the last policy's answers as the reward model labels them."""

    stage: str = field(default="", metadata={"choices": ["rounds"]})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the rounds; default: `rounds` beside the output_dir of dpo.yaml."}
    )
    num_rounds: int = field(
        default=3, metadata={"help": "Rounds at most; the first is dpo.yaml itself, on its own pairs."}
    )
    min_gain: float = field(
        default=0.0,
        metadata={
            "help": "Stop after a round that raises the held-out win rate by no more than this (0.01: one point)."
        },
    )
    start_from: str = field(
        default="last",
        metadata={
            "choices": ["last", "start"],
            "help": "What DPO of a round starts from: the policy of the round before (last), or the model that dpo.yaml "
            "starts from (start).",
        },
    )
    reference: str = field(
        default="start",
        metadata={
            "choices": ["start", "last"],
            "help": "The reference of a round: the model that dpo.yaml starts from, as a rule the SFT model (start), or the "
            "policy of the round before (last). Exact and cached: it takes no memory while DPO trains.",
        },
    )
    reward_model: str | None = field(
        default=None,
        metadata={"help": "Which labels the answers; default: the output of reward.yaml, or evaluate.yaml's."},
    )
    max_prompts: int | None = field(default=None, metadata={"help": "Answer only the first N of the training prompts."})
    num_answers: int = field(
        default=4, metadata={"help": "Answers to each prompt; DPO gets the best and the worst of them."}
    )
    min_margin: float = field(default=0.0, metadata={"help": "Leave out pairs whose scores are closer than this."})
    temperature: float = field(default=1.0, metadata={"help": "Of the answers."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the most likely tokens with this total probability."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Of an answer; one that is cut there makes no pair."})
    keep_cut: bool = field(
        default=False, metadata={"help": "Also take answers that were cut, which teach to end in the middle."}
    )
    batch_size: int = field(default=16, metadata={"help": "Answers generated at a time."})
    seed: int = field(default=0, metadata={"help": "Of the answers; each round adds its number."})


@dataclass(frozen=True)
class EvaluateConfig:
    """Keys of an evaluate recipe."""

    stage: str = field(default="", metadata={"choices": list(STAGES)})
    base_model: str | None = field(default=None, metadata={"help": "The model before SFT."})
    sft_model: str | None = field(default=None, metadata={"help": "Output of the sft stage."})
    reward_model: str | None = field(default=None, metadata={"help": "Output of the reward stage."})
    dpo_model: str | None = field(default=None, metadata={"help": "Output of the dpo stage."})
    models: list[str] | dict | None = field(
        default=None,
        metadata={
            "help": "Any policies to compare: a list of folders or hub names, or `label: model` for each; beside base_model, "
            "sft_model and dpo_model."
        },
    )
    judge: list[str | dict] | dict | None = field(
        default=None,
        metadata={
            "help": "Who compares the answers, beside reward_model: a reward model, an OpenAI-compatible endpoint (`{endpoint: "
            "http://localhost:8000/v1, model: NAME, api_key_env: VARIABLE}`), or a list of them: docs/evaluation.md."
        },
    )
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "Label of the policy that the others are compared with; default: sft, or the first of `models`."
        },
    )
    kl_prompts: int = field(
        default=64,
        metadata={
            "help": "Estimate each policy's KL divergence from the baseline on one sampled answer to each of the first N "
            "prompts; 0: don't."
        },
    )
    export: list[str] | None = field(
        default=None,
        metadata={
            "choices": ["alpaca_eval", "arena_hard"],
            "help": "Also write the answers in the formats of AlpacaEval and Arena-Hard.",
        },
    )
    dataset_name: str | list[str | dict] | None = None
    dataset_config: str | None = None
    dataset_train_split: str | None = field(
        default=None, metadata={"help": "Split that `heldout` takes from; default: train, or the entire file."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; default: test, or the entire file."}
    )
    heldout: float | None = field(
        default=None,
        metadata={
            "help": "Hold out a part of the data, selected by prompt: a fraction (0.05) or a number of prompts (200). "
            "Every stage and evaluation with the same value and data holds out the same prompts."
        },
    )
    format: str | None = field(default=None, metadata=_FORMAT)
    columns: dict | str | None = field(default=None, metadata=_COLUMNS)
    roles: dict | str | None = field(default=None, metadata=_ROLES)
    bad_rows: str = field(default="error", metadata={"choices": ["error", "skip"]})
    max_eval_examples: int | None = None
    output_dir: str | None = None
    max_new_tokens: int = 96
    max_length: int = 1024
    num_shown: int = field(
        default=3, metadata={"help": "Number of prompts with answers of base, SFT and DPO side by side."}
    )
    batch_size: int = field(default=16, metadata={"help": "Prompts per generated batch."})
    reward_benchmarks: list[str] | None = field(
        default=None,
        metadata={
            "help": "RewardBench 1 or 2 for the reward model: files, folders or hub ids, recognised by their columns; the "
            "published scoring."
        },
    )
    benchmarks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tasks of lm-evaluation-harness (ifeval, gsm8k, ...) for each policy, with paired differences; needs the "
            "extra `benchmarks`."
        },
    )
    benchmark_limit: int | None = field(
        default=None, metadata={"help": "Only the first N items of each task of `benchmarks`: for a trial."}
    )
    benchmark_tasks: str | None = field(
        default=None, metadata={"help": "Folder with task files (YAML) of one's own, which `benchmarks` may name."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "choices": ["float32", "bfloat16", "float16"],
            "help": "What the models are loaded in; default: their checkpoints' dtype on a GPU, float32 on a CPU.",
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Quantise the models (an adapter's base) to 4 bits: as in training for the output of a QLoRA run, else NF4."
        },
    )
    use_cpu: bool = False
    seed: int = 42


OWN_KEYS = {"evaluate": EvaluateConfig, "rounds": RoundsConfig}  # stages whose recipes have no key of a library
