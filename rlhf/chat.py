"""Talk to a model in the terminal or over a pipe, with a second model and a reward model beside it if wanted."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rlhf.config import UserError

HELP = """\
/reset           forget the conversation
/system TEXT     set the system message (and forget the conversation); /system alone removes it
/compare MODEL   let a second model answer too; /compare alone stops that
/quit            leave (also Ctrl-D)"""

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Speaker:
    """A model that answers, with its own side of the conversation."""

    def __init__(self, name: str, options):
        self.name = name
        self.options = options
        self.model, self.tokenizer = _load(name, reward=False)
        self.messages: list[dict[str, str]] = []

    def answer(self, text: str, system: str | None, stream: bool = True) -> str:
        """Answer a user's message, printing the words as they come; a stopped answer (Ctrl-C) is forgotten."""
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self._generate(system, stream)
        except KeyboardInterrupt:
            self.messages.pop()
            print("\n(stopped)", flush=True)
            return ""
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def _generate(self, system: str | None, stream: bool) -> str:
        import torch

        ids = self._prompt_ids(system)
        options = self.options
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if options.temperature > 0:
            sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        input_ids = torch.tensor([ids], device=self.model.device)
        with torch.no_grad():
            out = self.model.generate(
                input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=options.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.tokenizer.eos_token_id,
                streamer=_streamer(self.tokenizer) if stream else None, **sampling,
            )  # fmt: skip
        return clean(self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)).strip()

    def _prompt_ids(self, system: str | None) -> list[int]:
        """The conversation as token ids; the oldest turns are left out, with a word, where the model has no room."""
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        head = [{"role": "system", "content": system}] if system else []
        while True:
            messages = head + self.messages
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            if not room or len(ids) + self.options.max_new_tokens <= room:
                return ids
            if len(self.messages) < 3:
                raise UserError(
                    f"the message has {len(ids)} tokens; with --max_new_tokens {self.options.max_new_tokens} that is more "
                    f"than the {room} positions of {self.name}: shorten it or ask for fewer new tokens"
                )
            del self.messages[:2]
            print("(the oldest turn was left out: the model has no room for more)", file=sys.stderr)


def clean(text: str) -> str:
    """Text without control characters: what a model writes must not drive the terminal."""
    return CONTROL_CHARACTERS.sub("", text)


def _streamer(tokenizer):
    from transformers import TextStreamer

    class Words(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False):
            print(clean(text), end="\n" if stream_end else "", flush=True)

    return Words(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _load(name: str, reward: bool):
    import torch

    from rlhf.models import is_reward_model, load_finished, locate
    from rlhf.progress import quiet_libraries

    quiet_libraries()
    path = locate(name, "chat", say=lambda text: print(text, file=sys.stderr))
    if is_reward_model(path) != reward:
        if reward:
            raise UserError(
                f"{name} is not a reward model; give the output of `rlhf reward`, such as runs/quickstart/reward"
            )
        raise UserError(
            f"{name} is a reward model: it scores and can't talk; chat with a policy and add --reward {name}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_finished(path, reward=reward, device=device, dtype=None if device == "cuda" else "float32")
    return model, tokenizer


class Chat:
    """The conversation: speakers, judge and the commands."""

    def __init__(self, options):
        self.options = options
        self.system = options.system
        self.speakers = [Speaker(options.model, options)]
        self.judge = _load(options.reward, reward=True) if options.reward else None
        if options.compare:
            self.speakers.append(Speaker(options.compare, options))

    def say(self, text: str) -> None:
        """Let every speaker answer, named if there are several, scored if there is a judge."""
        for speaker in self.speakers:
            if len(self.speakers) > 1:
                print(f"[{Path(speaker.name).name}] ", end="", flush=True)
            answer = speaker.answer(text, self.system)
            if self.judge and answer:
                from rlhf.evaluate import score

                system = [{"role": "system", "content": self.system}] if self.system else []
                print(f"    reward {score(*self.judge, system + speaker.messages[:-1], answer):+.2f}", flush=True)

    def command(self, line: str) -> bool:
        """Obey a /command; False ends the chat."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word in ("/quit", "/exit"):
            return False
        if word in ("/reset", "/system"):
            for speaker in self.speakers:
                speaker.messages.clear()
            if word == "/system":
                self.system = rest or None
            print(
                "(a new conversation)" if word == "/reset" else f"(system message: {self.system or 'the model’s own'})"
            )
        elif word == "/compare":
            try:
                self.speakers[1:] = [Speaker(rest, self.options)] if rest else []
                if rest:  # both know what was said so far
                    self.speakers[1].messages = list(self.speakers[0].messages)
                print(f"({rest} answers too)" if rest else "(one model answers)")
            except UserError as error:
                print(f"({error})")
        else:
            print(HELP)
        return True


def chat(options) -> None:
    """Run `rlhf chat`: one answer with --prompt, else a conversation until /quit or the end of the input."""
    if options.max_new_tokens < 1 or options.temperature < 0:
        raise UserError("--max_new_tokens must be 1 or more and --temperature 0 or more")
    talk = Chat(options)
    from transformers import set_seed

    set_seed(options.seed)
    if options.prompt is not None:
        talk.say(options.prompt)
        return
    typed = sys.stdin.isatty()
    if typed:
        import readline  # noqa: F401  line editing and history in input()

        print(f"Talking to {options.model}. /help shows the commands, /quit leaves.")
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            return
        if line.startswith("/"):
            if not talk.command(line):
                return
        elif line:
            talk.say(line)
