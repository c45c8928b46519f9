"""Talk to a model in the terminal or over a pipe, with a second model and a reward model beside it if wanted."""

from __future__ import annotations

import os
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.sources import use_cache_without_network
from rlhf.errors import UserError, quote
from rlhf.inference.terminal import Reader, Screen, converse, note

HELP = '''\
/reset           forget the conversation
/system TEXT     set the system message (and forget the conversation); /system alone removes it
/compare MODEL   let a second model answer too (a folder, a run beside this one, or org/name); /compare alone stops that
/quit            leave (also Ctrl-D, or Ctrl-C twice)
What you paste is one message, however many lines it has. To type several lines, put """ before the first and after the
last. Ctrl-C stops an answer, or clears the line.'''

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class Turn:
    """What a model is about to be asked.

    Attributes:
        messages: the conversation with the new message, without turns for which there is no room.
        ids: the same as token ids.
        limit: tokens that the answer may have.
    """

    messages: list[dict[str, str]]
    ids: list[int]
    limit: int


class Speaker:
    """A model that answers, with its own side of the conversation."""

    def __init__(self, name: str, options, beside: str = ""):
        self.options = options
        self.name, self.model, self.tokenizer = _load(name, reward=False, beside=beside)
        self.messages: list[dict[str, str]] = []

    def prepare(self, text: str, system: str | None) -> Turn:
        """The conversation with a new message; the oldest turns are left out, with a note, where the model has no room.

        Raises:
            UserError: the message alone has as many tokens as the model has positions, or more.
        """
        config = self.model.config.get_text_config()
        room = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        head = [{"role": "system", "content": system}] if system else []
        messages = [*self.messages, {"role": "user", "content": text}]
        wanted = self.options.max_new_tokens
        dropped = 0
        while True:
            ids = self.tokenizer.apply_chat_template(head + messages, add_generation_prompt=True, return_dict=True)
            ids = ids["input_ids"]
            if not room or len(ids) + wanted <= room or len(messages) < 3:
                break
            del messages[:2]
            dropped += 1
        if room and len(ids) >= room:
            raise UserError(
                f"the message has {len(ids):,} tokens, and {Path(self.name).name} has {room:,} positions for it and its "
                "answer: nothing was sent; shorten it"
            )
        if dropped:
            oldest = "the oldest turn was" if dropped == 1 else f"the {dropped} oldest turns were"
            note(f"{oldest} left out: the model has no room for more")
        return Turn(messages, ids, min(wanted, room - len(ids)) if room else wanted)

    def answer(self, turn: Turn, screen: Screen) -> str:
        """Print the answer word by word as it comes, and what there is to say about it; return it."""
        import torch

        options = self.options
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if options.temperature > 0:
            sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        input_ids = torch.tensor([turn.ids], device=self.model.device)
        with torch.no_grad():
            out = self.model.generate(
                input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=turn.limit,
                pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.tokenizer.eos_token_id,
                streamer=_streamer(self.tokenizer, screen), **sampling,
            )  # fmt: skip
        new = out[0, len(turn.ids) :].tolist()
        answer = clean(self.tokenizer.decode(new, skip_special_tokens=True)).strip()
        if len(new) >= turn.limit and new[-1] != self.tokenizer.eos_token_id:
            all_positions = turn.limit < options.max_new_tokens
            more = "the model has no more positions" if all_positions else "--max_new_tokens allows more"
            note(f"cut off after {turn.limit} tokens; {more}")
        elif not answer:
            note("an empty answer: the model ended it at once")
        return answer


def clean(text: str) -> str:
    """Text without control characters: what a model writes must not drive the terminal."""
    return CONTROL_CHARACTERS.sub("", text)


def _streamer(tokenizer, screen: Screen):
    from transformers import TextStreamer

    class Words(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False):
            screen.write(clean(text))
            if stream_end:
                screen.end()

    return Words(tokenizer, skip_prompt=True, skip_special_tokens=True)


