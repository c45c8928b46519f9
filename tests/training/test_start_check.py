"""DPO's check of its start: a right start passes in every dtype, a wrong reference in none."""

import dataclasses
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from rlhf.__main__ import main
from rlhf.config.recipe import load_recipe
from rlhf.distributed.topology import topology_of_environment
from rlhf.errors import UserError
from rlhf.models.loading import load_nf4
from rlhf.models.precision import compute_dtype
from rlhf.models.tokenizer import load_tokenizer
from rlhf.training.dpo import DPO
from rlhf.training.plan import make_plan
from rlhf.training.start_check import Start, check_start, expected_loss, other_shape, refuse_wrong_start, starts

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
DTYPES = ["float32", "bfloat16", "float16"]
BITS = {"load_in_4bit": True}


@pytest.fixture
def make_trainer(recipe, few_pairs, tmp_path):
    def make(model, **values):
        file = recipe("dpo", model_name_or_path=model, dataset_name=few_pairs, output_dir=str(tmp_path / "out"), bf16=False,
                      use_cpu=True, **values)  # fmt: skip
        loaded = load_recipe(file, "dpo")
        return DPO.build(make_plan(DPO, loaded, topology_of_environment()), None)

    return make


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def use_reference(trainer, model):
    add_fused_lm_head(model)
    trainer.ref_model, trainer.precompute_ref_logps = model.eval(), False


# --- right starts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        *((dtype, LORA) for dtype in DTYPES),
        *((dtype, {}) for dtype in DTYPES[:2]),  # full fine-tuning
        *((dtype, LORA | BITS) for dtype in DTYPES[:2]),
        ("bfloat16", LORA | BITS | {"reference": "online"}),
        ("float32", LORA | {"bf16": True}),  # autocast
    ],
)
def test_a_right_start_passes(dtype, values, recipe, llama_64, few_pairs, tmp_path, capsys):
    """Through the whole stage, with a beta of 0.5."""
    if values.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    file = recipe("dpo", model_name_or_path=llama_64, dataset_name=few_pairs, output_dir=str(tmp_path / "out"), dtype=dtype, beta=0.5,
                  use_cpu=True, **{"bf16": False} | values | {"max_steps": 1})  # fmt: skip
    assert main(["dpo", file]) == 0
    noisy = "bfloat16" if "bf16" in values else dtype
    shown = re.search(r"  start    policy and reference differ by (\S+) nats per answer, allowed (\S+) \(noise of (\w+): (\S+)\)", capsys.readouterr().out)  # fmt: skip
    off, allowed, named, noise = shown.groups()
    assert named == noisy and float(off) <= float(allowed) and float(noise) <= float(allowed)
    assert float(allowed) < (0.03 if noisy == "float32" else 2)


@pytest.mark.parametrize(
    ("dtype", "values", "code"), [("bfloat16", LORA, 0), ("bfloat16", LORA | BITS, 0), ("float32", LORA, 2)]
)
def test_noise_of_the_dtype_passes_in_that_dtype(
    dtype, values, code, recipe, llama_64, few_pairs, tmp_path, monkeypatch, capsys
):
    """A cache from kernels that round otherwise, by 0.2 nats per answer: bf16's noise, and another model in fp32."""
    from rlhf.training import reference

    if values.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    forward = reference.forward_logps
    monkeypatch.setattr(reference, "forward_logps", lambda *a: forward(*a) + [0.2, -0.2])
    file = recipe("dpo", model_name_or_path=llama_64, dataset_name=few_pairs, output_dir=str(tmp_path / "out"), dtype=dtype, beta=0.5,
                  use_cpu=True, bf16=False, **values | {"max_steps": 1})  # fmt: skip
    assert main(["dpo", file]) == code
    shown = capsys.readouterr()
    assert "policy and reference differ by 0.2 nats per answer" in shown.out
    assert ("DPO does not start from its reference" in shown.err) == (code == 2)


