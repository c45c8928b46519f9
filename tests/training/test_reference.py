"""Cached reference log-probabilities: what they are, when they are found again, and what happens to damaged files."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import threading
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from rlhf import files
from rlhf.__main__ import main
from rlhf.data.sources import SAMPLE_DIR
from rlhf.files import sha256_of
from rlhf.models.digests import weights_digest
from rlhf.runs.metrics import read_metrics
from rlhf.runs.stop import Stopped, Stopper
from rlhf.training import reference
from rlhf.training.reference import (
    Shards,
    add_reference_logps,
    decode,
    encode,
    look_up,
    pair_keys,
    reference_key,
    token_batches,
)
from rlhf.training.tokenise import pair_key

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "all-linear"}
ROW = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [3, 6]}


# --- keys of pairs ---------------------------------------------------------------------------------------------------


def test_pair_key_is_the_tokens_after_truncation():
    key = pair_key(ROW, None, "keep_start")
    assert len(key) == 16 and key == pair_key(ROW | {"prompt": "text"}, 5, "keep_start")  # nothing is cut at 5
    assert key == pair_key(ROW, 5, "keep_end")
    assert key != pair_key(ROW, 4, "keep_start")
    assert pair_key(ROW, 4, "keep_start") == pair_key(ROW | {"chosen_ids": [3, 4, 9]}, 4, "keep_start")  # 9 is cut off
    assert pair_key(ROW, 4, "keep_end") != pair_key(ROW | {"chosen_ids": [3, 4, 9]}, 4, "keep_end")
    assert pair_key(ROW, 4, "keep_end") != pair_key(ROW, 4, "keep_start")


@pytest.mark.parametrize(
    "other",
    [
        {"prompt_ids": [1, 7]},
        {"chosen_ids": [3, 4, 7]},
        {"rejected_ids": [3, 7]},
        {"chosen_ids": [3, 4]},
        {"chosen_ids": [3, 6], "rejected_ids": [3, 4, 5]},  # swapped
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},  # the same rows, answers begin later
        {"prompt_ids": [1], "chosen_ids": [2, 3, 4, 5], "rejected_ids": [2, 3, 6]},
    ],
)
def test_pair_key_changes_with(other):
    assert pair_key(ROW, 8, "keep_start") != pair_key(ROW | other, 8, "keep_start")


# --- files -----------------------------------------------------------------------------------------------------------

entries = st.dictionaries(
    st.binary(min_size=16, max_size=16), st.tuples(*[st.floats(-1e4, 0)] * 2), min_size=1, max_size=20
)


def arrays(found):
    """Keys (N, 16) uint8 and log-probabilities (N, 2) float64 of {key: (chosen, rejected)}."""
    keys = np.frombuffer(b"".join(found), np.uint8).reshape(-1, 16)
    return keys, np.array(list(found.values()), np.float64).reshape(-1, 2)


def entries_of(keys, logps):
    assert keys.dtype == np.uint8 and logps.dtype == np.float64 and len(keys) == len(logps)
    return {key.tobytes(): tuple(pair.tolist()) for key, pair in zip(keys, logps, strict=True)}


@settings(max_examples=50, deadline=None)
@given(entries)
def test_encode_and_decode(found):
    assert entries_of(*decode(encode(*arrays(found)))) == found


alike = st.builds(bytes.__add__, st.sampled_from([bytes(8), b"a" * 8, b"\xff" * 8]), st.binary(min_size=8, max_size=8))


@settings(max_examples=100, deadline=None)
@given(
    entries | st.dictionaries(alike, st.tuples(*[st.floats(-9, 0)] * 2), max_size=9),
    st.lists(alike, max_size=9),
)
def test_look_up(found, others):
    """Of known keys their values, of others NaN, also of those whose first half a known one has."""
    half = [bytes(8) + key[8:] for key in found]
    wanted = [*others, *half, *found, *found]
    got = look_up(np.frombuffer(b"".join(wanted), np.uint8).reshape(-1, 16), *arrays(found))
    for key, pair in zip(wanted, got.tolist(), strict=True):
        assert tuple(pair) == found[key] if key in found else np.isnan(pair).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(alike, min_size=1, max_size=20))
def test_distinct(keys):
    """The first row of each different key, and for each row which of them is its own."""
    first, same = reference._distinct(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16))
    assert [keys[i] for i in first[same]] == keys
    assert sorted(first.tolist()) == sorted(keys.index(key) for key in set(keys))


def test_pair_keys_of_a_dataset():
    """From their column, or computed from the ids."""
    rows = [ROW, ROW | {"chosen_ids": [9]}]
    expected = [pair_key(row, 4, "keep_end") for row in rows]
    for columns in ({}, {"pair_key": expected}):
        dataset = Dataset.from_list([row | {k: v[i] for k, v in columns.items()} for i, row in enumerate(rows)])
        assert [key.tobytes() for key in pair_keys(dataset, 4, "keep_end")] == expected
    kept = Dataset.from_list([row | {"pair_key": key} for row, key in zip(rows, expected[::-1], strict=True)])
    assert [key.tobytes() for key in pair_keys(kept, 4, "keep_end")] == expected[::-1]


def some(start, count=3):
    return {bytes([start + i] * 16): (-1.5 * i, -2.25 - start) for i in range(count)}


def test_shards_add_up(tmp_path):
    shards = Shards(tmp_path / "cache")
    assert entries_of(*shards.read()) == {}
    shards.write(*arrays({}))
    assert not (tmp_path / "cache").exists()
    shards.write(*arrays(some(0)))
    shards.write(*arrays(some(3)))
    shards.write(*arrays(some(3)))  # a run beside this one has written the same
    assert entries_of(*shards.read()) == some(0) | some(3)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "bit", "empty", "swapped"])
def test_a_damaged_file_is_not_trusted(damage, tmp_path, capsys):
    shards = Shards(tmp_path)
    shards.write(*arrays(some(0)))
    first = next(tmp_path.iterdir())
    shards.write(*arrays(some(3)))
    content = bytearray(first.read_bytes())
    if damage == "bit":
        content[-3] ^= 4  # in a log-probability
    elif damage == "swapped":
        content = bytearray(encode(*arrays(some(7))))  # a good file under another one's name
    first.write_bytes(content[: {"truncated": len(content) - 5, "empty": 0}.get(damage)])
    assert entries_of(*shards.read()) == some(3)
    assert f"{first} is damaged" in capsys.readouterr().out and not first.exists()
    shards.write(*arrays(some(0)))
    assert entries_of(*shards.read()) == some(0) | some(3)


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    Shards(tmp_path / "file" / "key").write(*arrays(some(0)))
    assert "can't be cached" in capsys.readouterr().out


def test_a_half_written_file_is_no_file(tmp_path):
    shards = Shards(tmp_path)
    shards.write(*arrays(some(0)))
    (tmp_path / ".123-abc.safetensors.partial").write_bytes(encode(*arrays(some(3)))[:20])  # a kill while writing
    assert entries_of(*shards.read()) == some(0)


def _write_and_read(folder, start):
    for i in range(20):
        shards = Shards(Path(folder))
        shards.write(*arrays(some(start + i, 1) | some(100, 2)))
        assert entries_of(*shards.read()).items() >= (some(start + i, 1) | some(100, 2)).items()


def test_two_runs_share_a_folder(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_reference as t; t._write_and_read"
    )
    runs = [forked.start("-c", f"{code}({str(tmp_path)!r}, {start})") for start in (0, 40)]
    assert [forked.finish(run).returncode for run in runs] == [0, 0]
    want = some(100, 2)
    for start in (0, 40):
        for i in range(20):
            want |= some(start + i, 1)
    assert entries_of(*Shards(tmp_path).read()) == want


# --- what is computed ------------------------------------------------------------------------------------------------


def make_trainer(model, folder, lora=True, **values):
    rows = [json.loads(line) for line in (SAMPLE_DIR / "train.jsonl").read_text().splitlines()[:7]]
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    defaults = {"use_cpu": True, "bf16": False, "max_length": 256, "report_to": "none", "disable_tqdm": True}
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=DPOConfig(output_dir=str(folder), **defaults | values),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )


@pytest.mark.parametrize("values", [{}, {"ld_alpha": 0.5}, {"truncation_mode": "keep_end", "max_length": 40}])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_values_are_trls_own_in_the_order_of_the_rows(lora, values, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "MAX_TOKENS", 1600)
    forward, sizes = reference.forward_logps, []
    monkeypatch.setattr(reference, "forward_logps", lambda *a: (sizes.append(len(a[3])), forward(*a))[1])
    trainer = make_trainer(tiny_llama, tmp_path / "out", lora, **values)
    found = add_reference_logps(trainer, trainer.train_dataset, "files", "sdpa", tmp_path / "cache")
    assert sizes == [3, 3, 1]  # several batches of several pairs
    for row in found:
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, trainer.data_collator([row]))
        assert row["ref_chosen_logps"] == pytest.approx(chosen.item(), rel=1e-5)
        assert row["ref_rejected_logps"] == pytest.approx(rejected.item(), rel=1e-5)
    again = add_reference_logps(trainer, trainer.train_dataset, "files", "sdpa", tmp_path / "cache")
    for side in ("ref_chosen_logps", "ref_rejected_logps"):
        assert again[side][:] == found[side][:]


def test_token_batches():
    """Padded tokens of a batch: 2 rows a pair of the longest pair's length."""
    sizes = [(10, 5, 2), (1, 1, 1), (10, 2, 5), (2, 2, 2)]
    rows = [{"prompt_ids": [0] * p, "chosen_ids": [0] * c, "rejected_ids": [0] * r} for p, c, r in sizes]
    numbers = np.array([0, 1, 2, 3])
    lengths = reference.padded_lengths(Dataset.from_list(rows), numbers)
    assert lengths.tolist() == [15, 2, 15, 4]
    padded = Dataset.from_list([row | {"padded": 2 * n} for row, n in zip(rows, (15, 2, 15, 4), strict=True)])
    assert reference.padded_lengths(padded, numbers[[3, 0]]).tolist() == [4, 15]
    batches = lambda most: [batch.tolist() for batch in token_batches(lengths, numbers, most)]  # noqa: E731
    assert batches(60) == [[0, 2], [3, 1]]
    assert batches(1) == [[0], [2], [3], [1]]  # never none at all
    assert [b.tolist() for b in token_batches(lengths[[1, 3]], numbers[[1, 3]], 60)] == [[3, 1]]  # rows 1 and 3 only


