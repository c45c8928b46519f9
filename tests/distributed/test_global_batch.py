"""The same recipe on 1, 2 and 3 processes (gloo, DDP): every step's numbers and the final weights."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_ddp import launch

from rlhf.runs.metrics import read_metrics

OF_THE_SPLIT = {"time", "imbalance", "micro_batches", "padding"}


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_any_number_of_processes(stage, recipe, tiny_llama, few_pairs, tmp_path):
    """12 rows, 5 a step, so 5 + 5 + 2: with 3 processes the last step has one with nothing to do."""
    runs = {}
    for processes, tokens in ((1, 100_000), (2, 520), (3, 1000)):
        out = tmp_path / f"{stage}{processes}"
        file = Path(recipe(
            stage, name=out.name, model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(out), max_steps=4,
            use_peft=True, lora_r=4, lora_target_modules="all-linear", global_batch_size=5, max_tokens_per_device=tokens,
            eval_dataset_name="embedded:sample", dataset_test_split="heldout", max_eval_examples=7, eval_strategy="steps",
            eval_steps=4,
        ))  # fmt: skip
        file.write_text("".join(x for x in file.read_text().splitlines(True) if "per_device_train" not in x))
        shown = launch(processes, stage, str(file))
        assert f"of 5 examples ({processes} process{'es' if processes > 1 else ''} on cpu)" in shown
        rows = [{k: v for k, v in r.items() if k not in OF_THE_SPLIT} for r in read_metrics(out) if r.keys() & {"loss", "eval_loss"}]  # fmt: skip
        runs[processes] = rows, load_file(out / "model.safetensors")
    assert len(runs[1][0]) == 5  # four steps and an evaluation
    for processes in (2, 3):
        for want, found in zip(runs[1][0], runs[processes][0], strict=True):
            for name in want:
                if "runtime" in name or "per_second" in name or (name == "rewards/accuracies" and want["step"] == 1):
                    continue  # at step 1 the policy is its reference: margins of 0, to rounding
                absolute = 1e-5 if "rewards" in name else 5e-6
                assert found[name] == pytest.approx(want[name], rel=1e-5, abs=absolute), (name, want["step"], processes)
        for name, weight in runs[1][1].items():
            assert (runs[processes][1][name] - weight).abs().max() <= 5e-6, name
