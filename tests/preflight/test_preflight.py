"""Preflight's arithmetic and judgement, with values worked out by hand; real processes: tests/distributed/."""

import errno
from types import SimpleNamespace

import pytest

from rlhf.__main__ import main
from rlhf.config.recipe import Recipe
from rlhf.preflight.bandwidth import bus_bandwidth, interface_speed, link_of, run_bounded, used_interfaces
from rlhf.preflight.judge_hosts import host_rows, judge_devices, judge_nodes, judge_versions
from rlhf.preflight.judge_network import judge_clocks, judge_collectives, judge_interfaces, speed_row
from rlhf.preflight.judge_storage import judge_folder, judge_memory, judge_paths, judge_write
from rlhf.preflight.preflight import _mistakes, print_table
from rlhf.preflight.probes import (
    disk_words,
    driver_version,
    hub_answers,
    look_at,
    nearest_folder,
    sees_canary,
    write_speed,
)
from rlhf.preflight.rendezvous import clock_offset, majority, spans, who
from rlhf.preflight.table import Finding, Row

GIB = 2**30
HOSTS = ["n1", "n1", "n2", "n2"]


def report(device=None, **versions):
    return {
        "versions": {"rlhf-dpo": "0.1", "code": "abc", "python": "3.11.7", "CUDA": "13.0", "torch": "2.13.0", "trl": "1.16.0"}
        | versions,
        "executable": "/env/bin/python", "cores": 8, "memory": [6 * GIB, 8 * GIB], "driver": "580.65.06",
        "device": device or {"kind": "cpu", "problem": ""}, "hostname_address": "10.0.0.1", "interfaces": ["eth0", "ib0", "lo"],
        "route": "eth0", "GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "",
    }  # fmt: skip


def gpu(uuid, name="NVIDIA H100 80GB HBM3", free=79, count=2):
    return {"kind": "cuda", "problem": "", "name": name, "memory": [free * GIB, 80 * GIB], "count": count, "uuid": uuid}


def gpus(**changes):
    return [report(gpu(f"GPU-{i}", **changes)) for i in range(4)]


# --- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "world, expected",
    [(2, 1e9), (4, 1.5e9), (8, 1.75e9)],  # 1 GB in a second; 2 (n - 1) / n: 2 / 2, 6 / 4, 14 / 8
)
def test_bus_bandwidth(world, expected):
    assert bus_bandwidth(10**9, 1.0, world) == expected


def test_clock_offset_takes_the_shortest_round_trip():
    """25.1 - (20.0 + 20.2) / 2 = 5.0; the first one's delay was all on one side, and would say 15.5 - 10.5 = 5.0 +- 0.5."""
    offset, uncertainty = clock_offset([(10.0, 15.9, 11.0), (20.0, 25.1, 20.2)])
    assert (offset, uncertainty) == (pytest.approx(5.0), pytest.approx(0.1))


def test_majority():
    assert majority(["a", "b", "b"]) == "b"
    assert majority(["a", "b"]) == "a"  # of equally common ones the first rank's
    assert majority([None, None, "x"]) is None


def test_spans_and_who():
    assert spans([5, 0, 1, 2]) == "0-2, 5"
    assert who([1, 2, 3], HOSTS) == "n1 (rank 1), n2 (ranks 2-3)"
    assert who(list(range(8)), [f"n{i}" for i in range(8)]).endswith("n6 (rank 5) and 2 more hosts".replace("n6", "n5"))


@pytest.mark.parametrize(
    "name, link",
    [
        ("NVIDIA H100 80GB HBM3", ("NVLink 4", 450e9)),
        ("NVIDIA H100 PCIe", ("PCIe 5", 64e9)),
        ("NVIDIA A100-SXM4-80GB", ("NVLink 3", 300e9)),
        ("NVIDIA A100 80GB PCIe", ("PCIe 4", 32e9)),
        ("NVIDIA L40S", ("PCIe 4", 32e9)),
        ("NVIDIA GB200", None),
        ("CPU", None),
    ],
)
def test_link_of(name, link):
    assert link_of(name) == link


