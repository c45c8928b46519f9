"""QLoRA under FSDP2, whose ranks hold their part of the 4-bit base: stopped, resumed on more ranks, finished merged."""

import forked
import pytest
import torch
from safetensors.torch import load_file

from rlhf.runs.metrics import read_metrics

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
