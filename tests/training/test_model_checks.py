"""Keys that reach into the model are refused with their place before a model loads, or have their effect."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteMoeConfig, LlamaConfig, Qwen3MoeConfig

from rlhf.__main__ import main
from rlhf.config.recipe import Recipe
from rlhf.training.model_checks import less_activations

SMALL = {
    "vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8,
}  # fmt: skip
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 2.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}


@pytest.fixture
def model_of(tiny_llama, tmp_path):
    """A folder with a model made from a config, and the tiny Llama's tokenizer."""

    def make(config):
        folder = tmp_path / config.model_type
        shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "gener*"))
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def llama(model_of):
    return lambda: model_of(LlamaConfig(**SMALL))


REFUSED = {
    "offloading": (lambda make: make(LlamaConfig(**SMALL)), "dpo", {"activation_offloading": True},
                   "activation_offloading moves activations from the GPU to host memory, but this run is on the CPU; remove it"),
    "offloaded checkpoints": (lambda make: make(LlamaConfig(**SMALL)), "sft", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"offload": True}},
                              "gradient_checkpointing_kwargs.offload moves activations from the GPU"),
    "their new name": (lambda make: make(LlamaConfig(**SMALL)), "sft", {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}},
                       "activation_checkpointing_kwargs.offload moves activations from the GPU"),
    "an argument of nothing": (lambda make: make(LlamaConfig(**SMALL)), "reward", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_layer": 2}},
                               "gradient_checkpointing_kwargs has 'every_layer'; expected use_reentrant, "),
    "no layers": (lambda make: make(LlamaConfig(**SMALL)), "reward", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 0}},
                  "gradient_checkpointing_kwargs.every_n_layers is 0; expected an integer from 1"),
    "no experts": (lambda make: make(LlamaConfig(**SMALL)), "sft", {"experts_implementation": "grouped_mm"},
                   "'experts_implementation' has no effect on "),
    "experts that TRL can't balance": (lambda make: make(GraniteMoeConfig(**SMALL, num_experts_per_tok=2, num_local_experts=4)), "dpo", {},
                                       "TRL can't compute the loss that balances the experts of granitemoe"),
    "positions by batch": (lambda make: make(LlamaConfig(**SMALL, rope_parameters=LONGROPE | {"original_max_position_embeddings": 64})), "dpo", {},
                           "and DPO compares two of them; set `max_length: 64` or less"),
}  # fmt: skip


