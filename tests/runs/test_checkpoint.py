"""The run folder: whose it is, where it goes on, and what is written into it."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest
import yaml

from rlhf import __version__
from rlhf.config.recipe import HARMLESS, Recipe
from rlhf.errors import UserError
from rlhf.files import Lock, is_disk_error
from rlhf.runs.checkpoints import (
    checkpoint_damage,
    digest_files,
    newest_checkpoint,
    place_checkpoint,
    remove_checkpoint,
    rotate_checkpoints,
)
from rlhf.runs.folder import RunFolder, check_disk, finish_run, fresh_folder, open_run, start_run
from rlhf.runs.provenance import git_commit, hardware, model_digest
from rlhf.runs.resume import find_checkpoint, verified_checkpoint

LAYOUT = {"engine": "one process", "split": "no", "processes": 1}
INPUTS = {"dataset_name": "d" * 64, "model_name_or_path": "m" * 64}


def recipe_for(folder, **values):
    values = {"stage": "sft", "output_dir": str(folder), "dataset_name": "data.jsonl", "seed": 1, **values}
    return Recipe("sft", "configs/x/sft.yaml", values, {key: line for line, key in enumerate(values, 1)})


def begin(folder, inputs=INPUTS, **values):
    """A run folder as the start of a training leaves it."""
    recipe = recipe_for(folder, **values)
    run = open_run(recipe, inputs)
    start_run(run, recipe, inputs, {"seed": 1})
    return run


def checkpoint(folder, step, whole=True):
    """A checkpoint of two files, as the trainer writes it."""
    path = folder / f"checkpoint-{step}"
    written = folder / ".partial" / path.name if whole else path
    (written / "part").mkdir(parents=True)
    (written / "model.safetensors").write_bytes(b"12345678")
    (written / "part" / "optimizer.pt").write_bytes(b"1234")
    if whole:
        place_checkpoint(written, path, digest_files(written), layout=LAYOUT)
    return path


def refusal(recipe, inputs=INPUTS):
    with pytest.raises(UserError) as caught:
        open_run(recipe, inputs)
    return str(caught.value)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- whose folder it is ----------------------------------------------------------------------------------------------


def test_new_folder(tmp_path):
    run = open_run(recipe_for(tmp_path / "a" / "b"), INPUTS)
    assert (run.folder, run.complete, run.resume_from) == (tmp_path / "a" / "b", None, None)


def test_opening_writes_nothing(tmp_path):
    open_run(recipe_for(tmp_path / "a"), INPUTS)
    assert list(tmp_path.iterdir()) == []


def test_empty_folder_is_new(tmp_path):
    assert open_run(recipe_for(tmp_path), INPUTS).resume_from is None


def test_begun_folder_without_a_checkpoint_begins_again(tmp_path):
    begin(tmp_path)
    run = open_run(recipe_for(tmp_path), INPUTS)
    assert (run.complete, run.resume_from) == (None, None)


def test_interrupted_folder_goes_on_from_its_checkpoint(tmp_path):
    begin(tmp_path)
    checkpoint(tmp_path, 10)
    assert open_run(recipe_for(tmp_path), INPUTS).resume_from == str(tmp_path / "checkpoint-10")


def test_complete_folder(tmp_path):
    finish_run(begin(tmp_path), {"steps": 25})
    assert open_run(recipe_for(tmp_path), INPUTS).complete["steps"] == 25


def test_half_written_end_is_neither_complete_nor_absent(tmp_path):
    begin(tmp_path)
    (tmp_path / "complete.json").write_text('{"steps": 2')
    assert refusal(recipe_for(tmp_path)) == (
        f"{tmp_path}/complete.json is damaged (not valid JSON: Expecting ',' delimiter: line 1 column 12 (char 11)), so it "
        "is unknown whether the model beside it is finished; nothing was changed: move the file away to let the same "
        "command train again, as there is no checkpoint, or give --fresh to train in a new folder"
    )


def test_folder_of_somebody_else_is_left_alone(tmp_path):
    for name in "edcba":
        (tmp_path / name).write_text("mine")
    before = tree(tmp_path)
    assert refusal(recipe_for(tmp_path)) == (
        f"configs/x/sft.yaml:2: output_dir {tmp_path} holds other files (a, b, c, d) and no run; "
        "name another folder (nothing was overwritten)"
    )
    assert tree(tmp_path) == before


def test_output_dir_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    message = f"configs/x/sft.yaml:2: output_dir {tmp_path / 'out'} is a file; name a folder"
    assert refusal(recipe_for(tmp_path / "out")) == message


def test_output_dir_lies_below_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    assert refusal(recipe_for(tmp_path / "out" / "sft")).startswith("configs/x/sft.yaml:2: output_dir ")


def test_folder_without_the_right_to_write(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert refusal(recipe_for(tmp_path / "a" / "b")) == (
        f"configs/x/sft.yaml:2: output_dir {tmp_path / 'a' / 'b'} can't be written to "
        f"({tmp_path} is read-only for this user)"
    )


def test_output_dir_from_the_command_line_is_named_so(tmp_path):
    (tmp_path / "mine").write_text("")
    recipe = recipe_for(tmp_path)
    recipe.lines["output_dir"] = None
    assert refusal(recipe).startswith("--output_dir: output_dir ")


# --- another run -----------------------------------------------------------------------------------------------------


def test_changed_recipe_lists_what_differs(tmp_path):
    begin(tmp_path, beta=0.1, lora_r=8)
    before = tree(tmp_path)
    assert refusal(recipe_for(tmp_path, beta=0.2, use_peft=True)) == (
        f"configs/x/sft.yaml:2: output_dir {tmp_path} holds another run; it differs in beta: 0.1 -> 0.2; "
        f"lora_r: 8 -> 16 (default); use_peft: False (default) -> True. "
        f"Give --output_dir another folder, or --fresh for a new one beside it (nothing was overwritten)"
    )
    assert tree(tmp_path) == before


def test_complete_run_of_another_recipe_is_not_taken_for_this_one(tmp_path):
    finish_run(begin(tmp_path), {"steps": 25})
    assert "it differs in seed: 1 -> 2. " in refusal(recipe_for(tmp_path, seed=2))


@pytest.mark.parametrize("key", sorted(HARMLESS - {"output_dir"}))
def test_harmless_key_may_change(tmp_path, key):
    begin(tmp_path, **{key: "old"})
    checkpoint(tmp_path, 5)
    assert open_run(recipe_for(tmp_path, **{key: "new"}), INPUTS).resume_from == str(tmp_path / "checkpoint-5")


def test_moved_folder_goes_on(tmp_path):
    begin(tmp_path / "old")
    checkpoint(tmp_path / "old", 5)
    (tmp_path / "old").rename(tmp_path / "new")
    assert open_run(recipe_for(tmp_path / "new"), INPUTS).resume_from == str(tmp_path / "new" / "checkpoint-5")


def test_changed_data_is_noticed(tmp_path):
    begin(tmp_path)
    message = refusal(recipe_for(tmp_path), {**INPUTS, "dataset_name": "e" * 64})
    assert "it differs in the content of dataset_name (data.jsonl). " in message


def test_changed_held_out_data_is_noticed(tmp_path):
    """`heldout` is no key of a recipe, so there is no name to tell."""
    begin(tmp_path, inputs={**INPUTS, "heldout": "h" * 64})
    message = refusal(recipe_for(tmp_path), {**INPUTS, "heldout": "i" * 64})
    assert "heldout" in message and "None" not in message


def test_other_data_is_told_once(tmp_path):
    """The name differs, so that the content differs goes without saying."""
    begin(tmp_path)
    message = refusal(recipe_for(tmp_path, dataset_name="b.jsonl"), {**INPUTS, "dataset_name": "e" * 64})
    assert "it differs in dataset_name: 'data.jsonl' -> 'b.jsonl'. " in message


def test_input_that_was_not_recorded_is_no_difference(tmp_path):
    begin(tmp_path, inputs={})
    assert open_run(recipe_for(tmp_path), INPUTS).complete is None


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"- a\n", b"just words"])
def test_damaged_recipe_in_the_folder(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    message = f"{tmp_path / 'recipe.yaml'} can't be read; move the folder away and start again"
    assert refusal(recipe_for(tmp_path)) == message


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_no_folder_has_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None


def test_highest_step_is_a_number_not_a_text(tmp_path):
    for step in (9, 10):
        checkpoint(tmp_path, step)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_checkpoint_that_was_never_marked_is_passed_over(tmp_path):
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10, whole=False)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


@pytest.mark.parametrize("name", ["model.safetensors", "part/optimizer.pt"])
def test_checkpoint_with_a_missing_file_is_passed_over(tmp_path, name):
    checkpoint(tmp_path, 9)
    (checkpoint(tmp_path, 10) / name).unlink()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


@pytest.mark.parametrize("content", [b"", b"1234567", b"123456789"])
def test_checkpoint_with_a_file_of_another_size_is_passed_over(tmp_path, content):
    checkpoint(tmp_path, 9)
    (checkpoint(tmp_path, 10) / "model.safetensors").write_bytes(content)  # it had 8 bytes
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


@pytest.mark.parametrize("content", ["", '{"files": {"a"', "null", "{}", "[]"])
def test_checkpoint_with_a_damaged_manifest_is_passed_over(tmp_path, content):
    checkpoint(tmp_path, 9)
    (checkpoint(tmp_path, 10) / "manifest.json").write_text(content)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


def test_no_whole_checkpoint(tmp_path):
    checkpoint(tmp_path, 10, whole=False)
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", ["checkpoint-", "checkpoint-best", "checkpoint-12.old"])
def test_folder_that_is_called_nearly_like_a_checkpoint(tmp_path, name):
    checkpoint(tmp_path, 9).rename(tmp_path / name)
    assert newest_checkpoint(tmp_path) is None


def test_the_manifest_lists_files_with_sizes_and_checksums(tmp_path):
    path = checkpoint(tmp_path, 10)
    found = json.loads((path / "manifest.json").read_text())
    sha = {name: hashlib.sha256(content).hexdigest() for name, content in (("m", b"12345678"), ("o", b"1234"))}
    assert found == {
        "files": {"model.safetensors": [8, sha["m"]], "part/optimizer.pt": [4, sha["o"]]},
        "layout": LAYOUT,
    }


def test_several_processes_share_the_files_to_sum_up(tmp_path):
    path = checkpoint(tmp_path, 10)
    parts = [digest_files(path, part, 3) for part in range(3)]
    assert [len(p) for p in parts] == [1, 1, 0] and parts[0] | parts[1] == digest_files(path)


def test_a_changed_bit_is_found_when_the_content_is_read(tmp_path, capsys):
    checkpoint(tmp_path, 9)
    (checkpoint(tmp_path, 10) / "model.safetensors").write_bytes(b"1234567X")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")  # a quick look
    assert verified_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert capsys.readouterr().out == (
        f"warning: {tmp_path}/checkpoint-10 is damaged and not used: the content of model.safetensors differs from what was written "
        "(sha256)\n"
    )


def test_ranks_share_the_reading_of_a_checkpoint(tmp_path):
    """Of two files each of two ranks reads one: the damage is found by one of them, and by that one alone."""
    path = checkpoint(tmp_path, 10)
    (path / "part" / "optimizer.pt").write_bytes(b"123X")
    found = [checkpoint_damage(path, verify=True, part=part, parts=2) for part in range(2)]
    assert found == ["", "the content of part/optimizer.pt differs from what was written (sha256)"]


def test_damage_is_named(tmp_path):
    path = checkpoint(tmp_path, 10)
    assert checkpoint_damage(path, verify=True) == ""
    (path / "model.safetensors").write_bytes(b"123")
    assert checkpoint_damage(path) == "model.safetensors has 3 bytes, 8 were written"
    (path / "model.safetensors").unlink()
    assert checkpoint_damage(path) == "model.safetensors is missing"
    (path / "manifest.json").unlink()
    assert checkpoint_damage(path) == "it was never finished (no readable manifest)"


def test_a_checkpoint_that_is_written_again_replaces_the_damaged_one(tmp_path):
    """After a damaged checkpoint-10 the run goes on from 9 and writes 10 anew."""
    path = checkpoint(tmp_path, 10)
    (path / "model.safetensors").write_bytes(b"another size")
    checkpoint(tmp_path, 10)
    assert verified_checkpoint(tmp_path) == str(path)
    assert (path / "model.safetensors").read_bytes() == b"12345678"


def test_a_checkpoint_gets_its_name_last(tmp_path, monkeypatch):
    """Whatever step of placing is the last before a kill: what has the name of a checkpoint and a manifest is whole."""
    checkpoint(tmp_path, 9)
    monkeypatch.setattr(os, "rename", lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint(tmp_path, 10)
    assert verified_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut after the rename loses nothing: files, manifest and folders were synced before it."""
    sync, rename, synced = os.fsync, os.rename, []
    named_after = []
    monkeypatch.setattr(os, "fsync", lambda file: (sync(file), synced.append(os.fstat(file).st_ino))[0])
    monkeypatch.setattr(os, "rename", lambda a, b: (named_after.extend(synced), rename(a, b))[1])
    path = checkpoint(tmp_path, 10)
    parts = [path, *path.rglob("*")]
    assert sorted(p.name for p in parts) == [
        "checkpoint-10",
        "manifest.json",
        "model.safetensors",
        "optimizer.pt",
        "part",
    ]
    assert {p.stat().st_ino for p in parts} <= set(named_after)
    assert synced[-1] == tmp_path.stat().st_ino  # and its name after it


