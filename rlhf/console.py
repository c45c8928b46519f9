"""Progress of a run: a bar that fits the terminal, or plain lines in a log file."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any

from rlhf.distributed.processes import is_main

REPORT_EVERY_S = 20.0  # lines per bar in a log file
NEEDED = 3  # metrics shown at any width of 60 columns or more: loss, accuracy, tokens/s


def duration(seconds: float) -> str:
    """A duration for people: `0.4 s`, `23 s`, `4.2 min`, `3 h 12 min`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 0.95 else f"{seconds:.1f} s"
    if seconds < 3597:
        return f"{seconds / 60:.1f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min"


# Key in the trainer's logs: its name, and its name where space is short. Most important first.
METRICS = {
    "loss": ("loss", "loss"), "accuracy": ("pair acc", "acc"), "rewards/accuracies": ("pair acc", "acc"),
    "tokens_per_second": ("tokens/s", "tok/s"), "margin": ("margin", "margin"), "rewards/margins": ("margin", "margin"),
    "mean_token_accuracy": ("token acc", "tok acc"), "mfu": ("MFU", "MFU"),
}  # fmt: skip
TIE = 1e-6  # a mean margin below this is rounding


def metrics(logs: dict[str, Any]) -> list[tuple[str, str]]:
    """The trainer's metrics worth showing, most important first: (text, shorter text)."""
    order = list(METRICS)
    if not {"accuracy", "rewards/accuracies", "eval_accuracy", "eval_rewards/accuracies"} & set(logs):
        order.insert(1, order.pop(order.index("mean_token_accuracy")))  # SFT's only accuracy
    found = []
    for prefix, before in (("", ""), ("eval_", "held-out ")):
        for key in order:
            if prefix + key not in logs:
                continue
            value, (name, short) = float(logs[prefix + key]), METRICS[key]
            if key == "rewards/accuracies" and abs(float(logs.get(f"{prefix}rewards/margins", 1))) < TIE:
                found.append(
                    (f"{before}{name} ties", f"{before}{short} ties")
                )  # the policy still equals its reference: TRL reports 0
                continue
            if key == "tokens_per_second":
                rounded = f"{value / 1000:,.1f}k" if value >= 10_000 else f"{value:,.0f}"
                found.append((f"{before}{value:,.0f} {name}", f"{before}{rounded} {short}"))
            elif key == "mfu":
                found.append((f"{name} {value:.0%}", f"{short} {value:.0%}"))
            else:
                found.append((f"{before}{name} {value:.3f}", f"{before}{short} {value:.3f}"))
    return found


def log_line(title: str, step: int, total: int, logs: dict[str, Any], seconds_left: float | None) -> str:
    """One log of the trainer as a line of a file: time, step, metrics, learning rate, time left."""
    parts = [long for long, _ in metrics(logs)]
    if "learning_rate" in logs:
        parts.append(f"lr {float(logs['learning_rate']):.2e}")
    if seconds_left is not None:
        parts.append(f"ETA {duration(seconds_left)}")
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {title} {step}/{total}: {', '.join(parts)}"


def bar_line(width: int, title: str, step: int, total: int, left: str, parts: list[tuple[str, str]]) -> str:
    """A progress bar with metrics in `width` columns. If space is short: shorten names, then drop the less important
    metrics, then the bar, and last of all loss, accuracy, tokens/s and the time."""
    share, needed = min(step / max(total, 1), 1.0), min(len(parts), NEEDED)
    layouts = [
        (shown, short, least) for shown in range(len(parts), needed - 1, -1) for short, least in ((0, 8), (1, 4))
    ]
    layouts += [(shown, 1, 0) for shown in range(needed, -1, -1)]
    for shown, short, least in layouts:
        head = f"{title} {share:4.0%} |" if least else ""
        tail = ", ".join([f"{'| ' if least else ''}{step}/{total}  {left}", *(p[short] for p in parts[:shown])])
        room = min(width - len(head) - len(tail), 40)
        if room >= least:
            return f"{head}{_blocks(share, room) if least else ''}{tail}"
    return tail[:width]


def _blocks(share: float, room: int) -> str:
    full = "█" if "utf" in (getattr(sys.stderr, "encoding", "") or "").lower() else "#"
    return (full * round(share * room)).ljust(room)


