"""bench/scale.py: its formulas by hand, the simulation on a few pairs, and real processes against the formulas."""

import functools
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = {"hidden_size": 8, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 4,
         "num_key_value_heads": 1, "vocab_size": 100, "tie_word_embeddings": False}  # fmt: skip


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import scale

    return scale


# --- formulas --------------------------------------------------------------------------------------------------------


def test_ring_bytes(scale):
    assert scale.ring_bytes("all-gather", 100, 4) == 75  # 3 of 4 parts
    assert scale.ring_bytes("reduce-scatter", 100, 4) == 75
    assert scale.ring_bytes("all-reduce", 100, 4) == 150  # both of them
    assert scale.ring_bytes("all-reduce", 100, 2) == 100
    assert scale.ring_bytes("broadcast", 100, 4) == 100
    assert scale.ring_bytes("all-reduce", 100, 1) == scale.ring_bytes("broadcast", 100, 1) == 0
    assert scale.sent({"all-reduce": 100, "all-gather": 200}, 4) == 150 + 150


def test_bytes_of_the_paper(scale):
    """4 processes, 1,000 bytes of weights: a pass of all is 750. LoRA trains 100 of them: 75."""
    full = lambda launch, micro: scale.zero_bytes(launch, 1000, 1000, 4, micro)  # noqa: E731
    assert full("ddp", 1) == full("zero1", 1) == full("zero2", 1) == 2 * 750
    assert full("ddp", 2) == full("zero1", 2) == 2 * 750 and full("zero2", 2) == 3 * 750
    assert full("zero3", 1) == full("fsdp2", 1) == 3 * 750  # 1.5 times DDP (7.2.2)
    assert full("zero3", 2) == full("fsdp2", 2) == 6 * 750
    assert scale.zero_bytes("ddp", 100, 1000, 4) == 2 * 75
    assert scale.zero_bytes("zero3", 100, 1000, 4) == 2 * 750 + 75
    assert scale.zero_bytes("zero3", 100, 1000, 1) == scale.zero_bytes("ddp", 100, 1000, 1) == 0


def llama_parameters(trained):
    """Embedding 400 bytes, head 400, last norm 2; a layer: q 20, k 10, v 10, down 60, norm 1, LoRA 5 if asked."""
    big, layer = 200_000, "model.layers.0."
    found = [("embed_tokens", 400, big), ("lm_head", 400, big), ("model.norm.weight", 2, 100), (layer + "norm", 1, 100)]
    found += [(f"{layer}self_attn.{x}_proj.base_layer.weight", n, big) for x, n in (("q", 20), ("k", 10), ("v", 10))]
    found += [(layer + "mlp.down_proj.base_layer.weight", 60, big)]
    found = [(name, size, elements, trained == "full") for name, size, elements in found]
    return found + ([(layer + "lora_A", 5, 4096, True)] if trained == "lora" else [])


@pytest.mark.parametrize(
    ("launch", "trained", "micro", "gathered", "reduced"),
    [  # all 903, with LoRA 908; two processes send half of what is gathered or reduced
        ("ddp", "full", 2, 903, 903),  # an all-reduce
        ("zero1", "full", 2, 903, 2 * 903),
        ("zero2", "full", 2, 903, 2 * 2 * 903),
        ("zero2", "lora", 1, 5, 2 * 5),
        ("fsdp2", "full", 1, 2 * 903 - 402, 903),  # the head and the last norm once
        ("fsdp2", "full", 2, 2 * (2 * 903 - 402), 2 * 903),
        ("fsdp2", "lora", 1, 2 * 908 - 402, 5),
    ],
)
def test_bytes_as_built(scale, launch, trained, micro, gathered, reduced):
    found = scale.built_bytes(launch, llama_parameters(trained), 2, micro)
    assert found == (gathered + reduced) / 2


def test_parameters_of_known_models(scale):
    """As counted in the published Llama 3 checkpoints, and by PEFT for rank 16 on all linear layers of the 8B."""
    assert scale.count_parameters(scale.SHAPES["llama-1b"]) == 1_235_814_400
    assert scale.count_parameters(scale.SHAPES["llama-8b"]) == 8_030_261_248
    assert scale.count_parameters(scale.SHAPES["llama-70b"]) == 70_553_706_496
    assert scale.count_lora(scale.SHAPES["llama-8b"], 16) == 41_943_040


