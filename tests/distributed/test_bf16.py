"""bf16, as GPUs train: DPO starts at its reference under every launch file, and what is written is what was trained."""

import json
import math
import shutil

import pytest
from test_ddp import launch

from rlhf.runs.metrics import read_metrics

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("launch_file", "values"),
    [
        ("ddp.yaml", {"use_peft": True}),
        ("zero2.yaml", {"use_peft": True}),
        ("fsdp2.yaml", {"use_peft": True}),
        pytest.param("zero3.yaml", {}, marks=slow),
        pytest.param("fsdp2.yaml", {}, marks=slow),
        pytest.param("zero3.yaml", {"use_peft": True, "load_in_4bit": True}, marks=slow),
        pytest.param("fsdp2.yaml", {"use_peft": True, "load_in_4bit": True}, marks=slow),
    ],
)
def test_dpo(launch_file, values, recipe, llama_64, few_pairs, tmp_path):
    """transformers cast the cached log-probabilities to bf16 under DeepSpeed (-1021 to -1024 nats), and accelerate's FSDP2
    the policy's: the loss then starts up to 0.07 from ln 2. What stays is the rounding of bf16 weights."""
    if launch_file.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
        if shutil.which("g++") is None:
            pytest.skip("there is no g++, with which DeepSpeed compiles what its processes on a CPU talk through")
    if "load_in_4bit" in values:
        pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    out = tmp_path / "out"
    file = recipe("dpo", model_name_or_path=llama_64, dataset_name=few_pairs, output_dir=str(out), bf16=True, max_steps=2,
                  learning_rate=1e-5, **({"lora_r": 4, "lora_target_modules": "all-linear"} if values else {}), **values)  # fmt: skip
    launch(2, "dpo", file, launch_file=launch_file)
    first = read_metrics(out)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-2)
    assert max(abs(first[f"rewards/{side}"]) for side in ("chosen", "rejected")) < 0.02
    complete = json.loads((out / "complete.json").read_text())
    difference = complete["max_logit_difference"]  # None: a sharded adapter, compared tensor by tensor
    assert difference is None or difference <= 5e-2 * max(1.0, complete["max_logit"])
