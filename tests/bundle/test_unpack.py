"""A bundle is unpacked whole, verified and into a new folder, or not at all."""

import fcntl
import gzip
import io
import json
import os
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.__main__ import main
from rlhf.bundle import archive, unpack


@pytest.fixture
def made(job, capsys):
    """The job, bundled."""
    assert job.bundle() == 0
    capsys.readouterr()
    return job


def members(file):
    with tarfile.open(file) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]


def write(file, entries):
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, content in entries:
            tar.addfile(member, io.BytesIO(content) if member.isreg() else None)


def change(job, edit):
    """Write the bundle again with its members as `edit` returns them."""
    entries = members(job.file)
    write(job.file, edit(entries) or entries)


def entry(name, content=b"x", **values):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in values.items():
        setattr(member, key, value)
    return member, content


def edit_header(entries, edit):
    values = json.loads(entries[0][1])
    edit(values)
    content = json.dumps(values).encode()
    return [entry("bundle.json", content), *entries[1:]]


def refused(job, capsys):
    """The sentence with which it is refused; nothing is there but what was."""
    before = job.tree(job.root)
    assert job.unbundle() == 2
    assert job.tree(job.root) == before and not job.there.exists() and not (job.root / "there.partial").exists()
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    return shown.err


def test_a_flipped_byte_is_named_with_both_checksums(made, capsys):
    data = bytearray(made.file.read_bytes())
    with tarfile.open(made.file) as tar:
        place = tar.getmember("models/tiny llama/model.safetensors").offset_data + 5000
    data[place] ^= 1
    made.file.write_bytes(data)
    sums = archive.read_sums(dict((m.name, c) for m, c in members(made.file))["SHA256SUMS"].decode())
    assert f"expected {sums['models/tiny llama/model.safetensors']}" in (shown := refused(made, capsys))
    assert f"{made.file} is damaged: models/tiny llama/model.safetensors has sha256 " in shown


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.zst"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_bit_flipped_anywhere_is_found_or_changes_nothing(job, suffix, place, bit):
    """Padding of tar may change: it is nobody's."""
    job.file = job.root / f"mine.{suffix}"
    whole = job.root / f"whole.{suffix}"
    if not whole.exists():
        assert job.bundle() == 0
        whole.write_bytes(job.file.read_bytes())
        job.there = job.root / "as it was"
        assert job.unbundle() == 0
    data = bytearray(whole.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    job.file.write_bytes(data)
    job.there = job.root / "there"
    code = job.unbundle()
    assert code in (0, 2) and (code == 0) == job.there.exists()
    if code == 0:
        assert job.tree(job.there) == job.tree(job.root / "as it was")
        __import__("shutil").rmtree(job.there)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.9, 0.97])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.zst"])
def test_a_truncated_file(job, capsys, share, suffix):
    job.file = job.root / f"mine.{suffix}"
    assert job.bundle() == 0
    capsys.readouterr()
    data = job.file.read_bytes()
    end = data.rindex(b"SHA256SUMS") if suffix == "tar" else len(data)  # zeros come after it
    job.file.write_bytes(data[: int(end * share)])
    assert any(word in refused(job, capsys) for word in ("truncated", "not a bundle"))


def test_a_missing_member_is_named(made, capsys):
    change(made, lambda entries: [e for e in entries if e[0].name != "data/pairs.jsonl"])
    assert "truncated or damaged: data/pairs.jsonl is missing; copy it again" in refused(made, capsys)


def test_missing_checksums(made, capsys):
    change(made, lambda entries: entries[:-1])
    assert "SHA256SUMS is missing" in refused(made, capsys)


def test_an_extra_member(made, capsys):
    change(made, lambda entries: [*entries[:3], entry("configs/mine/extra.yaml"), *entries[3:]])
    assert "'configs/mine/extra.yaml' is not in its list" in refused(made, capsys)


def test_a_member_after_the_checksums(made, capsys):
    change(made, lambda entries: [*entries, entries[2]])
    assert "is not in its list" in refused(made, capsys)


def test_a_member_twice(made, capsys):
    change(made, lambda entries: [*entries[:3], entries[2], *entries[3:]])
    assert "is not in its list" in refused(made, capsys)


OUTSIDE = ["../outside", "/etc/outside", "a/../../outside", "a//b", "./a", "a\\b", "a\nb", "..", ""]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_member_outside(made, capsys, name):
    change(made, lambda entries: [*entries[:2], entry(name), *entries[2:]])
    shown = refused(made, capsys)
    assert "would not be below the folder" in shown or "is not in its list" in shown
    assert not (made.root / "outside").exists()


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_listed_member_outside(made, capsys, name):
    edit = lambda values: values["files"].append({"name": name, "size": 1})  # noqa: E731
    change(made, lambda entries: [*edit_header(entries, edit)[:2], entry(name), *entries[2:]])
    assert "would not be below the folder" in refused(made, capsys)
    assert not (made.root / "outside").exists()


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.FIFOTYPE, "not a regular"),
        (tarfile.DIRTYPE, "not a"),
    ],
)
def test_links_and_devices(made, capsys, kind, word):
    link = entry("data/link", b"", type=kind, linkname="/etc/passwd")
    change(made, lambda entries: [*entries[:2], link, *entries[2:]])
    assert f"'data/link' is {word}" in refused(made, capsys)