def test_a_run_resumes_from_a_checkpoint_that_it_has_read(tmp_path, capsys):
    """A bit of the newest has changed, and its size has not: the one before it is taken."""
    checkpoint(tmp_path, 9)
    (checkpoint(tmp_path, 10) / "model.safetensors").write_bytes(b"1234567X")
    run = find_checkpoint(RunFolder(tmp_path, None, None), LAYOUT)
    assert run.resume_from == str(tmp_path / "checkpoint-9")
    assert f"warning: {tmp_path}/checkpoint-10 is damaged and not used" in capsys.readouterr().out


def test_a_half_deleted_checkpoint_is_not_whole(tmp_path, monkeypatch):
    path = checkpoint(tmp_path, 10)
    monkeypatch.setattr(shutil, "rmtree", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(path)
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [(None, None, {1, 2, 10}), (1, None, {10}), (2, None, {2, 10}), (1, 1, {1, 10}), (9, None, {1, 2, 10})],
)
def test_rotation_keeps_the_newest_and_the_best(keep, best, kept, tmp_path):
    for step in (10, 1, 2):  # by their numbers, not their times
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 11, whole=False)  # what a kill has left
    rotate_checkpoints(tmp_path, keep, best and str(tmp_path / f"checkpoint-{best}"))
    assert {int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*")} == kept


def test_rotation_without_a_whole_one_deletes_nothing(tmp_path):
    checkpoint(tmp_path, 1, whole=False)
    rotate_checkpoints(tmp_path, 1)
    assert (tmp_path / "checkpoint-1").is_dir()


# --- the lock, and a fresh folder ------------------------------------------------------------------------------------


def test_two_runs_cannot_write_one_folder(tmp_path):
    first = Lock(tmp_path / "run", "r.yaml:1")
    with pytest.raises(UserError) as refused:
        Lock(tmp_path / "run", "r.yaml:1")
    assert re.match(
        rf"r.yaml:1: output_dir {tmp_path}/run is being written by another run \(process {os.getpid()} on \S+, since "
        r"\S+\); wait for it, stop it, or give --output_dir another folder$",
        str(refused.value),
    )
    first.release()
    assert not (tmp_path / "run").exists()  # there was nothing else in it
    Lock(tmp_path / "run", "r.yaml:1").release()


def test_a_dead_run_holds_no_lock(tmp_path):
    code = f"from pathlib import Path; from rlhf.files import Lock; l = Lock(Path({str(tmp_path)!r}), ''); import os; os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert (tmp_path / ".lock").exists()
    Lock(tmp_path, "").release()


def test_a_folder_with_only_a_lock_is_empty(tmp_path):
    Lock(tmp_path, "")
    assert open_run(recipe_for(tmp_path), INPUTS).complete is None


def test_fresh_folder(tmp_path):
    assert fresh_folder(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    assert fresh_folder(tmp_path / "run") == tmp_path / "run"
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "recipe.yaml").touch()
    assert fresh_folder(tmp_path / "run") == tmp_path / "run-3"


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EROFS, "x"), True),
        (FileNotFoundError(errno.ENOENT, "x"), False),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), True),
        (ValueError("shape"), False),
    ],
)
def test_disk_error(error, trouble):
    assert is_disk_error(error) is trouble


