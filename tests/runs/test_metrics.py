"""What a run shows of itself: a bar that fits a terminal of any width, lines in a log file, times as people say them."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from rlhf.__main__ import main
from rlhf.console import bar_line, duration, log_line, metrics, plain_bars, training_bar
from rlhf.errors import UserError

DPO_LOGS = {
    "loss": 0.2763, "rewards/accuracies": 0.7619, "rewards/margins": 1.234, "mean_token_accuracy": 0.71, "mfu": 0.41,
    "tokens_per_second": 123456.7, "learning_rate": 5e-4, "grad_norm": 1.0,
}  # fmt: skip
LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (SFT|DPO) (\d+)/3: loss [\d.]+, (pair|token) acc (?:[\d.]+|ties), [\d,]+ tokens/s, .*"
    r"lr \d\.\d\de-\d\d, ETA [\d.]+ s"
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (0.42, "0.4 s"), (23.4, "23 s"), (59.4, "59 s"), (59.6, "1.0 min"), (252, "4.2 min"),
     (3596, "59.9 min"), (3599, "1 h 0 min"), (11520, "3 h 12 min"), (360000, "100 h 0 min")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_what_matters_comes_first():
    assert [long for long, _ in metrics(DPO_LOGS)] == [
        "loss 0.276", "pair acc 0.762", "123,457 tokens/s", "margin 1.234", "token acc 0.710", "MFU 41%",
    ]  # fmt: skip
    assert metrics({"mean_token_accuracy": "0.5", "tokens_per_second": 9.6, "loss": 1.0}) == [
        ("loss 1.000", "loss 1.000"), ("token acc 0.500", "tok acc 0.500"), ("10 tokens/s", "10 tok/s"),
    ]  # fmt: skip
    assert metrics({"train_runtime": 3.0, "train_loss": 0.5}) == []
    assert [long for long, _ in metrics({"eval_loss": 0.5, "eval_accuracy": 1})] == ["held-out loss 0.500", "held-out pair acc 1.000"]  # fmt: skip


@pytest.mark.parametrize("title", ["SFT", "Reward model"])
def test_a_bar_fits_any_width(title):
    for width in range(10, 250):
        line = bar_line(width, title, 1234, 5678, "ETA 3 h 12 min", metrics(DPO_LOGS))
        assert len(line) <= width
        assert "1234/5678  ETA 3 h 12 min" in line or width < 25
        if width >= 79:
            assert "loss 0.276, " in line and "acc 0.762, " in line and re.search("123.5k tok/s|123,457 tokens/s", line)
        if width >= 180:
            assert "█" in line or "#" in line
            assert all(long in line for long, _ in metrics(DPO_LOGS))


def test_a_bar_before_the_first_log():
    assert bar_line(79, "DPO", 0, 3, "ETA ?", []) == f"DPO   0% |{' ' * 40}| 0/3  ETA ?"


def test_a_line_of_a_log_file():
    line = log_line("DPO", 2, 6, DPO_LOGS, 100.0)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d DPO 2/6: loss 0.276, pair acc 0.762, 123,457 tokens/s, margin 1.234, "
        r"token acc 0.710, MFU 41%, lr 5.00e-04, ETA 1.7 min",
        line,
    )


def test_bars_of_other_libraries_are_lines_in_files(monkeypatch):
    import datasets
    from datasets.utils import tqdm as of_datasets
    from tqdm.auto import tqdm

    plain_bars()
    datasets.enable_progress_bars()  # a run of few rows switches them off
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr("rlhf.console.REPORT_EVERY_S", 0.0)
    with tqdm(total=3, desc="Loading weights", mininterval=0, miniters=1) as bar:
        for _ in range(3):
            bar.update()
    monkeypatch.setattr("rlhf.console.REPORT_EVERY_S", 1e9)
    list(of_datasets(range(2000), desc="Tokenizing train dataset", unit=" examples", disable=False))
    list(tqdm([], desc="nothing"))
    lines = [line.rpartition(",")[0] for line in file.getvalue().splitlines()]
    assert lines[-2:] == ["Loading weights: 3 of 3", "Tokenizing train dataset: 2,000 of 2,000 examples"]
    assert lines[:2] == ["Loading weights: 0 of 3", "Loading weights: 1 of 3"] and "\r" not in file.getvalue()


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def training(recipe, tiny_llama, few_pairs, tmp_path):
    """The words that train a tiny model for 3 steps."""

    def words(stage, **values):
        file = recipe(
            stage, model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / f"out-{stage}"),
            eval_dataset_name=few_pairs, eval_strategy="steps", eval_steps=3, global_batch_size=4, **values,
        )  # fmt: skip
        kept = [line for line in Path(file).read_text().splitlines() if not line.startswith("per_device")]
        Path(file).write_text("\n".join(kept))
        return [stage, file]

    return words


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_log_file_has_a_line_for_each_log(training, stage, monkeypatch):
    file = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        assert main(training(stage)) == 0
    text = file.getvalue()
    lines = [line for line in text.splitlines() if "/3: loss " in line]
    assert "\r" not in text and "it/s" not in text and "%|" not in text, text
    assert [LINE.fullmatch(line)[2] for line in lines] == ["1", "2", "3"], text
    assert sum("/3: held-out loss " in line for line in text.splitlines()) == 1, text


class Pty(threading.Thread):
    """A terminal of so many columns, and all that is written to it."""

    def __init__(self, columns):
        super().__init__(daemon=True)
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.file = os.fdopen(theirs, "w", encoding="utf-8")
        self.data = b""
        self.start()

    def run(self):
        while True:
            try:
                data = os.read(self.ours, 65536)
            except OSError:  # Linux: the other end is closed
                return
            self.data += data

    def text(self):
        self.file.close()
        self.join()
        os.close(self.ours)
        return self.data.decode()


@pytest.mark.parametrize("columns", [80, 120])
def test_a_bar_in_a_terminal_fits_and_keeps_its_metrics(training, columns, monkeypatch):
    terminal = Pty(columns)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal.file)
        assert main(training("dpo")) == 0
    text = terminal.text()
    drawn = [part.rstrip() for line in text.split("\n") for part in line.split("\r") if "/3  " in part]
    assert max(map(len, drawn)) < columns, drawn
    told = [line for line in drawn if "loss" in line]
    assert told and all(
        re.search(r"loss \d\.\d{3}, (pair )?acc (\d\.\d{3}|ties), [\d,.k]+ tok", line) for line in told
    ), drawn
    finished = [line.split("\r")[-1] for line in text.split("\r\n") if "3/3  in " in line]
    assert len(finished) == 1 and "loss 0." in finished[0] and "acc" in finished[0], text


def test_an_error_has_a_line_of_its_own(monkeypatch):
    """A bar is open when training ends with an error."""
    terminal = Pty(80)
    bars = []

    def run(options, rest):
        bars.append(training_bar("DPO", 3, 0))
        raise UserError("the loss is not a finite number")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal.file)
        patch.setattr("rlhf.__main__.run", run)
        assert main(["dpo", "x.yaml"]) == 2
    assert terminal.text().endswith("\r\nrlhf: the loss is not a finite number\r\n")


@pytest.mark.slow
def test_a_log_file_of_a_run_of_its_own(training, tmp_path):
    """Everything that any library writes, from the first import on."""
    with open(tmp_path / "log", "w") as log:
        done = subprocess.run([sys.executable, "-m", "rlhf", *training("dpo")], stdout=log, stderr=log)
    text = (tmp_path / "log").read_bytes().decode()
    assert done.returncode == 0 and "\r" not in text, text
    assert [LINE.fullmatch(line)[2] for line in text.splitlines() if "/3: loss " in line] == ["1", "2", "3"], text
    assert sum(line.startswith("Reference: 12 of 12 pairs, ") for line in text.splitlines()) == 1, text


def test_a_pair_accuracy_of_ties_is_not_shown():
    """Before its first update DPO's policy is its reference: all margins are 0, and TRL counts each as a loss."""
    ties = {"loss": 0.6931, "rewards/accuracies": 0.0, "rewards/margins": 1e-8}
    assert "pair acc ties" in str(metrics(ties)) and "pair acc 0.250" in str(
        metrics(ties | {"rewards/accuracies": 0.25, "rewards/margins": -0.1})
    )
