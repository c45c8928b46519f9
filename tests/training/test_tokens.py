"""Token ids are those of TRL's own preparation, whichever processes make them, and they are made once."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from cached import as_large, processes_that_stop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from letters import Letters, texts
from tiny_tokenizers import CHATML_TOKENS, byte_level_tokenizer, sample_texts

from rlhf.__main__ import main
from rlhf.data.prepare import prepare
from rlhf.data.sources import Source
from rlhf.data.store import Rows
from rlhf.errors import UserError
from rlhf.models.tokenizer import load_tokenizer, read_template, tokenize_pair
from rlhf.runs.stop import Stopped, Stopper
from rlhf.training import tokens
from rlhf.training.tokenise import Counts, Settings, Tokenise, count_tokens, last_split, pair_key, split_tokens
from rlhf.training.tokens import Job, known_counts, tokenised, tokenizer_digest, with_tokens

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


# --- tokenizers ------------------------------------------------------------------------------------------------------


def metaspace(scheme):
    """As SentencePiece makes them: spaces are \\u2581, and one is put before the first word (`first`) or every piece (`always`)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *CHATML_TOKENS], show_progress=False)
    tokenizer.train_from_iterator(sample_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<unk>"
    )


def whole_texts_only():
    """Its last id tells the length of the text, so that no text can be encoded in pieces."""
    plain = byte_level_tokenizer(CHATML_TOKENS, eos_token="<|im_end|>", unk_token="<|endoftext|>")

    class WholeTexts(type(plain)):
        def __call__(self, text, *rest, **options):
            found = super().__call__(text, *rest, **options)
            for ids, one in (
                [(found["input_ids"], text)] if isinstance(text, str) else zip(found["input_ids"], text, strict=True)
            ):
                ids.append(len(one) % 100)
            return found

    plain.__class__ = WholeTexts
    return plain


def made(name):
    if name in ("first", "always"):
        found = metaspace(name)
    elif name == "whole texts only":
        found = whole_texts_only()
    else:  # in "overlapping", a text can be read as <|im_end|> and <|im_start|>, or with |><| between
        more = ["|><|"] if name == "overlapping" else []
        found = byte_level_tokenizer([*CHATML_TOKENS, *more], eos_token="<|im_end|>", unk_token="<|endoftext|>")
    found.chat_template = read_template("chatml")
    return found


SPLITTING, WHOLE = ("byte level", "first", "always"), ("overlapping", "whole texts only")


@pytest.fixture(scope="module")
def tokenizers():
    return {name: made(name) for name in (*SPLITTING, *WHOLE)}


def test_which_tokenizers_encode_in_pieces(tokenizers):
    for name in SPLITTING:
        assert set(split_tokens(tokenizers[name])) >= {"<|im_start|>", "<|im_end|>"}, name
    for name in WHOLE:
        assert split_tokens(tokenizers[name]) == [], name


def test_where_texts_are_cut():
    tokens = ["<a>", "<b>"]
    assert last_split(["x<a>y<b>z1", "x<a>y<b>z2"], tokens) == (8, "<b>")
    assert last_split(["x<a>y<b>z", "x<a>y<b"], tokens) == (4, "<a>")  # the second is not shared as a whole
    assert last_split(["x<a>y", "x<a>y", "x<b>y"], tokens) == (0, "")
    assert last_split(["x<a>y"], tokens) == last_split(["x<a>", "x<a>"], []) == (0, "")


# --- the ids are TRL's -----------------------------------------------------------------------------------------------


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def pair(number, prompt, chosen, rejected, **more):
    return {"prompt": prompt if isinstance(prompt, list) else [user(prompt)], "chosen": [assistant(chosen)],
            "rejected": [assistant(rejected)], "place": f"f:{number}", **more}  # fmt: skip


