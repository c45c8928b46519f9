"""Finished models: written piece by piece, they are what transformers and PEFT would have written at once."""

import fcntl
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.__main__ import main
from rlhf.errors import RunFailed, UserError
from rlhf.models import on_disk
from rlhf.models.finished import probe_logits
from rlhf.models.inference import load_finished
from rlhf.models.merge import Checkpoint, merge, merge_for_training
from rlhf.models.pieces import list_pieces
from rlhf.models.saving import offloaded_logits, save_finished
from rlhf.models.tensor_file import TensorFile
from rlhf.models.tokenizer import load_tokenizer
from rlhf.models.writing import PARTIAL, split_files, take_notes, write_configs, write_files, write_index

PROBE = [[3, 4, 5], [6, 7]]


def written(model, folder, dtype=torch.float32, max_bytes=10**9):
    """The tensors of all files that `write_files` makes, and the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = split_files(list_pieces(model, dtype), max_bytes)
    assert write_files(files, folder) == ""
    write_index(folder, files)
    return {name: t for file in files for name, t in load_file(folder / file.name).items()}, files


def saved(model, folder):
    """The tensors that transformers writes."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name


def mixtral(vocab_size: int = 64):
    config = AutoConfig.for_model(
        "mixtral", vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_distilbert", "mixtral"])
def test_a_full_model_is_what_transformers_writes(name, request, tmp_path):
    """Tied weights once, an encoder with its head, and experts, which a file holds one by one and a model in one tensor."""
    torch.manual_seed(0)
    if name == "mixtral":
        model = mixtral()
    else:
        auto = AutoModelForSequenceClassification if name == "tiny_distilbert" else AutoModelForCausalLM
        model = auto.from_pretrained(request.getfixturevalue(name))
    found, files = written(model, tmp_path / "ours")
    assert [file.name for file in files] == ["model.safetensors"]
    assert_same(found, saved(model, tmp_path / "theirs"))
    if name == "mixtral":
        assert any(".experts.3." in key for key in found)


def test_several_files_and_their_index(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    found, files = written(model, tmp_path / "ours", torch.bfloat16, max_bytes=20_000)
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same(found, saved(model.to(torch.bfloat16), tmp_path / "theirs"))
    model.config.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(probe_logits(again, PROBE)[0], probe_logits(theirs, PROBE)[0])
    assert again.dtype == torch.bfloat16


ADAPTERS = {
    "linear": {},
    "dora": {"use_dora": True},
    "bias and rank-stabilised": {"lora_bias": True, "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "down_proj"]},
    "head": {"modules_to_save": ["score"], "task_type": "SEQ_CLS"},
}


def adapted(folder, more):
    """A model with an adapter, whose weights are not zero."""
    torch.manual_seed(0)
    more = dict(more)
    auto = AutoModelForSequenceClassification if "modules_to_save" in more else AutoModelForCausalLM
    options = {"num_labels": 1} if "modules_to_save" in more else {}
    base = auto.from_pretrained(folder, **options)
    if more.pop("lora_bias", False):
        for layer in base.model.layers:
            projection = layer.self_attn.q_proj
            projection.bias = torch.nn.Parameter(torch.randn(projection.out_features))
        more |= {"lora_bias": True, "target_modules": ["q_proj"]}
    config = LoraConfig(r=4, **{"target_modules": "all-linear", **more})
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_merged_adapter_is_what_peft_merges(kind, tiny_llama, tmp_path):
    model = adapted(tiny_llama, ADAPTERS[kind])
    before = {name: p.clone() for name, p in model.state_dict().items()}
    found, _ = written(model, tmp_path / "ours")
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert not any(getattr(module, "merged_adapters", None) for module in model.modules())
    expected = saved(model.merge_and_unload(), tmp_path / "theirs")
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(found[name], t) for name, t in load_file(f"{tiny_llama}/model.safetensors").items())


def test_adapters_of_experts(tmp_path):
    """Of two parameters of one module, whose wrappers are nested; the file holds the experts one by one."""
    torch.manual_seed(0)
    base = mixtral()
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    found, _ = written(model, tmp_path / "ours")
    expected = saved(model.merge_and_unload(), tmp_path / "theirs")
    assert found.keys() == expected.keys() and any(".experts.3." in key for key in found)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


def test_an_adapter_is_added_in_float32(tiny_llama, tmp_path):
    """And rounded once, where PEFT rounds the product and then the sum."""
    model = adapted(tiny_llama, {}).to(torch.bfloat16)
    found, _ = written(model, tmp_path / "ours", torch.bfloat16)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    a, b, w = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
    exact = (w.float() + layer.scaling["default"] * b.float() @ a.float()).to(torch.bfloat16)
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], exact)


