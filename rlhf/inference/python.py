"""`rlhf.score`, `rlhf.generate` and `rlhf.label`: the commands for rows that Python holds, with their rows as the result."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rlhf.console import ended_bars
from rlhf.data.sources import source_of
from rlhf.distributed.processes import world_size
from rlhf.errors import UserError
from rlhf.inference.arguments import options_of
from rlhf.inference.output import read_rows

if TYPE_CHECKING:
    from datasets import Dataset

    Rows: TypeAlias = Dataset | list[dict[str, Any]]


def score(data: Rows | str | os.PathLike[str], reward: str | os.PathLike[str], **options: Any) -> list[dict[str, Any]]:
    """A reward model's scores of answers, pairs or dialogues, as `rlhf score` writes them.

    Args:
        data: a file, or rows: a `datasets.Dataset` or a list of dicts, in any format that a file may have.
        reward: the output folder of a reward stage, or another sequence classifier with one label.
        options: of the command (`rlhf score --help`), such as `limit=100`. With `output` the file stays; without, its rows
            are only returned.

    Returns:
        The rows in their order: canonical, with `score`, or `score_chosen` and `score_rejected`; None where a row is too
        long. All of them are in memory: for a file of millions of rows use the command.

    Raises:
        UserError: a mistake in rows or options, before a model loads; a ValueError.
    """
    from rlhf.inference.score_command import score_command

    return _rows_of("score", score_command, data, {"reward": reward, **options})


def generate(
    data: Rows | str | os.PathLike[str], model: str | os.PathLike[str], **options: Any
) -> list[dict[str, Any]]:
    """A model's answers to prompts, as `rlhf generate` writes them.

    Args:
        data: as for `score`; rows need no answer.
        model: a finished model: a stage's output folder, an adapter, or a name on the hub.
        options: of the command, such as `n=4, temperature=0.7, max_new_tokens=128, seed=1`.

    Returns:
        A row for each answer: `prompt`, `completion`, `sample`, `finished`, `num_tokens`.

    Raises:
        UserError: as for `score`.
    """
    from rlhf.inference.generate_command import generate_command

    return _rows_of("generate", generate_command, data, {"model": model, **options})


def label(
    data: Rows | str | os.PathLike[str],
    model: str | os.PathLike[str] | None,
    reward: str | os.PathLike[str],
    **options: Any,
) -> list[dict[str, Any]]:
    """Pairs of a model's best and worst answers by a reward model, as `rlhf label` writes them.

    Args:
        data: as for `score`; rows need no answer.
        model: which answers; None with `audit=True`, which returns the pairs of `data` that the reward model disputes.
        options: of the command, such as `n=4, min_margin=0.5`.

    Returns:
        Pairs: `prompt`, `chosen`, `rejected`, `score_chosen`, `score_rejected`.

    Raises:
        UserError: as for `score`.
    """
    from rlhf.inference.label_command import label_command

    return _rows_of("label", label_command, data, {"model": model, "reward": reward, **options})


def _rows_of(command: str, run: Any, data: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What a command has written: to `output`, or to a folder that is gone afterwards."""
    if threading.current_thread() is not threading.main_thread():
        raise UserError(f"rlhf.{command} stops on signals, which Python gives to its main thread only: call it there")
    is_file = isinstance(data, (str, os.PathLike))
    with tempfile.TemporaryDirectory(prefix="rlhf-") as folder:
        if "output" not in options and world_size() > 1:
            raise UserError(f"rlhf.{command}: on several processes give output=FILE, on a disk that all of them see")
        options = {"output": os.path.join(folder, "rows.jsonl"), **options}
        given = options_of(command, os.fspath(data) if is_file else "data", **options)
        with ended_bars():
            run(given, None if is_file else source_of("data", data))
        return read_rows(Path(given.output))
