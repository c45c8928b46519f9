"""Mixtures of experts, whose files hold experts one by one and the model all of a layer in one tensor."""

from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf.runs.metrics import read_metrics


@pytest.fixture
def mixtral(tiny_llama, tmp_path):
    config = AutoConfig.for_model(
        "mixtral", vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, router_aux_loss_coef=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.slow
def test_fsdp2_trains_them_as_one_process_does(recipe, mixtral, few_pairs, tmp_path):
    """An adapter on each expert: the same losses and the same finished model; no rank loads all. Then a start from it."""
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    common = dict(dataset_name=few_pairs, use_peft=True, lora_r=4, lora_dropout=0.0, lora_target_modules=["q_proj", "v_proj"],
                  lora_target_parameters=experts, max_steps=3, learning_rate=1e-4,
                  global_batch_size=4, max_tokens_per_device=4096)  # fmt: skip

    def losses(ranks, stage, name, **more):
        out = tmp_path / name
        file = Path(recipe(stage, name=name, output_dir=str(out), **common | more))
        file.write_text("".join(x for x in file.read_text().splitlines(True) if "per_device_train" not in x))
        done = forked.launch(ranks, stage, str(file), **({"launch_file": "fsdp2.yaml"} if ranks > 1 else {}))
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        assert "holds all of" not in done.stdout
        found = out / "model.safetensors"
        return [row["loss"] for row in read_metrics(out) if "loss" in row], load_file(found) if found.exists() else {}

    start = {"model_name_or_path": mixtral, "merge_adapter": True}
    one, expected = losses(1, "dpo", "one", **start)
    two, found = losses(2, "dpo", "two", **start)
    assert len(one) == 3 and two == pytest.approx(one, abs=1e-5)
    assert expected.keys() == found.keys() and any(".experts.3.w1" in name for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    losses(2, "dpo", "adapter", model_name_or_path=mixtral, merge_adapter=False, max_steps=1)
    start = {"model_name_or_path": str(tmp_path / "adapter"), "merge_adapter": True}
    one, _ = losses(1, "reward", "reward one", **start)
    two, _ = losses(2, "reward", "reward two", **start)
    # 11 pairs, one is too long: the last step has 3, of which TRL's own batches would repeat one
    assert len(one) == 3 and two == pytest.approx(one, abs=1e-5)
