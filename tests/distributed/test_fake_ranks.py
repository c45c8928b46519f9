"""8 to 1,024 ranks, each alone in torch's fake process group: all take part in the same collectives, of the bytes that theory says.

Three ranks stand for all: the first, one in the middle, and the last, which has no example of a small global batch.
"""

import json
import math
from collections import Counter
from pathlib import Path

import forked
import pytest

SCRIPT = Path(__file__).parent / "fake_ranks.py"
STEPS = 2
SMALL = 1 << 14  # bytes: numbers and flags, one or a few of each rank
TRAIN_ONLY = {
    "save_strategy": "no",
    "save_steps": None,
    "eval_strategy": "no",
    "eval_steps": None,
    "eval_dataset_name": None,
    "max_eval_examples": None,
}
EVERY_PHASE = {
    "start",
    "reference",
    "start check",
    "step 1",
    "between steps",
    "step 2",
    "evaluation",
    "checkpoint",
    "finish",
}
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2_hsdp")
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "merge_adapter": False}


@pytest.fixture
def ranks(tiny_llama, few_pairs, tmp_path):
    """ranks(launch file, world, numbers of ranks, **recipe) -> {rank: what fake_ranks.py has left of it}"""

    def run(launch, world, numbers, stage="dpo", model=tiny_llama, start=None, plant=False, **values):
        need(launch)
        recipe = {
            "stage": stage, "model_name_or_path": model, "dataset_name": few_pairs, "eval_dataset_name": few_pairs, "max_eval_examples": 5,
            "max_length": 256, "global_batch_size": 6, "max_tokens_per_device": 600, "max_steps": STEPS, "learning_rate": 1e-4,
            "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "use_cpu": True,
            "disable_tqdm": True, "seed": 1, "output_dir": str(tmp_path / "nowhere"),
        } | values  # fmt: skip
        file, first = tmp_path / "recipe.yaml", tmp_path / f"{launch}-{world}-{numbers[0]}"
        recipe = {key: value for key, value in recipe.items() if value is not None}
        file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in recipe.items()))
        jobs = [
            {"rank": rank, "world": world, "launch": launch, "words": [stage, str(file)], "out": str(tmp_path / f"{launch}-{world}-{rank}"),
             "like": None if rank == numbers[0] else str(first), "start": start and str(start), "plant": plant}
            for rank in numbers
        ]  # fmt: skip
        done = forked.run(SCRIPT, typed=json.dumps(jobs))
        assert done.returncode == 0, done.stderr
        found = {job["rank"]: json.loads((Path(job["out"]) / "events.json").read_text()) for job in jobs}
        for rank, each in found.items():
            each["error"] += Path(f"{tmp_path}/{launch}-{world}-{rank}.log").read_text()[-2000:]
        return found

    return run


def need(launch):
    if launch.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")


def same_everywhere(found):
    """Rank 0's events, once it is sure that all ranks have the same: the same kind, group and bytes one after another, to the end."""
    first, *others = [each["events"] for each in found.values()]
    for events in others:
        for number, (mine, theirs) in enumerate(zip(first, events, strict=False)):
            assert mine == theirs, f"collective {number}, after {first[max(0, number - 3) : number]}"
    for rank, each in found.items():
        assert each["code"] == 0, f"rank {rank}: {each['error']}"
    assert {len(events) for events in others} <= {len(first)}
    return first


def three_of(world):
    return 0, world // 2, world - 1


# --- which -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launch", ["ddp", "fsdp2"])
def test_eight_ranks_take_part_in_the_same_collectives(launch, ranks):
    """From the start to the finished model; most ranks have no example in a micro-batch, and one none in the reference pass."""
    events = same_everywhere(ranks(launch, 8, three_of(8)))
    assert {phase for phase, *_ in events} == EVERY_PHASE


def test_a_collective_in_a_branch_is_seen(ranks):
    """Here ranks that are odd leave one out."""
    found = ranks("ddp", 8, (0, 7), plant=True, **TRAIN_ONLY)
    with pytest.raises(AssertionError, match="collective [0-9]+, after"):
        same_everywhere(found)


