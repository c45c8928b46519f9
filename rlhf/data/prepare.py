"""Canonical rows of a source, prepared once: in memory for a small one, else in the cache, for all processes and starts.

A prepared source is a folder `data/KEY` in the cache: parts (store.py) and `prepared.json`, which is written last. KEY is
the digest of the source, what the recipe says of its format, and the code that reads it. One process of a machine
prepares; the others wait for its lock, not for a collective, which would time out. A large JSON Lines file is shared out
over processes, one per core.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlhf.data.convert import Kind, Report, convert, count_repeats, first_rows, first_shape, prompt_end
from rlhf.data.features import BIT
from rlhf.data.format_options import DEFAULT, FormatOptions
from rlhf.data.json_reader import LineError
from rlhf.data.messages import text
from rlhf.data.recognise import Converter, converter
from rlhf.data.sources import SMALL_BYTES, Source, place
from rlhf.data.store import Part, PartWriter, Rows, read_part
from rlhf.errors import UserError
from rlhf.files import cache_dir, free_bytes, lock_file, partial_path, read_json, remove_partials, write_file

RANGE_BYTES = 128 << 20  # of a JSON Lines file that one process converts at a time
LONG_PROMPT = 16  # characters: an answer may start with a shorter prompt by chance ("Hello" and "Hello there")
POLL_S, MAX_POLL_S = 0.2, 2.0
ANSWERS = ("completion", "chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Canonical rows of a source, and what was found while they were read.

    Attributes:
        skipped: place and reason of each row that could not be used (`bad_rows: skip`).
        num_unused: unused column or message field -> number of rows in which it is not empty.
        stripped: all answers started with the prompt, which was removed.
        key: identifies the rows; '' if they are in memory only.
    """

    rows: Rows
    skipped: list[dict[str, str]]
    num_unused: dict[str, int]
    stripped: bool
    key: str = ""


def prepare(
    source: Source, kind: Kind, options: FormatOptions = DEFAULT, bad_rows: str = "error", can_skip: bool | str = False
) -> Prepared:
    """The canonical rows of a source.

    Args:
        kind: rows for SFT; pairs for reward models and DPO; single answers with a judgement; prompts alone.
        bad_rows: "error" raises if a row can't be used; "skip" leaves it out.
        can_skip: whether the user can choose, by the recipe key `bad_rows`; or by what else, as a sentence.

    Raises:
        UserError: a row can't be used, with its place and the reason; an unreadable line; none of the rows can be used.
    """
    job = _Job(source, kind, options, bad_rows, can_skip)
    if source.num_bytes <= SMALL_BYTES:
        return job.in_memory()
    return job.from_cache()


