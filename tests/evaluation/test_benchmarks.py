"""Benchmarks through lm-evaluation-harness, offline, with tasks over local data: its own numbers, and paired differences."""

import importlib.util
import json
import math
import subprocess

import forked
import pytest

from rlhf.__main__ import main
from rlhf.evaluation.benchmarks import Benchmarks, compare, folder_digest, paired_difference
from rlhf.files import read_json_lines
from rlhf.runs.measure_tables import tables

# --- differences, by hand --------------------------------------------------------------------------------------------


def test_paired_difference_by_hand():
    # differences 1, 0, 0, 0: mean 0.25; squares of deviations 0.5625 + 3 * 0.0625 = 0.75, / 3 = 0.25; sqrt 0.5; / sqrt 4 = 0.25
    found = paired_difference({1: 0.0, 2: 0.0, 3: 1.0, 4: 1.0}, {1: 1.0, 2: 0.0, 3: 1.0, 4: 1.0})
    assert (found["value"], found["stderr"], found["count"], found["changed"]) == (0.25, 0.25, 4, 1)
    assert (found["low"], found["high"]) == pytest.approx((0.25 - 0.489991, 0.25 + 0.489991))


def test_items_that_both_get_wrong_do_not_widen_the_interval():
    hard = {i: 0.0 for i in range(100)}
    before, after = hard | {100: 0.0, 101: 0.0}, hard | {100: 1.0, 101: 1.0}
    paired = paired_difference(before, after)["stderr"]
    apart = math.sqrt(2 / 102 * 100 / 102 / 101)  # of `after` alone; `before` never varies
    assert paired == pytest.approx(apart, rel=1e-9)
    same = paired_difference(after, after)
    assert (same["value"], same["stderr"], same["changed"]) == (0.0, 0.0, 0)


def result(values, **more):
    samples = [{"doc_id": i, "filter": "none", "acc": value, "f1": (value, 1)} for i, value in enumerate(values)]
    mean = sum(values) / len(values)
    entry = {"alias": "t", "acc,none": mean, "acc_stderr,none": 0.1, "f1,none": 0.5, "f1_stderr,none": "N/A"}
    return {"results": {"t": entry}, "samples": {"t": samples}, "higher_is_better": {"t": {"acc": True}}, **more}


FOUND = Benchmarks(["t"], None, 4, "0.4.13")


def test_models_are_compared_with_the_one_before():
    found = compare(
        {"base": result([0, 0, 1, 1]), "sft": result([1, 0, 1, 1]), "dpo": result([1, 1, 1, 1])}, FOUND, True
    )
    accuracy = found["rows"][0]
    assert [(d["before"], d["after"], d["value"]) for d in accuracy["differences"]] == [
        ("base", "sft", 0.25),
        ("sft", "dpo", 0.25),
    ]
    assert accuracy["values"]["sft"] == {"value": 0.75, "stderr": 0.1} and accuracy["higher_is_better"] is True


def test_a_metric_that_is_no_mean_of_its_items_has_no_difference():
    found = compare({"sft": result([0, 1]), "dpo": result([1, 1])}, FOUND, False)
    assert found["rows"][1]["metric"] == "f1"
    assert found["rows"][1]["differences"] == [] and found["rows"][1]["values"]["sft"]["stderr"] is None
    text = tables({"benchmarks": found, "policies": {}})[0]
    assert text.rows[1][-2:] == ("not paired", "0") and "the first 4 items" in text.sentence


def test_a_group_stands_for_its_tasks():
    both = [
        {
            "results": {"g": {"acc,none": m}, "a": {"acc,none": a}, "b": {"acc,none": b}},
            "groups": {"g": {"acc,none": m}},
            "group_subtasks": {"g": ["a", "b"], "a": [], "b": []},
            "samples": {
                n: [{"doc_id": i, "filter": "none", "acc": v} for i, v in enumerate(vs)] for n, vs in items.items()
            },
        }
        for m, a, b, items in [
            (0.5, 0.0, 1.0, {"a": [0, 0], "b": [1, 1]}),
            (0.75, 0.5, 1.0, {"a": [1, 0], "b": [1, 1]}),
        ]
    ]
    found = compare({"sft": both[0], "dpo": both[1]}, FOUND, True)
    assert [row["task"] for row in found["rows"]] == ["g"]
    assert found["rows"][0]["differences"][0]["value"] == 0.25 and found["rows"][0]["count"] == 4


# --- before a model loads --------------------------------------------------------------------------------------------


def refused(recipe, few_pairs, tiny_llama, **keys):
    values = {"sft_model": tiny_llama, "dpo_model": tiny_llama, "dataset_name": few_pairs, "dataset_test_split": "train",
              "output_dir": "o", "benchmarks": ["own_choice"], **keys}  # fmt: skip
    return main(["evaluate", recipe("evaluate", **values), "--check"])


def test_without_the_harness_its_command_is_named(recipe, few_pairs, tiny_llama, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more)
    )
    assert refused(recipe, few_pairs, tiny_llama) == 2
    said = capsys.readouterr().err
    assert "benchmarks need lm-evaluation-harness" in said and "pip install 'rlhf-dpo[benchmarks]'" in said


def test_a_folder_of_tasks_has_a_digest(tmp_path):
    (tmp_path / "a.yaml").write_text("task: a\n")
    first = folder_digest(str(tmp_path))
    (tmp_path / "a.yaml").write_text("task: b\n")
    assert folder_digest(str(tmp_path)) != first and folder_digest(None) == folder_digest(None)


# --- with the harness ------------------------------------------------------------------------------------------------

