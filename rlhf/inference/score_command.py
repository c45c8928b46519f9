"""`rlhf score`: a reward model's scores of the answers, pairs or dialogues of a file."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf.curation.screen import note, plural, shown
from rlhf.data.store import Rows
from rlhf.distributed.processes import is_main, on_main
from rlhf.errors import UserError
from rlhf.inference.blocks import Batch, Blocks
from rlhf.inference.finished import Found, device_of_process, free_memory, resolve
from rlhf.inference.output import Output, output_path, report_skipped
from rlhf.inference.rows import PLACE, Data, Row, check_names, note_columns, prompt_of, read
from rlhf.inference.score_summary import Summary, lines

TASK = "scores"


def score_command(options: Any, given: Any = None) -> dict[str, Any] | None:
    """Run `rlhf score`; returns the provenance of the output on the main rank.

    Args:
        options: of the command line.
        given: a Source of rows that Python code holds, instead of `options.file`.

    Raises:
        UserError: before a model loads.
        Stopped: a stop was requested; the same command resumes.
    """
    path = output_path(options.output, options.file)
    found = resolve(options.reward, "--reward", reward=True)
    data = read(options, "score", prompts_only=False, given=given)
    columns = score_columns(data, options.column)
    data = check_names(data, columns, "--column")
    judge = Judge.of(found, options)
    output = Output(path, "score", {"data": data.identity, **judge.inputs(), "column": options.column}, vars(options))
    record = output.make(lambda: _score(output, data, judge, columns))
    if is_main():
        _show(path, data, record)
    return record


def score_columns(data: Data, column: str) -> tuple[str, ...]:
    """The columns of the scores: one per answer of a row."""
    return tuple(f"{column}_{part}" for part in data.parts) if data.kind == "pairs" else (column,)


def _score(output: Output, data: Data, judge: Judge, columns: tuple[str, ...]) -> None:
    from rlhf.runs.stop import Stopper

    def rows(values: Iterable[Any], summary: Summary) -> Iterator[Row]:
        for (row, kept), scores in zip(data.with_columns(), values, strict=True):
            place = row.pop(PLACE)
            summary.add(data.parts, scores, kept)
            yield {**row, **kept, **dict(zip(columns, scores or [None] * len(columns), strict=True)), PLACE: place}

    nothing = ([0.0] * len(columns) for _ in range(len(data.rows)))
    schema = output.check_form(lambda: rows(nothing, Summary()))
    with output.parts() as folder, Stopper(folder) as stopper:
        blocks = Blocks(folder, len(data.rows), stopper)
        blocks.compute(TASK, "Scoring", "rows", functools.partial(judge.batches, data.rows, data.parts))
        judge.drop()

        def write() -> None:
            summary = Summary()
            report_skipped(output.path, data.skipped)
            output.write(
                lambda: rows(blocks.all_values(TASK), summary), schema,
                lambda: {"rows": len(data.rows), "skipped": len(data.skipped), "summary": summary.record(), **judge.about()},
            )  # fmt: skip

        on_main(write)


def _show(path: Path, data: Data, record: dict[str, Any]) -> None:
    summary = record["summary"]
    print()
    print(
        f"{path}: {plural(summary['rows'], 'pair' if data.kind == 'pairs' else 'row')} scored by {record['reward_model']}"
    )
    print("\n".join(lines(summary)))
    if summary["unscored"]:
        note(
            f"{plural(summary['unscored'], 'row')} without a score (null): more tokens than the {record['longest']:,} that the "
            "reward model takes"
        )
    note_columns(data)
    if data.kind == "pairs":
        print(f"\nNext: rlhf label {shown(str(data.name), 200)} --reward {record['reward_model']} --audit --output disputed.jsonl"
              "   # the pairs whose label it disputes")  # fmt: skip


# --- the reward model ------------------------------------------------------------------------------------------------


class Judge:
    """A reward model, loaded when the first batch needs it.

    Attributes:
        longest: tokens of the longest row that it takes; None: any.
    """

    def __init__(self, found: Found, device: Any, dtype: str | None, load_in_4bit: bool, max_length: int | None):
        from transformers import AutoConfig

        from rlhf.inference.finished import dtype_on
        from rlhf.models.folder import base_of
        from rlhf.models.inference import check_bitsandbytes, placement
        from rlhf.models.tokenizer import load_tokenizer

        if load_in_4bit:
            check_bitsandbytes()
        placement(found.path, dtype_on(device, dtype), device, load_in_4bit)
        self.found, self.device, self.dtype, self.load_in_4bit = found, device, dtype, load_in_4bit
        self.tokenizer = load_tokenizer(found.path, encoder=True)
        self.longest = _longest(AutoConfig.from_pretrained(base_of(found.path)), max_length)
        self._model: Any = None

    @classmethod
    def of(cls, found: Found, options: Any) -> Judge:
        return cls(found, device_of_process(), options.dtype, options.load_in_4bit, options.max_length)

    def inputs(self) -> dict[str, Any]:
        """What decides the scores. A collective."""
        from rlhf.models.digests import weights_digest
        from rlhf.training.tokens import tokenizer_digest

        return {
            "reward": {"weights_sha256": weights_digest(self.found.path), "tokenizer_sha256": tokenizer_digest(self.tokenizer)},
            "device": self.device.type, "dtype": self.dtype, "load_in_4bit": self.load_in_4bit, "max_length": self.longest,
        }  # fmt: skip

    def about(self) -> dict[str, Any]:
        return {"reward_model": self.found.name, "longest": self.longest}

    def model(self) -> Any:
        from rlhf.inference.finished import load
        from rlhf.inference.score import pack

        if self._model is None:
            self._model, _ = load(self.found, device=self.device, dtype=self.dtype, load_in_4bit=self.load_in_4bit)
            pack(self._model, self.longest)
        return self._model

    def drop(self) -> None:
        """Give the model's memory back."""
        self._model = None
        free_memory()

    def batches(self, rows: Rows, parts: tuple[str, ...], items: range) -> Iterator[Batch]:
        """Batches of rows: a list of one score per part for each, or None for one that is too long."""
        yield from self.batches_of({item: self._encode(rows[item], parts) for item in items})

    def _encode(self, row: Row, parts: tuple[str, ...]) -> list[list[int]]:
        from rlhf.inference.score import encode_answer

        if parts == ("messages",):
            return [encode_answer(self.tokenizer, prompt_of(row), row["messages"][-1:], row)]
        return [encode_answer(self.tokenizer, row["prompt"], row[part], row) for part in parts]

    def batches_of(self, ids: dict[int, list[list[int]]]) -> Iterator[Batch]:
        """The same of token ids by item: a list for each of its answers."""
        from rlhf.inference.score import scores, token_batches

        over = [item for item, answers in ids.items() if self.longest and max(map(len, answers)) > self.longest]
        if over:
            yield Batch(over, lambda: [None] * len(over))
        fit = {item: answers for item, answers in ids.items() if item not in set(over)}

        def work(batch: list[int]) -> list[Any]:
            width = len(fit[batch[0]])  # first all first answers, then all second ones: pairs share their prompt so
            found = scores(self.model(), self.tokenizer, [fit[i][side] for side in range(width) for i in batch])
            if not all(map(math.isfinite, found)):
                raise UserError(f"{self.found.name} gives scores that are not finite; give --dtype float32 or bfloat16")
            return [found[at :: len(batch)] for at in range(len(batch))]

        for batch in token_batches({i: len(answers) * max(map(len, answers)) for i, answers in fit.items()}):
            yield Batch(batch, functools.partial(work, batch))


def _longest(config: Any, max_length: int | None) -> int | None:
    text = config.get_text_config()
    room = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    room = (
        room - 2 if room and config.model_type in ("roberta", "xlm-roberta", "camembert") else room
    )  # from pad + 1 on
    return min(filter(None, (room, max_length)), default=None)
