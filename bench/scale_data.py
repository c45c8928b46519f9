"""What bench/scale_proof.py trains: a tiny model, long answers made of the sample's, and a model that is next to another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

VOCABULARY = 4096
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def sample() -> list[dict]:
    from rlhf.data.sources import SAMPLE_DIR

    return [json.loads(line) for line in (SAMPLE_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def make_tiny_model(folder: Path) -> str:
    """A Llama of 2 layers with random weights, and a tokenizer made from the sample; as wide as bitsandbytes' blocks need.

    Its embedding has half a million elements, enough for sums in the order of memory to show what they lose.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from rlhf.models.tokenizer import read_template

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    texts = (message["content"] for row in sample() for key in ("prompt", "chosen", "rejected") for message in row[key])
    bpe.train_from_iterator(texts, trainer)
    end, start, stop = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=start, eos_token=stop, unk_token=end, pad_token=stop
    )
    tokenizer.chat_template = read_template("chatml")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_long_answers(file: Path, num_rows: int, words: int) -> str:
    """Preference pairs whose answers have at least so many words: the sample's answers, joined."""
    rows = sample()

    def joined(first: int, side: str) -> list[dict[str, str]]:
        parts: list[str] = []
        place = first
        while sum(len(part.split()) for part in parts) < words:
            parts.append(rows[place % len(rows)][side][0]["content"])
            place += 17  # rows of one task lie side by side
        return [{"role": "assistant", "content": "\n\n".join(parts)}]

    pairs = ({"prompt": rows[i]["prompt"], "chosen": joined(i, "chosen"), "rejected": joined(i, "rejected")} for i in range(num_rows))  # fmt: skip
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return str(file)


def nudge(model: str, folder: Path, size: float = 2.0**-9) -> str:
    """A copy of a model with each weight off by up to `size` of itself, at random; the default is what bf16 rounds away."""
    import torch
    from safetensors.torch import load_file, save_file

    if folder.exists():
        return str(folder)
    shutil.copytree(model, folder)
    generator = torch.Generator().manual_seed(0)
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        off = {name: 1 + size * (2 * torch.rand(w.shape, generator=generator) - 1) for name, w in weights.items()}
        save_file({name: (w * off[name]).to(w.dtype) for name, w in weights.items()}, file, metadata={"format": "pt"})
    return str(folder)
