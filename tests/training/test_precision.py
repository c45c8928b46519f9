"""Sums that fp32 spoils are made in float64: norms of gradients on CPUs, log-probabilities of answers, their references."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from rlhf.distributed.sharding import sum_of_squares
from rlhf.training.precision import AccurateNorm, Float64References, sum_logps_in_float64, train_adapter_in_float32


def large_gradient():
    return torch.randn(49_152, 128, generator=torch.Generator().manual_seed(0))


def test_squares_are_added_in_float64():
    gradient, small = large_gradient(), torch.tensor([3.0, 4.0])
    exact = float(gradient.double().square().sum())
    assert sum_of_squares([gradient]) == pytest.approx(exact, rel=1e-12)
    assert sum_of_squares([small, gradient.T, small.bfloat16()]) == pytest.approx(exact + 50, rel=1e-12)
    assert sum_of_squares([]) == 0


class Norms:
    """Stands for transformers' Trainer."""

    def _clip_grad_norm(self, model):
        return "theirs"

    def _get_grad_norm(self, model, grad_norm=None):
        return "theirs" if grad_norm is None else grad_norm


class Ours(AccurateNorm, Norms):
    def __init__(self, device="cpu", deepspeed=False, max_norm=1.0):
        self.args = SimpleNamespace(device=torch.device(device), max_grad_norm=max_norm)
        self.is_deepspeed_enabled = deepspeed


def with_gradients(*gradients):
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros_like(g)) for g in gradients)
    for parameter, gradient in zip(model, gradients, strict=True):
        parameter.grad = gradient.clone()
    return model


def test_the_norm_is_exact_and_clips_as_torch_does():
    """3, 4 and 12 make 13: clipped to 6.5, each is half of it; a norm below the limit changes nothing."""
    model = with_gradients(torch.tensor([3.0, 4.0]), torch.tensor([12.0]))
    assert Ours(max_norm=6.5)._clip_grad_norm(model) == pytest.approx(13)
    assert [g.tolist() for g in (p.grad for p in model)] == [pytest.approx([1.5, 2.0]), pytest.approx([6.0])]
    assert Ours(max_norm=6.6)._clip_grad_norm(model) == pytest.approx(6.5)
    assert Ours()._get_grad_norm(model) == pytest.approx(6.5)  # no clipping: only the log asks
    assert [g.tolist() for g in (p.grad for p in model)] == [pytest.approx([1.5, 2.0]), pytest.approx([6.0])]
    gradient = large_gradient()
    assert Ours()._clip_grad_norm(with_gradients(gradient)) == pytest.approx(float(gradient.double().norm()), rel=1e-12)


def test_an_accurate_norm_is_left_alone():
    model = with_gradients(torch.tensor([3.0]))
    assert Ours(deepspeed=True)._clip_grad_norm(model) == Ours(device="cuda")._clip_grad_norm(model) == "theirs"
    assert Ours(deepspeed=True)._get_grad_norm(model) == "theirs" and Ours()._get_grad_norm(model, 5.0) == 5.0


def test_torchs_own_norm_is_still_poor():
    """When this fails, torch adds squares well on CPUs: AccurateNorm can go."""
    gradient = large_gradient()
    assert abs(float(torch.linalg.vector_norm(gradient)) / float(gradient.double().norm()) - 1) > 1e-5


def test_log_probabilities_are_float64(tiny_llama):
    """What the fused LM head returns is what it was; gradients are as before."""
    ids = torch.arange(5, 45)[None]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    add_fused_lm_head(model)
    found = []
    for _ in range(2):
        outputs = model(input_ids=ids, labels=ids, fused_lm_head=True)
        outputs.log_probs.sum().backward()
        found.append((outputs.log_probs.detach(), model.get_input_embeddings().weight.grad.clone()))
        model.zero_grad()
        sum_logps_in_float64(model)
    assert (found[0][0].dtype, found[1][0].dtype) == (torch.float32, torch.float64)
    assert torch.equal(found[0][0].double(), found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert model(input_ids=ids).logits.dtype == torch.float32


def test_references_stay_float64():
    """-4000 and a step of fp32 there, 2.4e-4: TRL's collator would round it away."""
    exact = -4000 - 2.0**-14
    collate = Float64References(lambda examples: {"ref_chosen_logps": torch.tensor([e["ref_chosen_logps"] for e in examples]), "x": 1})  # fmt: skip
    batch = collate([{"ref_chosen_logps": exact}, {"ref_chosen_logps": -1.0}])
    assert batch["ref_chosen_logps"].tolist() == [exact, -1.0] and batch["x"] == 1 and "ref_rejected_logps" not in batch
    assert torch.tensor([exact]).item() == -4000


def test_a_qlora_adapter_is_float32(tiny_llama):
    """TRL casts the adapter to bf16, not its copy `ref`: it gets back what 8 bits of mantissa can't hold, 1 + 2^-12."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama).bfloat16(), LoraConfig(r=2, target_modules=["q_proj"])
    )
    model.add_adapter("ref", model.peft_config["default"])
    parameters = dict(model.named_parameters())
    trained = {name: p for name, p in parameters.items() if ".default." in name}
    references = {name: parameters[name.replace(".default.", ".ref.")].requires_grad_(False) for name in trained}
    assert len(trained) == 4
    for name, parameter in trained.items():
        parameter.requires_grad_(True)
        references[name].data.fill_(1 + 2.0**-12)
        parameter.data = references[name].detach().to(torch.bfloat16)
    train_adapter_in_float32(model)
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        assert torch.equal(parameter, references[name]) and parameter.data_ptr() != references[name].data_ptr()
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_new_qlora_adapter_is_float32(tiny_llama):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(r=2, target_modules=["q_proj"]))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data.to(torch.bfloat16)
    train_adapter_in_float32(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
