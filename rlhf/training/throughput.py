"""Floating-point operations per token, and the peak of a device: what MFU is computed from."""

from __future__ import annotations

from rlhf.distributed.sharding import num_elements

# Dense bf16 peak of one device, FLOP/s, from NVIDIA's data sheets (no sparsity; SXM if there are several). The first
# key that occurs in the device's name applies.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10G": 70e12, "A10": 125e12, "A40": 150e12, "A30": 165e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device, by torch's name for it; None if unknown."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def flops_per_token(model) -> float:
    """Floating-point operations per token in training: per weight 2 forward and 2 backward, 2 more if it is trained.

    The input embedding is a look-up and counts only if tied to the LM head. Attention scores are not counted (a few
    percent at short lengths), nor is the recomputation of gradient checkpointing: this is the model's utilisation
    (MFU), not the hardware's. Source: PaLM, arXiv:2204.02311, appendix B; for LoRA, no gradients of frozen weights.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    looked_up = set() if head is not None and head.weight is embedding.weight else set(embedding.parameters())
    weights = [p for p in model.parameters() if p not in looked_up]
    return 4.0 * sum(map(num_elements, weights)) + 2.0 * sum(num_elements(p) for p in weights if p.requires_grad)