@functools.cache
def code_digest() -> str:
    """A digest of the code that decides what canonical rows are: with any change of it, rows are prepared again."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Job:
    source: Source
    kind: Kind
    options: FormatOptions
    bad_rows: str
    can_skip: bool | str

    @functools.cached_property
    def key(self) -> str:
        source = [self.source.digest, self.source.has_lines, self.source.part]
        parts = [code_digest(), self.kind, source, self.options.key(), self.bad_rows]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    @property
    def folder(self) -> Path:
        return cache_dir() / "data" / self.key

    def in_memory(self) -> Prepared:
        writer = PartWriter()
        report = convert(self.source.stream(), self.converter, writer, self.bad_rows)
        writer.close()
        self._check(report)
        part = Part(self.source.name, self.source.has_lines, 0, writer.batches)
        rows, stripped = Rows([part]), not self.converter.keeps_texts and _to_strip(report)
        if stripped:
            rows = strip_prompts(rows, PartWriter())
        return Prepared(rows, self._skipped(report), report.num_unused, stripped)

    def from_cache(self) -> Prepared:
        """The prepared folder; prepares it if it is not there, or waits for the process that does."""
        waited, pause_s, failed = 0.0, POLL_S, self.folder.with_name(f"{self.key}.failed")
        while (found := self.open()) is None:
            with _locked(self.folder.with_name(f"{self.key}.lock")) as mine:
                if mine:
                    if waited and (error := read_json(failed)) and error.get("at", 0) > waited:
                        raise UserError(str(error["message"]))  # the process that this one has waited for
                    if self.open() is None:
                        self._prepare(failed)
                    continue
            waited = waited or time.time()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_POLL_S)  # a thousand ranks may ask the same disk
        return found

    def open(self) -> Prepared | None:
        """The prepared folder; None if it is not there, or damaged."""
        found = read_json(self.folder / "prepared.json")
        if found is None:
            return None
        import pyarrow

        try:
            parts = [
                Part(self.source.name, self.source.has_lines, part["line_offset"], read_part(path), path)
                for part in found["parts"]
                for path in (self.folder / part["file"],)
            ]
            skipped = [
                {"place": place(self.source.name, line, self.source.has_lines), "reason": reason}
                for line, reason in json.loads((self.folder / "skipped.json").read_text(encoding="utf-8"))
            ]
            rows = Rows(parts)
            if len(rows) == found["rows"]:
                os.utime(self.folder)  # when it was last used
                return Prepared(rows, skipped, found["num_unused"], found["stripped"], self.key)
        except (OSError, pyarrow.ArrowException, ValueError, KeyError, TypeError):
            pass
        return None

    def _prepare(self, failed: Path) -> None:
        """Write the folder, under the lock."""
        partial = partial_path(self.folder)
        remove_partials(self.folder)
        try:
            self._check_disk()
            partial.mkdir(parents=True)
            self._write(partial)
            self.source.check_unchanged()
            if self.open() is None:  # else another machine was faster, on a file system without locks
                shutil.rmtree(self.folder, ignore_errors=True)  # a damaged one
                os.rename(partial, self.folder)
        except UserError as error:
            with contextlib.suppress(OSError):
                write_file(failed, json.dumps({"at": time.time(), "message": str(error)}))
            raise
        except OSError as error:
            raise UserError(
                f"{self.source.name}: the prepared rows can't be written to {self.folder.parent}: {error.strerror or error}; free "
                "some space there, or set RLHF_CACHE to another folder"
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _check_disk(self) -> None:
        needed, free = int(1.3 * self.source.num_bytes), free_bytes(self.folder)
        if free < needed:
            raise UserError(
                f"{self.source.name}: its prepared rows need about {needed / 1e9:.1f} GB, and {self.folder.parent} has "
                f"{free / 1e9:.1f} GB free; set RLHF_CACHE to a folder on a larger disk"
            )

    def _write(self, partial: Path) -> None:
        reports, before = [], 0
        parts: list[dict[str, Any]] = []
        for number, report in enumerate(self._convert(partial)):
            if report.error:
                line, column, message = report.error
                raise LineError(message, line, column).at(Path(self.source.name), before)
            reports.append(dataclasses.replace(report, bad=[(line + before, why) for line, why in report.bad]))
            if report.rows:
                parts.append(
                    {"file": f"part-{number:05d}.arrow", "line_offset": before, "first_line": report.first_line}
                )
            before += report.lines
        whole = _merged(reports)
        self._check_shapes(reports, parts)
        self._check(whole)
        stripped = not self.converter.keeps_texts and _to_strip(whole)
        if stripped:
            opened = [Part("", False, p["line_offset"], read_part(partial / p["file"])) for p in parts]
            strip_prompts(Rows(opened), PartWriter(partial / "stripped.arrow"))
            for part in parts:
                (partial / part["file"]).unlink()  # mapped until the end of this function
            parts = [{"file": "stripped.arrow", "line_offset": 0}]
        write_file(partial / "skipped.json", json.dumps(whole.bad))
        found = {"rows": whole.rows, "parts": parts, "num_unused": whole.num_unused, "stripped": stripped,
                 "source": self.source.name, "digest": self.source.digest}  # fmt: skip
        write_file(partial / "prepared.json", json.dumps(found, indent=1) + "\n")

    def _convert(self, partial: Path) -> Iterator[Report]:
        """Reports of the parts, in order."""
        if self.source.lines_file is None or self.source.num_bytes <= RANGE_BYTES // 4:
            writer = PartWriter(partial / "part-00000.arrow")
            with contextlib.closing(writer):
                yield convert(_counted(self.source), self.converter, writer, self.bad_rows)
            return
        assert self.converter  # an unknown format is found before processes start
        yield from convert_in_parallel(
            self.source.lines_file,
            self.kind,
            dataclasses.asdict(self.options),
            self.bad_rows,
            partial,
            self.source.num_bytes,
            first_shape(first_rows(self.source.stream()), self.converter),
        )

    @functools.cached_property
    def converter(self) -> Converter:
        """By the first rows; its errors name the source."""
        first = first_rows(self.source.stream())
        try:
            return converter(self.kind, first, self.options)
        except UserError as error:
            raise UserError(f"{self.source.name}: {error}") from None

    def _check_shapes(self, reports: list[Report], parts: list[dict]) -> None:
        with_rows = [report for report in reports if report.rows]
        for report, part in zip(with_rows, parts, strict=True):
            if report.shape != with_rows[0].shape:
                where = place(self.source.name, part["first_line"] + part["line_offset"], self.source.has_lines)
                raise UserError(
                    f"{where}: this row gives {report.shape}, but the first row gives {with_rows[0].shape}; use one format"
                )

    def _check(self, report: Report) -> None:
        """Raise UserError if a row can't be used and must not be skipped, or if no row is left."""
        if not report.bad:
            return
        (line, reason), num_bad = report.bad[0], len(report.bad)
        message = f"{place(self.source.name, line, self.source.has_lines)}: {reason}"
        if self.bad_rows == "skip" and not report.rows:
            raise UserError(f"{self.source.name}: none of {num_bad:,} rows can be used; {message}")
        if self.bad_rows == "skip":
            return
        least = "at least " if report.ended_early else ""
        rows = f"{least}{num_bad - 1:,} more row{'s' if num_bad > 2 else ''}"
        more = ""
        if num_bad > 1:
            after = place(self.source.name, report.bad[1][0], self.source.has_lines)
            more = f"; {rows} can't be used (next: {after})"
        how = self.can_skip if isinstance(self.can_skip, str) else "`bad_rows: skip` skips such rows"
        fix = f"; {how}" if self.can_skip and report.rows else ""
        raise UserError(message + more + fix)

    def _skipped(self, report: Report) -> list[dict[str, str]]:
        return [
            {"place": place(self.source.name, line, self.source.has_lines), "reason": reason}
            for line, reason in report.bad
        ]


