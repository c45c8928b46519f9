"""The memory law: in every phase a rank holds its engine's share of the model, plus a constant.

Counted are the bytes of live tensors (bench/memory.py), not the process's memory: two runs need the same. The model has
24 layers, is split over two ranks, and the constant is at most 6 layers (`allowed`). Who gathers the model holds 12 layers
more than its share.
"""

import functools
import importlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "bench"))  # its scripts import each other
memory = importlib.import_module("memory")
PHASES = memory.PHASES
CASES = ("zero3-full-2", "fsdp2-full-2", "zero3-lora-2", "fsdp2-lora-2")
# What there is beside the weights, in multiples of a rank's share of what is trained: under ZeRO-3 master weights and
# gradients from the wrapping on, under FSDP2 gradients in a step; then Adam's two moments. What a resume reads goes from the
# files to where it belongs.
STATE = {
    "zero3": {"wrap": 2, "step": 4, "checkpoint": 4, "resume": 4, "finish": 4},
    "fsdp2": {"wrap": 0, "step": 3, "checkpoint": 2, "resume": 2, "finish": 3},
}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return memory.make_model(tmp_path_factory.mktemp("memory") / "model", "tiny")


@pytest.fixture(scope="session")
def results():
    """What `run` has found, by case: each runs once."""
    return {}


@pytest.fixture
def run(model, results, forks, tmp_path):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("the extra `deepspeed` is not installed")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++, with which DeepSpeed compiles what its processes on a CPU talk through")

    def run_once(case):
        if case not in results:
            results[case] = memory.run_case(case, model, tmp_path / case)
        return results[case]["ranks"]

    return run_once


def sizes(model: str) -> dict[str, int]:
    """Bytes in fp32 of the model, a layer, the embedding with the LM head, and the adapter and hidden states of all layers."""
    config = json.loads((Path(model) / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    narrow = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    matrices = [(hidden, hidden)] * 2 + [(hidden, narrow)] * 2 + [(hidden, inner)] * 3
    rank = memory.TRAININGS["lora"]["lora_r"]
    return {
        "model": memory.model_bytes(model),
        "layer": 4 * sum(a * b for a, b in matrices),
        "embeddings": 4 * 2 * config["vocab_size"] * hidden,
        "adapter": 4 * layers * rank * sum(a + b for a, b in matrices),
        "hidden": 4 * layers * memory.MAX_TOKENS * hidden,
    }


def allowed(model: str, case: str, phase: str) -> int:
    """The share plus the constant, in bytes."""
    launch, training, processes = case.split("-")
    size = sizes(model)
    trained = size["model"] if training == "full" else size["adapter"]
    weights = size["model"] + (trained if training == "lora" else 0)
    state = trained * STATE[launch].get(phase, 0)
    if phase == "evaluate":  # each rank has rows of its own, and one model at a time, which is spread over its own GPUs
        processes, state = "1", 0
    return (weights + state) // int(processes) + constant(size, training, phase)


def constant(size: dict[str, int], training: str, phase: str) -> int:
    """Three layers (two gathered, and the gradient of one), and the embedding and the LM head with their gradients.

    In a step gradient checkpointing keeps the hidden states between layers. A checkpoint of full fine-tuning and a resume from
    it gather nothing: half a layer, which the embedding alone is more than.
    """
    if training == "full" and phase in ("checkpoint", "resume"):
        return size["layer"] // 2
    return 3 * size["layer"] + 2 * size["embeddings"] + (size["hidden"] if phase == "step" else 0)


def broken(model: str, case: str, phase: str, ranks) -> list[str]:
    """What each rank holds too much of."""
    limit, layer = allowed(model, case, phase), sizes(model)["layer"]
    return [
        f"rank {rank}: {phases[phase]['tensors'] / layer:.1f} layers, allowed {limit / layer:.1f}"
        for rank, phases in enumerate(ranks)
        if phases[phase]["tensors"] > limit
    ]


def each_phase():
    for case in CASES:
        for phase in PHASES:
            yield pytest.param(case, phase, marks=[pytest.mark.xdist_group(f"memory {case}"), pytest.mark.slow])


@pytest.mark.parametrize(("case", "phase"), each_phase())
def test_a_rank_holds_its_share(case, phase, run, model):
    assert not broken(model, case, phase, run(case))


@pytest.mark.parametrize("case", CASES)
def test_a_gathered_model_is_more_than_the_constant(case, model):
    size = sizes(model)
    for phase in PHASES:
        limit, beyond = allowed(model, case, phase), constant(size, case.split("-")[1], phase)
        ranks = [{phase: {"tensors": limit}}, {phase: {"tensors": limit - beyond + size["model"] // 2}}]
        (found,) = broken(model, case, phase, ranks)
        assert found.startswith("rank 1: ")


def test_live_tensors_are_counted_once(tmp_path):
    """Views are not counted again, freed and resized storages are followed, mapped ones count as parameters."""
    import torch
    from live_tensors import LiveTensors
    from safetensors.torch import load_file, save_file

    save_file({"w": torch.zeros(1000)}, tmp_path / "x.safetensors")
    live = LiveTensors()

    def peak(phase, make):
        live.phase = phase
        kept = make()
        live.note()
        return live.peaks[phase], kept

    resize = torch.UntypedStorage.resize_
    with live:
        found, first = peak("first", lambda: torch.zeros(1000))
        assert found == 4000
        found, view = peak("view", lambda: first.view(10, 100)[2:].t())
        assert found == 4000
        found, _ = peak("freed at once", lambda: torch.zeros(500).sum() + 1)
        assert 6000 < found <= 6100
        del view
        found, _ = peak("resized", lambda: first.untyped_storage().resize_(0))
        assert found < 4100  # the peak: where it still had its 4000
        found, _ = peak("empty", lambda: None)
        assert found < 100
        found, mapped = peak("mapped", lambda: load_file(tmp_path / "x.safetensors"))
        assert found < 100
        found, module = peak("parameter", functools.partial(module_of, mapped["w"]))
        assert 4000 <= found < 4100
        mapped.clear()
        del module
        found, _ = peak("nothing", lambda: None)
        assert found < 100
    assert torch.UntypedStorage.resize_ is resize


def module_of(weight):
    import torch

    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight)
    return module
