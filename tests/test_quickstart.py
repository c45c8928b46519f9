"""The main job for real: SmolLM2-135M-Instruct through SFT, reward model, DPO, evaluation and report."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.data.heldout import held_out
from rlhf.data.prepare import prepare
from rlhf.data.sources import SAMPLE_NAME, load_source

ROOT = Path(__file__).parent.parent


def pipeline(folder):
    command = [str(ROOT / "launch" / "pipeline.sh"), str(ROOT / "configs" / "quickstart")]
    started = time.time()
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, time.time() - started


def answer_logp(model, tokenizer, prompt, answer):
    """Sum of log p(token | before) over an answer's tokens, by the shortest way there is."""
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(prompt + answer, return_dict=True)["input_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logps[i - 1, whole[i]]) for i in range(len(start), len(whole)))


def recomputed(pairs, answers):
    """What the quickstart claims, from the lines that it wrote: (chosen loss of SFT, of DPO, win rate, its low end)."""
    losses = [
        -sum(p[name]["chosen"] for p in pairs) / sum(p[name]["chosen_tokens"] for p in pairs) for name in ("sft", "dpo")
    ]
    wins = [0.5 * ((a["dpo_reward"] > a["sft_reward"]) + (a["dpo_reward"] >= a["sft_reward"])) for a in answers]
    share, z, n = sum(wins) / len(wins), 1.96, len(wins)
    low = (share + z * z / (2 * n) - z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))) / (1 + z * z / n)
    return *losses, share, low


def test_recomputed():
    """3 wins and a tie of 4: 3.5 / 4; low = (0.875 + 0.4802 - 1.96 * sqrt(0.10938 / 4 + 0.06002)) / 1.9604 = 0.3958."""
    side = {"chosen": -3.0, "chosen_tokens": 2}
    pairs = [{"sft": side, "dpo": {"chosen": -2.0, "chosen_tokens": 2}}] * 2
    answers = [{"dpo_reward": 1.0, "sft_reward": 0.0}] * 3 + [{"dpo_reward": 0.5, "sft_reward": 0.5}]
    assert recomputed(pairs, answers) == pytest.approx((1.5, 1.0, 0.875, 0.3958), abs=1e-4)


def trained_prompts(folder):
    return set(np.fromfile(folder / "prompts.hashes", ">u8").tolist())


@pytest.mark.slow
def test_the_quickstart(tmp_path):
    shown, whole = pipeline(tmp_path)
    run = tmp_path / "runs" / "quickstart"
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert results["policies"]["sft"]["chosen_loss"] < results["policies"]["base"]["chosen_loss"] - 0.1
    assert results["reward"]["accuracy"]["low"] > 0.5  # better than guessing, with its whole interval
    assert results["dpo"]["accuracy"]["low"] > 0.5
    sft, dpo = results["policies"]["sft"], results["policies"]["dpo"]
    assert dpo["prefers_chosen"]["share"] >= sft["prefers_chosen"]["share"]
    assert dpo["prefers_chosen_per_token"]["share"] > sft["prefers_chosen_per_token"]["share"]
    pairs, answers = (
        [json.loads(line) for line in (run / "evaluation" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("pairs", "answers")
    )
    assert len(pairs) == len(answers) == 137
    sft_loss, dpo_loss, win_rate, low = recomputed(pairs, answers)
    assert (sft["chosen_loss"], dpo["chosen_loss"]) == pytest.approx((sft_loss, dpo_loss))
    assert (results["win_rate"]["share"], results["win_rate"]["low"]) == pytest.approx((win_rate, low), abs=1e-5)
    assert dpo_loss <= sft_loss  # the chosen answers did not become less likely
    assert low > 0.5  # DPO's answers are better than SFT's ...
    # ... by a judge that has seen none of the policy's pairs
    assert trained_prompts(run / "sft") == trained_prompts(run / "dpo")
    assert len(trained_prompts(run / "dpo")) == 113 and len(trained_prompts(run / "reward")) == 121
    assert not trained_prompts(run / "dpo") & trained_prompts(run / "reward")
    assert "trained on other data than DPO" in " ".join(shown.split())
    seconds = {
        stage: json.loads((run / stage / "complete.json").read_text())["seconds"] for stage in ("sft", "reward", "dpo")
    }
    print(f"seconds to train: {seconds}; the whole pipeline: {whole:.0f}")
    for part in (
        "On 137 held-out pairs",
        "SFT loss on chosen answers",
        "DPO answer beats SFT answer",
        "Report    ",
        "talk to it",
    ):
        assert part in shown
    assert "<h2>Answers side by side</h2>" in (run / "report.html").read_text()

    # the printed numbers again, from the saved models, by hand
    sample = load_source(SAMPLE_NAME, "all")
    sides = held_out(prepare(sample, "pairs").rows.column("opening"), 0.4).tolist()
    rows = [row for row, side in zip(sample.rows, sides, strict=True) if side][:10]
    for name in ("sft", "dpo"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(run / name), AutoTokenizer.from_pretrained(run / name)
        for row, pair in zip(rows, pairs, strict=False):
            for side in ("chosen", "rejected"):
                assert pair[name][side] == pytest.approx(
                    answer_logp(model, tokenizer, row["prompt"], row[side]), rel=1e-4
                )
    model = AutoModelForSequenceClassification.from_pretrained(run / "reward")
    tokenizer = AutoTokenizer.from_pretrained(run / "reward")
    for row, pair in zip(rows, pairs, strict=False):
        ids = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], return_dict=True, return_tensors="pt")
        with torch.no_grad():
            assert pair["reward"]["chosen"] == pytest.approx(float(model(**ids).logits), abs=1e-3)

    again, _ = pipeline(tmp_path)
    assert "===" not in again and again.count(" complete: ") >= 4
