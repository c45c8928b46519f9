"""Judges the ranks' reports about their hosts: rows of the table, each finding with host and fix. Pure functions."""

from __future__ import annotations

from typing import Any

from rlhf.preflight.rendezvous import majority, who
from rlhf.preflight.table import Finding, Row, gib

GPU_TAKEN = 0.1  # fraction of a GPU's memory in use by other processes that causes a warning


# Packages whose version changes the training, or whose versions can't communicate with each other.
DECISIVE = (
    "rlhf-dpo",
    "code",
    "torch",
    "CUDA",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "deepspeed",
    "bitsandbytes",
)


def host_rows(reports: list[dict], hosts: list[str]) -> list[Row]:
    """One row per group of identical hosts, with the least free memory among them."""
    alike: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        alike.setdefault(_device_words(report, hosts.count(hosts[rank])), []).append(rank)
    rows = []
    for words, ranks in alike.items():
        names = list(dict.fromkeys(hosts[r] for r in ranks))
        shown = names[0] if len(names) == 1 else f"{len(names)} hosts: {', '.join(names[:16])}"
        processes = f"{len(ranks)} process{'es' if len(ranks) > 1 else ''}"
        free = min((reports[r]["device"].get("memory") or reports[r]["memory"])[0] for r in ranks)
        rows.append(Row("hosts", f"{shown} ({processes}): {words}, {gib(free)} free"))
    return rows


def _device_words(report: dict, processes: int) -> str:
    device = report["device"]
    if device["kind"] == "cuda":
        driver = f", driver {report['driver']}" if report["driver"] else ""
        return f"{device['count']}x {device['name']}{driver}, CUDA {report['versions']['CUDA']}, {gib(device['memory'][1])} each"
    return f"CPU, {report['cores']} cores, {gib(report['memory'][1])}"


def judge_devices(reports: list[dict], hosts: list[str]) -> list[Finding]:
    """GPUs that are unusable, different, shared or idle."""
    found = []
    for rank, report in enumerate(reports):
        if report["device"]["problem"]:
            fix = "exclude that host (Slurm: --exclude), or fix its driver; --num_processes is the total number of GPUs"
            found.append(Finding("error", f"{who([rank], hosts)}: {report['device']['problem']}", fix))
    names = [r["device"].get("name", "CPU") for r in reports]
    usual = majority(names)
    for name in sorted(set(names) - {usual}):
        ranks = [rank for rank, n in enumerate(names) if n == name]
        fix = "ask for one type (Slurm: --gpus-per-node=TYPE:N, --constraint), or --exclude those hosts"
        found.append(Finding("error", f"{who(ranks, hosts)}: {name}, the others have {usual}", fix))
    seen: dict[tuple, int] = {}
    for rank, report in enumerate(reports):
        device = report["device"]
        if device["kind"] != "cuda":
            continue
        key = (hosts[rank], device["uuid"])
        if device["uuid"] and key in seen:
            text = f"{who([seen[key], rank], hosts)} have the same GPU ({device['uuid']})"
            found.append(Finding("error", text, "leave CUDA_VISIBLE_DEVICES as the launcher or Slurm sets it"))
        seen.setdefault(key, rank)
        free, total = device["memory"]
        if free < (1 - GPU_TAKEN) * total:
            text = f"{who([rank], hosts)}: {gib(total - free)} of its GPU's {gib(total)} are in use"
            found.append(Finding("warning", text, "see `nvidia-smi` there; end processes left over from another job"))
        if rank == hosts.index(hosts[rank]) and hosts.count(hosts[rank]) < device["count"]:
            text = f"{hosts[rank]} has {device['count']} GPUs, but only {hosts.count(hosts[rank])} processes"
            found.append(Finding("warning", text, "set --num_processes to the total number of GPUs of all hosts"))
    return found


def judge_nodes(hosts: list[str], num_nodes: int) -> list[Finding]:
    """Hosts of a Slurm job without a process."""
    used = len(set(hosts))
    if used >= num_nodes:
        return []
    fix = "start one launcher on each (`srun --ntasks-per-node=1 accelerate launch ...`), with --num_machines"
    return [Finding("warning", f"Slurm gave this job {num_nodes} hosts, but processes run on only {used}", fix)]


def judge_versions(reports: list[dict], hosts: list[str]) -> Row:
    """Packages, drivers and checkouts that differ between ranks; one finding per group of ranks that differ alike."""
    tables = [report["versions"] | {"driver": report["driver"]} for report in reports]
    names = list(dict.fromkeys(name for table in tables for name in table))
    usual = {name: majority([table.get(name) for table in tables]) for name in names}
    groups: dict[tuple, list[int]] = {}
    for rank, table in enumerate(tables):
        odd = tuple((name, table.get(name)) for name in names if table.get(name) != usual[name])
        if odd:
            groups.setdefault(odd, []).append(rank)
    python = reports[0]["executable"]
    found = []
    for odd, ranks in groups.items():
        place, text = who(ranks, hosts), [f"{name} {version or 'is missing'}" for name, version in odd]
        others = ", ".join(f"{name} {usual[name] or 'missing'}" for name, _ in odd)
        names_odd = [name for name, _ in odd]
        decisive = any(name in DECISIVE for name in names_odd) or _minor_differs(
            dict(odd).get("python"), usual["python"]
        )
        level = "error" if decisive else "warning"
        found.append(
            Finding(level, f"{place}: {', '.join(text)}; the others: {others}", _align(names_odd, usual, python))
        )
    shown = [f"{n} {usual[n]}" for n in ("rlhf-dpo", "python", "torch", "transformers", "trl") if usual.get(n)]
    return Row("versions", f"{'the same' if not found else 'most have'}: {', '.join(shown)}", tuple(found))


def _minor_differs(version: str | None, usual: str) -> bool:
    return version is not None and version.split(".")[:2] != usual.split(".")[:2]


def _align(names: list[str], usual: dict[str, Any], python: str) -> str:
    """The commands that align packages with the other ranks' versions."""
    fixes = []
    packages = [n for n in names if n not in ("rlhf-dpo", "code", "CUDA", "driver", "python")]
    if missing := [f"{n}=={usual[n]}" for n in packages if usual[n]]:
        fixes.append(f"there: {python} -m pip install {' '.join(missing)}")
    if added := [n for n in packages if not usual[n]]:
        fixes.append(f"there: {python} -m pip uninstall {' '.join(added)}")
    if "rlhf-dpo" in names or "code" in names:
        commit = str(usual["code"] or "").removesuffix("+changes")
        fixes.append(f"there: git checkout {commit}" if commit else f"install rlhf-dpo {usual['rlhf-dpo']} there")
    if "python" in names or "CUDA" in names:
        fixes.append("use one virtual environment on a disk that all hosts share")
    if "driver" in names and not fixes:
        fixes.append("usually works; if NCCL fails, --exclude the host or update its driver")
    return "; ".join(fixes)
