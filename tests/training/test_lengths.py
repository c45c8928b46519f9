"""What max_length costs is what TRL's own preparation of the rows does."""

import dataclasses
from types import SimpleNamespace

import pytest

from rlhf.data.summary import Count
from rlhf.models.tokenizer import load_tokenizer, tokenize_pair
from rlhf.training.lengths import CutReport, answers_cut, cost, line
from rlhf.training.tokenise import Settings, count_tokens


def pair(prompt, chosen, rejected, place):
    said = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    return {"prompt": said("user", prompt), "chosen": said("assistant", chosen), "rejected": said("assistant", rejected),
            "place": place}  # fmt: skip


ROWS = [
    pair("Why?", "Because of this.", "No idea.", "f:1"),
    pair("Why?", "Since " * 60 + "yes", "Since " * 60 + "no", "f:2"),  # differ only where both are cut
    pair("Why?", "Short.", "Long " * 60, "f:3"),
    pair("Why " * 90, "Because.", "No.", "f:4"),  # the prompt fills max_length
]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return load_tokenizer(tiny_llama)


@pytest.fixture(scope="module")
def limit(tokenizer):
    """Room for the first row, for half of the second's and third's long answers, not for the fourth's prompt."""
    long = tokenize_pair(tokenizer, ROWS[1])
    length = len(long["prompt_ids"]) + len(long["chosen_ids"]) // 2
    assert sum(map(len, list(tokenize_pair(tokenizer, ROWS[0]).values())[:2])) < length
    assert len(tokenize_pair(tokenizer, ROWS[3])["prompt_ids"]) > length
    return length


def test_dpo(tokenizer, limit):
    report, counts = answers_cut(ROWS, tokenizer, Settings("dpo", limit))
    assert report == CutReport("dpo", limit, 4, Count(2, "f:2"), 3, Count(1, "f:2"), Count(1, "f:4"))
    assert (counts.rows, counts.kept, counts.unequal) == (4, 3, [0, -1])
    assert line(report) == (
        f"max_length={limit}: cuts 3 answers in 2 of 4 pairs (first: f:2); 1 of 4 pairs have the same tokens for chosen and "
        "rejected (first: f:2); 1 of 4 pairs are left out, since the prompt alone fills it (first: f:4)"
    )


def test_reward_leaves_out_what_is_longer(tokenizer, limit):
    report, _ = answers_cut(ROWS, tokenizer, Settings("reward", limit))
    assert (report.cut, report.same, report.left_out) == (Count(), Count(), Count(3, "f:2"))
    assert line(report) == f"max_length={limit}: 3 of 4 pairs are left out, since one side is longer (first: f:2)"


def test_sft(tokenizer, limit):
    rows = [{"prompt": r["prompt"], "completion": r["rejected"], "place": r["place"]} for r in ROWS]
    report, _ = answers_cut(rows, tokenizer, Settings("sft", limit))
    assert (report.cut, report.answers, report.left_out) == (Count(2, "f:2"), 2, Count(1, "f:4"))


def test_dialogues_and_texts_are_cut_and_never_left_out(tokenizer):
    dialogue = {"messages": [*ROWS[3]["prompt"], *ROWS[3]["chosen"]], "place": "f:1"}
    for row in (dialogue, {"text": "word " * 50, "place": "f:1"}):
        report, _ = answers_cut([row], tokenizer, Settings("sft", 20))
        assert (report.cut, report.left_out) == (Count(1, "f:1"), Count())


def test_keep_end_cuts_the_prompt_first(tokenizer, limit):
    report, _ = answers_cut(ROWS[3:], tokenizer, Settings("dpo", limit, "keep_end"))
    assert (report.cut, report.left_out) == (Count(), Count())


@pytest.mark.parametrize("max_length", [None, 1000])
def test_nothing_to_report(tokenizer, max_length):
    assert line(answers_cut(ROWS, tokenizer, Settings("dpo", max_length))[0]) == ""


