"""`rlhf label --audit`: the labels of a file of pairs that a reward model disputes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.curation.screen import note, plural, shown
from rlhf.distributed.processes import is_main, on_main
from rlhf.errors import UserError
from rlhf.inference.arguments import without_effect
from rlhf.inference.blocks import Blocks
from rlhf.inference.finished import resolve
from rlhf.inference.output import Output, output_path, report_skipped
from rlhf.inference.rows import PLACE, Data, check_names, read
from rlhf.inference.score_command import TASK as SCORES
from rlhf.inference.score_command import Judge
from rlhf.inference.score_summary import Wins


def audit(options: Any, given: Any = None) -> dict[str, Any] | None:
    """The pairs of a file whose rejected answer has the higher score, most disputed first."""
    if options.model:
        raise UserError("--audit looks at the answers that FILE has; leave --model out")
    if idle := without_effect(options):
        raise UserError(
            f"{'-n' if idle[0] == 'n' else f'--{idle[0]}'} has no effect with --audit, which generates nothing; leave it out"
        )
    path = output_path(options.output, options.file)
    found = resolve(options.reward, "--reward", reward=True)
    data = read(options, "label --audit", prompts_only=False, given=given)
    if data.kind != "pairs":
        raise UserError(
            f"{data.name}: --audit needs pairs, and these rows have one answer each; `rlhf score` scores them"
        )
    data = check_names(data, ("score_chosen", "score_rejected"), "")
    judge = Judge.of(found, options)
    output = Output(path, "label", {"audit": True, "data": data.identity, **judge.inputs()}, vars(options))
    record = output.make(lambda: _audit(output, data, judge))
    if is_main():
        _show_audit(path, data, record)
    return record


def _audit(output: Output, data: Data, judge: Judge) -> None:
    from rlhf.runs.stop import Stopper

    columns = ("score_chosen", "score_rejected")
    row_of = lambda row, scores: {**row, **dict(zip(columns, scores, strict=True)), PLACE: row[PLACE]}  # noqa: E731
    schema = output.check_form(lambda: (row_of(row, (0.0, 0.0)) for row in data.rows))
    with output.parts() as folder, Stopper(folder) as stopper:
        blocks = Blocks(folder, len(data.rows), stopper)
        blocks.compute(SCORES, "Scoring", "pairs", functools.partial(judge.batches, data.rows, data.parts))
        judge.drop()

        def write() -> None:
            both = np.full((len(data.rows), 2), np.nan)  # 16 bytes a pair
            for number, scores in enumerate(blocks.all_values(SCORES)):
                both[number] = scores or np.nan
            disputed, summary = disputed_pairs(both), Disputes(both)
            top = [[data.rows.place(int(i)), float(both[i, 0] - both[i, 1])] for i in disputed[:10]]

            def about() -> dict[str, Any]:
                return {
                    "summary": summary.record() | {"disputed": len(disputed), "first": top},
                    "skipped": len(data.skipped),
                    **judge.about(),
                }

            output.write(lambda: (row_of(data.rows[int(i)], both[i].tolist()) for i in disputed), schema, about)
            report_skipped(output.path, data.skipped)

        on_main(write)


def disputed_pairs(scores_N2: np.ndarray) -> np.ndarray:
    """The numbers of the pairs whose rejected answer has the higher score, the largest difference first.

    Example: margins (1, -2, nan, -3, 0) -> 3, 1.
    """
    margins = scores_N2[:, 0] - scores_N2[:, 1]
    order = np.argsort(margins, kind="stable")  # NaN last
    return order[: int((margins < 0).sum())]


class Disputes:
    """What is reported of all pairs of an audit."""

    def __init__(self, scores_N2: np.ndarray):
        margins = scores_N2[:, 0] - scores_N2[:, 1]
        self.margins = margins[~np.isnan(margins)]
        self.unscored = len(margins) - len(self.margins)

    def record(self) -> dict[str, Any]:
        wins = Wins(len(self.margins), int((self.margins > 0).sum()), int((self.margins == 0).sum()))
        return {"rows": len(self.margins) + self.unscored, "unscored": self.unscored, "pairs": wins.record()}


def _show_audit(path: Path, data: Data, record: dict[str, Any]) -> None:
    summary = record["summary"]
    pairs, number = summary["pairs"], summary["disputed"]
    print()
    if not pairs["count"]:
        note(f"none of {plural(summary['rows'], 'pair')} has a score: all are too long for the reward model")
        return
    print(f"{record['reward_model']} disputes {number:,} of {plural(pairs['count'], 'label')} ({number / pairs['count']:.1%}): it scores the "
          "rejected answer higher")  # fmt: skip
    for place, margin in summary["first"][:5]:
        print(f"  {margin:+8.3f}   {shown(place, 200)}")
    if number:
        print(f"  {path}: all of them, the most disputed first")
        first = summary["first"][0][0]
        print(
            "\nNext: read the first ones. Where the label is wrong, swap or remove the pair in its file; where the answers are about equal,"
        )
        print(
            "remove it; where the label is right, the reward model needs such pairs. A reward model that was trained on this file"
        )
        print(
            f"disputes too few of its labels. One of them: rlhf data show {shown(str(data.name), 200)} --row {shown(first, 200)} --model MODEL"
        )
    if summary["unscored"]:
        note(
            f"{plural(summary['unscored'], 'pair')} without a score: more tokens than the {record['longest']:,} that it takes"
        )