# --- disk space ------------------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_too_little_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**10, 0, 1_500_000_000))
    with pytest.raises(UserError) as caught:
        check_disk(tmp_path / "out", 2_250_000_000, "the finished model")
    assert str(caught.value) == (
        f"{tmp_path / 'out'} has 1.50 GB free, but the finished model needs about 2.25 GB; "
        "free some, or give --output_dir a folder on another disk"
    )


def test_just_enough_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**10, 0, 100))
    assert check_disk(tmp_path, 100, "it") is None


def test_disk_of_a_folder_that_is_not_there_yet_is_its_parents(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(1, 0, 1))
    check_disk(tmp_path / "a" / "b", 1, "it")
    assert asked == [tmp_path]


# --- what is written -------------------------------------------------------------------------------------------------


def test_begin_writes_two_files_and_nothing_half(tmp_path):
    begin(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["provenance.json", "recipe.yaml"]


def test_recipe_is_kept_as_it_was_run(tmp_path):
    begin(tmp_path, run_name="Zoë: 1", lora_target_modules=["q", "v"], learning_rate=1e-05)
    found = yaml.safe_load((tmp_path / "recipe.yaml").read_text(encoding="utf-8"))
    assert found == recipe_for(tmp_path, run_name="Zoë: 1", lora_target_modules=["q", "v"], learning_rate=1e-05).values


def test_recipe_tells_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/rlhf", "sft", "configs/x/sft.yaml"])
    begin(tmp_path)
    first = (tmp_path / "recipe.yaml").read_text().splitlines()[0]
    assert first == "# configs/x/sft.yaml, as run by `rlhf sft configs/x/sft.yaml`"


def test_command_with_a_line_break_does_not_spoil_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rlhf", "sft", "x.yaml", "--run_name", "a\nbeta: 7"])
    begin(tmp_path, run_name="a\nbeta: 7")
    found = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert found == recipe_for(tmp_path, run_name="a\nbeta: 7").values


def provenance(tmp_path, arguments):
    recipe = recipe_for(tmp_path)
    start_run(open_run(recipe, INPUTS), recipe, INPUTS, arguments)
    return json.loads((tmp_path / "provenance.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("key", ["hub_token", "push_to_hub_token", "token"])
def test_provenance_holds_no_token(tmp_path, key):
    provenance(tmp_path, {"seed": 1, key: "hf_secret"})
    assert "hf_secret" not in (tmp_path / "provenance.json").read_text()


def test_provenance_keeps_the_number_of_tokens(tmp_path):
    """Of an evaluate recipe: a count, no secret."""
    assert provenance(tmp_path, {"max_new_tokens": 80})["arguments"] == {"max_new_tokens": 80}


def test_provenance_says_what_was_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/rlhf", "sft", "x.yaml"])
    found = provenance(tmp_path, {"seed": 1})
    told = {key: found[key] for key in ("stage", "recipe", "command", "inputs", "arguments")}
    assert told == {
        "stage": "sft",
        "recipe": "configs/x/sft.yaml",
        "command": ["rlhf", "sft", "x.yaml"],
        "inputs": INPUTS,
        "arguments": {"seed": 1},
    }


def test_provenance_says_on_what(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = provenance(tmp_path, {})
    assert (found["versions"]["rlhf-dpo"], found["versions"]["python"], found["hardware"]["processes"]) == (
        __version__,
        sys.version.split()[0],
        4,
    )


def test_arguments_that_json_does_not_know_become_text(tmp_path):
    assert provenance(tmp_path, {"folder": tmp_path})["arguments"] == {"folder": str(tmp_path)}


def test_gpus_are_listed_only_where_torch_is_loaded(monkeypatch):
    names = ["H200", "H100"]
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, get_device_name=names.__getitem__)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    with_torch = hardware()
    monkeypatch.delitem(sys.modules, "torch")
    assert (with_torch["gpus"], "gpus" in hardware()) == (names, False)


def test_no_git_is_no_mistake(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


def test_finish_writes_its_summary(tmp_path):
    finish_run(begin(tmp_path), {"steps": 25, "loss": 0.5})
    found = json.loads((tmp_path / "complete.json").read_text())
    assert {**found, "finished": "then"} == {"finished": "then", "steps": 25, "loss": 0.5}


# --- which model went in ---------------------------------------------------------------------------------------------


def test_digest_of_a_hub_model_is_its_name():
    assert model_digest("some/model") == "some/model"


def test_digest_of_a_finished_stage_is_the_one_it_recorded(tmp_path):
    (tmp_path / "complete.json").write_text('{"weights_sha256": "abc"}')
    assert model_digest(str(tmp_path)) == "abc"


def test_digest_of_another_folder_is_its_weight_files(tmp_path):
    for name, size in (("b.safetensors", 2), ("a.safetensors", 3), ("notes.txt", 5)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert model_digest(str(tmp_path)) == "a.safetensors:3+b.safetensors:2"
