"""Chat: one-shot, over a pipe, its commands, and what it refuses."""

import io
import socket
import sys
from types import SimpleNamespace

import forked
import pytest
import torch
from test_terminal import Terminal

from rlhf.__main__ import main
from rlhf.errors import UserError
from rlhf.inference.chat import Chat, Speaker, clean
from rlhf.inference.finished import find
from rlhf.inference.terminal import LEAVE_HINT, Screen, columns


def chat(*words, typed=None):
    return forked.run("-m", "rlhf", "chat", *words, "--max_new_tokens", "5", typed=typed or "")


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


def options(model, compare=None, max_new_tokens=3):
    return SimpleNamespace(
        model=model,
        system=None,
        reward=None,
        load_in_4bit=False,
        compare=compare,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        top_p=1,
        best_of=1,
        seed=0,
    )


def test_several_turns_are_remembered_and_reset_forgets(tiny_llama):
    talk = Chat(options(tiny_llama))
    talk.say("One")
    talk.say("Two")
    assert [m["role"] for m in talk.speakers[0].messages] == ["user", "assistant", "user", "assistant"]
    assert talk.command("/reset") and talk.speakers[0].messages == []
    assert not talk.command("/quit")


def test_the_oldest_turn_makes_room(tiny_gpt2, capsys):
    speaker = Speaker(tiny_gpt2, options(tiny_gpt2, max_new_tokens=200))
    speaker.messages = before = [{"role": r, "content": "word " * 60} for r in ("user", "assistant")]
    turn = speaker.prepare("word " * 60, None)
    assert len(turn.ids) + 200 <= 512 and len(turn.messages) == 1 and speaker.messages is before
    assert "oldest turn was left out" in capsys.readouterr().err


def test_a_message_that_is_too_long_is_not_sent(tiny_llama, tiny_gpt2, capsys):
    """Neither to the model that has no room for it (512 positions), nor to the other (1,024)."""
    talk = Chat(options(tiny_llama, compare=tiny_gpt2))
    talk.say("Hello")
    before = [list(speaker.messages) for speaker in talk.speakers]
    capsys.readouterr()
    number = len(talk.speakers[1].tokenizer("word " * 230)["input_ids"])
    with pytest.raises(UserError, match=r"the message has [\d,]+ tokens, but tiny-gpt2 has only 512 positions") as told:
        talk.say("word " * 230)
    assert int(str(told.value).split()[3].replace(",", "")) >= max(number, 512)
    assert [speaker.messages for speaker in talk.speakers] == before and capsys.readouterr().out == ""


def test_after_a_long_message_over_a_pipe_comes_the_next(tiny_gpt2, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 1000 + "\nHello\n"))
    assert main(["chat", tiny_gpt2, "--max_new_tokens", "5"]) == 0
    shown = capsys.readouterr()
    assert "positions for message and answer: nothing was sent" in shown.err and shown.out.strip()


def test_an_answer_that_is_cut_off_is_marked(tiny_llama, tiny_gpt2, capsys):
    talk = Chat(options(tiny_llama))
    talk.say("Hello")
    assert "(cut off after 3 tokens; raise --max_new_tokens for more)" in capsys.readouterr().err
    talk = Chat(options(tiny_gpt2, max_new_tokens=400))
    few = talk.speakers[0].prepare("word " * 150, None)
    assert 0 < few.limit == 512 - len(few.ids) < 400
    ends = talk.speakers[0].tokenizer.eos_token_id
    ids = torch.tensor([[*few.ids, 5, ends]])
    talk.speakers[0].model.generate = lambda *a, **k: ids
    few.limit = 2
    talk.speakers[0].answer(few, Screen())
    assert "cut off" not in capsys.readouterr().err  # it has ended by itself, with its last token


