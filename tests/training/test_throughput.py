"""Floating point operations a token, by hand, and the peaks of known devices."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rlhf.training.step_metrics
from rlhf.__main__ import main
from rlhf.distributed.sharding import num_elements
from rlhf.evaluation.finished_runs import read_run
from rlhf.evaluation.report import stage_facts
from rlhf.runs.metrics import read_metrics
from rlhf.training.throughput import compute_dtype, flops_per_token, peak_flops, peak_memory_gib


def test_flops_by_hand(tiny_llama, tiny_distilbert):
    """Full: 6 a weight. LoRA: 4 a weight, 2 more for each of the adapter's."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    # a layer: q 32x32, k and v 16x32, o 32x32; gate, up, down 32x64; 2 norms of 32; tied embedding 600x32; last norm
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32) + 600 * 32 + 32
    assert flops_per_token(model) == 6 * weights
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    adapter = 2 * 4 * (32 + 32)
    assert flops_per_token(model) == 4 * (weights + adapter) + 2 * adapter
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    assert flops_per_token(model) == 6 * (weights - 600 * 32 + 32)  # the embedding is a look-up; a head of 32


def test_4_bit_weights_count_whole(tiny_llama):
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(128, 64, bias=False)
    layer.weight.data = torch.randn(64, 128)
    layer.to("cpu")
    layer(torch.randn(1, 128))
    assert layer.weight.numel() < 64 * 128 and num_elements(layer.weight) == 64 * 128


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
     ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA B300 SXM6 AC", 2250),
     ("NVIDIA H800", 989), ("NVIDIA H800 PCIe", 756), ("NVIDIA H20", 148), ("NVIDIA H20-3e", 148),
     ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A800-SXM4-80GB", 312),
     ("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA A40", 149.7), ("NVIDIA A30", 165),
     ("NVIDIA RTX A4000", 76.7), ("NVIDIA RTX A6000", 154.8), ("NVIDIA RTX 6000 Ada Generation", 364.2),
     ("NVIDIA GeForce RTX 3090", 71.2), ("NVIDIA GeForce RTX 3090 Ti", 80), ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 5090", 209.5)],
)  # fmt: skip
def test_peaks(name, peak):
    assert peak_flops(name) == peak_flops(name, torch.float16) == peak * 1e12
    assert peak_flops(name, torch.float32) is None and peak_flops(name, None) is None


@pytest.mark.parametrize(
    "name",
    ["Tesla T4", "NVIDIA RTX A3000 Laptop GPU", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
     "NVIDIA A10-24Q", "NVIDIA H100 80GB HBM2e", "NVIDIA RTX 4000 Ada Generation", "NVIDIA A100X", "AMD Instinct MI300X", "", "H"],
)  # fmt: skip
def test_a_device_that_only_looks_like_a_known_one_has_no_peak(name):
    assert peak_flops(name) is None


def test_the_dtype_that_is_computed_in(tiny_llama, monkeypatch):
    from transformers import AutoModelForCausalLM

    half, full = SimpleNamespace(bf16=True, fp16=False), SimpleNamespace(bf16=False, fp16=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert compute_dtype(half, model) == torch.bfloat16 and compute_dtype(full, model) == torch.float32
    assert compute_dtype(SimpleNamespace(bf16=False, fp16=True), model) == torch.float16
    assert compute_dtype(full, model.to(torch.bfloat16)) == torch.bfloat16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert compute_dtype(half, model) is None


def test_peak_memory_is_logged(recipe, tiny_llama, few_pairs, tmp_path, monkeypatch):
    """As on a GPU; a CPU has no such number."""
    assert peak_memory_gib(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert peak_memory_gib(torch.device("cuda", 0)) == 3.0
    for name, memory in (("cpu", None), ("gpu", 3.0)):
        monkeypatch.setattr(rlhf.training.step_metrics, "peak_memory_gib", lambda device, memory=memory: memory)
        out = tmp_path / name
        values = dict(model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(out), global_batch_size=4)
        file = recipe("reward", name=name, max_tokens_per_device=4096, max_steps=1, **values)
        text = [line for line in Path(file).read_text().splitlines(keepends=True) if "per_device_train" not in line]
        Path(file).write_text("".join(text))
        assert main(["reward", file]) == 0
        assert read_metrics(out)[0].get("peak_memory_gib") == memory
    run = read_run(out)
    assert ("peak GPU memory", "3.0 GiB") in stage_facts(run, {"reward": run})
