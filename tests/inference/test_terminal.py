"""The terminal's side of a chat, in a real pseudo-terminal: pastes, blocks, Ctrl-C, the end of the input, and wrapping."""

import os
import pty
import select
import signal
import subprocess
import sys

import pytest

from rlhf.inference.terminal import LEAVE_HINT, Screen, columns

CHILD = """\
from rlhf.inference.terminal import Reader, converse
def say(text):
    print("SAID", repr(text), flush=True)
    if text == "wait":
        import time
        while True:  # a signal just before one long sleep would be heard after it
            time.sleep(0.01)
converse(Reader(True, {bracketed}), say, lambda line: print("COMMAND", line) or line != "/quit")
print("LEFT", flush=True)
"""


class Terminal:
    """A child in a pseudo-terminal, and what it has printed."""

    def __init__(self, *command):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # these tests may be the background job of a shell, which ignores it
            os.environ.update(TERM="xterm-256color", COLUMNS="80", LINES="24", INPUTRC="/dev/null")
            os.execv(sys.executable, [sys.executable, *command])
        self.shown = ""

    def wait_for(self, text, times=1, seconds=100):
        """All that it has printed by when `text` is there so often."""
        return self.read_until(lambda: self.shown.count(text) >= times, text, seconds)

    def wait_for_prompt(self, prompt="> "):
        """Until it asks for the next message: a Ctrl-C before that interrupts what comes before it."""
        return self.read_until(lambda: self.shown.endswith(prompt), prompt)

    def read_until(self, done, text, seconds=100):
        while not done():
            assert select.select([self.fd], [], [], seconds)[0], f"no {text!r} in {self.shown!r}"
            try:
                data = os.read(self.fd, 4096)
            except OSError:  # Linux: the child has gone
                data = b""
            assert data, f"the end, and no {text!r} in {self.shown!r}"
            self.shown += data.decode(errors="replace")
        return self.shown

    def type(self, text):
        os.write(self.fd, text.encode())

    def interrupt_until(self, text):
        """Ctrl-C, and again as a person would: CPython's readline misses one that comes while it handles a key, until the next."""
        while text not in self.shown:
            self.type("\x03")
            while text not in self.shown and select.select([self.fd], [], [], 5)[0]:
                self.shown += os.read(self.fd, 4096).decode(errors="replace")

    def close(self):
        os.close(self.fd)
        os.waitpid(self.pid, 0)


@pytest.fixture
def terminal(request):
    """A conversation with something that says what it was told. Parameter: the terminal marks pastes."""
    found = Terminal("-c", CHILD.format(bracketed=getattr(request, "param", None)))
    found.wait_for("> ")
    yield found
    found.close()


def test_a_paste_of_several_lines_is_one_message(terminal):
    terminal.type("\x1b[200~def f(x):\r\treturn x\r\r# 'end'\x1b[201~\r")
    terminal.wait_for("SAID \"def f(x):\\n\\treturn x\\n\\n# 'end'\"")
    assert "\x1b[?2004h" in terminal.shown  # the terminal was asked to mark pastes


@pytest.mark.parametrize("terminal", [False], indirect=True)
def test_a_paste_that_is_not_marked_is_one_message(terminal):
    terminal.type("one\rtwo\rthree\r")
    terminal.wait_for("SAID 'one\\ntwo\\nthree'")
    assert terminal.shown.count("SAID") == 1


def test_typed_lines_and_blocks(terminal):
    terminal.type("one\r")
    terminal.wait_for("SAID 'one'")
    terminal.type('"""first\r')
    terminal.wait_for("... ")
    terminal.type('  second\r/third"""\r')
    terminal.wait_for("SAID 'first\\n  second\\n/third'")
    terminal.type('"""all of it"""\r\x1b[200~/home/me\r/home/you\x1b[201~\r/system x\r')
    terminal.wait_for("COMMAND /system x")
    assert "SAID 'all of it'" in terminal.shown and "SAID '/home/me\\n/home/you'" in terminal.shown


def test_interrupts_clear_the_line_and_the_second_leaves(terminal):
    terminal.type("half a li")
    terminal.wait_for("half a li")
    terminal.type("\x03")
    terminal.wait_for(LEAVE_HINT)
    terminal.type("whole\r")
    terminal.wait_for("SAID 'whole'")
    assert "SAID 'half" not in terminal.shown
    terminal.type('"""\r')
    terminal.wait_for("... ")
    terminal.type("part of a block\r")
    terminal.wait_for("... ", 2)
    terminal.wait_for_prompt("... ")
    terminal.type("\x03")
    terminal.wait_for(LEAVE_HINT, 2)
    terminal.type("more\r")
    terminal.wait_for("SAID 'more'")
    terminal.wait_for_prompt()
    terminal.type("\x03")
    terminal.wait_for(LEAVE_HINT, 3)
    terminal.wait_for_prompt()  # where it listens for the second
    assert "LEFT" not in terminal.shown
    terminal.type("\x03")
    terminal.wait_for("LEFT\r\n")


def test_an_interrupted_answer_keeps_the_chat(terminal):
    terminal.type("wait\r")
    terminal.wait_for("SAID 'wait'")
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.type("still here\r")
    terminal.wait_for("SAID 'still here'")
    assert "LEFT" not in terminal.shown


def test_the_end_of_the_input_ends_the_line(terminal):
    terminal.type("\x04")
    assert "\n" in terminal.wait_for("LEFT\r\n").rpartition("> ")[2].partition("LEFT")[0]


def test_blocks_over_a_pipe():
    command = [sys.executable, "-c", CHILD.format(bracketed=None).replace("Reader(True", "Reader(False")]
    done = subprocess.run(command, input='a\nb\n"""\nc\n\nd\n"""\n"""e\nf', capture_output=True, text=True)
    assert done.stdout.splitlines() == ["SAID 'a'", "SAID 'b'", "SAID 'c\\n\\nd'", "SAID 'e\\nf'", "LEFT"]


# --- answers ----------------------------------------------------------------------------------------------------------


def shown(capsys, width, *pieces):
    screen = Screen(width)
    for piece in pieces:
        screen.write(piece)
    screen.end()
    return capsys.readouterr().out


def test_words_are_not_broken(capsys):
    text = "All you need is love, and a bit of  patience.\n    indented code\n\n漢字漢字漢字漢字漢字漢字 end"
    lines = shown(capsys, 20, *(text[i : i + 3] for i in range(0, len(text), 3))).split("\n")
    assert lines == ["All you need is", "love, and a bit of", "patience.", "    indented code", "", "漢字漢字漢字漢字漢字",
                     "漢字 end", ""]  # fmt: skip
    assert max(map(columns, lines)) <= 20


def test_a_word_longer_than_the_line_is_left_to_the_terminal(capsys):
    assert shown(capsys, 10, "see " + "x" * 25 + " there") == "see\n" + "x" * 25 + "\nthere\n"


def test_without_a_terminal_nothing_is_wrapped(capsys):
    text = "word " * 100 + "\n  last "
    assert shown(capsys, None, text).rstrip() == text.rstrip()