def test_nothing_is_made_before_it_is_fetched(tiny_llama, tmp_path):
    model = adapted(tiny_llama, {})
    pieces = list_pieces(model, torch.float32)
    assert {t.device.type for piece in pieces for t in piece.tensors.values()} == {"meta"}
    assert all(piece.fetch(False) is None for piece in pieces)
    one = next(piece for piece in pieces if "model.layers.0.mlp.up_proj.weight" in piece.tensors)
    found = one.fetch(True)
    assert list(found) == ["model.layers.0.mlp.up_proj.weight"]


# --- the whole of it ---------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)


def test_the_written_model_computes_with_one_layer_in_memory(model, tmp_path):
    found = save_finished(*model, tmp_path, reward=False, merge=True, probe=PROBE)
    assert found.max_logit_difference == 0.0 and found.dtype == "float32" and not (tmp_path / PARTIAL).exists()
    again = offloaded_logits(tmp_path, PROBE, False, "cpu")
    for ours, trained in zip(again, probe_logits(model[0], PROBE), strict=True):
        assert torch.equal(ours, trained)
    assert probe_logits(load_finished(str(tmp_path))[0], PROBE)[1].shape == (1, 2, 600)


def test_the_written_model_computes_where_it_was_trained(model, tmp_path, monkeypatch):
    """And on the CPU where a GPU has no room for a layer."""
    import accelerate

    save_finished(*model, tmp_path, reward=False, merge=True, probe=PROBE)
    asked, dispatch = [], accelerate.dispatch_model

    def full(model, device_map, main_device, **options):
        asked.append(main_device)
        if main_device == "cuda:0":
            raise torch.OutOfMemoryError
        return dispatch(model, device_map, main_device=main_device, **options)

    monkeypatch.setattr(accelerate, "dispatch_model", full)
    found = offloaded_logits(tmp_path, PROBE, False, torch.device("cuda", 0))
    assert asked == ["cuda:0", "cpu"] and torch.equal(found[0], probe_logits(model[0], PROBE)[0])


def test_a_folder_that_not_all_ranks_share_is_named(model, tmp_path):
    files = split_files(list_pieces(model[0], torch.float32), 20_000)
    assert write_files(files, tmp_path) == ""
    (tmp_path / files[1].name).unlink()  # it is on another node's disk
    with pytest.raises(RunFailed, match=f"{files[1].name} was written by another process but is not there"):
        take_notes(tmp_path, files)


@pytest.mark.parametrize("row", [0, 1])
def test_logits_that_are_no_numbers_are_noticed_in_any_row(row, model, tmp_path, monkeypatch):
    def damaged(*args):
        found = offloaded_logits(*args)
        found[row][0, -1, 0] = float("nan")
        return found

    monkeypatch.setattr("rlhf.models.saving.offloaded_logits", damaged)
    with pytest.raises(RunFailed, match="differs from the trained one: its logits differ by nan"):
        save_finished(*model, tmp_path, reward=False, merge=True, probe=PROBE)
    assert not (tmp_path / "model.safetensors").exists()


