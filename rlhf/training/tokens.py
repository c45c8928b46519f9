"""The token ids of a run's rows: tokenised once per machine, by all its processes together, and memory-mapped.

The ids of prepared rows (data/prepare.py) are a folder `tokens/KEY` in the cache. It is filled chunk by chunk: each process
of the run, and some that it starts where there are more cores, takes a chunk that nobody has and writes it under its lock.
No process waits in a collective, a killed one leaves its chunk to the others, and the next start continues.
Rows in memory (small data) are tokenised in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.data.store import Part, Rows, read_part
from rlhf.distributed.processes import is_main, local_rank, rank, say, world_size
from rlhf.errors import UserError, quote, sentence
from rlhf.files import cache_dir, free_bytes, lock_file, partial_path, read_json, remove_partials, sync_file, write_file
from rlhf.runs.stop import Stopped, Stopper
from rlhf.training.stage import Plan
from rlhf.training.tokenise import Counts, Settings, Tokenise, Tokens, training_template

if TYPE_CHECKING:
    from datasets import Dataset

BATCH_ROWS = 500  # tokenised at a time
CHUNK_ROWS = 2_000, 20_000  # fewest and most rows of a chunk
HELPERS_FROM = 4  # chunks: for fewer no process is started
MAX_HELPERS = 16
POLL_S, MAX_POLL_S = 0.2, 2.0


def settings_of(plan: Plan) -> Settings:
    """What decides the ids in this plan."""
    args: Any = plan.args
    return Settings(
        plan.recipe.stage, args.max_length, getattr(args, "truncation_mode", "keep_start"), plan.stage_args.too_long or "",
        getattr(args, "assistant_only_loss", False), getattr(args, "completion_only_loss", None), getattr(args, "eos_token", None),
    )  # fmt: skip


def tokenised(plan: Plan, tokenizer, side: str = "train", stopper: Stopper | None = None) -> Tokens | None:
    """The token ids of a side's rows; None if the plan has no such rows, or a stop was requested before they were made.

    Raises:
        UserError: `too_long: error`; no room on the disk.
    """
    rows = plan.data.train if side == "train" else plan.data.heldout
    if rows is None:
        return None
    tokenise = Tokenise(tokenizer, settings_of(plan))
    if not plan.data.keys.get(side):
        return in_memory(rows, tokenise)
    job = Job.make(plan, tokenizer, rows, side)
    return job.open() if job.complete(rows, tokenise, plan, stopper) else None


def with_tokens(plan: Plan, tokenizer, stopper: Stopper | None = None) -> Plan:
    """The plan with the token ids of its rows.

    Raises:
        UserError: `too_long: error`; max_length leaves no example; no room on the disk.
        Stopped: a stop was requested; what is done is kept.

    With a `stopper` a collective: all ranks must call it.
    """
    found = {
        side: tokens
        for side in ("train", "heldout")
        if (tokens := tokenised(plan, tokenizer, side, stopper)) is not None
    }
    if stopper and any(plan.data.keys.values()) and stopper.agree():
        say("\nStopped: finished token ids are in the cache. Run the same command to resume.")
        raise Stopped
    if len(found["train"].dataset) == 0:
        raise UserError(
            f"{plan.recipe.where('max_length')}: max_length={plan.args.max_length} leaves no training example; raise it"
        )
    return dataclasses.replace(plan, tokens=found)


def load_plan_tokenizer(plan: Plan):
    """The tokenizer with its chat template, as the stage loads it."""
    from rlhf.models.tokenizer import load_tokenizer

    args, recipe = plan.args, plan.recipe
    template, eos_token = plan.stage_args.chat_template, getattr(args, "eos_token", None)
    try:
        tokenizer = load_tokenizer(
            plan.model_name,
            template,
            args.trust_remote_code,
            encoder=recipe.stage == "reward",
            revision=plan.model_args.model_revision,
        )
    except UserError as error:
        where = recipe.where("chat_template" if template is not None else "model_name_or_path")
        raise UserError(f"{where}: {error}") from None
    except (OSError, ValueError, KeyError, ImportError) as error:  # missing or damaged files, a missing package
        raise UserError(
            f"{recipe.where('model_name_or_path')}: the tokenizer of {plan.model_name} can't be loaded: {sentence(error)}"
        ) from None
    if eos_token:  # as TRL's SFTTrainer does
        if eos_token not in tokenizer.get_vocab():
            raise UserError(
                f"{recipe.where('eos_token')}: {quote(eos_token)} is no token of {plan.model_name}; name one of its own"
            )
        tokenizer.eos_token = eos_token
    if getattr(args, "assistant_only_loss", False):
        try:
            training_template(tokenizer)
        except ValueError:
            raise UserError(
                f"{recipe.where('assistant_only_loss')}: the chat template does not mark the assistant's tokens "
                "({% generation %}), and TRL knows no variant of it that does; set `chat_template` to a .jinja file that does, or "
                "remove assistant_only_loss: of a prompt and its answer only the answer is learnt anyway"
            ) from None
    return tokenizer


def known_counts(plan: Plan, tokenizer) -> Counts | None:
    """What max_length does to the training rows, if they are tokenised already."""
    if not plan.data.keys.get("train"):
        return None
    job = Job.make(plan, tokenizer, plan.data.train, "train")
    job.forget_damaged()
    return job.counts() if not job.missing() else None


def in_memory(rows: Rows, tokenise: Tokenise) -> Tokens:
    counts, tables = Counts(), []
    for start in range(0, len(rows), BATCH_ROWS):
        columns = tokenise([rows[i] for i in range(start, min(start + BATCH_ROWS, len(rows)))], start, counts)
        if columns:
            tables.append(_table(columns))
    return Tokens(_dataset(tables), counts)


def _dataset(tables: list[Any]) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(pa.concat_tables(tables) if tables else _table({"example": []})))


def _table(columns: dict[str, list[Any]]):
    """Ids as 32-bit integers, keys as 16 bytes."""
    import pyarrow as pa

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    types = {"example": pa.int64(), "packed": pa.int32(), "padded": pa.int32(), "pair_key": pa.binary(), "margin": pa.float64(),
             "messages": messages}  # fmt: skip
    return pa.table({name: pa.array(values, types.get(name, pa.list_(pa.int32()))) for name, values in columns.items()})


@dataclasses.dataclass(frozen=True)
class Job:
    """A folder of token ids.

    Attributes:
        folder: in the cache.
        num_rows: of the rows to be tokenised.
        num_chunks: of equal size.
    """

    folder: Path
    num_rows: int
    num_chunks: int

    @staticmethod
    def make(plan: Plan, tokenizer, rows: Rows, side: str) -> Job:
        parts = [
            code_digest(),
            tokenizer_digest(tokenizer),
            dataclasses.asdict(settings_of(plan)),
            plan.data.keys[side],
        ]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        size = min(max(len(rows) // 64, CHUNK_ROWS[0]), CHUNK_ROWS[1])
        return Job(cache_dir() / "tokens" / key, len(rows), max(1, math.ceil(len(rows) / size)))

    def bounds(self, chunk: int) -> tuple[int, int]:
        """The rows of a chunk."""
        size = math.ceil(self.num_rows / self.num_chunks)
        return chunk * size, min(self.num_rows, (chunk + 1) * size)

    def files(self, chunk: int) -> tuple[Path, Path]:
        """(ids, counts) of a chunk; the counts are written last."""
        return self.folder / f"chunk-{chunk:05d}.arrow", self.folder / f"chunk-{chunk:05d}.json"

    def missing(self) -> list[int]:
        try:
            there = set(os.listdir(self.folder))
        except OSError:
            there = set()
        return [chunk for chunk in range(self.num_chunks) if self.files(chunk)[1].name not in there]

    def forget_damaged(self) -> None:
        """Remove the counts of chunks whose file is not as it was written, so that they are made again."""
        for chunk in set(range(self.num_chunks)) - set(self.missing()):
            ids, counted = self.files(chunk)
            try:
                whole = (read_json(counted) or {}).get("bytes") == ids.stat().st_size
            except OSError:
                whole = False
            if not whole:
                counted.unlink(missing_ok=True)

    def complete(self, rows: Rows, tokenise: Tokenise, plan: Plan, stopper: Stopper | None) -> bool:
        """Tokenise what is missing, together with the other processes that do the same; False if a stop was requested before."""
        self.forget_damaged()
        if not (missing := self.missing()):
            return True
        self._check_disk(rows, missing)
        self.folder.mkdir(parents=True, exist_ok=True)
        helpers = self._start_helpers(rows, plan, len(missing)) if local_rank() == 0 else []
        try:
            return self.work(rows, tokenise, stopper, bar=is_main())
        finally:
            for process in helpers:
                process.kill()
                process.wait()

    def work(self, rows: Rows, tokenise: Tokenise, stopper: Stopper | None = None, bar: bool = False) -> bool:
        """Tokenise chunks until all are there; False if a stop was requested before."""
        from tqdm import tqdm

        left, pause_s = self.missing(), POLL_S / 2
        progress = tqdm(total=self.num_rows, initial=self.num_rows - self._rows_of(left), desc="Tokenising", unit=" rows",
                        unit_scale=True, disable=not bar, delay=2, leave=False)  # fmt: skip
        with progress:
            while left:
                idle = True
                turn = rank() * len(left) // world_size()  # ranks start at different places
                for chunk in left[turn:] + left[:turn]:
                    if stopper and stopper.heard():
                        return False
                    if self._try(chunk, rows, tokenise):
                        idle = False
                        progress.n = self.num_rows - self._rows_of(self.missing())
                        progress.refresh()
                pause_s = min(2 * pause_s, MAX_POLL_S) if idle else POLL_S  # a thousand ranks may ask the same disk
                if idle:
                    time.sleep(pause_s)
                left = self.missing()
                progress.n = self.num_rows - self._rows_of(left)
                progress.refresh()
        return True

    def _rows_of(self, chunks: list[int]) -> int:
        return sum(end - start for start, end in map(self.bounds, chunks))

    def _try(self, chunk: int, rows: Rows, tokenise: Tokenise) -> bool:
        """Tokenise a chunk, if nobody has or had it; whether this process did."""
        ids, counted = self.files(chunk)
        if counted.exists():
            return False
        with open(ids.with_suffix(".lock"), "a", encoding="utf-8") as lock:
            if not lock_file(lock) or counted.exists():
                return False
            counts, partial = Counts(), partial_path(ids)
            remove_partials(ids)
            try:
                self._write(chunk, rows, tokenise, partial, counts)
                sync_file(partial)
                os.replace(partial, ids)
                found = {"bytes": ids.stat().st_size, "counts": dataclasses.asdict(counts)}
                write_file(counted, json.dumps(found))
            except OSError as error:
                raise UserError(
                    f"token ids can't be written to {self.folder.parent}: {error.strerror or error}; free some space there, or set "
                    "RLHF_CACHE to another folder"
                ) from None
            finally:
                partial.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    os.unlink(lock.name)
        return True

    def _write(self, chunk: int, rows: Rows, tokenise: Tokenise, path: Path, counts: Counts) -> None:
        import pyarrow as pa

        start, end = self.bounds(chunk)
        writer = None
        with contextlib.ExitStack() as opened:
            for at in range(start, end, BATCH_ROWS):
                columns = tokenise([rows[i] for i in range(at, min(end, at + BATCH_ROWS))], at, counts)
                if not columns:
                    continue
                table = _table(columns)
                writer = writer or opened.enter_context(pa.ipc.new_stream(str(path), table.schema))
                writer.write_table(table)
        if writer is None:
            path.write_bytes(b"")  # all of its rows were left out

    def _check_disk(self, rows: Rows, missing: list[int]) -> None:
        sample = rows.column("chars")
        needed = int(1.5 * float(sample.mean() if len(sample) else 0) * self._rows_of(missing))
        free = free_bytes(self.folder)
        if free < needed:
            raise UserError(
                f"the token ids of {self.num_rows:,} rows need about {needed / 1e9:.1f} GB, and {self.folder.parent} has "
                f"{free / 1e9:.1f} GB free; set RLHF_CACHE to a folder on a larger disk"
            )

    def _start_helpers(self, rows: Rows, plan: Plan, num_missing: int) -> list[subprocess.Popen]:
        """Processes on the cores that this machine's ranks leave over."""
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        wanted = plan.args.dataset_num_proc or len(os.sched_getaffinity(0))
        number = min(wanted - local_world, num_missing // 2, MAX_HELPERS)
        if number < 1 or num_missing < HELPERS_FROM or any(part.path is None for part in rows.parts):
            return []
        self._write_job(rows, plan)
        environment = {
            **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}, "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        command = [sys.executable, "-m", "rlhf.training.tokens", str(self.folder), str(os.getpid())]
        return [
            subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            for _ in range(number)
        ]

    def _write_job(self, rows: Rows, plan: Plan) -> None:
        """What a helper needs to know, in the folder."""
        if rows.indices is not None:
            content = io.BytesIO()
            np.save(content, rows.indices)
            write_file(self.folder / "indices.npy", content.getvalue())
        write_file(self.folder / "job.json", json.dumps({
            "num_rows": self.num_rows, "num_chunks": self.num_chunks, "settings": dataclasses.asdict(settings_of(plan)),
            "parts": [[part.name, part.has_lines, part.line_offset, str(part.path)] for part in rows.parts],
            "model": plan.model_name, "chat_template": plan.stage_args.chat_template,
            "trust_remote_code": plan.args.trust_remote_code, "revision": plan.model_args.model_revision,
        }))  # fmt: skip

    def counts(self) -> Counts:
        """Of all rows."""
        found = Counts()
        for chunk in range(self.num_chunks):
            found.add(Counts(**(read_json(self.files(chunk)[1]) or {}).get("counts", {})))
        return found

    def open(self) -> Tokens:
        """The ids, memory-mapped."""
        from datasets import Dataset, concatenate_datasets

        os.utime(self.folder)  # when it was last used
        files = [self.files(chunk)[0] for chunk in range(self.num_chunks)]
        parts = [Dataset.from_file(str(file)) for file in files if file.stat().st_size]
        return Tokens(concatenate_datasets(parts) if parts else _dataset([]), self.counts())


@functools.cache
def code_digest() -> str:
    """A digest of the code and the libraries that decide the ids."""
    digest = hashlib.sha256(repr([version(name) for name in ("transformers", "tokenizers", "trl")]).encode())
    for file in ("training/tokenise.py", "models/tokenizer.py"):
        digest.update((Path(__file__).parents[1] / file).read_bytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer) -> str:
    """A digest of a tokenizer: its vocabulary and rules, special tokens and chat template."""
    if getattr(tokenizer, "is_fast", False):
        rules = tokenizer.backend_tokenizer.to_str()
    else:
        rules = json.dumps(
            [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items()), str(tokenizer.init_kwargs)]
        )
    more = json.dumps([tokenizer.chat_template, {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items())}])
    return hashlib.sha256((rules + more).encode()).hexdigest()


def help_tokenise(folder: Path, parent: int) -> None:
    """What a helper process does, until all chunks are there or its parent is gone."""
    from rlhf.models.tokenizer import load_tokenizer

    told: Any = read_json(folder / "job.json")
    parts = [Part(name, has, offset, read_part(Path(path)), Path(path)) for name, has, offset, path in told["parts"]]
    indices = np.load(folder / "indices.npy", mmap_mode="r") if (folder / "indices.npy").exists() else None
    tokenizer = load_tokenizer(
        told["model"], told["chat_template"], told["trust_remote_code"], encoder=True, revision=told["revision"]
    )
    tokenise = Tokenise(tokenizer, Settings(**told["settings"]))
    job = Job(folder, told["num_rows"], told["num_chunks"])
    rows = Rows(parts, indices)
    for chunk in reversed(range(job.num_chunks)):  # from the other end than the process that has started this one
        if os.getppid() != parent:
            return
        job._try(chunk, rows, tokenise)


if __name__ == "__main__":
    help_tokenise(Path(sys.argv[1]), int(sys.argv[2]))
