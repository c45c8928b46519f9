"""Keys and configurations that change how a model computes or what it keeps: packed = padded under each of them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny_models import LONGEST, UNEVEN, assert_same, gradients_of, hidden_and_gradients, tiny_model
from transformers import CONFIG_MAPPING

from rlhf.packing import backbone as packing
from rlhf.packing import pack_backbone

ROPE = {
    "linear": {"factor": 2.0}, "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 4},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 4},
    "longrope": {"factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0, 2.5, 3.0, 4.0], "original_max_position_embeddings": 4},
}  # fmt: skip


def scaled(kind):
    """Beyond the positions that the model would have been trained with at first: 4."""
    positions = 4 if kind == "dynamic" else 64
    return tiny_model(
        "llama", rope_parameters={"rope_type": kind, "rope_theta": 1e4} | ROPE[kind], max_position_embeddings=positions
    )


@pytest.mark.parametrize("kind", ROPE)
def test_scaled_positions(kind):
    """dynamic and longrope scale by the longest row of a batch, so that this one has no padding beyond it."""
    ids, mask = (part[:, :LONGEST] for part in UNEVEN)
    model, plain = scaled(kind), tiny_model("llama")
    expected = hidden_and_gradients(copy.deepcopy(model), ids, mask)
    assert not torch.allclose(expected[0], hidden_and_gradients(plain, ids, mask)[0], atol=1e-2)  # it does something
    pack_backbone(model, "pairs")
    assert_same(hidden_and_gradients(model, ids, mask), expected)


def test_longrope_depends_on_the_batch():
    """Why DPO refuses it where rows come on both sides of the limit: a row of 3 tokens beside one of 3, and beside one of 8."""
    model = scaled("longrope").eval()
    ids, mask = UNEVEN[0][[3, 1]], UNEVEN[1][[3, 1]]
    alone = hidden_and_gradients(model, ids[:1, :3], mask[:1, :3])[0]
    beside = hidden_and_gradients(model, ids, mask)[0][:3]
    assert (alone - beside).abs().max() > 1e-2


MIXTURES = [
    name for name in sorted(packing.VERIFIED) if "num_experts_per_tok" in CONFIG_MAPPING[name].__dataclass_fields__
]


def test_there_are_mixtures():
    assert {"deepseek_v3", "mixtral", "qwen3_moe", "glm4_moe", "olmoe"} <= set(MIXTURES)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_implementations(model_type, implementation):
    model = tiny_model(model_type)
    model.set_experts_implementation("eager")
    expected = hidden_and_gradients(copy.deepcopy(model), *UNEVEN)
    model.set_experts_implementation(implementation)
    pack_backbone(model, "pairs")
    assert packing.find_backbone(model).config._experts_implementation == implementation
    assert_same(hidden_and_gradients(model, *UNEVEN), expected)


@pytest.mark.parametrize(
    "options", [{"offload": True}, {"every_n_layers": 2}, {"every_n_layers": 2, "offload": True}], ids=str
)
@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "opt"])
def test_checkpointing_options(model_type, options, monkeypatch):
    """Offloading copies from one host memory to the other here, as there is no pinned memory without a GPU."""
    from transformers import modeling_utils

    saved = []

    def save_on_cpu(pin_memory, device_type):
        saved.append(device_type)
        return torch.autograd.graph.save_on_cpu(pin_memory=False)

    monkeypatch.setattr(modeling_utils, "save_on_cpu", save_on_cpu)
    model = tiny_model(model_type)
    expected = hidden_and_gradients(copy.deepcopy(model), *UNEVEN)
    model.activation_checkpointing_enable(**options)
    model.enable_input_require_grads()
    pack_backbone(model, "pairs")
    assert_same(hidden_and_gradients(model, *UNEVEN), expected)
    assert len(saved) == (
        len(packing.find_backbone(model).layers) // options.get("every_n_layers", 1) if "offload" in options else 0
    )


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "gemma3_text"])
def test_activation_offloading(model_type, monkeypatch):
    """TRL's own context, which copies what the backward pass needs: here from the CPU as if that were a GPU."""
    from trl.models.activation_offloading import OffloadActivations

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args, **kwargs: torch.device("cpu"))
    model = tiny_model(model_type)
    expected = hidden_and_gradients(copy.deepcopy(model), *UNEVEN)
    pack_backbone(model, "pairs", LONGEST)
    offloading = OffloadActivations(use_pin_memory=False, use_streams=False, min_offload_size=1)
    offloading.device_module = SimpleNamespace(**vars(torch.cpu), empty_cache=lambda: None)
    packs, pack_hook = [], offloading.pack_hook
    offloading.pack_hook = lambda tensor: packs.append(pack_hook(tensor)) or packs[-1]
    with offloading:
        hidden = packing.find_backbone(model)(
            input_ids=UNEVEN[0], attention_mask=UNEVEN[1], use_cache=False
        ).last_hidden_state
        hidden = hidden[UNEVEN[1].bool()]
        hidden.backward(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)))
    assert_same((hidden.detach(), gradients_of(model)), expected)
    assert packs


@pytest.mark.slow
def test_compiling_packed_rows_builds_anew_for_each_length():
    """Why `torch_compile` is refused with packing: the graph of a packed batch does not serve the next one."""
    import torch._dynamo

    builds = []

    def count(graph, inputs):
        builds.append(len(graph.graph.nodes))
        return graph.forward

    found = {}
    for packed in (True, False):
        torch._dynamo.reset()
        model = tiny_model("llama", num_hidden_layers=1).eval()
        if packed:
            pack_backbone(model, "pairs")
        compiled = torch.compile(model, backend=count)
        numbers = []
        for lengths in ((3, 5), (4, 7), (2, 6), (5, 8), (6, 9)):
            ids = torch.tensor([[5, 6, *range(10, 10 + n)] + [0] * (9 - n) for n in lengths])
            builds.clear()
            with torch.no_grad():
                compiled(input_ids=ids, attention_mask=(ids != 0).long(), use_cache=False)
            numbers.append(len(builds))
        found[packed] = numbers
    torch._dynamo.reset()
    assert sum(found[False][2:]) == 0, found  # padded to one length: built once
    assert sum(found[True][1:]) > 0, found