def test_an_adapter_that_reads_back_otherwise_is_noticed(tiny_llama, model, tmp_path, monkeypatch):
    adapter = adapted(tiny_llama, {})
    found = save_finished(adapter, model[1], tmp_path / "good", reward=False, merge=False, probe=PROBE)
    assert found.max_logit_difference == 0.0 and set(found.files) >= {"adapter_model.safetensors", "tokenizer.json"}
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "good")
    assert torch.equal(probe_logits(again, PROBE)[0], probe_logits(adapter, PROBE)[0])
    assert adapter.active_adapters == ["default"] and list(adapter.peft_config) == ["default"]

    write = PeftModel.save_pretrained

    def damaged(self, folder, **options):
        options["state_dict"] = {name: t + 1e-3 for name, t in options["state_dict"].items()}
        write(self, folder, **options)

    monkeypatch.setattr(PeftModel, "save_pretrained", damaged)
    with pytest.raises(RunFailed, match="of the adapter in .* differs from the trained one"):
        save_finished(adapter, model[1], tmp_path / "bad", reward=False, merge=False, probe=PROBE)
    assert not (tmp_path / "bad" / "adapter_model.safetensors").exists()


def test_an_interrupted_call_is_continued(model, tmp_path, monkeypatch):
    """Only what is missing, damaged or of other weights is written again."""
    monkeypatch.setattr("rlhf.models.writing.split_files", lambda pieces: split_files(pieces, 20_000))
    opened = []
    init = TensorFile.__init__

    def counted(self, path, pieces):
        opened.append(path.name)
        if len(opened) == stop_at:
            raise KeyboardInterrupt  # as a kill: nothing is cleaned up
        init(self, path, pieces)

    monkeypatch.setattr(TensorFile, "__init__", counted)
    call = dict(reward=False, merge=True, probe=PROBE, made_from="checkpoint 5")
    stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        save_finished(*model, tmp_path, **call)
    third = tmp_path / PARTIAL / opened[2]
    third.write_bytes(third.read_bytes()[:-1] + b"?")
    (tmp_path / PARTIAL / "left-over").touch()
    before, stop_at = opened.copy(), 0
    opened.clear()
    saved_now = save_finished(*model, tmp_path, **call)
    assert opened[:2] == [before[2], before[3]] and not set(before[:2]) & set(opened)
    assert saved_now.max_logit_difference == 0.0
    assert not [
        path for path in tmp_path.iterdir() if path.name.endswith(".safetensors.json") or path.name == "left-over"
    ]
    whole = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(whole.values()) == {path.name for path in tmp_path.glob("*.safetensors")}

    stop_at = 4 + len(opened)
    with pytest.raises(KeyboardInterrupt):
        save_finished(*model, tmp_path / "other", **call)
    stop_at = 0
    opened.clear()
    save_finished(*model, tmp_path / "other", **call | {"made_from": "checkpoint 6"})
    assert opened[0] == before[0]


# --- merging from disk to disk ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "dora", "head"])
def test_an_adapter_is_merged_from_disk_to_disk(kind, tiny_llama, tmp_path):
    """As PEFT merges it; what is in no adapted layer is copied, and the base is not loaded."""
    model = adapted(tiny_llama, ADAPTERS[kind])
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "adapter")
    found = merge(str(tmp_path / "adapter"), tmp_path / "out")
    ours, theirs = (
        load_file(tmp_path / "out" / "model.safetensors"),
        saved(model.merge_and_unload(), tmp_path / "theirs"),
    )
    assert ours.keys() == theirs.keys() and found.dtype == "float32"
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
    again, _ = load_finished(str(tmp_path / "out"), reward=kind == "head")
    expected = probe_logits(model.base_model.model, PROBE)
    torch.testing.assert_close(probe_logits(again, PROBE)[0], expected[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="is not empty"):
        merge(str(tmp_path / "adapter"), tmp_path / "out")
    with pytest.raises(UserError, match="holds no adapter"):
        merge(tiny_llama, tmp_path / "out2")


def test_the_command(tiny_llama, tmp_path, capsys):
    adapted(tiny_llama, {}).save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "adapter")
    out = str(tmp_path / "out")
    assert main(["merge", str(tmp_path / "adapter"), out, "--dtype", "bfloat16"]) == 0
    assert f"is merged into {tiny_llama}: {out} (0.00 GB in bfloat16, read again and equal)" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    for words, told in (
        (["merge", str(tmp_path / "adapter"), out], "is not empty"),
        (["merge", tiny_llama, str(tmp_path / "new")], "holds no adapter"),
        (["merge", str(tmp_path / "nowhere"), str(tmp_path / "new")], "there is no folder"),
    ):
        assert main(words) == 2 and told in capsys.readouterr().err
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "new")]) == 2
    assert "adapter_model.safetensors is truncated or not a safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("reward", [False, True])
