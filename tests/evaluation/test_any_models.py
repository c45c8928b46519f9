"""`models`, `judge` and `export`: any policies, compared by any judges, on any number of processes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import yaml

from rlhf.__main__ import main
from rlhf.config.evaluated import RewardJudge, baseline_of, judges_of, model_keys, policies_of
from rlhf.errors import UserError
from rlhf.evaluation.exports import alpaca_eval, arena_hard

SERVER = Path(__file__).with_name("openai_server.py")
KEY = "sk-never-written-98765"


# --- the keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "models, labels",
    [
        (["runs/a/dpo", "runs/b/dpo"], ["a/dpo", "b/dpo"]),
        (["runs/a/sft", "org/name"], ["a/sft", "name"]),  # `sft` is the label of sft_model
        (["sft", "x"], ["./sft", "x"]),
        ({"sft": "runs/a", "best": "runs/b"}, ["sft", "best"]),
        ({"z": "m", "dpo": "n", "base": "o"}, ["base", "dpo", "z"]),
        (["embedded:smollm2-135m-instruct", "m"], ["smollm2-135m-instruct", "m"]),
    ],
)
def test_labels(models, labels):
    assert list(policies_of({"models": models})) == labels


def test_models_stand_beside_those_of_the_stages():
    values = {"sft_model": "s", "dpo_model": "d", "reward_model": "r", "models": {"x": "m"}, "judge": ["runs/rm2", {"model": "q", "label": "Q"}]}  # fmt: skip
    assert model_keys(values) == {
        "sft_model": "s", "dpo_model": "d", "models.x": "m", "reward_model": "r", "judge.rm2": "runs/rm2", "judge.Q": "q",
    }  # fmt: skip
    assert baseline_of(values) == "sft" and baseline_of(values | {"baseline": "x"}) == "x"
    assert baseline_of({"models": ["m", "n"]}) == "m"
    assert judges_of(values)[0] == RewardJudge("rm2", "runs/rm2")


BASE = {"stage": "evaluate", "output_dir": "o", "dataset_name": "d"}
ENDPOINT = {"endpoint": "http://h/v1", "model": "m"}


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"models": []}, "expected names of models"),
        ({"models": ["a", "a"]}, "'a' is named twice"),
        ({"models": {"x": 3}}, "expected names of models, or `label: model`"),
        ({"models": {"x_cut": "m"}}, "'x_cut' can't be a label"),
        ({"models": {"prompt": "m"}}, "'prompt' can't be a label"),
        ({"models": {"sft": "m"}, "sft_model": "n"}, "models names 'sft', and so does sft_model"),
        ({"models": ["a", "b"], "baseline": "c"}, "baseline is 'c'; expected one of a, b"),
        ({"models": ["a"], "judge": "j"}, "'judge' has no effect on the answers of one model"),
        ({"models": ["a", "b"], "judge": "j", "reward_model": "j"}, "j is the reward_model, which judges already"),
        ({"models": ["a", "b"], "judge": ["j", "j"]}, "'j' is named twice"),
        ({"models": ["a", "b"], "judge": []}, "expected a reward model, an endpoint, or a list"),
        ({"models": ["a", "b"], "judge": {"model": "m", "timeout_s": 3}}, "unknown key 'timeout_s' of a reward model"),
        ({"models": ["a", "b"], "judge": ENDPOINT | {"api_key": "sk-1"}}, "a key does not belong into a recipe"),
        ({"models": ["a", "b"], "judge": ENDPOINT | {"api_key_env": "sk-1"}}, "is it the key itself?"),
        ({"models": ["a", "b"], "judge": ENDPOINT | {"endpoint": "https://u:secret@h/v1"}}, "without user, password or query"),
        ({"models": ["a", "b"], "judge": ENDPOINT | {"endpoint": "ftp://h"}}, "endpoint is 'ftp://h'; expected an address"),
        ({"models": ["a", "b"], "judge": ENDPOINT | {"retries": 1.5}}, "retries is 1.5; expected an integer from 0 to 100"),
        ({"models": ["a", "b"], "judge": ENDPOINT | {"parameters": {"n": 2}}}, "without model, messages, stream and n"),
        ({"models": ["a", "b"], "judge": ENDPOINT | {"usd_per_million_tokens": 3}}, "expected [of input, of output]"),
        ({"models": ["a", "b"], "judge": {"endpoint": "http://h/v1"}}, "judge: `model` is None; expected a name"),
        ({"models": ["a", "b"], "export": ["csv"]}, "'export' is 'csv'; expected one of alpaca_eval, arena_hard"),
        ({"models": ["a", "b"], "kl_prompts": -1}, "'kl_prompts' is -1; expected an integer from 0"),
    ],
)  # fmt: skip
def test_what_is_refused(keys, said, tmp_path, capsys):
    file = tmp_path / "evaluate.yaml"
    file.write_text(yaml.safe_dump(BASE | keys))
    assert main(["evaluate", str(file), "--check"]) == 2
    shown = capsys.readouterr().err
    assert said in shown and "secret" not in shown, shown


def test_one_judge_may_be_given_as_a_word(tmp_path):
    from rlhf.config.recipe import load_recipe

    file = tmp_path / "evaluate.yaml"
    file.write_text(yaml.safe_dump(BASE | {"models": ["a", "b"], "judge": "runs/rm"}))
    assert load_recipe(str(file), "evaluate").values["judge"] == ["runs/rm"]
    assert load_recipe(str(file), "evaluate", ["--judge", "runs/x"]).values["judge"] == ["runs/x"]
    assert load_recipe(str(file), "evaluate", ["--models", "[c, d]"]).values["models"] == ["c", "d"]


# --- exports ---------------------------------------------------------------------------------------------------------


def test_formats_of_others():
    prompt = [{"role": "user", "content": "Hi"}]
    assert alpaca_eval(prompt, "out", "m", "d") == {
        "instruction": "Hi",
        "output": "out",
        "generator": "m",
        "dataset": "d",
    }
    text = "# Title\n\n1. one\n2. two\n- three\n\n**bold** and __bold__\n```\n# no header\n- no item\n```\n"
    line = arena_hard(prompt, text, "m", 42)
    assert line["messages"] == [*prompt, {"role": "assistant", "content": {"answer": text}}] and line["model"] == "m"
    assert line["metadata"] == {
        "token_len": 42, "header_count": {"h1": 1, "h2": 0, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 1}, "bold_count": {"**": 1, "__": 1},
    }  # fmt: skip
    assert (
        line["uid"] == arena_hard(prompt, "other", "n", 1)["uid"]
        and line["ans_id"] != arena_hard(prompt, "o", "m", 1)["ans_id"]
    )
    turns = [*prompt, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "So"}]
    assert alpaca_eval(turns, "out", "m", "d")["instruction"] == "user: Hi\n\nassistant: Yes?\n\nuser: So"


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nudged(tiny_llama, tmp_path_factory):
    """The tiny Llama with other weights."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("models") / "nudged")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log.jsonl"
    log.touch()
    process = subprocess.Popen([sys.executable, str(SERVER), str(log), KEY], stdout=subprocess.PIPE, text=True)
    yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1", log
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def reward_model(tiny_llama, tmp_path_factory):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, tokenizer = tmp_path_factory.mktemp("reward") / "rm", AutoTokenizer.from_pretrained(tiny_llama)
    torch.manual_seed(4)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_llama, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def evaluation(recipe_in, tiny_llama, nudged, tiny_gpt2, few_pairs, reward_model, server):
    def write(place):
        judge = [reward_model, {"endpoint": server[0], "model": "longer", "api_key_env": "JUDGE_KEY", "label": "api"}]
        return recipe_in(place, "evaluate", models={"old": tiny_llama, "new": nudged, "gpt": tiny_gpt2}, judge=judge,
                         dataset_name=few_pairs, dataset_test_split="train", max_new_tokens=5, batch_size=5, max_length=512,
                         kl_prompts=4, max_eval_examples=6, export=["alpaca_eval", "arena_hard"], output_dir=str(place / "out"))  # fmt: skip

    return write


