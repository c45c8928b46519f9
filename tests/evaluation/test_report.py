"""The report: self-contained, escaped, and it says what the files say."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from rlhf.__main__ import main
from rlhf.evaluation.finished_runs import levels, select_runs, start_of
from rlhf.evaluation.plots import points_of, running_mean, ties_note
from rlhf.evaluation.report import data_statistics, environments
from rlhf.evaluation.statistics import summarise

ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"


def pair(row, sft, dpo, reward):
    logps = [{"chosen": c, "rejected": r, "chosen_tokens": 10, "rejected_tokens": 8} for c, r in (sft, dpo)]
    prompt = [{"role": "user", "content": ATTACK}]
    base = {"chosen": -30.0, "rejected": -20.0, "chosen_tokens": 10, "rejected_tokens": 8}
    return {"row": row, "prompt": prompt, "base": base, "sft": logps[0], "dpo": logps[1],
            "reward": dict(zip(("chosen", "rejected"), reward, strict=True))}  # fmt: skip


WITH_PLOTS = ("test_it_shows_every_part", "test_nothing_is_loaded_from_anywhere", "test_hostile_text_stays_text")


@pytest.fixture(autouse=True)
def plots_only_where_they_are_looked_at(request, monkeypatch):
    """matplotlib takes half a second a report."""
    if request.node.name not in WITH_PLOTS:
        monkeypatch.setattr("rlhf.evaluation.report.draw", lambda stage: ["<svg></svg>"])


def write_run(folder, stage, recipe=None, inputs=None, digest=None, **provenance):
    """The files of a finished run with hostile text in every place that is shown."""
    folder.mkdir(parents=True)
    recipe = {"stage": stage, "model_name_or_path": ATTACK, "dataset_name": "embedded:sample", "output_dir": str(folder),
              **(recipe or {})}  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = {
        "stage": stage, "recipe": "configs/quickstart/x.yaml", "command": ["rlhf", stage, ATTACK], "versions": {"trl": ATTACK},
        "hardware": {"cpus": 2, "memory_gib": 24.0, "processes": 1, "platform": ATTACK}, "git_commit": ATTACK,
        "inputs": inputs or {}, "arguments": {"learning_rate": 3e-4, "lr_scheduler_type": "cosine"}, **provenance,
    }  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps(found))
    complete = {
        "steps": 3,
        "seconds": 60,
        "train_examples": 9,
        "weights_sha256": digest or f"{stage}-weights",
        "pairs": 2,
    }
    (folder / "complete.json").write_text(json.dumps(complete))
    lines = [{"step": s, "loss": 0.7 - s / 10, "rewards/margins": s / 10, "accuracy": 0.5} for s in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_evaluation(folder, models, digests):
    """An evaluation of models by key; the digests are those it measured."""
    names = {key: str(name) for key, name in models.items()}
    write_run(folder, "evaluate", names | {"model_name_or_path": None}, digests)
    pairs = [pair(0, (-20, -18), (-18, -19), (1, 0)), pair(1, (-25, -18), (-29, -18), (2, -1))]
    answers = [
        {"row": i, "prompt": [{"role": "user", "content": ATTACK}], "base": ATTACK, "sft": ATTACK, "dpo": ATTACK,
         "base_reward": 0.0, "sft_reward": 0.25, "dpo_reward": 0.5} for i in range(2)
    ]  # fmt: skip
    del answers[1]["base"]
    answers[0]["dpo_cut"] = True
    answers[1]["dpo_cut"] = False
    (folder / "results.json").write_text(json.dumps(summarise(pairs, answers, 0.1) | {"max_new_tokens": 8}))
    (folder / "answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))


@pytest.fixture
def run(tmp_path):
    """SFT, a reward model and DPO from it, and their evaluation."""
    sft = write_run(tmp_path / "sft", "sft", inputs={"dataset_name": "d" * 64})
    after = {
        "recipe": {"model_name_or_path": str(sft)},
        "inputs": {"model_name_or_path": "sft-weights", "dataset_name": "d" * 64},
    }
    write_run(tmp_path / "reward", "reward", **after)
    write_run(tmp_path / "dpo", "dpo", **after)
    models = {f"{stage}_model": tmp_path / stage for stage in ("sft", "reward", "dpo")}
    write_evaluation(tmp_path / "evaluate", models, {key: f"{path.name}-weights" for key, path in models.items()})
    return tmp_path


def report_on(folder):
    assert main(["report", str(folder)]) == 0
    return (folder / "report.html").read_text()


def train_again(folder):
    complete = json.loads((folder / "complete.json").read_text())
    (folder / "complete.json").write_text(json.dumps(complete | {"weights_sha256": "other weights"}))


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
        "Results on 2 pairs (not checked whether a model was trained on them)",
        "Training",
        "Answers side by side",
        "Data",
        "Environment",
        "Repeat it",
    ):
        assert f"<h2>{part}</h2>" in text
    assert text.count("<svg") == 1 + 2 + 2  # SFT: loss; reward: loss, accuracy; DPO: loss, implicit rewards
    assert "SFT loss on chosen answers" in text and "DPO loss on chosen answers" in text
    assert "<th></th>" not in text and "unit or 95%" in text
    assert "1 more prompt<" in text
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
    assert list(select_runs(recipes).stages) == ["sft", "dpo"]  # what DPO was trained from belongs to it


@pytest.mark.parametrize("target", ["nowhere", "."])
def test_no_run(target, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", target]) == 2
    assert ("no folder at 'nowhere'" if target == "nowhere" else "'.' holds no run") in capsys.readouterr().err


def test_running_mean():
    assert running_mean((1, 2, 3, 4), 2) == [1, 1.5, 2.5, 3.5]


def test_the_sample_statistics_are_counted():
    from rlhf.data.sources import SAMPLE_DIR

    stage = {"recipe": {"dataset_name": "embedded:sample", "dataset_test_split": "heldout"}}
    train, heldout = data_statistics({"dpo": stage})
    lines = (Path(SAMPLE_DIR) / "heldout.jsonl").read_text().splitlines()
    assert heldout["pairs"] == len(lines) and sum(train["tasks"].values()) == train["pairs"] >= 200


# --- no statement that may be untrue ---------------------------------------------------------------------------------


def test_results_of_a_run_that_was_trained_again_are_not_shown(run, capsys):
    train_again(run / "dpo")
    text = report_on(run)
    assert "Results on" not in text and "Answers side by side" not in text
    assert f"dpo_model: {run / 'dpo'} was trained again after it was evaluated" in text
    assert "warning: the results are not shown: dpo_model" in capsys.readouterr().out


def test_results_of_weights_that_were_not_recorded_are_not_shown(run):
    provenance = json.loads((run / "evaluate" / "provenance.json").read_text())
    del provenance["inputs"]["sft_model"]
    (run / "evaluate" / "provenance.json").write_text(json.dumps(provenance))
    assert "did not record which weights" in report_on(run)


def test_runs_are_not_mixed(run, tmp_path, capsys):
    """A folder with an evaluation and another DPO run: the results stand beside the curves that they belong to."""
    write_run(tmp_path / "z-later", "dpo", {"beta": 0.5}, digest="z")
    selection = select_runs(run)
    assert selection.stages["dpo"]["folder"] == str(run / "dpo") and not selection.stale
    text = report_on(run)
    assert "<h2>Comparison: DPO</h2>" in text and "<th>beta</th>" in text
    assert f"chat {run / 'dpo'}" in capsys.readouterr().out


def test_an_evaluation_is_followed_to_runs_elsewhere(run, tmp_path):
    alone = tmp_path / "runs" / "ev2"
    models = {"sft_model": run / "sft", "dpo_model": run / "dpo"}
    write_evaluation(alone, models, {"sft_model": "sft-weights", "dpo_model": "dpo-weights"})
    tb = write_run(tmp_path / "runs" / "tb", "dpo", digest="tb")
    selection = select_runs(tmp_path / "runs")
    assert selection.stages["dpo"]["folder"] == str(run / "dpo") and list(selection.stages) == [
        "sft",
        "dpo",
        "evaluate",
    ]
    assert selection.unshown == [(str(tb), "DPO: the evaluation did not measure it")]
    assert f"<code>{tb}</code> DPO: the evaluation did not measure it" in report_on(tmp_path / "runs")


def test_a_sweep_is_a_table_and_nothing_vanishes(run, tmp_path):
    for beta in (0.1, 0.3):
        folder = write_run(tmp_path / "sweep" / f"b{beta}", "dpo", {"beta": beta}, digest=f"b{beta}")
        models = {"sft_model": run / "sft", "dpo_model": folder}
        digests = {"sft_model": "sft-weights", "dpo_model": f"b{beta}"}
        write_evaluation(tmp_path / "sweep" / f"e{beta}", models, digests)
    train_again(tmp_path / "sweep" / "b0.3")
    text = report_on(tmp_path / "sweep")
    assert "Results on" not in text and "<h2>Training</h2>" not in text  # whose?
    rows = re.findall(r"<tr><td>[^<]*/sweep/(b0..)</td><td>(.*?)</td>.*?<td>([^<]*)</td></tr>", text)
    assert [(name, beta) for name, beta, _ in rows] == [("b0.1", "0.1"), ("b0.3", "0.3")]
    assert "accuracy" in rows[0][2] and "wins" in rows[0][2] and rows[1][2].startswith("trained again after")
    for folder in (tmp_path / "sweep").iterdir():
        assert folder.name in text or folder.name == "report.html"


def test_two_evaluations_of_one_run_are_both_told(run, tmp_path):
    models = {"sft_model": run / "sft", "dpo_model": run / "dpo"}
    write_evaluation(tmp_path / "second", models, {"sft_model": "sft-weights", "dpo_model": "dpo-weights"})
    text = report_on(run)
    assert "<h2>Comparison: DPO</h2>" in text and "Results on" not in text
    assert text.count("rlhf report") == 2  # each alone


def test_a_run_that_cannot_be_read_is_listed(run):
    (run / "broken").mkdir()
    (run / "broken" / "recipe.yaml").write_text("a: [")
    assert f"<code>{run / 'broken'}</code> its recipe.yaml or provenance.json can&#39;t be read" in report_on(run)


def test_one_run_is_reported_in_its_own_folder(run):
    assert "Lineage" in report_on(run / "dpo") and not (run / "report.html").exists()
    assert list(select_runs(run / "dpo").stages) == ["sft", "dpo"]  # what it was trained from belongs to it


def test_reward_model_and_dpo_both_come_from_sft(run):
    stages = select_runs(run).stages
    assert levels(stages) == [["sft"], ["reward", "dpo"], ["evaluate"]]
    assert start_of(stages["dpo"], stages) == ("sft", f"SFT ({run / 'sft'})")
    train_again(run / "sft")
    stages = select_runs(run).stages
    assert start_of(stages["dpo"], stages) == (None, f"{run / 'sft'}, which has been trained again since")


def test_dpo_from_the_reward_models_base_is_not_drawn_from_sft(tmp_path):
    for stage in ("sft", "dpo"):
        write_run(tmp_path / stage, stage)
    assert levels(select_runs(tmp_path).stages) == [["sft", "dpo"]]


def test_the_judge_is_not_called_this_runs_own(run):
    text = report_on(run)
    assert f"The judge of the win rate is {run / 'reward'}, trained on the same data as DPO" in text
    assert "reward model of this run" not in text


def test_what_got_worse_and_what_was_cut_are_told(run):
    text = report_on(run)
    assert "What got worse: " in text and "marked unclear" in text
    assert "1 of 2 of DPO" in text and "&amp; …</div>" in text  # ATTACK ends with &, and was cut


def test_hyper_parameters_and_digests_stand_in_the_boxes(run):
    text = report_on(run)
    assert "<dt>learning rate</dt><dd>0.0003, cosine</dd>" in text
    assert f"<dt>data sha256</dt><dd>{'d' * 16}</dd>" in text


def test_ties_of_the_first_steps_are_left_out():
    """As the quickstart logs it: the learning rate of step 1 is 0 under a warm-up, so step 2 is all ties too."""
    zero = {"rewards/chosen": 3e-7, "rewards/rejected": 0.0, "rewards/margins": -1e-7}
    lines = [{"step": s, "rewards/accuracies": a, **zero} for s, a in ((1, 0.0), (2, 0.25))]
    lines.append({"step": 3, "rewards/accuracies": 0.5, **zero, "rewards/margins": 0.005})
    assert points_of({"metrics": lines}, "rewards/accuracies") == [(3, 0.5)]
    assert len(points_of({"metrics": lines}, "rewards/margins")) == 3
    assert ties_note({"metrics": lines}).startswith("DPO's accuracy is drawn from step 3")
    assert "is not drawn" in ties_note({"metrics": lines[:2]})
    assert "over steps 1 to 10, is too low" in ties_note({"metrics": [{"step": 10, "rewards/accuracies": 0.6}]})
    assert ties_note({"metrics": []}) == ""


def test_data_that_has_changed_is_not_counted():
    stage = {"recipe": {"dataset_name": "embedded:sample"}, "provenance": {"inputs": {"dataset_name": "another"}}}
    assert data_statistics({"dpo": stage}) == [{"split": "train", "gone": "has changed since the run read it"}]


def test_data_is_counted_as_far_as_it_was_used():
    stage = {"recipe": {"dataset_name": "embedded:sample", "max_train_examples": 5}}
    assert data_statistics({"dpo": stage})[0]["pairs"] == 5


def test_a_mix_is_counted_with_what_is_held_out_of_it(tmp_path):
    rows = [{"prompt": f"q {n}", "chosen": "one two three", "rejected": "one"} for n in range(40)]
    for name, part in (("a", rows[:30]), ("b", rows[30:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = [str(tmp_path / "a.jsonl"), {"name": str(tmp_path / "b.jsonl"), "epochs": 2}]
    stage = {"recipe": {"dataset_name": files, "heldout": 0.25}}
    train, heldout = data_statistics({"dpo": stage})
    assert heldout["split"] == "held out" and 0 < heldout["pairs"] < 20
    from_b = train["pairs"] + heldout["pairs"] - 40  # those that are there twice
    assert 0 < from_b <= 10 and train["mean_words"]["chosen"] == 3 and train["rejected_shorter"] == 1
    assert [line.startswith("mix: ") for line in train["about"]] == [True, True] and "each 2.00 times" in train[
        "about"
    ][1]
    stage["provenance"] = {"inputs": {"dataset_name": "another"}}
    assert data_statistics({"dpo": stage})[0] == {
        "split": train["split"], "gone": "has changed since the run read it",
    }  # fmt: skip
    (tmp_path / "b.jsonl").unlink()
    assert data_statistics({"dpo": stage}) == [{"split": train["split"], "gone": "can no longer be read"}]


def test_stages_of_two_machines_have_two_environments(run):
    write = run / "dpo" / "provenance.json"
    provenance = json.loads(write.read_text())
    write.write_text(json.dumps(provenance | {"versions": {"trl": "9"}}))
    assert [e["titles"] for e in environments(select_runs(run).stages)] == [
        ["SFT", "Reward model", "Evaluation"],
        ["DPO"],
    ]


def test_repeat_it_says_what_is_missing(run):
    write = run / "dpo" / "provenance.json"
    provenance = json.loads(write.read_text())
    hardware = provenance["hardware"] | {"processes": 4}
    write.write_text(json.dumps(provenance | {"command": ["__main__.py", "dpo", "x.yaml"], "hardware": hardware}))
    text = report_on(run)
    assert "<pre>rlhf dpo x.yaml</pre>" in text and "__main__" not in text
    assert "DPO: it was started by a launcher whose flags were not recorded" in text
