"""`load_best_model_at_end` and early stopping under every engine, on two processes: the weights of one process."""

import json
from pathlib import Path

import forked
import pytest
import torch
from test_finish import weights
from test_resume import needs_deepspeed

from rlhf.runs.metrics import read_metrics

slow = pytest.mark.slow
BEST = {
    "eval_strategy": "steps", "eval_steps": 1, "heldout": 0.3, "save_strategy": "steps", "save_steps": 8, "logging_steps": 1,
    "max_steps": 8, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "global_batch_size": 2, "max_tokens_per_device": 4096,
    "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 1,
    "early_stopping_patience": 2,
}  # fmt: skip


@pytest.mark.parametrize("use_peft", [True, pytest.param(False, marks=slow)])
@pytest.mark.parametrize(
    ("launch_file", "processes"),
    [pytest.param("single.yaml", 1, marks=slow), pytest.param("ddp.yaml", 2, marks=slow), ("zero2.yaml", 2),
     pytest.param("zero3.yaml", 2, marks=slow), pytest.param("fsdp2.yaml", 2, marks=slow)],
)  # fmt: skip
def test_the_best_weights_and_the_same_stop(launch_file, processes, use_peft, recipe, tiny_llama, few_pairs, tmp_path):
    """The first evaluation has the lowest loss: stopped after step 3, weights of step 1, as one process has them after it."""
    needs_deepspeed(launch_file)
    lora = (
        {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "learning_rate": 1e-2} if use_peft else {}
    )

    def start(name, processes, launch_file, **more):
        values = {key: value for key, value in {**BEST, **lora, **more}.items() if value is not None}
        file = recipe("dpo", name=name, model_name_or_path=tiny_llama, dataset_name=few_pairs,
                      output_dir=str(tmp_path / name), **values)  # fmt: skip
        lines = (
            Path(file).read_text().splitlines(keepends=True)
        )  # the fixture's own batch size has no place beside ours
        Path(file).write_text("".join(line for line in lines if not line.startswith("per_device")))
        done = forked.launch(processes, "dpo", file, launch_file=launch_file)
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
        return json.loads((tmp_path / name / "complete.json").read_text())

    none = dict.fromkeys(("load_best_model_at_end", "early_stopping_patience", "metric_for_best_model"))
    start("one", 1, "ddp.yaml", **none | {"max_steps": 1})
    complete = start("best", processes, launch_file)
    losses = [row["eval_loss"] for row in read_metrics(tmp_path / "best") if "eval_loss" in row]
    assert min(losses) == losses[0], losses
    assert (complete["steps"], complete["stopped_early_of"], complete["best"]["step"]) == (3, 8, 1)
    found, expected = weights(tmp_path / "best"), weights(tmp_path / "one")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6)