CHOICE = """\
task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
fewshot_split: test
num_fewshot: 1
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITE = """\
task: own_write
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
WORDS = "red tan sky ash bay fig oak elm ivy fir yew gum".split()  # of one length, so that none is always likeliest
QUESTIONS = [
    {
        "question": f"Which is number {i}?",
        "choices": [WORDS[i % 12], WORDS[(5 * i + 1) % 12], WORDS[(7 * i + 2) % 12]],
        "answer": i % 3,
    }
    for i in range(21)
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="the extra `benchmarks` is not installed")
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    for name, text in (("choice.yaml", CHOICE), ("write.yaml", WRITE)):
        (folder / name).write_text(text.replace("DATA", str(folder / "data.jsonl")))
    return folder


@pytest.fixture(scope="module")
def other(tiny_llama, tmp_path_factory):
    """A second model of the same kind with other weights."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("other") / "model"
    torch.manual_seed(5)
    LlamaForCausalLM(AutoConfig.from_pretrained(tiny_llama)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def done(tasks, tiny_llama, other, few_pairs, recipe_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    file = recipe_in(folder, "evaluate", sft_model=tiny_llama, dpo_model=other, dataset_name=few_pairs,
                     dataset_test_split="train", max_eval_examples=2, max_new_tokens=2, batch_size=2, benchmark_limit=20,
                     benchmarks=["own_choice", "own_write"], benchmark_tasks=str(tasks), output_dir=str(folder / "out"))  # fmt: skip
    assert main(["evaluate", file]) == 0
    return folder / "out", file


@pytest.fixture(scope="module")
def results(done):
    return json.loads((done[0] / "results.json").read_text())["benchmarks"]


@pytest.mark.parametrize("policy", ["sft", "dpo"])
def test_the_numbers_are_those_of_the_harness_itself(results, tasks, tiny_llama, other, policy):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    own = simple_evaluate(
        HFLM(pretrained={"sft": tiny_llama, "dpo": other}[policy], device="cpu", dtype="float32", batch_size=3),
        tasks=["own_choice", "own_write"], limit=20, apply_chat_template=True, fewshot_as_multiturn=True, bootstrap_iters=1000,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )["results"]  # fmt: skip
    for row in results["rows"]:
        entry = own[row["task"]]
        assert row["values"][policy]["value"] == pytest.approx(entry[f"{row['metric']},none"])
        assert row["values"][policy]["stderr"] == pytest.approx(entry[f"{row['metric']}_stderr,none"])
    assert 0 < own["own_choice"]["acc,none"] < 1


def test_differences_are_those_of_the_items(done, results):
    lines = [line for line in read_json_lines(done[0] / "benchmarks.jsonl") if line["task"] == "own_choice"]
    changes = [line["dpo"] - line["sft"] for line in lines]
    mean = sum(changes) / len(changes)
    error = math.sqrt(sum((c - mean) ** 2 for c in changes) / (len(changes) - 1) / len(changes))
    found = results["rows"][0]["differences"][0]
    assert len(changes) == 20 and any(changes)
    assert (found["value"], found["stderr"]) == (pytest.approx(mean), pytest.approx(error))


def test_a_repeated_command_shows_them_and_loads_nothing(done, monkeypatch, capsys):
    monkeypatch.setattr("rlhf.evaluation.extras.load_model", lambda *args: pytest.fail("a model was loaded"))
    assert main(["evaluate", done[1]]) == 0
    said = capsys.readouterr().out
    assert "own_choice" in said and "exact_match" in said


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(done, tmp_path):
    """The harness sees all answers on each; the answers themselves are shared out."""
    words = ("evaluate", done[1], "--output_dir", str(tmp_path / "out"))
    run = forked.start(*forked.launch_command(2, *words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    finished = forked.finish(run)
    assert finished.returncode == 0, finished.stdout
    found = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]
    before = json.loads((done[0] / "results.json").read_text())["benchmarks"]
    assert found == before
    assert (tmp_path / "out" / "benchmarks.jsonl").read_bytes() == (done[0] / "benchmarks.jsonl").read_bytes()


def test_an_unknown_task_is_named_before_a_model_loads(tasks, recipe, few_pairs, tiny_llama, monkeypatch, capsys):
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(  # reading the harness's own 14,000 tasks takes seconds
        "rlhf.evaluation.benchmarks._manager",
        lambda names, folder: TaskManager(include_path=folder, include_defaults=False),
    )
    assert refused(recipe, few_pairs, tiny_llama, benchmarks=["own_choise"], benchmark_tasks=str(tasks)) == 2
    assert "has no task 'own_choise'; did you mean own_choice" in capsys.readouterr().err


def test_a_task_that_runs_code_of_the_model_is_refused(tasks, recipe, few_pairs, tiny_llama, tmp_path, capsys):
    folder = tmp_path / "unsafe"
    folder.mkdir()
    text = CHOICE.replace("DATA", str(tasks / "data.jsonl")).replace("own_choice", "own_code") + "unsafe_code: true\n"
    (folder / "code.yaml").write_text(text)
    assert refused(recipe, few_pairs, tiny_llama, benchmarks=["own_code"], benchmark_tasks=str(folder)) == 2
    assert "the task own_code runs code that the model has written" in capsys.readouterr().err


def test_data_that_cannot_be_read_is_one_sentence(tasks, recipe, few_pairs, tiny_llama, tmp_path, capsys):
    folder = tmp_path / "gone"
    folder.mkdir()
    (folder / "gone.yaml").write_text(
        CHOICE.replace("DATA", str(folder / "nothing.jsonl")).replace("own_choice", "own_gone")
    )
    assert refused(recipe, few_pairs, tiny_llama, benchmarks=["own_gone"], benchmark_tasks=str(folder)) == 2
    assert "the task own_gone can't be loaded: " in capsys.readouterr().err
