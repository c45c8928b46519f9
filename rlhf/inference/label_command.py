"""`rlhf label`: pairs of a model's best and worst answer by a reward model, or the labels of a file that it disputes."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.curation.export import write_json_lines
from rlhf.curation.screen import note, plural, shown
from rlhf.distributed.processes import is_main, on_main
from rlhf.errors import UserError
from rlhf.inference.blocks import Batch, Blocks
from rlhf.inference.engines import check_engine
from rlhf.inference.finished import resolve
from rlhf.inference.generate_command import TASK as ANSWERS
from rlhf.inference.generate_command import Answers, Policy, answer_row, check_sampling, show_answers
from rlhf.inference.output import Output, beside, output_path, report_skipped
from rlhf.inference.rows import PLACE, Data, Row, check_names, prompt_of, read, template_part
from rlhf.inference.score_command import TASK as SCORES
from rlhf.inference.score_command import Judge
from rlhf.inference.score_summary import Spread

WHY_NOT = {
    "few": "fewer than two answers that ended by themselves and have a text (--keep_cut takes cut ones too)",
    "same": "the answers are all the same",
    "tie": "the answers have the same score",
    "close": "the scores are closer than --min_margin",
    "long": "prompt or answers are too long for one of the models",
}


def label_command(options: Any, given: Any = None) -> dict[str, Any] | None:
    """Run `rlhf label`; returns the provenance of the output on the main rank.

    Args:
        options: of the command line.
        given: a Source of rows that Python code holds, instead of `options.file`.

    Raises:
        UserError: before a model loads.
        Stopped: a stop was requested; the same command resumes.
    """
    if options.audit:
        from rlhf.inference.audit_command import audit

        return audit(options, given)
    return label(options, given)


def label(options: Any, given: Any = None) -> dict[str, Any] | None:
    """Answers, their scores, and pairs of the best and the worst one."""
    if not options.model:
        raise UserError(
            "rlhf label needs --model, which answers the prompts; --audit looks at the labels of FILE instead"
        )
    if options.n < 2:
        raise UserError("a pair needs two answers; give -n 2 or more")
    check_sampling(options)
    path = output_path(options.output, options.file)
    found, judged = resolve(options.model, "--model", reward=False), resolve(options.reward, "--reward", reward=True)
    check_engine(options.engine, found, options.load_in_4bit)
    data = check_names(read(options, "label", prompts_only=True, given=given), ("completion", "sample", "finished", "num_tokens", "score"), "")  # fmt: skip
    policy, judge = Policy(found, options), Judge.of(judged, options)
    inputs = {
        "data": data.identity,
        **policy.inputs(),
        **judge.inputs(),
        "min_margin": options.min_margin,
        "keep_cut": options.keep_cut,
    }
    output = Output(path, "label", inputs, vars(options))
    record = output.make(lambda: _label(output, data, policy, judge, options))
    if is_main():
        _show_pairs(path, record)
    return record


def check_free(output: Output) -> None:
    """Raise UserError if the file of all answers is there, but not of an earlier start of this command."""
    file = answers_file(output)
    if file.exists() and not output.overwrite and not output.started:
        raise UserError(
            f"{file} already exists, and all answers are written there; give another --output, or --overwrite"
        )


def answers_file(output: Output) -> Path:
    """Where all answers are written, the pair's and the others."""
    return beside(output.path, "answers.jsonl")


def _label(output: Output, data: Data, policy: Policy, judge: Judge, options: Any) -> None:
    from rlhf.runs.stop import Stopper

    check_free(output)
    choose = functools.partial(best_and_worst, min_margin=options.min_margin, keep_cut=options.keep_cut)
    schema = output.check_form(lambda: (_pair(row, Choice("a", "b", 1.0, 0.0)) for row in data.rows))
    with output.parts() as folder, Stopper(folder) as stopper:
        blocks = Blocks(folder, len(data.rows) * policy.n, stopper, group=policy.n)
        blocks.compute(ANSWERS, "Generating", "answers", functools.partial(policy.batches, data.rows))
        policy.engine.drop()
        judged = Blocks(folder, len(data.rows), stopper, like=(blocks, policy.n))
        judged.compute(SCORES, "Scoring", "prompts", functools.partial(_score_batches, data, judge, blocks, policy.n))
        judge.drop()

        def write() -> None:
            found, report = (lambda: _answers(data, blocks, judged, policy.n)), Pairs()
            file = answers_file(output)
            write_json_lines(_answer_rows(found()), file)
            report_skipped(output.path, data.skipped)

            def about() -> dict[str, Any]:
                return {
                    "summary": report.record(),
                    "answers_file": file.name,
                    "skipped": len(data.skipped),
                    **policy.about(),
                    **judge.about(),
                }

            output.write(lambda: _pairs(found(), choose, report), schema, about)

        on_main(write)