@pytest.mark.parametrize("check", [["--check"], []], ids=["check", "start"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_weights(case, check, model_of, recipe, few_pairs, tmp_path, capsys, monkeypatch):
    import transformers

    make, stage, values, words = REFUSED[case]
    file = recipe(
        stage, model_name_or_path=make(model_of), dataset_name=few_pairs, output_dir=str(tmp_path / "out"), **values
    )

    if "activation_checkpointing" in values:
        text = Path(file).read_text()
        Path(file).write_text("".join(x for x in text.splitlines(True) if not x.startswith("gradient_checkpointing:")))

    def loads(*args, **kwargs):
        raise AssertionError("weights were loaded")

    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", loads)
    capsys.readouterr()
    assert main([stage, file, *check]) == 2
    error = capsys.readouterr().err
    assert re.match(rf"rlhf: {file}(:\d+)?: ", error) and words in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_rows_within_longropes_first_positions_are_trained(model_of, recipe, few_pairs, tmp_path, capsys):
    model = model_of(LlamaConfig(**SMALL, rope_parameters=LONGROPE | {"original_max_position_embeddings": 64}))
    for stage, max_length, note in (("dpo", 64, False), ("sft", 256, True)):
        file = recipe(
            stage,
            model_name_or_path=model,
            dataset_name=few_pairs,
            output_dir=str(tmp_path / stage),
            max_length=max_length,
        )
        assert main([stage, file, "--check"]) == 0
        assert (
            "a row's results depend on the batch that it is in; `max_length: 64` avoids it" in capsys.readouterr().out
        ) == note


def test_experts_that_need_no_balance(model_of, recipe, few_pairs, tmp_path):
    model = model_of(GraniteMoeConfig(**SMALL, num_experts_per_tok=2, num_local_experts=4))
    file = recipe(
        "dpo",
        model_name_or_path=model,
        dataset_name=few_pairs,
        output_dir=str(tmp_path / "out"),
        router_aux_loss_coef=0.0,
        max_steps=1,
    )
    assert main(["dpo", file]) == 0


@pytest.mark.parametrize(
    "stage", [pytest.param("sft", marks=pytest.mark.slow), "dpo", pytest.param("reward", marks=pytest.mark.slow)]
)
def test_experts_implementations_train_alike(stage, model_of, recipe, few_pairs, tmp_path, monkeypatch):
    """The key reaches the model, under packing, and the losses are those of the others to rounding."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = model_of(Qwen3MoeConfig(**SMALL, **MIXTURE, num_experts=4))
    used, losses = [], {}
    mapping = type(ALL_EXPERTS_FUNCTIONS)._global_mapping
    for name in ("batched_mm", "grouped_mm"):
        monkeypatch.setitem(
            mapping,
            name,
            lambda *args, name=name, real=mapping[name], **kwargs: (
                (torch.is_grad_enabled() and used.append(name)) or real(*args, **kwargs)
            ),
        )
    for name in ("eager", "batched_mm", "grouped_mm"):
        used.clear()
        out = tmp_path / f"{stage}-{name}"
        file = recipe(stage, name=f"{stage}-{name}", model_name_or_path=model, dataset_name=few_pairs, output_dir=str(out), experts_implementation=name,
                      max_steps=2, logging_steps=1, learning_rate=1e-3, seed=3)  # fmt: skip
        assert main([stage, file]) == 0
        assert set(used) == (set() if name == "eager" else {name})
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines if "loss" in line]
        assert '"experts_implementation"' not in (out / "config.json").read_text()  # not a property of the model
    assert len(losses["eager"]) == 2
    for name, found in losses.items():
        assert found == pytest.approx(losses["eager"], abs=2e-5), name


def test_a_reference_without_experts(llama, model_of, recipe, few_pairs, tmp_path):
    """The key is the policy's; a dense reference model is computed as it is."""
    policy = model_of(Qwen3MoeConfig(**SMALL, **MIXTURE, num_experts=4))
    file = recipe("dpo", model_name_or_path=policy, reference_model=llama(), dataset_name=few_pairs, output_dir=str(tmp_path / "out"),
                  experts_implementation="batched_mm", max_steps=1)  # fmt: skip
    assert main(["dpo", file]) == 0


@pytest.mark.parametrize("values, on, words", [
    ({}, False, "set `gradient_checkpointing: true`, "),
    ({}, True, "set `gradient_checkpointing_kwargs: {offload: true}` (activations wait in host memory: slower), "),
    ({"activation_checkpointing": True}, True, "set `activation_checkpointing_kwargs: {offload: true}` (activations wait in host memory: slower), "),
    ({"gradient_checkpointing_kwargs": {"offload": True}}, True, ""),
])  # fmt: skip
def test_what_takes_less_memory_after_that(values, on, words):
    recipe = Recipe("dpo", "r.yaml", values, {})
    plan = SimpleNamespace(recipe=recipe, args=SimpleNamespace(activation_checkpointing=on, gradient_checkpointing=on))
    assert less_activations(plan) == words


def test_a_launch_file_that_compiles_is_refused(recipe, tiny_llama, few_pairs, tmp_path, monkeypatch, capsys):
    names = {"model_name_or_path": tiny_llama, "dataset_name": few_pairs, "output_dir": str(tmp_path / "o")}
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert main(["dpo", recipe("dpo", **names), "--check"]) == 2
    assert "the launch file's dynamo_config (ACCELERATE_DYNAMO_BACKEND=inductor) compiles" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert main(["dpo", recipe("dpo", **names), "--check"]) == 0
