"""FSDP2: weights stay on disk until the model is sharded, and every rank then reads its own part."""

import functools
import json
import shutil
from types import SimpleNamespace

import forked
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig

from rlhf.models import on_disk
from rlhf.models.converted import Converted
from rlhf.models.loading import load_policy, load_reward_model

SHARD = """
import json, sys, torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig
from rlhf.distributed.sharding import full_tensor, loading_unsharded
from rlhf.models import on_disk
from rlhf.models.loading import load_policy, load_reward_model

name, kind = sys.argv[1:]
PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU  # as prepare_processes does
plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
read, before = [], on_disk._read
on_disk._read = lambda entry, part: (read.append(before(entry, part)), read[-1])[1]
tokenizer = AutoTokenizer.from_pretrained(name)
torch.manual_seed(7)
if kind.startswith("reward"):
    model, new = load_reward_model(name, tokenizer, ModelConfig(use_peft=True))
    head = model.score.weight.detach().clone()
else:
    model = load_policy(name, tokenizer, ModelConfig())
if kind in ("lora", "dora"):
    experts = [n.partition("layers.0.")[2] for n, p in model.named_parameters() if "layers.0." in n and p.dim() == 3]
    targets = {"target_modules": ["q_proj"], "target_parameters": experts} if experts else {"target_modules": "all-linear"}
    config = LoraConfig(r=4, modules_to_save=["norm"], use_dora=kind == "dora", **targets)
    model = get_peft_model(model, config)
    adapter = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    if kind == "dora":
        with loading_unsharded():
            whole = get_peft_model(AutoModelForCausalLM.from_pretrained(name), config)
        adapter |= {n: p.detach().clone() for n, p in whole.named_parameters() if "magnitude" in n}
        assert len([n for n in adapter if "magnitude" in n]) == 14
assert not read and sum(p.untyped_storage().nbytes() for n, p in model.named_parameters() if "layers" in n and "lora" not in n and "to_save" not in n) < 1000
sys.path.append("bench")
from live_tensors import LiveTensors
with LiveTensors() as live:
    live.phase = "shard"
    on_disk.shard_model(model, accelerator)
with loading_unsharded():  # transformers 5.17 would give ranks but the first other weights
    plain_model = AutoModelForCausalLM.from_pretrained(name)
plain = plain_model.state_dict()
found = {n: full_tensor(p) for n, p in model.state_dict().items()}
for n, value in found.items():
    if "lora_" in n:
        assert torch.equal(value, adapter[n]), n
    elif n == "score.weight":
        assert torch.equal(value, head) and value.std() > 0, n
    else:
        assert torch.equal(value, plain[on_disk._name_on_disk(n)]), n
held = sum(p.to_local().nbytes for p in model.parameters())
layer = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "layers.0." in n)
whole = sum(p.numel() * p.element_size() for p in model.parameters())
ids = torch.arange(20)[None] + 5
logits = model(input_ids=ids).logits
if not kind.startswith("reward"):  # LoRA changes nothing yet
    assert torch.allclose(logits, plain_model(input_ids=ids).logits, atol=1e-5)
print(json.dumps({"held": held, "whole": whole, "read": sum(t.nbytes for t in read), "live": live.peaks["shard"], "layer": layer, "finite": bool(logits.isfinite().all())}))
"""


def sharded(folder: str, kind: str) -> list[dict]:
    """What two ranks have found that load a model and shard it."""
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(forked.free_port()), "ACCELERATE_USE_FSDP": "true",
           "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}  # fmt: skip
    ranks = [forked.start("-c", SHARD, folder, kind, env=env | {"RANK": r, "LOCAL_RANK": r}) for r in ("0", "1")]
    found = []
    for done in map(forked.finish, ranks):
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


