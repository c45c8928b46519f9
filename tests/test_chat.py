"""Chat: one-shot, over a pipe, its commands, and what it refuses."""

import subprocess
import sys

import pytest

from rlhf.__main__ import main
from rlhf.chat import clean


def chat(*words, typed=None):
    command = [sys.executable, "-m", "rlhf", "chat", *words, "--max_new_tokens", "5"]
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=120)


def test_one_prompt_one_answer(tiny_llama):
    done = chat(tiny_llama, "--prompt", "Hello")
    assert done.returncode == 0 and done.stdout.strip() and "> " not in done.stdout
    assert chat(tiny_llama, "--prompt", "Hello").stdout == done.stdout  # greedy: the same again


def test_a_conversation_over_a_pipe(tiny_llama, tiny_gpt2):
    typed = f"Hello\n/compare {tiny_gpt2}\nAnd you?\n/compare\n/system Be brief.\n/reset\n/help\n/quit\nnever read\n"
    lines = chat(tiny_llama, typed=typed).stdout.splitlines()
    assert f"({tiny_gpt2} answers too)" in lines
    assert sum(line.startswith("[tiny-llama] ") for line in lines) == 1
    assert sum(line.startswith("[tiny-gpt2] ") for line in lines) == 1
    assert "(one model answers)" in lines and "(system message: Be brief.)" in lines and "(a new conversation)" in lines
    assert any(line.startswith("/compare MODEL") for line in lines)


def test_several_turns_are_remembered_and_reset_forgets(tiny_llama, monkeypatch):
    from types import SimpleNamespace

    from rlhf.chat import Chat

    options = SimpleNamespace(
        model=tiny_llama, system=None, reward=None, compare=None, max_new_tokens=3, temperature=0.0, top_p=1
    )
    talk = Chat(options)
    talk.say("One")
    talk.say("Two")
    assert [m["role"] for m in talk.speakers[0].messages] == ["user", "assistant", "user", "assistant"]
    assert talk.command("/reset") and talk.speakers[0].messages == []
    assert not talk.command("/quit")


def test_the_oldest_turn_makes_room(tiny_gpt2, capsys):
    from types import SimpleNamespace

    from rlhf.chat import Speaker
    from rlhf.config import UserError

    speaker = Speaker(tiny_gpt2, SimpleNamespace(max_new_tokens=200, temperature=0.0, top_p=1))
    speaker.messages = [{"role": r, "content": "word " * 60} for r in ("user", "assistant", "user")]
    ids = speaker._prompt_ids(None)
    assert len(ids) + 200 <= 512 and len(speaker.messages) == 1
    assert "oldest turn was left out" in capsys.readouterr().err
    speaker.messages = [{"role": "user", "content": "word " * 500}]
    with pytest.raises(UserError, match="more than the 512 positions"):
        speaker._prompt_ids(None)


def test_a_model_can_not_drive_the_terminal():
    assert clean("a\x1b[2Jb\tc\nd\x9be\rf") == "a[2Jb\tc\ndef"


def test_sampling_follows_the_seed(tiny_llama):
    a, b, c = (chat(tiny_llama, "--prompt", "Hi", "--temperature", "1", "--seed", s).stdout for s in ("1", "1", "2"))
    assert a == b != c


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["./nowhere"], "'./nowhere' is no local folder"),
        (["."], "holds no finished model"),
        (["embedded:gpt5"], "unknown embedded model 'embedded:gpt5'; there is one: embedded:smollm2-135m-instruct"),
    ],
)
def test_wrong_models(words, sentence, capsys):
    assert main(["chat", *words, "--prompt", "x"]) == 2
    assert sentence in capsys.readouterr().err


def test_reward_models_and_policies_are_not_mixed_up(tiny_llama, tiny_distilbert, recipe, few_pairs, tmp_path, capsys):
    out = str(tmp_path / "reward")
    assert (
        main(["reward", recipe("reward", model_name_or_path=tiny_distilbert, dataset_name=few_pairs, output_dir=out)])
        == 0
    )
    assert main(["chat", out, "--prompt", "x"]) == 2
    assert "is a reward model: it scores and can't talk" in capsys.readouterr().err
    assert main(["chat", tiny_llama, "--reward", tiny_llama, "--prompt", "x"]) == 2
    assert "is not a reward model" in capsys.readouterr().err