def lines(folder, name):
    return [json.loads(line) for line in (folder / "out" / name).read_text().splitlines()]


FILES = ("results.json", "pairs.jsonl", "answers.jsonl", "judgments.jsonl", "samples.jsonl")


@pytest.fixture(scope="module")
def done(evaluation, tmp_path_factory):
    """A finished evaluation: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUDGE_KEY", KEY)
        patch.setenv("COLUMNS", "150")
        import contextlib
        import io

        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(["evaluate", evaluation(folder)]) == 0
    return folder, out.getvalue()


def test_numbers_can_be_recomputed(done):
    folder, _ = done
    results = json.loads((folder / "out" / "results.json").read_text())
    answers, judgments, samples = (lines(folder, f"{name}.jsonl") for name in ("answers", "judgments", "samples"))
    assert results["baseline"] == "old" and list(results["policies"]) == ["old", "new", "gpt"]
    assert {(r["judge"], r["a"], r["b"]) for r in results["pairwise"]} == {
        (judge, *pair) for judge in ("rm", "api") for pair in (("new", "old"), ("gpt", "old"), ("gpt", "new"))
    }
    for found in results["pairwise"]:
        mine = [x for x in judgments if (x["judge"], x["a"], x["b"]) == (found["judge"], found["a"], found["b"])]
        assert found["share"] == pytest.approx(sum(x["win"] for x in mine) / len(mine)) and len(mine) == len(answers)
        assert found["a_words"] == pytest.approx(sum(len(a[found["a"]].split()) for a in answers) / len(answers))
    for line in judgments:
        one, other = (answers[line["row"]][line[side]] for side in ("a", "b"))
        if line["judge"] == "api" and one and other:
            assert line["win"] == (0.5 if len(one) == len(other) else float(len(one) > len(other)))
        if "a_score" in line:
            assert line["a_score"] == answers[line["row"]]["judged"]["rm"][line["a"]]
    new = [x for x in samples if x["policy"] == "new"]
    assert len(new) == 4 and all(x["policy"] == "new" for x in samples)
    kl = results["kl"]["new"]
    assert kl["sum"] == pytest.approx(sum(x["logp"] - x["reference_logp"] for x in new) / 4)
    assert kl["per_token"] == pytest.approx(4 * kl["sum"] / sum(len(x["ids"]) for x in new))
    assert results["kl_skipped"] == {"gpt": "its tokens are not those of old"}


def test_what_a_person_sees(done):
    folder, out = done
    out = " ".join(out.split())  # lines are broken anywhere
    assert "judge api at http://127.0.0.1" in out and "calls (" in out
    assert "Their answers compared" in out and "The models" in out and out.count("Verdict: ") == 2
    assert (
        "by api (an outside judge)" in out
        and "api is longer at http://" in out
        and "No KL of gpt: its tokens are not those of old." in out
    )


def test_the_key_is_nowhere(done):
    folder, out = done
    assert KEY not in out
    assert not [file for file in (folder / "out").rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]
    assert "JUDGE_KEY" in (folder / "out" / "recipe.yaml").read_text()


def test_exports(done):
    folder, _ = done
    answers = lines(folder, "answers.jsonl")
    found = json.loads((folder / "out/exports/alpaca_eval/new/model_outputs.json").read_text())
    assert [item["output"] for item in found] == [answer["new"] for answer in answers]
    assert {item["generator"] for item in found} == {"new"}
    other = [json.loads(x) for x in (folder / "out/exports/arena_hard/model_answer/gpt.jsonl").read_text().splitlines()]
    assert [x["messages"][-1]["content"]["answer"] for x in other] == [answer["gpt"] for answer in answers]


def test_the_report_shows_it_and_a_complete_one_is_shown_again(done, capsys):
    folder, _ = done
    assert main(["report", str(folder / "out")]) == 0
    text = (folder / "out" / "report.html").read_text()
    assert "<h3>Answers compared</h3>" in text and "<h3>The models</h3>" in text and 'class="verdict"' in text
    assert "longer at http://127.0.0.1" in text
    assert main(["evaluate", str(folder / "evaluate.yaml")]) == 0
    assert capsys.readouterr().out.count("Verdict: ") == 2  # without a server or a key


def test_a_policy_is_no_judge(recipe, tiny_llama, nudged, few_pairs, tmp_path, capsys):
    """A language model read as a reward model would get a random head."""
    file = recipe("evaluate", models=[tiny_llama, nudged], judge=nudged, dataset_name=few_pairs, dataset_test_split="train", output_dir=str(tmp_path / "o"))  # fmt: skip
    assert main(["evaluate", file]) == 2
    assert f"{nudged} holds a policy; 'judge.nudged' names a reward model" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_and_an_interrupted_judge_end_with_the_same_bytes(done, evaluation, server, tmp_path):
    """And no call is made twice: the server's log has every question once more than before."""
    whole, _ = done
    before = server[1].read_text().splitlines()
    file = evaluation(tmp_path)
    words = forked.launch_command(2, "evaluate", file)
    found = forked.finish(
        forked.start(*words, env={"JUDGE_KEY": KEY}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    )
    assert found.returncode == 0, found.stdout
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (whole / "out" / name).read_bytes(), name
    assert len(server[1].read_text().splitlines()) == 2 * len(before)


def test_a_missing_key_costs_no_model(evaluation, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    assert main(["evaluate", evaluation(tmp_path)]) == 2
    assert "needs a key in the environment variable JUDGE_KEY" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_reserved_label_is_the_stages_model():
    with pytest.raises(UserError, match="models names 'dpo'"):
        policies_of({"models": {"dpo": "m"}, "dpo_model": "n"})
