"""The command line of `rlhf score`, `rlhf generate` and `rlhf label`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from rlhf.errors import UserError, quote

COMMANDS = ("score", "generate", "label")
BATCH_SIZE = 16
DTYPES = ("float32", "bfloat16", "float16")
ENGINES = ("transformers", "continuous", "vllm")
RANKS = " On several processes or GPUs: `accelerate launch --config_file launch/ddp.yaml -m rlhf {} ...`; each holds the model, the rows are shared out."  # fmt: skip
RESUMES = " Interrupted, the same command resumes."

SCORE = "Score the answers, pairs or dialogues of a file with a reward model, and write them with their scores."
GENERATE = "Let a model answer the prompts of a file, n answers to each."
LABEL = """\
Let a model answer prompts, score the answers, and write pairs of the best and the worst for `rlhf dpo`; or, with --audit,
find the labels of a file of pairs that a reward model disputes."""


def number(kind: Callable[[str], Any], low: float, high: float) -> Callable[[str], Any]:
    """A type for argparse: a number from `low` to `high`."""

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:  # NaN is neither
            raise argparse.ArgumentTypeError(f"{quote(text)} is not a number from {low:g} to {high:g}")
        return value

    return read


def add_inference(commands: Any) -> None:
    """Add the three commands to the subcommands."""
    score = _command(commands, "score", SCORE)
    _data(score)
    _reward(score, needed=True)
    score.add_argument("--column", default="score", metavar="NAME", help="of the scores in the output (default score); of pairs NAME_chosen and NAME_rejected")  # fmt: skip
    _output(score)
    _loading(score)

    generate = _command(commands, "generate", GENERATE)
    _data(generate)
    generate.add_argument("--model", required=True, metavar="MODEL", help="a stage's output, any local model or adapter, embedded:smollm2-135m-instruct, or org/name on the hub")  # fmt: skip
    _sampling(generate, answers=1)
    _output(generate)
    _loading(generate)

    label = _command(commands, "label", LABEL)
    _data(label)
    label.add_argument("--model", metavar="MODEL", help="which answers the prompts; without --audit")
    _reward(label, needed=True)
    _sampling(label, answers=4)
    label.add_argument("--min_margin", type=number(float, 0, 1e6), default=0.0, metavar="X", help="by how much the best must be above the worst (default: at all)")  # fmt: skip
    label.add_argument("--keep_cut", action="store_true", help="also take answers that were cut at --max_new_tokens, which teach to end in the middle")  # fmt: skip
    label.add_argument("--audit", action="store_true", help="write the pairs of FILE whose rejected answer has the higher score, the most disputed first")  # fmt: skip
    _output(label)
    _loading(label)


def _command(commands: Any, name: str, description: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, description=description + RESUMES + RANKS.format(name), allow_abbrev=False)


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a file, a folder, a hub id or embedded:sample, in any format of docs/data.md")  # fmt: skip
    parser.add_argument("--split", help="split to read, if there are several (default: train)")
    parser.add_argument("--limit", type=number(int, 1, 1e12), metavar="N", help="only the first N rows")
    parser.add_argument("--kind", choices=("pairs", "sft"), help="of rows (default: by their content)")
    parser.add_argument("--format", metavar="NAME", help="how rows are read (default: by their content)")
    parser.add_argument("--columns", metavar="MAP", help="columns under other names: '{prompt: question}'")
    parser.add_argument("--roles", metavar="MAP", help="roles under other names: '{customer: user}'")
    parser.add_argument("--skip", action="store_true", help="leave out rows that can't be used, and name them")


def _reward(parser: argparse.ArgumentParser, needed: bool) -> None:
    parser.add_argument("--reward", required=needed, metavar="MODEL", help="a reward model: the output of `rlhf reward`, or any sequence classifier with one label")  # fmt: skip
    parser.add_argument("--max_length", type=number(int, 1, 1e9), metavar="TOKENS", help="rows with more have no score (default: what the reward model has positions for)")  # fmt: skip


def _sampling(parser: argparse.ArgumentParser, answers: int) -> None:
    parser.add_argument("-n", type=number(int, 1, 1e4), default=answers, help=f"answers to each prompt (default {answers})")  # fmt: skip
    parser.add_argument("--temperature", type=number(float, 0, 100), default=1.0, help="0: greedy decoding (default 1)")
    parser.add_argument("--top_p", type=number(float, 1e-6, 1), default=1.0, help="sample from the most likely tokens with this total probability (default 1)")  # fmt: skip
    parser.add_argument("--max_new_tokens", type=number(int, 1, 1e6), default=256, help="of an answer; one that is cut there is marked (default 256)")  # fmt: skip
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the answers (default 0)")
    parser.add_argument("--batch_size", type=number(int, 1, 1e5), default=BATCH_SIZE, help="answers generated at a time (default 16); no answer depends on it, but for rounding")  # fmt: skip
    parser.add_argument("--engine", choices=ENGINES, default="transformers", help="continuous: transformers' continuous batching; vllm: vLLM, if it is installed; both sample in their own way")  # fmt: skip


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="OUT", help="a .jsonl or .parquet file")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT once the new one is complete")


def _loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="of the models (default: their checkpoints' on a GPU, float32 on a CPU)")  # fmt: skip
    parser.add_argument("--load_in_4bit", action="store_true", help="quantise the models, or an adapter's base, to 4 bits")  # fmt: skip


def without_effect(options: argparse.Namespace) -> list[str]:
    """The options of `rlhf label` that were given and that --audit does not use."""
    plain = options_of("label", "data", reward="none", output="none")
    names = ("n", "temperature", "top_p", "max_new_tokens", "seed", "batch_size", "engine", "min_margin", "keep_cut")
    return [name for name in names if getattr(options, name) != getattr(plain, name)]


class _Raising(argparse.ArgumentParser):
    """A parser whose errors are UserErrors."""

    def error(self, message: str) -> Any:
        raise UserError(f"{self.prog.replace('rlhf ', 'rlhf.')}: {message}")


def options_of(command: str, file: str, **given: Any) -> argparse.Namespace:
    """The options of a command, as its command line would give them: the same defaults, ranges and choices.

    Args:
        given: by name; None and False leave an option out, True gives it without a value.

    Raises:
        UserError: an unknown option, or a wrong value.
    """
    words = [command, file]
    for name, value in given.items():
        if value is not None and value is not False:
            words += [f"-{name}" if len(name) == 1 else f"--{name}", *([] if value is True else [str(value)])]
    top = _Raising(prog="rlhf", allow_abbrev=False)
    add_inference(top.add_subparsers(dest="command"))
    return top.parse_args(words)
