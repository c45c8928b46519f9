"""`rlhf preflight` with real processes (gloo): all well, and each trouble that a cluster has in store for one of them."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from forked import finish, free_port, launch, launch_command, run, start

ROOT = Path(__file__).parent.parent.parent
WORKER = str(Path(__file__).parent / "preflight_worker.py")


def can_mount():
    tried = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    return tried.returncode == 0


def can_make_hosts():
    made = subprocess.run(["ip", "netns", "add", f"rlhf-{os.getpid()}"], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", f"rlhf-{os.getpid()}"], capture_output=True)
    return made


needs_mount = pytest.mark.skipif(shutil.which("unshare") is None or not can_mount(), reason="may not mount (no root)")


def run_ranks(*words, ranks=(0, 1), trouble="", before=((), ()), world=2, **env):
    """Start ranks as a launcher does, with `before[rank]` called in each; returns [(exit code, stdout, stderr)]."""
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port()), "TROUBLE": trouble} | env  # fmt: skip
    started = [
        start(WORKER, *words, env={"LOCAL_RANK": str(rank)} | common | {"RANK": str(rank)}, before=before[rank])
        for rank in ranks
    ]
    return [(done.returncode, done.stdout, done.stderr) for done in map(finish, started)]


def row(shown, check):
    """(status, text) of a row of the table, its lines joined."""
    lines = shown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"  {check} "))
    end = next(i for i in range(start + 1, len(lines)) if not lines[i].startswith(" " * 20) or not lines[i].strip())
    status, text = re.match(rf"  {re.escape(check)} +(ok|warning|error) +(.*)", lines[start]).groups()
    return status, " ".join([text.strip(), *(line.strip() for line in lines[start + 1 : end])])


@pytest.fixture
def dpo(recipe, tiny_llama, few_pairs, tmp_path):
    return recipe(
        "dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "runs" / "dpo")
    )


def test_all_well_under_accelerate(dpo, tmp_path):
    done = launch(2, "preflight", dpo)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" check ") == 1  # one table, of one process
    assert row(done.stdout, "all-reduce") == ("ok", "the sum is exact over 2 ranks (gloo)")
    for check in ("versions", "rendezvous", "model and data", "output folder", "reference cache", "within the host"):
        assert row(done.stdout, check)[0] == "ok"
    assert "MiB in" in row(done.stdout, "within the host")[1]
    assert done.stdout.rstrip().endswith("Ready: run the same command with `dpo` in place of `preflight`.")
    assert "Traceback" not in done.stderr and "WARNING" not in done.stderr
    assert not [p for p in tmp_path.rglob(".rlhf-preflight*")] and not (tmp_path / "runs").exists()


def test_other_version_on_one_rank(dpo):
    from transformers import __version__

    both = run_ranks(dpo, "--quick", trouble="other_version")
    assert [code for code, _, _ in both] == [2, 2]
    (_, shown, said), (_, silent, nothing) = both
    host = socket.gethostname()
    assert f"error    {host} (rank 1): transformers 5.0.1; the others: transformers {__version__}\n" in shown
    assert f"-> there: {sys.executable} -m pip install transformers=={__version__}\n" in shown
    assert row(shown, "versions")[0] == "error" and row(shown, "all-reduce")[0] == "ok"
    assert said == "rlhf: not ready: 1 error; fix the errors above and run preflight again\n"
    assert (silent, nothing) == ("", "")


def test_rank_that_never_comes(dpo):
    """Not forked: before torch is imported, its own log of a connection that fails is turned off."""
    env = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, WORKER, dpo, "--timeout_s", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | env, timeout=300)
    code, shown, said = done.returncode, done.stdout, done.stderr
    expected = f"rlhf: {socket.gethostname()} (rank 1) did not arrive within 2 s ('start'; 1 of 2 ranks did); "
    assert (code, shown) == (2, "") and said.startswith(expected)


@pytest.mark.slow
def test_rank_that_starts_and_never_comes_under_accelerate(dpo):
    done = run(*launch_command(3, dpo, "--timeout_s", "20", program=(WORKER,)), env={"TROUBLE": "never_comes"})
    assert done.returncode == 1  # the launcher's own code for any failure
    assert (
        f"rlhf: {socket.gethostname()} (rank 1) did not arrive within 20 s ('start'; 2 of 3 ranks did)" in done.stderr
    )


def test_rendezvous_that_nobody_serves(dpo):
    (code, _, said), *_ = run_ranks(dpo, "--timeout_s", 2, ranks=(1,))
    assert code == 2
    assert f"rlhf: rank 1 on {socket.gethostname()}: no rendezvous at 127.0.0.1:" in said
    assert "check that rank 0 is still running" in said


def test_name_that_cant_be_resolved(dpo):
    (code, _, said), *_ = run_ranks(dpo, ranks=(1,), MASTER_ADDR="no-such-host.invalid")
    assert (code, said.count("\n")) == (2, 1)
    assert "the name 'no-such-host.invalid' (MASTER_ADDR) can't be resolved" in said


@pytest.mark.slow
def test_all_reduce_that_hangs(dpo):
    both = run_ranks(dpo, "--timeout_s", 20, trouble="hangs_in_all_reduce")
    assert [code for code, _, _ in both] == [2, 2]
    shown = both[0][1]
    assert row(shown, "all-reduce")[0] == "error"
    assert "(rank 1) hung in the first all-reduce (gloo)" in " ".join(shown.split())


def test_all_reduce_that_adds_up_wrongly(dpo):
    both = run_ranks(dpo, "--quick", trouble="wrong_sum")
    assert [code for code, _, _ in both] == [2, 2]
    assert f"{socket.gethostname()} (rank 1): the sum of an all-reduce (gloo) is wrong" in both[0][1]


def test_recipe_that_is_wrong_is_told_once(recipe):
    both = run_ranks(recipe("dpo", learing_rate=1))
    assert [code for code, _, _ in both] == [2, 2]
    assert both[0][2].startswith("rlhf: ") and "unknown key 'learing_rate'" in both[0][2] and both[1][2] == ""


@needs_mount
def test_paths_and_output_folder_on_another_disk(recipe, tiny_llama, few_pairs, tmp_path):
    shared = tmp_path / "shared"
    (shared / "out").mkdir(parents=True)
    shutil.copy(few_pairs, shared / "pairs.jsonl")
    file = recipe(
        "sft", model_name_or_path=tiny_llama, dataset_name=str(shared / "pairs.jsonl"), output_dir=str(shared / "out")
    )
    both = run_ranks(file, "--quick", trouble="other_disk", FOLDER=str(shared))
    assert [code for code, _, _ in both] == [2, 2]
    host, shown = socket.gethostname(), both[0][1]
    line = next(i for i, text in enumerate(Path(file).read_text().splitlines(), 1) if text.startswith("dataset_name"))
    assert f"error    {file}:{line}: dataset_name {shared}/pairs.jsonl does not exist on {host} (rank 1)\n" in shown
    assert f"error    {shared}/out is not the same disk on {host} (rank 1) as on {host}\n" in shown
    assert os.listdir(shared / "out") == []


@needs_mount
@pytest.mark.parametrize(
    "options, expected",
    [
        ("ro", "it is mounted read-only"),
        ("size=4k,nr_inodes=100", "the disk is full (or has no free inodes): free some space"),
        ("size=10m", "0.01 GB free, but the model with its checkpoints needs about 0.02 GB"),
        ("size=200m,nr_inodes=50", "has space for only 4"),
    ],
)
def test_disk_that_wont_do(options, expected, recipe, tiny_llama, few_pairs, tmp_path):
    out = tmp_path / "scratch"
    out.mkdir()
    file = recipe(
        "sft", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(out / "sft"), use_peft=True
    )
    mount = (WORKER, "other_disk", out, options, "full" if "4k" in options else "")
    (code, shown, _), *_ = run_ranks(file, "--quick", ranks=(0,), world=1, before=(mount,))
    assert (code, row(shown, "output folder")[0]) == (2, "error")
    assert expected in shown, shown


@pytest.fixture
def two_hosts():
    """Two network namespaces on a wire, n1 at 10.99.0.1 and n2 at 10.99.0.2, with names of their own; as root."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("not installed: `ip` or `unshare` (apt-get install iproute2 util-linux)")
    if not can_make_hosts():
        pytest.skip("may not make network namespaces (no root)")
    names = [f"rlhf-{os.getpid()}-n1", f"rlhf-{os.getpid()}-n2"]
    script = """
        ip netns add $1; ip netns add $2
        ip link add v1 netns $1 type veth peer name v2 netns $2
        for i in 1 2; do
          n=$1; ip -n $n link set lo up; ip -n $n addr add 10.99.0.$i/24 dev v$i; ip -n $n link set v$i up
          mkdir -p /etc/netns/$n
          printf '127.0.0.1 localhost\\n10.99.0.1 n1\\n10.99.0.2 n2\\n' > /etc/netns/$n/hosts
          shift
        done
    """
    try:
        subprocess.run(["sh", "-ec", script, "two-hosts", *names], check=True, capture_output=True)
        yield [
            ["ip", "netns", "exec", name, "unshare", "--uts", "--", "sh", "-c", f'hostname n{i}; exec "$@"', "on"]
            for i, name in enumerate(names, 1)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


def launch_on_two_hosts(two_hosts, *words):
    processes = [
        subprocess.Popen(
            [*two_hosts[machine], sys.executable, *launch_command(2, *words, program=(
                "--num_machines", "2", "--machine_rank", str(machine), "--main_process_ip", "10.99.0.1",
                "--main_process_port", "29555", WORKER))],
            text=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for machine in range(2)
    ]  # fmt: skip
    try:
        return [(p.wait(timeout=300), *p.communicate()) for p in processes]
    finally:
        for process in processes:
            process.kill()


def fork_on_two_hosts(two_hosts, *words, **env):
    """Ranks that enter the namespaces of a process on each host."""
    on_host = [
        subprocess.Popen([*host, "sh", "-c", "echo here; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for host in two_hosts
    ]
    try:
        assert [process.stdout.readline() for process in on_host] == [b"here\n"] * 2
        before = [(WORKER, "enter", process.pid) for process in on_host]
        return run_ranks(*words, before=before, MASTER_ADDR="10.99.0.1", LOCAL_WORLD_SIZE="1", LOCAL_RANK="0", **env)
    finally:
        for process in on_host:
            process.communicate()  # its standard input ends, and so does it


@pytest.mark.parametrize("start", [fork_on_two_hosts, pytest.param(launch_on_two_hosts, marks=pytest.mark.slow)])
def test_two_hosts_tell_interface_and_clocks(start, two_hosts, dpo):
    both = start(two_hosts, dpo)
    assert [code for code, _, _ in both] == [0, 0], both
    shown = both[0][1]
    assert shown.startswith(f"{dpo}: 2 processes on 2 hosts")
    assert row(shown, "clocks")[0] == "ok" and "from n1's" in row(shown, "clocks")[1]
    assert row(shown, "output folder")[1].count("written and read by all hosts") == 1
    assert "of v1 (1.2 GB/s)" in row(shown, "between hosts")[1]  # veth says 10 Gb/s
    assert row(shown, "hosts")[1].startswith("2 hosts: n1, n2 (2 processes): CPU")


def test_two_hosts_whose_clocks_differ(two_hosts, dpo):
    both = fork_on_two_hosts(two_hosts, dpo, "--quick", trouble="other_clock")
    assert [code for code, _, _ in both] == [2, 2]
    assert "error    n2: its clock is 120.0 s behind n1's\n" in both[0][1]


def test_host_whose_name_is_a_loopback_address(two_hosts, dpo):
    """Debian's /etc/hosts: gloo would listen where no other host can come."""
    for i in (1, 2):
        hosts = Path(f"/etc/netns/{two_hosts[i - 1][3]}/hosts")
        hosts.write_text(hosts.read_text().replace(f"10.99.0.{i} n{i}", f"127.0.1.1 n{i}"))
    both = fork_on_two_hosts(two_hosts, dpo, "--quick")
    assert [code for code, _, _ in both] == [2, 2]
    assert "n1 (rank 0), n2 (rank 1): the host's own name resolves to 127.0.1.1 there\n" in both[0][1]
    assert "-> on n1: export GLOO_SOCKET_IFNAME=v1; on n2: export GLOO_SOCKET_IFNAME=v2 (or fix" in both[0][1]
    assert row(both[0][1], "all-reduce")[1] == "skipped because of the errors above"