def test_noise_is_measured_and_allowed(make_trainer, llama_64, monkeypatch):
    """A model whose log-probabilities depend on the shape of its batch, by nats: its reference of one shape passes in another."""
    trainer = make_trainer(llama_64)
    batch = first_batch(trainer)
    compute = trainer.compute_ref_log_probs

    def noisy(model, inputs):
        return tuple(side + inputs["input_ids"].shape[0] for side in compute(model, inputs))

    monkeypatch.setattr(trainer, "compute_ref_log_probs", noisy)
    # 2 pairs are 4 rows, and 2 in the other shape: it differs by 2 nats; against the cache, which is without, by 4
    start = check_start(trainer, trainer.model, batch)
    assert (start.noise_nats, start.off_nats) == (pytest.approx(2, rel=1e-3), pytest.approx(4, rel=1e-3))
    assert start.allowed_nats == pytest.approx(12, rel=1e-3)
    monkeypatch.setattr(
        trainer, "compute_ref_log_probs", lambda model, inputs: tuple(side + 4 for side in compute(model, inputs))
    )
    with pytest.raises(UserError, match="differ by 4 nats per answer, allowed 0.02"):
        check_start(trainer, trainer.model, batch)


def test_other_shape():
    """[c0 c1 c2, r0 r1 r2] -> [r0, c0]; a single pair twice."""
    batch = {"input_ids": torch.arange(6)[:, None], "ref_chosen_logps": torch.zeros(3)}
    assert {k: x.flatten().tolist() for k, x in other_shape(batch).items()} == {"input_ids": [3, 0]}
    four = {"input_ids": torch.arange(8)[:, None]}
    assert other_shape(four)["input_ids"].flatten().tolist() == [4, 5, 0, 1]
    assert other_shape({"input_ids": torch.tensor([[1], [2]])})["input_ids"].flatten().tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("weights", "mixed", "lora", "found"),
    [
        ("float32", "no", "float32", "float32"), ("float32", "bf16", "float32", "bfloat16"), ("float32", "fp16", "float32", "float16"),
        ("bfloat16", "no", "float32", "bfloat16"), ("float32", "no", "bfloat16", "float32"), ("float16", "bf16", "float32", "bfloat16"),
    ],
)  # fmt: skip
def test_the_dtype_that_a_model_computes_in(weights, mixed, lora, found):
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2), "lora_A": torch.nn.Linear(2, 2)})
    model["layer"].to(getattr(torch, weights))
    model["lora_A"].to(getattr(torch, lora))
    assert compute_dtype(model, mixed) == getattr(torch, found)
    model["layer"].compute_dtype = torch.bfloat16  # a 4-bit layer's
    assert compute_dtype(model, mixed) == torch.bfloat16