def plain_rows(rows: Rows) -> list[dict[str, Any]]:
    """The rows in memory, without their places."""
    return [{key: value for key, value in row.items() if key != "place"} for row in rows]


def write_skipped(folder: Path, skipped: list[dict[str, str]]) -> None:
    """Write skipped_rows.jsonl: place and reason of each skipped row; no file if there is none."""
    if skipped:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in skipped)
        (folder / "skipped_rows.jsonl").write_text(lines, encoding="utf-8")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether this process has the lock; the kernel releases it when the process ends, however it does."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path.parent} can't be written ({error.strerror}); set RLHF_CACHE to a folder for prepared data"
        ) from None
    with file:
        yield lock_file(file)


def _merged(reports: list[Report]) -> Report:
    unused: Counter[str] = Counter()
    for report in reports:
        unused.update(report.num_unused)
    fewest = [report.fewest_repeats for report in reports if report.fewest_repeats is not None]
    return Report(
        rows=sum(report.rows for report in reports), bad=[bad for report in reports for bad in report.bad],
        ended_early=any(report.ended_early for report in reports), num_unused=dict(unused),
        fewest_repeats=min(fewest, default=None), longest_prompt=max((r.longest_prompt for r in reports), default=0),
        shape=next((report.shape for report in reports if report.rows), []),
    )  # fmt: skip