def test_memory_of_the_paper(scale):
    """The ZeRO paper's figure 1: 7.5 B parameters on 64 GPUs take 120, 31.4, 16.6 and 1.9 GB."""
    found = [scale.state_bytes(launch, 7.5e9, 0, 64) / 1e9 for launch in ("ddp", "zero1", "zero2", "zero3")]
    assert found == pytest.approx([120, 31.40625, 16.640625, 1.875])
    assert scale.state_bytes("ddp", 10, 1000, 4) == 16 * 10 + 2 * 1000
    assert scale.state_bytes("zero2", 10, 1000, 4) == 2 * 10 + 14 * 10 / 4 + 2 * 1000
    assert scale.state_bytes("zero3", 10, 1000, 4) == (160 + 2000) / 4


def test_formulas_of_a_small_model(scale):
    """Hidden 8, inner 24, 2 heads of 4, 1 key head: the matrices of a layer have 64 + 32 + 32 + 64 + 3 x 192 = 768."""
    assert sum(a * b for a, b in scale.layer_shapes(SMALL)) == 768
    assert scale.count_parameters(SMALL) == 2 * (768 + 2 * 8) + 2 * 100 * 8 + 8 == 3176
    assert scale.count_lora(SMALL, 3) == 2 * 3 * (16 + 12 + 12 + 16 + 3 * 32) == 912
    working = 2 * 2 * 8 * 10 + 34 * 8 * 10 + 4 * 1024 * 100  # inputs of layers, one layer, logits
    assert scale.working_bytes(SMALL, 10, gathered=False) == working
    assert scale.working_bytes(SMALL, 10, gathered=True) == working + 2 * (2 * 768 + 8 * 100)
    attention = 12 * 2 * 8 * 5  # layers x width x sequence
    assert scale.step_flops(SMALL, 10, 5) == 10 * (6 * (3176 - 800) + attention)
    assert scale.step_flops(SMALL, 10, 5, lora=912) == 10 * (4 * (3176 - 800) + 6 * 912 + attention)
    tied = SMALL | {"tie_word_embeddings": True}  # looked up, and multiplied as the head
    assert scale.step_flops(tied, 10, 5) == 10 * (6 * 2376 + attention)


def test_efficiency(scale):
    assert scale.efficiency(3.0, 1.0, 0.0) == (0.75, 1.0)
    assert scale.efficiency(1.0, 2.0, 0.0) == (1 / 3, 0.5)
    assert scale.efficiency(2.0, 1.0, 0.5) == (2 / 4, 2 / 3)  # the fullest computes 3 seconds


def test_plan(scale):
    """LoRA of the 8B under DDP: 2 x 7/8 of 2 bytes x 41.9 M, within a node at 450 GB/s."""
    found = scale.plan(scale.SHAPES["llama-8b"], "lora", "ddp", 8, imbalance=0.1)
    assert found["traffic"] == 2 * 7 / 8 * 2 * 41_943_040
    assert found["slow_s"] == found["fast_s"] == pytest.approx(found["traffic"] / 450e9)
    flops = 16384 * (4 * (8_030_261_248 - 128256 * 4096) + 6 * 41_943_040 + 12 * 32 * 4096 * 1024)
    assert found["compute_s"] == pytest.approx(flops / (0.4 * 989e12))
    assert found["fast"][1] == pytest.approx(1 / 1.1)
    across = scale.plan(scale.SHAPES["llama-8b"], "lora", "ddp", 64, imbalance=0.1)
    assert across["slow_s"] == pytest.approx(across["traffic"] / 50e9) == pytest.approx(8 * across["fast_s"])
    assert "does not fit" in scale.plan_row("llama-70b", "lora", "ddp", 8, 0.0)[5]  # 141 GB of weights
    assert "fit" not in scale.plan_row("llama-70b", "lora", "zero3", 64, 0.0)[5]


# --- imbalance -------------------------------------------------------------------------------------------------------


def test_equal_pairs_are_balanced(scale):
    """Packed 10, padded 14: any split is even, and padding costs 1.4."""
    found = scale.simulate([(10, 14)] * 6, processes=4, each=2, steps=3)
    assert (found["balanced"], found["in_order"], found["bound"]) == (1, 1, 1)
    assert found["padded"] == pytest.approx(1.4)


