"""4-bit weights under FSDP2: each rank packs and holds its part, and the layers compute what unsharded ones do."""

import json

import forked
import pytest

pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")

SHARD = """
import json, os, sys, torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoTokenizer
from trl import ModelConfig
from rlhf.distributed.sharding import full_tensor, num_elements, reshard
from rlhf.models import four_bits, on_disk
from rlhf.models.counts import count_parameters
from rlhf.models.loading import load_nf4, load_policy
from rlhf.models.pieces import list_pieces

name, nested, computed_in, targets = sys.argv[1:]
dtype = getattr(torch, computed_in)
PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU  # as prepare_processes does
policy = MixedPrecisionPolicy(param_dtype=dtype) if dtype != torch.float32 else None
plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", mixed_precision_policy=policy)
accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
tokenizer = AutoTokenizer.from_pretrained(name)
options = ModelConfig(use_peft=True, load_in_4bit=True, use_bnb_nested_quant=nested == "True", dtype=computed_in)
read, before = [], on_disk._read
on_disk._read = lambda entry, part: (read.append(before(entry, part)), read[-1])[1]

def load():
    torch.manual_seed(7)
    model = load_policy(name, tokenizer, options)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets if targets.startswith("all") else [targets], init_lora_weights=False))
    for n, p in model.named_parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.bfloat16)  # as TRL casts the adapter on 4 bits
    return model

model = load()
assert not read and model.is_loaded_in_4bit and model.config.quantization_config.load_in_4bit
counted = count_parameters(model)
on_disk.shard_model(model, accelerator)
os.environ.pop("ACCELERATE_USE_FSDP")
plain = load()
assert count_parameters(model) == count_parameters(plain) == counted
layers = {n.replace("_orig_mod.", ""): m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
others = {n: m for n, m in plain.named_modules() if isinstance(m, Linear4bit)}
assert layers.keys() == others.keys() and len(layers) > 6
for n, other in others.items():
    layer = layers[n]
    assert layer.weight.dtype == dtype and full_tensor(layer.weight).view(torch.uint8).flatten().equal(other.weight.data.flatten()), n
    assert four_bits._magnitudes(layer, full_tensor(layer.absmax)).equal(other.weight.quant_state.absmax), n
    if nested == "True":
        assert layer.quant_state.offset.equal(other.weight.quant_state.offset)
        assert layer.quant_state.state2.absmax.equal(other.weight.quant_state.state2.absmax)
    assert num_elements(layer.weight) + num_elements(layer.absmax) == num_elements(other.weight) == layer.in_features * layer.out_features
    assert four_bits.dequantised(layer).equal(four_bits.dequantised(other)), n
trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
assert {p.dtype for n, p in trained.items()} == {torch.bfloat16}
held = sum(p.to_local().nbytes for m in layers.values() for p in (m.weight, m.absmax))
whole = sum(m.weight.nbytes + m.weight.quant_state.absmax.nbytes for m in others.values())

ids = torch.arange(20)[None] + 5
plain.gradient_checkpointing_enable(); model.gradient_checkpointing_enable()
for step in range(3):  # the second reads memory that was freed and gathered again
    losses = []
    for one in (model, plain):
        one.zero_grad()
        one.train()
        with torch.autocast("cpu", dtype, enabled=one is plain and dtype != torch.float32):
            loss = one(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    exact = dtype == torch.float32
    assert abs(losses[0] - losses[1]) <= (1e-6 if exact else 2e-2), losses
    for n, p in plain.named_parameters():
        if p.requires_grad:
            a, b = full_tensor(trained[n].grad).float(), p.grad.float()
            assert b.abs().sum() > 0 and (a - b).norm() <= (1e-2 if exact else 0.2) * b.norm(), (n, (a - b).norm(), b.norm())
with torch.no_grad():
    model.eval(); plain.eval()
    a, b = (one(input_ids=ids).logits.float() for one in (model, plain))
    assert (a - b).abs().max() <= (1e-5 if exact else 5e-2) * b.abs().max()
reshard(model)
for a, b in zip(list_pieces(model, torch.float32), list_pieces(plain, torch.float32), strict=True):
    found, expected = a.fetch(True), b.fetch(True)
    assert found.keys() == expected.keys()
    for n in found:
        assert torch.equal(found[n], expected[n]) and found[n].shape == a.tensors[n].shape, n
print(json.dumps({"held": held, "whole": whole, "read": sum(t.nbytes for t in read)}))
"""


def start_ranks(world, *words):
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(forked.free_port()), "ACCELERATE_USE_FSDP": "true",
           "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}  # fmt: skip
    ranks = [forked.start("-c", SHARD, *words, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(world)]
    for done in map(forked.finish, ranks):
        assert done.returncode == 0, done.stderr[-3000:]
        yield json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def gpt2_64(tiny_gpt2, tmp_path):
    import torch
    from transformers import AutoConfig, AutoTokenizer, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(AutoConfig.from_pretrained(tiny_gpt2, n_embd=64, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


@pytest.mark.parametrize(
    ("model", "world", "nested", "dtype", "targets"),
    [
        ("llama_64", 2, False, "float32", "all-linear"),
        ("llama_64", 3, True, "bfloat16", "all-linear"),  # blocks that two ranks share
        ("gpt2_64", 2, True, "float32", "all-linear"),  # transposed weights, biases
    ],
)
def test_each_rank_packs_and_holds_its_part(model, world, nested, dtype, targets, request):
    for found in start_ranks(world, request.getfixturevalue(model), str(nested), dtype, targets):
        assert found["held"] <= (1 / world + 0.05) * found["whole"]
