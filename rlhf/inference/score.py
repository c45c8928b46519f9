"""Log-probabilities of pairs and a reward model's scores of answers, many rows per forward pass.

A batch is one packed row where the model's backbone is packed (`rlhf.packing.pack_backbone`), else it is padded. In fp32
a row's values depend on its batch only in rounding: logits in the sixth digit, 1e-5 relative for the sum of an answer.

Suffixes: T tokens of a packed row, R rows and L length of a padded batch, N scored tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf.errors import UserError
from rlhf.models.tokenizer import render, tokenize_pair
from rlhf.packing import pack_backbone, packing_mode, why_not
from rlhf.packing.attention import Segments
from rlhf.packing.backbone import no_mask

SIDES = ("chosen", "rejected")
MAX_TOKENS = 4096  # padded tokens per forward pass
MAX_LOGIT_BYTES = 1 << 30  # of the logits of one forward pass, in fp32


def pack(model, longest: int | None = None) -> bool:
    """Pack the backbone of a model that will not be trained, if it can be; returns whether it is.

    Args:
        longest: tokens of the longest row of a pair; None if that isn't known.
    """
    for module in model.modules():  # GPT-2's attention has a dropout, which has no effect in eval mode
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if why_not(model, longest) is not None:
        return False
    pack_backbone(model, "pairs", longest)  # a pair shares one copy of its prompt
    return True


@dataclass(frozen=True)
class Pair:
    """Token ids of a pair, cut to a maximum length; no answer shares the prompt's tokens."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def num_padded(self) -> int:
        """The tokens of both rows, padded to the longer one."""
        return 2 * (len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids)))

    @property
    def num_scored(self) -> int:
        return len(self.chosen_ids) + len(self.rejected_ids)


def encode_pair(tokenizer, row: dict, max_length: int) -> Pair:
    """The token ids of a canonical pair, as TRL's DPOTrainer has them, cut on the right to `max_length`.

    Raises:
        UserError: the prompt leaves no room for an answer.
    """
    ids = tokenize_pair(tokenizer, row)
    room = max_length - len(ids["prompt_ids"])
    if room <= 0:
        raise UserError(
            f"a held-out prompt has {len(ids['prompt_ids'])} tokens, which leaves no room for an answer in "
            f"max_length={max_length}: raise it"
        )
    return Pair(ids["prompt_ids"], ids["chosen_ids"][:room], ids["rejected_ids"][:room])


def encode_answer(tokenizer, prompt: list[dict], answer: str | list[dict], row: dict | None = None) -> list[int]:
    """The token ids of a conversation with an answer, as a reward model reads it.

    Args:
        answer: its text, or its messages.
        row: the canonical row that the conversation is of, for its tools and the chat template's variables.
    """
    answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return render(tokenizer, row or {}, [*prompt, *answer])


def token_batches(padded: dict[int, int], scored: dict[int, int] | None = None, vocabulary: int = 1) -> list[list[int]]:
    """Items in batches of similar length, longest first, each of at most MAX_TOKENS padded tokens, or one item.

    The batches depend on the items alone, so whoever computes them gets the same values to the last bit.

    Args:
        padded: padded tokens by item.
        scored: tokens by item whose logits over `vocabulary` are computed; at most MAX_LOGIT_BYTES per batch.

    Example: token_batches({0: 1000, 1: 3000, 2: 1200}) -> [[1], [2, 0]]; 2 * 3000 would be more than 4096.
    """
    most = MAX_LOGIT_BYTES // (4 * vocabulary)
    batches: list[list[int]] = []
    for item in sorted(padded, key=lambda i: (-padded[i], i)):
        batch = [*batches[-1], item] if batches else []
        logits = sum(scored[i] for i in batch) if scored else 0
        if batch and padded[batch[0]] * len(batch) <= MAX_TOKENS and logits <= most:
            batches[-1] = batch
        else:
            batches.append([item])
    return batches


def pair_batches(pairs: list[Pair], vocabulary: int) -> list[list[int]]:
    """`token_batches` of pairs, by their index."""
    padded = {i: pair.num_padded for i, pair in enumerate(pairs)}
    return token_batches(padded, {i: pair.num_scored for i, pair in enumerate(pairs)}, vocabulary)


# --- log-probabilities of a policy -----------------------------------------------------------------------------------


