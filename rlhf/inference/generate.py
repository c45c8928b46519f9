"""Batched greedy generation with finished models."""

from __future__ import annotations

import torch

from rlhf.config.stage_config import EvaluateConfig
from rlhf.models.tokenizer import render


def encode_prompt(tokenizer, messages: list[dict], row: dict | None = None) -> list[int]:
    """The token ids of a conversation up to where the answer starts.

    Args:
        row: the canonical row that the conversation is of, for its tools and the chat template's variables.
    """
    return render(tokenizer, row or {}, messages, add_generation_prompt=True)


def prompt_batches(prompts: dict[int, list[int]], batch_size: int) -> list[list[int]]:
    """Prompts in batches of similar length, longest first: a batch is padded to its longest prompt.

    The batches depend on the prompts alone, so the answers are the same on any number of processes.
    """
    order = sorted(prompts, key=lambda i: (-len(prompts[i]), i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def generate(model, tokenizer, prompts: list[list[int]], config: EvaluateConfig) -> list[tuple[str, bool]]:
    """Greedy answers to one batch of prompts (`encode_prompt`).

    In fp32 an answer does not depend on the other prompts of its batch, nor on its padding, as long as no step has two
    tokens whose logits differ by less than rounding (about 1e-5). In bf16 such near-ties are common, and an answer can
    differ from the one that the same prompt gets in another batch.

    Returns:
        (text, whether it was cut at max_new_tokens before an EOS token), one per prompt
    """
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    padded = {k: padded[k].to(next(model.parameters()).device) for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        out = model.generate(
            **padded, max_new_tokens=config.max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    answers = out[:, padded["input_ids"].shape[1] :].tolist()
    texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]
    return [(text, tokenizer.eos_token_id not in tokens) for text, tokens in zip(texts, answers, strict=True)]
