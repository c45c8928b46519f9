"""`rlhf preflight --gpu`: whether this machine's GPUs compute packed batches right, with which kernel, and how fast.

Needs no recipe, no data and no network: inputs and weights are random. Less than a minute per GPU. `make gpu-proof` (from a
checkout) is the long form: every model family, every launch file, and TRL beside it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlhf.errors import UserError
from rlhf.packing import kernel_name, pack_backbone
from rlhf.packing.attention import varlen_kernel
from rlhf.preflight.equality import LAYOUTS, Difference, answers_are_apart, attention_difference, model_difference
from rlhf.preflight.probes import describe_device, driver_version
from rlhf.preflight.table import Finding, Row, gib
from rlhf.training.throughput import flops_per_token, peak_flops, peak_memory_gib

HEADS = ((8, 8), (8, 2))  # query heads, key heads
HEAD_DIMS = (64, 128)
PAIR = (
    (180, 40, 55),
    (95, 20, 31),
    (260, 90, 12),
    (60, 33, 70),
    (120, 64, 64),
    (310, 25, 40),
    (85, 12, 9),
    (150, 110, 90),
)


@dataclass(frozen=True)
class StepSize:
    """A Llama with random weights, and the pairs of a step of it.

    Attributes:
        repeats: of the 8 pairs of PAIR, about 1,800 tokens packed and 4,900 padded.
        needs_gib: free memory that padded and packed steps take, by arithmetic: weights, gradients and activations.
    """

    hidden: int
    layers: int
    heads: int
    repeats: int
    needs_gib: float


STEP_SIZES = (  # the first one that fits
    StepSize(2048, 16, 32, 4, 60), StepSize(2048, 16, 32, 1, 22), StepSize(2048, 4, 32, 1, 8), StepSize(1024, 2, 16, 1, 2),
)  # fmt: skip


@dataclass(frozen=True)
class StepMeasure:
    """Forward and backward of one batch of pairs; seconds, tokens and FLOP of the packed one.

    Attributes:
        parameters: of the model.
        memory_gib: the most that tensors took in it; None where the device does not count.
    """

    parameters: int
    tokens: int
    flops: float
    seconds: float
    padded_seconds: float
    memory_gib: float | None
    padded_memory_gib: float | None


def preflight_gpu() -> None:
    """Check all visible GPUs and print one table.

    Raises:
        UserError: there is no GPU that torch can use, or one of them computes packed batches wrong; after the table.
    """
    from rlhf.preflight.preflight import print_table

    if not torch.cuda.is_available():
        problem = describe_device(0, False)["problem"] or "torch finds no GPU on this machine"
        raise UserError(f"--gpu: {problem}; without --gpu, preflight checks everything else")
    rows: list[Row] = []
    for number in range(torch.cuda.device_count()):
        rows += check_device(torch.device("cuda", number), describe_device(number, False), STEP_SIZES)
    print_table(f"{torch.cuda.device_count()} GPU(s), torch {torch.__version__}, driver {driver_version() or 'unknown'}", rows)  # fmt: skip
    findings = [finding for row in rows for finding in row.findings]
    for finding in findings:
        print(f"{finding.level:<8} {finding.found}\n{'':<8} -> {finding.fix}")
    if errors := sum(finding.level == "error" for finding in findings):
        raise UserError(f"not ready: {errors} error{'s' if errors > 1 else ''} above")
    print("Ready" + (", with warnings." if findings else "."))


def check_device(device: torch.device, found: dict, sizes: tuple[StepSize, ...]) -> list[Row]:
    """The rows of one device: what it is, its kernel, packed = padded, and a step.

    Args:
        found: what `describe_device` says of it.
        sizes: of the step, largest first; none of them fits: no step.
    """
    where = f"{device.type} {device.index or 0}"
    if found["problem"]:
        return [Row(where, found["problem"], (Finding("error", f"{where}: {found['problem']}", "free or repair it, or hide it with CUDA_VISIBLE_DEVICES"),))]  # fmt: skip
    name, free = found.get("name", "CPU"), found.get("memory", [0, 0])
    rows = [Row(where, f"{name}, {gib(free[0])} of {gib(free[1])} free"), _kernel_row(device)]
    rows += equality_rows(device)
    size = next((size for size in sizes if device.type != "cuda" or size.needs_gib * 2**30 <= free[0]), None)
    if size is None:
        return [*rows, Row("a step", f"not measured: less than {sizes[-1].needs_gib:g} GiB are free")]
    measured = measure_step(size, device, half_dtype(device))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return [*rows, step_row(measured, name, half_dtype(device))]


def _kernel_row(device: torch.device) -> Row:
    shown = kernel_name(device)
    if device.type != "cuda" or varlen_kernel(device) is not None:
        return Row("attention", shown)
    slow = Finding(
        "warning", f"{device.type} {device.index or 0}: packed attention runs {shown}, several calls in each layer",
        "its varlen kernels need compute capability 8.0 (A100, RTX 30 or newer) and torch 2.11, or the package flash_attn",
    )  # fmt: skip
    return Row("attention", shown, (slow,))


def half_dtype(device: torch.device) -> torch.dtype:
    """bf16, or fp16 on GPUs that only emulate it."""
    older = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if older else torch.bfloat16


def equality_rows(device: torch.device) -> list[Row]:
    """Packed against padded: attention in half precision and fp32, the other answer's influence, a small model."""
    half = half_dtype(device)
    differences = [
        attention_difference(lengths, dtype, device, *heads, dim)
        for dtype in (half, torch.float32) for heads in HEADS for dim in HEAD_DIMS for lengths in LAYOUTS.values()
    ]  # fmt: skip
    apart = answers_are_apart(half, device)
    findings = _unequal(differences, device)
    if not apart:
        findings += (
            _wrong(f"{device.type} {device.index or 0}: the chosen answer changes the rejected one's attention"),
        )
    rows = [Row("packed = padded", f"attention: {_words(differences)}", findings)]
    models = [model_difference(small_llama(64, 2, 4), *pairs(1, 256), "pairs", dtype, device) for dtype in (half, torch.float32)]  # fmt: skip
    return [*rows, Row("packed = padded", f"a Llama: {_words(models)}", _unequal(models, device))]