def test_interfaces_that_carried_the_data(tmp_path):
    mib = 1 << 20
    before = {"lo": 0, "eth0": 5 * mib, "mlx5_0:1": 0, "mlx5_1:1": 0}
    after = {"lo": 200 * mib, "eth0": 6 * mib, "mlx5_0:1": 100 * mib, "mlx5_1:1": 90 * mib}
    assert used_interfaces(before, after) == ["mlx5_0:1", "mlx5_1:1"]  # eth0's 1 MiB is less than a tenth of 100
    assert used_interfaces(before, before) == []
    rate = tmp_path / "mlx5_0" / "ports" / "1" / "rate"
    rate.parent.mkdir(parents=True)
    rate.write_text("200 Gb/sec (4X HDR)\n")
    assert interface_speed("mlx5_0:1", tmp_path) == 25e9
    assert interface_speed("mlx5_1:1", tmp_path) is None
    assert interface_speed("lo") is None


def test_run_bounded():
    import threading

    never = threading.Event()
    assert run_bounded(lambda: None, 60) is True
    assert run_bounded(never.wait, 0.1) is False
    never.set()


# --- hosts and versions ----------------------------------------------------------------------------------------------


def test_hosts_that_are_alike_share_a_row():
    rows = host_rows(gpus(), HOSTS)
    assert [r.shown for r in rows] == [
        "2 hosts: n1, n2 (4 processes): 2x NVIDIA H100 80GB HBM3, driver 580.65.06, CUDA 13.0, 80.0 GiB each, 79.0 GiB free"
    ]
    other = gpus()[:2] + [report(gpu(f"GPU-{i}", "NVIDIA L4", free=20)) for i in (2, 3)]
    assert [r.shown.split(":")[0] for r in host_rows(other, HOSTS)] == ["n1 (2 processes)", "n2 (2 processes)"]


def test_gpus_that_differ_are_shared_taken_or_idle():
    assert judge_devices(gpus(), HOSTS) == []
    other = gpus()[:3] + [report(gpu("GPU-3", "NVIDIA L4"))]
    assert [(f.level, f.found) for f in judge_devices(other, HOSTS)] == [
        ("error", "n2 (rank 3): NVIDIA L4, the others have NVIDIA H100 80GB HBM3")
    ]
    shared = [report(gpu(uuid)) for uuid in ("GPU-0", "GPU-0", "GPU-0", "GPU-1")]  # the same name on n2 is another GPU
    assert [f.found for f in judge_devices(shared, HOSTS)] == ["n1 (ranks 0-1) have the same GPU (GPU-0)"]
    taken = judge_devices(gpus(free=40), HOSTS)
    assert (
        len(taken) == 4
        and taken[0].level == "warning"
        and "40.0 GiB of its GPU's 80.0 GiB are in use" in taken[0].found
    )
    assert [f.found for f in judge_devices(gpus(count=8), HOSTS)] == [
        "n1 has 8 GPUs, but only 2 processes", "n2 has 8 GPUs, but only 2 processes",
    ]  # fmt: skip


def test_gpu_that_cant_be_used():
    broken = gpus()[:3] + [report({"kind": "cpu", "problem": "torch (CUDA 13.0) can't use the GPU: driver too old"})]
    found = judge_devices(broken, HOSTS)
    assert [f.level for f in found] == ["error", "error"]
    assert found[0].found == "n2 (rank 3): torch (CUDA 13.0) can't use the GPU: driver too old"


def test_slurm_hosts_without_processes():
    assert judge_nodes(HOSTS, 2) == []
    assert judge_nodes(HOSTS, 4)[0].found == "Slurm gave this job 4 hosts, but processes run on only 2"


def test_versions_that_differ_are_told_together_with_the_command():
    reports = [report(), report(), report(), report(torch="2.12.0", trl="1.15.0")]
    row = judge_versions(reports, HOSTS)
    assert row.findings == (
        Finding(
            "error", "n2 (rank 3): torch 2.12.0, trl 1.15.0; the others: torch 2.13.0, trl 1.16.0",
            "there: /env/bin/python -m pip install torch==2.13.0 trl==1.16.0",
        ),
    )  # fmt: skip
    assert judge_versions([report()] * 4, HOSTS).status == "ok"


@pytest.mark.parametrize(
    "odd, level, fix",
    [
        ({"python": "3.11.9"}, "warning", "use one virtual environment on a disk that all hosts share"),
        ({"python": "3.12.1"}, "error", "use one virtual environment on a disk that all hosts share"),
        ({"datasets": "4.0.0"}, "warning", "there: /env/bin/python -m pip uninstall datasets"),
        ({"trl": None}, "error", "there: /env/bin/python -m pip install trl==1.16.0"),
        ({"code": "def+changes"}, "error", "there: git checkout abc"),
    ],
)
def test_which_differences_are_errors(odd, level, fix):
    (finding,) = judge_versions([report(), report(), report(), report(**odd)], HOSTS).findings
    assert (finding.level, finding.fix) == (level, fix)


