"""Defaults that are read from the libraries' source are those of their classes, and messages tell them."""

import dataclasses

import pytest

from rlhf.config.defaults import defaults, describe, effective
from rlhf.config.recipe import Recipe
from rlhf.config.stage_config import StageConfig
from rlhf.errors import UserError
from rlhf.runs.folder import refuse_other_run


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_they_are_those_of_the_classes(stage):
    import trl

    trl_class = {"sft": trl.SFTConfig, "reward": trl.RewardConfig, "dpo": trl.DPOConfig}[stage]
    fields = [f for owner in (trl_class, trl.ModelConfig, StageConfig) for f in dataclasses.fields(owner)]
    real = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    found = {key: value for key, value in defaults(stage).items() if value is not None}
    different = {key: (value, real.get(key)) for key, value in found.items() if key in real and real[key] != value}
    assert different == {}
    assert len(found) > 80 and found["num_train_epochs"] == 3.0


def test_of_an_evaluation():
    assert effective({}, "evaluate", "max_new_tokens") == effective(
        {"max_new_tokens": None}, "evaluate", "max_new_tokens"
    )


def test_how_they_are_told():
    assert describe({}, "dpo", "beta") == "0.1 (default)" and describe({"beta": 0.3}, "dpo", "beta") == "0.3"
    assert (
        describe({}, "sft", "learning_rate") == "2e-05 (default)" and describe({}, "dpo", "chat_template") == "not set"
    )


def test_a_default_that_is_written_out_is_no_other_run(tmp_path):
    (tmp_path / "recipe.yaml").write_text("stage: dpo\noutput_dir: x\n")
    values = {"stage": "dpo", "output_dir": "x"}
    refuse_other_run(Recipe("dpo", "r.yaml", values | {"beta": 0.1}, {}), tmp_path, {})
    with pytest.raises(
        UserError, match=r"it differs in beta: 0.1 \(default\) -> 0.3; chat_template: not set -> 'chatml'\. "
    ):
        refuse_other_run(Recipe("dpo", "r.yaml", values | {"beta": 0.3, "chat_template": "chatml"}, {}), tmp_path, {})


def test_the_dtype_of_a_frozen_base_has_no_default_of_its_own():
    """On a GPU it is the checkpoint's: who sets it later in the same folder asks for another run."""
    lora = {"use_peft": True}
    assert (effective(lora, "dpo", "dtype"), describe(lora, "dpo", "dtype")) == (None, "not set")
    assert (effective({}, "dpo", "dtype"), describe({}, "dpo", "dtype")) == ("float32", "'float32' (default)")
