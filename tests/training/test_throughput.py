"""Floating point operations a token, by hand, and the peaks of known devices."""

import pytest

from rlhf.distributed.sharding import num_elements
from rlhf.training.throughput import flops_per_token, peak_flops


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
    import torch
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(128, 64, bias=False)
    layer.weight.data = torch.randn(64, 128)
    layer.to("cpu")
    layer(torch.randn(1, 128))
    assert layer.weight.numel() < 64 * 128 and num_elements(layer.weight) == 64 * 128


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
     ("NVIDIA A10G", 70e12), ("NVIDIA L40S", 362e12), ("Tesla T4", None)],
)  # fmt: skip
def test_peaks(name, peak):
    assert peak_flops(name) == peak
