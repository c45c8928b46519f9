"""What goes into a bundle, what is told, and that nothing is there after an error."""

import fcntl
import json
import os
import shutil
import subprocess
import tarfile

import datasets
import huggingface_hub.constants
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.bundle import archive, pack, wheels
from rlhf.models import embedded


def names(file):
    with tarfile.open(file) as tar:
        return tar.getnames()


@pytest.fixture
def hub(job, monkeypatch):
    """The model and the data as org/tiny and org/Pairs in the hub's local cache; returns the model's folder there."""
    root = job.root / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", job.root / "datasets")
    folder = root / "models--org--tiny"
    snapshot, commit = folder / "snapshots" / ("a" * 40), "a" * 40
    (folder / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((job.away / "tiny llama").iterdir())):
        shutil.move(path, folder / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    made = datasets.load_dataset("json", data_files=str(job.away / "pairs.jsonl"), cache_dir=str(job.root / "work"))
    cached = next((job.root / "work" / "json").glob("*/*/*/dataset_info.json")).parent
    place = job.root / "datasets" / "org___pairs" / "default" / "0.0.0" / "b123"
    shutil.copytree(cached, place)
    (place / "json-train.arrow").rename(place / "pairs-train.arrow")
    info = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "pairs", "config_name": "default"}))
    assert made["train"].num_rows == 12
    job.edit("sft", "^model_name_or_path: .*", "model_name_or_path: org/tiny")
    for stage in ("sft", "dpo"):
        job.edit(stage, "^dataset_name: .*", "dataset_name: org/Pairs")
    return folder


def test_the_recipes_come_out_with_the_same_keys_lines_and_comments(job):
    assert (job.bundle(), job.unbundle()) == (0, 0)
    text = (job.there / "configs/mine/sft.yaml").read_text()
    before = (job.recipes / "sft.yaml").read_text()
    expected = before.replace(f"{job.away}/tiny llama", '"models/tiny llama"', 1)
    expected = expected.replace(f"{job.away}/out/sft", "runs/mine/sft").replace(
        f"'{job.away}/pairs.jsonl'", '"data/pairs.jsonl"'
    )
    assert text == expected
    dpo = (job.there / "configs/mine/dpo.yaml").read_text()
    assert "model_name_or_path: runs/mine/sft   # from outside" in dpo and "reference_cache: cache/logps" in dpo
    assert (job.there / "data/pairs.jsonl").read_bytes() == (job.away / "pairs.jsonl").read_bytes()
    assert job.tree(job.there / "models/tiny llama") == job.tree(job.away / "tiny llama")


def test_paths_below_the_current_folder_are_not_touched(job):
    shutil.copy(job.away / "pairs.jsonl", "pairs.jsonl")
    for stage in ("sft", "dpo"):
        job.edit(stage, "^dataset_name: .*", "dataset_name: ./pairs.jsonl")
        job.edit(stage, "^output_dir: .*", f"output_dir: runs/{stage}/")
    job.edit("sft", "^model_name_or_path: .*", "model_name_or_path: models/m")
    job.edit("dpo", "^model_name_or_path: .*", "model_name_or_path: ./runs/sft")
    job.edit("dpo", "^reference_cache: .*\n", "")
    shutil.copytree(job.away / "tiny llama", "models/m")
    assert (job.bundle(), job.unbundle()) == (0, 0)
    assert job.tree(job.there / "configs") == job.tree(job.recipes.parent)
    assert (job.there / "pairs.jsonl").is_file() and (job.there / "models/m/config.json").is_file()


def test_checksums_are_what_sha256sum_reads(job):
    assert (job.bundle(), job.unbundle()) == (0, 0)
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=job.there, capture_output=True, text=True
    )
    listed = set(names(job.file)) - {"SHA256SUMS"}
    assert done.returncode == 0 and {line.split(": ")[0] for line in done.stdout.splitlines()} == listed


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.zst"])
def test_compressed_or_not_it_is_the_same(job, suffix):
    job.file = job.root / f"mine.{suffix}"
    assert (job.bundle(), job.unbundle()) == (0, 0)
    magic = {"tar": b"bund", "tar.gz": b"\x1f\x8b\x08", "tar.zst": b"\x28\xb5\x2f\xfd"}[suffix]
    assert job.file.read_bytes().startswith(magic)
    assert job.tree(job.there / "models/tiny llama") == job.tree(job.away / "tiny llama")