def test_an_interrupted_build_goes_on(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "MAX_TOKENS", 1)  # a pair a batch
    forward, calls = reference.forward_logps, []

    def breaking(trainer, model, rows, batch):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(batch)
        return forward(trainer, model, rows, batch)

    trainer = make_trainer(tiny_llama, tmp_path / "out")
    monkeypatch.setattr(reference, "forward_logps", breaking)
    with pytest.raises(KeyboardInterrupt):
        add_reference_logps(trainer, trainer.train_dataset, "files", "sdpa", tmp_path / "cache")
    rest = []
    monkeypatch.setattr(reference, "forward_logps", lambda *a: (rest.append(a[3]), forward(*a))[1])
    add_reference_logps(trainer, trainer.train_dataset, "files", "sdpa", tmp_path / "cache")
    assert len(calls) == 3 and len(rest) == 4 and not {k[0] for k in calls} & {k[0] for k in rest}


def test_one_run_builds_and_the_other_waits(tiny_llama, tmp_path, monkeypatch, capsys):
    """The second comes while the first is at work: it waits, and then computes nothing."""
    forward, calls, second = reference.forward_logps, [], []
    trainers = [make_trainer(tiny_llama, tmp_path / name) for name in ("first", "second")]
    ask = lambda trainer: add_reference_logps(trainer, trainer.train_dataset, "files", "sdpa", tmp_path / "cache")  # noqa: E731

    def slow(trainer, *rest):
        calls.append(trainer)
        if not second:
            second.append(threading.Thread(target=ask, args=(trainers[1],)))
            second[0].start()
        while "waiting for it" not in shown():  # the first goes on when the second has seen it
            time.sleep(0.01)
        return forward(trainer, *rest)

    said = []
    shown = lambda: said.append(capsys.readouterr().out) or "".join(said)  # noqa: E731
    monkeypatch.setattr(reference, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(reference, "forward_logps", slow)
    ask(trainers[0])
    second[0].join(600)
    assert not second[0].is_alive() and calls and set(calls) == {trainers[0]}
    assert "7 pairs, 0 of them in the cache" in shown() and "7 pairs, 7 of them in the cache" in shown()


def test_a_wait_for_a_reference_ends_when_asked_to_stop(tiny_llama, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_llama, tmp_path / "out")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    with contextlib.ExitStack() as other:
        assert reference._take(other, tmp_path / "cache" / ".lock")
        with contextlib.ExitStack() as mine, pytest.raises(Stopped):
            reference.wait_for_turn(trainer, mine, tmp_path / "cache", Stopper(tmp_path / "run"))
    with contextlib.ExitStack() as mine:  # the other is gone
        reference.wait_for_turn(trainer, mine, tmp_path / "cache")


# --- keys of references ----------------------------------------------------------------------------------------------


def key_of(model, lora=None, dtype=torch.float32, path="packed", change=None, **more):
    from peft import get_peft_model

    source = weights_digest(model)
    model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    if change:
        change(model)
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    return reference_key(model, source, path, **more)


@pytest.fixture
def one_bit(tiny_llama, tmp_path):
    """The same model but for one bit of one weight."""
    shutil.copytree(tiny_llama, tmp_path / "bit")
    file = tmp_path / "bit" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    return str(tmp_path / "bit")


def test_reference_key_is_what_the_reference_is(tiny_llama, tiny_gpt2, one_bit, monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "digests"))
    key = key_of(tiny_llama)
    assert len(key) == 32
    same = [
        key_of(tiny_llama, {"r": 4, "target_modules": "all-linear"}),
        key_of(tiny_llama, {"r": 16, "target_modules": "all-linear"}),
        key_of(tiny_llama, {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["gate_proj"]}),
    ]
    assert set(same) == {key}  # a new adapter is not part of the reference
    rope = lambda m: setattr(m.config, "rope_parameters", {"rope_type": "default", "rope_theta": 5e5})  # noqa: E731
    others = [
        key_of(tiny_gpt2), key_of(one_bit), key_of(tiny_llama, change=rope),
        key_of(tiny_llama, dtype=torch.bfloat16), key_of(tiny_llama, path="sdpa"), key_of(tiny_llama, ld_alpha=0.5),
        key_of(tiny_llama, autocast="bf16"), key_of(tiny_llama, device="cuda"),
    ]  # fmt: skip
    assert len({key, *others}) == 1 + len(others)


