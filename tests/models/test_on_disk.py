"""FSDP2: weights stay on disk until the model is sharded, and every rank then reads its own part."""

import json

import forked
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig

from rlhf.models import on_disk
from rlhf.models.loading import load_policy, load_reward_model

SHARD = """
import json, sys, torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig
from rlhf.distributed.sharding import full_tensor
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
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["norm"], use_dora=kind == "dora")
    model = get_peft_model(model, config)
    adapter = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    if kind == "dora":
        whole = get_peft_model(AutoModelForCausalLM.from_pretrained(name), config)
        adapter |= {n: p.detach().clone() for n, p in whole.named_parameters() if "magnitude" in n}
        assert len([n for n in adapter if "magnitude" in n]) == 14
assert not read and sum(p.untyped_storage().nbytes() for n, p in model.named_parameters() if "layers" in n and "lora" not in n) < 1000
on_disk.shard_model(model, accelerator)
plain = AutoModelForCausalLM.from_pretrained(name).state_dict()
found = {n: full_tensor(p) for n, p in model.state_dict().items()}
for n, value in found.items():
    if "lora_" in n:
        assert torch.equal(value, adapter[n]), n
    elif n == "score.weight":
        assert torch.equal(value, head) and value.std() > 0, n
    else:
        assert torch.equal(value, plain[on_disk._name_on_disk(n)]), n
held = sum(p.to_local().nbytes for p in model.parameters())
whole = sum(p.numel() * p.element_size() for p in model.parameters())
ids = torch.arange(20)[None] + 5
logits = model(input_ids=ids).logits
if not kind.startswith("reward"):  # LoRA changes nothing yet
    assert torch.allclose(logits, AutoModelForCausalLM.from_pretrained(name)(input_ids=ids).logits, atol=1e-5)
print(json.dumps({"held": held, "whole": whole, "read": sum(t.nbytes for t in read), "finite": bool(logits.isfinite().all())}))
"""


@pytest.mark.parametrize("kind", ["full", "lora", "reward", "dora"])
def test_each_rank_reads_its_part(kind, tiny_llama):
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(forked.free_port()), "ACCELERATE_USE_FSDP": "true",
           "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}  # fmt: skip
    ranks = [forked.start("-c", SHARD, tiny_llama, kind, env=env | {"RANK": r, "LOCAL_RANK": r}) for r in ("0", "1")]
    for done in map(forked.finish, ranks):
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["finite"] and found["held"] <= 0.55 * found["whole"]
        # DoRA's magnitudes: each rank reads the layers of half of them
        assert found["read"] <= (1.1 if kind == "dora" else 0.55) * found["whole"]


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


def test_what_has_to_be_read_at_once_is_told(tiny_llama, fsdp, tmp_path, capsys):
    """Experts, which transformers joins when it loads."""
    from test_saving import mixtral

    mixtral().save_pretrained(tmp_path / "experts")
    options = {"trust_remote_code": False}
    assert not on_disk.stays_on_disk(str(tmp_path / "experts"), AutoModelForCausalLM, options)
    assert "note: each process holds all of" in capsys.readouterr().out
    assert on_disk.stays_on_disk(tiny_llama, AutoModelForSequenceClassification, options)


def test_dora_on_4_bits_is_read_at_once(llama_64, fsdp):
    """Its magnitudes are those of the 4-bit weights."""
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    tokenizer = AutoTokenizer.from_pretrained(llama_64)
    storage = {"bnb_4bit_quant_storage": "float32"}  # which accelerate would shard, and cast
    options = ModelConfig(use_peft=True, use_dora=True, load_in_4bit=True, **storage)
    model = load_policy(llama_64, tokenizer, options)
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
