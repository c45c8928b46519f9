"""One global batch a step: the same numbers whatever a process may hold at a time, and the same as TRL's own batches."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf.__main__ import main
from rlhf.config.recipe import load_recipe
from rlhf.distributed.topology import topology_of_environment
from rlhf.models.tokenizer import load_tokenizer, tokenize_pair
from rlhf.runs.metrics import read_metrics
from rlhf.training import run
from rlhf.training.plan import make_plan
from rlhf.training.reward import REWARD
from rlhf.training.sft import SFT
from rlhf.training.tokenise import count_tokens

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "all-linear"}
OF_THE_SPLIT = {"time", "imbalance", "micro_batches", "padding"}
NOT_A_RESULT = ("runtime", "per_second", "flos", "eval_runtime")


def train(recipe, stage, tmp_path, name, model, data, **values):
    """(metrics a step, weights)"""
    out = tmp_path / name
    values = {"per_device_train_batch_size": None, "max_steps": 4} | values
    file = recipe(stage, name=name, model_name_or_path=model, dataset_name=data, output_dir=str(out), **LORA | values)
    text = [line for line in Path(file).read_text().splitlines(keepends=True) if not line.endswith(" null\n")]
    Path(file).write_text("".join(text))
    assert main([stage, file]) == 0
    rows = [{k: v for k, v in row.items() if k not in OF_THE_SPLIT and not any(w in k for w in NOT_A_RESULT)} for row in read_metrics(out)]  # fmt: skip
    return rows, load_file(out / "model.safetensors")


def assert_equal(one, other):
    assert len(one[0]) == len(other[0]) >= 4
    for want, found in zip(one[0], other[0], strict=True):
        assert want.keys() == found.keys()
        for name in want:
            if name == "rewards/accuracies" and want["step"] == 1:
                continue  # the policy is its reference: margins of 0, to rounding
            absolute = 1e-5 if "rewards" in name else 5e-6
            assert found[name] == pytest.approx(want[name], rel=1e-5, abs=absolute), (name, want["step"])
    for name in one[1]:
        torch.testing.assert_close(other[1][name], one[1][name], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_the_split_changes_no_number(stage, recipe, tiny_llama, few_pairs, tmp_path, capsys):
    """12 rows, 5 a step: 5 + 5 + 2, and the first of a second epoch; in one piece and in many."""
    heldout = dict(eval_dataset_name="embedded:sample", dataset_test_split="heldout", max_eval_examples=7,
                   eval_strategy="steps", eval_steps=2)  # fmt: skip
    runs = [
        train(recipe, stage, tmp_path, f"{tokens}", tiny_llama, few_pairs, global_batch_size=5, max_tokens_per_device=tokens, **heldout)
        for tokens in (100_000, 520)
    ]  # fmt: skip
    pieces = [
        [row["micro_batches"] for row in read_metrics(tmp_path / f"{tokens}") if "micro_batches" in row]
        for tokens in (100_000, 520)
    ]
    assert set(pieces[0]) == {1} and max(pieces[1]) > 1
    assert_equal(*runs)
    assert any("eval_loss" in row for row in runs[0][0]) and len({row["loss"] for row in runs[0][0] if "loss" in row}) == 4  # fmt: skip
    assert "of 5 examples (1 process on cpu)" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_padded_models_too(stage, recipe, tiny_llama, few_pairs, tmp_path):
    runs = [
        train(recipe, stage, tmp_path, f"{tokens}", tiny_llama, few_pairs, global_batch_size=5, packing=packing, max_tokens_per_device=tokens)
        for tokens, packing in ((100_000, True), (1200, False))
    ]  # fmt: skip
    assert_equal(*runs)
    packed, padded = (
        [row["padding"] for row in read_metrics(tmp_path / str(n)) if "padding" in row] for n in (100_000, 1200)
    )
    assert set(packed) == {0.0} and all(0 <= share < 0.9 for share in padded) and max(padded) > 0.05


def test_padding_by_hand(recipe, tiny_llama, few_pairs, tmp_path):
    """All rows in one padded batch: 1 - tokens / (rows x longest)."""
    train(recipe, "reward", tmp_path, "all", tiny_llama, few_pairs, global_batch_size=12, packing=False, max_tokens_per_device=100_000)  # fmt: skip
    tokenizer = load_tokenizer(tiny_llama)
    pairs = [tokenize_pair(tokenizer, json.loads(line)) for line in Path(few_pairs).read_text().splitlines()]
    lengths = [len(p["prompt_ids"]) + len(p[side]) for p in pairs for side in ("chosen_ids", "rejected_ids")]
    kept = [n for pair in zip(lengths[::2], lengths[1::2], strict=True) if max(pair) <= 256 for n in pair]
    found = [row["padding"] for row in read_metrics(tmp_path / "all") if "padding" in row]
    assert found[0] == pytest.approx(1 - sum(kept) / (len(kept) * max(kept)))


def test_a_run_goes_on_in_the_middle_of_an_epoch(recipe, tiny_llama, few_pairs, tmp_path, monkeypatch):
    """Stopped after step 4 (the first of the second epoch), gone on to 6: as if nothing had been."""
    from transformers import TrainerCallback

    from rlhf.training import run

    values = dict(global_batch_size=5, max_tokens_per_device=520, max_steps=6, save_strategy="steps", save_steps=1)
    whole = train(recipe, "dpo", tmp_path, "whole", tiny_llama, few_pairs, **values)
    add_callbacks = run.add_callbacks

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(run, "add_callbacks", lambda t, *a: (add_callbacks(t, *a), t.add_callback(Stop()))[0])
    with pytest.raises(AssertionError, match="130"):  # the exit code of Ctrl-C
        train(recipe, "dpo", tmp_path, "stopped", tiny_llama, few_pairs, **values)
    monkeypatch.setattr(run, "add_callbacks", add_callbacks)
    assert main(["dpo", str(tmp_path / "stopped.yaml")]) == 0
    kept = [row for row in read_metrics(tmp_path / "stopped") if "loss" in row]
    want = [row for row in whole[0] if "loss" in row]
    assert [row["step"] for row in kept] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in kept] == [row["loss"] for row in want]
    again = load_file(tmp_path / "stopped" / "model.safetensors")
    assert all(torch.equal(again[name], whole[1][name]) for name in again)


def test_equals_trls_own_batches(recipe, tiny_llama, few_pairs, tmp_path):
    """12 rows in one step: no order, no split, so TRL's loss, gradient norm and metrics."""
    ours = train(
        recipe, "dpo", tmp_path, "ours", tiny_llama, few_pairs, global_batch_size=12, max_tokens_per_device=900
    )
    theirs = train(recipe, "dpo", tmp_path, "theirs", tiny_llama, few_pairs, per_device_train_batch_size=12, packing=False)  # fmt: skip
    assert_equal(theirs, ours)


