"""A run tells what its metrics mean: on the screen, in metrics.jsonl, status, model card and report; once, also over a stop."""

import json
from pathlib import Path

import pytest
import torch

from rlhf.__main__ import main
from rlhf.evaluation.report import write_report
from rlhf.runs.metrics import findings_of, read_metrics
from rlhf.runs.status import show_statuses
from rlhf.training.deferred import Pending
from rlhf.training.step_means import StepMeans, add_accuracies_by_length

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def told(recipe_in, tiny_llama, few_pairs, tmp_path_factory):
    """A DPO run at a learning rate that moves nothing, stopped at step 13 and resumed; its screens and its folder."""
    from rlhf.runs.checkpointing import StopCallback

    folder = tmp_path_factory.mktemp("told")
    file = recipe_in(
        folder, "dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(folder / "out"), max_steps=16,
        learning_rate=1e-9, lr_scheduler_type="constant", heldout=0.5, eval_strategy="steps", eval_steps=8,
        global_batch_size=2,
    )  # fmt: skip
    lines = Path(file).read_text().splitlines(keepends=True)
    Path(file).write_text("".join(line for line in lines if not line.startswith("per_device")))
    on_step_end, screens = StopCallback.on_step_end, []

    def stopping(self, args, state, control, **kwargs):
        if state.global_step == 13:
            self.fault_tolerance.stopper.asked_by = "SIGTERM"
        return on_step_end(self, args, state, control, **kwargs)

    for patched in (stopping, on_step_end):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StopCallback, "on_step_end", patched)
            shown: list[str] = []
            patch.setattr("rlhf.training.watch.say", shown.append)
            screens.append((main(["dpo", file]), shown))
    return screens, folder / "out"


def test_it_is_told_once(told):
    ((stopped, before), (ended, after)), folder = told
    assert (stopped, ended) == (85, 0)
    assert len(before) == 1 and after == []
    assert before[0].startswith(
        "\nstep 11: the policy has hardly moved in 11 of 16 steps: no batch's answers are more than "
    )
    assert before[0].endswith("LoRA wants 10 to 100 times the rate of full fine-tuning. docs/tuning.md: nothing_moves")
    (finding,) = findings_of(read_metrics(folder))
    assert finding["finding"] == "nothing_moves" and finding["step"] == 11 and finding["sentence"] in before[0]


def test_status_card_and_report_take_it_over(told, capsys, tmp_path):
    _, folder = told
    (finding,) = findings_of(read_metrics(folder))
    show_statuses(str(folder))
    assert f"dpo, step 11: {finding['sentence']}" in capsys.readouterr().out.replace("\n", " ").replace("  ", " ")
    assert f"- Step 11: {finding['sentence']}." in (folder / "README.md").read_text()
    html = write_report(str(folder), str(tmp_path / "report.html")).read_text().replace("&#39;", "'")
    assert f"<li>Step 11: {finding['sentence']}." in html and "Turn: raise learning_rate" in html
    assert (
        html.count("stroke-dasharray: 0.8,1.32") + html.count("stroke-dasharray: 0.8 1.32") >= 1
    )  # the mark in a curve


def test_accuracies_by_length():
    """Micro-batches of 3 and 2 pairs. Chosen longer: right, wrong | right; shorter: right | wrong; none of equal length counts.

    Longer: 2 of 3; shorter: 1 of 2. A micro-batch without such a pair weighs nothing.
    """
    means = StepMeans()
    for margins, chosen, rejected in (
        ([0.5, -0.5, 0.1], [3, 2, 1], [1, 1, 2]),
        ([1.0, -1.0], [2, 1], [1, 3]),
        ([9.0], [2], [2]),
    ):
        pending = Pending()
        mask = torch.tensor([[1] * n + [0] * (4 - n) for n in [*chosen, *rejected]])
        logged = {"rewards/margins": [pending.add(torch.tensor(margins)).mean().item()]}
        batch = {"completion_mask": mask}
        add_accuracies_by_length(logged, batch)
        means.note(logged, {"batch": batch, "examples": len(margins)})
    means.add_up()
    sums = {
        name: (means.sums[f"rewards/accuracies_{name}"], means.weights[f"rewards/accuracies_{name}"])
        for name in ("longer", "shorter")
    }
    assert sums == {"longer": (2.0, 3.0), "shorter": (1.0, 2.0)}


def test_a_run_logs_accuracies_by_length(told):
    rows = [row for row in read_metrics(told[1]) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [8, 16]
    assert all("eval_rewards/accuracies_longer" in row for row in rows)


def test_a_damaged_finding_is_left_out(tmp_path):
    good = {"step": 3, "finding": "x", "sentence": "s", "turn": ["t"], "size": 1.0}
    rows = [
        good,
        good | {"finding": "y", "turn": "t"},
        good | {"finding": ["z"]},
        good | {"finding": "v", "size": "1"},
        {"step": 1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert findings_of(read_metrics(tmp_path)) == [good | {"since": 3}]


def test_the_last_words_about_a_symptom_count_and_when_it_began():
    rows = [{"step": n, "finding": "x", "sentence": f"{n}", "turn": ["t"], "size": float(n)} for n in (3, 8)]
    assert findings_of(rows) == [rows[1] | {"since": 3}]