def test_experts_are_merged_from_disk_to_disk(reward, tiny_llama, tmp_path, monkeypatch):
    """With an adapter on each expert: one layer's are in memory, made by transformers' conversion of the base's files."""
    mixtral(600).save_pretrained(tmp_path / "base", max_shard_size="10KB")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    torch.manual_seed(0)
    base = auto.from_pretrained(tmp_path / "base", **({"num_labels": 1} if reward else {}))
    experts = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    more = {"modules_to_save": ["score"], "task_type": "SEQ_CLS"} if reward else {}
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **experts, **more))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "adapter")
    read, before = [], on_disk._read
    monkeypatch.setattr(
        on_disk, "_read", lambda entry, part: (read.append(entry["weight_name"]), before(entry, part))[1]
    )
    merge(str(tmp_path / "adapter"), tmp_path / "out")
    assert len([name for name in read if ".experts." in name]) == 2 * 4 * 3  # each of the files' tensors once
    again, _ = load_finished(str(tmp_path / "out"), reward=reward)
    ours, theirs = (
        load_file(tmp_path / "out" / "model.safetensors"),
        saved(model.merge_and_unload(), tmp_path / "theirs"),
    )
    assert torch.equal(
        again.state_dict()["model.layers.1.mlp.experts.down_proj"][3],
        ours["model.layers.1.block_sparse_moe.experts.3.w2.weight"],
    )
    assert ours.keys() == theirs.keys() and any(".experts.3.w1" in name for name in ours)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


def test_a_base_that_is_converted_otherwise_is_not_merged(tiny_llama, tmp_path, monkeypatch):
    mixtral().save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("rlhf.models.merge.unknown_operation", lambda model: "Negate")
    with pytest.raises(UserError, match="hold no model.layers.0.mlp"):
        merge(str(tmp_path / "adapter"), tmp_path / "out")


def test_names_in_the_files(tiny_llama):
    checkpoint = Checkpoint(tiny_llama)
    whole = load_file(f"{tiny_llama}/model.safetensors")["model.embed_tokens.weight"]
    assert checkpoint.dtype == torch.float32 and checkpoint.key("lm_head.weight") is None
    assert torch.equal(checkpoint.read("embed_tokens.weight"), whole)


@pytest.fixture
def adapters(tiny_llama, tmp_path):
    """Two adapters of one base, with other weights, each with the base's tokenizer."""
    for seed, name in enumerate(("one", "two")):
        model = adapted(tiny_llama, {})
        torch.manual_seed(10 + seed)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / name)
    return str(tmp_path / "one"), str(tmp_path / "two")


def one_weight(folder):
    return load_file(Path(folder) / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]


def test_a_merged_start_is_of_its_own_adapter(adapters, tmp_path, monkeypatch):
    """A later run in the same output folder may start from another adapter, or from the same one, scaled otherwise."""
    one, two = adapters
    start = tmp_path / "run" / ".merged-start"
    merge_for_training(one, start, None)
    first, changed_at = one_weight(start), (start / "model.safetensors").stat().st_mtime_ns
    merge_for_training(one, start, None)
    assert (start / "model.safetensors").stat().st_mtime_ns == changed_at  # it is kept
    merge_for_training(two, start, None)
    second = one_weight(start)
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    (tmp_path / "two" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3 * config["lora_alpha"]}))
    merge_for_training(two, start, None)
    merge(two, tmp_path / "alone")
    assert not torch.equal(first, second) and torch.equal(one_weight(start), one_weight(tmp_path / "alone"))
    assert not torch.equal(one_weight(start), second) and not list(start.parent.glob("*.partial"))
    merge_for_training(two, start, torch.bfloat16)
    assert one_weight(start).dtype == torch.bfloat16