def test_another_driver_is_a_warning():
    reports = [report(), report(), report(), {**report(), "driver": "570.1.2"}]
    assert [f.level for f in judge_versions(reports, HOSTS).findings] == ["warning"]


def test_driver_version(tmp_path):
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12.2\n"
    )
    assert driver_version(file) == "580.65.06"
    assert driver_version(tmp_path / "none") is None


# --- network ---------------------------------------------------------------------------------------------------------


def test_interfaces_that_are_not_there():
    assert judge_interfaces([report()] * 4, HOSTS) == []
    reports = [report() | {"GLOO_SOCKET_IFNAME": "ib1", "NCCL_SOCKET_IFNAME": "ib"} for _ in HOSTS]
    (finding,) = judge_interfaces(reports, HOSTS)  # NCCL's `ib` fits ib0
    assert finding.found == "n1 (ranks 0-1), n2 (ranks 2-3): GLOO_SOCKET_IFNAME=ib1, but there is no such interface"
    assert finding.fix == "set GLOO_SOCKET_IFNAME to one of: eth0, ib0"
    for wanted, errors in (("=ib", 1), ("=ib0", 0), ("^docker", 0), ("ens,eth", 0)):
        found = judge_interfaces([report() | {"NCCL_SOCKET_IFNAME": wanted}] * 4, HOSTS)
        assert len(found) == errors, wanted


def test_host_name_that_means_the_loopback():
    reports = [report() | {"hostname_address": "127.0.1.1"}] * 4
    assert judge_interfaces(reports, HOSTS)[0].fix.startswith("export GLOO_SOCKET_IFNAME=eth0 ")
    assert judge_interfaces(reports, ["n1"] * 4) == []  # one host: nobody else has to come
    assert judge_interfaces([r | {"GLOO_SOCKET_IFNAME": "eth0"} for r in reports], HOSTS) == []


@pytest.mark.parametrize("offset, status", [(0.9, "ok"), (1.5, "warning"), (-61.0, "error")])
def test_clocks(offset, status):
    row = judge_clocks([None, None, [offset, 0.001], None], HOSTS)
    assert row.status == status
    assert all(f.found.startswith("n2: its clock is") for f in row.findings)


def test_clocks_of_a_slow_network_are_not_accused():
    assert judge_clocks([None, None, [1.5, 0.8], None], HOSTS).status == "ok"  # it may be 0.7 s only
    assert judge_clocks([None] * 4, HOSTS) is None


def measured(exact=True, inside=(1e6, 0.001), whole=(1e6, 0.01), **more):
    return {
        "error": "", "hung": False, "during": "", "exact": {"gloo": exact}, "inside": [int(inside[0]), inside[1]],
        "all": [int(whole[0]), whole[1]], "interfaces": ["eth0"], "speeds": [1.25e9],
    } | more  # fmt: skip


def test_all_reduce_is_as_fast_as_its_slowest():
    """1 MB over 4 ranks in 10 ms: 100 MB/s, times 6/4 = 150 MB/s on the bus, 12% of 10 Gb/s. Within n2: 1 MB in 4 ms."""
    results = [measured(), measured(), measured(inside=(1e6, 0.004)), measured(whole=(1e6, 0.01))]
    rows = judge_collectives(results, HOSTS, ["CPU"] * 4)
    assert [(r.check, r.status) for r in rows] == [
        ("all-reduce", "ok"),
        ("within a host", "ok"),
        ("between hosts", "ok"),
    ]
    assert rows[1].shown.startswith("bus 250 MB/s, algorithm 250 MB/s") and rows[1].shown.endswith("slowest: n2")
    assert rows[2].shown.startswith("bus 150 MB/s, algorithm 100 MB/s (0 MiB in 10 ms); 12% of eth0")


def test_wrong_sum_names_the_rank():
    rows = judge_collectives([measured(), measured(), measured(exact=False), measured()], HOSTS, ["CPU"] * 4)
    assert rows[0].status == "error" and rows[0].findings[0].found.startswith(
        "n2 (rank 2): the sum of an all-reduce (gloo)"
    )