def _score_batches(data: Data, judge: Judge, blocks: Blocks, n: int, prompts: range) -> Iterator[Batch]:
    """Batches of prompts: the scores of their n answers, or None if there are none or one is too long."""
    from rlhf.inference.score import encode_answer

    values = blocks.values(ANSWERS, prompts.start * n // blocks.size)
    ids: dict[int, list[list[int]]] = {}
    unanswered = []
    for at, number in enumerate(prompts):
        answers = values[at * n : (at + 1) * n]
        if answers[0] is None:
            unanswered.append(number)
            continue
        row = data.rows[number]
        ids[number] = [encode_answer(judge.tokenizer, prompt_of(row), answer["text"], row) for answer in answers]
    if unanswered:
        yield Batch(unanswered, lambda: [None] * len(unanswered))
    yield from judge.batches_of(ids)


class Answered(NamedTuple):
    """A row with its answers and their scores; None where there are none."""

    row: Row
    kept: Row
    answers: list[dict[str, Any] | None]
    scores: list[float] | None


def _answers(data: Data, blocks: Blocks, judged: Blocks, n: int) -> Iterator[Answered]:
    values = blocks.all_values(ANSWERS)
    for (row, kept), scores in zip(data.with_columns(), judged.all_values(SCORES), strict=True):
        yield Answered(row, kept, [next(values) for _ in range(n)], scores)


def _answer_rows(found: Iterator[Answered]) -> Iterator[Row]:
    for row, kept, answers, scores in found:
        for sample, value in enumerate(answers):
            if value is not None:
                new = answer_row(row, kept, sample, value)
                place = new.pop(PLACE)
                yield {**new, "score": scores[sample] if scores else None, PLACE: place}


# --- pairs -----------------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """The best and the worst answer to a prompt."""

    chosen: str
    rejected: str
    score_chosen: float
    score_rejected: float


def best_and_worst(
    answers: list[dict[str, Any]], scores: list[float], min_margin: float = 0.0, keep_cut: bool = False
) -> Choice | str:
    """The pair of a prompt's answers, or a key of WHY_NOT.

    Args:
        answers: with `text` and `finished`; an answer that was cut would teach to end in the middle of a sentence.
        min_margin: of the two scores; at 0 they only have to differ.

    Example: scores (0.3, 1.2, -0.5) -> the second against the third.
    """
    usable = [n for n, answer in enumerate(answers) if answer["text"] and (keep_cut or answer["finished"])]
    if len(usable) < 2:
        return "few"
    if len({answers[n]["text"] for n in usable}) < 2:
        return "same"
    best, worst = max(usable, key=lambda n: scores[n]), min(usable, key=lambda n: scores[n])
    margin = scores[best] - scores[worst]
    if margin <= 0 or answers[best]["text"] == answers[worst]["text"]:
        return "tie"
    if margin < min_margin:
        return "close"
    return Choice(answers[best]["text"], answers[worst]["text"], scores[best], scores[worst])


def _pair(row: Row, choice: Choice) -> Row:
    more = {key: part for key, part in template_part(row).items() if key != PLACE}
    answer = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    return {"prompt": prompt_of(row), "chosen": answer(choice.chosen), "rejected": answer(choice.rejected), **more,
            "score_chosen": choice.score_chosen, "score_rejected": choice.score_rejected}  # fmt: skip


class Pairs:
    """What is reported of the pairs."""

    def __init__(self) -> None:
        self.answers, self.why_not = Answers(), Counter[str]()
        self.best, self.mean, self.worst, self.margin = Spread(), Spread(), Spread(), Spread()
        self.words, self.longer, self.prompts = {"chosen": Spread(), "rejected": Spread()}, 0, 0

    def add(self, found: Answered, choice: Choice | str) -> None:
        self.prompts += 1
        for value in found.answers:
            if value is not None:
                self.answers.add(value)
        if isinstance(choice, str):
            self.why_not[choice] += 1
            return
        assert found.scores
        self.best.add(choice.score_chosen)
        self.mean.add(sum(found.scores) / len(found.scores))
        self.worst.add(choice.score_rejected)
        self.margin.add(choice.score_chosen - choice.score_rejected)
        lengths = [len(text.split()) for text in (choice.chosen, choice.rejected)]
        for side, length in zip(self.words, lengths, strict=True):
            self.words[side].add(length)
        self.longer += lengths[0] > lengths[1]

    def record(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts, "pairs": self.margin.count, "no_pair": dict(self.why_not), "answers": self.answers.record(),
            "score_chosen": self.best.record(), "score_mean": self.mean.record(), "score_rejected": self.worst.record(),
            "margin": self.margin.record(), "chosen_longer": self.longer,
            "words": {side: spread.record() for side, spread in self.words.items()},
        }  # fmt: skip


def _pairs(found: Iterator[Answered], choose: Callable[..., Choice | str], report: Pairs) -> Iterator[Row]:
    for one in found:
        choice = choose(one.answers, one.scores) if one.scores else "long"
        report.add(one, choice)
        if isinstance(choice, Choice):
            yield _pair(one.row, choice)


def _show_pairs(path: Path, record: dict[str, Any]) -> None:
    summary, sampling = record["summary"], record["sampling"]
    pairs = summary["pairs"]
    print()
    print(f"{path}: {plural(pairs, 'pair')} from {plural(summary['prompts'], 'prompt')}, the best against the worst of "
          f"{sampling['n']} answers of {record['model']} by {record['reward_model']}")  # fmt: skip
    show_answers(summary["answers"], sampling["max_new_tokens"])
    if pairs:
        words = summary["words"]
        print(f"  scores              best {summary['score_chosen']['mean']:+.3f}, mean of all {summary['score_mean']['mean']:+.3f}, worst "
              f"{summary['score_rejected']['mean']:+.3f}; margin {summary['margin']['mean']:.3f}")  # fmt: skip
        print(f"  length              chosen {words['chosen']['mean']:.0f}, rejected {words['rejected']['mean']:.0f} words; chosen is longer in "
              f"{summary['chosen_longer'] / pairs:.0%}")  # fmt: skip
    for key, number in summary["no_pair"].items():
        print(f"  no pair             {number:,}: {WHY_NOT[key]}")
    print(f"  all answers         {path.with_name(record['answers_file'])}, with their scores")
    if pairs:
        print(
            f"\nNext: rlhf dpo RECIPE.yaml --model_name_or_path {shown(record['model'], 200)} --dataset_name {shown(str(path), 200)}"
        )
    else:
        note("there is no pair to train on")
