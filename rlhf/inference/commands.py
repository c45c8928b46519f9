"""Run `rlhf score`, `rlhf generate` or `rlhf label`."""

from __future__ import annotations

import argparse


def run_inference(options: argparse.Namespace) -> None:
    """Run one of COMMANDS."""
    from rlhf.console import plain_bars

    plain_bars()
    if options.command == "score":
        from rlhf.inference.score_command import score_command

        score_command(options)
    elif options.command == "generate":
        from rlhf.inference.generate_command import generate_command

        generate_command(options)
    else:
        from rlhf.inference.label_command import label_command

        label_command(options)