@pytest.mark.slow
@pytest.mark.parametrize("launch", ENGINES)
def test_1024_ranks_take_part_in_the_same_collectives(launch, ranks):
    events = same_everywhere(ranks(launch, 1024, three_of(1024)))
    assert {phase for phase, *_ in events} == EVERY_PHASE


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
@pytest.mark.parametrize("launch", ["fsdp2"])
def test_other_stages_with_lora(stage, launch, ranks):
    same_everywhere(ranks(launch, 64, three_of(64), stage=stage, **LORA))


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["zero3", "fsdp2"])
def test_resuming_what_one_process_has_begun(launch, ranks, tiny_llama, few_pairs, tmp_path):
    """With a checkpoint that any engine reads, and the reference in the cache."""
    begun = tmp_path / "begun"
    (begun / "run").mkdir(parents=True)
    ranks(launch, 8, (0,), save_steps=1)  # writes the recipe
    words = ("-m", "rlhf", "dpo", tmp_path / "recipe.yaml", "--output_dir", begun / "run")
    while not list(begun.glob("run/checkpoint-*")):  # the first stop is in the reference pass
        (begun / "run" / "stop").touch()
        assert forked.run(*words, env={"RLHF_CACHE": str(begun / "cache")}).returncode == 85
    events = same_everywhere(ranks(launch, 64, three_of(64), start=begun, save_steps=1))
    phases = [phase for phase, *_ in events]
    assert {"step 2", "finish"} <= set(phases) and not {"step 1", "start check"} & set(phases), sorted(set(phases))


# --- how much --------------------------------------------------------------------------------------------------------

WIDTH, LAYERS, VOCABULARY = 1024, 2, 1024
LAYER = 7 * WIDTH * WIDTH + 2 * WIDTH  # q k v o gate up down, two norms
ROOT = VOCABULARY * WIDTH + WIDTH  # the embedding, which is also the head, and the last norm
ALL = LAYERS * LAYER + ROOT
SIZES = [
    *((launch, 1024) for launch in ENGINES),
    ("fsdp2", 8),
    ("zero3", 64),
]  # docs/scaling.md has all of 8, 64 and 1,024


@pytest.fixture(scope="module")
def wide_llama(tiny_llama, tmp_path_factory):
    """A Llama whose every tensor has a multiple of 1,024 rows: none is padded when it is sharded."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "wide-llama"
    config = AutoConfig.from_pretrained(
        tiny_llama, vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=16, head_dim=64, initializer_range=0.02,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return str(folder)


def expected(launch, world):
    """Elements per step of one micro-batch, by kind, of what is sent as a whole; of fp32 four bytes each."""
    gathered = (
        LAYERS * LAYER * 2 + ROOT
    )  # a layer before its forward and before its backward pass; the rest stays until the end
    return {
        "ddp": {"allreduce": ALL},
        "zero1": {"allreduce": ALL, "allgather_base": ALL},  # gradients; what the optimizer has changed
        "zero2": {"allreduce": ALL, "allgather_base": ALL},
        "fsdp2": {"allgather_base": gathered, "reduce_scatter_base": ALL},
        "fsdp2_hsdp": {"allgather_base": gathered, "reduce_scatter_base": ALL, "allreduce": ALL // 8},  # 8: ranks of a host
    }[launch]  # fmt: skip


def sent(events, phase):
    """Bytes by kind of what is not a number or a flag."""
    found = Counter()
    for where, kind, _, size in events:
        if where == phase and size > SMALL:
            found[kind] += size
    return dict(found)


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "world"), SIZES)
def test_bytes_per_step(launch, world, ranks, wide_llama):
    """docs/scaling.md has the table."""
    events = same_everywhere(ranks(launch, world, (0,), model=wide_llama, max_tokens_per_device=2048, **TRAIN_ONLY))
    found = sent(events, f"step {STEPS}")
    if launch == "zero3":  # DeepSpeed decides by thresholds what it keeps, and fetches some again
        assert found["reduce_scatter_base"] == 4 * ALL and 4 * 2 * ALL <= found["allgather_base"] <= 4 * 3 * ALL
    else:
        for kind, elements in (wanted := expected(launch, world)).items():
            padding = (
                2 * 2 * world if launch.startswith("zero") else 0
            )  # of two groups of parameters, to two elements per rank
            assert 4 * elements <= found[kind] <= 4 * (elements + padding)
        assert set(found) == set(wanted)
    small = [size for phase, _, _, size in events if phase == f"step {STEPS}" and size <= SMALL]
    assert sum(small) < 4 * SMALL and len(small) <= 8 * math.log2(world)