def test_a_bundle_names_nobody_and_is_the_same_each_time(job):
    assert job.bundle() == 0
    first = job.file.read_bytes()
    with tarfile.open(job.file) as tar:
        assert {(m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, "", "")}
    assert job.bundle("--overwrite") == 0 and job.file.read_bytes() == first


def test_dry_run_lists_sizes_and_writes_nothing(job, capsys):
    before = job.tree(job.root)
    assert job.bundle("--dry-run") == 0
    shown = capsys.readouterr().out
    size = (job.away / "tiny llama" / "model.safetensors").stat().st_size
    assert f"  {pack.size_text(size):>8}  models/tiny llama/model.safetensors  <- {job.away}" in shown
    assert "rewritten: configs/mine/dpo.yaml:3: model_name_or_path" in shown and job.tree(job.root) == before


def test_dry_run_estimates_the_wheels(job, capsys):
    from rlhf.__main__ import main

    assert main(["bundle", str(job.recipes), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    number, size = wheels.estimate()
    assert f"wheels: of {number} packages for rlhf-dpo[" in shown and number > 30 and size > 500e6  # torch alone


def test_outputs_and_what_else_lies_there_are_left_out_and_told(job, capsys):
    (job.away / "out" / "sft").mkdir(parents=True)
    (job.away / "out" / "sft" / "model.safetensors").write_text("x")
    (job.recipes / ".env").write_text("TOKEN=1\n")
    (job.recipes / "notes.md").write_text("kept\n")
    (job.recipes / "launch.yaml").write_text("num_processes: 2\n")
    (job.recipes / "pods.yaml").write_text("kind: Pod\n---\nkind: Pod\n")
    (job.away / "tiny llama" / "optimizer.pt").write_text("x")
    (job.away / "tiny llama" / "old.safetensors").write_text("x")
    assert job.bundle() == 0
    shown = capsys.readouterr().out
    assert f"not bundled: {job.away}/out/sft: the output of {job.recipes}/sft.yaml" in shown
    assert f"not bundled: {job.recipes}/.env: no recipe names it" in shown
    assert "(old.safetensors, optimizer.pt)" in shown
    found = names(job.file)
    assert {
        "configs/mine/notes.md",
        "configs/mine/launch.yaml",
        "configs/mine/pods.yaml",
        "launch/ddp.yaml",
        "slurm/train.sbatch",
    } <= set(found)
    assert not [n for n in found if n.endswith((".env", "optimizer.pt", "old.safetensors")) and n != "slurm/site.env"]


def test_a_data_folder_goes_in_with_all_its_splits(job):
    folder = job.away / "set"
    (folder / ".cache").mkdir(parents=True)
    for name in ("train.jsonl", "test.jsonl", "README.md", ".cache/x.jsonl", "notes.bin"):
        shutil.copy(job.away / "pairs.jsonl", folder / name)
    job.edit("dpo", "^dataset_name: .*", f"dataset_name: {folder}")
    assert job.bundle() == 0
    assert {n for n in names(job.file) if n.startswith("data/")} == {
        "data/pairs.jsonl", "data/set/train.jsonl", "data/set/test.jsonl", "data/set/README.md",
    }  # fmt: skip


def test_an_adapter_finds_its_base_in_the_bundle(job):
    import peft

    adapter, base = job.away / "adapter", job.away / "tiny llama"
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=2)).save_pretrained(adapter)
    job.edit("sft", "^model_name_or_path: .*", f"model_name_or_path: {adapter}")
    assert (job.bundle(), job.unbundle()) == (0, 0)
    config = json.loads((job.there / "models/adapter/adapter_config.json").read_text())
    before = json.loads((adapter / "adapter_config.json").read_text())
    assert config == before | {"base_model_name_or_path": "models/tiny llama"} and before != config
    assert (job.there / "models/tiny llama/model.safetensors").is_file()