TEXTS = [
    ("Why?", "Because of this.", "No idea."),
    (" two  leading", " a leading space", "  two of them"),
    ("ends with a space ", "\n\nnew lines first", "trailing \n"),
    ("<|im_start|>user inside<|im_end|>", "a <|im_end|> in the answer", "<|im_end|><|im_start|>assistant"),
    ("<|im_end|><|im_start|>", "x|><|y", "<|im_end|"),
    ("Äpfel 你好 🙂 \u200d", "naïve café ½", "\U0001f468\u200d\U0001f469 e\u0301"),
    ("same start", "the answer is the same until here", "the answer is the same until there"),
    ("a", "b", "bc"),
    ("long " * 40, "Because.", "No."),
    ("Why?", "long " * 30 + "yes", "long " * 30 + "no"),
]
PAIRS = [pair(n, *found) for n, found in enumerate(TEXTS)] + [
    pair(20, [{"role": "system", "content": " Be brief "}, user("One?"), assistant("a"), user("Two?")], "b", "c"),
    pair(21, "Why?", "So.", "No."),
]
SHAPES = {
    "dpo": PAIRS,
    "reward": PAIRS,
    "prompt + completion": [{"prompt": p["prompt"], "completion": p["chosen"], "place": p["place"]} for p in PAIRS],
    "messages": [{"messages": p["prompt"] + p["chosen"] + [user("and?")] + p["rejected"], "place": p["place"]} for p in PAIRS],
    "text": [{"text": a + b, "place": f"f:{n}"} for n, (a, b, _) in enumerate([*TEXTS, ("ends with ", "EOS<|im_end|>", "")])],
}  # fmt: skip
IDS = {"dpo": ("prompt_ids", "chosen_ids", "rejected_ids"), "reward": ("chosen_ids", "rejected_ids")}


def by_trl(shape, rows, tokenizer, max_length=None, mode="keep_start"):
    """(places, columns of ids) of TRL's own preparation."""
    from datasets import Dataset
    from trl import DPOTrainer, RewardTrainer, SFTTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=mode, assistant_only_loss=False,
                           dataset_text_field="text", shuffle_dataset=False)  # fmt: skip
    trainer = SimpleNamespace(
        completion_only_loss=shape == "prompt + completion", chat_template=None, _tokenizer=tokenizer
    )
    given = Dataset.from_list(rows)
    if shape in IDS:
        kind = DPOTrainer if shape == "dpo" else RewardTrainer
        found = kind._prepare_dataset(trainer, given, tokenizer, args, "train")
    else:
        found = SFTTrainer._prepare_dataset(trainer, given, tokenizer, args, False, None, "train")
    return found["place"][:], {name: found[name][:] for name in IDS.get(shape, ("input_ids", "labels"))}


def by_us(shape, rows, tokenizer, max_length=None, mode="keep_start", **more):
    stage = shape if shape in IDS else "sft"
    counts = Counts()
    found = Tokenise(tokenizer, Settings(stage, max_length, mode, **more))(rows, 100, counts)
    kept = [number - 100 for number in found.get("example", [])]
    assert counts.rows == len(rows) and counts.kept == len(kept)
    return [rows[i]["place"] for i in kept], found, counts


def assert_as_trl(shape, rows, tokenizer, *limits):
    places, columns = by_trl(shape, rows, tokenizer, *limits)
    ours, found, counts = by_us(shape, rows, tokenizer, *limits)
    assert ours == places
    for name, ids in columns.items():
        assert found.get(name, []) == ids, name
    return found, counts


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*SPLITTING, *WHOLE])
def test_ids_and_labels_are_trls(name, shape, tokenizers):
    assert_as_trl(shape, SHAPES[shape], tokenizers[name])


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_max_length_cuts_and_drops_is_trls(shape, mode, tokenizers):
    tokenizer = tokenizers["byte level"]
    for limit in (12, 60):
        found, counts = assert_as_trl(shape, SHAPES[shape], tokenizer, limit, mode)
        assert counts.left_out[0] == len(SHAPES[shape]) - counts.kept and sum(counts.histogram.values()) == counts.rows
        assert counts.cut[0] > 0 or limit == 12 if shape != "reward" else counts.cut == [0, -1]
        if not counts.kept:
            continue
        for number in range(counts.kept):
            row = {key: values[number] for key, values in found.items()}
            assert row["packed"] == count_tokens(row, limit, False) and row["padded"] == count_tokens(row, limit, True)
            assert shape != "dpo" or row["pair_key"] == pair_key(row, limit, mode)
        longest = max(found["packed"], default=0)
        assert counts.longest[0] == longest and counts.longest_padded[0] == max(found["padded"], default=0)
        assert found["packed"][found["example"].index(counts.longest[1])] == longest


