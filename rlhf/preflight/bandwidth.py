"""All-reduce test before training: is the sum exact, how fast is it, on which interface, and how fast should it be."""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from rlhf.preflight.rendezvous import Ranks

# Between two GPUs of a host, one direction, in bytes/s: half of the "bidirectional" figure of NVIDIA's data sheets (NVLink
# 2: 300 GB/s, 3: 600, 4: 900, 5: 1800; PCIe x16: 3rd generation 32, 4th 64, 5th 128). The first name that occurs in the
# device's name applies; cards whose NVLink is an optional bridge (NVL, A40, RTX) count as PCIe.
LINKS = (
    ("H100 PCIe", "PCIe 5", 64e9), ("H100 NVL", "PCIe 5", 64e9), ("H200 NVL", "PCIe 5", 64e9),
    ("B200", "NVLink 5", 900e9), ("B300", "NVLink 5", 900e9), ("H200", "NVLink 4", 450e9), ("H100", "NVLink 4", 450e9),
    ("A100-SXM", "NVLink 3", 300e9), ("A100", "PCIe 4", 32e9), ("V100-SXM", "NVLink 2", 150e9), ("V100", "PCIe 3", 16e9),
    ("L40", "PCIe 4", 32e9), ("L4", "PCIe 4", 32e9), ("A10", "PCIe 4", 32e9), ("A30", "PCIe 4", 32e9),
    ("A40", "PCIe 4", 32e9), ("A6000", "PCIe 4", 32e9), ("RTX 3090", "PCIe 4", 32e9), ("RTX 4090", "PCIe 4", 32e9),
    ("RTX 5090", "PCIe 5", 64e9), ("T4", "PCIe 3", 16e9),
)  # fmt: skip

# Below this fraction of the link's speed preflight warns. nccl-tests reach 0.75 to 0.85 of NVLink and of InfiniBand on
# healthy machines; PCIe goes through host memory if GPUs have no peer access; gloo is one thread over TCP.
LEAST_SHARE = {"NVLink": 0.5, "PCIe": 0.25, "network": 0.5, "network (gloo)": 0.1}

NUM_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
NUM_ROUNDS = 5
GRACE_S = 5.0  # extra time for NCCL and gloo to fail with their own time-out and error message


def algorithm_bandwidth(num_bytes: int, seconds: float) -> float:
    """Bytes of the tensor per second."""
    return num_bytes / seconds


def bus_bandwidth(num_bytes: int, seconds: float, world: int) -> float:
    """Bytes per second that a ring sends over its slowest link: 2 (n - 1) / n times the tensor.

    Comparable with the hardware's speed, whatever n. Source: nccl-tests, doc/PERFORMANCE.md.
    """
    return algorithm_bandwidth(num_bytes, seconds) * 2 * (world - 1) / world


def link_of(device_name: str) -> tuple[str, float] | None:
    """(`NVLink 4`, bytes/s in one direction) between the GPUs of a host; None if unknown."""
    return next((link[1:] for link in LINKS if re.search(rf"\b{re.escape(link[0])}", device_name)), None)


# --- which interface -------------------------------------------------------------------------------------------------


def traffic(infiniband: Path = Path("/sys/class/infiniband")) -> dict[str, int]:
    """Bytes sent so far by each network interface (`eth0`) and InfiniBand or RoCE port (`mlx5_0:1`) of this host."""
    sent = {name: count.bytes_sent for name, count in psutil.net_io_counters(pernic=True).items()}
    for file in infiniband.glob("*/ports/*/counters/port_xmit_data"):
        try:
            sent[f"{file.parts[-5]}:{file.parts[-3]}"] = 4 * int(file.read_text())  # it counts words of 4 bytes
        except (OSError, ValueError):
            continue
    return sent


