"""Floating-point operations per token, and the peak of a device: what MFU is computed from; and peak memory."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import torch

from rlhf.distributed.sharding import num_elements

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Dense bf16 and fp16 peak of one device in TFLOP/s, accumulating in fp32, without sparsity (of which NVIDIA's tables state the
# double), by torch's name for the device as `device_words` reduces it. Sources, all NVIDIA's unless said otherwise:
#   Blackwell  "HGX B200" and "HGX B300" (both 36 PFLOP/s with sparsity for 8 GPUs), "GB200 NVL72" and "GB300 NVL72" (5 per GPU) data
#              sheets
#   Hopper     "H100 Tensor Core GPU" (SXM 1,979, PCIe 1,513, NVL 1,671 with sparsity), "H200" (1,979; NVL 1,671) and "GH200" data
#              sheets; "H800" and "H20" product briefs (H20: 148 dense)
#   Ampere     "A100", "A30", "A40" and "A10" data sheets; "A800" product brief; A10G: AWS's data sheet as others quote it (70,
#              140 with sparsity), which was not at hand
#   Ada        "L4", "L40" and "L40S" data sheets (242, 362 and 733 with sparsity)
#   RTX        "Ampere GA102", "Ada" and "RTX Blackwell GPU Architecture" white papers, appendix A, row "Peak BF16 Tensor TFLOPS
#              with FP32 Accumulate"; RTX A-series: their data sheets; "Ada Lovelace Professional" white paper
PEAK_TFLOPS = {
    "B200": 2250, "GB200": 2500, "B300": 2250, "GB300": 2500,
    "H200": 989, "H200 NVL": 835, "H100": 989, "H100 PCIE": 756, "H100 NVL": 835, "GH200": 989, "H800": 989, "H800 PCIE": 756, "H20": 148, "H20 3E": 148,
    "A100": 312, "A100 PCIE": 312, "A800": 312, "A800 PCIE": 312, "A40": 149.7, "A30": 165, "A10": 125, "A10G": 70,
    "L4": 121, "L40": 181, "L40S": 362,
    "RTX 5090": 209.5, "RTX 5080": 112.6, "RTX 5070 TI": 87.9, "RTX 5070": 61.7,
    "RTX 4090": 165.2, "RTX 4080 SUPER": 104.4, "RTX 4080": 97.5, "RTX 4070 TI SUPER": 88.2, "RTX 4070 TI": 80.2, "RTX 4070 SUPER": 71.0, "RTX 4070": 58.3,
    "RTX 3090 TI": 80.0, "RTX 3090": 71.2,
    "RTX 6000 ADA": 364.2, "RTX A6000": 154.8, "RTX A5500": 136.4, "RTX A5000": 111.1, "RTX A4500": 94.6, "RTX A4000": 76.7,
}  # fmt: skip
# Words of a device's name that change nothing: maker, line, memory, form. Any other word makes it another device (`Laptop`, `D`,
# `MIG 1g.10gb`, the `24Q` of a virtual GPU), and an unknown one has no peak.
NO_MATTER = re.compile(r"NVIDIA|GEFORCE|TESLA|GENERATION|SXM\d?|AC|\d+GB|HBM3E?")


def device_words(name: str) -> str:
    """What tells a device from others in torch's name for it: `NVIDIA H100 80GB HBM3` is `H100`."""
    words = re.findall(r"[A-Z0-9.]+", name.upper())
    return " ".join(word for word in words if not NO_MATTER.fullmatch(word))


def peak_flops(device_name: str, dtype: torch.dtype | None = torch.bfloat16) -> float | None:
    """Peak FLOP/s of a device in the dtype that is computed in; None if unknown.

    Args:
        device_name: torch's name.
        dtype: of the matmuls. Only bf16 and fp16 have a known peak: in fp32 it depends on whether TF32 is allowed.
    """
    peak = PEAK_TFLOPS.get(device_words(device_name))
    return None if peak is None or dtype not in (torch.bfloat16, torch.float16) else peak * 1e12


def compute_dtype(args: TrainingArguments, model: torch.nn.Module) -> torch.dtype | None:
    """The dtype that a trainer's matmuls are in: autocast's, else that of most of the model's weights; None under fp8."""
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        return None
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + num_elements(parameter)
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def peak_memory_gib(device: torch.device) -> float | None:
    """The most memory that tensors took on this process's GPU so far, in GiB; None on other devices."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


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
