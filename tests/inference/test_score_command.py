"""`rlhf score`: every row's score as transformers alone gives it, in order, on any number of processes, after any interruption."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import forked
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import rlhf
from rlhf.__main__ import main
from rlhf.data import prepare, sources
from rlhf.errors import UserError
from rlhf.inference.score_summary import Summary
from rlhf.models.tokenizer import load_tokenizer
from rlhf.runs.stop import EXIT_STOPPED

WORKER = Path(__file__).parent / "holding_blocks_worker.py"


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def alone(tiny_judge):
    """The score of one conversation, by transformers."""
    tokenizer = load_tokenizer(tiny_judge)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_judge).eval()

    def score(messages, **template):
        ids = tokenizer.apply_chat_template(messages, return_dict=True, **template)["input_ids"]
        with torch.no_grad():
            return float(model(input_ids=torch.tensor([ids])).logits[0, 0])

    return score


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def run(*words, code=0):
    assert main([*map(str, words)]) == code


# --- scores ----------------------------------------------------------------------------------------------------------


def test_pairs_in_order_with_both_scores_and_their_other_columns(few_pairs, tiny_judge, alone, tmp_path, capsys):
    run("score", few_pairs, "--reward", tiny_judge, "--output", tmp_path / "out.jsonl")
    given, found = lines(few_pairs), lines(tmp_path / "out.jsonl")
    assert len(found) == len(given) == 12
    for number, (before, after) in enumerate(zip(given, found, strict=True), 1):
        assert after["place"] == f"{few_pairs}:{number}"
        assert {key: after[key] for key in ("id", "task")} == {key: before[key] for key in ("id", "task")}
        for side in ("chosen", "rejected"):
            assert after[f"score_{side}"] == pytest.approx(alone(after["prompt"] + after[side]), abs=2e-5)
    shown = capsys.readouterr().out
    won = sum(row["score_chosen"] > row["score_rejected"] for row in found)
    assert f"  accuracy      {won / 12:6.1%}   (95%: " in shown and "12 pairs scored by" in shown
    assert f"--reward {tiny_judge} --audit" in shown and "accuracy by task" in shown
    chosen = [row["score_chosen"] for row in found]
    mean = sum(chosen) / 12
    sd = (sum((value - mean) ** 2 for value in chosen) / 11) ** 0.5
    assert f"{12:>9} {mean:>+9.3f} {sd:>9.3f} {min(chosen):>+9.3f} {max(chosen):>+9.3f}" in shown
    assert not (tmp_path / "out.jsonl.parts").exists()


def test_answers_dialogues_and_judged_answers(tiny_judge, alone, tmp_path):
    dialogue = [user("Hi"), said("Hello!"), user("And you?"), said("Fine, thanks.")]
    for name, rows, wanted in (
        ("sft", [{"prompt": "Hi", "completion": "Hello"}, {"prompt": "Bye", "completion": "See you"}],
         [[user("Hi"), said("Hello")], [user("Bye"), said("See you")]]),
        ("dialogue", [{"messages": dialogue}, {"messages": [*dialogue, user("Ok"), said("Good.")]}],
         [dialogue, [*dialogue, user("Ok"), said("Good.")]]),
        ("kto", [{"prompt": "Hi", "completion": "Hello", "label": True}, {"prompt": "Hi", "completion": "No", "label": False}],
         [[user("Hi"), said("Hello")], [user("Hi"), said("No")]]),
    ):  # fmt: skip
        run(
            "score",
            write(tmp_path / f"{name}.jsonl", rows),
            "--reward",
            tiny_judge,
            "--output",
            tmp_path / f"{name}-out.jsonl",
        )
        found = lines(tmp_path / f"{name}-out.jsonl")
        assert [row["score"] for row in found] == pytest.approx([alone(messages) for messages in wanted], abs=2e-5)
        if name == "kto":
            assert [row["label"] for row in found] == [True, False]


def test_parquet_holds_what_json_lines_hold(few_pairs, tiny_judge, tmp_path):
    for name in ("out.jsonl", "out.parquet"):
        run("score", few_pairs, "--reward", tiny_judge, "--output", tmp_path / name, "--column", "rm")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.to_pylist() == lines(tmp_path / "out.jsonl") and "rm_chosen" in table.column_names


def test_a_row_that_is_too_long_has_no_score_and_is_counted(few_pairs, tiny_judge, tmp_path, capsys):
    tokenizer = load_tokenizer(tiny_judge)
    longest = [
        max(
            len(tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=True)["input_ids"])
            for side in ("chosen", "rejected")
        )
        for row in rlhf.score(few_pairs, tiny_judge)
    ]
    limit = sorted(longest)[6]
    run("score", few_pairs, "--reward", tiny_judge, "--output", tmp_path / "out.jsonl", "--max_length", limit)
    found, over = lines(tmp_path / "out.jsonl"), [length > limit for length in longest]
    assert [row["score_chosen"] is None for row in found] == [row["score_rejected"] is None for row in found] == over
    assert 0 < sum(over) < 12
    assert f"{sum(over)} rows without a score (null): more tokens than the {limit}" in capsys.readouterr().err
    run("score", few_pairs, "--reward", tiny_judge, "--output", tmp_path / "none.jsonl", "--max_length", 5)
    assert len(lines(tmp_path / "none.jsonl")) == 12 and "  no row has a score" in capsys.readouterr().out


def test_a_bad_row_ends_it_before_a_model_loads_or_is_skipped_by_name(tiny_judge, tmp_path, capsys):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "d", "chosen": "e", "rejected": "f"}]  # fmt: skip
    file = write(tmp_path / "in.jsonl", rows)
    run("score", file, "--reward", tiny_judge, "--output", tmp_path / "out.jsonl", code=2)
    assert f"{file}:2: 'chosen' and 'rejected' are equal" in (told := capsys.readouterr().err)
    assert told.rstrip().endswith("--skip leaves such rows out") and not (tmp_path / "out.jsonl").exists()
    run("score", file, "--reward", tiny_judge, "--output", tmp_path / "out.jsonl", "--skip")
    assert [row["place"] for row in lines(tmp_path / "out.jsonl")] == [f"{file}:1", f"{file}:3"]
    assert [row["place"] for row in lines(tmp_path / "out.jsonl.skipped.jsonl")] == [f"{file}:2"]
    assert f"skipped {file}:2" in (told := capsys.readouterr().err) and "1 row left out" in told


def test_rows_of_the_prepared_store_are_scored_alike(few_pairs, tiny_judge, tmp_path, monkeypatch):
    """Those of a large file, which stay on the disk."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    run("score", few_pairs, "--reward", tiny_judge, "--output", tmp_path / "small.jsonl")
    monkeypatch.setattr(sources, "SMALL_BYTES", 100)
    monkeypatch.setattr(prepare, "SMALL_BYTES", 100)
    run("score", few_pairs, "--reward", tiny_judge, "--output", tmp_path / "large.jsonl")
    assert any((tmp_path / "cache" / "data").iterdir())
    assert (tmp_path / "large.jsonl").read_bytes() == (tmp_path / "small.jsonl").read_bytes()


