"""`attn_implementation: flash_attention_2` means what its user wants: rows without padding; on a CPU too, and said so."""

import json
from pathlib import Path

import pytest
import torch

from rlhf.__main__ import main
from rlhf.config.build import build_configs, is_flash
from rlhf.config.recipe import load_recipe
from rlhf.errors import UserError
from rlhf.packing import attention
from rlhf.packing.attention import kernel_name

FLASH = ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2")


@pytest.mark.parametrize("name, expected", [*((name, True) for name in FLASH), ("sdpa", False), ("eager", False),
                                            ("flex_attention", False), (None, False)])  # fmt: skip
def test_names_of_flash_attention(name, expected):
    assert is_flash(name) is expected


def losses(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_flash_attention_trains_packed_on_a_cpu(recipe, tiny_llama, few_pairs, tmp_path, capsys):
    found = {}
    for name in ("sdpa", "flash_attention_2"):
        common = {"model_name_or_path": tiny_llama, "dataset_name": few_pairs, "output_dir": str(tmp_path / name)}
        assert main(["dpo", recipe("dpo", name=name, attn_implementation=name, max_steps=2, **common)]) == 0
        found[name] = losses(tmp_path / name), capsys.readouterr().out
    kernel = "PyTorch's scaled_dot_product_attention, per segment"
    note = f"note: flash_attention_2 selects packed attention; on cpu the kernel is {kernel}\n"
    assert note in found["flash_attention_2"][1] and "selects packed" not in found["sdpa"][1]
    assert "padded" not in found["flash_attention_2"][1]
    assert found["flash_attention_2"][0] == found["sdpa"][0] and len(found["sdpa"][0]) == 2


@pytest.mark.parametrize("name", FLASH)
def test_without_packing_it_needs_a_gpu(recipe, name):
    file = recipe(
        "sft", model_name_or_path="m", dataset_name="d", output_dir="o", attn_implementation=name, packing=False
    )
    with pytest.raises(UserError) as caught:
        build_configs(load_recipe(file, "sft"))
    assert str(caught.value).endswith(f": {name} needs a GPU, but this run is on the CPU; remove it")


def test_the_kernel_of_a_gpu_is_named(monkeypatch):
    monkeypatch.setattr(attention, "varlen_kernel", lambda device: print)
    assert kernel_name(torch.device("cuda")) in ("PyTorch's varlen kernel", "flash_attn's varlen kernel")


def test_a_model_that_cannot_be_packed_says_which_attention_it_has(
    recipe, tiny_distilbert, few_pairs, tmp_path, capsys
):
    names = {"model_name_or_path": tiny_distilbert, "dataset_name": few_pairs, "output_dir": str(tmp_path / "o")}
    assert main(["reward", recipe("reward", attn_implementation="flash_attention_2", max_steps=1, **names)]) == 0
    expected = (
        "note: attention is sdpa: flash_attention_2 applies to packed rows; `packing: false` passes it to transformers"
    )
    assert expected in capsys.readouterr().out