PIECES = st.lists(
    st.sampled_from(["<|im_start|>", "<|im_end|>", "|><|", " ", "\n", "user", "Ä", "🙂", "a b"]) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    max_size=6,
).map("".join)  # fmt: skip


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(PIECES, PIECES, PIECES), min_size=1, max_size=4), st.sampled_from([*SPLITTING, *WHOLE]))
def test_any_texts_have_the_ids_of_one_row_at_a_time(tokenizers, found, name):
    """`tokenize_pair` encodes each text as a whole, as TRL does."""
    tokenizer = tokenizers[name]
    rows = [pair(n, *found) for n, found in enumerate(found)]
    _, columns, _ = by_us("dpo", rows, tokenizer)
    for number, row in enumerate(rows):
        assert {key: columns[key][number] for key in IDS["dpo"]} == tokenize_pair(tokenizer, row)


def test_a_pairs_prompt_is_encoded_once(tokenizers):
    """The one thing that this is for: three texts of a row have it, and it is encoded for one of them."""
    tokenizer, seen = tokenizers["byte level"], []
    tokenise = Tokenise(tokenizer, Settings("dpo", None))
    encode = tokenise._encode
    tokenise._encode = lambda texts: (seen.extend(texts), encode(texts))[1]
    rows = [pair(n, "a long question " * 20, "yes", "no") for n in range(5)]
    tokenise(rows, 0, Counts())
    assert sum(text.count("a long question") for text in seen) == 5 * 20


# --- too_long --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_too_long(shape, tokenizers):
    tokenizer, rows = tokenizers["byte level"], SHAPES[shape]
    _, whole, counts = by_us(shape, rows, tokenizer)
    limit = 60

    def tokens(number):
        row = {key: values[number] for key, values in whole.items()}
        if "input_ids" in row:
            return len(row["input_ids"])
        return len(row.get("prompt_ids", ())) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))

    lengths = [tokens(number) for number in range(len(rows))]
    long = [number for number, length in enumerate(lengths) if length > limit]
    assert 0 < len(long) < len(rows)

    first = rows[long[0]]["place"]
    message = (
        f"^{first}: the row has {lengths[long[0]]} tokens, more than max_length={limit}, and `too_long: error` is set"
    )
    with pytest.raises(UserError, match=message):
        by_us(shape, rows, tokenizer, limit, too_long="error")

    places, found, counts = by_us(shape, rows, tokenizer, limit, too_long="drop")
    kept = [number for number in range(len(rows)) if number not in long]
    assert places == [rows[number]["place"] for number in kept]
    assert counts.left_out == [len(long), 100 + long[0]] and counts.cut == [0, -1]
    for name in IDS.get(shape, ("input_ids", "labels")):
        assert found[name] == [whole[name][number] for number in kept]

    _, found, counts = by_us(shape, rows, tokenizer, limit, too_long="truncate")
    assert counts.cut[0] > 0 and max(found["padded"]) <= 2 * limit
    if shape == "reward":
        assert counts.left_out == [0, -1]
        assert found["chosen_ids"] == [ids[:limit] for ids in whole["chosen_ids"]]
        _, found, _ = by_us(shape, rows, tokenizer, limit, "keep_end", too_long="truncate")
        assert found["rejected_ids"] == [ids[-limit:] for ids in whole["rejected_ids"]]


# --- the folder of token ids -----------------------------------------------------------------------------------------


@pytest.fixture
def plan(tiny_llama, tmp_path, monkeypatch):
    """As much of a plan as tokens.py asks of it: 23 pairs in chunks of 5."""
    monkeypatch.setattr(tokens, "CHUNK_ROWS", (5, 5))
    monkeypatch.setattr(tokens, "POLL_S", 0.01)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in (PAIRS + PAIRS)[:23]]
    with as_large(tmp_path / "cache"):
        prepared = prepare(Source("f", rows, None, "digest", num_bytes=1), "pairs")
    assert prepared.key and all(part.path for part in prepared.rows.parts)
    return SimpleNamespace(
        recipe=SimpleNamespace(stage="dpo"), stage_args=SimpleNamespace(too_long=None, chat_template=None),
        args=SimpleNamespace(max_length=60, truncation_mode="keep_start", dataset_num_proc=1, trust_remote_code=False),
        model_name=tiny_llama, model_args=SimpleNamespace(model_revision=None),
        data=SimpleNamespace(train=prepared.rows, heldout=None, keys={"train": "a key"}),
    )  # fmt: skip