@torch.no_grad()
def pair_logps(model, pairs: list[Pair]) -> list[dict[str, float]]:
    """Log-probabilities of both answers of each pair of one batch, summed over their tokens (nats).

    As in TRL, the first token of a row is not scored where there is no prompt before it.

    Returns:
        {"chosen": float, "rejected": float, "chosen_tokens": int, "rejected_tokens": int}, one per pair
    """
    logps, counts = (_packed_logps if packing_mode(model) else _padded_logps)(model, pairs)
    sums = [float(part.double().sum()) for part in logps.cpu().split(counts)]
    found = []
    for i in range(0, len(counts), 2):
        tokens = {f"{side}_tokens": counts[i + j] for j, side in enumerate(SIDES)}
        found.append({"chosen": sums[i], "rejected": sums[i + 1], **tokens})
    return found


def _packed_logps(model, pairs: list[Pair]) -> tuple[torch.Tensor, list[int]]:
    """(log-probability of each scored token, their number by answer), from one row `[prompt chosen rejected]` per pair."""
    ids: list[int] = []
    positions: list[int] = []
    predicted_by: list[int] = []  # the token of the row whose logits predict a scored token
    targets: list[int] = []
    counts = []
    for pair in pairs:
        start, num_prompt = len(ids), len(pair.prompt_ids)
        ids += pair.prompt_ids
        positions += range(num_prompt)
        for answer in (pair.chosen_ids, pair.rejected_ids):
            before = [start + num_prompt - 1] if num_prompt else []
            predictors = [*before, *range(len(ids), len(ids) + len(answer) - 1)][: len(answer)]
            predicted_by += predictors
            targets += answer[len(answer) - len(predictors) :]
            counts.append(len(predictors))
            ids += answer
            positions += range(num_prompt, num_prompt + len(answer))
    device = next(model.parameters()).device
    tensor = lambda values: torch.tensor(values, dtype=torch.long, device=device)  # noqa: E731
    lengths = [(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    outputs = model(
        input_ids=tensor(ids)[None], position_ids=tensor(positions)[None], attention_mask=no_mask(device),
        packed_segments=Segments(lengths, device), logits_to_keep=tensor(predicted_by), use_cache=False,
    )  # fmt: skip
    return token_logps(outputs.logits[0], tensor(targets)), counts


def _padded_logps(model, pairs: list[Pair]) -> tuple[torch.Tensor, list[int]]:
    """The same from a right-padded batch, in as many passes as its logits need."""
    rows = [(pair.prompt_ids + ids, max(len(pair.prompt_ids), 1)) for pair in pairs
            for ids in (pair.chosen_ids, pair.rejected_ids)]  # fmt: skip
    longest, first = max(len(ids) for ids, _ in rows), min(start for _, start in rows)
    keep = longest - first + 1  # position t predicts token t + 1
    bytes_per_row = 4 * keep * model.get_output_embeddings().weight.shape[0]
    at_once = max(1, MAX_LOGIT_BYTES // bytes_per_row)
    logps = []
    for start in range(0, len(rows), at_once):
        some = rows[start : start + at_once]
        input_ids, mask = pad_right([ids for ids, _ in some], longest, 0, next(model.parameters()).device)
        logits = model(input_ids=input_ids, attention_mask=mask, logits_to_keep=keep, use_cache=False).logits[:, :-1]
        for z, tokens, (ids, begin) in zip(logits, input_ids, some, strict=True):
            logps.append(token_logps(z[begin - first : len(ids) - first], tokens[begin : len(ids)]))
    return torch.cat(logps), [len(ids) - begin for ids, begin in rows]


def token_logps(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """(N,) log-probabilities in fp32, a part of the rows at a time: logits in bf16 are never all held in fp32."""
    parts = []
    for z, targets in zip(logits_NV.split(256), targets_N.to(logits_NV.device).split(256), strict=True):
        parts.append(torch.log_softmax(z.float(), -1).gather(-1, targets[:, None])[:, 0])
    return torch.cat(parts)


def pad_right(rows: list[list[int]], length: int, pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), (R, L) int64."""
    input_ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, ids in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        mask[i, : len(ids)] = 1
    return input_ids.to(device), mask.to(device)


# --- scores of a reward model ----------------------------------------------------------------------------------------


@torch.no_grad()
def scores(model, tokenizer, rows: list[list[int]]) -> list[float]:
    """The reward model's scores of one batch of token ids (`encode_answer`): higher is better, only differences count."""
    device = next(model.parameters()).device
    input_ids, mask = pad_right(rows, max(map(len, rows)), tokenizer.pad_token_id, device)
    options = {"use_cache": False} if packing_mode(model) else {}  # an encoder doesn't know it
    return model(input_ids=input_ids, attention_mask=mask, **options).logits[:, 0].float().tolist()


def score(model, tokenizer, prompt: list[dict], answer: str) -> float:
    """The reward model's score of one answer to a conversation."""
    return scores(model, tokenizer, [encode_answer(tokenizer, prompt, answer)])[0]