def test_a_hub_model_and_data_set_come_out_of_the_local_cache(job, hub, capsys):
    assert (job.bundle(), job.unbundle()) == (0, 0)
    assert not [path for path in job.there.rglob("*") if path.is_symlink()]
    assert "org/tiny" in (job.there / "configs/mine/sft.yaml").read_text()
    cache = str(job.there / "hub/models")
    assert AutoModelForCausalLM.from_pretrained("org/tiny", cache_dir=cache).num_parameters() > 30_000
    assert AutoTokenizer.from_pretrained("org/tiny", cache_dir=cache).chat_template
    rows = datasets.load_dataset("org/Pairs", cache_dir=str(job.there / "hub/datasets"), split="train")
    assert rows.num_rows == 12
    environment = (job.there / "env.sh").read_text()
    assert (
        'HF_HUB_CACHE="$bundle/hub/models"' in environment and 'HF_DATASETS_CACHE="$bundle/hub/datasets"' in environment
    )


def test_a_hub_models_revision_is_found_under_its_name(job, hub):
    (hub / "refs" / "main").rename(hub / "refs" / "v1")
    job.edit("sft", "^model_name_or_path: .*", "model_name_or_path: org/tiny\nmodel_revision: v1")
    assert (job.bundle(), job.unbundle()) == (0, 0)
    for revision in ("v1", "main"):  # configurations are looked up without a revision
        AutoTokenizer.from_pretrained("org/tiny", cache_dir=str(job.there / "hub/models"), revision=revision)


@pytest.mark.parametrize("revision", ["main", "v1"])
def test_what_is_not_in_the_cache_is_named_with_the_command_that_fetches_it(job, hub, capsys, revision):
    more = f"\nmodel_revision: {revision}" if revision != "main" else ""
    job.edit("sft", "^model_name_or_path: .*", f"model_name_or_path: org/other{more}")
    assert job.bundle() == 2
    flag = f" --revision {revision}" if revision != "main" else ""
    shown = capsys.readouterr().err
    assert f"{job.recipes}/sft.yaml:3: 'org/other' is neither" in shown and f"hf download org/other{flag}\n" in shown
    assert not list(job.root.glob("mine.tar*"))


def test_a_model_whose_weights_are_not_in_the_cache_is_not_complete(job, hub, capsys):
    (hub / "snapshots" / ("a" * 40) / "model.safetensors").unlink()
    assert job.bundle() == 2
    shown = capsys.readouterr().err
    assert "not complete" in shown and "fetch it with: hf download org/tiny" in shown


def test_a_hub_adapter_and_another_repositorys_code_bring_what_they_need(job, hub, capsys):
    """Each by its name in the configuration; all that are missing are named at once."""
    snapshot = hub / "snapshots" / ("a" * 40)
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "org/code--modeling.M"}}))
    adapter = hub.parent / "models--org--adapter" / "snapshots" / "d00d"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/tiny"}')
    shutil.copy(snapshot / "model.safetensors", adapter / "adapter_model.safetensors")
    (adapter.parents[1] / "refs").mkdir()
    (adapter.parents[1] / "refs" / "main").write_text("d00d")
    job.edit("sft", "^model_name_or_path: .*", "model_name_or_path: org/adapter")
    job.edit("dpo", "^seed", "reference_model: org/none\nseed")
    assert job.bundle() == 2
    shown = capsys.readouterr().err
    assert "hf download org/none; and " in shown and "hf download org/code" in shown
    job.edit("dpo", "^reference_model.*\n", "")
    code = hub.parent / "models--org--code" / "snapshots" / "c0de"
    code.mkdir(parents=True)
    (code / "modeling.py").write_text("M = 1\n")
    (code / "README.md").write_text("x")
    (code.parents[1] / "refs").mkdir()
    (code.parents[1] / "refs" / "main").write_text("c0de")
    assert job.bundle() == 0
    found = {name.removeprefix("hub/models/models--org--") for name in names(job.file)}
    assert {"adapter/snapshots/d00d/adapter_model.safetensors", f"tiny/snapshots/{'a' * 40}/model.safetensors"} <= found
    assert {name for name in found if name.startswith("code/")} == {"code/snapshots/c0de/modeling.py", "code/refs/main"}


def test_a_hub_data_set_that_is_not_in_the_cache(job, hub, capsys):
    job.edit("dpo", "^dataset_name: .*", "dataset_name: org/none\ndataset_config: en")
    assert job.bundle() == 2
    assert "datasets.load_dataset('org/none', 'en')\"" in capsys.readouterr().err


