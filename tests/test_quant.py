"""QLoRA on the CPU: a 4-bit base, LoRA on it, an adapter written that reloads on the same 4-bit base."""

import json
import math
from pathlib import Path

import pytest

from rlhf.__main__ import main
from rlhf.progress import read_metrics

pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
QLORA = {"use_peft": True, "load_in_4bit": True, "lora_r": 4, "lora_target_modules": "all-linear"}


@pytest.fixture(scope="module")
def llama_64(tiny_llama, tmp_path_factory):
    """A tiny Llama as wide as bitsandbytes' block of 64: its CPU kernels take no less."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "llama-64"
    config = AutoConfig.from_pretrained(tiny_llama, hidden_size=128, intermediate_size=256, head_dim=32)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return str(folder)


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


def test_a_pass_in_eval_mode_leaves_training_its_gradients(llama_64):
    """As DPO's reference pass and its check of step 0 are; bitsandbytes lays weights out anew then (AVX512-BF16 CPUs)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from trl import ModelConfig

    from rlhf.models import load_policy, load_tokenizer

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