@pytest.fixture
def tokenizer(tiny_llama):
    return load_tokenizer(tiny_llama)


@pytest.fixture
def given_rows(monkeypatch):
    """Numbers of the rows that this process tokenises."""
    numbers, real = [], Tokenise.__call__

    def call(self, rows, first, counts):
        numbers.extend(range(first, first + len(rows)))
        return real(self, rows, first, counts)

    monkeypatch.setattr(Tokenise, "__call__", call)
    return numbers


def in_memory(plan, tokenizer):
    """What the folder must hold."""
    plan = SimpleNamespace(**{**vars(plan), "data": SimpleNamespace(train=plan.data.train, heldout=None, keys={})})
    return tokenised(plan, tokenizer)


def test_the_folder_holds_what_memory_would(plan, tokenizer, given_rows):
    expected = in_memory(plan, tokenizer)
    assert known_counts(plan, tokenizer) is None
    given_rows.clear()
    found = tokenised(plan, tokenizer)
    assert sorted(given_rows) == list(range(23))
    assert found.dataset.to_list() == expected.dataset.to_list() and found.counts == expected.counts
    assert 0 < len(found.dataset) < 23 and found.counts.left_out[0] == 23 - len(found.dataset)
    assert known_counts(plan, tokenizer) == expected.counts
    given_rows.clear()
    assert tokenised(plan, tokenizer).dataset.to_list() == expected.dataset.to_list() and not given_rows


@pytest.mark.parametrize("damage", ["cut", "gone", "without its size"])
def test_a_chunk_that_is_not_as_it_was_written_is_made_again(plan, tokenizer, given_rows, damage):
    """A loss of power may leave a name without its content."""
    expected = tokenised(plan, tokenizer).dataset.to_list()
    (ids,) = Path(os.environ["RLHF_CACHE"]).glob("tokens/*/chunk-00002.arrow")
    if damage == "cut":
        ids.write_bytes(ids.read_bytes()[:-100])
    elif damage == "gone":
        ids.unlink()
    else:
        ids.with_suffix(".json").write_text("{}")
    given_rows.clear()
    assert known_counts(plan, tokenizer) is None
    assert tokenised(plan, tokenizer).dataset.to_list() == expected and sorted(given_rows) == list(range(10, 15))


def test_a_selection_of_rows(plan, tokenizer):
    import numpy as np

    plan.data.train = plan.data.train.select(np.array([3, 3, 9, 0, 21, 20, 7]))
    plan.data.keys["train"] = "another key"
    assert tokenised(plan, tokenizer).dataset.to_list() == in_memory(plan, tokenizer).dataset.to_list()


def test_no_row_that_fits(plan, tokenizer):
    plan.args.max_length = 1
    found = tokenised(plan, tokenizer)
    assert len(found.dataset) == 0 and found.counts.left_out == [23, 0]


