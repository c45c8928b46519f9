"""The report: self-contained, escaped, and it says what the files say."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from rlhf.__main__ import main
from rlhf.evaluate import summarise
from rlhf.report import find_stages, running_mean

ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"


def pair(row, sft, dpo, reward):
    logps = [{"chosen": c, "rejected": r, "chosen_tokens": 10, "rejected_tokens": 8} for c, r in (sft, dpo)]
    prompt = [{"role": "user", "content": ATTACK}]
    base = {"chosen": -30.0, "rejected": -20.0, "chosen_tokens": 10, "rejected_tokens": 8}
    return {"row": row, "prompt": prompt, "base": base, "sft": logps[0], "dpo": logps[1],
            "reward": dict(zip(("chosen", "rejected"), reward, strict=True))}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run folder with hostile text in every place that is shown."""
    for stage in ("sft", "reward", "dpo", "evaluate"):
        folder = tmp_path / stage
        folder.mkdir()
        recipe = {
            "stage": stage,
            "model_name_or_path": ATTACK,
            "dataset_name": "embedded:sample",
            "output_dir": str(folder),
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        provenance = {
            "stage": stage, "recipe": "configs/quickstart/x.yaml", "command": ["rlhf", stage, ATTACK], "versions": {"trl": ATTACK},
            "hardware": {"cpus": 2, "memory_gib": 24.0, "processes": 1, "platform": ATTACK}, "git_commit": ATTACK,
        }  # fmt: skip
        (folder / "provenance.json").write_text(json.dumps(provenance))
        complete = {"steps": 3, "seconds": 60, "train_examples": 9, "weights_sha256": "ab" * 32, "pairs": 2}
        (folder / "complete.json").write_text(json.dumps(complete))
        lines = [{"step": s, "loss": 0.7 - s / 10, "rewards/margins": s / 10, "accuracy": 0.5} for s in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = [pair(0, (-20, -18), (-18, -19), (1, 0)), pair(1, (-25, -18), (-26, -18), (2, -1))]
    answers = [
        {"row": i, "prompt": [{"role": "user", "content": ATTACK}], "base": ATTACK, "sft": ATTACK, "dpo": ATTACK,
         "base_reward": 0.0, "sft_reward": 0.25, "dpo_reward": 0.5} for i in range(2)
    ]  # fmt: skip
    del answers[1]["base"]
    folder = tmp_path / "evaluate"
    (folder / "results.json").write_text(json.dumps(summarise(pairs, answers, 0.1)))
    (folder / "answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    return tmp_path


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_hostile_text_stays_text(run):
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    tags = Tags(text).found
    assert not [t for t, _ in tags if t in ("script", "img", "iframe", "object", "link", "base")]
    assert not [a for _, attrs in tags for a in attrs if a.startswith("on")]
    assert "&lt;script&gt;alert(&#39;x&#39;)" in text
    policy = next(a["content"] for t, a in tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_nothing_is_loaded_from_anywhere(run):
    main(["report", str(run)])
    text = (run / "report.html").read_text()
    loaded = [
        v for t, attrs in Tags(text).found for a, v in attrs.items() if a in ("src", "href", "xlink:href", "data")
    ]
    assert all(v.startswith("#") for v in loaded)
    assert not re.findall(r"url\((?!#)", text) and "@import" not in text


def test_it_shows_every_part(run, capsys):
    main(["report", str(run)])
    text = (run / "report.html").read_text()
    for part in (
        "Lineage",
        "Results on 2 held-out pairs",
        "Training",
        "Answers side by side",
        "Data",
        "Environment",
        "Repeat it",
    ):
        assert f"<h2>{part}</h2>" in text
    assert text.count("<svg") == 2 + 3 + 3  # SFT, reward, DPO
    assert "SFT loss on chosen answers" in text and "equal 50%" in text
    assert "1 more held-out prompts" in text
    out = capsys.readouterr().out
    assert f"Report    {run / 'report.html'}" in out and f"chat {run / 'dpo'}" in out and "--num_processes 4" in out


def test_an_unfinished_run_is_reported_as_such(run):
    (run / "dpo" / "complete.json").unlink()
    (run / "evaluate" / "complete.json").unlink()
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "not complete" in text and "Results on" not in text


def test_a_recipe_folder_names_its_stages(run, tmp_path):
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "dpo.yaml").write_text(f"stage: dpo\noutput_dir: {run / 'dpo'}\n")
    assert list(find_stages(recipes)) == ["dpo"]


@pytest.mark.parametrize("target", ["nowhere", "."])
def test_no_run(target, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", target]) == 2
    assert ("no folder at nowhere" if target == "nowhere" else ". holds no run") in capsys.readouterr().err


def test_running_mean():
    assert running_mean((1, 2, 3, 4), 2) == [1, 1.5, 2.5, 3.5]


def test_the_sample_statistics_are_counted():
    from rlhf.data.sources import SAMPLE_DIR
    from rlhf.report import data_statistics

    stage = {"recipe": {"dataset_name": "embedded:sample", "dataset_test_split": "heldout"}}
    train, heldout = data_statistics({"dpo": stage})
    lines = (Path(SAMPLE_DIR) / "heldout.jsonl").read_text().splitlines()
    assert heldout["pairs"] == len(lines) and sum(train["tasks"].values()) == train["pairs"] >= 200
