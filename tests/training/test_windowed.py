"""A model with a sliding window in a run and in `pack`: it matters whether a row is longer, not that there is a window."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from rlhf.__main__ import main
from rlhf.api import pack
from rlhf.packing import packing_mode

STAGES = ("sft", "reward", "dpo")


@pytest.fixture
def mistral(tiny_llama, tmp_path):
    """A tiny Mistral whose layers have a window of so many tokens."""

    def make(window):
        folder = tmp_path / f"mistral-{window}"
        shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "gener*"))
        torch.manual_seed(0)
        MistralForCausalLM(MistralConfig(
            vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=1024, sliding_window=window, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
        )).save_pretrained(folder)  # fmt: skip
        return str(folder)

    return make


@pytest.fixture
def longest(few_pairs, tiny_llama):
    """Tokens of the longest row of each stage, counted here: SFT has chosen answers only."""
    tokenizer, found = AutoTokenizer.from_pretrained(tiny_llama), {}
    rows = [json.loads(line) for line in Path(few_pairs).read_text().splitlines()]
    for stage, sides in {"sft": ["chosen"], "reward": ["chosen", "rejected"], "dpo": ["chosen", "rejected"]}.items():
        turns = [_turns(row["prompt"], "user") + _turns(row[side], "assistant") for row in rows for side in sides]
        found[stage] = max(len(tokenizer.apply_chat_template(turn, return_dict=False)) for turn in turns)
    return found


def _turns(text, role):
    return text if isinstance(text, list) else [{"role": role, "content": text}]


@pytest.mark.parametrize("stage, max_length", [("sft", 512), ("reward", 512), ("dpo", 512), ("dpo", None)])
def test_a_run_goes_by_its_longest_row(stage, max_length, mistral, longest, recipe, few_pairs, tmp_path, capsys):
    """max_length is 512 or 1024 (all positions), and no row comes near: the window is judged by the rows."""
    for window, note in (
        (longest[stage], ""),
        (longest[stage] - 1, f"note: batches are padded, not packed: its attention has a sliding window of {longest[stage] - 1} tokens, "
         f"and rows may have {longest[stage]}; set `max_length: {longest[stage] - 1}` or less to pack them"),
    ):  # fmt: skip
        file = recipe(stage, model_name_or_path=mistral(window), dataset_name=few_pairs, output_dir=str(tmp_path / f"{window}"),
                      max_steps=1, max_length=max_length)  # fmt: skip
        assert main([stage, file]) == 0
        shown = capsys.readouterr().out
        assert note in shown if note else "batches are padded" not in shown


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_max_length_makes_it_fit(stage, mistral, longest, recipe, few_pairs, tmp_path, capsys):
    window = longest[stage] - 1
    file = recipe(stage, model_name_or_path=mistral(window), dataset_name=few_pairs, output_dir=str(tmp_path / "out"), max_steps=1, max_length=window)  # fmt: skip
    assert main([stage, file]) == 0
    assert "batches are padded" not in capsys.readouterr().out


def test_the_check_counts_what_the_start_will(mistral, longest, recipe, few_pairs, tmp_path, capsys):
    """A pair takes more tokens padded than packed: beyond the window the limit of a device is compared with the padded ones."""
    most = longest["dpo"] * 2 - 1
    for window, code in ((longest["dpo"], 0), (longest["dpo"] - 1, 2)):
        file = recipe("dpo", model_name_or_path=mistral(window), dataset_name=few_pairs, output_dir=str(tmp_path / f"{window}"),
                      max_length=512, global_batch_size=4, max_tokens_per_device=most)  # fmt: skip
        text = Path(file).read_text()
        Path(file).write_text("".join(line for line in text.splitlines(True) if not line.startswith("per_device")))
        assert main(["dpo", file, "--check"]) == code
        assert code == 0 or f"takes {most + 1} tokens" in capsys.readouterr().err


CLASSES = {"dpo": (DPOTrainer, DPOConfig), "reward": (RewardTrainer, RewardConfig), "sft": (SFTTrainer, SFTConfig)}


def plain_trainer(stage, model, data, folder):
    trainer_class, config = CLASSES[stage]
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} if stage == "sft" else {k: r[k] for k in ("prompt", "chosen", "rejected")} for r in rows]  # fmt: skip
    reward = stage == "reward"
    auto, more = (AutoModelForSequenceClassification, {"num_labels": 1}) if reward else (AutoModelForCausalLM, {})
    return trainer_class(
        model=auto.from_pretrained(model, dtype=torch.float32, **more), processing_class=AutoTokenizer.from_pretrained(model),
        args=config(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", max_length=512, max_steps=1),
        train_dataset=Dataset.from_list(rows),
    )  # fmt: skip


def longest_of(trainer):
    sides = (
        ("input_ids",),
        ("prompt_ids", "chosen_ids"),
        ("prompt_ids", "rejected_ids"),
        ("chosen_ids",),
        ("rejected_ids",),
    )
    return max(sum(len(row.get(name, [])) for name in side) for row in trainer.train_dataset for side in sides)


@pytest.mark.parametrize("stage", STAGES)
def test_pack_goes_by_the_trainers_rows(stage, mistral, few_pairs, tmp_path):
    most = longest_of(plain_trainer(stage, mistral(900), few_pairs, tmp_path / "run"))
    assert most < 512  # max_length
    fits = plain_trainer(stage, mistral(most), few_pairs, tmp_path / "run")
    assert pack(fits) is None and packing_mode(fits.model) is not None
    model = mistral(most - 1)
    exceeds = plain_trainer(stage, model, few_pairs, tmp_path / "run")
    assert f"a sliding window of {most - 1} tokens, and rows may have {most}; set `max_length: {most - 1}`" in pack(
        exceeds
    )
    assert packing_mode(exceeds.model) is None
    unknown = plain_trainer(stage, model, few_pairs, tmp_path / "run")
    unknown.train_dataset = unknown.train_dataset.to_iterable_dataset()
    assert f"a sliding window of {most - 1} tokens, and rows may have 512;" in pack(unknown)
