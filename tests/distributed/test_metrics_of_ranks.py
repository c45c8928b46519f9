"""TRL's own batches on two ranks: metrics that are gathered once per log are those gathered per micro-batch."""

from pathlib import Path

import pytest
from test_ddp import launch

from rlhf.runs.metrics import read_metrics

NOT_A_RESULT = ("runtime", "per_second", "flos", "memory")


@pytest.mark.parametrize("stage", ["dpo", pytest.param("reward", marks=pytest.mark.slow), pytest.param("sft", marks=pytest.mark.slow)])  # fmt: skip
def test_every_number_to_the_last_bit(stage, recipe, tiny_llama, few_pairs, tmp_path):
    """Accumulation over 3 micro-batches, two steps per log, and an evaluation whose last batch repeats rows."""
    found = []
    for name, program in (
        ("later", ("-m", "rlhf")),
        ("now", (str(Path(__file__).with_name("eager_metrics_worker.py")),)),
    ):
        out = tmp_path / name
        file = recipe(
            stage, name=name, model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(out), max_steps=4,
            per_device_train_batch_size=1, gradient_accumulation_steps=3, per_device_eval_batch_size=2, logging_steps=2,
            use_peft=True, lora_r=4, lora_target_modules="all-linear", eval_dataset_name="embedded:sample",
            dataset_test_split="heldout", max_eval_examples=7, eval_strategy="steps", eval_steps=2,
        )  # fmt: skip
        assert "(2 processes on cpu)" in launch(2, stage, file, program=program)
        found.append([{k: v for k, v in row.items() if k != "time" and not any(w in k for w in NOT_A_RESULT)} for row in read_metrics(out)])  # fmt: skip
    assert found[0] == found[1] and sum(len(row) for row in found[0]) > 30