def test_unequal_pairs(scale):
    """All four of 10, 6, 6, 2 in two halves of 12: the balanced split finds 10 + 2; in order 10 may meet a 6."""
    found = scale.simulate([(10, 24), (6, 8), (6, 8), (2, 4)], processes=2, each=2, steps=50)
    assert found["balanced"] == 1
    assert 1 < found["in_order"] < 16 / 12  # one draw in three is 10 + 2
    assert found["padded"] == pytest.approx(2 * 24 / 12)  # two rows as long as the longest
    one_each = scale.simulate([(10, 24), (6, 8), (6, 8), (2, 4)], processes=4, each=1, steps=5)
    assert one_each["balanced"] == one_each["bound"] == pytest.approx(10 / 6)  # a pair stays whole


def test_it_writes_what_it_prints(scale, smollm2, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scale.compare, "RESULTS", tmp_path)
    monkeypatch.setattr(scale, "simulate", functools.partial(scale.simulate, steps=2))
    words = ["--parts", "imbalance", "paper", "--data", str(ROOT / "rlhf/data/sample/train.jsonl"), "--write"]
    monkeypatch.setattr(sys, "argv", ["scale.py", *words])
    scale.main()
    shown, text = capsys.readouterr().out, (tmp_path / "scale.md").read_text()
    assert shown.strip() in text + "\n" and "arithmetic, not a measurement" in text
    assert "python bench/scale.py --parts imbalance paper --data train.jsonl --write" in text
    assert str(ROOT) not in text
    assert text.count(" llama-8b |") == 4 * 3 + 4 * 4


# --- real processes --------------------------------------------------------------------------------------------------


def test_every_collective_is_seen():
    """The calls of torch.distributed, coalesced ones too, which GPUs make; 4 processes that only pretend."""
    code = """
import json, torch, torch.distributed as dist, scale
from torch.testing._internal.distributed.fake_pg import FakeStore
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
watch, part, whole = scale.watch_collectives(), torch.zeros(100), torch.zeros(400)
watch.clear()
with watch:
    dist.all_reduce(whole)
    dist.all_gather_into_tensor(whole, part)
    dist.all_gather([part.clone() for _ in range(4)], part)
    dist.reduce_scatter_tensor(part, whole)
    with dist._coalescing_manager():
        for _ in range(2):
            dist.all_gather_into_tensor(whole, part)
    dist.broadcast(whole, 0)
    dist.reduce(whole, 1)
    dist.all_reduce(torch.zeros(3))
    dist.barrier()
    print(json.dumps([watch.model, watch.other]))
    try:
        dist.all_to_all_single(whole, whole.clone())
    except NotImplementedError:
        print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "bench")
    assert done.returncode == 0, done.stderr
    line, refused = done.stdout.splitlines()[-2:]
    sizes = {"all-reduce": 1600, "all-gather": 4 * 1600, "reduce-scatter": 1600, "broadcast": 1600, "reduce": 1600}
    assert json.loads(line) == [sizes, {"all-reduce": 12}] and refused == "refused"


CASES = [
    ("ddp", ["lora"]),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("fsdp2", ["full"]), ("zero3", ["full", "lora"]))),
]


@pytest.mark.parametrize(("launch", "trainings"), CASES, ids=["ddp", "fsdp2", "zero3"])
def test_measured_bytes(scale, forks, tmp_path, launch, trainings):
    if launch == "zero3" and (importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None):
        pytest.skip("needs the extra `deepspeed`, and g++, with which DeepSpeed compiles what its CPU processes use")
    model = scale.make_model(tmp_path / "model")
    runs = scale.measure(launch, 2, trainings, model, tmp_path)
    assert [(run["training"], run["micro_batches"]) for run in runs] == [(t, m) for t in trainings for m in (1, 2)]
    for run in runs:
        parameters, micro = run["parameters"], run["micro_batches"]
        trained, weights = sum(p[1] for p in parameters if p[3]), sum(p[1] for p in parameters)
        found = scale.sent(run["model"], 2)
        assert found == pytest.approx(
            scale.built_bytes(launch, parameters, 2, micro), rel=0.1 if launch == "zero3" else 1e-3
        )
        if (run["training"], micro) == ("full", 1) or launch == "ddp":
            assert found == pytest.approx(scale.zero_bytes(launch, trained, weights, 2, micro), rel=0.05)
        assert scale.sent(run["other"], 2) < 5000