def used_interfaces(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Interfaces that carried at least a tenth of the traffic of the busiest one; none if traffic was negligible."""
    sent = {name: after[name] - before.get(name, 0) for name in after if name != "lo"}  # lo stays within a host
    most = max(sent.values(), default=0)
    return sorted(name for name, count in sent.items() if count >= max(most / 10, 1 << 18))


def interface_speed(name: str, infiniband: Path = Path("/sys/class/infiniband")) -> float | None:
    """Rated bytes per second of an interface; None if the system does not report it."""
    if ":" in name:
        device, port = name.split(":")
        try:
            rate = (infiniband / device / "ports" / port / "rate").read_text()  # 200 Gb/sec (4X HDR)
            return float(rate.split()[0]) * 1e9 / 8
        except (OSError, ValueError, IndexError):
            return None
    found = psutil.net_if_stats().get(name)
    return found.speed * 1e6 / 8 if found and 0 < found.speed < 65535 else None  # virtual interfaces report 0 or 65535


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(ranks: Ranks, device: torch.device, quick: bool) -> dict[str, Any]:
    """Run the collectives on this rank; returns within the time-out, whatever hangs.

    Returns:
        `error` and `during` if it failed (`hung`: it did not even return, so the process can't exit cleanly), else
        `exact`; and unless quick: `inside` and `all`, (bytes, seconds) or None, and `interfaces` with `speeds`.
    """
    found: dict[str, Any] = {"during": "creating the process group", "error": "", "hung": False}

    def work() -> None:
        try:
            _measure(ranks, device, quick, found)
        except Exception as error:  # NCCL and gloo raise many types
            lines = [line for line in str(error).splitlines() if line.strip()]
            found["error"] = (lines or [type(error).__name__])[0][:300]

    seconds = ranks.timeout_s + GRACE_S
    if not run_bounded(work, seconds):
        found |= {"error": f"not finished within {seconds:g} s", "hung": True}
    return dict(found)


def run_bounded(work: Callable[[], None], seconds: float) -> bool:
    """Run `work` in its own thread; returns whether it finished in time."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _measure(ranks: Ranks, device: torch.device, quick: bool, found: dict[str, Any]) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=ranks.timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", ranks.store), rank=ranks.rank, world_size=ranks.world, timeout=timeout
    )
    groups = [(dist.group.WORLD, device)]
    if backend == "nccl":  # ranks agree on a stop over gloo, so it must work too
        groups.append((dist.new_group(backend="gloo", timeout=timeout), torch.device("cpu")))
    exact = {}
    for group, where in groups:
        found["during"] = f"the first all-reduce ({dist.get_backend(group)})"
        exact[dist.get_backend(group)] = is_exact(group, where, ranks.rank, ranks.world)
    found["exact"] = exact
    if quick:  # a short message would measure latency, and blame healthy links
        return
    num_bytes = NUM_BYTES[device.type]
    by_host = {host: [r for r, h in enumerate(ranks.hosts) if h == host] for host in dict.fromkeys(ranks.hosts)}
    before = traffic()
    if len(by_host) > 1:
        found["during"] = "the all-reduce within a host"
        inside = [dist.new_group(members, timeout=timeout) for members in by_host.values()]
        mine = list(by_host).index(ranks.hosts[ranks.rank])
        size = len(by_host[ranks.hosts[ranks.rank]])
        found["inside"] = [num_bytes, timed_all_reduce(inside[mine], device, num_bytes)] if size > 1 else None
        dist.barrier()
        before = traffic()
    found["during"] = "the all-reduce over all ranks"
    found["all"] = [num_bytes, timed_all_reduce(dist.group.WORLD, device, num_bytes)]
    found["interfaces"] = used_interfaces(before, traffic())
    found["speeds"] = [interface_speed(name) for name in found["interfaces"]]


def is_exact(group, device: torch.device, rank: int, world: int) -> bool:
    """Whether rank r's tensors (r + 1) * [0, 1, 2, ... 1023] sum to n (n + 1) / 2 times [0, 1, 2, ... 1023]."""
    numbers = torch.arange(1024, dtype=torch.float32, device=device)
    total = numbers * (rank + 1)
    dist.all_reduce(total, group=group)
    return torch.equal(total.double(), numbers.double() * (world * (world + 1) / 2))


def timed_all_reduce(group, device: torch.device, num_bytes: int) -> float:
    """Seconds per all-reduce of `num_bytes` of fp32: the median of a few rounds, after one warm-up round."""
    tensor = torch.zeros(num_bytes // 4, device=device)
    seconds = []
    for _ in range(1 + NUM_ROUNDS):
        dist.barrier(group=group)
        started = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