def test_an_interrupt_stops_both_models_and_both_forget(tiny_llama, tiny_gpt2, capsys, monkeypatch):
    talk = Chat(options(tiny_llama, compare=tiny_gpt2))
    talk.say("Hello")
    before = [list(speaker.messages) for speaker in talk.speakers]
    asked = []

    def interrupt(number):
        def stop(*args, **kwargs):
            asked.append(number)
            raise KeyboardInterrupt

        return stop

    for number, speaker in reversed(list(enumerate(talk.speakers))):  # the second model's answer, then the first's
        monkeypatch.setattr(speaker.model, "generate", interrupt(number))
        talk.say("And this?")
        assert [speaker.messages for speaker in talk.speakers] == before
    assert asked == [1, 0]  # stopped in the first, the second is not asked
    assert capsys.readouterr().out.count("(stopped; this message is not kept)") == 2


# --- which model -----------------------------------------------------------------------------------------------------


def test_names_are_looked_for_here_first(tmp_path, monkeypatch):
    for name in ("runs/mine/dpo", "runs/mine/sft", "runs/alone"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find("sft", beside="runs/mine/dpo") == "runs/mine/sft" and find("alone") == "runs/alone"
    assert find("runs/mine/sft") == "runs/mine/sft" and find("someone/model") == "someone/model"
    for wrong in ("sft", "nosuch", "runs/nosuch", "a/b/c", "./a/b"):
        with pytest.raises(UserError, match="is neither a local folder nor a run in runs/"):
            find(wrong, beside="someone/model")


def test_a_wrong_name_asks_no_network(tiny_llama, monkeypatch, capsys):
    """A bare name is refused without a look; `org/name` costs one look-up of the hub's address, and no second try."""
    lookups = []

    def resolve(host, *rest):
        lookups.append(host)
        raise OSError("no such host")

    from huggingface_hub import constants

    talk = Chat(options(tiny_llama))
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert talk.command("/compare nosuch")
    assert "'nosuch' is neither a local folder nor a run" in capsys.readouterr().out and lookups == []
    assert talk.command("/compare nosuch/model")
    assert "'nosuch/model' is not a local folder and could not be loaded from the hub" in capsys.readouterr().out
    assert len(lookups) == 1 and len(talk.speakers) == 1


def test_a_model_can_not_drive_the_terminal():
    assert clean("a\x1b[2Jb\tc\nd\x9be\rf") == "a[2Jb\tc\ndef"


def test_sampling_follows_the_seed(tiny_llama):
    a, b, c = (chat(tiny_llama, "--prompt", "Hi", "--temperature", "1", "--seed", s).stdout for s in ("1", "1", "2"))
    assert a == b != c


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["./nowhere"], "'./nowhere' is neither a local folder nor a run"),
        (["."], "has no finished model"),
        (["embedded:gpt5"], "unknown embedded model 'embedded:gpt5'; the only one is embedded:smollm2-135m-instruct"),
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
    assert "is a reward model, which scores and can't generate" in capsys.readouterr().err
    assert main(["chat", tiny_llama, "--reward", tiny_llama, "--prompt", "x"]) == 2
    assert "is not a reward model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_conversation_in_a_terminal(tiny_llama, tiny_gpt2):
    terminal = Terminal("-m", "rlhf", "chat", tiny_llama, "--max_new_tokens", "900")
    terminal.wait_for("> ")
    terminal.type(f"/compare {tiny_gpt2}\r")
    terminal.wait_for("> ", 2)
    terminal.type("\x1b[200~two\rlines\x1b[201~\r")
    terminal.wait_for("[tiny-llama] ")
    terminal.type("\x03")
    terminal.wait_for("(stopped; this message is not kept)")
    terminal.wait_for("> ", 1 + terminal.shown.count("> ", 0, terminal.shown.index("(stopped")))
    assert "[tiny-gpt2]" not in terminal.shown
    terminal.type("half a li")
    terminal.wait_for("half a li")
    terminal.interrupt_until(LEAVE_HINT)
    terminal.type("/quit\r")
    terminal.close()
    answer = terminal.shown.split("[tiny-llama]")[1].split("(stopped")[0]
    assert all(columns(line) <= 80 for line in answer.split("\r\n") if " " in line)