def test_weights_in_memory(tiny_llama):
    """Of a trainer that Python code has built: the same with any new adapter, another after one bit."""
    from peft import get_peft_model

    from rlhf.models.digests import weights_in_memory

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(r=4, target_modules=["q_proj"])
    )
    key = weights_in_memory(adapted)
    again = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(r=2, target_modules=["q_proj"]))
    assert weights_in_memory(again) == key
    again.base_model.model.model.norm.weight.data[0] *= 1 + 2**-22
    assert len({key, weights_in_memory(again), weights_in_memory(model)}) == 3


@pytest.fixture
def hub(tiny_llama, one_bit, tmp_path, monkeypatch):
    """The hub's cache with a model of two revisions, `main` and the one that is returned."""
    main_commit, other = "a" * 40, "b" * 40
    folder = tmp_path / "hub" / "models--org--tiny"
    for commit, source in ((main_commit, tiny_llama), (other, one_bit)):
        shutil.copytree(source, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(main_commit)
    (folder / "snapshots" / main_commit / "consolidated.safetensors").write_bytes(b"the same in another layout")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return other


def test_a_revision_of_the_hub(hub, tiny_llama, one_bit, recipe, few_pairs, tmp_path, computed):
    assert weights_digest("org/tiny") == weights_digest(tiny_llama) != weights_digest("org/tiny", hub)
    assert weights_digest("org/tiny", hub) == weights_digest(one_bit)
    common = dict(model_name_or_path="org/tiny", dataset_name=few_pairs)
    dpo(recipe, tmp_path, "main", **common)
    dpo(recipe, tmp_path, "other", **common, model_revision=hub)
    assert computed == [12, 12]  # not the other revision's
    commits = [
        json.loads((tmp_path / name / "provenance.json").read_text())["arguments"]["model_commit"]
        for name in ("main", "other")
    ]
    assert commits == ["a" * 40, hub]
    dpo(recipe, tmp_path, "as reference", **common, model_revision=hub, reference_model="org/tiny")
    assert computed == [12, 12]  # `main` of it, which is in the cache


def test_a_file_is_read_once_until_it_changes(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    read = []
    monkeypatch.setattr(files, "sha256_of", lambda path: (read.append(path), sha256_of(path))[1])
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    first = weights_digest(str(folder))
    assert weights_digest(str(folder)) == first and len(read) == 1
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-100] ^= 1
    before = (folder / "model.safetensors").stat()
    (folder / "model.safetensors").write_bytes(content)  # in place, with the old time: the change's own time tells
    os.utime(folder / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights_digest(str(folder)) != first and len(read) == 2

    name = hashlib.sha256(content).hexdigest()  # the hub's cache: a link to a file that is named by its sha256
    (tmp_path / "blobs").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "blobs" / name)
    (folder / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    assert files.file_digest(folder / "model.safetensors") == name and len(read) == 2


def test_what_else_decides_the_values_is_in_the_key(tiny_llama, tmp_path):
    """The stage hands it on: precision, and the loss's option that leaves tokens out."""
    for name, values in {"plain": {}, "autocast": {"bf16": True}, "part": {"ld_alpha": 0.5}}.items():
        trainer = make_trainer(tiny_llama, tmp_path / name, **values)
        add_reference_logps(trainer, trainer.train_dataset, "files", "sdpa", tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_reference_key_of_an_adapter_that_goes_on(tiny_llama, tmp_path):
    """Its frozen copy `ref` is the reference: the adapter's file, its base's and its scale count."""
    from peft import PeftModel, get_peft_model

    def key(alpha=8, value=0.1, base=tiny_llama, copied=True):
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.fill_(value)
        folder = tmp_path / f"{alpha} {value}"
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        if copied:  # as TRL does where it is trained further
            again.add_adapter("ref", again.peft_config["default"])
        return reference_key(again, weights_digest(str(folder)), "packed")

    assert key() == key()
    assert len({key(), key(value=0.2), key(alpha=16), key(copied=False)}) == 4


def test_4_bit_weights_have_a_key_of_their_own(llama_64):
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    from transformers import BitsAndBytesConfig

    def key(**options):
        config = BitsAndBytesConfig(load_in_4bit=True, **options)
        return reference_key(
            AutoModelForCausalLM.from_pretrained(llama_64, quantization_config=config), "files", "packed"
        )

    nf4 = key(bnb_4bit_quant_type="nf4")
    assert nf4 == key(bnb_4bit_quant_type="nf4")
    assert (
        len({nf4, key(bnb_4bit_quant_type="fp4"), key(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)}) == 3
    )


# --- in the stage ----------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """How many pairs each reference pass computes."""
    counts = []
    compute = reference.compute_logps
    monkeypatch.setattr(
        reference, "compute_logps", lambda t, rows, missing, *rest: (counts.append(len(missing.rows)), compute(t, rows, missing, *rest))[1]
    )  # fmt: skip
    return counts


def dpo(recipe, tmp_path, name, **values):
    out = tmp_path / name
    assert main(["dpo", recipe("dpo", name=name, output_dir=str(out), max_steps=1, **LORA | values)]) == 0
    return read_metrics(out)


def test_what_uses_the_cache_again(recipe, tiny_llama, few_pairs, tmp_path, computed, capsys):
    common = dict(model_name_or_path=tiny_llama, dataset_name=few_pairs)
    first = dpo(recipe, tmp_path, "first", **common)
    assert computed == [12] and first[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert "12 pairs, 0 of them in the cache" in capsys.readouterr().out
    for name, values in {
        "seed": {"seed": 7}, "rank": {"lora_r": 8}, "beta": {"beta": 0.5}, "rate": {"learning_rate": 1e-4},
        "loss": {"loss_type": "ipo"}, "batch": {"per_device_train_batch_size": 3}, "subset": {"max_train_examples": 5},
        "full": {"use_peft": False},
    }.items():  # fmt: skip
        dpo(recipe, tmp_path, name, **common | values)
        assert computed == [12], name
    assert "12 pairs, 12 of them in the cache" in capsys.readouterr().out
    dpo(recipe, tmp_path, "length", **common, max_length=512)
    assert computed == [12, 1]  # one pair is longer than 256
    lines = Path(few_pairs).read_text().splitlines()
    changed = json.loads(lines[3])
    changed["chosen"][0]["content"] = "Indeed. " + changed["chosen"][0]["content"]
    (tmp_path / "changed.jsonl").write_text("\n".join([*lines[:3], json.dumps(changed), *lines[4:]]) + "\n")
    dpo(recipe, tmp_path, "token", **common | {"dataset_name": str(tmp_path / "changed.jsonl")})
    assert computed == [12, 1, 1]
    dpo(recipe, tmp_path, "padded", packing=False, **common)
    dpo(recipe, tmp_path, "dtype", dtype="bfloat16", **common)
    dpo(recipe, tmp_path, "part", ld_alpha=0.5, **common)
    assert computed == [12, 1, 1, 12, 12, 12]


def test_held_out_rows_have_their_reference_too(recipe, tiny_llama, few_pairs, tmp_path, computed):
    values = dict(eval_dataset_name="embedded:sample", dataset_test_split="heldout", max_eval_examples=5)
    both = {}
    for way in ("cached", "online"):
        rows = dpo(recipe, tmp_path, way, model_name_or_path=tiny_llama, dataset_name=few_pairs, reference=way,
                   eval_strategy="steps", eval_steps=1, **values)  # fmt: skip
        both[way] = next(row for row in rows if "eval_loss" in row)
    assert computed == [12, 5]
    dpo(recipe, tmp_path, "none", model_name_or_path=tiny_llama, dataset_name=few_pairs, beta=0.3, **values)
    assert computed == [12, 5]  # without an evaluation none for them; that of the training rows is cached
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert both["cached"][name] == pytest.approx(both["online"][name], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "loss_type", ["sigmoid", "aot", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("ipo", "sigmoid_norm"))]
)
def test_cached_and_online_train_alike(loss_type, recipe, tiny_llama, few_pairs, tmp_path):
    runs = []
    for way in ("cached", "online"):
        out = tmp_path / way
        file = recipe("dpo", name=way, model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(out),
                      reference=way, loss_type=loss_type, **LORA)  # fmt: skip
        assert main(["dpo", file]) == 0
        runs.append([row for row in read_metrics(out) if "loss" in row])
    for cached, online in zip(*runs, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/margins", "logps/chosen", "grad_norm"):
            assert cached[name] == pytest.approx(online[name], rel=1e-4, abs=1e-5), name


def test_full_fine_tuning_needs_no_second_model(recipe, tiny_llama, few_pairs, tmp_path, monkeypatch):
    import rlhf.models.loading

    loaded = []
    load = rlhf.models.loading.load_policy
    monkeypatch.setattr(rlhf.models.loading, "load_policy", lambda *a, **k: (loaded.append(a), load(*a, **k))[1])
    dpo(recipe, tmp_path, "cached", model_name_or_path=tiny_llama, dataset_name=few_pairs, use_peft=False)
    assert len(loaded) == 1
    dpo(recipe, tmp_path, "online", model_name_or_path=tiny_llama, dataset_name=few_pairs, use_peft=False, reference="online")  # fmt: skip
    assert len(loaded) == 3


def test_another_reference_model_through_the_cache(recipe, tiny_llama, few_pairs, tmp_path, computed, capsys):
    """A second round: from the first's policy, against the model that both started from. Its values are those of a run that
    starts from that model, also where it is an adapter; and it is gone when training begins."""
    common = dict(dataset_name=few_pairs)
    first = {"merge_adapter": True, "learning_rate": 1e-2, "model_name_or_path": tiny_llama}
    dpo(recipe, tmp_path, "first", **common | first)
    second = common | {"model_name_or_path": str(tmp_path / "first"), "reference_model": tiny_llama}
    rows = dpo(recipe, tmp_path, "second", **second)
    assert computed == [12] and abs(rows[0]["loss"] - math.log(2)) > 1e-3
    assert "loaded for one pass; the loss need not start at ln 2" in capsys.readouterr().out
    dpo(recipe, tmp_path, "again", **second | {"reference_cache": str(tmp_path / "other")})
    (kept,), (made,) = (Path(folder).glob("*/*.safetensors") for folder in (tmp_path / "reference", tmp_path / "other"))
    assert computed == [12, 12] and kept.read_bytes() == made.read_bytes()

    run = main(["sft", recipe("sft", model_name_or_path=tiny_llama, output_dir=str(tmp_path / "sft"), merge_adapter=False,
                              max_steps=1, **common, **LORA)])  # fmt: skip
    assert run == 0
    dpo(recipe, tmp_path, "adapter", **second | {"reference_model": str(tmp_path / "sft")})
    assert computed == [12, 12, 12] and not list((tmp_path / "adapter").glob(".merged*"))


@pytest.mark.parametrize(
    "launch_file",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("ddp.yaml", "zero2.yaml", "zero3.yaml", "fsdp2.yaml")],
)
def test_another_reference_model_under_each_engine(launch_file, recipe, tiny_llama, few_pairs, tmp_path):
    first = recipe("dpo", name="first", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "first"),
                   max_steps=1, learning_rate=1e-2, use_peft=False)  # fmt: skip
    assert main(["dpo", first]) == 0
    losses = []
    for number, processes in (("one", 1), ("two", 2)):
        second = recipe("dpo", name=number, model_name_or_path=str(tmp_path / "first"), dataset_name=few_pairs, max_steps=2,
                        output_dir=str(tmp_path / number), reference_model=tiny_llama, global_batch_size=4,
                        reference_cache=str(tmp_path / f"cache-{number}"), use_peft=False)  # fmt: skip
        Path(second).write_text(
            "".join(x for x in Path(second).read_text().splitlines(True) if "per_device_train" not in x)
        )
        if processes == 1:
            assert main(["dpo", second]) == 0
        else:
            done = forked.launch(2, "dpo", second, launch_file=launch_file)
            assert done.returncode == 0, done.stderr[-3000:]
        losses.append([row["loss"] for row in read_metrics(tmp_path / number) if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and len(losses[0]) == 2


def test_a_reference_of_another_tokenizer_is_refused(recipe, tiny_llama, tiny_gpt2, few_pairs, tmp_path, capsys):
    file = recipe("dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "o"), reference_model=tiny_gpt2)  # fmt: skip
    assert main(["dpo", file]) == 2
    told = capsys.readouterr().err
    assert (
        f"the tokenizer of {tiny_gpt2} is not that of the policy (" in told
        and "name a reference of the same family" in told
    )
    assert not (tmp_path / "o").exists()


def test_a_wrong_value_is_caught_before_the_first_step(recipe, tiny_llama, few_pairs, tmp_path, monkeypatch, capsys):
    """A file that is whole and says something wrong: DPO would not start at ln 2."""
    decode_right = reference.decode
    dpo(recipe, tmp_path, "first", model_name_or_path=tiny_llama, dataset_name=few_pairs)

    def wrong(content):
        keys, logps = decode_right(content)
        return keys, logps + np.array([3, 0])

    monkeypatch.setattr(reference, "decode", wrong)
    file = recipe("dpo", name="x", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "x"), **LORA)  # fmt: skip
    assert main(["dpo", file]) == 2
    assert "DPO does not start from its reference" in capsys.readouterr().err


def test_a_moving_reference_cannot_be_cached(recipe, tiny_llama, few_pairs, tmp_path, capsys):
    file = recipe("dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "x"), sync_ref_model=True)  # fmt: skip
    assert main(["dpo", file]) == 2
    assert "sync_ref_model updates the reference during training; set `reference: online`" in capsys.readouterr().err
