"""The code that a GPU would run, from the first to the last line of a training, on fake tensors: no GPU is needed.

What is made sure: tensors are on one device, operations exist for their dtypes, matrices are multiplied in bf16, packed
attention is torch's varlen kernel forward and backward, and the CPU waits for the GPU where EXPECTED says and nowhere else.
Values are not: those are tests/packing's, on a CPU, and `make gpu-proof`'s, on a GPU.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TRACE = Path(__file__).parent / "trace.py"
STEPS = 2
LORA = {"use_peft": True, "lora_r": 4}
VARLEN = {"torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"}
# Where the CPU waits for the GPU in a run of STEPS steps, whatever the number of micro-batches.
EXPECTED = {
    "_to_copy training/deferred.py:read": STEPS,  # all metrics of a step, at once
    "_local_scalar_dense transformers/trainer.py:_run_epoch": STEPS,  # transformers logs the loss
    "_local_scalar_dense transformers/trainer.py:_finalize_training": 1,
}
FIRST = {"dpo, LoRA, cached reference": ("dpo", {"reference": "cached", **LORA})}
MORE = {
    "reward, full": ("reward", {}),
    "sft, LoRA": ("sft", LORA),
    "dpo, LoRA, online reference": ("dpo", {"reference": "online", **LORA}),
    "dpo, full, online reference": ("dpo", {"reference": "online"}),
    "dpo, full, cached reference": ("dpo", {}),
    "dpo, gradient checkpointing": ("dpo", {"gradient_checkpointing": True, **LORA}),
    "dpo, IPO and length-normalised": ("dpo", {"loss_type": ["ipo"], **LORA}),
    "reward, LoRA": ("reward", LORA),
    "sft, full": ("sft", {}),
}
PLANTS = {"waits": "wait", "another device": "cpu", "another dtype": "dtype"}


def run(jobs, model, data, folder):
    """trace.py's results of jobs {name: (stage, values, plant)}, by name."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++, which compiles the stand-in for a device")
    common = {
        "model_name_or_path": model, "dataset_name": data, "eval_dataset_name": data, "max_eval_examples": 4,
        "eval_strategy": "steps", "eval_steps": 1000, "bf16": True,
        "max_length": 512, "global_batch_size": 8, "max_tokens_per_device": 512, "max_steps": STEPS, "learning_rate": 1e-5,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    given = [
        {"name": name, "stage": stage, "plant": plant, "values": common | {"output_dir": str(folder / name)} | values}
        for name, (stage, values, plant) in jobs.items()
    ]
    environment = os.environ | {"RLHF_CACHE": str(folder / "cache"), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(TRACE)],
        input=json.dumps(given),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def traces(tiny_llama, few_pairs, tmp_path_factory):
    return run({k: (*job, "") for k, job in FIRST.items()}, tiny_llama, few_pairs, tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def more_traces(tiny_llama, few_pairs, tmp_path_factory):
    jobs = {name: (*job, "") for name, job in MORE.items()}
    jobs |= {name: ("sft", LORA, plant) for name, plant in PLANTS.items()}
    return run(jobs, tiny_llama, few_pairs, tmp_path_factory.mktemp("cuda"))


def check(found, cached=False):
    assert "error" not in found, found
    train = found["train"]
    assert train["waits"] == EXPECTED
    assert set(train["matmuls"]) == {"bfloat16 x bfloat16"} and set(train["attention"]) == VARLEN
    assert train["gradients"] == ["cuda:0 torch.float32"] and train["without_gradient"] == 0
    if cached:
        assert set(found["build"]["matmuls"]) == {"bfloat16 x bfloat16"}
        assert set(found["build"]["attention"]) == {"torch_attn::_varlen_attn"}
        assert list(found["build"]["waits"]) == ["_to_copy training/reference.py:forward_logps"]
    evaluation = found["evaluation"]
    assert set(evaluation["matmuls"]) == {"bfloat16 x bfloat16"}
    assert set(evaluation["attention"]) == {"torch_attn::_varlen_attn"}
    assert {line.split()[1] for line in evaluation["waits"]} <= {
        "training/deferred.py:read", "training/trainer.py:evaluation_loop",
    }  # fmt: skip


@pytest.mark.parametrize("name", FIRST)
def test_a_training(name, traces):
    check(traces[name], cached="cached" in name)


@pytest.mark.slow
@pytest.mark.xdist_group("fake GPU")
@pytest.mark.parametrize("name", MORE)
def test_more_trainings(name, more_traces):
    check(more_traces[name], cached="cached" in name)


@pytest.mark.slow
@pytest.mark.xdist_group("fake GPU")
def test_a_wait_is_seen(more_traces):
    extra = dict(more_traces["waits"]["train"]["waits"])
    planted = extra.pop("_local_scalar_dense packing/backbone.py:wrapper")
    assert planted > STEPS and extra == EXPECTED  # one per micro-batch


@pytest.mark.slow
@pytest.mark.xdist_group("fake GPU")
def test_another_device_is_seen(more_traces):
    assert "found at least two devices, cuda:0 and cpu" in more_traces["another device"]["error"]


@pytest.mark.slow
@pytest.mark.xdist_group("fake GPU")
def test_another_dtype_is_seen(more_traces):
    assert "float32 x float32" in more_traces["another dtype"]["train"]["matmuls"]
