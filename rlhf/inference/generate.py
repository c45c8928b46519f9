"""Inference with finished models: log-probabilities of pairs, scores of answers, and batched greedy generation."""

from __future__ import annotations

from rlhf.config.stage_config import EvaluateConfig
from rlhf.distributed.processes import is_main
from rlhf.errors import UserError

SIDES = ("chosen", "rejected")


def bar(items: list, label: str):
    from tqdm import tqdm

    return tqdm(items, desc=f"{label:<22}", disable=not is_main(), dynamic_ncols=True)


def pair_logps(model, tokenizer, row: dict, max_length: int) -> dict[str, float]:
    """Log-probabilities of both answers of a pair, summed over their tokens (nats).

    Returns:
        {"chosen": float, "rejected": float, "chosen_tokens": int, "rejected_tokens": int}
    """
    import torch

    from rlhf.models.tokenizer import tokenize_pair

    ids = tokenize_pair(tokenizer, row)
    prompt = len(ids["prompt_ids"])
    if prompt >= max_length:
        raise UserError(
            f"a held-out prompt has {prompt} tokens, which leaves no room for an answer in max_length={max_length}: "
            "raise it"
        )
    rows = [(ids["prompt_ids"] + ids[f"{side}_ids"])[:max_length] for side in SIDES]
    longest = max(map(len, rows))
    device = next(model.parameters()).device
    input_ids = torch.full((2, longest), tokenizer.pad_token_id, device=device)
    mask = torch.zeros((2, longest), dtype=torch.long, device=device)
    for i, tokens in enumerate(rows):
        input_ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
    with torch.no_grad():  # only the logits of the answers' tokens: position t predicts token t + 1
        logits = model(
            input_ids=input_ids, attention_mask=mask, logits_to_keep=longest - prompt + 1, use_cache=False
        ).logits[:, :-1]
    logps = torch.log_softmax(logits.float(), -1).gather(-1, input_ids[:, prompt:, None])[..., 0]
    counts = [len(tokens) - prompt for tokens in rows]
    sums = [float(logps[i, :n].double().sum()) for i, n in enumerate(counts)]
    return {"chosen": sums[0], "rejected": sums[1], "chosen_tokens": counts[0], "rejected_tokens": counts[1]}


def generate(model, tokenizer, prompts: list[list[dict]], config: EvaluateConfig, label: str = "") -> list[tuple]:
    """Greedy answers to conversations, in batches of similar length, in the order of `prompts`.

    Returns:
        (text, whether it was cut at max_new_tokens before an EOS token), one per prompt
    """
    import torch

    texts: dict[int, tuple[str, bool]] = {}
    tokens = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=True)["input_ids"] for p in prompts
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(tokens[i]))
    starts = list(range(0, len(order), config.batch_size))
    for start in bar(starts, f"{label}: answers"):
        batch = order[start : start + config.batch_size]
        padded = tokenizer.pad({"input_ids": [tokens[i] for i in batch]}, padding_side="left", return_tensors="pt")
        padded = {k: padded[k].to(next(model.parameters()).device) for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            out = model.generate(
                **padded, max_new_tokens=config.max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        for i, row in zip(batch, out[:, padded["input_ids"].shape[1] :], strict=True):
            texts[i] = (
                tokenizer.decode(row, skip_special_tokens=True).strip(),
                tokenizer.eos_token_id not in row.tolist(),
            )
    return [texts[i] for i in range(len(prompts))]


def score(model, tokenizer, prompt: list[dict], answer: str) -> float:
    """The reward model's score of an answer to a conversation (higher is better; only differences are meaningful)."""
    import torch

    messages = [*prompt, {"role": "assistant", "content": answer}]
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids], device=next(model.parameters()).device)).logits[0, 0])