def _words(differences: list[Difference]) -> str:
    worst = max(differences, key=lambda d: d.packed / d.allowed if d.packed == d.packed else float("inf"))
    return (
        f"{sum(d.equal for d in differences)} of {len(differences)} cases; at worst off by {worst.packed:.1e}, padded by "
        f"{worst.padded:.1e} ({worst.what}, {worst.worst})"
    )


def _unequal(differences: list[Difference], device: torch.device) -> tuple[Finding, ...]:
    wrong = [d for d in differences if not d.equal]
    if not wrong:
        return ()
    first = wrong[0]
    return (
        _wrong(
            f"{device.type} {device.index or 0}: packed is off by {first.packed:.1e} where padded is off by {first.padded:.1e} "
            f"({first.what}, {first.worst}), and {len(wrong) - 1} more cases"
        ),
    )


def _wrong(found: str) -> Finding:
    return Finding("error", found, "train with `packing: false` on this machine, and report this table")


# --- a step ----------------------------------------------------------------------------------------------------------


def small_llama(hidden: int, layers: int, heads: int, device: str | torch.device = "cpu") -> torch.nn.Module:
    """The decoder of a Llama with grouped-query attention and random weights, in the default dtype."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=32_000 if hidden >= 1024 else 256, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4, max_position_embeddings=4096,
        initializer_range=0.02 if hidden >= 1024 else 0.2,  # a small one: so large that an error in attention shows
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaModel(config).train()


def pairs(repeats: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), each (16 * repeats, L): right-padded rows of random tokens, the chosen ones first."""
    draw = torch.Generator().manual_seed(2)
    chosen, rejected = [], []
    for p, c, r in PAIR * repeats:
        prompt, *answers = (torch.randint(1, vocabulary, (n,), generator=draw) for n in (p, c, r))
        chosen.append(torch.cat([prompt, answers[0]]))
        rejected.append(torch.cat([prompt, answers[1]]))
    rows = chosen + rejected
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()


def measure_step(size: StepSize, device: torch.device, dtype: torch.dtype, times: int = 3) -> StepMeasure:
    """Forward and backward of a batch of pairs through a Llama, padded and packed: the fastest of `times`, after one more."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = small_llama(size.hidden, size.layers, size.heads, device)
    finally:
        torch.set_default_dtype(default)
    vocabulary: int = model.config.vocab_size  # type: ignore[assignment, union-attr]
    ids, mask = (x.to(device) for x in pairs(size.repeats, vocabulary))

    def step(model: torch.nn.Module) -> None:
        hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()

    padded_seconds, padded_memory = _timed(lambda: step(model), device, times)
    pack_backbone(model, "pairs")
    seconds, memory = _timed(lambda: step(model), device, times)
    tokens = sum(map(sum, PAIR)) * size.repeats
    parameters, flops = sum(p.numel() for p in model.parameters()), flops_per_token(model) * tokens
    return StepMeasure(parameters, tokens, flops, seconds, padded_seconds, memory, padded_memory)


def _timed(step: Callable[[], None], device: torch.device, times: int) -> tuple[float, float | None]:
    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step()
    best = float("inf")
    for _ in range(times):
        synchronize()
        started = time.perf_counter()
        step()
        synchronize()
        best = min(best, time.perf_counter() - started)
    return best, peak_memory_gib(device)


def step_row(found: StepMeasure, name: str, dtype: torch.dtype) -> Row:
    """What a step took, in words."""
    peak = peak_flops(name, dtype)
    mfu = (
        f"MFU {found.flops / found.seconds / peak:.0%}" if peak else f"{found.flops / found.seconds / 1e12:.1f} TFLOP/s"
    )
    memory = ""
    if found.memory_gib is not None and found.padded_memory_gib is not None:
        memory = f"; {found.memory_gib:.1f} GiB, padded {found.padded_memory_gib:.1f} GiB"
    return Row(
        "a step",
        f"{found.parameters / 1e6:,.0f} M parameters, {found.tokens:,} packed tokens: {found.tokens / found.seconds:,.0f} tokens/s, "
        f"{mfu}, {found.padded_seconds / found.seconds:.1f}x padded{memory}",
    )