def test_the_embedded_model_is_fetched_first(job, capsys, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(job.root / "cache"))
    job.edit("sft", "^model_name_or_path: .*", f"model_name_or_path: {embedded.NAME}")
    assert job.bundle() == 2
    assert "fetch it with: rlhf fetch" in capsys.readouterr().err


def test_the_embedded_model_goes_into_the_cache_of_the_bundle(job, capsys, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(job.root / "cache"))
    shutil.copytree(job.away / "tiny llama", folder := job.root / "cache/models/smollm2-135m-instruct")
    embedded._write_manifest(folder)
    job.edit("sft", "^model_name_or_path: .*", f"model_name_or_path: {embedded.NAME}")
    assert (job.bundle(), job.unbundle()) == (0, 0)
    monkeypatch.setenv("RLHF_CACHE", str(job.there / "cache"))
    assert embedded.is_fetched() and 'RLHF_CACHE="$bundle/cache"' in (job.there / "env.sh").read_text()


def test_without_models_they_are_named_and_stay_where_they_are(job, capsys):
    assert job.bundle("--no-models") == 0
    shown = capsys.readouterr().out
    assert f"not bundled: {job.away}/tiny llama: --no-models; {job.recipes}/sft.yaml:3 names it" in shown
    assert not [name for name in names(job.file) if name.startswith("models/")]
    assert job.unbundle() == 0
    assert f"model_name_or_path: {job.away}/tiny llama" in (job.there / "configs/mine/sft.yaml").read_text()
    assert "HF_HUB_CACHE" not in (job.there / "env.sh").read_text()


