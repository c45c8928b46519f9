"""Run folders and model folders that something has damaged: one sentence that names the file, and nothing is lost."""

import json
import os
import struct

import pytest
import yaml

from rlhf.config.recipe import Recipe
from rlhf.errors import UserError
from rlhf.files import read_json
from rlhf.models import embedded
from rlhf.models.folder import check_model_folder
from rlhf.runs.checkpoints import checkpoint_damage, newest_checkpoint
from rlhf.runs.folder import fresh_folder, open_run
from rlhf.runs.lineage import maker_of
from rlhf.runs.metrics import read_metrics
from rlhf.runs.provenance import model_digest
from rlhf.runs.records import read_recipe
from rlhf.runs.status import status_of_folder, statuses
from rlhf.training.checks import bytes_needed, refuse_damaged

INPUTS = {"dataset_name": "d" * 64}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
NOT_A_RECIPE = {
    "binary": b"\xff\xfe\x00", "nested": b"[" * 500, "a bad date": b"seed: 2024-13-45", "a tag": b"seed: !!bool maybe",
    "a list": b"[1]", "empty": b"",
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose run has started in tmp_path/out."""
    values = {"stage": "sft", "output_dir": str(tmp_path / "out"), "dataset_name": "d.jsonl"}
    out = tmp_path / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text(yaml.safe_dump(values))
    (out / "provenance.json").write_text(json.dumps({"stage": "sft", "inputs": INPUTS}))
    return Recipe("sft", str(tmp_path / "sft.yaml"), values, {"output_dir": 2})


def refusal(recipe):
    with pytest.raises(UserError) as error:
        open_run(recipe, INPUTS)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)
    return str(error.value)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[1]", "1", '"a"', "null", "", "{", "[" * 10_000, "1" * 5000, "\ud800"], ids=range(9))
def test_json_that_is_no_object_is_none(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert read_json(tmp_path / "a.json") is None


def test_json_that_is_no_file_is_none(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert [read_json(tmp_path), read_json(tmp_path / "loop"), read_json("a" * 300), read_json("\0")] == [None] * 4


@pytest.mark.parametrize("content", NOT_A_RECIPE.values(), ids=NOT_A_RECIPE)
def test_recipe_that_is_none(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert read_recipe(tmp_path / "recipe.yaml") is None


# --- the run folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, damage",
    [
        ("[1]", "it holds [1], expected a JSON object"),
        ('{"a": 1}', "it holds {'a': 1}, and neither 'steps' nor 'pairs'"),
        ('{"steps": "two"}', "'steps' is 'two'"),
        ('{"steps": 2, "seconds": null}', "'seconds' is None"),
        ('{"steps": 2, "seconds": NaN, "first_loss": null}', "'seconds' is nan"),
        ('{"steps": 2, "seconds": -Infinity}', "'seconds' is -inf"),
        ('{"steps": 2', "not valid JSON: Expecting ',' delimiter: line 1 column 12 (char 11)"),
        ("", "not valid JSON: Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_a_damaged_complete_json_is_named_and_the_model_stays(recipe, text, damage):
    out = recipe.values["output_dir"]
    for name, content in (("complete.json", text), ("model.safetensors", "the work of a week")):
        with open(f"{out}/{name}", "w") as file:
            file.write(content)
    message = (
        f"{out}/complete.json is damaged ({damage}), so it is unknown whether the model beside it is finished; nothing "
        "was changed: move the file away to let the same command train again, as there is no checkpoint, or give --fresh to "
        "train in a new folder"
    )
    assert refusal(recipe) == message
    with open(f"{out}/model.safetensors") as file:
        assert file.read() == "the work of a week"


def test_a_damaged_complete_json_beside_a_checkpoint(recipe, tmp_path):
    (tmp_path / "out" / "checkpoint-7").mkdir()
    (tmp_path / "out" / "complete.json").write_text("[1]")
    assert f"to let the same command resume from {tmp_path}/out/checkpoint-7, or give --fresh" in refusal(recipe)


@pytest.mark.parametrize("text", ["[1]", "", '{"inputs": [1]}', '{"inputs": null}'])
def test_a_damaged_provenance_is_named(recipe, tmp_path, text):
    (tmp_path / "out" / "provenance.json").write_text(text)
    assert refusal(recipe).startswith(
        f"{tmp_path}/out/provenance.json is damaged, so data and input model can't be compared"
    )


def test_a_recorded_recipe_that_is_an_alias_bomb(recipe, tmp_path):
    (tmp_path / "out" / "recipe.yaml").write_text(BOMB)
    assert "holds another run; it differs in a: ['x', 'x'" in refusal(recipe)


def test_a_recorded_recipe_that_is_a_folder(recipe, tmp_path):
    (tmp_path / "out" / "recipe.yaml").unlink()
    (tmp_path / "out" / "recipe.yaml").mkdir()
    assert refusal(recipe) == f"{tmp_path}/out/recipe.yaml can't be read; move the folder away and start again"


@pytest.mark.parametrize("target", ["nowhere", "out"])
def test_an_output_dir_that_is_a_link_to_nothing(recipe, tmp_path, target):
    (tmp_path / "out").rename(tmp_path / "before")
    (tmp_path / "out").symlink_to(target)
    for folder in (tmp_path / "out", tmp_path / "out" / "sub"):
        recipe.values["output_dir"] = str(folder)
        assert f"{tmp_path}/out is a link to {target}, which does not exist" in refusal(recipe)


@pytest.mark.parametrize("name, reason", [("a" * 300, "File name too long"), ("a\0b", "embedded null byte")])
def test_an_output_dir_that_no_folder_can_have(recipe, tmp_path, name, reason):
    recipe.values["output_dir"] = str(tmp_path / name)
    assert f"can't be used: {reason}" in refusal(recipe)


@pytest.mark.parametrize("folder", ["/", ".", "..", "a/.."])
def test_no_fresh_folder_beside_one_without_a_name(tmp_path, folder):
    from pathlib import Path

    with pytest.raises(UserError, match="--fresh makes a new folder beside output_dir"):
        fresh_folder(Path(folder))


def test_a_fresh_folder_is_never_a_link_to_nothing(tmp_path):
    (tmp_path / "out").symlink_to("nowhere")
    assert fresh_folder(tmp_path / "out") == tmp_path / "out-2"


@pytest.mark.parametrize(
    "files, damage",
    [
        ({"a": [1]}, "its manifest says [1] of 'a', expected size and sha256"),
        ({"a": ["x", 1]}, "its manifest says ['x', 1] of 'a', expected size and sha256"),
        ({"a": 1}, "its manifest says 1 of 'a', expected size and sha256"),
        ({"a": [1, None]}, "its manifest says [1, None] of 'a', expected size and sha256"),
        ({"/etc/passwd": [1, "0"]}, "its manifest names '/etc/passwd', a file outside the checkpoint"),
        ({"../manifest.json": [1, "0"]}, "its manifest names '../manifest.json', a file outside the checkpoint"),
        ({"a": [2, "0"]}, "a has 1 bytes, 2 were written"),
        ({"a": [1, "0"]}, "the content of a differs from what was written (sha256)"),
        ({"b" * 300: [1, "0"]}, f"{'b' * 78} is missing"),
        ({}, "it was never finished (no readable manifest)"),
    ],
)
def test_a_damaged_manifest(tmp_path, files, damage):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "a").write_text("x")
    (tmp_path / "checkpoint-3" / "manifest.json").write_text(json.dumps({"files": files}))
    assert checkpoint_damage(tmp_path / "checkpoint-3", verify=True) == damage


@pytest.mark.parametrize("layout", ["DDP", {"split": "no"}, {"engine": "DDP", "split": "no", "processes": "two"}])
def test_a_damaged_layout(tmp_path, layout):
    (tmp_path / "a").write_text("x")
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"a": [1, "0"]}, "layout": layout}))
    assert checkpoint_damage(tmp_path).startswith("its manifest says layout: ")


def test_folders_that_only_look_like_checkpoints(tmp_path):
    for name in ("checkpoint-²", "checkpoint-１", "checkpoint-" + "9" * 200):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-4").write_text("a file")
    assert newest_checkpoint(tmp_path) is None


# --- status, metrics -------------------------------------------------------------------------------------------------


def test_metrics_without_what_is_no_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'[1]\n{"step": 1}\n3\n{"loss": 1}\n{"step": "x"}\n\xff\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_status_of_a_folder_with_damaged_notes(tmp_path):
    (tmp_path / "stopped.json").write_text('{"step": "two"}')
    found = status_of_folder(tmp_path, "sft")
    assert (found.kind, found.step, found.of, found.by) == ("stopped", 0, 0, "")


def test_status_of_runs_of_which_one_has_a_damaged_provenance(tmp_path):
    for name, text in (("a", "[1]"), ("b", '{"stage": "dpo"}'), ("c", '{"stage": ["sft"]}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "provenance.json").write_text(text)
    assert [found.stage for found in statuses(str(tmp_path))] == ["dpo", "?", "?"]


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [*NOT_A_RECIPE.values(), b"output_dir: 123", b"output_dir: [a]", b"output_dir: {a: 1}"], ids=range(9)
)
def test_a_sibling_recipe_that_cant_be_read_makes_no_model(tmp_path, content):
    (tmp_path / "sft.yaml").write_bytes(content)
    assert maker_of(Recipe("dpo", str(tmp_path / "dpo.yaml"), {}, {}), "123") == ""


@pytest.mark.parametrize("text", ["[1]", '{"sha256": [1]}', '{"sha256": {"a": 1}}'])
def test_a_damaged_manifest_of_the_embedded_model_is_not_whole(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    assert not embedded._is_complete(tmp_path)


def test_digest_of_a_model_with_a_dangling_link(tmp_path):
    (tmp_path / "a.safetensors").write_text("x")
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    assert model_digest(str(tmp_path)) == "a.safetensors:1"
    assert model_digest("a" * 300) == "a" * 300


def test_an_input_model_whose_complete_json_is_damaged(tmp_path):
    (tmp_path / "complete.json").write_text("[1]")
    with pytest.raises(UserError) as error:
        model_digest(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path}/complete.json is damaged (it holds [1], expected a JSON object), so the model beside it can't be identified; "
        "if its weights are right, remove that file, else write or copy the model again"
    )


def test_preflight_refuses_what_is_damaged(tmp_path):
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text("{}")
    recipe = Recipe(
        "dpo", str(tmp_path / "dpo.yaml"), {"model_name_or_path": str(model), "output_dir": str(tmp_path)}, {}
    )
    with pytest.raises(UserError, match="m has no model.safetensors"):
        refuse_damaged(recipe, ("model_name_or_path",))
    weights(model / "model.safetensors")
    refuse_damaged(recipe, ("model_name_or_path",))
    (tmp_path / "complete.json").write_text("[1]")
    with pytest.raises(UserError, match="complete.json is damaged"):
        refuse_damaged(recipe, ("model_name_or_path",))


def test_room_for_a_model_whose_weights_are_gone(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("gone")
    assert bytes_needed(str(tmp_path), False, False, None) == 20_000_000


def test_room_for_a_checkpoint_is_in_fp32_whatever_the_model_is_in(tmp_path):
    """Two weights: their fp32 copies and Adam's moments, 12 bytes each, beside the finished model."""
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    size = (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert bytes_needed(str(tmp_path), False, False, None) == int(1.2 * size + 2 * 12) + 20_000_000
    assert bytes_needed(str(tmp_path), True, False, None) == 20_000_000


def weights(path, cut=None):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes((struct.pack("<Q", len(header)) + header + bytes(8))[:cut])


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda f: os.unlink(f / "config.json"), "has no finished model (no config.json or adapter_config.json)"),
        (lambda f: (f / "config.json").write_text("[1]"), "config.json can't be read as a JSON object"),
        (lambda f: weights(f / "model.safetensors", cut=-1), "model.safetensors has 76 bytes, but its header requires 77"),
        (lambda f: weights(f / "model.safetensors", cut=5), "model.safetensors is not a safetensors file"),
        (lambda f: weights(f / "model.safetensors", cut=20), "model.safetensors is truncated or not a safetensors file"),
        (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "is truncated or not a safetensors"),
        (lambda f: os.unlink(f / "model.safetensors"), "has no model.safetensors"),
        (lambda f: (os.unlink(f / "model.safetensors"), (f / "model.safetensors").symlink_to("gone")), "is missing (a dangling link"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights are not loaded ('pytorch_model.bin'"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "'base_model_name_or_path' is None, expected a string"),
    ],
)  # fmt: skip
def test_a_model_folder_that_cant_be_loaded_is_refused_by_its_file(tmp_path, change, problem):
    (tmp_path / "config.json").write_text("{}")
    weights(tmp_path / "model.safetensors")
    check_model_folder(tmp_path, "dpo.yaml:2")
    change(tmp_path)
    with pytest.raises(UserError) as error:
        check_model_folder(tmp_path, "dpo.yaml:2", "rlhf sft sft.yaml")
    assert str(error.value).startswith("dpo.yaml:2: ") and problem in str(error.value)
    assert "run: rlhf sft sft.yaml" in str(error.value)


@pytest.mark.parametrize(
    "index", ["[1]", '{"weight_map": {"w": 1}}', '{"weight_map": {}}', '{"weight_map": {"w": "gone"}}']
)
def test_a_damaged_index_of_shards(tmp_path, index):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="index.json|gone is missing"):
        check_model_folder(tmp_path, "chat")
