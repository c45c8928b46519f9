"""A run tells what its metrics mean: on the screen, in metrics.jsonl, status, model card and report; once, also over a stop."""

import json
from pathlib import Path

import pytest

from rlhf.__main__ import main
from rlhf.evaluation.report import write_report
from rlhf.runs.metrics import findings_of, read_metrics
from rlhf.runs.status import show_statuses

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


def test_accuracies_by_length_are_parts_of_the_accuracy(told):
    """Over the held-out pairs: share of longer x their accuracy + share of shorter x theirs, no pair being of equal length."""
    _, folder = told
    rows = [row for row in read_metrics(folder) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [8, 16]
    for row in rows:
        total, longer, shorter = (row[f"eval_rewards/accuracies{end}"] for end in ("", "_longer", "_shorter"))
        right = {(a + b) / 6 for n in range(1, 6) for a in range(n + 1) for b in range(7 - n)
                 if (a / n, b / (6 - n)) == pytest.approx((longer, shorter))}  # fmt: skip
        assert any(total == pytest.approx(share) for share in right), (row, right)


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
    assert findings_of(read_metrics(tmp_path)) == [good]
