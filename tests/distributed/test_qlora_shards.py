"""QLoRA under FSDP2, whose ranks hold their part of the 4-bit base: stopped, resumed on more ranks, finished merged."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file

from rlhf.runs.metrics import read_metrics

sys.path.append(str(Path(__file__).parent.parent.parent / "bench"))  # its scripts import each other
pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")


def test_it_is_what_one_process_trains(recipe, llama_64, few_pairs, tmp_path):
    """TRL keeps an adapter on 4 bits in bf16: a rounding more or less of each weight in each step."""
    common = dict(model_name_or_path=llama_64, dataset_name=few_pairs, use_peft=True, load_in_4bit=True, use_bnb_nested_quant=True,
                  lora_r=4, lora_target_modules="all-linear", merge_adapter=True, max_steps=3, global_batch_size=5,
                  max_tokens_per_device=800, learning_rate=1e-4)  # fmt: skip

    def write(name, **more):
        file = recipe("dpo", name=name, output_dir=str(tmp_path / name), **common | more)
        lines = [line for line in open(file, encoding="utf-8") if "per_device_train" not in line]
        with open(file, "w", encoding="utf-8") as out:
            out.writelines(lines)
        return file

    done = forked.launch(1, "dpo", write("one"))
    assert done.returncode == 0, done.stderr[-3000:]
    file, out = write("sharded", bnb_4bit_quant_storage="uint8"), tmp_path / "sharded"
    out.mkdir()
    (out / "stop").touch()
    done = forked.launch(2, "dpo", file, launch_file="fsdp2.yaml")
    assert "Stopped after step 1 of 3" in done.stdout + done.stderr, done.stderr[-3000:]
    assert "bnb_4bit_quant_storage has no effect under FSDP2" in done.stdout
    done = forked.launch(3, "dpo", file, launch_file="fsdp2.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from {out}/checkpoint-1" in done.stdout and "holds all of" not in done.stdout
    one, other = (
        [row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row] for name in ("one", "sharded")
    )
    assert len(one) == 3 and other == pytest.approx(one, abs=1e-4)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "sharded"))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_rank_holds_its_part_of_the_4_bit_base(forks, tmp_path):
    """Bytes of live tensors (bench/memory.py) where nothing is computed: 24 layers on two ranks, and half a layer beside.

    In 4 bits a layer has half a byte per weight and 4 bytes per 64 of them: 24 whole ones are as large as 3.4 of fp32.
    """
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("the extra `deepspeed` is not installed")
    memory = importlib.import_module("memory")
    model = memory.make_model(tmp_path / "model", "tiny")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    narrow = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    weights = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * inner
    whole = layers * weights * (0.5 + 4 / 64)
    embeddings, rank = 4 * 2 * config["vocab_size"] * hidden, memory.TRAININGS["qlora"]["lora_r"]
    adapter = (
        4 * layers * rank * (2 * 2 * hidden + 2 * (hidden + narrow) + 3 * (hidden + inner))
    )  # float32, and two moments
    limit = (whole + embeddings + 3 * adapter) / 2 + 2 * weights
    assert limit < whole + (embeddings + 3 * adapter) / 2  # or it could not fail
    for phases in memory.run_case("fsdp2-qlora-2", model, tmp_path / "run")["ranks"]:
        for name in ("load", "reference key", "build", "wrap"):
            assert phases[name]["tensors"] <= limit, f"{name}: {phases[name]['tensors']}, allowed {limit:.0f}"
