"""Judges interfaces, clocks and all-reduce: rows of the table. Pure functions."""

from __future__ import annotations

from rlhf.preflight.bandwidth import LEAST_SHARE, bus_bandwidth, link_of
from rlhf.preflight.rendezvous import who
from rlhf.preflight.table import Finding, Row, speed

SKEW_WARNING_S, SKEW_ERROR_S = 1.0, 60.0


def judge_interfaces(reports: list[dict], hosts: list[str]) -> list[Finding]:
    """Configured interfaces that don't exist, and host names that resolve to a loopback address."""
    found = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        for wanted in dict.fromkeys(report[variable] for report in reports):
            asked = [rank for rank, report in enumerate(reports) if report[variable] == wanted]
            ranks = [rank for rank in asked if not _names_interface(variable, wanted, reports[rank]["interfaces"])]
            if ranks:
                there = ", ".join(name for name in reports[ranks[0]]["interfaces"] if name != "lo")
                text = f"{who(ranks, hosts)}: {variable}={wanted}, but there is no such interface"
                found.append(Finding("error", text, f"set {variable} to one of: {there}"))
    alone = [
        rank for rank, report in enumerate(reports)
        if report["hostname_address"].startswith("127.") and not report["GLOO_SOCKET_IFNAME"]
    ]  # fmt: skip
    if alone and len(set(hosts)) > 1:
        routes = {hosts[r]: reports[r]["route"] for r in alone if reports[r]["route"] not in ("", "lo")}
        names = list(dict.fromkeys(routes.values())) or ["eth0"]
        text = f"{who(alone, hosts)}: the host's own name resolves to {reports[alone[0]]['hostname_address']} there"
        fix = f"export GLOO_SOCKET_IFNAME={names[0]}"
        if len(names) > 1:
            fix = "; ".join(f"on {host}: export GLOO_SOCKET_IFNAME={name}" for host, name in list(routes.items())[:8])
        found.append(Finding("error", text, f"{fix} (or fix /etc/hosts): other hosts can't reach that address"))
    return found


def _names_interface(variable: str, wanted: str, there: list[str]) -> bool:
    """Whether all of gloo's interfaces exist, or one matches NCCL's value (prefixes; `=`: exact, `^`: excluded)."""
    if not wanted or wanted.startswith("^"):
        return True
    names = wanted.lstrip("=").split(",")
    if variable == "GLOO_SOCKET_IFNAME":
        return set(names) <= set(there)
    exact = wanted.startswith("=")
    return any(name == there_name if exact else there_name.startswith(name) for name in names for there_name in there)


def judge_clocks(offsets: list, hosts: list[str]) -> Row | None:
    """Clocks against rank 0's; None with one host."""
    measured = {rank: found for rank, found in enumerate(offsets) if found}
    if not measured:
        return None
    found = []
    for rank, (offset, uncertainty) in measured.items():
        certain = max(0.0, abs(offset) - uncertainty)
        if certain > SKEW_WARNING_S:
            level = "error" if certain > SKEW_ERROR_S else "warning"
            side = "behind" if offset > 0 else "ahead of"
            text = f"{hosts[rank]}: its clock is {abs(offset):.1f} s {side} {hosts[0]}'s"
            found.append(Finding(level, text, f"on {hosts[rank]}: sudo chronyc makestep (or start chronyd, ntpd)"))
    offset, uncertainty = max(measured.values(), key=lambda m: abs(m[0]))
    shown = f"at most {abs(offset) * 1e3:,.1f} ms from {hosts[0]}'s (measured to {uncertainty * 1e3:,.1f} ms)"
    return Row("clocks", shown, tuple(found))


def judge_collectives(results: list[dict], hosts: list[str], devices: list[str]) -> list[Row]:
    """Rows on exactness, then on speed; no speeds if a collective failed."""
    failed = [rank for rank, r in enumerate(results) if r["error"]]
    if failed:
        return [_failed_collectives(results, hosts, failed)]
    findings = []
    for backend in results[0]["exact"]:
        wrong = [rank for rank, r in enumerate(results) if not r["exact"][backend]]
        if wrong:
            text = f"{who(wrong, hosts)}: the sum of an all-reduce ({backend}) is wrong"
            fix = (
                "exclude that host (Slurm: --exclude) and test its memory and GPU; if NCCL_P2P_DISABLE=1 helps, the "
                "link between GPUs is faulty"
            )
            findings.append(Finding("error", text, fix))
    backends = ", ".join(results[0]["exact"])
    rows = [
        Row(
            "all-reduce",
            f"the sum is {'wrong' if findings else 'exact'} over {len(hosts)} ranks ({backends})",
            tuple(findings),
        )
    ]
    if "all" not in results[0]:
        return rows
    several = len(set(hosts)) > 1
    if several:
        rows += _inside_rows(results, hosts, devices)
    num_bytes, seconds = results[0]["all"][0], max(r["all"][1] for r in results)
    link = _network(results, devices[0]) if several else _link(devices[0])
    name = "between hosts" if several else "within the host"
    return [*rows, speed_row(name, num_bytes, seconds, len(hosts), link)]