def test_a_sample_is_spread_over_all_rows(tokenizer, limit):
    report, _ = answers_cut(ROWS, tokenizer, Settings("dpo", limit), at_most=2)  # rows 1 and 3
    assert (report.rows, report.cut) == (2, Count(1, "f:3"))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_dpo_is_as_trl_cuts(tokenizer, limit, mode):
    from datasets import Dataset
    from trl import DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    args = SimpleNamespace(dataset_num_proc=None, max_length=limit, truncation_mode=mode)
    prepared = DPOTrainer._prepare_dataset(SimpleNamespace(), Dataset.from_list(ROWS), tokenizer, args, "train")
    batch = DataCollatorForPreference(0, max_length=limit, truncation_mode=mode)(list(prepared))
    kept = batch["completion_mask"].sum(-1).tolist()
    full = [len(row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in prepared]
    report, _ = answers_cut(ROWS, tokenizer, Settings("dpo", limit, mode))
    assert report.answers == sum(k < f for k, f in zip(kept, full, strict=True))
    assert report.left_out.rows == len(ROWS) - len(prepared)
    half = len(prepared)
    same = [i for i in range(half) if batch["input_ids"][i].equal(batch["input_ids"][half + i])]
    assert report.same == (Count(len(same), prepared[same[0]]["place"]) if same else Count())


def test_reward_is_as_trl_filters(tokenizer, limit):
    from datasets import Dataset
    from trl import RewardTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=limit)
    prepared = RewardTrainer._prepare_dataset(SimpleNamespace(), Dataset.from_list(ROWS), tokenizer, args, "train")
    assert len(ROWS) - len(prepared) == answers_cut(ROWS, tokenizer, Settings("reward", limit))[0].left_out.rows


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("shape", ["prompt + completion", "messages", "text"])
def test_sft_is_as_trl_cuts(tokenizer, limit, mode, shape):
    from datasets import Dataset
    from trl import SFTTrainer

    def prepare(max_length):
        args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=mode, assistant_only_loss=False,
                               dataset_text_field="text", shuffle_dataset=False)  # fmt: skip
        trainer = SimpleNamespace(completion_only_loss=True, chat_template=None, _tokenizer=tokenizer)
        return SFTTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, False, None, "train")

    def learnt(prepared):
        return {row["place"]: sum(label != -100 for label in row["labels"]) for row in prepared}

    shapes = {
        "prompt + completion": lambda r: {"prompt": r["prompt"], "completion": r["rejected"]},
        "messages": lambda r: {"messages": r["prompt"] + r["rejected"]},
        "text": lambda r: {"text": r["rejected"][0]["content"]},
    }
    rows = [{**shapes[shape](row), "place": row["place"]} for row in ROWS]
    whole, cut = learnt(prepare(None)), learnt(prepare(limit))
    report, _ = answers_cut(rows, tokenizer, Settings("sft", limit, mode))
    assert (report.answers, report.left_out.rows) == (sum(cut[p] < whole[p] for p in cut), len(whole) - len(cut))
    assert report.answers > 0 or mode == "keep_end"


@pytest.mark.parametrize("stage", ["dpo", "reward"])
@pytest.mark.parametrize("padded", [False, True])
def test_cost_of_the_longest_row_that_is_kept(tokenizer, limit, stage, padded):
    """`too_long: error` raises at the start, not here."""
    whole = [tokenize_pair(tokenizer, row) for row in ROWS]
    if stage == "reward":  # the prompt is a part of both sides, found as their common prefix
        whole = [{f"{s}_ids": p["prompt_ids"] + p[f"{s}_ids"] for s in ("chosen", "rejected")} for p in whole]
    kept = [0] if stage == "reward" else [0, 1, 2]
    tokens = {number: count_tokens(whole[number], limit, padded) for number in kept}
    longest = max(tokens, key=tokens.get)
    settings = Settings(stage, limit)
    name = "longest_padded" if padded else "longest"
    assert getattr(cost(tokenizer, ROWS, settings), name) == [tokens[longest], longest]
    strict = dataclasses.replace(settings, too_long="error")
    assert getattr(cost(tokenizer, ROWS, strict), name)[1] == 0  # rows beyond max_length are not kept
