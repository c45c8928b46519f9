"""The command line of `rlhf data` and `rlhf pairs`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

COMMANDS = """\
  rlhf data check TARGET              everything that is wrong with the data, with file and line
  rlhf data stats TARGET              lengths in characters or tokens, turns, sources
  rlhf data show TARGET               the exact tokens that a run trains on
  rlhf data convert TARGET OUT        any format as canonical .jsonl or .parquet
  rlhf data prepare RECIPE.yaml ...   prepare rows and token ids before a run, such as on a login node
  rlhf data cache                     what is prepared, and --clean DAYS
  rlhf data pair DATASET              accepted_data, rejected_data and preference_data.jsonl

TARGET is a recipe, whose data is read as its stage reads it, or a file, a folder, a hub id or embedded:sample.
"""
KINDS = ("pairs", "sft")
TAKE_KEYS = ("check", "stats", "show", "convert", "prepare")  # actions whose recipe's keys can be given as --key value


def add_data(commands: Any, number: Callable[..., Any]) -> None:
    """Add `data` and `pairs` to the subcommands.

    Args:
        number: makes an argparse type: number(int, low, high).
    """
    data = commands.add_parser(
        "data", description=f"Look into data, clean it, convert it, prepare it.\n\n{COMMANDS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    actions = data.add_subparsers(dest="action", metavar="ACTION", help="`rlhf data ACTION --help` for details")
    data.set_defaults(data_parser=data)
    _add_check(actions, number)
    _add_stats(actions, number)
    _add_show(actions, number)
    _add_convert(actions, number)
    prepare = _action(actions, "prepare", "Prepare the rows and token ids of recipes in the cache (RLHF_CACHE), as their "
                      "runs would. Keys of the recipes can be given as --key value.")  # fmt: skip
    prepare.add_argument("recipe", metavar="RECIPE.yaml", nargs="+")
    cache = _action(actions, "cache", "List what is prepared in the cache (RLHF_CACHE), with sizes and last use.")
    cache.add_argument(
        "--clean", type=number(float, 0, 1e5), metavar="DAYS", help="remove what was not used for so long"
    )
    _json(cache)
    _add_pairs(_action(actions, "pair", PAIRS), number)
    _add_pairs(commands.add_parser("pairs", description=PAIRS + " The same as `rlhf data pair`."), number)


PAIRS = "Write accepted_data, rejected_data and preference_data.jsonl from any preference data."


def _action(actions: Any, name: str, description: str) -> argparse.ArgumentParser:
    return actions.add_parser(name, description=description, allow_abbrev=False)


def _add_target(parser: argparse.ArgumentParser, number: Callable[..., Any], model: bool = True) -> None:
    parser.add_argument(
        "target", metavar="TARGET", help="a recipe (.yaml), a file, a folder, a hub id or embedded:sample"
    )
    parser.add_argument("--kind", choices=KINDS, help="of rows, for data alone (default: by their content)")
    parser.add_argument("--split", help="split to read, if there are several (default: train)")
    parser.add_argument("--limit", type=number(int, 1, 1e12), metavar="N", help="only the first N rows")
    parser.add_argument("--format", metavar="NAME", help="how rows are read (default: by their content)")
    parser.add_argument("--columns", metavar="MAP", help="columns under other names: '{prompt: question}'")
    parser.add_argument("--roles", metavar="MAP", help="roles under other names: '{customer: user}'")
    if model:
        parser.add_argument(
            "--model", metavar="MODEL", help="whose tokenizer and chat template to use (default: the recipe's)"
        )
        parser.add_argument("--chat_template", metavar="NAME", help="instead of the model's: a name or a .jinja file")
        parser.add_argument("--max_length", type=number(int, 1, 1e9), metavar="TOKENS", help="of the run")


def _rows(parser: argparse.ArgumentParser, number: Callable[..., Any]) -> None:
    parser.add_argument(
        "--rows", type=_count, default=20_000, metavar="N",
        help="rows to be tokenised, evenly spaced (default 20000), or `all`; 0: none",
    )  # fmt: skip


def _count(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or len(text) > 12:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is neither a number of rows nor `all`")
    return int(text)


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON value for programs")


def _add_check(actions: Any, number: Callable[..., Any]) -> None:
    check = _action(actions, "check", "Find what is wrong with data: rows that can't be used, duplicates, contradictions, "
                    "leaks of held-out prompts, length bias, template markers, garbled text and more. Exit code 2 if a run would "
                    "stop at a row.")  # fmt: skip
    _add_target(check, number)
    _rows(check, number)
    check.add_argument(
        "--shown", type=number(int, 0, 1e6), default=3, metavar="N", help="places shown of each kind (default 3)"
    )
    check.add_argument("--all", action="store_true", help="show every place")
    check.add_argument(
        "--near-duplicates", action=argparse.BooleanOptionalAction, default=None,
        help="find rows that nearly equal an earlier one (default: up to 100,000 rows, if datasketch is installed)",
    )  # fmt: skip
    check.add_argument("--secrets", action="store_true", help="find keys and tokens in texts (needs detect-secrets)")
    check.add_argument("--strict", action="store_true", help="exit code 2 for warnings too")
    check.add_argument("--sarif", metavar="FILE", help="also write the findings as SARIF, for code review tools")
    check.add_argument(
        "--fix", metavar="OUT", help="also write the rows without what is safe to remove (.jsonl, .parquet)"
    )
    check.add_argument(
        "--drop-leaks", action="store_true", help="with --fix: also leave out training rows whose prompt is held out"
    )
    _json(check)


def _add_stats(actions: Any, number: Callable[..., Any]) -> None:
    stats = _action(
        actions, "stats", "Measure prompts and answers, in tokens with a recipe or --model, else in characters."
    )
    _add_target(stats, number)
    _rows(stats, number)
    stats.add_argument(
        "--characters", action="store_true", help="measure characters, of all rows, although there is a model"
    )
    _json(stats)


def _add_show(actions: Any, number: Callable[..., Any]) -> None:
    show = _action(actions, "show", "Show the exact tokens of rows, by whether they are trained on; needs a tokenizer.")
    _add_target(show, number)
    show.add_argument("-n", type=number(int, 1, 1000), default=3, help="how many rows (default 3)")
    show.add_argument("--row", metavar="FILE:LINE", help="this row, as messages name it")


def _add_convert(actions: Any, number: Callable[..., Any]) -> None:
    convert = _action(
        actions, "convert", "Write any data as canonical rows; single judged answers (KTO, HelpSteer) as pairs."
    )
    _add_target(convert, number, model=False)
    convert.add_argument("out", metavar="OUT", help="a new .jsonl or .parquet file")
    convert.add_argument(
        "--with-source", action="store_true", help="add a column `source` with each row's file and line"
    )
    convert.add_argument("--skip", action="store_true", help="leave out rows that can't be used, and name them")


def _add_pairs(pairs: argparse.ArgumentParser, number: Callable[..., Any]) -> None:
    pairs.add_argument("dataset", metavar="DATASET", help="embedded:sample, a file, a folder or a hub id")
    pairs.add_argument("--split", help="split to read, if there are several (default: train)")
    pairs.add_argument("--limit", type=number(int, 1, 1e12), help="only the first N pairs")
    pairs.add_argument("--format", help="how the rows are read, if several formats fit them")
    pairs.add_argument("--output_dir", default="data/processed")


def run_data(options: argparse.Namespace, rest: list[str]) -> int | None:
    """Run `rlhf data ACTION` or `rlhf pairs`; returns its exit code, or None for 0."""
    from rlhf.console import plain_bars

    plain_bars()
    action = "pair" if options.command == "pairs" else options.action
    if action is None:
        options.data_parser.print_help()
    elif action == "check":
        from rlhf.curation.check import check

        return check(options, rest)
    elif action == "stats":
        from rlhf.curation.stats import stats

        stats(options, rest)
    elif action == "show":
        from rlhf.curation.show import show

        show(options, rest)
    elif action == "convert":
        from rlhf.curation.convert_command import convert

        convert(options, rest)
    elif action == "prepare":
        from rlhf.curation.prepare_ahead import prepare_recipes

        prepare_recipes(options, rest)
    elif action == "cache":
        from rlhf.curation.cache import show_cache

        show_cache(options)
    else:
        from rlhf.data.pairs import write_pair_files

        count = write_pair_files(options.dataset, options.output_dir, options.split, options.limit, options.format)
        print(f"{count} pairs -> {options.output_dir}/accepted_data.jsonl, rejected_data.jsonl, preference_data.jsonl")
    return None
