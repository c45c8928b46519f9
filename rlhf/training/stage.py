"""The types of a run: Stage (SFT, reward model, DPO) and Plan (all decisions of one run)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from rlhf.config.recipe import Recipe
from rlhf.config.stage_config import StageConfig
from rlhf.data.reading import Reading
from rlhf.data.rows import StageData
from rlhf.data.sources import Source
from rlhf.distributed.topology import Topology
from rlhf.runs.stop import Stopper

if TYPE_CHECKING:  # imported where it is used: it takes seconds
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import DPOConfig, ModelConfig, RewardConfig, SFTConfig

    from rlhf.runs.checkpointing import CheckpointMixin

    TrainingConfig: TypeAlias = SFTConfig | RewardConfig | DPOConfig


@dataclass(frozen=True)
class Plan:
    """All decisions made before weights load, once, by `make_plan`; nothing writes to it later.

    Attributes:
        recipe: for file and line in messages; its values are in the fields below.
        args: TRL's config of the stage.
        model_args: TRL's ModelConfig: dtype, quantisation, LoRA, attention.
        stage_args: this project's own keys: data, packing, global batch, reference, checkpoints.
        topology: the engine and processes that the launch file sets up.
        data: the canonical rows.
        model_name: the located input model: a local folder, or a hub id.
        model_commit: the commit of a model from the hub.
        reference: where DPO's reference log-probabilities come from.
        continues_adapter: the input model is an adapter that is trained further.
        merge: the finished model is written merged.
        merged_start: where the adapter that the run starts from is merged into its base; None if it starts from no adapter,
            or trains it further.
        packing_mode: how batches are packed if the model supports it (packing/layout.py): rows, or pairs that share a
            prompt; None: padded.
    """

    recipe: Recipe
    args: TrainingConfig
    model_args: ModelConfig
    stage_args: StageConfig
    topology: Topology
    data: StageData
    model_name: str
    model_commit: str | None
    reference: Literal["cached", "online", "nf4"]
    continues_adapter: bool
    merge: bool
    merged_start: Path | None
    packing_mode: Literal["pairs", "rows"] | None


class Loaded(NamedTuple):
    """The model to train.

    Attributes:
        model: with its adapter, if that is trained further.
        peft_config: of the adapter to add; None for full fine-tuning or if `model` already has one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    peft_config: PeftConfig | None


@dataclass(frozen=True)
class Stage:
    """How a stage differs from the others.

    Attributes:
        name: `sft`, `reward` or `dpo`.
        title: its name on the screen.
        to_rows: converts a Source to canonical rows; fills the Reading.
        load: loads the model to train.
        build: builds TRL's trainer; the Stopper can interrupt long work before training (the reference).
        probe: a few rows of token ids from the trainer's tokenised training set.
        packing_mode: how its batches are packed.
        check: rejects unsupported settings before the model loads.
    """

    name: str
    title: str
    to_rows: Callable[[Source, Reading], list[dict[str, Any]]]
    load: Callable[[Plan], Loaded]
    build: Callable[[Plan, Stopper | None], CheckpointMixin]
    probe: Callable[[Dataset], list[list[int]]]
    packing_mode: Literal["pairs", "rows"]
    check: Callable[[Plan], None] = lambda plan: None