def test_the_smaller_last_batch_is_a_mean_too(recipe, tiny_llama, few_pairs, tmp_path):
    """5 + 5 + 2 pairs, and a learning rate that changes nothing: DPO's loss is ln 2 in each step, also that of the two."""
    values = dict(global_batch_size=5, max_tokens_per_device=900, max_steps=3, learning_rate=1e-12)
    file = Path(recipe("dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "o"), **LORA | values))  # fmt: skip
    file.write_text("".join(x for x in file.read_text().splitlines(True) if "per_device_train" not in x))
    assert main(["dpo", str(file)]) == 0
    losses = [row["loss"] for row in read_metrics(tmp_path / "o") if "loss" in row]
    assert losses == pytest.approx([math.log(2)] * 3, abs=1e-5)


class OneOf:
    """An accelerator that takes itself for one process of several."""

    def __init__(self, accelerator, process_index, num_processes):
        self.accelerator, self.process_index, self.num_processes = accelerator, process_index, num_processes

    def __getattr__(self, name):
        return getattr(self.accelerator, name)


@pytest.mark.parametrize("stage", [SFT, REWARD], ids=["sft", "reward"])
def test_every_world_size_takes_the_same_examples(stage, recipe, tiny_llama, few_pairs, tmp_path):
    """12 rows, 5 a step, so 5 + 5 + 2: of 3 processes one has nothing to do in the last step, and counts for nothing."""
    file = Path(recipe(stage.name, model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "o"),
                       global_batch_size=5, max_tokens_per_device=900, max_length=512, **LORA))  # fmt: skip
    file.write_text("".join(x for x in file.read_text().splitlines(True) if "per_device_train" not in x))
    trainer = stage.build(make_plan(stage, load_recipe(str(file), stage.name), topology_of_environment()), None)
    alone = trainer.accelerator
    taken, idle = {}, 0
    for world in (1, 2, 3):
        taken[world] = [set(), set(), set()]
        shares = [0.0, 0.0, 0.0]
        for rank in range(world):
            trainer.accelerator = OneOf(alone, rank, world)
            for number, step in enumerate(trainer.get_train_dataloader()):
                for part in step["micro_batches"]:
                    weight = trainer._weighted(part, step, lambda batch: trainer._step_weight)
                    shares[number] += weight / world
                    if not part["examples"]:
                        assert weight == 0
                        idle += 1
                        continue
                    rows = zip(part["batch"]["input_ids"], part["batch"]["attention_mask"], strict=True)
                    found = {tuple(ids[mask.bool()].tolist()) for ids, mask in rows}
                    assert not found & taken[world][number]
                    taken[world][number] |= found
        if stage is REWARD:  # a mean of pairs; SFT's loss is divided by the global number of tokens already
            assert shares == pytest.approx([1.0] * 3)
    rows = 1 if stage is SFT else 2  # of an example
    assert [len(examples) for examples in taken[1]] == [5 * rows, 5 * rows, 2 * rows]
    assert taken[2] == taken[1] and taken[3] == taken[1] and idle == 1


def test_bad_sizes(recipe, tiny_llama, few_pairs, tmp_path, capsys):
    common = dict(model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "x"))
    assert main(["dpo", recipe("dpo", global_batch_size=4, **common)]) == 2
    error = capsys.readouterr().err
    assert "per_device_train_batch_size and global_batch_size set the same thing; remove per_device" in error
    file = Path(recipe("dpo", global_batch_size=4, max_tokens_per_device=30, **common))
    file.write_text("".join(x for x in file.read_text().splitlines(keepends=True) if "per_device_train" not in x))
    assert main(["dpo", str(file)]) == 2
    error = capsys.readouterr().err
    said = re.search(rf"the longest example, {few_pairs}:(\d+), takes (\d+) tokens, more than max_tokens_per_device=30; raise it to (\d+)", error)  # fmt: skip
    tokenizer = load_tokenizer(tiny_llama)
    pairs = [tokenize_pair(tokenizer, json.loads(line)) for line in Path(few_pairs).read_text().splitlines()]
    assert said[2] == said[3] and int(said[2]) == count_tokens(pairs[int(said[1]) - 1], 256, padded=False)
    assert int(said[2]) == max(count_tokens(p, 256, padded=False) for p in pairs if len(p["prompt_ids"]) < 256)


