"""Judges model, data, folders and memory: rows of the table. Pure functions."""

from __future__ import annotations

from rlhf.preflight.probes import FEW_INODES, MODEL_KEYS
from rlhf.preflight.rendezvous import majority, who
from rlhf.preflight.table import Finding, Row, gb, gib, near_time, speed

SLOW_DISK = 50e6  # bytes/s


def judge_paths(looks: list[dict], names: dict[str, str], places: dict[str, str], makers: dict[str, str], hosts: list[str]) -> Row | None:  # fmt: skip
    """Model and data of the recipe, as every rank sees them.

    Args:
        looks: per rank, `[state, bytes]` by key (see probes.look_at_paths).
        names, places, makers: by key: the path or id, `file:line`, and the command that will make it ('').
    """
    if not names:
        return None
    found: list[Finding] = []
    for key, name in names.items():
        found += _judge_path(
            f"{places[key]}: {key} {name}", _download(key, name), [look[key] for look in looks], makers[key], hosts
        )
    waits = [makers[key] for key in names if makers[key] and all(look[key][0] == "absent" for look in looks)]
    shown = f"{', '.join(dict.fromkeys(names.values()))}: {'the same on all hosts' if len(set(hosts)) > 1 else 'found'}"
    if found:
        shown = f"{len(found)} of {len(names)} have errors, see below"
    elif waits:
        shown = f"yet to be made by {', '.join(f'`{w}`' for w in waits)}"
    return Row("model and data", shown, tuple(found))


def _download(key: str, name: str) -> str:
    is_model = key in MODEL_KEYS or key.startswith(("models.", "judge."))  # `rlhf.config.evaluated.model_keys`
    return f"hf download {'' if is_model else '--repo-type dataset '}{name}"


def _judge_path(what: str, download: str, seen: list, maker: str, hosts: list[str]) -> list[Finding]:
    absent = [rank for rank, (state, _) in enumerate(seen) if state == "absent"]
    no_hub = [rank for rank, (state, _) in enumerate(seen) if state == "no hub"]
    if len(absent) == len(seen):
        return [] if maker else [Finding("error", f"{what} exists on no host", "correct the path, or create it")]
    if absent:
        fix = "put it on a disk that all hosts share, or copy it to the same path there"
        return [Finding("error", f"{what} does not exist on {who(absent, hosts)}", fix)]
    if no_hub:
        fix = (
            f"on a host with internet access: {download}, with HF_HOME on a disk that all hosts share; "
            "then run with the same HF_HOME and HF_HUB_OFFLINE=1"
        )
        return [
            Finding(
                "error", f"{what} is not in the hub's cache and the hub is unreachable on {who(no_hub, hosts)}", fix
            )
        ]
    sizes = [size for _, size in seen]
    odd = [rank for rank, size in enumerate(sizes) if size != majority(sizes)]
    if odd:
        fix = "the hosts don't see the same disk there: copy it again, or put it on a disk that all hosts share"
        return [Finding("error", f"{what} has different contents on {who(odd, hosts)}", fix)]
    return []


def judge_folder(check: str, folder: str, error: str, unseen: list[int], unseen_hosts: list[str], hosts: list[str], facts: dict, needed: int | None) -> Row:  # fmt: skip
    """The output folder: writable, the same on all hosts, with enough space.

    Args:
        error: the system's error when rank 0 wrote there; ''.
        unseen: ranks that can't see rank 0's file.
        unseen_hosts: hosts whose file rank 0 can't see (`host: reason`).
        facts: from disk_facts, on rank 0.
        needed: bytes of a finished model with a checkpoint; None if unknown.
    """
    other = "give --output_dir a folder on a disk that all hosts share and can write to"
    found = []
    if error:
        found.append(Finding("error", f"{hosts[0]} (rank 0) can't write in {folder}: {error}", other))
    if unseen:
        found.append(Finding("error", f"{folder} is not the same disk on {who(unseen, hosts)} as on {hosts[0]}", other))
    elif unseen_hosts:
        found.append(Finding("error", f"{folder}: {', '.join(unseen_hosts)}", other))
    if facts["inodes"] is not None and facts["inodes"] < FEW_INODES:
        text = f"{folder} has space for only {facts['inodes']} more files (inodes)"
        found.append(Finding("error", text, "delete small files there (caches, old environments), or use another disk"))
    if needed is not None and facts["free"] < needed and not error:
        text = f"{folder} has {gb(facts['free'])} free, but the model with its checkpoints needs about {gb(needed)}"
        found.append(Finding("error", text, "free some, or give --output_dir a folder on another disk"))
    room = f"{gb(facts['free'])} free" + (f", about {gb(needed)} needed" if needed else "")
    seen = "written and read by all hosts" if len(set(hosts)) > 1 else "writable"
    return Row(check, f"{folder}: {'NOT ' if error or unseen or unseen_hosts else ''}{seen}; {room}", tuple(found))


def judge_write(bytes_per_s: float, checkpoint: int | None) -> Row:
    """Write speed, and the time it gives for a checkpoint."""
    shown = f"{speed(bytes_per_s)} (fsync, rank 0)"
    if checkpoint:
        shown += f"; a checkpoint of {gb(checkpoint)} takes {near_time(checkpoint / bytes_per_s)}"
    if bytes_per_s >= SLOW_DISK:
        return Row("write speed", shown)
    text = f"checkpoints are written at {speed(bytes_per_s)}"
    return Row("write speed", shown, (Finding("warning", text, "use a faster disk (scratch), or raise save_steps"),))


def judge_memory(needed: int, parameters: int, reports: list[dict], hosts: list[str]) -> Row:
    """The training state compared with the smallest device; processes on CPUs share their host's memory."""
    if reports[0]["device"]["kind"] == "cuda":
        room, where = min(r["device"].get("memory", [0, 0])[1] for r in reports), "the GPU has"
    else:
        room = min(r["memory"][1] // hosts.count(hosts[rank]) for rank, r in enumerate(reports))
        where = "its share of the host is"
    shown = (
        f"{gib(needed)} of {gib(room)} per process: weights, gradients, optimizer of {parameters / 1e6:,.1f} M "
        "parameters"
    )
    if needed <= room:
        return Row("memory", shown)
    text = f"the model needs {gib(needed)} per process without activations, but {where} {gib(room)}"
    fix = "shard it (launch/zero3.yaml, launch/fsdp2.yaml, more processes), or set use_peft: true"
    return Row("memory", shown, (Finding("warning", text, fix),))