def _failed_collectives(results: list[dict], hosts: list[str], failed: list[int]) -> Row:
    groups: dict[tuple, list[int]] = {}
    for rank in failed:
        result = results[rank]
        groups.setdefault((not result["hung"], result["during"], result["error"]), []).append(rank)
    failures = [  # hung ranks first: the others failed because they waited for them
        f"{who(ranks, hosts)} {'failed' if returned else 'hung'} in {during} ({error})"
        for (returned, during, error), ranks in sorted(groups.items())[:4]
    ]
    rest = [r for r in range(len(hosts)) if r not in failed]
    text = "; ".join(failures + ([f"{who(rest, hosts)} succeeded"] if rest else []))
    fix = (
        "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the interface that connects the hosts (`ip -br addr`), and "
        "open all ports between them in the firewall; NCCL_DEBUG=INFO prints details"
    )
    if len(set(hosts)) == 1:
        fix = "NCCL_DEBUG=INFO prints details; if NCCL_P2P_DISABLE=1 helps, the link between GPUs is faulty"
    return Row("all-reduce", f"failed on {who(failed, hosts)}", (Finding("error", text, fix),))


def _inside_rows(results: list[dict], hosts: list[str], devices: list[str]) -> list[Row]:
    """A row on the slowest of the hosts with several processes."""
    slowest = max(
        (rank for rank, r in enumerate(results) if r.get("inside")), key=lambda r: results[r]["inside"][1], default=None
    )
    if slowest is None:
        return []
    num_bytes, seconds = results[slowest]["inside"]
    row = speed_row("within a host", num_bytes, seconds, hosts.count(hosts[slowest]), _link(devices[slowest]))
    return [Row(row.check, f"{row.shown}; slowest: {hosts[slowest]}", row.findings)]


def _link(device: str) -> tuple[str, float, str] | None:
    link = link_of(device)
    return link and (*link, link[0].split()[0])


def _network(results: list[dict], device: str) -> tuple[str, float, str] | None:
    """(names, bytes/s, kind) of the interfaces that carried the slowest host's data; None if a speed is unknown."""
    known = [(sum(r["speeds"]), "+".join(r["interfaces"])) for r in results if r["interfaces"] and all(r["speeds"])]
    if len(known) < len(results):
        return None
    rate, names = min(known)
    return names, rate, "network" if device != "CPU" else "network (gloo)"


def speed_row(check: str, num_bytes: int, seconds: float, world: int, link: tuple[str, float, str] | None) -> Row:
    """A row that compares a measured all-reduce with the speed of the hardware.

    Args:
        link: (name, bytes/s, a key of LEAST_SHARE), or None if unknown.
    """
    bus = bus_bandwidth(num_bytes, seconds, world)
    shown = (
        f"bus {speed(bus)}, algorithm {speed(num_bytes / seconds)} ({num_bytes >> 20} MiB in {seconds * 1e3:.0f} ms)"
    )
    if link is None:
        return Row(check, f"{shown}; link speed unknown")
    name, rate, kind = link
    share, least = bus / rate, LEAST_SHARE[kind]
    found: tuple[Finding, ...] = ()
    if share < least:
        text = f"{check}: an all-reduce reaches {share:.0%} of {name} ({speed(rate)}); at least {least:.0%} is usual"
        fix = "NCCL_DEBUG=INFO prints NCCL's transport; `nvidia-smi topo -m` and `ibstat` show the available links"
        if kind == "network (gloo)":
            fix = "check that this is the right interface; GLOO_SOCKET_IFNAME selects another"
        found = (Finding("warning", text, fix),)
    return Row(check, f"{shown}; {share:.0%} of {name} ({speed(rate)})", found)
