"""SFT, reward and DPO on tiny models: what is written, what loads, what the reference is, what resumes."""

import functools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.__main__ import main
from rlhf.config.build import build_configs
from rlhf.config.recipe import load_recipe
from rlhf.distributed.topology import topology_of_environment
from rlhf.errors import UserError
from rlhf.models import saving
from rlhf.models.tokenizer import read_template
from rlhf.runs.metrics import read_metrics
from rlhf.training.dpo import DPO
from rlhf.training.plan import make_plan
from rlhf.training.reward import REWARD
from rlhf.training.sft import SFT

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "all-linear"}


def run(stage, recipe_file, *flags):
    assert main([stage, recipe_file, *flags]) == 0


def summary(folder):
    return json.loads((Path(folder) / "complete.json").read_text())


@pytest.fixture
def sft_model(recipe, tiny_llama, few_pairs, tmp_path):
    """A merged SFT policy whose weights differ from the base."""
    run(
        "sft",
        recipe("sft", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "sft"), **LORA),
    )
    return str(tmp_path / "sft")


@pytest.fixture
def sft_adapter(recipe, tiny_llama, few_pairs, tmp_path):
    """The same as an adapter."""
    file = recipe(
        "sft", name="adapter", model_name_or_path=tiny_llama, dataset_name=few_pairs,
        output_dir=str(tmp_path / "sft-adapter"), merge_adapter=False, **LORA,
    )  # fmt: skip
    run("sft", file)
    return str(tmp_path / "sft-adapter")


@pytest.fixture(scope="module")
def policies(recipe_in, tiny_llama, few_pairs, tmp_path_factory):
    """Both, for tests that only read them: {"merged": …, "adapter": …}."""
    folder = tmp_path_factory.mktemp("policies")
    for kind, merge in (("merged", True), ("adapter", False)):
        file = recipe_in(folder, "sft", name=kind, model_name_or_path=tiny_llama, dataset_name=few_pairs,
                         output_dir=str(folder / kind), merge_adapter=merge, **LORA)  # fmt: skip
        run("sft", file)
    return {kind: str(folder / kind) for kind in ("merged", "adapter")}


def test_sft_writes_a_model_that_plain_transformers_loads(sft_model, tiny_llama, capsys):
    folder = Path(sft_model)
    names = {f.name for f in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "recipe.yaml",
            "provenance.json", "metrics.jsonl", "complete.json"} <= names  # fmt: skip
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl", ".partial"))]
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = load_file(Path(tiny_llama) / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.state_dict()[name], before[name])
    assert summary(folder)["max_logit_difference"] < 1e-3 * summary(folder)["max_logit"]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["versions"]["trl"] and len(provenance["inputs"]["dataset_name"]) == 64
    assert [m["step"] for m in read_metrics(folder) if "loss" in m] == [1, 2, 3]


@pytest.mark.parametrize("damage", [1.0, float("nan")])
def test_a_model_that_reads_back_otherwise_is_not_complete(
    damage, recipe, tiny_llama, few_pairs, tmp_path, monkeypatch, capsys
):
    """Nothing is in its place, and nothing says that the run is finished: an evaluation or DPO would go on with it."""
    read = saving.offloaded_logits
    monkeypatch.setattr(saving, "offloaded_logits", lambda *args: [logits + damage for logits in read(*args)])
    out = tmp_path / "sft"
    file = recipe(
        "sft", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(out), max_steps=1, **LORA
    )
    assert main(["sft", file]) == 1
    assert "differs from the trained one: its logits differ by" in capsys.readouterr().err
    assert not (out / "complete.json").exists() and not (out / "model.safetensors").exists()


@pytest.mark.parametrize("stage", [SFT, REWARD, DPO], ids=lambda stage: stage.name)
def test_every_stage_takes_the_recipes_template(stage, recipe, tiny_llama, few_pairs, tmp_path):
    """The model has one of its own, ChatML."""
    file = recipe(stage.name, model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "o"), chat_template="alpaca")  # fmt: skip
    plan = make_plan(stage, load_recipe(file, stage.name), topology_of_environment())
    tokenizer = stage.load(plan).tokenizer
    assert tokenizer.chat_template == read_template("alpaca")


