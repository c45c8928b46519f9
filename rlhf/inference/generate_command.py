"""`rlhf generate`: a model's answers to the prompts of a file, with random numbers of each answer's own."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.curation.screen import note, plural, shown
from rlhf.data.store import Rows
from rlhf.distributed.processes import is_main, on_main
from rlhf.errors import UserError
from rlhf.inference.arguments import BATCH_SIZE
from rlhf.inference.blocks import Batch, Blocks
from rlhf.inference.engines import Asked, Engine, check_engine
from rlhf.inference.finished import Found, device_of_process, dtype_on, resolve
from rlhf.inference.output import Output, output_path, report_skipped
from rlhf.inference.rows import PLACE, Data, Row, check_names, note_columns, prompt_of, read, template_part
from rlhf.inference.score_summary import Spread

TASK = "answers"
COLUMNS = ("completion", "sample", "finished", "num_tokens")  # of the output, beside the prompt's


def generate_command(options: Any, given: Any = None) -> dict[str, Any] | None:
    """Run `rlhf generate`; returns the provenance of the output on the main rank.

    Args:
        options: of the command line.
        given: a Source of rows that Python code holds, instead of `options.file`.

    Raises:
        UserError: before a model loads.
        Stopped: a stop was requested; the same command resumes.
    """
    path = output_path(options.output, options.file)
    check_sampling(options)
    found = resolve(options.model, "--model", reward=False)
    check_engine(options.engine, found, options.load_in_4bit)
    data = check_names(read(options, "generate", prompts_only=True, given=given), COLUMNS, "")
    policy = Policy(found, options)
    output = Output(path, "generate", {"data": data.identity, **policy.inputs()}, vars(options))
    record = output.make(lambda: _generate(output, data, policy))
    if is_main():
        _show(path, record)
        note_columns(data)
    return record


def check_sampling(options: Any) -> None:
    """Raise UserError for several answers to a prompt that would all be the same one, and for options without effect."""
    if options.n > 1 and options.temperature == 0:
        raise UserError(
            f"-n {options.n} with --temperature 0 gives {options.n} times the same answer; raise the temperature"
        )
    if options.temperature == 0 and options.top_p < 1:
        raise UserError(
            "--top_p has no effect with --temperature 0, which always takes the most likely token; leave one out"
        )
    if options.engine != "transformers" and options.batch_size != BATCH_SIZE:
        raise UserError(
            f"--batch_size has no effect with --engine {options.engine}, which decides that itself; leave it out"
        )


def _generate(output: Output, data: Data, policy: Policy) -> None:
    from rlhf.runs.stop import Stopper

    def rows(values: Iterator[Any], too_long: list[dict[str, str]], count: Answers) -> Iterator[Row]:
        for row, kept in data.with_columns():
            place = row[PLACE]
            for sample in range(policy.n):
                value = next(values)
                if value is not None:
                    count.add(value)
                    yield answer_row(row, kept, sample, value)
                elif sample == 0:
                    too_long.append({"place": place, "reason": policy.too_long})

    nothing = {"text": "", "finished": True, "tokens": 0}
    schema = output.check_form(lambda: rows(iter(lambda: nothing, None), [], Answers()))
    with output.parts() as folder, Stopper(folder) as stopper:
        blocks = Blocks(folder, len(data.rows) * policy.n, stopper, group=policy.n)
        blocks.compute(TASK, "Generating", "answers", functools.partial(policy.batches, data.rows))
        policy.engine.drop()

        def write() -> None:
            count, too_long = Answers(), []  # type: ignore[var-annotated]

            def about() -> dict[str, Any]:
                return {
                    "prompts": len(data.rows),
                    "skipped": len(data.skipped),
                    "too_long": len(too_long),
                    "summary": count.record(),
                    **policy.about(),
                }

            output.write(lambda: rows(blocks.all_values(TASK), too_long, count), schema, about)
            report_skipped(output.path, [*data.skipped, *too_long])

        on_main(write)


def answer_row(row: Row, kept: Row, sample: int, value: dict[str, Any]) -> Row:
    """A row of the output: the prompt as it came, an answer, whether it ended by itself."""
    more = {key: part for key, part in template_part(row).items() if key != PLACE}
    return {
        "prompt": prompt_of(row), "completion": [{"role": "assistant", "content": value["text"]}], **more, **kept,
        "sample": sample, "finished": value["finished"], "num_tokens": value["tokens"], PLACE: row[PLACE],
    }  # fmt: skip


def _show(path: Path, record: dict[str, Any]) -> None:
    summary, sampling = record["summary"], record["sampling"]
    print()
    print(
        f"{path}: {plural(summary['answers'], 'answer')} of {record['model']} to {plural(record['prompts'] - record['too_long'], 'prompt')}"
    )
    show_answers(summary, sampling["max_new_tokens"])
    print(
        f"\nNext: rlhf score {shown(str(path), 200)} --reward MODEL --output scored.jsonl   # a reward model's scores"
    )


def show_answers(summary: dict[str, Any], max_new_tokens: int) -> None:
    if not summary["answers"]:
        return
    tokens, cut = summary["tokens"], summary["cut"]
    print(f"  tokens per answer   mean {tokens['mean']:.1f}, {tokens['min']:.0f} to {tokens['max']:.0f}")
    print(
        f"  cut                 {cut:,} ({cut / summary['answers']:.0%}) after {max_new_tokens:,} tokens: `finished` is false"
    )
    if summary["empty"]:
        print(f"  empty               {summary['empty']:,}: `rlhf score` needs --skip to leave them out")
    if 2 * cut > summary["answers"]:
        note("most answers were cut; raise --max_new_tokens")


class Answers:
    """What is reported of many answers."""

    def __init__(self) -> None:
        self.tokens, self.counts = Spread(), Counter[str]()

    def add(self, value: dict[str, Any]) -> None:
        self.tokens.add(value["tokens"])
        self.counts.update(cut=not value["finished"], empty=not value["text"])

    def record(self) -> dict[str, Any]:
        return {
            "answers": self.tokens.count,
            "tokens": self.tokens.record(),
            "cut": self.counts["cut"],
            "empty": self.counts["empty"],
        }


# --- the policy ------------------------------------------------------------------------------------------------------


class Policy:
    """A model that answers the prompts of rows, loaded when the first batch needs it."""

    def __init__(self, found: Found, options: Any):
        from transformers import AutoConfig

        from rlhf.inference.sampling import Sampling
        from rlhf.models.folder import base_of
        from rlhf.models.inference import check_bitsandbytes, placement
        from rlhf.models.tokenizer import load_tokenizer

        device = device_of_process()
        if options.load_in_4bit:
            check_bitsandbytes()
        if options.engine != "vllm":
            placement(found.path, dtype_on(device, options.dtype), device, options.load_in_4bit)
        self.found, self.n, self.batch_size = found, options.n, options.batch_size
        self.sampling = Sampling(options.temperature, options.top_p, options.max_new_tokens, options.seed)
        self.engine = Engine(
            options.engine, found, self.sampling, options.batch_size, device, options.dtype, options.load_in_4bit
        )
        self.tokenizer = load_tokenizer(found.path)
        text = AutoConfig.from_pretrained(base_of(found.path)).get_text_config()
        self.room = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)

    @property
    def too_long(self) -> str:
        return f"the prompt leaves no room for an answer in the {self.room:,} positions of {self.found.name}"

    def inputs(self) -> dict[str, Any]:
        """What decides the answers; not the batch size. A collective."""
        from rlhf.models.digests import weights_digest
        from rlhf.training.tokens import tokenizer_digest

        engine = self.engine
        return {
            "model": {"weights_sha256": weights_digest(self.found.path), "tokenizer_sha256": tokenizer_digest(self.tokenizer)},
            "device": engine.device.type, "dtype": engine.dtype, "load_in_4bit": engine.load_in_4bit, "n": self.n,
            **vars(self.sampling), "engine": engine.name,
        }  # fmt: skip

    def about(self) -> dict[str, Any]:
        return {"model": self.found.name, "sampling": {"n": self.n, **vars(self.sampling)}, "engine": self.engine.name,
                "batch_size": self.batch_size}  # fmt: skip

    def batches(self, rows: Rows, items: range) -> Iterator[Batch]:
        """Batches of answers, n to a prompt: `{"text", "finished", "tokens"}`, or None where the prompt leaves no room."""
        asked, over = self._asked(rows, items)
        if over:
            yield Batch(over, lambda: [None] * len(over))
        for batch in self.engine.batches(asked):
            yield Batch(batch, functools.partial(self._answers, asked, batch))

    def _answers(self, asked: Asked, batch: list[int]) -> list[dict[str, Any]]:
        return [{"text": a.text, "finished": a.finished, "tokens": a.tokens} for a in self.engine.answers(asked, batch)]

    def _asked(self, rows: Rows, items: range) -> tuple[Asked, list[int]]:
        from rlhf.inference.generate import encode_prompt

        asked: Asked = {}
        over: list[int] = []
        wanted = self.sampling.max_new_tokens
        for number in range(items.start // self.n, items.stop // self.n):
            row = rows[number]
            ids = encode_prompt(self.tokenizer, prompt_of(row), row)
            limit = min(wanted, self.room - len(ids)) if self.room else wanted
            for sample in range(self.n):
                item = number * self.n + sample
                if limit < 1:
                    over.append(item)
                else:
                    asked[item] = ids, limit, (number, sample)
        return asked, over
