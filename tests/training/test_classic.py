"""The classic recipe (GPT-2 on Alpaca, DistilBERT, DPO) with its own files, on tiny models and Alpaca-shaped rows."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.__main__ import main
from rlhf.runs.metrics import read_metrics

RECIPES = Path(__file__).parent.parent.parent / "configs" / "gpt2-alpaca"


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    """Rows as in yahma/alpaca-cleaned: instruction, input, output."""
    file = tmp_path_factory.mktemp("alpaca") / "alpaca.json"
    rows = [
        {"instruction": "Name three fruits.", "input": "", "output": "Apples, pears and plums."},
        {"instruction": "Translate into French.", "input": "good morning", "output": "Bonjour."},
        {"instruction": "Add the numbers.", "input": "3, 4, 5", "output": "12"},
        {
            "instruction": "Give one tip for sleeping well.",
            "input": "",
            "output": "Go to bed at the same time each day.",
        },
    ]
    file.write_text(json.dumps(rows * 4))
    return str(file)


def test_every_stage_of_the_classic(tiny_gpt2, tiny_distilbert, alpaca, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--max_steps", "2", "--global_batch_size", "2"]
    assert main(["dpo", str(RECIPES / "dpo.yaml")]) == 2
    assert (
        "no data file at data/processed/preference_data.jsonl; write it with `rlhf pairs DATASET"
        in capsys.readouterr().err
    )
    assert main(["pairs", "embedded:sample", "--limit", "8"]) == 0
    flags = ["--model_name_or_path", tiny_gpt2, "--dataset_name", alpaca, *short]
    assert main(["sft", str(RECIPES / "sft.yaml"), *flags]) == 0
    assert main(["reward", str(RECIPES / "reward.yaml"), "--model_name_or_path", tiny_distilbert, *short]) == 0
    assert main(["dpo", str(RECIPES / "dpo.yaml"), *short, "--logging_steps", "1"]) == 0
    assert main(["evaluate", str(RECIPES / "evaluate.yaml"), "--base_model", tiny_gpt2, "--max_new_tokens", "4",
                 "--max_eval_examples", "4"]) == 0  # fmt: skip
    assert main(["report", "models"]) == 0
    assert Path("models/report.html").is_file()

    policy = AutoTokenizer.from_pretrained("models/dpo")
    assert policy.chat_template.strip().startswith("{#- Alpaca's prompt format") and policy.pad_token == "<|pad|>"
    model = AutoModelForCausalLM.from_pretrained("models/dpo")
    assert model.get_input_embeddings().weight.shape[0] == len(policy) == 601
    assert AutoModelForSequenceClassification.from_pretrained("models/reward").config.num_labels == 1
    assert read_metrics(Path("models/dpo"))[0]["loss"] == pytest.approx(0.693147, abs=1e-4)

    assert main(["chat", "models/dpo", "--prompt", "Hello", "--max_new_tokens", "3", "--reward", "models/reward"]) == 0
    assert "reward " in capsys.readouterr().out


def test_eos_is_in_the_labels_of_every_alpaca_row(tiny_gpt2, alpaca, tmp_path):
    """What SFT trains on: the prompt masked, the answer and its end not."""
    from rlhf.config.recipe import load_recipe
    from rlhf.distributed.topology import topology_of_environment
    from rlhf.training.plan import make_plan
    from rlhf.training.sft import SFT, build

    flags = ["--model_name_or_path", tiny_gpt2, "--dataset_name", alpaca, "--output_dir", str(tmp_path / "o")]
    recipe = load_recipe(str(RECIPES / "sft.yaml"), "sft", flags)
    trainer = build(make_plan(SFT, recipe, topology_of_environment()))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    tokenizer = trainer.processing_class
    for labels, mask in zip(batch["labels"], batch["attention_mask"], strict=True):
        trained = labels[labels != -100].tolist()
        assert trained[-1] == tokenizer.eos_token_id and trained.count(tokenizer.eos_token_id) == 1
        assert (labels[mask == 0] == -100).all() and tokenizer.pad_token_id not in trained
    second = tokenizer.decode([t for t in batch["labels"][1].tolist() if t != -100])
    assert second == "Bonjour.<|endoftext|>"
    assert "Translate into French.\n\ngood morning\n\n### Response:\n" in tokenizer.decode(batch["input_ids"][1])