MISTAKES = {
    "no recipe folder": (lambda job: shutil.rmtree(job.recipes), "is no folder"),
    "no recipe": (lambda job: [p.unlink() for p in job.recipes.iterdir()], "has no recipe"),
    "no data": (lambda job: (job.away / "pairs.jsonl").unlink(), "sft.yaml:6: no data file at"),
    "no model": (lambda job: shutil.rmtree(job.away / "tiny llama"), "sft.yaml:3: no model at"),
    "damaged model": (
        lambda job: (job.away / "tiny llama/model.safetensors").write_text("x"),
        "not a safetensors file",
    ),
    "a token": (lambda job: job.edit("sft", "^seed", f"# hf_{'a' * 34}\nseed"), "sft.yaml:14: looks like a token"),
    "a mistake": (lambda job: job.edit("dpo", "^seed", "sede"), "unknown key 'sede'"),
    "no folder for it": (lambda job: setattr(job, "file", job.root / "none" / "x.tar"), "make it first"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_no_file(job, capsys, mistake):
    make, sentence = MISTAKES[mistake]
    make(job)
    before = job.tree(job.root)
    assert job.bundle() == 2
    shown = capsys.readouterr().err
    assert sentence in shown and shown.count("\n") == 1 and job.tree(job.root) == before


def test_what_needs_a_network_there_is_told(job, capsys):
    job.edit("dpo", "^seed", "report_to: [tensorboard, wandb]\nseed")
    assert job.bundle() == 0
    assert f"not bundled: a way to wandb: {job.recipes}/dpo.yaml:14 reports there" in capsys.readouterr().out


def test_a_chat_template_goes_in(job):
    (job.away / "my.jinja").write_text("{{ messages }}")
    job.edit("sft", "^seed", f"chat_template: {job.away}/my.jinja\nseed")
    assert (job.bundle(), job.unbundle()) == (0, 0)
    assert "chat_template: templates/my.jinja" in (job.there / "configs/mine/sft.yaml").read_text()
    assert (job.there / "templates/my.jinja").read_text() == "{{ messages }}"


def test_a_file_that_is_there_is_replaced_on_request_only(job, capsys):
    job.file.write_text("mine")
    assert (job.bundle(), job.file.read_text()) == (2, "mine")
    assert "--overwrite" in capsys.readouterr().err
    assert job.bundle("--overwrite") == 0 and tarfile.is_tarfile(job.file)


def test_a_link_in_the_place_of_the_partial_file_is_not_followed(job, capsys):
    (job.root / "precious").write_text("mine")
    (job.root / "mine.tar.partial").symlink_to(job.root / "precious")
    assert (job.bundle(), (job.root / "precious").read_text()) == (2, "mine")


def test_two_at_once(job, capsys):
    with open(job.root / "mine.tar.partial", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert job.bundle() == 2
    assert "by another `rlhf bundle`" in capsys.readouterr().err
    assert job.bundle() == 0 and sorted(p.name for p in job.root.glob("mine*")) == ["mine.tar"]


def test_a_small_disk_is_found_before_anything_is_written(job, capsys, monkeypatch):
    monkeypatch.setattr(pack, "free_bytes", lambda folder: 100_000)
    assert job.bundle() == 2
    assert "0.0 GB free; the bundle needs up to" in capsys.readouterr().err and not list(job.root.glob("mine*"))


def test_an_error_while_it_is_written_leaves_nothing(job, monkeypatch):
    add = archive.Writer.add

    def fail(self, item):
        if item.kind == "model":
            raise KeyboardInterrupt
        add(self, item)

    monkeypatch.setattr(archive.Writer, "add", fail)
    assert job.bundle() == 130 and not list(job.root.glob("mine*"))


@pytest.mark.parametrize("change", [b"", b"longer than before"])
def test_a_file_that_changes_its_size_meanwhile(job, capsys, monkeypatch, change):
    write = pack._write

    def change_and_write(*arguments):
        (job.away / "pairs.jsonl").write_bytes(change * 1000)
        write(*arguments)

    monkeypatch.setattr(pack, "_write", change_and_write)
    assert job.bundle() == 2
    assert "pairs.jsonl has changed its size" in capsys.readouterr().err and not list(job.root.glob("mine*"))


def test_pips_error_is_told_without_passwords(job, capsys, monkeypatch, tmp_path):
    def fail(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no index at https://me:secret@host/simple\n")

    monkeypatch.setattr(wheels.subprocess, "run", fail)
    from rlhf.__main__ import main

    assert main(["bundle", str(job.recipes), "-o", str(job.file)]) == 2
    shown = capsys.readouterr().err
    assert "no index at https://host/simple; check the network" in shown and "secret" not in shown
    assert not list(job.root.glob("mine*"))


def test_weights_are_copied_in_blocks(tmp_path):
    """No read or write is larger than a block, however large the file, so that memory does not grow with the model."""
    big, read = tmp_path / "big", []
    with open(big, "wb") as file:
        file.truncate(40_000_000)
    with open(tmp_path / "out.tar", "wb") as out:
        writer = archive.Writer(out, "", read.append)
        writer.add(archive.Item.copy("big", "model", big))
        writer.close()
    assert max(read) <= archive.BLOCK and sum(read) > 40_000_000
    assert os.path.getsize(tmp_path / "out.tar") > 40_000_000


def test_the_files_of_benchmarks_go_in(job, capsys):
    tasks = job.away / "own tasks"
    (tasks / "__pycache__").mkdir(parents=True)
    (tasks / "ours.yaml").write_text("task: ours\n")
    (tasks / "__pycache__" / "x.pyc").write_text("x")
    shutil.copy(job.away / "pairs.jsonl", job.away / "rb.jsonl")
    out = job.away / "out"
    (job.recipes / "evaluate.yaml").write_text(
        f"stage: evaluate\nsft_model: {out}/sft\ndpo_model: {out}/dpo\nreward_model: {out}/dpo\noutput_dir: {out}/evaluation\n"
        f"dataset_name: {job.away}/pairs.jsonl\nreward_benchmarks: ['{job.away}/rb.jsonl']\nbenchmarks: [ours]\n"
        f"benchmark_tasks: {tasks}\n"
    )
    assert (job.bundle(), job.unbundle()) == (0, 0)
    assert "data/rb.jsonl" in names(job.file)
    assert [n for n in names(job.file) if n.startswith("tasks/")] == ["tasks/own tasks/ours.yaml"]
    text = (job.there / "configs/mine/evaluate.yaml").read_text()
    assert 'benchmark_tasks: "tasks/own tasks"' in text and "reward_benchmarks: ['data/rb.jsonl']" in text.replace(
        '"', "'"
    )
    assert f"the data of {job.recipes}/evaluate.yaml:8" in capsys.readouterr().out
