"""The file that a command writes: from which inputs (a JSON file beside it), complete or not there, and never over another.

`OUT` is written in one go from the parts in `OUT.parts/KEY` once all of them are there. `OUT.provenance.json` says what it was
made of and how, so that the same command recognises it, and another one refuses to replace it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.curation.export import SUFFIXES, output_file, parquet_schema, write_json_lines, write_parquet
from rlhf.curation.screen import note, plural, shown
from rlhf.distributed.processes import is_main, on_main, say, world_size
from rlhf.errors import UserError
from rlhf.files import file_digest, new_file, read_json, write_file
from rlhf.inference.blocks import Folder
from rlhf.runs.provenance import environment

FORMAT = 1  # part of every key: increment it when values are computed in another way
Row = dict[str, Any]


@dataclass(frozen=True)
class Output:
    """A file to be written, and what decides its content.

    Attributes:
        command: `score`, `generate` or `label`.
        inputs: by name: of data, models and options; JSON values.
        options: of the command line, for the record; with `overwrite` an existing file is replaced once the new one is complete.
    """

    path: Path
    command: str
    inputs: dict[str, Any]
    options: dict[str, Any]

    @property
    def overwrite(self) -> bool:
        return bool(self.options.get("overwrite"))

    @functools.cached_property
    def key(self) -> str:
        text = json.dumps([FORMAT, self.command, self.inputs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def sidecar(self) -> Path:
        return beside(self.path, "provenance.json")

    @property
    def started(self) -> bool:
        """Whether an earlier start has left something to resume from."""
        return (beside(self.path, "parts") / self.key).is_dir()

    def finished(self) -> dict[str, Any] | None:
        """The provenance of the file if it is there and made of these inputs; None if there is no file, or it is replaced.

        Raises:
            UserError: the file is there and was made of other inputs, by something else, or was changed since.
        """
        if not os.path.lexists(self.path):
            return None
        found = read_json(self.sidecar)
        same = found is not None and found.get("key") == self.key
        if same and found is not None and found.get("sha256") == file_digest(self.path):
            return found
        if self.overwrite:
            return None
        if same:
            why = "was changed since it was written"
        elif found is None or not isinstance(found.get("inputs"), dict):
            why = "already exists and is no file of this command"
        else:
            why = f"already exists and was made of other inputs ({_differences(found, self)})"
        raise UserError(f"{self.path} {why}; give another --output, or --overwrite to replace it")

    def make(self, compute: Callable[[], None]) -> dict[str, Any]:
        """Let `compute` write the file, unless it is complete. A collective.

        Returns:
            The provenance of the file, on all ranks.

        Raises:
            UserError: another file is there.
        """
        found = _from_main(self.finished)
        if found is not None:
            say(f"{self.path} is complete: the same data, models and options")
            return found
        compute()
        found = _from_main(lambda: read_json(self.sidecar))
        assert found is not None, "it was written"
        return found

    @contextlib.contextmanager
    def parts(self) -> Iterator[Path]:
        """The folder of what is computed for this file, kept until it is written. A collective."""
        folder = Folder(beside(self.path, "parts") / self.key, self.path)
        try:
            yield folder.path
            if is_main():
                folder.remove()
        finally:
            folder.close()

    def check_form(self, rows: Callable[[], Iterator[Row]]) -> Any:
        """The schema of a Parquet file (None for JSON Lines), found before anything is computed.

        Raises:
            UserError: a Parquet file can't hold these rows.
        """
        found: list[Any] = [None]

        def look() -> None:
            found[0] = parquet_schema(rows(), self.path) if self.path.suffix == ".parquet" else None

        on_main(look)
        return found[0]

    def write(self, rows: Callable[[], Iterator[Row]], schema: Any, about: Callable[[], dict[str, Any]]) -> None:
        """Write the rows, and then what they were made of.

        Args:
            about: more for the provenance, asked once all rows have been gone through.
        """
        temporary = self.path.with_name(f".{self.path.stem}-{self.key}{self.path.suffix}")
        try:
            if self.path.suffix == ".parquet":
                write_parquet(rows, temporary, schema)
            else:
                write_json_lines(rows(), temporary)
            record = {"command": self.command, "key": self.key, "inputs": self.inputs, "sha256": file_digest(temporary)}
            record |= {"options": self.options, **about(), "environment": environment()}
            write_file(self.sidecar, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)


def _from_main(ask: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """What the main rank finds, on all ranks: another rank may see the disk later."""
    found: list[Any] = [None]

    def look() -> None:
        found[0] = ask()

    on_main(look)
    if world_size() > 1:
        from accelerate.utils import broadcast_object_list

        found = broadcast_object_list(found)
    return found[0]


def beside(path: Path, ending: str) -> Path:
    """Example: beside(Path("a/b.jsonl"), "parts") -> Path("a/b.jsonl.parts")."""
    return path.with_name(f"{path.name}.{ending}")


def output_path(name: str, read: str | None) -> Path:
    """The path of a file to be written, which may be there.

    Args:
        read: the file, folder or data set that the rows come from.

    Raises:
        UserError: its folder doesn't exist, it is a folder or what is read, or its ending is another.
    """
    path = Path(name).expanduser()
    source = Path(read).expanduser() if read else None
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise UserError(f"--output: {path} is the file that is read, and would be replaced; give another")
    if source is not None and source.is_dir() and path.parent.exists() and path.parent.samefile(source):
        raise UserError(f"--output: {path} lies in the folder that is read, and would be read too; give another place")
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder; give a file in it that ends with {' or '.join(SUFFIXES)}")
    if os.path.lexists(path) and path.suffix in SUFFIXES:
        return path
    return output_file(name, "--output")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that was written here."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pylist()
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _differences(found: dict[str, Any], output: Output) -> str:
    if found.get("command") != output.command:
        return f"by `rlhf {found.get('command')}`"
    before = found["inputs"]
    names = [name for name in {**before, **output.inputs} if before.get(name) != output.inputs.get(name)]
    return shown(", ".join(names) or "an earlier version of this project", 200)


def report_skipped(path: Path, skipped: list[dict[str, str]], noun: str = "row") -> None:
    """Name the rows that are not in the output: the first on the screen, all in a file beside it (main rank only)."""
    if not skipped or not is_main():
        return
    file = beside(path, "skipped.jsonl")
    with new_file(file) as out:
        for row in skipped:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    for row in skipped[:3]:
        note(f"skipped {shown(row['place'], 200)}: {shown(row['reason'], 300)}")
    if len(skipped) > 3:
        note(f"and {len(skipped) - 3:,} more")
    note(f"{plural(len(skipped), noun)} left out: {file}")