def test_a_member_larger_than_listed(made, capsys):
    def grow(entries):
        return [entry(m.name, c + b"x" * 1000) if m.name == "data/pairs.jsonl" else (m, c) for m, c in entries]

    change(made, grow)
    assert "data/pairs.jsonl has" in refused(made, capsys)


@pytest.mark.parametrize("found", [2, 0, "1", None, [1]])
def test_another_version_of_the_format(made, capsys, found):
    change(made, lambda entries: edit_header(entries, lambda values: values.update(format=found)))
    shown = refused(made, capsys)
    assert f"has the bundle format {found!r}, and this version of rlhf reads format 1" in shown


@pytest.mark.parametrize(
    "edit",
    [
        lambda values: values.pop("format"),
        lambda values: values.pop("files"),
        lambda values: values.pop("recipes"),
        lambda values: values.update(files=[3]),
        lambda values: values.update(files=[{"name": "a", "size": -1}]),
        lambda values: values.update(files=[{"name": "a", "size": 1}, {"name": "a/b", "size": 1}]),
        lambda values: values["files"].append(values["files"][0]),
        lambda values: values["files"].append({"name": ".unbundling", "size": 1}),
        lambda values: values.update(recipes="../x"),
    ],
)
def test_a_header_that_lists_nonsense(made, capsys, edit):
    change(made, lambda entries: edit_header(entries, edit))
    assert "bundle.json" in refused(made, capsys)


@pytest.mark.parametrize(
    "content", [b"", b"text", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", gzip.compress(b"x", mtime=0), b"\0" * 20_000]
)
def test_another_file(job, capsys, content):
    job.file.write_bytes(content)
    assert "not a bundle" in refused(job, capsys)


def test_another_archive(job, capsys):
    write(job.file, [entry("a/b")])
    assert "doesn't start with bundle.json" in refused(job, capsys)


def test_no_such_file(job, capsys):
    assert "no bundle at" in refused(job, capsys)


def test_a_small_disk(made, capsys, monkeypatch):
    monkeypatch.setattr(unpack, "free_bytes", lambda folder: 100_000)
    assert "0.0 GB free" in refused(made, capsys)


def test_a_folder_that_is_there_is_moved_aside_on_request_only(made, capsys):
    made.there.mkdir()
    (made.there / "precious").write_text("mine")
    assert made.unbundle() == 2 and made.tree(made.there) == {"precious": b"mine"}
    assert "exists; give another folder, or --overwrite" in capsys.readouterr().err
    assert made.unbundle("--overwrite") == 0
    assert made.tree(made.root / "there.old-1") == {"precious": b"mine"} and (made.there / "run.sh").is_file()
    assert made.unbundle("--overwrite") == 0 and (made.root / "there.old-2" / "run.sh").is_file()


def test_an_empty_folder_is_filled(made):
    made.there.mkdir()
    assert made.unbundle() == 0 and os.access(made.there / "run.sh", os.X_OK)
    assert os.access(made.there / "launch/pipeline.sh", os.X_OK) and not os.access(made.there / "env.sh", os.X_OK)


def test_the_folder_is_called_like_the_file(made, monkeypatch):
    monkeypatch.chdir(made.root / "here")
    assert main(["unbundle", str(made.file)]) == 0 and (made.root / "here" / "mine" / "run.sh").is_file()


def test_a_partial_folder_of_somebody_else_stays(made, capsys):
    (made.root / "there.partial").mkdir()
    (made.root / "there.partial" / "precious").write_text("mine")
    assert made.unbundle() == 2 and (made.root / "there.partial" / "precious").read_text() == "mine"
    assert "no `rlhf unbundle` has made it" in capsys.readouterr().err


def test_two_at_once_and_after_a_kill(made, capsys):
    partial = made.root / "there.partial"
    partial.mkdir()
    (partial / "half").write_text("x")
    with open(partial / unpack.MARK, "wb") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        assert made.unbundle() == 2 and (partial / "half").exists()
        assert "by another `rlhf unbundle`" in capsys.readouterr().err
    assert made.unbundle() == 0
    assert not partial.exists() and not (made.there / "half").exists() and not (made.there / unpack.MARK).exists()


def test_ctrl_c_leaves_nothing(made, monkeypatch):
    monkeypatch.setattr(unpack, "_compare", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert made.unbundle() == 130
    assert not made.there.exists() and not (made.root / "there.partial").exists()


@given(st.text(max_size=30))
def test_safe_names_stay_below_any_folder(name):
    if archive.is_safe(name):
        assert os.path.normpath(f"/x/{name}") == f"/x/{name}" and "\n" not in name
