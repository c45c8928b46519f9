"""QLoRA on the CPU: a 4-bit base, LoRA on it, an adapter written that reloads on the same 4-bit base."""

import json
import math
import re
from pathlib import Path

import pytest

from rlhf.__main__ import main
from rlhf.runs.metrics import read_metrics

pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
QLORA = {"use_peft": True, "load_in_4bit": True, "lora_r": 4, "lora_target_modules": "all-linear"}


def test_qlora_sft_then_dpo_goes_on_with_the_adapter(recipe, llama_64, few_pairs, tmp_path):
    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    assert (
        main(["sft", recipe("sft", model_name_or_path=llama_64, dataset_name=few_pairs, output_dir=str(sft), **QLORA)])
        == 0
    )
    assert (sft / "adapter_model.safetensors").is_file() and not (sft / "model.safetensors").exists()
    assert (
        main(["dpo", recipe("dpo", model_name_or_path=str(sft), dataset_name=few_pairs, output_dir=str(dpo), **QLORA)])
        == 0
    )
    assert read_metrics(dpo)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    complete = json.loads((Path(dpo) / "complete.json").read_text())
    assert complete["max_logit_difference"] <= 5e-2 * complete["max_logit"]


def test_merging_into_a_4_bit_base_dequantises_it(recipe, llama_64, few_pairs, tmp_path, capsys):
    """The merged model's weights are the base's 4-bit values plus B A, not rounded to 4 bits again."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from safetensors.torch import load_file
    from trl import ModelConfig

    from rlhf.models.loading import load_policy
    from rlhf.models.tokenizer import load_tokenizer

    files = {}
    for merge in (False, True):
        out = tmp_path / str(merge)
        file = recipe("sft", name=str(merge), model_name_or_path=llama_64, dataset_name=few_pairs, output_dir=str(out),
                      merge_adapter=merge, **QLORA)  # fmt: skip
        assert main(["sft", file]) == 0
        files[merge] = load_file(out / ("model.safetensors" if merge else "adapter_model.safetensors"))
    assert re.search(r"merged into the dequantised base: (\d+) MB instead of \d+ MB", capsys.readouterr().out)
    complete = json.loads((out / "complete.json").read_text())
    assert complete["max_logit_difference"] <= 1e-3 * max(1, complete["max_logit"])
    base = load_policy(llama_64, load_tokenizer(llama_64), ModelConfig(use_peft=True, load_in_4bit=True))
    name = "model.layers.0.mlp.up_proj"
    weight = base.get_submodule(name).weight
    adapter = {side: files[False][f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB"}
    scale = ModelConfig().lora_alpha / QLORA["lora_r"]
    whole = dequantize_4bit(weight.data, weight.quant_state).float() + scale * adapter["B"] @ adapter["A"]
    found = files[True][f"{name}.weight"].float()
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)  # in bf16 the adapter would be off by 3e-5
    assert (found - dequantize_4bit(weight.data, weight.quant_state).float()).abs().max() > 3e-4
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


@pytest.mark.parametrize(("stage", "values"), [("reward", {}), ("dpo", {"continue_adapter": False})])
def test_an_adapter_is_not_merged_into_4_bits(stage, values, recipe, llama_64, few_pairs, tmp_path, capsys):
    sft = tmp_path / "sft"
    common = dict(dataset_name=few_pairs) | QLORA
    assert main(["sft", recipe("sft", model_name_or_path=llama_64, output_dir=str(sft), **common)]) == 0
    file = recipe(stage, model_name_or_path=str(sft), output_dir=str(tmp_path / "x"), **common | values)
    assert main([stage, file]) == 2
    assert f"the adapter in {sft} would be merged into quantised weights and rounded away; set `merge_adapter: true`" in capsys.readouterr().err  # fmt: skip


def test_a_pass_in_eval_mode_leaves_training_its_gradients(llama_64):
    """As DPO's reference pass and its check of step 0 are; bitsandbytes lays weights out anew then (AVX512-BF16 CPUs)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from trl import ModelConfig

    from rlhf.models.loading import load_policy
    from rlhf.models.tokenizer import load_tokenizer

    gradients = []
    for evaluated in (False, True):
        torch.manual_seed(0)
        tokenizer = load_tokenizer(llama_64)
        model = load_policy(llama_64, tokenizer, ModelConfig(use_peft=True, load_in_4bit=True))
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        ids = torch.arange(3, 40)[None]
        if evaluated:
            with torch.no_grad():
                model.eval()(input_ids=ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


# --- a 4-bit reference -----------------------------------------------------------------------------------------------

FULL = {"reference": "nf4", "use_peft": False}


def test_bias_by_hand():
    """Two pairs: answers off by 1, 2, 0 and 4 nats, so margins by 1 - 2 = -1 and 0 - 4 = -4."""
    import numpy as np

    from rlhf.training.reference import bias_of

    exact = np.array([[-10.0, -20.0], [-30.0, -40.0]])
    quantised = exact + np.array([[1.0, 2.0], [0.0, 4.0]])
    found = bias_of(exact, exact, quantised, beta=0.5)
    assert (found["mean_nats"], found["worst_nats"]) == (7 / 4, 4.0)
    assert (found["mean_margin_nats"], found["worst_margin_nats"]) == (2.5, 4.0)
    assert found["exact_loss"] == pytest.approx(math.log(2))
    # the policy's margin over the reference is +1 and +4: -log sigmoid(0.5 x)
    assert found["loss"] == pytest.approx((math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(-2))) / 2)