def _counted(source: Source) -> Iterator[tuple[dict[str, Any], int]]:
    """The rows, with a progress bar if it takes long."""
    from tqdm import tqdm

    from_start = source.stream()
    quiet = int(os.environ.get("RANK", 0)) > 0
    yield from tqdm(
        from_start, desc=f"Reading {Path(source.name).name}", unit="row", delay=3, disable=quiet, leave=False
    )


# --- the prompt at the start of each answer --------------------------------------------------------------------------


def _to_strip(report: Report) -> bool:
    """Whether all answers of all rows start with their prompt (full texts, as for a base model)."""
    sides = len([side for side in ANSWERS if side in report.shape])
    return bool(
        report.rows and sides and (report.fewest_repeats or 0) >= sides and report.longest_prompt >= LONG_PROMPT
    )


def strip_prompts(rows: Rows, writer: PartWriter) -> Rows:
    """The rows without the prompt at the start of their answers, written by `writer`; lines are those of `rows`' sources."""
    for part in rows.parts:
        only = Rows([part])
        flags = only.column("flags")
        lines = only.column("line")
        for at, row in enumerate(only):
            del row["place"]
            last = prompt_end(row)
            for side in ANSWERS:
                if side in row:
                    first, *others = row[side]
                    row[side] = [{**first, "content": text(first["content"][len(last) :], side)}, *others]
            kept = int(flags[at]) & (BIT["low_scores"] | BIT["equal_scores"])
            writer.add(row, int(lines[at]) + part.line_offset, kept | (BIT["repeats"] if count_repeats(row) else 0))
    writer.close()
    first_part = rows.parts[0]
    return Rows([Part(first_part.name, first_part.has_lines, 0, writer.batches)])


# --- ranges of a file, one process per core --------------------------------------------------------------------------


def convert_in_parallel(
    path: Path, kind: Kind, options: dict, bad_rows: str, folder: Path, num_bytes: int, shape: list[str]
) -> Iterator[Report]:
    """Convert a JSON Lines file range by range; yields the reports in the file's order, and ends early on an error.

    Args:
        shape: of the file's first usable row; []: each range is measured by its own.
    """
    from tqdm import tqdm

    cores = len(os.sched_getaffinity(0))
    size = max(1, min(RANGE_BYTES, -(-num_bytes // cores)))
    jobs = [
        {"path": str(path), "start": start, "end": min(num_bytes, start + size), "kind": kind, "options": options,
         "bad_rows": bad_rows, "shape": shape, "out": str(folder / f"part-{number:05d}.arrow"), "report": str(folder / f"report-{number:05d}.json")}
        for number, start in enumerate(range(0, num_bytes, size))
    ]  # fmt: skip
    running: list[subprocess.Popen] = []
    quiet = int(os.environ.get("RANK", 0)) > 0
    bar = tqdm(
        total=None, desc=f"Reading {path.name}", unit=" rows", unit_scale=True, delay=3, disable=quiet, leave=False
    )
    pool = ThreadPoolExecutor(cores)
    try:
        futures = [pool.submit(_run, job, running, bar) for job in jobs]
        for future in futures:
            report = future.result()
            yield report
            if report.error or report.ended_early:
                return
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            if process.poll() is None:
                process.kill()
        pool.shutdown(wait=True)
        bar.close()


def _run(job: dict[str, Any], running: list[subprocess.Popen], bar: Any) -> Report:
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf.data.convert"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    running.append(process)
    assert process.stdin and process.stdout and process.stderr  # pipes
    with contextlib.suppress(BrokenPipeError), process.stdin:  # where it has ended already: why is told below
        process.stdin.write(json.dumps(job))
    before = 0
    for line in process.stdout:
        bar.update(int(line) - before)
        before = int(line)
    failure = process.stderr.read()
    if process.wait():
        last = (failure.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise UserError(f"{job['path']}: a process that converts its rows has failed: {last}")
    found = read_json(job["report"]) or {}
    os.unlink(job["report"])
    error, bad = found.pop("error"), [(line, why) for line, why in found.pop("bad")]
    return Report(**found, bad=bad, error=tuple(error) if error else None)
