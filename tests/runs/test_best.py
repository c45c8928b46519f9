"""The best checkpoint by a held-out metric is what is written; early stopping decides alike with and without interruptions."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rlhf.__main__ import main
from rlhf.runs.checkpointing import StopCallback
from rlhf.runs.metrics import read_metrics

EVERY = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "logging_steps": 1, "heldout": 0.3}


@pytest.fixture
def run(recipe, tiny_llama, few_pairs, tmp_path, monkeypatch):
    """Trains a tiny model by DPO; returns (exit code, complete.json, folder)."""

    def start(name, stop_at=None, **values):
        out = tmp_path / name
        on_step_end = StopCallback.on_step_end

        def stopping(self, args, state, control, **kwargs):
            if state.global_step == stop_at:
                self.fault_tolerance.stopper.asked_by = "SIGTERM"
            return on_step_end(self, args, state, control, **kwargs)

        settings = {
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "max_steps": 6,
            "save_steps": 1,
            **EVERY,
            **values,
        }
        file = recipe(
            "dpo", name=name, model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(out), **settings
        )
        with monkeypatch.context() as patch:
            patch.setattr(StopCallback, "on_step_end", stopping)
            code = main(["dpo", file])
        complete = json.loads((out / "complete.json").read_text()) if code == 0 else None
        return code, complete, out

    return start


def weights(folder):
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


# The first evaluation is the best here: 6 pairs are learnt by heart, and the held-out loss rises.
LOWEST_LOSS = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "max_steps": 8}


def held_out(folder, metric="eval_loss"):
    return {row["step"]: row[metric] for row in read_metrics(folder) if metric in row}


def test_the_best_weights_are_written_though_their_step_was_not_to_be_saved(run, capsys):
    """save_steps 4, evaluations at 1, 2, 3, 4: transformers 5.23 alone keeps no weights of step 1, and writes those of step 4."""
    code, complete, out = run("best", **LOWEST_LOSS | {"max_steps": 4, "save_steps": 4, "save_total_limit": 1})
    losses = held_out(out)
    assert code == 0 and min(losses, key=losses.get) == 1, losses
    assert complete["best"] == {"step": 1, "metric": "eval_loss", "value": losses[1]} and complete["steps"] == 4
    _, _, one = run("one", max_steps=1)
    found, expected, last = weights(out), weights(one), run("last", max_steps=4)[2]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(found[name], value) for name, value in weights(last).items())
    assert (out / "checkpoint-1").is_dir() and (out / "checkpoint-4").is_dir()
    shown = capsys.readouterr().out
    assert "  writes   the checkpoint with the lowest eval_loss, not the last one" in shown
    assert f"  the weights of step 1, the best by eval_loss ({losses[1]:.4g})\n" in shown
    assert f"The weights of step 1, the best by eval_loss ({losses[1]:.4g})." in (out / "README.md").read_text()


def test_the_metric_is_the_held_out_accuracy(run):
    code, complete, out = run("accuracy", load_best_model_at_end=True, max_steps=3, save_steps=1)
    accuracies = held_out(out, "eval_rewards/accuracies")
    best = max(accuracies.values())
    assert code == 0 and complete["best"]["metric"] == "eval_rewards/accuracies"
    assert complete["best"]["value"] == best
    assert complete["best"]["step"] == min(step for step, value in accuracies.items() if value == best)


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_early_stopping_survives_a_stop(stop_at, run, capsys):
    """Patience 2, best at step 1: ends after step 3, also if it was stopped before, between and in the evaluations that count.

    A stop postpones the evaluation of its step to the resume: at 1 that is the best one, at 3 the one that ends the run.
    """
    patience = LOWEST_LOSS | {"early_stopping_patience": 2, "save_steps": 8, "eval_on_start": stop_at == 2}
    code, straight, whole = run("straight", **patience)
    # the evaluation before the first step is none that can be the best
    assert code == 0 and (straight["steps"], straight["stopped_early_of"], straight["best"]["step"]) == (3, 8, 1)
    assert "early stopping: eval_loss has not been better than" in capsys.readouterr().out
    code, _, out = run("stopped", stop_at=stop_at, **patience)
    assert code == 85 and (out / f"checkpoint-{stop_at}").is_dir()
    code, complete, _ = run("stopped", **patience)
    assert code == 0, capsys.readouterr().err
    assert held_out(out) == held_out(whole)
    assert {key: complete[key] for key in ("steps", "stopped_early_of", "best", "weights_sha256")} == {
        key: straight[key] for key in ("steps", "stopped_early_of", "best", "weights_sha256")
    }
    assert "stopped early, after step 3 of 8" in capsys.readouterr().out


def test_a_damaged_best_checkpoint_is_told_and_the_last_weights_are_written(run, capsys, monkeypatch):
    from rlhf.runs.best import BestCheckpoint

    load = BestCheckpoint._load_best_model

    def damage_first(self):
        file = next((self.fault_tolerance.folder / "checkpoint-1").glob("portable-*.safetensors"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
        return load(self)

    monkeypatch.setattr(BestCheckpoint, "_load_best_model", damage_first)
    code, complete, out = run("damaged", **LOWEST_LOSS | {"max_steps": 2})
    assert code == 0 and "best" not in complete
    shown = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-1, the best by eval_loss, can't be used: the content of portable-" in shown
    assert "the weights of step 2, the last one, are written instead" in shown
    monkeypatch.setattr(BestCheckpoint, "_load_best_model", load)
    last = weights(run("last", max_steps=2)[2])
    assert all(torch.equal(value, last[name]) for name, value in weights(out).items())


def test_the_best_is_found_again_in_a_folder_that_was_moved(run, recipe, tiny_llama, few_pairs, tmp_path):
    code, straight, whole = run("straight", **LOWEST_LOSS | {"max_steps": 4})
    assert run("before", stop_at=3, **LOWEST_LOSS | {"max_steps": 4})[0] == 85
    shutil.move(tmp_path / "before", tmp_path / "after")
    code, complete, out = run("after", **LOWEST_LOSS | {"max_steps": 4})
    assert (
        code == 0 and complete["best"] == straight["best"] and complete["weights_sha256"] == straight["weights_sha256"]
    )
