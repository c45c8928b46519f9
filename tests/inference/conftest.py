"""A tiny reward model for the commands that score."""

import pytest


@pytest.fixture(scope="session")
def tiny_judge(tiny_llama, tmp_path_factory):
    """A reward model of tiny Llama's size, with weights of its own and scores that are far apart."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("judges") / "judge"
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(tiny_llama, num_labels=1, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return str(folder)