@pytest.mark.parametrize(
    ("model", "allowed"), [("llama_64", 0.001), pytest.param("smollm2", 1, marks=pytest.mark.slow)]
)
def test_a_4_bit_reference_that_is_far_off_stops_the_run(model, allowed, request, recipe, few_pairs, tmp_path, capsys):
    """SmolLM2-135M in 4 bits is another model: nats off a sequence; a random one of two layers is off by less. What is shown
    is recomputed here with transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from rlhf.inference.score import encode_pair, pair_logps

    model = request.getfixturevalue(model)
    file = recipe("dpo", model_name_or_path=model, dataset_name=few_pairs, output_dir=str(tmp_path / "out"), **FULL)
    assert main(["dpo", file, "--max_reference_bias_nats", str(allowed)]) == 2
    shown = capsys.readouterr()
    told = re.search(rf"the 4-bit reference is off by ([\d.]+) nats per answer on average, more than max_reference_bias_nats={allowed}: ", shown.err)  # fmt: skip
    assert told and "use `reference: cached`" in shown.err and "Nothing was trained" in shown.err
    assert "its bias on 12 pairs" in shown.out and "`reference: cached` is exact" in shown.out
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in Path(few_pairs).read_text().splitlines()]
    found = []
    for options in ({}, {"quantization_config": config}):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)
        loaded.train()  # the exact kernels
        found.append([pair_logps(loaded, [encode_pair(tokenizer, row, 256)])[0] for row in rows])
    off = [abs(a[side] - b[side]) for a, b in zip(*found, strict=True) for side in ("chosen", "rejected")]
    assert float(told[1]) == pytest.approx(sum(off) / len(off), rel=0.02)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_against_a_4_bit_reference(lora, recipe, llama_64, few_pairs, tmp_path, capsys):
    values = {"use_peft": lora, "lora_r": 4, "lora_target_modules": "all-linear"} if lora else {}
    out = tmp_path / "out"
    file = recipe("dpo", model_name_or_path=llama_64, dataset_name=few_pairs, output_dir=str(out), per_device_train_batch_size=12,
                  max_reference_bias_nats=100, **FULL | values)  # fmt: skip
    assert main(["dpo", file]) == 0
    shown = capsys.readouterr().out
    loss, exact = re.search(r"DPO's loss at step 0 is ([\d.]+) instead of ([\d.]+)", shown).groups()
    assert exact == "0.693" and read_metrics(out)[0]["loss"] == pytest.approx(float(loss), abs=1e-3)
    small, whole = re.search(r"in 4 bits \(NF4\): (\d+) MB instead of (\d+) MB", shown).groups()
    assert int(small) <= int(whole)


def test_another_model_as_reference(recipe, llama_64, tiny_llama, few_pairs, tmp_path, capsys):
    """Its bias is measured against itself in full precision; the loss does not start at ln 2."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(llama_64)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(llama_64).save_pretrained(tmp_path / "other")
    file = recipe("dpo", model_name_or_path=llama_64, dataset_name=few_pairs, output_dir=str(tmp_path / "out"),
                  reference_model=str(tmp_path / "other"), max_reference_bias_nats=100, **FULL)  # fmt: skip
    assert main(["dpo", file]) == 0
    shown = capsys.readouterr().out
    loss, exact = re.search(r"DPO's loss at step 0 is ([\d.]+) instead of ([\d.]+)", shown).groups()
    assert exact != "0.693" and "`reference: cached` is exact" not in shown


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"use_peft": True, "load_in_4bit": True}, "a QLoRA policy already provides its exact 4-bit reference"),
        (
            {"reference": "online", "reference_model": "x"},
            "'reference_model' has no effect without `reference: cached` or `nf4`",
        ),
        ({"reference_model": "/nowhere/at/all"}, "'/nowhere/at/all' is not a local folder"),
    ],
)
def test_what_a_4_bit_reference_cannot_be(values, sentence, recipe, llama_64, few_pairs, tmp_path, capsys):
    file = recipe("dpo", model_name_or_path=llama_64, dataset_name=few_pairs, output_dir=str(tmp_path / "x"), **FULL | values)  # fmt: skip
    assert main(["dpo", file]) == 2
    assert sentence in capsys.readouterr().err
