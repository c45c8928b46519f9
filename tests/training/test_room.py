"""The memory that training needs at least, and the refusal of what cannot fit."""

import json
import struct
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rlhf.config.recipe import Recipe
from rlhf.distributed.topology import Topology
from rlhf.errors import UserError
from rlhf.training.room import check_memory, count_weights, tell_replicated, training_room


@pytest.mark.parametrize(
    "values, topology, world, expected",
    [
        ({}, Topology("DDP"), 4, 16_000),  # 1000 x (4 weight + 4 gradient + 8 Adam)
        ({"dtype": "bfloat16"}, Topology("DDP"), 4, 8_000),
        ({"use_peft": True}, Topology("DDP"), 4, 4_000),
        ({"use_peft": True, "load_in_4bit": True}, Topology("DDP"), 4, 500),
        ({}, Topology("DeepSpeed", 1), 4, 10_000),  # 4000 + 4000 + 8000 / 4
        ({}, Topology("DeepSpeed", 2), 4, 7_000),  # 4000 + (4000 + 8000) / 4
        ({}, Topology("DeepSpeed", 3), 4, 4_000),
        ({}, Topology("FSDP", fsdp_version=2), 4, 4_000),
        ({"use_peft": True, "load_in_4bit": True}, Topology("FSDP", fsdp_version=2), 4, 125),  # sharded
        ({"use_peft": True, "load_in_4bit": True, "use_dora": True}, Topology("FSDP", fsdp_version=2), 4, 500),
        ({"use_peft": True, "load_in_4bit": True}, Topology("DeepSpeed", 3), 4, 500),  # on every rank
        ({"bf16": True}, Topology("DeepSpeed", 2), 4, 5_500),  # 2000 + (2000 + 12000) / 4
        ({"optim": "adafactor"}, Topology("DDP"), 4, 8_000),  # a lower bound: not counted
        ({"optim": "adamw_bnb_8bit"}, Topology("DDP"), 4, 10_000),
        ({"optim": "paged_adamw_32bit"}, Topology("DDP"), 4, 16_000),
        ({}, Topology("DeepSpeed", 3, offload=True), 4, 1_000),  # gradients alone stay on the device
    ],
)
def test_training_room(values, topology, world, expected):
    recipe = Recipe("dpo", "r.yaml", values, {})
    assert training_room(1000, 2000, recipe, topology, world, on_cpu=True).total == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"use_peft": True}, 2_000),  # a base in bfloat16 stays so on a GPU
        ({"use_peft": True, "dtype": "float32"}, 4_000),
        ({"use_peft": True, "load_in_4bit": True}, 500),
        ({}, 16_000),  # fp32 masters
    ],
)
def test_training_room_on_a_gpu(values, expected):
    recipe = Recipe("dpo", "r.yaml", values, {})
    assert training_room(1000, 2000, recipe, Topology("DDP"), 4, on_cpu=False).total == expected


def test_count_weights_reads_headers_only(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
        "b": {"dtype": "F32", "shape": [5], "data_offsets": [48, 68]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)  # not one weight behind it
    (tmp_path / "consolidated.safetensors").write_bytes(b"the same again, in another layout, that nobody loads")
    assert count_weights(tmp_path) == (17, 17 * 4)


def planned(folder, topology, **values):
    values = {"model_name_or_path": str(folder)} | values
    return SimpleNamespace(
        model_name=str(folder), args=SimpleNamespace(device=torch.device("cuda")), topology=topology,
        recipe=Recipe("dpo", "r.yaml", values, {"model_name_or_path": 3}),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gigabytes", "values", "topology", "told"),
    [
        (17, {}, Topology("DDP"), None),
        (15, {}, Topology("DDP"), "need at least 16.0 GB on each device (weights 4.0 GB, gradients 4.0 GB, optimizer 8.0 GB), and this "
         "one has 15.0 GB; nothing was loaded. This could fit: launch/fsdp2.yaml (4.0 GB) or `use_peft: true` (4.0 GB)"),
        (3, {}, Topology("DDP"), "This could fit: `use_peft: true` with launch/fsdp2.yaml (1.0 GB) or `use_peft: true` and "
         "`load_in_4bit: true` (0.5 GB)"),
        (0.5, {}, Topology("FSDP", fsdp_version=2), "This could fit: `use_peft: true` and `load_in_4bit: true` (0.1 GB)"),
        (0.1, {}, Topology("FSDP", fsdp_version=2), "Shard it over more GPUs with launch/fsdp2.yaml: here 4.0 GB on each of 4"),
        (3, {"use_peft": True}, Topology("DDP"), "need at least 4.0 GB on each device (weights 4.0 GB, gradients 0.0 GB"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_before_it_loads(gigabytes, values, topology, told, tmp_path, monkeypatch):
    """A billion parameters on four GPUs; their files hold one header and nothing else."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000, 1000, 1000], "data_offsets": [0, 4 * 10**9]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=int(gigabytes * 1e9))
    )
    monkeypatch.setenv("WORLD_SIZE", "4")
    plan = planned(tmp_path, topology, bf16=False, **values)
    if told is None:
        return check_memory(plan)
    with pytest.raises(UserError) as refused:
        check_memory(plan)
    assert told in str(refused.value) and str(refused.value).startswith("r.yaml:3: 1.0 billion parameters need")


def test_a_model_of_the_hub_and_a_cpu_are_not_judged(tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    plan = planned(tmp_path, Topology("DDP"))
    plan.args.device = torch.device("cpu")
    check_memory(plan)
    check_memory(planned("org/name", Topology("DDP")))


@pytest.mark.parametrize(
    ("values", "topology", "told"),
    [
        ({"load_in_4bit": True}, Topology("DeepSpeed", 3), "note: ZeRO-3 shards no quantised weights: each process holds all of "
         "them, at least 0.5 GB; launch/fsdp2.yaml shards those in 4 bits"),
        ({"load_in_8bit": True}, Topology("DeepSpeed", 3), "at least 1.0 GB; launch"),
        ({"load_in_4bit": True, "use_dora": True}, Topology("FSDP", fsdp_version=2), "with DoRA: each process holds all of them, at least 0.5 GB"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "uint8"}, Topology("FSDP", fsdp_version=2), "bnb_4bit_quant_storage has no effect under FSDP2"),
        ({"load_in_4bit": True}, Topology("FSDP", fsdp_version=2), ""),
        ({"load_in_4bit": True}, Topology("DeepSpeed", 2), ""),  # shards no weights at all
        ({}, Topology("DeepSpeed", 3), ""),
    ],
)  # fmt: skip
def test_quantised_weights_that_are_not_sharded_are_told(values, topology, told, tmp_path, capsys):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000, 1000, 1000], "data_offsets": [0, 4 * 10**9]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    tell_replicated(planned(tmp_path, topology, use_peft=True, **values))
    shown = capsys.readouterr().out
    assert told in shown and bool(told) == bool(shown)
