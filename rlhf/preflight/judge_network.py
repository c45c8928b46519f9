"""Interfaces, clocks and all-reduce, judged: rows of the table. Pure."""

from __future__ import annotations

from rlhf.preflight.bandwidth import LEAST_SHARE, bus_bandwidth, link_of
from rlhf.preflight.rendezvous import who
from rlhf.preflight.table import Finding, Row, speed

SKEW_WARNING_S, SKEW_ERROR_S = 1.0, 60.0


def judge_interfaces(reports: list[dict], hosts: list[str]) -> list[Finding]:
    """Interfaces that are named but not there, and host names that gloo would take for this host alone."""
    found = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        for wanted in dict.fromkeys(report[variable] for report in reports):
            asked = [rank for rank, report in enumerate(reports) if report[variable] == wanted]
            ranks = [rank for rank in asked if not _names_interface(variable, wanted, reports[rank]["interfaces"])]
            if ranks:
                there = ", ".join(name for name in reports[ranks[0]]["interfaces"] if name != "lo")
                text = f"{who(ranks, hosts)}: {variable}={wanted}, and there is no such interface"
                found.append(Finding("error", text, f"set {variable} to one of: {there}"))
    alone = [
        rank for rank, report in enumerate(reports)
        if report["hostname_address"].startswith("127.") and not report["GLOO_SOCKET_IFNAME"]
    ]  # fmt: skip
    if alone and len(set(hosts)) > 1:
        routes = {hosts[r]: reports[r]["route"] for r in alone if reports[r]["route"] not in ("", "lo")}
        names = list(dict.fromkeys(routes.values())) or ["eth0"]
        text = f"{who(alone, hosts)}: the host's own name means {reports[alone[0]]['hostname_address']} there"
        fix = f"export GLOO_SOCKET_IFNAME={names[0]}"
        if len(names) > 1:
            fix = "; ".join(f"on {host}: export GLOO_SOCKET_IFNAME={name}" for host, name in list(routes.items())[:8])
        found.append(Finding("error", text, f"{fix} (or mend /etc/hosts): other hosts can't reach that address"))
    return found


def _names_interface(variable: str, wanted: str, there: list[str]) -> bool:
    """Whether all names of gloo's variable are there, or one that NCCL's fits (by its beginning; `=` exactly, `^` not)."""
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
    """Exactness first; where that fails there are no speeds."""
    failed = [rank for rank, r in enumerate(results) if r["error"]]
    if failed:
        return [_failed_collectives(results, hosts, failed)]
    findings = []
    for backend in results[0]["exact"]:
        wrong = [rank for rank, r in enumerate(results) if not r["exact"][backend]]
        if wrong:
            text = f"{who(wrong, hosts)}: the sum of an all-reduce ({backend}) is wrong"
            fix = "take that host out (Slurm: --exclude) and have memory and GPU tested; NCCL_P2P_DISABLE=1 tells whether it is the link"
            findings.append(Finding("error", text, fix))
    backends = ", ".join(results[0]["exact"])
    rows = [
        Row(
            "all-reduce",
            f"the sum is {'wrong' if findings else 'exact'} over {len(hosts)} processes ({backends})",
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
    told = [  # who hangs comes first: the others' errors are of their waiting
        f"{who(ranks, hosts)} {'failed' if politely else 'hung'} in {during} ({error})"
        for (politely, during, error), ranks in sorted(groups.items())[:4]
    ]
    rest = [r for r in range(len(hosts)) if r not in failed]
    text = "; ".join(told + ([f"{who(rest, hosts)} came through"] if rest else []))
    fix = (
        "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the interface that joins the hosts (`ip -br addr`), let the "
        "firewall pass all ports between them; NCCL_DEBUG=INFO says more"
    )
    if len(set(hosts)) == 1:
        fix = "NCCL_DEBUG=INFO says more; NCCL_P2P_DISABLE=1 tells whether it is the link between GPUs"
    return Row("all-reduce", f"failed on {who(failed, hosts)}", (Finding("error", text, fix),))


def _inside_rows(results: list[dict], hosts: list[str], devices: list[str]) -> list[Row]:
    """The slowest host, of those with several processes."""
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
    """(names, bytes/s, kind) of the slowest host's interfaces that carried the data; None where a speed is unknown."""
    known = [(sum(r["speeds"]), "+".join(r["interfaces"])) for r in results if r["interfaces"] and all(r["speeds"])]
    if len(known) < len(results):
        return None
    rate, names = min(known)
    return names, rate, "network" if device != "CPU" else "network (gloo)"


def speed_row(check: str, num_bytes: int, seconds: float, world: int, link: tuple[str, float, str] | None) -> Row:
    """A measured all-reduce beside what the hardware should give.

    Args:
        link: (name, bytes/s, a key of LEAST_SHARE), or None where it is not known.
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
        text = f"{check}: an all-reduce reaches {share:.0%} of {name} ({speed(rate)}); {least:.0%} or more is usual"
        fix = "NCCL_DEBUG=INFO says which way NCCL takes; `nvidia-smi topo -m` and `ibstat` show what there is"
        if kind == "network (gloo)":
            fix = "is that the right interface? GLOO_SOCKET_IFNAME names another"
        found = (Finding("warning", text, fix),)
    return Row(check, f"{shown}; {share:.0%} of {name} ({speed(rate)})", found)