# --- wrong ones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["another model", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_reference_is_refused_in_every_dtype(dtype, wrong, make_trainer, llama_64):
    trainer = make_trainer(llama_64, dtype=dtype, **LORA)
    batch = first_batch(trainer)
    check_start(trainer, trainer.model, batch)
    kind = getattr(torch, dtype)
    if wrong == "nf4":
        pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
        use_reference(trainer, load_nf4(llama_64, load_tokenizer(llama_64), kind))
    else:
        other = AutoModelForCausalLM.from_pretrained(llama_64, dtype=kind)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.05)
        use_reference(trainer, other)
    with pytest.raises(
        UserError, match=f"DPO does not start from its reference: .*noise of {dtype}.*Nothing was trained"
    ):
        check_start(trainer, trainer.model, batch)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("bits", [{}, BITS], ids=["", "qlora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_before_sft_is_refused_as_the_reference_of_its_adapter(dtype, bits, recipe, make_trainer, llama_64, few_pairs, tmp_path):  # fmt: skip
    """As adapter-off would be, or a cache of it: `ref` is emptied, which TRL makes to hold the adapter's copy."""
    if bits:
        pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    adapter = tmp_path / "sft"
    file = recipe("sft", model_name_or_path=llama_64, dataset_name=few_pairs, output_dir=str(adapter), dtype=dtype, use_cpu=True,
                  bf16=False, merge_adapter=False, **LORA | bits)  # fmt: skip
    assert main(["sft", file]) == 0
    trainer = make_trainer(str(adapter), dtype=dtype, reference="online", **LORA | bits)
    batch = first_batch(trainer)
    start = check_start(trainer, trainer.model, batch)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".ref." in name:
                parameter.zero_()
    with pytest.raises(UserError, match="DPO does not start from its reference"):
        check_start(trainer, trainer.model, batch)
    assert start.off_nats <= start.allowed_nats


# --- the judgement ---------------------------------------------------------------------------------------------------

GOOD = Start(0.6931, math.log(2), 0.1, 0.0, 0.0, torch.float32, 100.0)


@pytest.mark.parametrize(
    ("change", "stops"),
    [
        ({}, False),
        ({"loss": 0.6950}, False),  # 1e-4 + 0.1 x 0.02 = 2.1e-3
        ({"loss": 0.6960}, True),
        ({"off_nats": 0.021}, True),
        ({"off_nats": 0.021, "noise_nats": 0.004}, False),  # 6 x 0.004
        ({"off_nats": 0.4, "dtype": torch.bfloat16}, False),  # 6 x 2^-7 x sqrt(100) = 0.47
        ({"off_nats": 0.5, "dtype": torch.bfloat16}, True),
        ({"loss": 25.0, "expected_loss": 25.0}, False),  # (0 - 1/(2 x 0.1))^2: IPO starts elsewhere
        ({"loss": 3.0, "expected_loss": None}, False),  # SFT's
        ({"loss": 3.0, "expected_loss": None, "off_nats": 5.0}, True),
        ({"loss": float("nan")}, True),
        ({"loss": float("nan"), "expected_loss": None}, True),
        ({"off_nats": float("nan")}, True),
    ],
)
def test_the_check_of_step_zero(change, stops):
    start = dataclasses.replace(GOOD, **change)
    if stops:
        with pytest.raises(
            UserError, match="DPO does not start from its reference: before the first update policy and"
        ):
            refuse_wrong_start(start)
    else:
        refuse_wrong_start(start)


@pytest.fixture
def scored(make_trainer, tiny_llama):
    """A trainer, and a first batch whose reference is the policy itself."""
    trainer = make_trainer(tiny_llama)
    trainer.model.eval()
    batch = first_batch(trainer)
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = trainer.compute_ref_log_probs(trainer.model, batch)
    return trainer, batch


KINDS = [kind for kind in starts(0.1, 0.1, 0.05)]


def test_all_of_trls_losses_are_known(scored):
    trainer, batch = scored
    trainer.loss_types = ["no such loss"]
    with pytest.raises(ValueError, match="Unknown loss type") as told:
        trainer.compute_loss(trainer.model, batch)
    names = set(re.findall(r"'(\w+)'", str(told.value).split("Should be one of")[1]))
    assert names == {*KINDS, "sft"}


def test_each_loss_starts_where_it_should_and_moves_no_faster(scored):
    """Against TRL's own losses, with log-ratios of 0 and of 0.001 nats."""
    trainer, batch = scored
    trainer.label_smoothing, small = 0.1, 1e-3
    with torch.no_grad():
        for kind in KINDS:
            trainer.loss_types, trainer.loss_weights = [kind], [2.0]
            expected, slope = expected_loss(trainer)
            assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-5), kind
            for chosen, rejected in ((small, -small), (-small, small), (small, small), (small, 0.0)):
                moved = batch | {"ref_chosen_logps": batch["ref_chosen_logps"] + chosen,
                                 "ref_rejected_logps": batch["ref_rejected_logps"] + rejected}  # fmt: skip
                change = abs(trainer.compute_loss(trainer.model, moved).item() - expected)
                assert change <= 1.05 * slope * small + 2e-6 * max(1, expected), kind
        trainer.loss_types, trainer.loss_weights = ["sigmoid", "sft"], [1.0, 1.0]
        assert expected_loss(trainer) == (None, 0.0)
        trainer.loss_types, trainer.loss_weights = ["sigmoid", "bco_pair"], [0.5, 0.25]
        assert expected_loss(trainer) == (pytest.approx(math.log(2)), pytest.approx(0.075))
