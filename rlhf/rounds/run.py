"""`rlhf rounds`: run the next step of the rounds, on as many ranks as it is started with."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.rows import read_data
from rlhf.data.store import Rows
from rlhf.distributed.processes import is_main, say
from rlhf.errors import UserError
from rlhf.files import new_file, write_file
from rlhf.rounds.compare import best, table
from rlhf.rounds.plan import DPO, EVALUATE, LABEL, Rounds, Step, load_rounds
from rlhf.runs.status import COMPLETE, EXIT_CODES, INTERRUPTED, NOT_STARTED, RUNNING, holder_of

POLL_S = 0.5
PROMPT_FIELDS = ("prompt", "tools", "chat_template_kwargs")


def run_rounds(target: str, overrides: list[str]) -> None:
    """Run the next step: DPO or the evaluation of round 1, or the answers, DPO or the evaluation of a later one.

    Raises:
        UserError: before a model loads.
        Stopped: a stop was requested; the same command resumes.
    """
    rounds = load_rounds(target, overrides)
    step = rounds.next_step()
    if step is None:
        return show_end(rounds)
    say(f"\n=== Rounds: {step} (of {rounds.config.num_rounds} at most)")
    if step.kind == LABEL:
        _label(rounds, step.round)
    else:
        if step.round > 1:
            _main_first(
                lambda: rounds.write_recipe(step.kind, step.round), lambda: rounds.has_recipe(step.kind, step.round)
            )
        _run_stage(step.kind, str(rounds.recipe_file(step.kind, step.round)))
    _tell(rounds, step)


def _run_stage(kind: str, file: str) -> None:
    if kind == EVALUATE:
        from rlhf.evaluation.evaluate import evaluate

        evaluate(file, [])
        return
    from rlhf.training.dpo import DPO as STAGE
    from rlhf.training.run import run_stage

    run_stage(STAGE, file, [])


def _label(rounds: Rounds, number: int) -> None:
    from rlhf.inference.arguments import options_of
    from rlhf.inference.label_command import label_command

    place = rounds.place(number)
    _main_first(lambda: write_prompts(rounds), lambda: has_prompts(rounds))
    _main_first(lambda: place.mkdir(parents=True, exist_ok=True), place.is_dir)
    config = rounds.config
    options = options_of(
        LABEL, str(rounds.prompts), model=rounds.policy(number - 1), reward=rounds.reward_model, n=config.num_answers,
        temperature=config.temperature, top_p=config.top_p, max_new_tokens=config.max_new_tokens, min_margin=config.min_margin,
        keep_cut=config.keep_cut, batch_size=config.batch_size, seed=config.seed + number, output=str(rounds.pairs(number)),
        load_in_4bit=bool(rounds.dpo.get("load_in_4bit")),
    )  # fmt: skip
    record = label_command(options)
    if record is not None and not record["summary"]["pairs"]:
        rounds.pairs(number).unlink()
        raise UserError(
            f"no prompt of round {number} has two answers with different scores that ended by themselves; raise max_new_tokens, "
            "num_answers or temperature, or lower min_margin"
        )


def _main_first(work: Callable[[], None], is_done: Callable[[], bool]) -> None:
    """Do `work` on the main rank; the others wait until they see it on the shared disk: no process group is there yet.

    An error ends the main rank, and with it the launcher ends the others.
    """
    if is_main():
        work()
    while not is_done():
        time.sleep(POLL_S)


def has_prompts(rounds: Rounds) -> bool:
    return all(file.is_file() for file in (rounds.prompts, rounds.heldout, rounds.asked_file))


def write_prompts(rounds: Rounds) -> None:
    """Write the prompts that dpo.yaml trains on, each once, and the held-out pairs if DPO looks at them."""
    if has_prompts(rounds):
        return
    data = read_data(rounds.dpo, "pairs")
    rounds.folder.mkdir(parents=True, exist_ok=True)
    _write(rounds.heldout, data.heldout or Rows([]), None)
    _, first = np.unique(data.train.last_prompts(), return_index=True)
    _write(rounds.prompts, data.train.select(np.sort(first)).head(rounds.config.max_prompts), PROMPT_FIELDS)
    write_file(rounds.asked_file, json.dumps(rounds.asked, indent=1) + "\n")


def _write(path: Path, rows: Rows, fields: tuple[str, ...] | None) -> None:
    with new_file(path) as file:
        for row in _plain(rows, fields):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _plain(rows: Rows, fields: tuple[str, ...] | None) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {key: row[key] for key in (fields or row) if key in row and key != "place" and row[key] is not None}


def _tell(rounds: Rounds, done: Step) -> None:
    """After a step: the table so far, kept in rounds.json, and what comes next."""
    if not is_main():
        return
    if done.kind == EVALUATE:
        write_rounds(rounds)
        if rounds.next_step() is None:
            return show_end(rounds)
        say("\n".join(table(rounds.results())))
    if step := rounds.next_step():
        say(f"Next: the same command runs {step}")


def write_rounds(rounds: Rounds) -> None:
    """Write rounds.json: the results of each round, why they stopped, and which is the best."""
    results = rounds.results()
    rounds.folder.mkdir(parents=True, exist_ok=True)
    record = {"rounds": [r.record() for r in results], "stopped": rounds.why_stop() or None, "best": best(results).round,
              "reward_model": rounds.reward_model, "judge": rounds.evaluation.get("reward_model"), "recipe": rounds.recipe.values}  # fmt: skip
    write_file(rounds.folder / "rounds.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def show_end(rounds: Rounds) -> None:
    """The table of all rounds, why they ended, and which policy to take."""
    if not is_main():
        return
    write_rounds(rounds)
    results = rounds.results()
    found = best(results)
    say(f"\n=== Rounds: {rounds.why_stop()}")
    say("\n".join(table(results)))
    if os.path.normpath(rounds.evaluation.values["reward_model"]) == os.path.normpath(rounds.reward_model):
        say(
            "note: the reward model that judges here also labelled the answers, so a win rate that rises says that the policy pleases it; "
            "let evaluate.yaml name another judge to know more"
        )
    say(f"The best is round {found.round}: {found.policy}")
    say(f"Next: rlhf chat {found.policy}; the recipes, pairs and answers of each round are in {rounds.folder}")


def check_rounds(target: str, overrides: list[str]) -> None:
    """`--check`: the recipes of all rounds, and that round 1's data can be read."""
    rounds = load_rounds(target, overrides)
    data = read_data(rounds.dpo, "pairs")
    prompts = min(len(np.unique(data.train.last_prompts())), rounds.config.max_prompts or len(data.train))
    say(
        f"{rounds.recipe.path}: ok ({rounds.config.num_rounds} rounds at most; from the second on {prompts:,} prompts x "
        f"{rounds.config.num_answers} answers, labelled by {rounds.reward_model})"
    )


def print_status(target: str, overrides: list[str]) -> int:
    """One line about the rounds; returns the exit code of their state."""
    rounds = load_rounds(target, overrides)
    step, results = rounds.next_step(), rounds.results()
    if step is None:
        print(f"rounds: complete · {rounds.folder} · {rounds.why_stop()}; the best is round {best(results).round}")
        return EXIT_CODES[COMPLETE]
    folder = Path(rounds.policy(step.round)) if step.kind == DPO else rounds.evaluated(step.round)
    if holder := holder_of(folder):
        print(f"rounds: running, {step} · {rounds.folder} · {holder}")
        return EXIT_CODES[RUNNING]
    started = bool(results) or rounds.is_done(Step(DPO, 1))
    print(f"rounds: next is {step} · {rounds.folder}")
    return EXIT_CODES[INTERRUPTED if started else NOT_STARTED]