def test_left_out_examples_are_named(recipe, tiny_llama, few_pairs, tmp_path, capsys):
    file = recipe("reward", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "x"),
                  max_length=200, max_steps=1, **LORA)  # fmt: skip
    assert main(["reward", file]) == 0
    told = re.search(rf"(\d+) of 12 examples are longer than max_length=200 and were left out \(the first: {few_pairs}:(\d+)\)", capsys.readouterr().out)  # fmt: skip
    tokenizer = load_tokenizer(tiny_llama)
    pairs = [tokenize_pair(tokenizer, json.loads(line)) for line in Path(few_pairs).read_text().splitlines()]
    lengths = [len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs]
    too_long = [line for line, length in enumerate(lengths, 1) if length > 200]
    assert (int(told[1]), int(told[2])) == (len(too_long), too_long[0])


def test_count_tokens():
    pair = {"prompt_ids": [1] * 5, "chosen_ids": [2] * 3, "rejected_ids": [3]}
    assert count_tokens(pair, None, padded=False) == 5 + 3 + 1
    assert count_tokens(pair, None, padded=True) == 2 * 8
    assert count_tokens(pair, 6, padded=False) == 5 + 1 + 1
    assert count_tokens({"chosen_ids": [1, 2, 3], "rejected_ids": [1, 2, 4, 5]}, None, padded=False) == 2 + 1 + 2
    assert count_tokens({"input_ids": [1] * 9}, 6, padded=False) == 6
    assert json.dumps(count_tokens(pair, 6, padded=True)) == "12"


def test_the_balance_of_experts_weighs_as_much_in_any_split(recipe, tiny_llama, few_pairs, tmp_path):
    """SFT: TRL adds that loss, here about 2 (= experts chosen per token), to each micro-batch; their shares must sum to 1."""
    config = AutoConfig.for_model(
        "mixtral", vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    first = {}
    for tokens in (100_000, 520):
        rows, _ = train(
            recipe, "sft", tmp_path, f"{tokens}", str(tmp_path / "base"), few_pairs, lora_target_modules=["q_proj", "v_proj"],
            global_batch_size=5, max_tokens_per_device=tokens, router_aux_loss_coef=1.0, max_steps=1,
        )  # fmt: skip
        first[tokens] = rows[0]
    assert max(row.get("micro_batches", 0) for row in read_metrics(tmp_path / "520")) > 1
    assert 1.9 < first[100_000]["aux_loss"] < 2.3
    assert first[520]["loss"] == pytest.approx(first[100_000]["loss"], abs=0.05)


@pytest.mark.parametrize(
    ("values", "examples", "world", "repeated"),
    [({}, 11, 2, 1), ({}, 11, 1, 0), ({}, 12, 2, 0), ({"global_batch_size": 4}, 11, 2, 0), ({"drop": True}, 11, 2, 0),
     ({"max_steps": 2}, 11, 2, 0), ({"max_steps": 3}, 11, 2, 1)],
)  # fmt: skip
def test_examples_that_trls_own_batches_repeat(values, examples, world, repeated):
    args = SimpleNamespace(
        per_device_train_batch_size=2, dataloader_drop_last=values.get("drop", False), gradient_accumulation_steps=1,
        max_steps=values.get("max_steps", -1),
    )  # fmt: skip
    plan = SimpleNamespace(args=args, stage_args=SimpleNamespace(global_batch_size=values.get("global_batch_size")))
    assert run._repeated(plan, examples, world) == repeated
