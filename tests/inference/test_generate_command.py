"""`rlhf generate`: answers that depend on model, seed and row alone; prompts of every kind; other engines."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import forked
import pytest

import rlhf
from rlhf.__main__ import main
from rlhf.inference import engines
from rlhf.inference.engines import Engine
from rlhf.inference.finished import Found
from rlhf.inference.sampling import Sampling
from rlhf.models.tokenizer import load_tokenizer

FEW = ("-n", 2, "--max_new_tokens", 8, "--seed", 3)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(*words, code=0):
    assert main([*map(str, words)]) == code


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def answers(few_pairs, tiny_llama, tmp_path_factory):
    file = tmp_path_factory.mktemp("answers") / "out.jsonl"
    run("generate", few_pairs, "--model", tiny_llama, "--output", file, *FEW)
    return file


def test_answers_are_rows_in_order_with_prompt_place_and_finish(answers, few_pairs, tiny_llama):
    found, given = lines(answers), lines(few_pairs)
    assert [(row["place"], row["sample"]) for row in found] == [
        (f"{few_pairs}:{n}", s) for n in range(1, 13) for s in (0, 1)
    ]
    assert all(row["id"] == given[at // 2]["id"] for at, row in enumerate(found))
    assert all(row["completion"][0]["role"] == "assistant" and row["prompt"][-1]["role"] == "user" for row in found)
    assert all(row["finished"] or row["num_tokens"] == 8 for row in found) and not all(row["finished"] for row in found)
    record = json.loads(answers.with_name("out.jsonl.provenance.json").read_text())
    assert record["sampling"] == {"n": 2, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "seed": 3}
    assert record["summary"]["cut"] == sum(not row["finished"] for row in found) and record["summary"]["answers"] == 24
    assert len(record["inputs"]["model"]["weights_sha256"]) == 64 and record["model"] == tiny_llama


@pytest.mark.parametrize("words", [("--batch_size", 1), ("--batch_size", 7), ("--batch_size", 100)], ids=str)
def test_no_answer_depends_on_the_batch(words, answers, few_pairs, tiny_llama, tmp_path):
    run("generate", few_pairs, "--model", tiny_llama, "--output", tmp_path / "out.jsonl", *FEW, *words)
    assert (tmp_path / "out.jsonl").read_bytes() == answers.read_bytes()


def test_two_processes_give_the_same_answers(answers, few_pairs, tiny_llama, tmp_path):
    done = forked.launch(
        2, "generate", few_pairs, "--model", tiny_llama, "--output", str(tmp_path / "out.jsonl"), *map(str, FEW)
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == answers.read_bytes() and done.stdout.count("24 answers of") == 1


def test_an_answer_depends_on_its_row_and_sample_alone(answers, few_pairs, tiny_llama, tmp_path):
    """Fewer rows, more samples, longer answers: what is common stays."""
    run("generate", few_pairs, "--model", tiny_llama, "--output", tmp_path / "few.jsonl", *FEW, "--limit", 4)
    assert lines(tmp_path / "few.jsonl") == lines(answers)[:8]
    run("generate", few_pairs, "--model", tiny_llama, "--output", tmp_path / "more.jsonl", *FEW, "--limit", 4, "-n", 3)
    assert [row for row in lines(tmp_path / "more.jsonl") if row["sample"] < 2] == lines(answers)[:8]
    other = FEW[:-1] + (4,)
    run("generate", few_pairs, "--model", tiny_llama, "--output", tmp_path / "seed.jsonl", *other)
    texts = [[row["completion"][0]["content"] for row in lines(file)] for file in (answers, tmp_path / "seed.jsonl")]
    assert sum(a == b for a, b in zip(*texts, strict=True)) < 3


def test_prompts_of_every_kind(tiny_llama, tmp_path):
    turns = [user("Hi"), {"role": "assistant", "content": "Hello"}, user("And now?")]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for name, rows, wanted in (
        ("prompt", [{"prompt": "Hi", "id": 7}], [user("Hi")]),
        ("question", [{"question": "Hi", "system": "Be brief."}], [{"role": "system", "content": "Be brief."}, user("Hi")]),
        ("alpaca", [{"instruction": "Add", "input": "1 2"}], [user("Add\n\n1 2")]),
        ("messages", [{"messages": turns, "tools": tools}], turns),
        ("dialogue", [{"messages": [*turns, {"role": "assistant", "content": "Bye"}]}], turns),
        ("kto", [{"prompt": "Hi", "completion": "x", "label": True}], [user("Hi")]),
        ("hh", [{"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}], [user("Hi")]),
    ):  # fmt: skip
        run("generate", write(tmp_path / f"{name}.jsonl", rows), "--model", tiny_llama, "--output", tmp_path / f"{name}-out.jsonl", "--max_new_tokens", 2)  # fmt: skip
        (row,) = lines(tmp_path / f"{name}-out.jsonl")
        assert (
            row["prompt"] == wanted and row.get("tools") == rows[0].get("tools") and row.get("id") == rows[0].get("id")
        )


def test_what_has_no_prompt_is_named(tiny_llama, tmp_path, capsys):
    file = write(
        tmp_path / "in.jsonl",
        [{"prompt": "Hi"}, {"other": "x"}, {"prompt": [user("a"), {"role": "assistant", "content": "b"}]}],
    )
    run("generate", file, "--model", tiny_llama, "--output", tmp_path / "out.jsonl", code=2)
    assert f"{file}:2: found columns other; expected a prompt" in capsys.readouterr().err
    run("generate", file, "--model", tiny_llama, "--output", tmp_path / "out.jsonl", "--skip", "--max_new_tokens", 2)
    assert [row["place"] for row in lines(tmp_path / "out.jsonl")] == [f"{file}:1"]
    assert "'prompt' ends with an assistant message; it must end with the user's" in capsys.readouterr().err


def test_a_prompt_without_room_is_left_out_by_name_and_a_long_one_gets_a_short_answer(tiny_gpt2, tmp_path, capsys):
    tokenizer = load_tokenizer(tiny_gpt2)

    def length(text):
        return len(
            tokenizer.apply_chat_template([user(text)], add_generation_prompt=True, return_dict=True)["input_ids"]
        )

    text = "word"
    while length(text + " word") <= 512 - 3:
        text += " word"
    file = write(tmp_path / "in.jsonl", [{"prompt": "Hi"}, {"prompt": text}, {"prompt": text + " word" * 100}])
    run(
        "generate",
        file,
        "--model",
        tiny_gpt2,
        "--output",
        tmp_path / "out.jsonl",
        "--max_new_tokens",
        20,
        "--temperature",
        0,
    )
    found = lines(tmp_path / "out.jsonl")
    assert [row["place"] for row in found] == [f"{file}:1", f"{file}:2"]
    assert found[0]["num_tokens"] == 20 and found[1]["num_tokens"] == 512 - length(text)
    told = capsys.readouterr().err
    assert (
        f"skipped {file}:3: the prompt leaves no room for an answer in the 512 positions" in told
        and "1 row left out" in told
    )


def test_answers_can_be_scored_as_they_are(answers, tiny_judge, tmp_path):
    run("score", answers, "--reward", tiny_judge, "--output", tmp_path / "scored.jsonl", "--skip")
    found = lines(tmp_path / "scored.jsonl")
    assert {row["sample"] for row in found} == {0, 1} and all(isinstance(row["score"], float) for row in found)


@pytest.mark.parametrize(
    "words, message",
    [
        (("-n", 2, "--temperature", 0), "-n 2 with --temperature 0 gives 2 times the same answer"),
        (("-n", 1, "--temperature", 0, "--top_p", 0.9), "--top_p has no effect with --temperature 0"),
        (("--engine", "continuous", "--batch_size", 2), "--batch_size has no effect with --engine continuous"),
        (("--model", "JUDGE"), "is a reward model, which scores and can't generate"),
        (("--model", "nothing"), "--model: 'nothing' is neither a local folder nor a run in runs/"),
        (("--engine", "vllm"), "--engine vllm needs vLLM, which is not installed; run: "),
    ],
)
def test_mistakes_are_named_before_a_model_loads(words, message, few_pairs, tiny_llama, tiny_judge, tmp_path, capsys):
    words = [tiny_judge if word == "JUDGE" else word for word in words]
    run("generate", few_pairs, "--model", tiny_llama, "--output", tmp_path / "out.jsonl", *words, code=2)
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_python_generates(few_pairs, tiny_llama, answers):
    found = rlhf.generate(few_pairs, tiny_llama, n=2, max_new_tokens=8, seed=3)
    assert found == lines(answers)


# --- engines ---------------------------------------------------------------------------------------------------------


def test_batches_have_one_limit_and_similar_lengths():
    engine = Engine("transformers", Found("", "", False), Sampling(), 2, None, None, False)
    asked = {0: ([1] * 5, 9, (0, 0)), 1: ([1] * 9, 9, (1, 0)), 2: ([1] * 7, 4, (2, 0)), 3: ([1] * 6, 9, (3, 0))}
    assert list(engine.batches(asked)) == [[1, 3], [0], [2]]
    assert list(Engine("vllm", Found("", "", False), Sampling(), 2, None, None, False).batches(asked)) == [[1, 3, 0, 2]]


def test_vllm_is_asked_for_each_answer_with_a_seed_of_its_own(few_pairs, tiny_llama, tmp_path, monkeypatch):
    """A stand-in for the module: what it is given, and what is made of what it gives."""
    calls = []

    class LLM:
        def __init__(self, **options):
            calls.append(options)

        def generate(self, prompts, parameters, use_tqdm):
            calls.append((prompts, parameters))

            def output(n):
                return SimpleNamespace(
                    text=f" text {n} ", token_ids=[1] * n, finish_reason="stop" if n % 2 else "length"
                )

            return [SimpleNamespace(outputs=[output(len(p["prompt_token_ids"]))]) for p in prompts]

    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, lambda **options: SimpleNamespace(**options)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: name)
    run(
        "generate",
        few_pairs,
        "--model",
        tiny_llama,
        "--output",
        tmp_path / "out.jsonl",
        *FEW,
        "--engine",
        "vllm",
        "--limit",
        3,
    )
    assert calls[0]["model"] == tiny_llama and calls[0]["dtype"] == "auto"
    prompts, parameters = calls[1]
    assert len(calls) == 2 and len({p.seed for p in parameters}) == 6 and {p.max_tokens for p in parameters} == {8}
    by_length = {f"text {len(p['prompt_token_ids'])}": len(p["prompt_token_ids"]) % 2 == 1 for p in prompts}
    assert {row["completion"][0]["content"]: row["finished"] for row in lines(tmp_path / "out.jsonl")} == by_length


@pytest.mark.slow  # on a CPU transformers' cache takes a quarter of a minute to make
def test_continuous_batching_gives_the_greedy_answers_of_padded_batches(few_pairs, tiny_llama, tmp_path):
    words = ("generate", few_pairs, "--model", tiny_llama, "--temperature", 0, "--max_new_tokens", 8)
    run(*words, "--output", tmp_path / "padded.jsonl")
    run(*words, "--output", tmp_path / "continuous.jsonl", "--engine", "continuous")
    assert (tmp_path / "continuous.jsonl").read_bytes() == (tmp_path / "padded.jsonl").read_bytes()
