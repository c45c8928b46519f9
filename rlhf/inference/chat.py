"""Chat with a model in a terminal or over a pipe, optionally beside a second model and scored by a reward model."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError
from rlhf.inference.finished import load, resolve
from rlhf.inference.terminal import Reader, Screen, converse, note

if TYPE_CHECKING:
    from rlhf.inference.best_of import Best

HELP = '''\
/reset           forget the conversation
/system TEXT     set the system message (and forget the conversation); /system alone removes it
/compare MODEL   let a second model answer too (a folder, a run beside this one, or org/name); /compare alone stops that
/quit            leave (also Ctrl-D, or Ctrl-C twice)
Pasted text is one message, even if it has several lines. To type several lines, put """ before the first and after the
last. Ctrl-C stops an answer, or clears the line.'''

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class Turn:
    """The input of one answer.

    Attributes:
        messages: the conversation with the new message, without the oldest turns if they exceed the context.
        ids: the same as token ids.
        limit: maximum tokens of the answer.
    """

    messages: list[dict[str, str]]
    ids: list[int]
    limit: int


class Speaker:
    """A model that answers, with its own side of the conversation."""

    def __init__(self, name: str, options, beside: str = ""):
        self.options = options
        self.name, self.model, self.tokenizer = _load(name, options.load_in_4bit, beside=beside)
        self.messages: list[dict[str, str]] = []

    def prepare(self, text: str, system: str | None) -> Turn:
        """The conversation with a new message; turns that exceed the model's context are left out, oldest first.

        Raises:
            UserError: the message alone has at least as many tokens as the model has positions.
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
                f"the message has {len(ids):,} tokens, but {Path(self.name).name} has only {room:,} positions for "
                "message and answer: nothing was sent; shorten it"
            )
        if dropped:
            oldest = "the oldest turn was" if dropped == 1 else f"the {dropped} oldest turns were"
            note(f"{oldest} left out: the conversation exceeds the model's context")
        return Turn(messages, ids, min(wanted, room - len(ids)) if room else wanted)

    def best(self, turn: Turn, system: str | None, judge: Any, number: int) -> Best:
        """The best of several answers by a reward model.

        Args:
            number: of the message in this chat: each has random numbers of its own.
        """
        from rlhf.inference.best_of import best_of
        from rlhf.inference.sampling import Sampling

        options = self.options
        sampling = Sampling(options.temperature, options.top_p, turn.limit, options.seed)
        head = [{"role": "system", "content": system}] if system else []
        asked = [*head, *turn.messages]
        found = best_of((self.model, self.tokenizer), judge, [asked], options.best_of, sampling, first_row=number)[0]
        if not found.answer.finished:
            note(f"cut off after {turn.limit} tokens; raise --max_new_tokens for more")
        return found

    def answer(self, turn: Turn, screen: Screen) -> str:
        """Generate the answer, print it word by word, note if it was cut off or empty, and return it."""
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
            more = "the model has no more positions" if all_positions else "raise --max_new_tokens for more"
            note(f"cut off after {turn.limit} tokens; {more}")
        elif not answer:
            note("empty answer: the model's first token was the end of sequence")
        return answer


def clean(text: str) -> str:
    """Text without control characters: a model's output must not control the terminal."""
    return CONTROL_CHARACTERS.sub("", text)


def _streamer(tokenizer, screen: Screen):
    from transformers import TextStreamer

    class Words(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False):
            screen.write(clean(text))
            if stream_end:
                screen.end()

    return Words(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _load(name: str, load_in_4bit: bool, reward: bool = False, beside: str = "") -> tuple[str, Any, Any]:
    """(the name as it was found, model, tokenizer)"""
    found = resolve(name, "chat", reward, beside)
    return found.name, *load(found, load_in_4bit=load_in_4bit)


class Chat:
    """The conversation: speakers, judge and the commands."""

    def __init__(self, options):
        self.options = options
        self.system, self.said = options.system, 0
        self.speakers = [Speaker(options.model, options)]
        self.judge = _load(options.reward, options.load_in_4bit, reward=True)[1:] if options.reward else None
        if options.compare:
            self.speakers.append(Speaker(options.compare, options, beside=self.speakers[0].name))

    def say(self, text: str) -> None:
        """Let every speaker answer; print names if there are several, scores if there is a judge.

        The turn is added to the histories once all have answered; if stopped with Ctrl-C, to none.

        Raises:
            UserError: the message is too long for one of them; no model was run.
        """
        turns = [speaker.prepare(text, self.system) for speaker in self.speakers]
        screen, self.said = Screen(), self.said + 1
        answers = []
        try:
            for speaker, turn in zip(self.speakers, turns, strict=True):
                if len(self.speakers) > 1:
                    screen.write(f"[{Path(speaker.name).name}] ")
                if self.options.best_of > 1:
                    answers.append(self._best(speaker, turn, screen))
                else:
                    answers.append(speaker.answer(turn, screen))
                    self._score(turn, answers[-1])
        except KeyboardInterrupt:
            screen.end()
            print("(stopped; this message is not kept)", flush=True)
            return
        for speaker, turn, answer in zip(self.speakers, turns, answers, strict=True):
            speaker.messages = [*turn.messages, {"role": "assistant", "content": answer}]

    def _best(self, speaker: Speaker, turn: Turn, screen: Screen) -> str:
        found = speaker.best(turn, self.system, self.judge, self.said)
        text = clean(found.answer.text)
        screen.write(text)
        screen.end()
        others = ", ".join(f"{score:+.2f}" for score in sorted(found.scores, reverse=True)[1:])
        print(f"    reward {found.score:+.2f}, the best of {len(found.scores)} (the others: {others})", flush=True)
        return text

    def _score(self, turn: Turn, answer: str) -> None:
        if self.judge and answer:
            from rlhf.inference.score import score

            system = [{"role": "system", "content": self.system}] if self.system else []
            model, tokenizer = self.judge
            print(f"    reward {score(model, tokenizer, system + turn.messages, answer):+.2f}", flush=True)

    def command(self, line: str) -> bool:
        """Execute a /command; returns False if it ends the chat."""
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
                if rest:  # both continue the same conversation
                    self.speakers[1].messages = list(self.speakers[0].messages)
                print(f"({rest} answers too)" if rest else "(one model answers)")
            except UserError as error:
                print(f"({error})")
        else:
            print(HELP)
        return True


def chat(options) -> None:
    """Run `rlhf chat`: one answer with --prompt, else a conversation until /quit or the end of the input."""
    if options.temperature is None:  # answers have to differ for one to be the best
        options.temperature = 0.8 if options.best_of > 1 else 0.0
    if options.max_new_tokens < 1 or options.temperature < 0:
        raise UserError("--max_new_tokens must be 1 or more and --temperature 0 or more")
    if options.best_of > 1 and not options.reward:
        raise UserError(f"--best_of {options.best_of} needs --reward MODEL_DIR, the reward model that chooses")
    if options.best_of > 1 and options.temperature == 0:
        raise UserError(
            f"--best_of {options.best_of} with --temperature 0 would compare {options.best_of} times the same answer"
        )
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