def test_who_hangs_is_told_before_who_waited():
    waited = measured(error="timed out", during="the first all-reduce (gloo)")
    hung = measured(error="not finished within 9 s", during="the first all-reduce (gloo)", hung=True)
    (row,) = judge_collectives([waited, waited, waited, hung], HOSTS, ["CPU"] * 4)
    assert row.findings[0].found == (
        "n2 (rank 3) hung in the first all-reduce (gloo) (not finished within 9 s); "
        "n1 (ranks 0-1), n2 (rank 2) failed in the first all-reduce (gloo) (timed out)"
    )


def test_slow_link_is_a_warning():
    """256 MiB over 8 GPUs: at 450 GB/s x 0.5 / 1.75 a healthy host takes at most 2.09 ms."""
    link = ("NVLink 4", 450e9, "NVLink")
    assert speed_row("within the host", 256 << 20, 0.0020, 8, link).status == "ok"
    slow = speed_row("within the host", 256 << 20, 0.0022, 8, link)
    assert slow.status == "warning" and "reaches 47% of NVLink 4 (450.0 GB/s)" in slow.findings[0].found
    assert speed_row("within the host", 256 << 20, 9.0, 8, None).status == "ok"


# --- paths and disks -------------------------------------------------------------------------------------------------


def paths(*seen, maker=""):
    looks = [{"dataset_name": look} for look in seen]
    return judge_paths(looks, {"dataset_name": "d.jsonl"}, {"dataset_name": "r.yaml:3"}, {"dataset_name": maker}, HOSTS)


@pytest.mark.parametrize(
    "seen, maker, expected",
    [
        ([["there", 9]] * 4, "", None),
        ([["there", 9]] * 3 + [["absent", 0]], "", "does not exist on n2 (rank 3)"),
        ([["there", 9]] * 2 + [["there", 8]] * 2, "", "has different contents on n2 (ranks 2-3)"),
        ([["absent", 0]] * 4, "", "exists on no host"),
        ([["absent", 0]] * 4, "rlhf sft s.yaml", None),
        ([["hub", 0]] * 4, "", None),
        ([["cached", 0]] * 2 + [["no hub", 0]] * 2, "", "the hub is unreachable on n2 (ranks 2-3)"),
    ],
)
def test_paths(seen, maker, expected):
    row = paths(*seen, maker=maker)
    assert row.status == ("error" if expected else "ok")
    assert not expected or (
        row.findings[0].found.startswith("r.yaml:3: dataset_name d.jsonl ") and expected in row.findings[0].found
    )


def test_paths_that_are_yet_to_be_made():
    assert paths(*[["absent", 0]] * 4, maker="rlhf sft s.yaml").shown == "yet to be made by `rlhf sft s.yaml`"


def test_look_at(tmp_path, monkeypatch):
    file = tmp_path / "pairs.jsonl"
    file.write_text("12345")
    assert look_at(str(file), "dataset", False) == ["there", 5]
    assert look_at(str(tmp_path), "model", False) == ["there", 5]
    assert look_at(str(tmp_path / "none"), "model", False) == ["absent", 0]
    assert look_at("pairs.jsonl", "dataset", False) == ["absent", 0]
    assert look_at("runs/sft", "model", True) == ["absent", 0]  # the output of a stage, not an id on the hub
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert look_at("someone/some-model", "model", False) == ["no hub", 0]


def test_hub_answers_through_a_proxy(monkeypatch):
    import socket

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_answers() is True
    assert hub_answers() is False


def folder(error="", unseen=(), unwritten=(), free=10**12, inodes=10**6, needed=10**9):
    facts = {"free": free, "total": 10**13, "inodes": inodes}
    return judge_folder("output folder", "/runs", error, list(unseen), list(unwritten), HOSTS, facts, needed)


def test_folder_judged():
    assert (folder().status, folder().shown) == (
        "ok",
        "/runs: written and read by all hosts; 1,000 GB free, about 1.00 GB needed",
    )
    for row, found in (
        (folder(error="it is mounted read-only"), "n1 (rank 0) can't write in /runs: it is mounted read-only"),
        (folder(unseen=[2, 3]), "/runs is not the same disk on n2 (ranks 2-3) as on n1"),
        (folder(unwritten=["n1 doesn't see what n2 (rank 2) writes"]), "/runs: n1 doesn't see what n2 (rank 2) writes"),
        (folder(inodes=10), "/runs has space for only 10 more files (inodes)"),
        (folder(free=10**8), "/runs has 0.10 GB free, but the model with its checkpoints needs about 1.00 GB"),
    ):
        assert [(f.level, f.found) for f in row.findings] == [("error", found)]
    assert folder(inodes=None, needed=None).status == "ok"  # btrfs counts no inodes


