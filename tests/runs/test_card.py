"""The model card: its usage runs, its front matter is what the hub takes, and it says nothing that was not recorded."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml

from rlhf.__main__ import main
from rlhf.models.counts import count_parameters
from rlhf.models.embedded import NAME
from rlhf.runs.card import (
    ancestors,
    card_text,
    front_matter,
    hub_id,
    is_ours,
    licence_of,
    method,
    public,
    refresh_cards,
)

KINDS = {
    "policy": ("sft", {}),
    "policy adapter": ("sft", {"use_peft": True, "lora_r": 4, "merge_adapter": False}),
    "reward": ("reward", {"use_peft": True, "lora_r": 4, "merge_adapter": True}),
    "reward adapter": ("reward", {"use_peft": True, "lora_r": 4, "merge_adapter": False}),
}


@pytest.fixture(scope="module")
def runs(tiny_llama, few_pairs, tmp_path_factory):
    """A finished run of each kind, of one step."""
    home, found = tmp_path_factory.mktemp("cards"), {}
    for kind, (stage, values) in KINDS.items():
        out = home / kind.replace(" ", "-")
        recipe = {
            "stage": stage, "model_name_or_path": tiny_llama, "dataset_name": few_pairs, "max_length": 256,
            "per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 1e-3, "save_strategy": "steps",
            "save_steps": 1, "logging_steps": 1, "output_dir": str(out), "gradient_checkpointing": False, **values,
        }  # fmt: skip
        (home / f"{out.name}.yaml").write_text(yaml.safe_dump(recipe))
        assert main([stage, str(home / f"{out.name}.yaml")]) == 0
        found[kind] = out
    return found


def card_of(folder):
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_the_usage_runs_as_it_is_printed(kind, runs, monkeypatch):
    code = re.search(r"```python\n(.*?)```", card_of(runs[kind]), re.DOTALL)[1]
    monkeypatch.chdir(runs[kind])
    shown = io.StringIO()
    with redirect_stdout(shown):
        exec(compile(code, "card", "exec"), {})
    assert shown.getvalue().strip()
    if kind.startswith("reward"):
        assert abs(float(shown.getvalue())) < 1e3


def test_the_reward_model_scores_as_here(runs, monkeypatch):
    from rlhf.inference.score import score
    from rlhf.models.inference import load_finished

    for kind in ("reward", "reward adapter"):
        monkeypatch.chdir(runs[kind])
        shown = io.StringIO()
        with redirect_stdout(shown):
            exec(re.search(r"```python\n(.*?)```", card_of(runs[kind]), re.DOTALL)[1], {})
        model, tokenizer = load_finished(str(runs[kind]), reward=True)
        prompt = [{"role": "user", "content": "What is a good way to start the day?"}]
        assert float(shown.getvalue()) == pytest.approx(score(model, tokenizer, prompt, "With a walk."), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_has_facts_and_no_placeholder(kind, runs, tiny_llama):
    text = card_of(runs[kind])
    for wrong in ("None", "[More Information Needed]", "Model Card for", str(Path(tiny_llama).parent), str(runs[kind])):
        assert wrong not in text
    complete = json.loads((runs[kind] / "complete.json").read_text())
    inputs = json.loads((runs[kind] / "provenance.json").read_text())["inputs"]
    for fact in (
        complete["weights_sha256"],
        inputs["dataset_name"],
        "0.001, linear",
        "| max_length | 256 |",
        f"1 step on {complete['train_examples']}",
    ):
        assert fact in text
    assert "README.md" not in complete["files"]  # PEFT's was not taken over; evaluate may change ours
    assert not list(runs[kind].glob("checkpoint-*/README.md"))


@pytest.mark.parametrize("kind", KINDS)
def test_front_matter_is_what_the_hub_reads(kind, runs):
    from huggingface_hub import ModelCardData

    found = yaml.safe_load(card_of(runs[kind]).split("---")[1])
    assert "base_model" not in found and "datasets" not in found  # both are local
    assert found["library_name"] == ("peft" if "adapter" in kind else "transformers")
    assert found["pipeline_tag"] == ("text-classification" if "reward" in kind else "text-generation")
    ModelCardData(**found)


@pytest.mark.parametrize(
    "names, is_adapter, base, licence",
    [
        (["runs/sft", NAME], False, "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ([NAME], True, "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        (["runs/sft", NAME], True, None, "apache-2.0"),  # the adapter lies on the merged SFT model, not on the origin
        (["org/model"], False, "org/model", None),
        (["/abs/model"], False, None, None),
        ([], False, None, None),
    ],
)
def test_base_and_licence_in_the_front_matter(names, is_adapter, base, licence):
    found = yaml.safe_load(front_matter({"dataset_name": "org/pairs"}, "dpo", names, is_adapter))
    assert (found.get("base_model"), found.get("license"), found["datasets"]) == (base, licence, ["org/pairs"])


def test_a_hub_id_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    assert [hub_id(n) for n in ("runs/sft", "org/model", "/a/b", "gpt2", "embedded:sample")] == [
        None,
        "org/model",
        *[None] * 3,
    ]
    assert public("/home/me/models/x") == "…/x" and public("runs/sft") == "runs/sft"


def test_the_licence_of_a_local_base_is_read_from_its_card(tmp_path):
    assert licence_of([str(tmp_path)]) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nhello\n")
    assert licence_of([str(tmp_path)]) == "mit"


def test_ancestors_end_where_they_turn_in_a_circle(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(f"model_name_or_path: {tmp_path / other}\n")
    assert ancestors(tmp_path / "a") == [str(tmp_path / "b"), str(tmp_path / "a")]


def test_a_folder_that_is_gone_is_not_taken_for_a_hub_id(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: models/mine\n")
    (tmp_path / "provenance.json").write_text('{"inputs": {"model_name_or_path": "model.safetensors:8"}}')
    assert ancestors(tmp_path) == ["./models/mine"] and hub_id("./models/mine") is None
    (tmp_path / "provenance.json").write_text('{"inputs": {"model_name_or_path": "models/mine"}}')
    assert ancestors(tmp_path) == ["models/mine"]


def test_a_run_that_trains_says_so(runs):
    provenance = json.loads((runs["policy"] / "provenance.json").read_text())
    text = card_text(runs["policy"], provenance, None, None)
    assert "not complete" in text and "```python" not in text


# --- results are added to the card -----------------------------------------------------------------------------------


@pytest.fixture
def evaluated(tmp_path):
    """An SFT run and an evaluation of it, as files."""
    run, evaluation = tmp_path / "sft", tmp_path / "evaluation"
    run.mkdir(), evaluation.mkdir()
    (run / "recipe.yaml").write_text("stage: sft\nmodel_name_or_path: org/model\ndataset_name: x.jsonl\n")
    provenance = {"stage": "sft", "versions": {}, "command": ["rlhf", "sft", "x.yaml"], "launcher": None, "inputs": {}}
    (run / "provenance.json").write_text(json.dumps(provenance))
    summary = {"steps": 1, "train_examples": 2, "first_loss": 2.0, "last_loss": 1.0, "weights_sha256": "s"}
    (run / "complete.json").write_text(json.dumps(summary))
    (evaluation / "recipe.yaml").write_text("dataset_name: embedded:sample\ndataset_test_split: heldout\n")
    from rlhf.runs.card import write_card

    write_card(run, summary)
    policy = {"chosen_loss": 2.0, "prefers_chosen": {}, "prefers_chosen_per_token": {}}
    results = {"pairs": 7, "policies": {"base": policy, "sft": policy | {"chosen_loss": 2.5}}}
    return run, evaluation, results


def refresh(evaluated, digest="s"):
    run, evaluation, results = evaluated
    return refresh_cards({"sft_model": str(run)}, {"sft_model": digest}, results, evaluation)


def test_an_evaluation_adds_its_results(evaluated):
    assert "Not evaluated yet" in card_of(evaluated[0])
    before = (evaluated[0] / "complete.json").read_bytes()
    assert refresh(evaluated) == []
    text = card_of(evaluated[0])
    assert "On 7 pairs of embedded:sample, split" in text and "| 2.000 | 2.500 | worse |" in text
    assert "What got worse: sft_model loss on chosen answers (2.000 → 2.500)." in text
    assert (evaluated[0] / "complete.json").read_bytes() == before and is_ours(evaluated[0] / "README.md")


def test_results_of_other_weights_are_not_added(evaluated):
    refresh(evaluated, digest="of an older training")
    assert "Not evaluated yet" in card_of(evaluated[0])


def test_a_card_that_was_edited_is_left_alone(evaluated):
    card = evaluated[0] / "README.md"
    card.write_text(card.read_text().replace("Not evaluated yet", "My own words"))
    mine = card.read_text()
    assert refresh(evaluated) == [] and card.read_text() == mine


def test_hostile_names_stay_text(evaluated):
    run = evaluated[0]
    (run / "recipe.yaml").write_text(yaml.safe_dump({"dataset_name": "a|b<script>\n# x", "run_name": "```\n# loud"}))
    provenance = json.loads((run / "provenance.json").read_text())
    text = card_text(run, provenance, None, None)
    assert "<script>" not in text.split("```yaml")[0] and "a\\|b&lt;script>" in text
    assert text.count("```") % 2 == 0 and "\n# loud" not in text.replace("\n# a", "")


# --- parameters ------------------------------------------------------------------------------------------------------


def test_an_adapter_is_not_counted_as_the_model(tiny_llama):
    """Full: the model alone. LoRA of rank 2 on q_proj (32 x 32) of 2 layers: 2 * 2 * (32 + 32) = 256 more are trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    whole = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == (whole, whole)
    assert count_parameters(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))) == (whole, 256)


def test_a_module_that_is_trained_whole_counts_once(tiny_llama):
    """The score head is 32 x 1: PEFT keeps the original beside the copy that it trains."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    whole = sum(p.numel() for p in model.parameters())
    peft = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    )
    assert count_parameters(peft) == (whole, 256 + 32)


def test_packed_4_bit_weights_count_as_what_they_stand_for(llama_64):
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(llama_64).parameters())
    four = AutoModelForCausalLM.from_pretrained(llama_64, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert sum(p.numel() for p in four.parameters()) < whole == count_parameters(four)[0]


def test_method():
    assert method({"use_peft": True, "lora_r": 8, "load_in_4bit": True}) == "LoRA r=8 on a 4-bit base"
    assert method({}) == "full fine-tuning"
