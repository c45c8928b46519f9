"""The command that repeats a run, ready to be pasted into a shell, whichever way the run was started."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.config.recipe import Recipe
from rlhf.distributed.processes import world_size

CALL = "rlhf.train("  # how the command of a run begins that Python code started
LAUNCH_FILE = "LAUNCH_FILE.yaml"  # placeholder for a file whose name is unknown
TOKEN = re.compile(r"--(?:hub_|push_to_hub_)?token(=.*)?")


def command_of(recipe: Recipe) -> list[str]:
    """`rlhf STAGE RECIPE --key value ...`, whether `rlhf`, `python -m rlhf`, a launcher started it; or the call of `train`."""
    if recipe.call:
        return [recipe.call]
    if sys.argv[1:2] == [recipe.stage]:
        return ["rlhf", *_without_tokens(sys.argv[1:])]
    given = [key for key, line in recipe.lines.items() if line is None]  # on the command line, not in the file
    flags = [word for key in given for word in (f"--{key}", str(recipe.values[key]))]
    return ["rlhf", recipe.stage, recipe.path, *_without_tokens(flags)]


def _without_tokens(words: list[str]) -> list[str]:
    """Keep credentials out of files: `--hub_token X` becomes `--hub_token ...`."""
    kept = []
    for word, before in zip(words, ["", *words], strict=False):
        match = TOKEN.fullmatch(word)
        if match and match[1]:
            kept.append(word[: match.start(1)] + "=...")
        else:
            kept.append("..." if TOKEN.fullmatch(before) and "=" not in before else word)
    return kept


def launcher_of(command_lines: Iterator[list[str]] | None = None) -> dict[str, Any] | None:
    """The `accelerate launch` or `torchrun` command that started this process; None if neither did.

    Args:
        command_lines: of the ancestors of this process, nearest first; default: read from /proc.

    Returns:
        {"command": words up to `-m`, "complete": whether they were read from the launcher itself}
    """
    for words in parents() if command_lines is None else command_lines:
        found = launcher_words(words)
        if found:
            return {"command": found, "complete": True}
    world = world_size()
    if world == 1 and "true" not in (os.environ.get(f"ACCELERATE_USE_{engine}") for engine in ("DEEPSPEED", "FSDP")):
        return None
    guess = ["accelerate", "launch", "--config_file", LAUNCH_FILE, "--num_processes", str(world)]
    return {"command": guess, "complete": False}


def launcher_words(words: list[str]) -> list[str]:
    """The launcher's part of a command line, without interpreter and folders; [] if it does not launch rlhf.

    Example: ["/x/python", "-m", "accelerate.commands.launch", "--num_processes", "2", "-m", "rlhf", "sft", "sft.yaml"]
        -> ["accelerate", "launch", "--num_processes", "2"].
    """
    ours = [i for i in range(len(words) - 1) if words[i] in ("-m", "--module") and words[i + 1] == "rlhf"]
    if not ours:
        return []
    before = words[: ours[0]]
    names = [Path(word).name for word in before]
    for i, name in enumerate(names):
        if name == "accelerate" and names[i + 1 : i + 2] == ["launch"]:
            return ["accelerate", "launch", *before[i + 2 :]]
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return ["accelerate", "launch", *before[i + 1 :]]
        if name in ("torchrun", "torch.distributed.run"):
            return ["torchrun", *before[i + 1 :]]
    return []


def parents(most: int = 6) -> Iterator[list[str]]:
    """The command lines of the ancestors of this process, nearest first; none if there is no /proc."""
    number = os.getppid()
    for _ in range(most):
        try:
            words = Path(f"/proc/{number}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            # after the name in brackets, which may contain anything, come the state and the parent's process id
            number = int(Path(f"/proc/{number}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return
        yield words
        if number <= 1:
            return


def shell_line(provenance: dict[str, Any]) -> str:
    """The shell-quoted line that repeats a run, from the content of its provenance.json."""
    words = list(provenance.get("command") or ["rlhf"])
    if Path(words[0]).name == "__main__.py":  # recorded by an older version
        words[0] = "rlhf"
    if words[0].startswith(CALL):  # a line of Python, not of a shell
        return words[0]
    launcher = (provenance.get("launcher") or {}).get("command")
    return shlex.join([*launcher, "-m", *words] if launcher else words)


def is_complete(provenance: dict[str, Any]) -> bool:
    """Whether `shell_line` is complete; False if a launcher started the run and its own flags could not be read."""
    launcher = provenance.get("launcher")
    if "launcher" not in provenance:  # an older version did not record it
        return int((provenance.get("hardware") or {}).get("processes") or 1) == 1
    return launcher is None or bool(launcher["complete"])
