"""Canonical rows -> token ids, as TRL 1.16's trainers make them, in batches and with each shared prompt encoded once.

TRL renders and encodes row by row, and a pair's prompt three times. Here a batch of rows is rendered, and what the texts of
a row share up to their last special token is encoded once: tokenizers split a text at special tokens before anything else,
so the ids are the same (`same_when_split` checks it for each tokenizer).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from rlhf.errors import UserError, one_line

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Settings:
    """What decides the ids of a row, beside the tokenizer.

    Attributes:
        stage: `sft`, `reward` or `dpo`.
        max_length: in tokens; None: no limit.
        truncation_mode: TRL's: `keep_start` cuts the end of a row, `keep_end` its start.
        too_long: what happens to a row beyond max_length: "error", "drop", "truncate"; "" as TRL does: SFT and DPO truncate
            and drop what has no answer left, a reward model's rows are dropped.
        assistant_only_loss, completion_only_loss: TRL's, of SFT.
        eos_token: TRL's, of SFT.
    """

    stage: str
    max_length: int | None
    truncation_mode: str = "keep_start"
    too_long: str = ""
    assistant_only_loss: bool = False
    completion_only_loss: bool | None = None
    eos_token: str | None = None


@dataclass
class Counts:
    """What happened to rows; each `[number, number of the first such row]`.

    Attributes:
        rows, kept: read, and kept.
        cut: rows with an answer that lost tokens.
        answers: answers that lost tokens (only the number).
        same: kept pairs whose answers have the same tokens.
        left_out: rows that are left out.
        unequal: rows whose prompt is rendered otherwise alone than before an answer, and so loses its end.
        longest: [tokens, row] of the longest kept row, packed; `longest_padded`: padded.
        histogram: rows by the power of two of their longest side's tokens, before any cut.
    """

    rows: int = 0
    kept: int = 0
    cut: list[int] = field(default_factory=lambda: [0, -1])
    answers: int = 0
    same: list[int] = field(default_factory=lambda: [0, -1])
    left_out: list[int] = field(default_factory=lambda: [0, -1])
    unequal: list[int] = field(default_factory=lambda: [0, -1])
    longest: list[int] = field(default_factory=lambda: [0, -1])
    longest_padded: list[int] = field(default_factory=lambda: [0, -1])
    histogram: dict[str, int] = field(default_factory=dict)

    def note(self, name: str, row: int) -> None:
        found = getattr(self, name)
        found[0] += 1
        found[1] = row if found[1] < 0 else found[1]

    def add(self, other: Counts) -> None:
        """Add the counts of later rows."""
        for name, value in asdict(other).items():
            mine = getattr(self, name)
            if isinstance(value, int):
                setattr(self, name, mine + value)
            elif isinstance(value, dict):
                for key, number in value.items():
                    mine[key] = mine.get(key, 0) + number
            elif name.startswith("longest"):
                if value[0] > mine[0]:
                    mine[:] = value
            else:
                mine[:] = [mine[0] + value[0], value[1] if mine[1] < 0 else mine[1]]


@dataclass(frozen=True)
class Tokens:
    """The tokenised rows of one side (training or held out).

    Attributes:
        dataset: rows that are kept: ids, `example` (number of the row), `packed` and `padded` (tokens that it takes), for
            DPO `pair_key`.
        counts: what max_length did.
    """

    dataset: Dataset
    counts: Counts


def training_template(tokenizer) -> str | None:
    """TRL's variant of the chat template that marks the assistant's tokens; None if the template itself does.

    Raises:
        ValueError: TRL has none for this template.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    return None if has_generation_markers(tokenizer.chat_template) else get_training_chat_template(tokenizer)