@pytest.mark.parametrize("kind", ["full", "lora", "reward", "dora"])
def test_each_rank_reads_its_part(kind, tiny_llama):
    for found in sharded(tiny_llama, kind):
        assert found["finite"] and found["held"] <= 0.55 * found["whole"]
        # DoRA's magnitudes: each rank reads the layers of half of them
        assert found["read"] <= (1.1 if kind == "dora" else 0.55) * found["whole"]


# What transformers makes of a file's tensors: stacks of experts, rows cut from a fused projection (read whole, one at a time),
# rows joined.
CONVERTED = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "tie_word_embeddings": True},
    "olmoe": {"num_experts": 4},
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
                    "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "moe_intermediate_size": 24},
    "hrm_text": {},
    "olmo_hybrid": {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}  # fmt: skip


@pytest.fixture(scope="session")
def converted(tiny_llama, tmp_path_factory):
    """Makes a model of 8 layers in several files, of an architecture in CONVERTED, with the tokenizer of tiny_llama."""

    def make(name: str) -> str:
        folder = tmp_path_factory.mktemp("converted") / name
        config = AutoConfig.for_model(
            name, vocab_size=600, hidden_size=16, intermediate_size=32, num_hidden_layers=8, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **CONVERTED[name],
        )  # fmt: skip
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="50KB")
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
        assert len(list(folder.glob("*.safetensors"))) > 2
        return str(folder)

    return functools.cache(make)