def test_what_makes_another_folder(plan, tokenizer, monkeypatch):
    folder = lambda: Job.make(plan, tokenizer, plan.data.train, "train").folder  # noqa: E731
    folders = [folder(), folder()]
    assert len(set(folders)) == 1
    for holder, name, value in (
        (plan.args, "max_length", 61), (plan.args, "truncation_mode", "keep_end"), (plan.stage_args, "too_long", "drop"),
        (plan.recipe, "stage", "reward"), (tokenizer, "chat_template", read_template("alpaca")), (tokens, "code_digest", lambda: "x"),
    ):  # fmt: skip
        monkeypatch.setattr(holder, name, value)
        folders.append(folder())
    plan.data.keys["train"] = "another key"
    folders.append(folder())
    assert len(set(folders)) == 8
    before = tokenizer_digest(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert tokenizer_digest(tokenizer) != before


def test_an_error_in_a_row_leaves_finished_chunks(plan, tokenizer, given_rows):
    plan.stage_args.too_long = "error"
    for _ in range(2):  # and is raised again by the next start
        given_rows.clear()
        with pytest.raises(UserError, match="^f, row 9: the row has .* `too_long: error` is set"):
            tokenised(plan, tokenizer)
    assert min(given_rows) == 5  # the first chunk is there


def test_a_disk_that_is_too_small(plan, tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "free_bytes", lambda folder: 100)
    with pytest.raises(
        UserError, match=r"^the token ids of 23 rows need about 0.0 GB, and .*/tokens has 0.0 GB free; set RLHF_CACHE"
    ):
        tokenised(plan, tokenizer)


def test_a_folder_that_cannot_be_written(plan, tokenizer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Job, "_write", full)
    with pytest.raises(
        UserError, match=r"^token ids can't be written to .*/tokens: No space left on device; free some space"
    ):
        tokenised(plan, tokenizer)


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path):
    """Starts a process that fills the folder, and stops within the row `hold` until it is told to go on."""
    with processes_that_stop() as start:

        def fill(job, hold):
            job.folder.mkdir()
            return start(HERE / "letters.py", job.folder, job.num_rows, job.num_chunks, hold, PYTHONPATH=str(ROOT))

        yield fill


def assert_all_there(job):
    found = job.open()
    assert found.dataset["example"][:] == list(range(job.num_rows)) and found.counts.kept == job.num_rows
    assert ["".join(map(chr, ids)) for ids in found.dataset["input_ids"][:]] == [
        row["text"] for row in texts(job.num_rows)
    ]
    assert not [*job.folder.glob("*.partial"), *job.folder.glob("*.lock")]


def test_a_kill_leaves_finished_chunks_to_the_next_start(tmp_path, other):
    job = Job(tmp_path / "tokens", 47, 5)  # of 10 rows
    process = other(job, 25)
    process.kill()  # kill -9
    process.wait()
    assert job.missing() == [2, 3, 4]
    letters = Letters()
    job.work(texts(47), letters)
    assert letters.done == list(range(20, 47))
    assert_all_there(job)


def test_two_processes_share_the_chunks(tmp_path, other, monkeypatch):
    """The other one holds the second chunk; this one makes the rest, waits, and both have all of them."""
    job, letters = Job(tmp_path / "tokens", 47, 5), Letters()
    process = other(job, 15)

    def sleep(seconds):
        if process.stdin and not process.stdin.closed:
            process.stdin.close()  # go on
        time.sleep(seconds)

    monkeypatch.setattr(tokens, "time", SimpleNamespace(sleep=sleep))
    job.work(texts(47), letters)
    assert letters.done == list(range(20, 47))
    assert json.loads(process.stdout.read()) == list(range(20))
    assert_all_there(job)


def test_a_process_that_dies_leaves_its_chunk_to_the_waiting_one(tmp_path, other, monkeypatch):
    job, letters = Job(tmp_path / "tokens", 47, 5), Letters()
    process = other(job, 5)
    monkeypatch.setattr(tokens, "time", SimpleNamespace(sleep=lambda s: (process.kill(), time.sleep(0.01))))
    job.work(texts(47), letters)
    assert sorted(letters.done) == list(range(47))
    assert_all_there(job)


def test_ranks_begin_at_different_chunks(tmp_path, monkeypatch):
    job, letters = Job(tmp_path / "tokens", 40, 4), Letters()
    job.folder.mkdir()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(tokens, "rank", lambda: 1)
    job.work(texts(40), letters)
    assert letters.done[0] == 20 and sorted(letters.done) == list(range(40))


