"""`rlhf evaluate` of a reward model alone: subsets, calibration, length bias and RewardBench in files, on the screen, in the
report and in the card, each number recomputed from what is written per pair."""

import json
import math
from pathlib import Path

import pytest

from rlhf.__main__ import main
from rlhf.evaluation.plots import draw_length_bias, draw_reliability
from rlhf.files import read_json_lines
from rlhf.runs.measure_tables import tables

ROW_1 = {"prompt": "Hi?", "chosen": "Hello!", "rejected": "No.", "subset": "donotanswer"}
ROW_2 = {
    "id": "12",
    "prompt": "2 + 2?",
    "chosen": ["4"],
    "rejected": ["5", "3", "2"],
    "num_correct": 1,
    "subset": "Math",
}
TIED = ROW_2 | {"id": "tied:0", "chosen": ["red", "blue"], "rejected": ["four"], "num_correct": 2, "subset": "Ties"}


@pytest.fixture(scope="module")
def reward_model(tiny_llama, tmp_path_factory):
    """A reward model that nobody has trained, so that it is right now and then."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("reward") / "model"
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def done(reward_model, few_pairs, recipe_in, tmp_path_factory):
    """An evaluation: (its folder, its recipe, what it printed is in `shown.txt`)."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("measures")
    rows = [json.loads(line) for line in Path(few_pairs).read_text().splitlines()] * 2
    data = folder / "pairs.jsonl"
    lines = [
        {k: v for k, v in row.items() if k != "task"} | {"subset": ["easy", "hard"][i % 2]}
        for i, row in enumerate(rows)
    ]
    lines[0].pop("subset")
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = [
        ROW_1 | {"id": i, "subset": s, "chosen": f"Yes {i}."}
        for i, s in enumerate(["donotanswer", "math-prm", "hep-go"] * 3)
    ]
    (folder / "rb1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in first))
    second = [
        ROW_2,
        ROW_2 | {"id": "13", "prompt": "3 + 3?"},
        TIED | {"id": "ref:0", "chosen": ["red"], "num_correct": 1},
        TIED,
    ]
    (folder / "rb2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in second))
    file = recipe_in(folder, "evaluate", reward_model=reward_model, dataset_name=str(data), output_dir=str(folder / "out"),
                     reward_benchmarks=[str(folder / "rb1.jsonl"), str(folder / "rb2.jsonl")])  # fmt: skip
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert main(["evaluate", file]) == 0
    return folder / "out", file, shown.getvalue()


@pytest.fixture(scope="module")
def results(done):
    return json.loads((done[0] / "results.json").read_text())


@pytest.fixture(scope="module")
def scores(done):
    return [pair["reward"] for pair in read_json_lines(done[0] / "pairs.jsonl")]


def test_accuracy_by_subset_is_that_of_the_pairs(done, results):
    pairs = list(read_json_lines(done[0] / "pairs.jsonl"))
    for entry in results["reward"]["subsets"]:
        name = None if entry["subset"] == "(none)" else entry["subset"]
        right = [p["reward"]["chosen"] > p["reward"]["rejected"] for p in pairs if p.get("subset") == name]
        assert (entry["share"], entry["count"]) == (pytest.approx(sum(right) / len(right)), len(right))
    assert {e["subset"]: e["count"] for e in results["reward"]["subsets"]} == {"(none)": 1, "easy": 11, "hard": 12}


def test_the_column_is_used_and_not_listed_as_unused(done):
    assert "columns not used: failure, id" in done[2]


def test_lengths_are_those_of_the_reward_models_tokens(done, results, scores, reward_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    rows = [json.loads(line) for line in (done[0].parent / "pairs.jsonl").read_text().splitlines()]
    for row, score in zip(rows, scores, strict=True):
        lengths = [
            len(tokenizer.apply_chat_template([*row["prompt"], *row[side]], return_dict=True)["input_ids"])
            for side in ("chosen", "rejected")
        ]
        assert score["longer"] == lengths[0] - lengths[1]
    longer = [s for s in scores if s["longer"] > 0]
    right = sum(s["chosen"] > s["rejected"] for s in longer)
    assert results["reward"]["length"]["chosen_longer"]["share"] == pytest.approx(right / len(longer))


def test_calibration_error_is_that_of_the_pairs(results, scores):
    bins = {}
    for s in scores:
        margin = s["chosen"] - s["rejected"]
        sure = 1 / (1 + math.exp(-abs(margin)))
        bins.setdefault(min(int((sure - 0.5) * 20), 9), []).append((margin > 0) - sure)
    expected = sum(abs(sum(gaps)) for gaps in bins.values()) / len(scores)
    assert results["reward"]["calibration"]["error"]["value"] == pytest.approx(expected)
    assert results["reward"]["calibration"]["loss"] == pytest.approx(results["reward"]["loss_after"])


def test_reward_bench_sections_are_those_of_the_written_scores(done, results):
    lines = [
        line for line in read_json_lines(done[0] / "reward_benchmarks.jsonl") if line["benchmark"].endswith("rb1.jsonl")
    ]
    right = {
        s: [x["chosen"][0] > x["rejected"][0] for x in lines if x["subset"] == s]
        for s in ("donotanswer", "math-prm", "hep-go")
    }
    share = {s: sum(values) / len(values) for s, values in right.items()}
    found = results["reward_benchmarks"][0]
    expected = {
        "Safety": share["donotanswer"],
        "Reasoning": (984 * share["math-prm"] + 164 * share["hep-go"]) / (984 + 164),
    }
    assert {s["name"]: s["share"] for s in found["sections"]} == pytest.approx(expected)
    assert found["average"]["share"] == pytest.approx(sum(expected.values()) / 2)
    assert found["missing"] == ["Chat", "Chat Hard"] and found["cut"] == 0


def test_a_score_of_a_benchmark_is_the_models_own(done, reward_model):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(reward_model).eval(),
        AutoTokenizer.from_pretrained(reward_model),
    )
    lines = [line for line in read_json_lines(done[0] / "reward_benchmarks.jsonl") if line["id"] == "12"]
    for text, score in zip(
        [*ROW_2["chosen"], *ROW_2["rejected"]], [*lines[0]["chosen"], *lines[0]["rejected"]], strict=True
    ):
        messages = [{"role": "user", "content": ROW_2["prompt"]}, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert score == pytest.approx(model(ids).logits.item(), abs=1e-4)


def test_best_of_four_and_ties_stand_in_the_second(results):
    found = results["reward_benchmarks"][1]
    assert found["version"] == 2 and [s["name"] for s in found["sections"]] == ["Math", "Ties"]
    assert found["missing"] == ["Factuality", "Precise IF", "Safety", "Focus"]


def test_the_screen_has_all_tables(done):
    for text in ("The reward model's scores, on 24 pairs", "calibration error (ECE)", "prefers the longer",
                 "The reward model's accuracy by subset", "RewardBench (rb1.jsonl)", "RewardBench 2 (rb2.jsonl)", "Ties"):  # fmt: skip
        assert text in done[2]


def test_the_same_command_shows_them_again_and_measures_nothing(done, capsys, monkeypatch):
    monkeypatch.setattr("rlhf.evaluation.extras.load_model", lambda *args: pytest.fail("a model was loaded"))
    assert main(["evaluate", done[1]]) == 0
    assert "RewardBench 2 (rb2.jsonl)" in capsys.readouterr().out


def test_another_benchmark_file_is_another_evaluation(done, capsys):
    file = done[0].parent / "rb1.jsonl"
    before = file.read_text()
    file.write_text(before.replace("Yes 0.", "Yes!"))
    try:
        assert main(["evaluate", done[1]]) == 2
    finally:
        file.write_text(before)
    assert "rb1.jsonl" in capsys.readouterr().err


def test_the_report_has_tables_and_curves(done, capsys):
    assert main(["report", str(done[0])]) == 0
    text = (done[0] / "report.html").read_text()
    for part in ("calibration error (ECE)", "accuracy by subset", "RewardBench 2", "Is it as sure as it is right?",
                 "Does it go by length?"):  # fmt: skip
        assert part in text


def test_curves_of_few_pairs_are_drawn():
    point = {"from": 0.5, "to": 0.55, "confidence": 0.51, "share": 1.0, "low": 0.2, "high": 1.0, "count": 1}
    assert draw_reliability({"bins": [point]}).startswith("<svg")
    assert draw_length_bias([3, 3], [1.0, 2.0]).startswith("<svg")  # no line through one length
    assert draw_length_bias([3], [1.0]) == ""


@pytest.mark.parametrize(
    "low, high, chance, said",
    [
        (1.2, 3.0, 0.1, "Surer than"),
        (0.2, 0.8, 0.9, "Less sure"),  # the error is within chance, but the fit is not
        (0.5, None, 0.1, "more than chance"),
        (0.5, None, 0.9, "Calibrated as far as"),
    ],
)
def test_the_sentence_on_calibration_follows_the_interval(results, low, high, chance, said):
    calibration = results["reward"]["calibration"] | {
        "error": {"value": 0.3, "low": 0.2, "high": 0.4}, "by_chance": [0.05, chance], "temperature": 1.1,
        "temperature_low": low, "temperature_high": high, "loss_after": 0.5,
    }  # fmt: skip
    assert said in tables({"reward": {"calibration": calibration}})[0].sentence


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"reward_benchmarks": ["a.jsonl"], "sft_model": "s", "dpo_model": "d", "reward_model": None},
         "'reward_benchmarks' has no effect without reward_model"),
        ({"benchmark_limit": 3}, "'benchmark_limit' has no effect without benchmarks"),
        ({"benchmarks": ["gsm8k"]}, "'benchmarks' has no effect without base_model, sft_model or dpo_model"),
        ({"reward_benchmarks": ["a.jsonl", "a.jsonl"]}, "names one twice"),
        ({"reward_benchmarks": ["nowhere.jsonl"]}, "no data file at nowhere.jsonl"),
        ({"columns": {"subset": "category"}}, "columns: subset: there is no column"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_refused(recipe, few_pairs, reward_model, capsys, keys, said):
    values = {"reward_model": reward_model, "dataset_name": few_pairs, "output_dir": "o", **keys}
    assert main(["evaluate", recipe("evaluate", **{k: v for k, v in values.items() if v is not None}), "--check"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