# --- a second start --------------------------------------------------------------------------------------------------


def test_what_is_read_is_not_written_over(few_pairs, tiny_judge, tmp_path, capsys):
    own = tmp_path / "own" / "pairs.jsonl"
    own.parent.mkdir()
    own.write_text(Path(few_pairs).read_text())
    for source, out, says in (
        (own, own, "is the file that is read"),
        (own.parent, own.with_name("scored.jsonl"), "lies in the folder that is read"),
    ):
        run("score", source, "--reward", tiny_judge, "--output", out, "--overwrite", code=2)
        assert says in capsys.readouterr().err
    assert own.read_text() == Path(few_pairs).read_text() and len(list(own.parent.iterdir())) == 1


def test_the_same_command_again_says_so_and_another_is_refused(few_pairs, tiny_judge, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    words = ("score", few_pairs, "--reward", tiny_judge, "--output", out)
    run(*words)
    before, first = out.stat().st_mtime_ns, capsys.readouterr().out
    run(*words)
    shown = capsys.readouterr().out
    assert (
        shown == f"{out} is complete: the same data, models and options\n{first}" and out.stat().st_mtime_ns == before
    )
    run(*words, "--limit", 5, code=2)
    assert (
        f"{out} already exists and was made of other inputs (data); give another --output, or --overwrite"
        in capsys.readouterr().err
    )
    run(*words, "--limit", 5, "--overwrite")
    assert len(lines(out)) == 5
    run(*words, "--limit", 5)
    out.write_text(out.read_text().replace("a", "b", 1))
    capsys.readouterr()
    run(*words, "--limit", 5, code=2)
    assert f"{out} was changed since it was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "output, message",
    [
        ("theirs.jsonl", "already exists and is no file of this command"),
        ("out.csv", "must end with .jsonl or .parquet"),
        ("no/out.jsonl", "does not exist; create it first"),
        (".", "is a folder; give a file in it"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_first(few_pairs, tiny_judge, tmp_path, capsys, output, message):
    (tmp_path / "theirs.jsonl").write_text("mine\n")
    run("score", few_pairs, "--reward", tiny_judge, "--output", tmp_path / output, code=2)
    assert message in capsys.readouterr().err and (tmp_path / "theirs.jsonl").read_text() == "mine\n"


def test_what_is_no_data_or_no_reward_model_is_refused(few_pairs, tiny_judge, tiny_llama, tmp_path, capsys):
    text = write(tmp_path / "text.jsonl", [{"text": "once"}])
    out = ("--output", tmp_path / "out.jsonl")
    run("score", few_pairs, "--reward", tiny_llama, *out, code=2)
    assert f"{tiny_llama} is not a reward model" in capsys.readouterr().err
    run("score", "configs/quickstart/dpo.yaml", "--reward", tiny_judge, *out, code=2)
    assert "is a recipe; name the file that it reads" in capsys.readouterr().err
    run("score", text, "--reward", tiny_judge, *out, code=2)
    assert f"{text}:1: a text has no prompt and no answer" in capsys.readouterr().err
    scored = write(tmp_path / "scored.jsonl", [{"prompt": "a", "completion": "b", "score": 1.0}])
    run("score", scored, "--reward", tiny_judge, *out, code=2)
    assert "has a column 'score' already; --column NAME" in capsys.readouterr().err
    run("score", scored, "--reward", tiny_judge, *out, "--column", "second")
    assert list(lines(tmp_path / "out.jsonl")[0]) == ["prompt", "completion", "score", "second", "place"]


# --- processes and interruptions -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """60 pairs: several blocks."""
    rows = [{"prompt": f"Question {n}", "chosen": "yes " * (n % 17 + 1), "rejected": "no " * (n % 5 + 1), "subset": f"s{n % 3}"} for n in range(60)]  # fmt: skip
    return write(tmp_path_factory.mktemp("many") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def whole(many, tiny_judge, tmp_path_factory):
    """What nothing interrupts, and the batches that it takes."""
    folder = tmp_path_factory.mktemp("whole")
    done = forked.finish(start(folder, 1000, many, tiny_judge))
    assert done.returncode == 0, done.stderr
    return (folder / "out.jsonl").read_bytes(), sorted((folder / "writes").read_text().splitlines())


def start(folder, hold_after, many, judge, num_processes=1, **env):
    words = ("score", many, "--reward", judge, "--output", str(folder / "out.jsonl"))
    env = {"HOLD_AFTER": str(hold_after), "HELD": str(folder / "held"), "WRITES": str(folder / "writes"), **env}
    if num_processes > 1:
        words = forked.launch_command(num_processes, *words, program=(str(WORKER),))
        return forked.start(*words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return forked.start(WORKER, *words, env=env)


def wait_until_held(process, folder):
    while not (folder / "held").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def assert_ends_as(whole, folder, many, judge, num_processes=1):
    """With the same bytes, and no batch was computed twice."""
    done = forked.finish(start(folder, 1000, many, judge, num_processes))
    assert done.returncode == 0, done.stdout
    assert (folder / "out.jsonl").read_bytes() == whole[0]
    assert sorted((folder / "writes").read_text().splitlines()) == whole[1]
    assert not (folder / "out.jsonl.parts").exists()


def test_two_processes_write_the_same_bytes(many, tiny_judge, whole, tmp_path):
    done = forked.finish(start(tmp_path, 1000, many, tiny_judge, num_processes=2))
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "out.jsonl").read_bytes() == whole[0]
    assert sorted((tmp_path / "writes").read_text().splitlines()) == whole[1] and len(whole[1]) > 6
    assert done.stdout.count("60 pairs scored by") == 1


def test_a_kill_loses_no_batch_that_was_written(many, tiny_judge, whole, tmp_path):
    process = start(tmp_path, 3, many, tiny_judge)
    wait_until_held(process, tmp_path)
    process.kill()
    forked.finish(process)
    assert not (tmp_path / "out.jsonl").exists() and (tmp_path / "out.jsonl.parts").is_dir()
    while True:  # the forked process, which dies after its caller, has the lock
        done = forked.finish(start(tmp_path, 1000, many, tiny_judge, num_processes=2))
        if "is being written by another process" not in done.stdout:
            break
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "out.jsonl").read_bytes() == whole[0]
    assert sorted((tmp_path / "writes").read_text().splitlines()) == whole[1]


def test_a_request_to_one_of_two_ranks_stops_both_and_the_same_command_resumes(many, tiny_judge, whole, tmp_path):
    process = start(
        tmp_path, 2, many, tiny_judge, num_processes=2, HOLD_RANK="1", RLHF_STOP_FILE=str(tmp_path / "stop")
    )
    wait_until_held(process, tmp_path)
    (tmp_path / "stop").touch()
    # the held rank waits for a request of its own: its launcher hands a signal on to all
    os.kill(process.pid, signal.SIGTERM)
    done = forked.finish(process)
    assert done.returncode != 0 and not (tmp_path / "out.jsonl").exists()
    (tmp_path / "stop").unlink()
    assert_ends_as(whole, tmp_path, many, tiny_judge)


def test_a_request_to_stop_keeps_what_is_there(many, tiny_judge, whole, tmp_path):
    process = start(tmp_path, 4, many, tiny_judge)
    wait_until_held(process, tmp_path)
    os.kill(process.pid, signal.SIGINT)
    done = forked.finish(process)
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert "what has been computed is kept" in done.stdout and "Run the same command to resume." in done.stdout
    assert len((tmp_path / "writes").read_text().splitlines()) == 4
    assert_ends_as(whole, tmp_path, many, tiny_judge, num_processes=2)


# --- the summary, and Python -----------------------------------------------------------------------------------------


def test_the_summarys_numbers_by_hand():
    summary = Summary()
    for chosen, rejected, subset in ((2.0, 1.0, "a"), (0.0, 3.0, "a"), (1.0, 1.0, "b"), (5.0, 1.0, None)):
        summary.add(("chosen", "rejected"), [chosen, rejected], {"subset": subset} if subset else {})
    summary.add(("chosen", "rejected"), None, {"subset": "a"})
    found = summary.record()
    # chosen 2, 0, 1, 5: mean 2, squares 0 + 4 + 1 + 9 = 14, sd sqrt(14 / 3); margins 1, -3, 0, 4: mean 0.5; won 2, tie 1: 2.5 of 4
    assert found["scores"]["chosen"] == {
        "count": 4,
        "mean": 2.0,
        "sd": pytest.approx((14 / 3) ** 0.5),
        "min": 0.0,
        "max": 5.0,
    }
    assert (found["rows"], found["unscored"], found["pairs"]["accuracy"], found["pairs"]["ties"]) == (5, 1, 0.625, 1)
    assert found["pairs"]["margin"]["mean"] == 0.5
    assert {name: (v["accuracy"], v["count"]) for name, v in found["groups"]["subset"].items()} == {
        "a": (0.5, 2),
        "b": (0.5, 1),
    }


def test_many_values_of_a_column_are_no_subsets():
    summary = Summary()
    for n in range(150):
        summary.add(("chosen", "rejected"), [1.0, 0.0], {"task": n})
    assert summary.record()["groups"] == {} and len(summary.groups["task"]) == 101


def test_python_scores_rows(few_pairs, tiny_judge, tmp_path):
    rows = lines(few_pairs)
    found = rlhf.score(rows, tiny_judge, limit=5)
    run("score", few_pairs, "--reward", tiny_judge, "--output", tmp_path / "out.jsonl", "--limit", 5)
    assert [{**row, "place": ""} for row in found] == [{**row, "place": ""} for row in lines(tmp_path / "out.jsonl")]
    assert found[0]["place"] == "data, row 1"
    with pytest.raises(UserError, match="rlhf.score: argument --limit: '0' is not a number from 1 to"):
        rlhf.score(rows, tiny_judge, limit=0)