def find(name: str, beside: str = "") -> str:
    """Which model is meant by a name, without a look at the network.

    Args:
        name: `embedded:…`, a folder, the name of a run in `runs` or next to `beside`, or `org/name` on the hub.
        beside: the folder of the model that is talked to.

    Raises:
        UserError: it is none of these.
    """
    path = Path(name).expanduser()
    if name.startswith("embedded:") or path.is_dir():
        return name
    places = [Path(beside).parent] if beside and Path(beside).is_dir() else []
    for place in [*places, Path("runs")]:
        if any((place / name / file).is_file() for file in ("config.json", "adapter_config.json")):
            return str(place / name)
    if HUB_ID.fullmatch(name) and not path.parent.is_dir():
        return name
    raise UserError(
        f"chat: {quote(name)} is no local folder, and no run in runs/; give a stage's output, such as "
        "runs/quickstart/dpo, or a model on the hub by its whole name, such as org/name"
    )


def look_for_network(seconds: float = 1.5) -> None:
    """Where the hub's name can't be resolved in time, let its client look into its cache only: it would try again for 20 s."""
    lookup = threading.Thread(target=use_cache_without_network, daemon=True)  # a resolver may take long to give up
    lookup.start()
    lookup.join(seconds)
    if lookup.is_alive() or os.environ.get("HF_HUB_OFFLINE") == "1":
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True  # it has read the variable when it was imported


def _load(name: str, reward: bool, beside: str = ""):
    name = find(name, beside)  # before torch is imported, which takes seconds
    import torch

    from rlhf.console import quiet_libraries
    from rlhf.models.finished import load_finished
    from rlhf.models.folder import is_reward_model, locate

    quiet_libraries()
    if not name.startswith("embedded:") and not Path(name).expanduser().is_dir():
        look_for_network()
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
    return name, model, tokenizer


class Chat:
    """The conversation: speakers, judge and the commands."""

    def __init__(self, options):
        self.options = options
        self.system = options.system
        self.speakers = [Speaker(options.model, options)]
        self.judge = _load(options.reward, reward=True)[1:] if options.reward else None
        if options.compare:
            self.speakers.append(Speaker(options.compare, options, beside=self.speakers[0].name))

    def say(self, text: str) -> None:
        """Let every speaker answer, named if there are several, scored if there is a judge.

        All of them remember the turn when all have answered; stopped with Ctrl-C, none does.

        Raises:
            UserError: the message is too long for one of them; none was asked.
        """
        turns = [speaker.prepare(text, self.system) for speaker in self.speakers]
        screen = Screen()
        answers = []
        try:
            for speaker, turn in zip(self.speakers, turns, strict=True):
                if len(self.speakers) > 1:
                    screen.write(f"[{Path(speaker.name).name}] ")
                answers.append(speaker.answer(turn, screen))
                self._score(turn, answers[-1])
        except KeyboardInterrupt:
            screen.end()
            print("(stopped; this question is forgotten)", flush=True)
            return
        for speaker, turn, answer in zip(self.speakers, turns, answers, strict=True):
            speaker.messages = [*turn.messages, {"role": "assistant", "content": answer}]

    def _score(self, turn: Turn, answer: str) -> None:
        if self.judge and answer:
            from rlhf.inference.generate import score

            system = [{"role": "system", "content": self.system}] if self.system else []
            model, tokenizer = self.judge
            print(f"    reward {score(model, tokenizer, system + turn.messages, answer):+.2f}", flush=True)

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
                beside = self.speakers[0].name
                self.speakers[1:] = [Speaker(rest, self.options, beside)] if rest else []
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
        print(f"Talking to {options.model}. /help shows the commands, /quit leaves.")

    def say(text: str) -> None:
        try:
            talk.say(text)
        except UserError as error:
            note(error)

    converse(Reader(typed), say, talk.command)
