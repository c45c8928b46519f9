"""Tokenizers of a few hundred tokens, trained on the sample data."""

import json

from rlhf.data.sources import SAMPLE_DIR

CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def sample_texts():
    rows = [json.loads(line) for line in (SAMPLE_DIR / "train.jsonl").read_text().splitlines()]
    return [m["content"] for r in rows for m in r["prompt"] + r["chosen"] + r["rejected"]]


def byte_level_tokenizer(special_tokens, **roles):
    """A byte-level BPE of 600 tokens trained on the sample."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sample_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