def test_write_speed_judged():
    assert judge_write(2e9, 10**11).shown == "2.0 GB/s (fsync, rank 0); a checkpoint of 100 GB takes 50 s"
    assert judge_write(20e6, None).status == "warning"


def test_write_speed_and_canaries(tmp_path):
    bytes_per_s, error = write_speed(str(tmp_path), "x", 2 << 20)
    assert bytes_per_s > 0 and error == "" and list(tmp_path.iterdir()) == []
    assert write_speed(str(tmp_path / "none"), "x", 1 << 20) == (0.0, "No such file or directory")
    (tmp_path / "c").write_text("other")
    assert sees_canary(str(tmp_path), "c", wait_s=0) is False  # a file of this name with other contents
    assert nearest_folder(str(tmp_path / "a" / "b")) == str(tmp_path)


def test_disk_words():
    assert disk_words(OSError(errno.EDQUOT, "x")) == "your disk quota is exceeded: free some space"
    assert disk_words(OSError(errno.EIO, "Input/output error")) == "Input/output error"


def test_memory():
    row = judge_memory(100 * GIB, 25 * 10**9, gpus(), HOSTS)
    assert (
        row.status == "warning"
        and "needs 100.0 GiB per process without activations, but the GPU has 80.0 GiB" in row.findings[0].found
    )
    cpu = judge_memory(3 * GIB, 10**9, [report()] * 4, HOSTS)  # 8 GiB for two processes: 4 each
    assert cpu.status == "ok" and cpu.shown.startswith("3.0 GiB of 4.0 GiB per process")


# --- the command -----------------------------------------------------------------------------------------------------


def test_table(capsys):
    print_table(
        "r.yaml: 2 processes",
        [Row("hosts", "n1 [8 cores]"), Row("hosts", "n2"), Row("clocks", "x", (Finding("warning", "", ""),))],
    )
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()] == [
        "r.yaml: 2 processes",
        "  check              found",
        " " + "─" * 33,
        "  hosts    ok        n1 [8 cores]",
        "           ok        n2",
        "  clocks   warning   x",
    ]


def test_mistakes_of_all_and_of_some():
    assert _mistakes(["", "", "", ""], HOSTS) == ""
    assert _mistakes(["bad key"] * 4, HOSTS) == "bad key"
    assert _mistakes(["", "", "no recipe", "no recipe"], HOSTS).startswith("n2 (ranks 2-3): no recipe (the other ranks")


def test_one_process_without_a_recipe(tmp_path, capsys):
    assert main(["preflight", "--output_dir", str(tmp_path / "x"), "--quick"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{tmp_path}/x: 1 process on 1 host") and shown.endswith("\nReady.\n")
    assert "all-reduce" not in shown and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words, message",
    [
        (["none.yaml"], "no recipe at none.yaml"),
        (["--beta", "1"], "the recipe comes first: rlhf preflight RECIPE.yaml --key value (found '--beta')"),
    ],
)
def test_mistakes_of_the_command_line(words, message, capsys):
    assert main(["preflight", *words]) == 2
    assert message in capsys.readouterr().err


def test_recipe_without_a_stage(tmp_path, capsys):
    file = tmp_path / "r.yaml"
    file.write_text("beta: 1\n")
    assert main(["preflight", str(file)]) == 2
    assert f"{file}:1: the recipe has no stage" in capsys.readouterr().err


def test_model_that_an_earlier_stage_makes_is_measured_by_what_it_starts_from(recipe, tiny_llama, tmp_path):
    from rlhf.preflight.probes import model_folder

    recipe("sft", model_name_or_path=tiny_llama, output_dir="runs/sft")
    values = {"model_name_or_path": "runs/sft"}
    assert str(model_folder(Recipe("dpo", str(tmp_path / "dpo.yaml"), values, {}))) == tiny_llama


def test_gpus_as_torch_tells_them(monkeypatch):
    import torch

    from rlhf.preflight.probes import describe_device

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in (
        ("is_available", True), ("device_count", 2), ("mem_get_info", (70, 80)),
        ("get_device_properties", SimpleNamespace(name="NVIDIA L4", uuid="u")),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert describe_device(1, False) == {
        "kind": "cuda", "problem": "", "name": "NVIDIA L4", "memory": [70, 80], "count": 2, "uuid": "u",
    }  # fmt: skip
    assert describe_device(2, False)["problem"] == "local rank 2 (from 0), but the host has only 2 GPUs"
    assert describe_device(0, True) == {"kind": "cpu", "problem": ""}