@pytest.mark.parametrize(
    ("name", "kind"), [("mixtral", "full"), ("mixtral", "lora"), ("qwen3_moe", "reward"), ("hrm_text", "full")]
)
def test_each_rank_makes_its_part_of_experts(name, kind, converted):
    """Bitwise what transformers loads, with LoRA on each expert too; read and held are a share, and one layer at most."""
    for found in sharded(converted(name), kind):
        assert found["finite"] and found["held"] <= 0.55 * found["whole"]
        if name != "hrm_text":
            assert found["read"] <= 0.55 * found["whole"]
        if kind != "lora":  # PEFT makes all of an adapter on every rank
            assert found["live"] <= found["held"] + found["layer"]


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_tensors_are_those_of_transformers(name, converted, fsdp):
    """Each parameter as a whole, and the shard of each of three ranks."""
    folder, options = converted(name), {"trust_remote_code": False}
    assert on_disk.stays_on_disk(folder, AutoModelForCausalLM, options)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with on_disk.leaving_weights_on_disk() as more:
        lazy, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **more)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    index = getattr(lazy, on_disk.INDEX)
    assert sum(isinstance(entry, Converted) for entry in index.values()) >= 2
    for key, parameter in plain.state_dict().items():
        shards = [on_disk.read_part(index[key], (slice(0, 1),))] + [
            on_disk.read_part(
                index[key],
                (slice(start, start + (len(parameter) + 2) // 3), *(slice(0, n) for n in parameter.shape[1:])),
            )
            for start in range(0, len(parameter), (len(parameter) + 2) // 3)
        ]
        assert torch.equal(shards[0], parameter[:1]) and torch.equal(torch.cat(shards[1:]), parameter), key
        assert torch.equal(on_disk.read_part(index[key], None), parameter), key


@pytest.fixture
def fsdp(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")


def test_only_under_fsdp(tiny_llama):
    model = load_policy(tiny_llama, AutoTokenizer.from_pretrained(tiny_llama), ModelConfig())
    assert not any(map(on_disk.is_place_holder, model.parameters())) and not hasattr(model, on_disk.INDEX)


def test_a_new_token_makes_the_embeddings_real(tiny_gpt2, fsdp):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    model = load_policy(tiny_gpt2, tokenizer, ModelConfig())
    plain = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    rows = len(plain.transformer.wte.weight)
    assert torch.equal(model.transformer.wte.weight[:rows], plain.transformer.wte.weight)
    torch.testing.assert_close(model.transformer.wte.weight[rows], plain.transformer.wte.weight.mean(0))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert on_disk.is_place_holder(model.transformer.h[0].mlp.c_fc.weight)


def test_a_new_head_is_initialised_as_ever(tiny_llama, fsdp, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    torch.manual_seed(3)
    lazy, new = load_reward_model(tiny_llama, tokenizer, ModelConfig())
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    torch.manual_seed(3)
    plain, also_new = load_reward_model(tiny_llama, tokenizer, ModelConfig())
    assert new == also_new == ["score"] and torch.equal(lazy.score.weight, plain.score.weight)
    assert isinstance(lazy, type(plain)) and lazy.dtype == plain.dtype
    for (name, buffer), (_, other) in zip(lazy.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name


def test_what_has_to_be_read_at_once_is_told(tiny_llama, fsdp, tmp_path, capsys, monkeypatch):
    """With the bytes: files that are quantised, and a conversion that may not work on parts."""
    options = {"trust_remote_code": False}
    assert (
        on_disk.stays_on_disk(tiny_llama, AutoModelForSequenceClassification, options) and not capsys.readouterr().out
    )
    quantised = shutil.copytree(tiny_llama, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with open(quantised / "model.safetensors", "ab") as file:
        file.truncate(123_456_789)
    assert not on_disk.stays_on_disk(str(quantised), AutoModelForCausalLM, options)
    assert capsys.readouterr().out == (
        f"note: each process holds all of {quantised}, 0.12 GB of files, while it loads: its files are quantised\n"
    )
    monkeypatch.setattr(on_disk, "unknown_operation", lambda model: "Negate")
    assert not on_disk.stays_on_disk(tiny_llama, AutoModelForCausalLM, options)
    assert "transformers converts its tensors by Negate, which" in capsys.readouterr().out


def test_experts_under_an_old_zero3_are_told(converted, tiny_llama, monkeypatch, capsys):
    """transformers before 5.23 holds all that it has converted, on every rank."""
    experts = converted("mixtral")
    zero3 = SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", lambda: zero3)
    options = {"trust_remote_code": False}
    told = "files, while it loads: transformers 5.22.2 converts its tensors all at once; 5.23 does it one by one"
    for number, name, expected in (
        ("5.22.2", experts, True),
        ("5.22.2", tiny_llama, False),
        ("5.23.0", experts, False),
    ):
        monkeypatch.setattr(on_disk.transformers, "__version__", number)
        assert not on_disk.stays_on_disk(name, AutoModelForCausalLM, options)
        assert (told in capsys.readouterr().out) == expected
    monkeypatch.setattr(on_disk.transformers, "__version__", "5.22.2")
    assert not on_disk.stays_on_disk(experts, AutoModelForCausalLM, options | {"quantization_config": None})
    assert not capsys.readouterr().out


def test_dora_on_4_bits_is_read_at_once(llama_64, fsdp, capsys):
    """Its magnitudes are those of the 4-bit weights."""
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    tokenizer = AutoTokenizer.from_pretrained(llama_64)
    storage = {"bnb_4bit_quant_storage": "float32"}  # which accelerate would shard, and cast
    options = ModelConfig(use_peft=True, use_dora=True, load_in_4bit=True, **storage)
    model = load_policy(llama_64, tokenizer, options)
    assert "DoRA's magnitudes are those of the 4-bit weights" in capsys.readouterr().out
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.quant_state.absmax.numel() == 128 * 256 / 64 and weight.dtype == torch.uint8


def test_buffers_are_read_at_once(tiny_llama, fsdp, tmp_path):
    """FSDP2 shards parameters only."""
    from test_saving import apertus

    apertus().save_pretrained(tmp_path / "apertus")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "apertus")
    lazy = load_policy(str(tmp_path / "apertus"), AutoTokenizer.from_pretrained(tiny_llama), ModelConfig())
    assert any("act_fn" in name for name, _ in lazy.named_buffers())
    for (name, buffer), (_, other) in zip(lazy.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
