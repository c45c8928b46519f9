"""Rounds of DPO on the policy's own answers: through launch/pipeline.sh on tiny models, and step by step."""

import json
from pathlib import Path

import pytest
import yaml
from pipelines import pipeline, write_recipes

from rlhf.__main__ import main
from rlhf.data.rows import read_data
from rlhf.errors import UserError
from rlhf.rounds.compare import Result, best, read_result, table, why_stop
from rlhf.rounds.plan import load_rounds
from rlhf.runs.metrics import read_metrics

ROOT = Path(__file__).parent.parent.parent
ROUNDS = {
    "stage": "rounds",
    "max_prompts": 6,
    "num_answers": 3,
    "max_new_tokens": 8,
    "keep_cut": True,
    "min_gain": -1.0,
}
STEPS = ["round 1, evaluation", "round 2, answers and their labels", "round 2, DPO", "round 2, evaluation",
         "round 3, answers and their labels", "round 3, DPO", "round 3, evaluation"]  # fmt: skip


@pytest.fixture
def recipes(tiny_llama, tmp_path, monkeypatch):
    """The quickstart's own recipes with a tiny model in place of the real one, and rounds.yaml."""
    folder = write_recipes(tmp_path / "recipes", tiny_llama)
    (folder / "rounds.yaml").write_text(yaml.safe_dump(ROUNDS))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.slow
def test_three_rounds(recipes):
    """On two processes; the same command again finds nothing to do."""
    launch = (str(ROOT / "launch" / "ddp.yaml"), "--num_processes", "2")
    shown = pipeline(recipes, *launch, "--rounds", "3")
    home = recipes.parent / "runs" / "quickstart" / "rounds"
    assert [line.split(" (of")[0] for line in shown.splitlines() if line.startswith("=== Rounds: round")] == [
        f"=== Rounds: {step}" for step in STEPS[1:]
    ]
    record = json.loads((home / "rounds.json").read_text())
    assert [r["round"] for r in record["rounds"]] == [1, 2, 3] and record["stopped"] == "all 3 rounds are done"
    for found in record["rounds"][1:]:
        place = home / f"round-{found['round']}"
        pairs = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
        assert found["pairs"] == len(pairs) and all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs)
        answers = [json.loads(line) for line in (place / "evaluation" / "answers.jsonl").read_text().splitlines()]
        wins = [(a["dpo_reward"] > a["sft_reward"]) + 0.5 * (a["dpo_reward"] == a["sft_reward"]) for a in answers]
        assert found["share"] == sum(wins) / len(wins)
        assert sum("loss" in row for row in read_metrics(place / "dpo")) == 2
    # against SFT: a policy that starts from the last one is not its reference any more
    second = yaml.safe_load((home / "round-2" / "dpo.yaml").read_text())
    assert second["model_name_or_path"] == "runs/quickstart/dpo" and second["reference_model"] == "runs/quickstart/sft"
    assert "heldout" not in second and second["dataset_name"].endswith("round-2/pairs.jsonl")
    # no held-out prompt is answered
    data = read_data(load_rounds(str(recipes)).dpo, "pairs")
    asked = {json.loads(line)["prompt"][-1]["content"] for line in (home / "prompts.jsonl").read_text().splitlines()}
    assert len(asked) == 6 and asked <= {row["prompt"][-1]["content"] for row in data.train}
    assert not asked & {row["prompt"][-1]["content"] for row in data.heldout}

    again = pipeline(recipes, *launch, "--rounds", "3")
    assert "===" not in again and "rounds: complete" in again


def test_each_start_runs_the_next_step(recipes, capsys):
    """The steps of a policy that is there; a rate that does not rise ends them; changed recipes are refused."""
    assert main(["rounds", str(recipes), "--status"]) == 3
    assert "next is round 1, DPO" in capsys.readouterr().out
    for stage in ("sft", "reward"):
        assert main([stage, str(recipes / f"{stage}.yaml")]) == 0
    for step in ("round 1, DPO", *STEPS[:3]):
        capsys.readouterr()
        assert main(["rounds", str(recipes), "--min_gain", "1", "--start_from", "start", "--reference", "start"]) == 0
        assert f"=== Rounds: {step}" in capsys.readouterr().out
    home = Path("runs/quickstart/rounds")
    second = yaml.safe_load((home / "round-2" / "dpo.yaml").read_text())
    assert second["model_name_or_path"] == "runs/quickstart/sft" and "reference_model" not in second
    assert read_metrics(home / "round-2" / "dpo")[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)

    # neither the prompts nor the recipe of a round that has begun are written again from others
    assert main(["rounds", str(recipes), "--status", "--max_prompts", "5"]) == 2
    assert "prompts.jsonl was written with other values of max_prompts; set them back" in capsys.readouterr().err
    assert (
        main(["rounds", str(recipes), "--min_gain", "1", "--start_from", "start", "--reference", "last"]) == 0
    )  # the evaluation
    shown = capsys.readouterr().out
    assert "=== Rounds: the win rate no longer rises" in shown and "The best is round" in shown
    assert main(["rounds", str(recipes), "--min_gain", "1", "--status"]) == 0
    for stage in ("dpo", "evaluation"):
        (home / "round-2" / stage / "complete.json").unlink()
    assert main(["rounds", str(recipes), "--min_gain", "1", "--start_from", "last"]) == 2
    assert (
        "round-2/dpo.yaml was written from other recipes (model_name_or_path, reference_model); set them back"
        in capsys.readouterr().err
    )