def test_a_killed_merge_leaves_nothing_to_another(adapters, tmp_path, monkeypatch):
    one, two = adapters

    def killed(*args):
        raise KeyboardInterrupt  # as a kill: nothing is cleaned up

    with monkeypatch.context() as patch:
        patch.setattr("rlhf.models.writing.write_configs", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(one, tmp_path / "out")
    assert (tmp_path / "out.partial" / "model.safetensors").is_file() and not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr("rlhf.models.writing.split_files", lambda pieces: split_files(pieces, 20_000))
        merge(two, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" not in names and not [name for name in names if name.endswith(".safetensors.json")]
    merge(two, tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(again["model.layers.0.mlp.up_proj.weight"], one_weight(tmp_path / "whole"))
    with open(tmp_path / ".busy.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another `rlhf merge`"):
            merge(one, tmp_path / "busy")


def test_a_merged_model_has_the_ids_of_its_tokenizer(adapters, tiny_llama, tmp_path):
    """The base names pad = EOS; the tokenizer has a pad token of its own, as a stage gives it one."""
    one, _ = adapters
    tokenizer = load_tokenizer(one)
    assert tokenizer.pad_token_id not in (AutoConfig.from_pretrained(tiny_llama).pad_token_id, tokenizer.eos_token_id)
    merge(one, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    made = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert config.pad_token_id == tokenizer.pad_token_id == made["pad_token_id"]
    assert made["eos_token_id"] == tokenizer.eos_token_id


def apertus():
    """Parameters of one element, and buffers in the file."""
    config = AutoConfig.for_model(
        "apertus", vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, hidden_act="xielu",
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def test_scalars_and_buffers_are_merged_too(tiny_llama, tmp_path):
    torch.manual_seed(0)
    base = apertus()
    for name, tensor in base.state_dict().items():
        if tensor.numel() == 1:
            tensor.fill_(0.3 + len(name) / 100)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "adapter")
    merge(str(tmp_path / "adapter"), tmp_path / "out")
    found, expected = (
        load_file(tmp_path / "out" / "model.safetensors"),
        saved(model.merge_and_unload(), tmp_path / "theirs"),
    )
    assert found.keys() == expected.keys() and any(t.numel() == 1 for t in found.values())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


def test_custom_code_is_read_again_only_if_allowed(model, tmp_path):
    """And written with the model's own class, also where FSDP2 has made another of it."""
    from torch.distributed.fsdp import FSDPModule

    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "modeling_custom.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\nclass CustomConfig(LlamaConfig):\n    model_type = 'custom'\n\n\n"
        "class CustomForCausalLM(LlamaForCausalLM):\n    config_class = CustomConfig\n"
    )
    config = model[0].config.to_dict() | {
        "model_type": "custom", "architectures": ["CustomForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_custom.CustomConfig", "AutoModelForCausalLM": "modeling_custom.CustomForCausalLM"},
    }  # fmt: skip
    model[0].save_pretrained(tmp_path / "custom")
    (tmp_path / "custom" / "config.json").write_text(json.dumps(config))
    model[1].save_pretrained(tmp_path / "custom")
    custom = AutoModelForCausalLM.from_pretrained(tmp_path / "custom", trust_remote_code=True)
    plain = type(custom)
    custom.__class__ = type(f"FSDP{plain.__name__}", (FSDPModule, plain), {})
    write_configs(custom, model[1], tmp_path / "custom", torch.float32)
    made = json.loads((tmp_path / "custom" / "config.json").read_text())
    assert made["architectures"] == ["CustomForCausalLM"] and type(custom).__name__ == "FSDPCustomForCausalLM"
    assert made["auto_map"]["AutoModelForCausalLM"] == "modeling_custom.CustomForCausalLM"
    custom.__class__ = plain
    found = save_finished(
        custom, model[1], tmp_path / "out", reward=False, merge=True, probe=PROBE, trust_remote_code=True
    )
    assert found.max_logit_difference == 0.0 and (tmp_path / "out" / "modeling_custom.py").is_file()
