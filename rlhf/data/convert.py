"""Convert a stream of a source's rows to canonical rows: pure, row by row, in this process or as one of several.

`python -m rlhf.data.convert` converts a byte range of a JSON Lines file for prepare.py; the job is JSON on stdin, and the
report, with all that must be known of the range's rows, is written beside the part.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rlhf.data import columns
from rlhf.data.features import BIT
from rlhf.data.format_options import FormatOptions
from rlhf.data.json_reader import LineError, json_lines
from rlhf.data.messages import INVISIBLE, RowError
from rlhf.data.recognise import FIRST_ROWS, Converter, converter
from rlhf.data.store import PartWriter
from rlhf.files import write_file

Kind = Literal["sft", "pairs", "unpaired", "prompts"]
MAX_BAD = 1000  # unusable rows of one range after which reading ends, unless they are skipped
SHARED = frozenset(
    ("tools", "chat_template_kwargs", "margin", "subset")
)  # keys that rows of one shape may have or lack


@dataclass
class Report:
    """What was found while rows were converted.

    Attributes:
        rows: how many can be used.
        lines: how many lines, or rows, were read: where the next range's count begins.
        bad: line and reason of each row that can't be used.
        ended_early: after MAX_BAD of them.
        num_unused: unused column or message field -> number of rows in which it is not empty.
        fewest_repeats: the fewest answers of a row that start with its prompt; None without rows.
        longest_prompt: characters of the longest last message of a prompt.
        shape: the keys of the first row, but for SHARED.
        first_line: of the first usable row.
        error: [line, column (0: none), message] of a line that is no row.
    """

    rows: int = 0
    lines: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    ended_early: bool = False
    num_unused: dict[str, int] = field(default_factory=dict)
    fewest_repeats: int | None = None
    longest_prompt: int = 0
    shape: list[str] = field(default_factory=list)
    first_line: int = 0
    error: tuple[int, int, str] | None = None


def convert(
    stream: Iterable[tuple[dict[str, Any], int]], to_canonical: Converter, writer: PartWriter,
    bad_rows: str, report: Report | None = None,
) -> Report:  # fmt: skip
    """Convert rows and add them to a part.

    Args:
        stream: rows, each with its line or number.
        to_canonical: takes a row, records the columns it uses, or raises RowError.
        bad_rows: "error" ends after MAX_BAD unusable rows.
        report: of the rows before.
    """
    report = report or Report()
    unused: Counter[str] = Counter(report.num_unused)
    for row, line in stream:
        report.lines = line
        used: set[str] = set()
        try:
            new = to_canonical(row, used)
            _check_shape(report, new)
        except RowError as error:
            report.bad.append((line, str(error)))
            if bad_rows == "error" and len(report.bad) >= MAX_BAD:
                report.ended_early = True
                break
            continue
        report.rows += 1
        report.first_line = report.first_line or line
        unused.update(columns.unused(row, used))
        writer.add(new, line, _row_flags(report, row, new, used))
    report.num_unused = dict(unused)
    return report


def first_shape(rows: list[dict[str, Any]], to_canonical: Converter) -> list[str]:
    """The shape of the first usable row, by which those of all ranges are measured; [] if none of these can be used."""
    for row in rows:
        with contextlib.suppress(RowError):
            return _shape(to_canonical(row, set()))
    return []


def _shape(new: dict[str, Any]) -> list[str]:
    return sorted(new.keys() - SHARED)


def _check_shape(report: Report, new: dict[str, Any]) -> None:
    shape = _shape(new)
    if not report.shape:
        report.shape = shape
    elif shape != report.shape:
        raise RowError(f"this row gives {shape}, but the first row gives {report.shape}; use one format")


def _row_flags(report: Report, row: dict, new: dict[str, Any], used: set[str]) -> int:
    flags, scores = 0, None if used.isdisjoint(("rejected", "rejected_response")) else columns.scores(row)
    if scores and scores[0] <= scores[1]:
        flags |= BIT["equal_scores" if scores[0] == scores[1] else "low_scores"]
    repeats = count_repeats(new)
    if repeats:
        flags |= BIT["repeats"]
    if report.fewest_repeats is None or repeats < report.fewest_repeats:
        report.fewest_repeats = repeats
    if "prompt" in new:
        report.longest_prompt = max(report.longest_prompt, len(prompt_end(new)))
    return flags


def count_repeats(row: dict[str, Any]) -> int:
    """How many of the answers start with the prompt's last message and continue it."""
    if "prompt" not in row or not (last := prompt_end(row)):
        return 0
    answers = (row[side][0]["content"] or "" for side in ("completion", "chosen", "rejected") if side in row)
    return sum(answer.startswith(last) and bool(answer[len(last) :].strip(INVISIBLE)) for answer in answers)


def prompt_end(row: dict[str, Any]) -> str:
    """The text of the prompt's last message."""
    return row["prompt"][-1]["content"] or ""


def first_rows(stream: Iterable[tuple[dict[str, Any], int]]) -> list[dict[str, Any]]:
    return [row for row, _ in islice(stream, FIRST_ROWS)]


# --- a range of a file, in a process of its own ----------------------------------------------------------------------


def convert_range(job: dict[str, Any]) -> Report:
    """Convert the lines of `job["path"]` that start in [start, end), to the part `job["out"]`."""
    path = Path(job["path"])
    to_canonical = converter(
        job["kind"], first_rows(json_lines(path)), FormatOptions(**{k: _tuples(v) for k, v in job["options"].items()})
    )
    report, writer = Report(shape=job["shape"]), PartWriter(Path(job["out"]))
    try:
        convert(
            counted(json_lines(path, job["start"], job["end"], report)), to_canonical, writer, job["bad_rows"], report
        )
    except LineError as error:
        report.error = error.line, error.column, str(error)
    finally:
        writer.close()
    return report


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def counted(stream: Iterator) -> Iterator:
    """The same items; prints their number now and then, for the process that waits."""
    for number, item in enumerate(stream, 1):
        if number % 2000 == 0:
            print(number, flush=True)
        yield item


if __name__ == "__main__":
    job = json.load(sys.stdin)
    write_file(Path(job["report"]), json.dumps(asdict(convert_range(job))))
