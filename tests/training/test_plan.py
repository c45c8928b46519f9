"""`--check` says what the start will say: everything but the weights is built, by the same code, and refused with the place."""

import json
import re
import shutil
from pathlib import Path

import pytest

from rlhf.__main__ import main

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}


@pytest.fixture
def no_weights(monkeypatch):
    """The start must refuse before weights are read: loading them is a failure of the test."""
    import transformers

    def loads(*args, **kwargs):
        raise AssertionError("weights were loaded")

    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", loads)


CASES = {
    "module names": ("sft", LORA | {"lora_target_modules": ["q_proj", "nope"]}, "lora_target_modules", "no module 'nope'; its linear layers are down_proj, "),
    "module names of a reward model": ("reward", LORA | {"lora_target_modules": ["nope"]}, "lora_target_modules", "nope"),
    "positions": ("dpo", {"max_length": 5000}, "max_length", "more than the 1024 positions"),
    "template": ("sft", {"chat_template": "nope"}, "chat_template", "no template 'nope'"),
    "scheduler's arguments": ("sft", {"lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_kwargs", "the scheduler linear takes none"),
    "scheduler without arguments": ("sft", {"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type", "decay"),
    "optimizer's package": ("sft", {"optim": "adamw_torch_8bit"}, "optim", "torchao"),
    "push without login": ("sft", {"push_to_hub": True}, "push_to_hub", "hf auth login"),
    "no example is short enough": ("dpo", {"max_length": 8}, "max_length", "leaves no training example"),
    "an example longer than a device's tokens": ("dpo", {"max_length": 256, "global_batch_size": 4, "max_tokens_per_device": 64}, "max_tokens_per_device", "the longest example, "),
    "moving reference": ("dpo", LORA | {"sync_ref_model": True}, "sync_ref_model", "remove `use_peft`"),
    "reference model": ("dpo", {"reference": "online", "reference_model": "x"}, "reference_model", "no effect without `reference: cached` or `nf4`"),
}  # fmt: skip


@pytest.mark.parametrize("check", [["--check"], []], ids=["check", "start"])
@pytest.mark.parametrize("case", CASES)
def test_refused_alike_before_weights(case, check, recipe, tiny_llama, few_pairs, tmp_path, capsys, no_weights):
    stage, values, key, words = CASES[case]
    more = {"model_name_or_path": tiny_llama, "dataset_name": few_pairs, "output_dir": str(tmp_path / "out")} | values
    file = recipe(stage, **more)
    if "global_batch_size" in values:
        text = Path(file).read_text()
        Path(file).write_text("".join(x for x in text.splitlines(True) if not x.startswith("per_device")))
    assert main([stage, file, *check]) == 2
    error = capsys.readouterr().err
    line = 1 + next(i for i, x in enumerate(Path(file).read_text().splitlines()) if x.startswith(f"{key}:"))
    assert error.startswith(f"rlhf: {file}:{line}: ") and words in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("check", [["--check"], []], ids=["check", "start"])
def test_a_model_that_is_not_there(check, recipe, few_pairs, tmp_path, capsys, no_weights):
    file = recipe("sft", model_name_or_path="nosuch/model", dataset_name=few_pairs, output_dir=str(tmp_path / "out"))
    assert main(["sft", file, *check]) == 2
    error = capsys.readouterr().err
    assert "'nosuch/model' is not a local folder and could not be loaded from the hub" in error, error


def test_a_model_without_tokenizer(recipe, tiny_llama, few_pairs, tmp_path, capsys, no_weights):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model, ignore=shutil.ignore_patterns("tokenizer*"))
    file = recipe("sft", model_name_or_path=str(model), dataset_name=few_pairs, output_dir=str(tmp_path / "out"))
    assert main(["sft", file, "--check"]) == 2
    assert f"the tokenizer of {model} can't be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_a_right_recipe_is_ok_and_writes_nothing(stage, recipe, tiny_llama, few_pairs, tmp_path, capsys, no_weights):
    values = {"model_name_or_path": tiny_llama, "dataset_name": few_pairs, "output_dir": str(tmp_path / "out")}
    assert main([stage, recipe(stage, **values, **LORA), "--check"]) == 0
    shown = capsys.readouterr().out
    assert f"checking it with {tiny_llama}" in shown and ": ok (12 training rows)" in shown
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_yet_to_be_made_is_checked_by_its_start(
    recipe, tiny_llama, few_pairs, tmp_path, capsys, no_weights
):
    """The DPO recipe's model comes from the SFT recipe beside it: its names and positions are those of where that starts."""
    values = {"dataset_name": few_pairs} | LORA
    recipe("sft", model_name_or_path=tiny_llama, output_dir=str(tmp_path / "sft"), **values)
    file = recipe("dpo", model_name_or_path=str(tmp_path / "sft"), output_dir=str(tmp_path / "dpo"), **values)
    assert main(["dpo", file, "--check"]) == 0
    assert (
        f"will come from: rlhf sft {tmp_path}/sft.yaml; until then it is checked with {tiny_llama}"
        in capsys.readouterr().out
    )
    assert main(["dpo", file, "--check", "--max_length", "5000"]) == 2
    assert "more than the 1024 positions" in capsys.readouterr().err


def test_a_model_that_is_not_fetched_is_named(recipe, few_pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    name = "embedded:smollm2-135m-instruct"
    file = recipe("sft", model_name_or_path=name, dataset_name=few_pairs, output_dir=str(tmp_path / "out"))
    assert main(["sft", file, "--check"]) == 0
    assert f"not checked yet: tokenizer, lengths and module names, as {name}" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_attention_that_does_not_exist(recipe, tiny_llama, few_pairs, tmp_path, capsys, no_weights):
    values = {"model_name_or_path": tiny_llama, "dataset_name": few_pairs, "output_dir": str(tmp_path / "out")}
    file = recipe("sft", **values, attn_implementation="foo")
    assert main(["sft", file, "--check"]) == 2
    assert json.dumps("foo").strip('"') in capsys.readouterr().err


def test_the_models_of_an_evaluation(recipe, tiny_llama, few_pairs, tmp_path, capsys, no_weights):
    """A policy where a reward model belongs, and a model that isn't there, are found without loading weights."""
    values = {"dataset_name": few_pairs, "output_dir": str(tmp_path / "e"), "sft_model": tiny_llama}
    file = recipe("evaluate", **values, reward_model=tiny_llama)
    assert main(["evaluate", file, "--check"]) == 2
    assert f"{tiny_llama} holds a policy; 'reward_model' names a reward model" in capsys.readouterr().err
    file = recipe("evaluate", **values, dpo_model="nosuch/model")
    assert main(["evaluate", file, "--check"]) == 2
    assert "'nosuch/model' is not a local folder" in capsys.readouterr().err
    assert main(["evaluate", recipe("evaluate", **values, dpo_model=tiny_llama), "--check"]) == 0
    assert "ok (12 pairs (the models' training data is unknown))" in capsys.readouterr().out


def test_a_full_disk_is_known_beforehand(recipe, tiny_llama, few_pairs, tmp_path, capsys, monkeypatch, no_weights):
    import shutil as disk

    usage = disk.disk_usage(tmp_path)
    monkeypatch.setattr(disk, "disk_usage", lambda path: usage._replace(free=1000))
    values = {"model_name_or_path": tiny_llama, "dataset_name": few_pairs, "output_dir": str(tmp_path / "out")}
    assert main(["sft", recipe("sft", **values), "--check"]) == 2
    assert "has 0.00 GB free, but the rest of the run" in capsys.readouterr().err


def test_answers_that_max_length_makes_equal_are_reported(recipe, tiny_llama, tmp_path, capsys, no_weights):
    row = {"prompt": "Why?", "chosen": "word " * 60 + "good", "rejected": "word " * 60 + "bad"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    values = {"model_name_or_path": tiny_llama, "dataset_name": str(tmp_path / "pairs.jsonl"), "max_length": 40}
    assert main(["dpo", recipe("dpo", **values, output_dir=str(tmp_path / "out")), "--check"]) == 0
    shown = capsys.readouterr().out
    assert "note: max_length=40: cuts 2 answers in 1 of 1 pairs" in shown and "the same tokens" in shown


def test_what_the_command_line_switches_off_is_told(recipe, tiny_llama, few_pairs, tmp_path, capsys):
    """It need not be deleted from the file, but it must not be without effect in silence."""
    file = recipe(
        "dpo",
        model_name_or_path=tiny_llama,
        dataset_name=few_pairs,
        output_dir=str(tmp_path / "o"),
        reference_model=tiny_llama,
    )
    assert main(["dpo", file, "--check"]) == 0
    assert "has no effect" not in capsys.readouterr().out
    assert main(["dpo", file, "--check", "--reference", "online"]) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"note: \S+dpo.yaml:\d+: 'reference_model' has no effect without `reference: cached` or `nf4`\n", shown
    ), shown


@pytest.mark.parametrize("words", [["--check"], []], ids=["check", "start"])
def test_a_held_out_row_that_is_too_long(words, recipe, tiny_llama, few_pairs, tmp_path, capsys):
    """It would end the run at its first evaluation."""
    pair = json.loads(Path(few_pairs).read_text().splitlines()[0])
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": pair["prompt"], "chosen": "a " * 200, "rejected": "b " * 200}) + "\n")
    values = dict(model_name_or_path=tiny_llama, dataset_name=few_pairs, eval_dataset_name=str(long), output_dir=str(tmp_path / "x"),
                  max_length=256, global_batch_size=4, max_tokens_per_device=410)  # fmt: skip
    for evaluates in ("no", "steps"):
        file = Path(recipe("dpo", **values, eval_strategy=evaluates, max_steps=1))
        file.write_text("".join(x for x in file.read_text().splitlines(keepends=True) if "per_device_train" not in x))
        assert main(["dpo", str(file), *words, "--output_dir", str(tmp_path / evaluates)]) == (
            0 if evaluates == "no" else 2
        )
    assert f"the longest example, {long}:1, takes " in capsys.readouterr().err