def test_a_helper_process_takes_chunks(plan, tokenizer, monkeypatch):
    """This process leaves all but the first chunk to the helpers; what they make is what it would."""
    monkeypatch.setattr(tokens, "HELPERS_FROM", 2)
    plan.args.dataset_num_proc = 2
    expected = in_memory(plan, tokenizer)
    attempt, start, helpers, mine = Job._try, Job._start_helpers, [], []

    def only_the_first(job, chunk, *rest):
        if chunk == 0:
            mine.append(chunk)
            return attempt(job, chunk, *rest)
        if not job.files(chunk)[1].exists():
            assert any(process.poll() is None for process in helpers), "no helper that would make the rest"
        return False

    monkeypatch.setattr(Job, "_try", only_the_first)
    monkeypatch.setattr(Job, "_start_helpers", lambda *rest: helpers.extend(start(*rest)) or helpers)
    found = tokenised(plan, tokenizer)
    assert len(helpers) == 1 and 0 in mine
    assert found.dataset.to_list() == expected.dataset.to_list() and found.counts == expected.counts
    assert all(process.poll() is not None for process in helpers)


def test_few_chunks_and_rows_in_memory_start_no_helper(plan, tokenizer):
    plan.args.dataset_num_proc = 9
    job = Job.make(plan, tokenizer, plan.data.train, "train")
    assert job._start_helpers(plan.data.train, plan, tokens.HELPERS_FROM - 1) == []
    rows = Rows([part._replace(path=None) for part in plan.data.train.parts])
    assert job._start_helpers(rows, plan, 100) == []


def test_a_stop_leaves_finished_chunks(plan, tokenizer, given_rows, tmp_path, capsys):
    """Asked after the second chunk: the third is not begun, and the next start makes the other three."""
    stopper = Stopper(tmp_path / "run")
    real = Job._try

    def asked(job, chunk, *rest):
        done = real(job, chunk, *rest)
        stopper.asked_by = "SIGTERM" if len(given_rows) == 10 else ""
        return done

    Job._try = asked
    try:
        with pytest.raises(Stopped):
            with_tokens(plan, tokenizer, stopper)
    finally:
        Job._try = real
    assert len(given_rows) == 10 and stopper.agreed == "SIGTERM"
    assert "Stopped: finished token ids are in the cache" in capsys.readouterr().out
    given_rows.clear()
    tokenised(plan, tokenizer)
    assert len(given_rows) == 13


# --- SFT's own keys --------------------------------------------------------------------------------------------------

MARKED = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n"
    "{%- if m.role == 'assistant' -%}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{%- else -%}{{ m.content }}<|im_end|>{%- endif %}\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("limit", [None, 40])
@pytest.mark.parametrize("shape", ["messages", "prompt + completion"])
def test_only_the_assistants_tokens(shape, limit, mode, tiny_llama):
    from datasets import Dataset
    from trl import SFTTrainer

    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = MARKED
    args = SimpleNamespace(dataset_num_proc=None, max_length=limit, truncation_mode=mode, assistant_only_loss=True,
                           dataset_text_field="text", shuffle_dataset=False)  # fmt: skip
    trainer = SimpleNamespace(
        completion_only_loss=shape == "prompt + completion", chat_template=None, _tokenizer=tokenizer
    )
    rows = SHAPES[shape]
    theirs = SFTTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, False, None, "train")
    places, found, _ = by_us(shape, rows, tokenizer, limit, mode, assistant_only_loss=True)
    assert places == theirs["place"][:]
    assert (found["input_ids"], found["labels"]) == (theirs["input_ids"][:], theirs["labels"][:])
    assert any(label == -100 for label in found["labels"][0])


def test_a_run_on_the_assistants_tokens(recipe, tiny_llama, tmp_path, capsys):
    """TRL looks for messages in rows whose ids are made already; without the marks it would raise after the model has loaded."""
    data, template = tmp_path / "d.jsonl", tmp_path / "marked.jinja"
    turns = [user("q"), assistant("a b"), user("more"), assistant("yes")]
    data.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(6)))
    template.write_text(MARKED)
    path = recipe("sft", model_name_or_path=tiny_llama, dataset_name=str(data), output_dir=str(tmp_path / "o"), max_steps=1,
                  assistant_only_loss=True)  # fmt: skip
    assert main(["sft", path, "--check"]) == 2
    error = capsys.readouterr().err
    assert "does not mark the assistant's tokens" in error and error.count("\n") == 1
    assert main(["sft", path, "--check", "--assistant_only_loss", "false", "--eos_token", "<none>"]) == 2
    assert "--eos_token: '<none>' is no token of" in capsys.readouterr().err
    assert main(["sft", path, "--chat_template", str(template)]) == 0