class Tokenise:
    """Tokenises batches of canonical rows.

    Args:
        tokenizer: with its chat template.
    """

    def __init__(self, tokenizer, settings: Settings):
        from rlhf.models.tokenizer import template_arguments  # imports torch, which takes seconds

        self.tokenizer, self.settings, self.arguments = tokenizer, settings, template_arguments
        self.template = training_template(tokenizer) if settings.assistant_only_loss else None
        if settings.eos_token:
            tokenizer.eos_token = settings.eos_token
        self.splits = split_tokens(tokenizer)

    def __call__(self, rows: list[dict[str, Any]], first: int, counts: Counts) -> dict[str, list[Any]]:
        """Columns of the kept rows: token ids, `example` (the row's number), `packed` and `padded` (tokens it takes).

        Args:
            first: number of the first row.
            counts: filled in.

        Raises:
            UserError: `too_long: error`, and a row is.
        """
        pairs = bool(rows) and "chosen" in rows[0]
        encoded = self._pairs(rows) if pairs else self._sft(rows)
        columns: dict[str, list[Any]] = {}
        for number, (row, found) in enumerate(zip(rows, encoded, strict=True), first):
            if found.pop("unequal"):
                counts.note("unequal", number)
            kept = self._fit(row, found, number, counts)
            counts.rows += 1
            if kept is None:
                counts.note("left_out", number)
                continue
            counts.kept += 1
            for name, value in kept.items():
                columns.setdefault(name, []).append(value)
        return columns

    # --- rendering and encoding

    def _render(self, row: dict, messages: list[dict], **more: Any) -> str:
        options = {**self.arguments(row), **more}
        if self.template is not None:
            options["chat_template"] = self.template
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except (TemplateError, TypeError, AttributeError) as error:
            place = f"{row['place']}: " if "place" in row else ""
            raise UserError(f"{place}the chat template can't render this row: {one_line(error, 200)}") from None

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return (
            self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []
        )

    def _pairs(self, rows: list[dict]) -> list[dict[str, Any]]:
        texts: list[list[str]] = []
        for row in rows:
            sides = [self._render(row, row["prompt"] + row[side]) for side in ("chosen", "rejected")]
            if self.settings.stage == "dpo":
                sides.insert(0, self._render(row, row["prompt"], add_generation_prompt=True))
            texts.append(sides)
        found = []
        for ids in self._encode_sharing(texts):
            if self.settings.stage == "reward":
                found.append({"chosen_ids": ids[0], "rejected_ids": ids[1], "unequal": False})
                continue
            prompt, chosen, rejected = ids
            cut = min(_common(prompt, chosen), _common(prompt, rejected))
            found.append(
                {
                    "prompt_ids": prompt[:cut],
                    "chosen_ids": chosen[cut:],
                    "rejected_ids": rejected[cut:],
                    "unequal": cut < len(prompt),
                }
            )
        return found

    def _encode_sharing(self, texts: list[list[str]]) -> list[list[list[int]]]:
        """The ids of each row's texts; what a row's texts share is encoded once."""
        segments: list[str] = []
        heads = []
        for row in texts:
            cut, token = last_split(row, self.splits)
            heads.append((cut, token))
            if cut:  # never without texts
                segments.append(row[0][:cut])
                segments += [text[cut - len(token) :] for text in row]  # each starts with the special token
            else:
                segments += row
        ids = iter(self._encode(segments))
        found = []
        for row, (cut, _) in zip(texts, heads, strict=True):
            head = next(ids) if cut else []
            found.append([head + next(ids)[1:] if cut else next(ids) for _ in row])
        return found

    def _sft(self, rows: list[dict]) -> list[dict[str, Any]]:
        if self.settings.assistant_only_loss:
            return [self._with_mask(row) for row in rows]
        texts: list[list[str]] = []
        plain = self._texts([row["text"] for row in rows if "text" in row])
        for row in rows:
            if "text" in row:
                texts.append([])
            elif "messages" in row:
                texts.append([self._render(row, row["messages"])])
            else:
                start = self._render(row, row["prompt"], add_generation_prompt=True)
                texts.append([start, self._render(row, row["prompt"] + row["completion"])])
        found = []
        for ids in self._encode_sharing(texts):
            if not ids:
                found.append(self._labelled(next(plain)))
                continue
            if len(ids) == 1:
                found.append(self._labelled(ids[0]))
                continue
            prompt, whole = ids
            cut = _common(prompt, whole)
            only = self.settings.completion_only_loss is not False
            labels = [-100] * cut + whole[cut:] if only else list(whole)
            found.append(
                {"input_ids": whole, "labels": labels, "prompt": cut if only else 0, "unequal": cut < len(prompt)}
            )
        return found

    def _texts(self, texts: list[str]) -> Iterator[list[int]]:
        """The ids of texts without a template, to which the tokenizer adds its own special tokens, each ending with EOS."""
        eos = self.tokenizer.eos_token
        ended = [text if text.endswith(eos) else text + eos for text in texts]
        return iter(self.tokenizer(ended)["input_ids"] if ended else [])

    @staticmethod
    def _labelled(ids: list[int]) -> dict[str, Any]:
        return {"input_ids": ids, "labels": list(ids), "prompt": 0, "unequal": False}

    def _with_mask(self, row: dict) -> dict[str, Any]:
        """Labels on the assistant's tokens only, by the template's generation markers."""
        if "text" in row:
            raise UserError(
                f"{row['place']}: assistant_only_loss needs messages, and this row is a text; remove the key"
            )
        options = self.arguments(row)
        if self.template is not None:
            options["chat_template"] = self.template
        messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
        done = self.tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, **options
        )
        ids, mask = done["input_ids"], done["assistant_masks"]
        if 1 not in mask:
            raise UserError(
                f"{row['place']}: the chat template marks no token as the assistant's ({{% generation %}}), which "
                "assistant_only_loss needs; remove the key, or set a chat_template that does"
            )
        cut = 0
        if "prompt" in row:
            prompt = self.tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_dict=True, **options
            )
            cut = _common(prompt["input_ids"], ids)
        only = "prompt" in row and self.settings.completion_only_loss is not False
        labels = [
            token if bit and (not only or at >= cut) else -100
            for at, (token, bit) in enumerate(zip(ids, mask, strict=True))
        ]
        return {"input_ids": ids, "labels": labels, "prompt": cut if only else 0, "unequal": False}

    # --- max_length

    def _fit(self, row: dict, ids: dict[str, Any], number: int, counts: Counts) -> dict[str, Any] | None:
        """The columns of a row that fits max_length, was cut to it, or None if it is left out."""
        prompt, sides = _sides(ids)
        longest = prompt + max(map(len, sides))
        bucket = str(1 << max(longest - 1, 0).bit_length())
        counts.histogram[bucket] = counts.histogram.get(bucket, 0) + 1
        limit, mode = self.settings.max_length or longest, self.settings.truncation_mode
        too_long = self.settings.too_long or ("drop" if self.settings.stage == "reward" else "truncate")
        if longest > limit and too_long != "truncate":
            if too_long == "error":
                raise UserError(
                    f"{row['place']}: the row has {longest:,} tokens, more than max_length={limit:,}, and `too_long: error` is "
                    "set; raise max_length, shorten the row, or set `too_long: drop` or `truncate`"
                )
            return None
        if mode == "keep_start" and prompt >= limit:
            return None
        kept = [side[: limit - prompt] if mode == "keep_start" else side[-limit:] for side in sides]
        lost = sum(len(short) < len(side) for short, side in zip(kept, sides, strict=True))
        if lost:
            counts.note("cut", number)
            counts.answers += lost
        if len(kept) == 2 and kept[0] == kept[1]:
            counts.note("same", number)
        columns = self._columns(row, ids, limit, mode)
        if columns is None:
            return None
        for name, padded in (("packed", False), ("padded", True)):
            columns[name] = count_tokens(columns, self.settings.max_length, padded)
        for name, column in (("longest", "packed"), ("longest_padded", "padded")):
            if columns[column] > getattr(counts, name)[0]:
                setattr(counts, name, [columns[column], number])
        return {**columns, "example": number}

    def _columns(self, row: dict, ids: dict[str, Any], limit: int, mode: str) -> dict[str, Any] | None:
        """DPO's collator cuts pairs itself, SFT's and reward models' ids are cut here."""
        if self.settings.stage == "dpo":
            columns = {name: ids[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
            return {**columns, "pair_key": pair_key(columns, self.settings.max_length, mode)}
        part = slice(None, limit) if mode == "keep_start" else slice(-limit, None)
        if self.settings.stage == "reward":
            cut = {name: ids[name][part] for name in ("chosen_ids", "rejected_ids")}
            return {**cut, "margin": float(row["margin"])} if "margin" in row else cut
        columns = {name: ids[name][part] for name in ("input_ids", "labels")}
        if self.settings.assistant_only_loss:  # TRL refuses rows without messages, even if they are tokenised
            columns["messages"] = [{"role": "assistant", "content": ""}]
        return columns if any(label != -100 for label in columns["labels"]) else None


def _sides(ids: dict[str, Any]) -> tuple[int, list[list[int]]]:
    """(number of prompt tokens, the answers' ids); a reward model's rows, which are never cut, have no prompt of their own."""
    if "input_ids" in ids:
        return ids["prompt"], [ids["input_ids"][ids["prompt"] :]]
    return len(ids.get("prompt_ids", ())), [ids["chosen_ids"], ids["rejected_ids"]]


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def count_tokens(row: dict[str, list[int]], max_length: int | None, padded: bool) -> int:
    """Tokens that an example takes: packed with a shared prompt; padded, its longest row (twice for a pair)."""
    cut = lambda n: n if max_length is None else min(n, max_length)  # noqa: E731
    if "input_ids" in row:
        return cut(len(row["input_ids"]))
    prompt = len(row.get("prompt_ids", []))
    chosen, rejected = cut(prompt + len(row["chosen_ids"])), cut(prompt + len(row["rejected_ids"]))
    if padded:
        return 2 * max(chosen, rejected)
    if not prompt:  # reward models: the common prefix of both rows
        pairs = enumerate(zip(row["chosen_ids"], row["rejected_ids"], strict=False))
        prompt = next((i for i, (a, b) in pairs if a != b), min(chosen, rejected))
    return chosen + rejected - min(prompt, chosen, rejected)


def pair_key(row: dict[str, list[int]], max_length: int | None, truncation_mode: str) -> bytes:
    """16 bytes that identify a pair's token ids and where its answers start, after truncation by TRL's collator."""
    digest = hashlib.sha256()
    for side in ("chosen_ids", "rejected_ids"):
        ids, num_prompt = row["prompt_ids"] + row[side], len(row["prompt_ids"])
        if max_length is not None and truncation_mode == "keep_end":
            num_prompt = max(0, num_prompt - max(0, len(ids) - max_length))
            ids = ids[-max_length:]
        elif max_length is not None:
            ids = ids[:max_length]
        digest.update(np.array([len(ids), num_prompt, *ids], dtype=np.int64).tobytes())
    return digest.digest()[:16]


# --- where a text can be split ---------------------------------------------------------------------------------------


def split_tokens(tokenizer) -> list[str]:
    """Special tokens at which a text can be cut without changing its ids; none for a tokenizer for which that is not so."""
    if not getattr(tokenizer, "is_fast", False):
        return []
    plain = [
        token.content for token in tokenizer.added_tokens_decoder.values()
        if len(token.content) > 2 and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    ]  # fmt: skip
    every = [token.content for token in tokenizer.added_tokens_decoder.values()]
    alone = [a for a in plain if not any(_overlap(a, b) for b in every if a != b)]
    return alone if alone and same_when_split(tokenizer, alone[0]) else []


def _overlap(a: str, b: str) -> bool:
    """Whether occurrences of two texts can overlap."""
    return a in b or b in a or any(a[-n:] == b[:n] or b[-n:] == a[:n] for n in range(1, min(len(a), len(b))))


_PROBES = ("Hi", " two  words", "\n\nnew line ", "user\nÄß 你好 🙂 1234", "x=1\t{}")


def same_when_split(tokenizer, token: str) -> bool:
    """Whether this tokenizer gives the same ids when a text is cut before or after a special token."""
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    for before, after in pairwise((*_PROBES, *_PROBES[::-1])):
        tail = encode(token + after)
        if encode(before + token + after) != encode(before + token) + tail[1:] or len(encode(token)) != 1:
            return False
    return True


def last_split(texts: list[str], tokens: list[str]) -> tuple[int, str]:
    """(end of the last special token that all texts share, that token); (0, "") if there is none."""
    if len(texts) < 2 or not tokens:
        return 0, ""
    shared = min(map(len, texts))
    for text in texts[1:]:
        shared = _shared(texts[0], text, shared)
    best, which = 0, ""
    for token in tokens:
        at = texts[0].rfind(token, 0, shared)
        if at >= 0 and at + len(token) > best:
            best, which = at + len(token), token
    return best, which


def _shared(a: str, b: str, most: int) -> int:
    """Number of characters, at most `most`, in which two texts start alike."""
    if a[:most] == b[:most]:
        return most
    low, high = 0, most  # equal up to low, not up to high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low