BAD = {
    "no dpo.yaml": (lambda folder: (folder / "dpo.yaml").unlink(), "has no dpo.yaml"),
    "no judge": (lambda folder: change(folder / "evaluate.yaml", reward_model=None), "evaluate.yaml: key 'reward_model' is missing"),
    "another policy": (lambda folder: change(folder / "evaluate.yaml", dpo_model="runs/x"), "dpo_model is runs/x, and dpo.yaml writes"),
    "one round": (lambda folder: change(folder / "rounds.yaml", num_rounds=1), "num_rounds"),
    "unknown key": (lambda folder: change(folder / "rounds.yaml", answers=3), "unknown key 'answers'; did you mean 'num_answers'?"),
    "nf4": (lambda folder: change(folder / "dpo.yaml", reference="nf4"), "take an exact one"),
    "no labels": (lambda folder: [(folder / "reward.yaml").unlink(), change(folder / "evaluate.yaml", reward_model=None)], "no reward model labels the answers"),
}  # fmt: skip


def change(file, **values):
    found = yaml.safe_load(file.read_text()) | values
    file.write_text(yaml.safe_dump({key: value for key, value in found.items() if value is not None}))


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_found_before_anything_runs(case, recipes, capsys):
    spoil, says = BAD[case]
    spoil(recipes)
    for word in ("--check", "--status"):
        assert main(["rounds", str(recipes), word]) == 2
        assert says in capsys.readouterr().err


def test_which_reference_a_round_has(recipes):
    """Where dpo.yaml names a reference of its own, `last` replaces it, and `start` keeps it."""
    change(recipes / "dpo.yaml", reference_model="runs/own", reference="cached")
    for start_from, reference, found in (
        ("last", "start", "runs/own"), ("last", "last", None), ("start", "start", "runs/own"), ("start", "last", "runs/quickstart/dpo"),
    ):  # fmt: skip
        rounds = load_rounds(str(recipes), ["--start_from", start_from, "--reference", reference])
        assert rounds.dpo_values(2).get("reference_model") == found


def test_a_misspelt_file_is_not_taken_for_none(recipes, capsys):
    assert main(["rounds", str(recipes / "round.yaml"), "--check"]) == 2
    assert "round.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["1", "no", ""])
def test_the_number_of_rounds(number, recipes):
    assert "--rounds takes a number from 2 on" in pipeline(recipes, "--rounds", number, code=2)


# --- what is compared ------------------------------------------------------------------------------------------------


def result(number, share):
    return Result(number, f"p{number}", None, share, share - 0.1, share + 0.1, 20.0, 18.0, 0.5, 2.5)


@pytest.mark.parametrize(
    "shares, min_gain, stop, winner",
    [
        ([], 0.0, "", None),
        ([0.56], 0.0, "", 1),
        ([0.56, 0.61], 0.0, "", 2),
        ([0.56, 0.61, 0.60], 0.0, "the win rate no longer rises: 60.0% in round 3 after 61.0%", 2),
        ([0.56, 0.56], 0.0, "the win rate no longer rises: 56.0% in round 2 after 56.0%", 1),
        ([0.56, 0.57], 0.02, "the win rate no longer rises: 57.0% in round 2 after 56.0% (min_gain is 0.02)", 2),
        ([0.5, 0.6, 0.7, 0.8], 0.0, "all 4 rounds are done", 4),
    ],
)
def test_when_rounds_stop(shares, min_gain, stop, winner):
    results = [result(number, share) for number, share in enumerate(shares, 1)]
    assert why_stop(results, 4, min_gain) == stop
    assert not results or best(results).round == winner
    assert len(table(results)) == 1 + len(results) and all(len(line) <= 100 for line in table(results))


@pytest.mark.parametrize("text", ["", "{", "{}", '{"win_rate": {"share": 0.5}}', '{"win_rate": null}'])
def test_a_damaged_result_is_named(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match="has no win rate"):
        read_result(1, tmp_path, "p", tmp_path / "pairs.jsonl")
