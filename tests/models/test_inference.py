"""Where a model is loaded for inference: how many bytes, which devices, 4 bits; and models that several devices hold."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.config.stage_config import EvaluateConfig
from rlhf.errors import UserError
from rlhf.evaluation.measure import check_room
from rlhf.inference import score
from rlhf.inference.score import Pair, pack, pair_logps
from rlhf.models import inference
from rlhf.models.inference import GIB, load_finished, memory_to_use, num_bytes, own_gpus, placement, stored_tensors
from rlhf.models.loading import keep_4bit_layout

CUDA = torch.device("cuda:0")
PAIRS = [Pair([5, 6, 7], [8, 9, 10], [20, 21, 22, 23]), Pair([11, 12], [13, 14], [24])]


def gib(**numbers):
    return {int(name[1:]): int(number * GIB) for name, number in numbers.items()}


# --- which devices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needed", "free", "expected"),
    [
        (16, gib(_0=24), gib(_0=24)),  # 16 + 4 to work in
        (16, gib(_0=24, _1=24), gib(_0=24)),
        (21, gib(_0=24), gib(_0=24)),  # tight, and there is no other
        (21, gib(_0=24, _1=24), gib(_0=20, _1=20)),  # 22.05 of 40
        (21, gib(_1=24, _0=24), gib(_1=20, _0=20)),
        (23.6, gib(_0=24), None),  # half a GiB is the least to work in
        (30, gib(_0=24, _1=24), gib(_0=20, _1=20)),
        (44, gib(_0=24, _1=24), gib(_0=23.5, _1=23.5)),  # 46.2 of 47: tight
        (46, gib(_0=24, _1=24), None),  # 48.3 of 47
        (21, gib(_0=24, _1=0.2), gib(_0=24)),  # another process has the second
    ],
)
def test_memory_to_use_by_hand(needed, free, expected):
    assert memory_to_use(int(needed * GIB), free) == expected


@pytest.mark.parametrize(
    ("processes", "own", "expected"),
    [("1", 0, [0, 1, 2, 3]), ("1", 2, [2, 0, 1, 3]), ("2", 0, [0, 2]), ("2", 1, [1, 3]), ("4", 3, [3])],
)
def test_processes_share_the_gpus_of_a_host(processes, own, expected, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert own_gpus(torch.device("cuda", own)) == expected


@pytest.fixture
def gpus(monkeypatch):
    """gpus(_0=24, …): this process has these, with so many GiB free."""

    def pretend(**free):
        monkeypatch.setattr(inference, "own_gpus", lambda device: list(gib(**free)))
        monkeypatch.setattr(inference, "free_memory", lambda own: gib(**free))

    return pretend


def pretend_size(monkeypatch, size_gib, is_linear=True):
    """A checkpoint of bf16 weights, whatever the folder holds."""
    stored = [inference.Stored(int(size_gib * GIB / 2), 2, is_linear)]
    monkeypatch.setattr(inference, "stored_tensors", lambda name: stored)


def test_a_model_is_spread_only_where_one_gpu_is_too_small(gpus, tiny_llama, monkeypatch):
    gpus(_0=24, _1=24)
    assert placement(tiny_llama, None, CUDA, False) == {"device_map": {"": 0}}
    assert placement(tiny_llama, None, torch.device("cpu"), False) == {}
    pretend_size(monkeypatch, 30)
    assert placement("m", None, CUDA, False) == {"device_map": "auto", "max_memory": gib(_0=20, _1=20)}
    assert placement("m", None, CUDA, True) == {"device_map": {"": 0}}  # 30 * 0.5625 / 2 = 8.4


def test_a_model_that_fits_nowhere_is_refused_with_numbers(gpus, monkeypatch):
    gpus(_0=24)
    pretend_size(monkeypatch, 30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=50 * GIB))
    with pytest.raises(UserError) as told:
        placement("m", None, CUDA, False)
    assert str(told.value) == (
        "m does not fit: its weights take 30.0 GiB, and the GPU of this process has 24.0 GiB free; what would fit: "
        "load_in_4bit (about 8.4 GiB); 2 such GPUs for this process; the CPU with 50.0 GiB free (`use_cpu: true` and dtype: "
        "bfloat16 in a recipe, CUDA_VISIBLE_DEVICES= for a chat; 30.0 GiB)"
    )
    pretend_size(monkeypatch, 200)
    with pytest.raises(
        UserError, match=r"fit: 11 such GPUs for this process$"
    ):  # 200 * 1.05 / 20; 4 bits: 56; CPU: 200
        placement("m", None, CUDA, False)


def test_an_evaluation_is_refused_before_it_measures_the_first_model(gpus, monkeypatch):
    gpus(_0=24)
    pretend_size(monkeypatch, 30)
    monkeypatch.setattr("accelerate.PartialState", lambda: SimpleNamespace(device=CUDA))
    with pytest.raises(UserError, match=r"^big does not fit: its weights take 30.0 GiB"):
        check_room({"sft_model": "big"}, EvaluateConfig())
    with pytest.raises(UserError, match=r"^big does not fit: its weights take 60.0 GiB"):
        check_room({"sft_model": "big"}, EvaluateConfig(dtype="float32"))
    check_room({"sft_model": "big"}, EvaluateConfig(load_in_4bit=True))


def test_4_bits_without_bitsandbytes(tiny_llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="load_in_4bit needs bitsandbytes; run: .* -m pip install bitsandbytes"):
        load_finished(tiny_llama, load_in_4bit=True)


def test_a_part_that_would_be_on_the_disk_is_refused(tiny_llama, tmp_path, monkeypatch):
    """Layers are not cut: transformers puts what is left over there."""
    parts = {
        "model.embed_tokens": "cpu",
        "model.layers": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    monkeypatch.setattr(inference, "placement", lambda *_: {"device_map": parts, "offload_folder": str(tmp_path / "o")})
    with pytest.raises(
        UserError, match="does not fit on the GPUs layer by layer: a part of it would be on the cpu and disk"
    ):
        load_finished(tiny_llama)


# --- how many bytes --------------------------------------------------------------------------------------------------


def test_bytes_by_hand(tiny_llama, tmp_path):
    # embedding 600 * 32; per layer q, o: 32 * 32, k, v: 16 * 32, three of 32 * 64, two norms of 32; a norm of 32
    linear = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    rest = 600 * 32 + 2 * 2 * 32 + 32
    tensors = stored_tensors(tiny_llama)
    assert num_bytes(tensors, None, False) == num_bytes(tensors, "float32", False) == 4 * (linear + rest)
    assert num_bytes(tensors, "bfloat16", False) == 2 * (linear + rest)
    assert num_bytes(tensors, "bfloat16", True) == linear * 9 // 16 + 2 * rest
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert num_bytes(stored_tensors(str(tmp_path)), None, False) == 2 * (linear + rest)


def test_bytes_of_4_bit_weights_are_about_bitsandbytes(llama_64):
    pytest.importorskip("bitsandbytes")
    expected = num_bytes(stored_tensors(llama_64), "float32", True)
    assert load_finished(llama_64, load_in_4bit=True, dtype="float32")[0].get_memory_footprint() == pytest.approx(
        expected, rel=0.1
    )


# --- adapters and 4 bits ---------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(llama_64, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_64), LoraConfig(
        target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))  # fmt: skip
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(llama_64).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 30)[None]).logits


def test_an_adapter_stays_on_its_base(adapter, llama_64):
    from peft import PeftModel

    model, _ = load_finished(str(adapter), dtype="float32")
    assert isinstance(model, PeftModel) and not model.training
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_64), adapter).merge_and_unload()
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-4, atol=1e-4)
    assert (logits(model) - logits(load_finished(llama_64)[0])).abs().max() > 0.1


def test_an_adapter_on_a_4_bit_base(adapter, llama_64):
    """As a QLoRA run computes it."""
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    model, _ = load_finished(str(adapter), dtype="float32", load_in_4bit=True)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(llama_64, quantization_config=config, dtype=torch.float32)
    base = keep_4bit_layout(base)  # as in training: bitsandbytes' other kernels compute in bf16
    torch.testing.assert_close(
        logits(model), logits(PeftModel.from_pretrained(base, adapter).eval()), rtol=1e-3, atol=1e-3
    )
    assert (logits(model) - logits(load_finished(str(adapter))[0])).abs().max() > 1e-2


def test_a_qlora_run_is_quantised_as_it_was_trained(tmp_path):
    pytest.importorskip("bitsandbytes")
    trained = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True}
    (tmp_path / "provenance.json").write_text(json.dumps({"arguments": {"model": trained}}))
    found = inference.quantisation_of(str(tmp_path), None, torch.device("cpu"))
    assert (found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == ("fp4", True)
    assert found.bnb_4bit_compute_dtype == torch.float32
    plain = inference.quantisation_of("elsewhere", None, CUDA)
    assert (plain.bnb_4bit_quant_type, plain.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)


def test_evaluate_and_chat_in_4_bits(adapter, llama_64, few_pairs, recipe, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    from rlhf.__main__ import main

    found = {}
    for bits in (4, 16):
        out = tmp_path / f"evaluation{bits}"
        file = recipe("evaluate", name=str(bits), sft_model=str(adapter), dpo_model=str(adapter), dataset_name=few_pairs,
                      dataset_test_split="train", max_new_tokens=2, load_in_4bit=bits == 4, output_dir=str(out))  # fmt: skip
        assert main(["evaluate", file]) == 0
        found[bits] = json.loads((out / "results.json").read_text())["policies"]["sft"]["chosen_loss"]
    assert 1e-4 < abs(found[4] - found[16]) < 0.5
    capsys.readouterr()
    assert main(["chat", str(adapter), "--prompt", "Hello", "--max_new_tokens", "4", "--load_in_4bit"]) == 0
    assert re.search(r"\S", capsys.readouterr().out)


# --- scoring where several devices hold a model ----------------------------------------------------------------------


def test_a_model_in_parts_scores_as_a_whole_one(tiny_llama, tmp_path):
    """With accelerate's hooks around each part; on a machine without GPUs, the second layer is on the disk."""
    plain, _ = load_finished(tiny_llama)
    expected = pair_logps(plain, PAIRS)
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
             "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, device_map=parts, offload_folder=str(tmp_path)).eval()
    assert pack(model)
    for value, want in zip(pair_logps(model, PAIRS), expected, strict=True):
        assert value == pytest.approx(want, rel=1e-5)


def test_attention_follows_the_layers_to_their_device(tiny_llama):
    """The second layer and what follows are on "meta", where every operation wants all its tensors."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, _ = load_finished(tiny_llama)
    assert pack(model)
    model.lm_head = torch.nn.Linear(32, 600, bias=False)  # not the embedding, which stays
    for part in (model.model.layers[1], model.model.norm, model.lm_head):
        add_hook_to_module(part.to("meta"), AlignDevicesHook("meta"))
    logps, counts = score._packed_logps(model, PAIRS)
    assert logps.device.type == "meta" and logps.shape == (10,) and counts == [3, 4, 2, 1]
    hidden = model.model(input_ids=torch.tensor([[5, 6, 7], [5, 6, 8]]), use_cache=False).last_hidden_state
    assert hidden.device.type == "meta" and hidden.shape == (2, 3, 32)