def training_bar(title: str, total: int, first: int):
    """A bar for a run of `total` steps that starts after step `first`; set `parts` to what `metrics` returns."""
    from tqdm.auto import tqdm

    class TrainingBar(tqdm):
        parts: list[tuple[str, str]] = []

        def __str__(self) -> str:
            left = seconds_left(self.n - first, total - self.n, self.format_dict["elapsed"])
            time_text = "ETA ?" if left is None else f"ETA {duration(left)}"
            if self.n >= total:
                time_text = f"in {duration(self.format_dict['elapsed'])}"
            # one less: after the last column the cursor would be on a new line
            return bar_line(_columns() - 1, title, self.n, total, time_text, self.parts)

    return TrainingBar(total=total, initial=first)


def seconds_left(done: int, to_do: int, elapsed: float) -> float | None:
    """Time for the remaining steps at the average pace so far; None before the first one."""
    return elapsed / done * to_do if done > 0 else None


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):  # not a terminal, or not a real file
        return 80


def plain_bars() -> None:
    """Print bars as plain lines where stderr is no terminal: one every 20 s and one at the end.

    The bars of transformers, datasets, TRL and the hub's client are all tqdm's, so tqdm itself is patched: otherwise
    each bar would write one line of thousands of carriage returns into a log file.
    """
    from tqdm.std import tqdm

    if getattr(tqdm, "_plain_in_files", False):
        return
    display, close, clear, moveto = tqdm.display, tqdm.close, tqdm.clear, tqdm.moveto

    def report_now_and_then(bar, *args, **options):
        if bar.fp.isatty():
            return display(bar, *args, **options)
        now = time.monotonic()
        bar._reported_at = getattr(bar, "_reported_at", now)
        if now - bar._reported_at >= REPORT_EVERY_S:
            bar._reported_at = now
            _report(bar)
        return True

    def report_at_the_end(bar):
        if getattr(bar, "disable", True) or bar.fp.isatty():
            return close(bar)
        bar.disable = True
        bar._decr_instances(bar)
        if bar.n:
            _report(bar)

    def only_in_terminals(method):
        return lambda bar, *args, **options: method(bar, *args, **options) if bar.fp.isatty() else None

    tqdm.display, tqdm.close = report_now_and_then, report_at_the_end
    tqdm.clear, tqdm.moveto = only_in_terminals(clear), only_in_terminals(moveto)
    tqdm._plain_in_files = True


@contextlib.contextmanager
def ended_bars():
    """Close bars left open by an error or Ctrl-C, so that the next message starts on a new line."""
    try:
        yield
    finally:
        tqdm = sys.modules.get("tqdm.std")
        for bar in list(getattr(tqdm.tqdm, "_instances", [])) if tqdm else []:
            bar.close()


def _report(bar) -> None:
    if not is_main():
        return
    count = (lambda n: bar.format_sizeof(n, divisor=bar.unit_divisor)) if bar.unit_scale else (lambda n: f"{n:,}")
    of = f" of {count(bar.total)}" if bar.total else ""
    unit = "" if bar.unit.strip() == "it" else bar.unit.strip()
    unit = f" {unit}" if unit in ("", "B") or unit.endswith("s") else f" {unit}s"
    label = " ".join((bar.desc or "progress").split()).rstrip(": ")
    print(
        f"{label}: {count(bar.n)}{of}{unit.rstrip()}, {duration(bar.format_dict['elapsed'])}",
        file=sys.stderr,
        flush=True,
    )


def quiet_libraries(num_rows: int = 0) -> None:
    """Hide the bars of short steps, and deprecation warnings between TRL and transformers that users can't act on."""
    import logging as standard_logging
    import warnings

    import datasets
    from transformers.utils import logging

    plain_bars()
    logging.disable_progress_bar()
    if num_rows < 5000:
        datasets.disable_progress_bars()
    # deepspeed 0.19, which accelerate imports where it is installed, warns on every CPU that it found no GPU
    # accelerate of a model that is compared with its layers on disk, as it is meant to be
    standard_logging.getLogger("accelerate.big_modeling").addFilter(
        lambda record: "on the meta device because they were offloaded" not in record.msg
    )
    standard_logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.msg)
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")