def test_a_complete_stage_is_skipped_untouched(sft_model, tmp_path, capsys):
    before = {f: f.stat().st_mtime_ns for f in Path(sft_model).iterdir()}
    run("sft", str(tmp_path / "sft.yaml"))
    assert "SFT          complete: " in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in Path(sft_model).iterdir()} == before


def test_sft_adapter_is_small_and_loads_with_peft(sft_adapter, sft_model):
    from peft import AutoPeftModelForCausalLM

    assert (Path(sft_adapter) / "adapter_model.safetensors").is_file()
    assert not (Path(sft_adapter) / "model.safetensors").exists()
    adapter = AutoPeftModelForCausalLM.from_pretrained(sft_adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(sft_model).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(adapter(ids).logits, merged(ids).logits, atol=1e-4)


DPO_WAYS = {
    "lora on a merged policy": ("merged", LORA),
    "lora on a merged policy, online": ("merged", LORA | {"reference": "online"}),
    "adapter trained further": ("adapter", LORA),
    "adapter trained further, online": ("adapter", LORA | {"reference": "online"}),
    "adapter merged first": ("adapter", LORA | {"continue_adapter": False}),
    "full fine-tuning": ("merged", {}),
    "full fine-tuning, online": ("merged", {"reference": "online"}),
    "full fine-tuning of a merged adapter": ("adapter", {}),
}


@pytest.mark.parametrize("way", DPO_WAYS)
def test_dpo_starts_at_ln2_from_exactly_the_sft_policy(way, policies, recipe, few_pairs, tmp_path):
    kind, options = DPO_WAYS[way]
    policy = policies[kind]
    out = tmp_path / "dpo"
    run("dpo", recipe("dpo", model_name_or_path=policy, dataset_name=few_pairs, output_dir=str(out), **options))
    metrics = [m for m in read_metrics(out) if "loss" in m]
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    # the logged log-probabilities of step 1 are the SFT policy's own, not the base model's
    from rlhf.inference.score import encode_pair, pair_logps
    from rlhf.models.inference import load_finished

    sft, tokenizer = load_finished(policy)
    rows = [json.loads(line) for line in Path(few_pairs).read_text().splitlines()]
    order = first_batch_rows(tmp_path / "dpo.yaml", rows, tokenizer)
    logps = pair_logps(sft, [encode_pair(tokenizer, rows[i], 256) for i in order])
    expected = sum(pair["chosen"] for pair in logps) / len(order)
    assert metrics[0]["logps/chosen"] == pytest.approx(expected, rel=1e-4)
    AutoModelForCausalLM.from_pretrained(out)
    assert abs(metrics[-1]["loss"] - math.log(2)) > 1e-4  # it has moved since


def first_batch_rows(recipe_file, rows, tokenizer):
    """Which rows TRL's trainer sees first: its own sampler, asked."""
    from datasets import Dataset
    from trl import DPOTrainer

    args, _, _ = build_configs(load_recipe(str(recipe_file), "dpo", ["--reference", "online"]))
    model = AutoModelForCausalLM.from_pretrained(Path(recipe_file).parent / "dpo")
    trainer = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    prompts = [
        tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        for r in rows
    ]
    found = []
    for ids in batch["input_ids"][: len(batch["input_ids"]) // 2].tolist():
        found.append(next(i for i, p in enumerate(prompts) if ids[: len(p)] == p))
    return found


def test_dpo_with_another_reference_is_stopped(sft_model, tiny_llama, recipe, few_pairs, tmp_path):
    from datasets import Dataset

    from rlhf.training.dpo import trainer_class

    file = recipe(
        "dpo", model_name_or_path=sft_model, dataset_name=few_pairs, output_dir=str(tmp_path / "x"), reference="online"
    )
    plan = make_plan(DPO, load_recipe(file, "dpo"), topology_of_environment())
    rows = [json.loads(line) for line in Path(few_pairs).read_text().splitlines()]
    trainer = trainer_class(plan)(
        model=AutoModelForCausalLM.from_pretrained(sft_model), ref_model=AutoModelForCausalLM.from_pretrained(tiny_llama),
        args=plan.args, train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(sft_model),
    )  # fmt: skip
    with pytest.raises(
        UserError, match="DPO does not start from its reference: before the first update policy and reference differ by"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_adapter_that_goes_on_keeps_its_rank(sft_adapter, recipe, few_pairs, tmp_path, capsys):
    file = recipe("dpo", model_name_or_path=sft_adapter, dataset_name=few_pairs, output_dir=str(tmp_path / "dpo"),
                  **(LORA | {"lora_r": 8}))  # fmt: skip
    assert main(["dpo", file]) == 2
    assert "lora_r=8, but the adapter to be trained further has 4" in capsys.readouterr().err
    assert not (tmp_path / "dpo").exists()


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("backbone", ["tiny_llama", "tiny_gpt2", "tiny_distilbert", "sft_adapter"])
def test_the_reward_head_survives(backbone, merge, request, recipe, few_pairs, tmp_path, capsys):
    name, out = request.getfixturevalue(backbone), tmp_path / "reward"
    if backbone == "sft_adapter" and not merge:
        file = recipe(
            "reward", model_name_or_path=name, dataset_name=few_pairs, output_dir=str(out), merge_adapter=False, **LORA
        )
        assert main(["reward", file]) == 2
        assert "a model that is not on disk" in capsys.readouterr().err
        return
    run("reward", recipe("reward", model_name_or_path=name, dataset_name=few_pairs, output_dir=str(out),
                         merge_adapter=merge, **LORA))  # fmt: skip
    # complete.json exists only after the reloaded model gave the trained model's scores; look once more by plain means
    assert summary(out)["max_logit_difference"] <= 1e-3 * max(1, summary(out)["max_logit"])
    if merge:
        model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"]
    else:
        saved = load_file(out / "adapter_model.safetensors")
        assert any("score" in key or "classifier" in key for key in saved)
        from peft import AutoPeftModelForSequenceClassification

        model = AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=1)
    assert model.config.num_labels == 1


def test_reward_model_on_the_real_minilm(minilm, recipe, few_pairs, tmp_path):
    out = tmp_path / "reward"
    run("reward", recipe("reward", model_name_or_path=minilm, dataset_name=few_pairs, output_dir=str(out), max_steps=6))
    losses = [m["loss"] for m in read_metrics(out) if "loss" in m]
    assert len(losses) == 6 and min(losses[3:]) < losses[0]
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
                                        return_dict=True)["input_ids"]  # fmt: skip
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    assert ids.count(tokenizer.cls_token_id) == 1 and ids.count(tokenizer.sep_token_id) == 1


def test_pickled_weights_are_not_read(sft_model, sft_adapter, recipe, few_pairs, tmp_path, capsys):
    from rlhf.models.inference import load_finished

    weights = Path(sft_adapter) / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    file = recipe(
        "dpo", model_name_or_path=sft_adapter, dataset_name=few_pairs, output_dir=str(tmp_path / "dpo"), **LORA
    )
    assert main(["dpo", file]) == 2
    assert "has no adapter_model.safetensors; pickled weights are not loaded" in capsys.readouterr().err
    whole = Path(sft_model) / "model.safetensors"
    torch.save(load_file(whole), Path(sft_model) / "pytorch_model.bin")
    whole.unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_finished(sft_model)


class Crash(Exception):
    pass


def test_an_interrupted_run_goes_on_and_ends_the_same(recipe, tiny_llama, few_pairs, tmp_path, monkeypatch, capsys):
    common = dict(
        model_name_or_path=tiny_llama, dataset_name=few_pairs, max_steps=5, save_strategy="steps", save_steps=2, **LORA
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("sft", recipe("sft", name="whole", output_dir=str(whole), **common))
    file = recipe("sft", name="broken", output_dir=str(broken), **common)
    from transformers import Trainer

    real = Trainer.training_step

    @functools.wraps(real)  # upstream.py looks at its parameters
    def dies_in_step_four(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Crash
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", dies_in_step_four)
    with pytest.raises(Crash):
        main(["sft", file])
    monkeypatch.undo()
    assert not (broken / "complete.json").exists()
    assert [m["step"] for m in read_metrics(broken) if "loss" in m] == [1, 2, 3]
    run("sft", file)
    assert f"resuming from {broken / 'checkpoint-2'}" in capsys.readouterr().out
    for key in ("step", "loss"):
        assert [m[key] for m in read_metrics(broken) if "loss" in m] == [
            m[key] for m in read_metrics(whole) if "loss" in m
        ]
    a, b = load_file(whole / "model.safetensors"), load_file(broken / "model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_an_output_directory_of_another_run_is_refused(sft_model, tmp_path, capsys):
    before = {f.name: f.stat().st_mtime_ns for f in Path(sft_model).iterdir()}
    assert main(["sft", str(tmp_path / "sft.yaml"), "--learning_rate", "0.5"]) == 2
    error = capsys.readouterr().err
    assert (
        "holds another run; it differs in learning_rate: 0.001 -> 0.5" in error and "nothing was overwritten" in error
    )
    assert {f.name: f.stat().st_mtime_ns for f in Path(sft_model).iterdir()} == before


def test_dpo_notices_that_its_sft_model_was_trained_anew(sft_model, recipe, few_pairs, tmp_path, capsys):
    file = recipe("dpo", model_name_or_path=sft_model, dataset_name=few_pairs, output_dir=str(tmp_path / "dpo"), **LORA)
    run("dpo", file)
    other = summary(sft_model) | {"weights_sha256": "0" * 64}
    (Path(sft_model) / "complete.json").write_text(json.dumps(other))
    assert main(["dpo", file]) == 2
    assert "the content of model_name_or_path" in capsys.readouterr().err


BAD_INPUT = {
    "no such model": ({"model_name_or_path": "./nowhere"}, "could not be loaded from the hub"),
    "a folder without a model": ({"model_name_or_path": "."}, "has no finished model"),
    "too long": ({"max_length": 4096}, "max_length=4096 is more than the 1024 positions"),
    "all too long": ({"max_length": 4}, "max_length=4 leaves no training example; raise it"),
    "missing reporter": (
        {"report_to": "swanlab"},
        f"report_to swanlab needs the package; run: {sys.executable} -m pip install swanlab",
    ),
    "4 bit without lora": (
        {"load_in_4bit": True, "use_peft": False},
        "a quantised model can only be trained with LoRA",
    ),
    "no template": ({"chat_template": "vicuna"}, "no template 'vicuna'; expected alpaca, chatml, plain or the path"),
    "nothing to evaluate on": ({"eval_strategy": "epoch"}, "there is nothing to evaluate on"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_told_in_one_sentence(case, recipe, tiny_llama, few_pairs, tmp_path, capsys):
    change, sentence = BAD_INPUT[case]
    values = (
        dict(model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "out")) | LORA | change
    )
    assert main(["dpo", recipe("dpo", **values)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlhf: ") and sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_lora_on_one_kind_of_module(recipe, tiny_llama, few_pairs, tmp_path, capsys):
    """A list of one is a list, and a module that the model lacks is told in a sentence."""
    values = dict(
        model_name_or_path=tiny_llama, dataset_name=few_pairs, use_peft=True, merge_adapter=False, max_steps=1
    )
    one = recipe("sft", name="one", output_dir=str(tmp_path / "one"), lora_target_modules=["q_proj"], **values)
    assert main(["sft", one]) == 0
    names = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert names and all(".q_proj.lora_" in name for name in names)
    none = recipe("sft", name="none", output_dir=str(tmp_path / "none"), lora_target_modules=["c_attn"], **values)
    assert main(["sft", none]) == 2
    shown = capsys.readouterr().err
    assert "none.yaml:" in shown and "c_attn" in shown and "`all-linear` is right for any model" in shown


def test_the_head_of_a_bfloat16_reward_model_is_trained_in_float32(recipe, tiny_llama, few_pairs, tmp_path):
    """PEFT copies a new head in the base's bfloat16, in which a learning rate of 1e-5 changes nothing."""
    from rlhf.distributed.topology import topology_of_environment
    from rlhf.training.plan import make_plan
    from rlhf.training.reward import REWARD

    file = recipe("reward", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "o"), bf16=True,
                  dtype="bfloat16", use_cpu=True, **LORA)  # fmt: skip
    trainer = REWARD.build(make_plan(REWARD, load_recipe(file, "reward"), topology_of_environment()), None)
    dtypes = {(name.rpartition("score")[1], p.requires_grad): p.dtype for name, p in trainer.model.named_parameters()}
    assert dtypes[("score", True)] == dtypes[("", True)] == torch.float32 and dtypes[("", False)] == torch.bfloat16
    before = trainer.model.score.modules_to_save["default"].weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.score.modules_to_save["default"].weight)
