"""Communication between the ranks of a job before anything that can hang: over the rendezvous key-value store only.

Every exchange has a time-out and names the missing ranks; all ranks receive the same answer, so that they all exit
alike. NCCL and gloo are built on this store; nothing here needs them.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from rlhf.distributed.processes import is_main
from rlhf.errors import UserError

CLOCK_ROUNDS = 5


class Ranks:
    """The ranks of this job.

    Attributes:
        rank, world, local_rank: as set by the launcher; 0, 1, 0 without one.
        timeout_s: seconds after which an exchange fails and names the missing ranks.
        hosts: host per rank, once `exchange_hosts` was called.
        store: torch's key-value store; `exchange` writes each name once.
    """

    def __init__(self, timeout_s: float):
        env = os.environ
        self.rank, self.world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        self.local_rank = int(env.get("LOCAL_RANK", 0))
        self.timeout_s = timeout_s
        self.hosts: list[str] = []
        self.store = self._meet()

    def _meet(self):
        """Connect to the store at MASTER_ADDR:MASTER_PORT.

        Raises:
            UserError: the address can't be resolved, or nothing answers there in time; reported by the affected rank.
        """
        from torch.distributed import HashStore, TCPStore

        if self.world == 1:
            return HashStore()
        address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        where = f"{address}:{port}"
        if not address or not port.isdigit():
            raise self.reported_here(
                f"WORLD_SIZE is {self.world}, but MASTER_ADDR:MASTER_PORT is '{where}'; start it with "
                "`accelerate launch`"
            )
        try:
            socket.getaddrinfo(address, int(port))
        except OSError as error:
            raise self.reported_here(
                f"the name '{address}' (MASTER_ADDR) can't be resolved: {error.strerror}; give --main_process_ip as an IP "
                "address, or fix DNS or /etc/hosts here"
            ) from None
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            return TCPStore(
                address, int(port), self.world, is_master=serves, timeout=timedelta(seconds=self.timeout_s),
                multi_tenant=True, wait_for_workers=False,
            )  # fmt: skip
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:200]
            if serves:
                fix = (
                    "if another process uses this port, give another --main_process_port; check that the address "
                    "is one of this host"
                )
            else:
                fix = (
                    "check that rank 0 is still running, that no firewall is between the hosts, and that MASTER_ADDR "
                    "is rank 0's host on a network that both can reach: "
                ) + f"bash -c 'echo > /dev/tcp/{address}/{port}'"
            raise self.reported_here(f"no rendezvous at {where} within {self.timeout_s:g} s: {reason}; {fix}") from None

    def reported_here(self, text: str) -> UserError:
        """An error of this rank only, printed here: the command line prints errors of rank 0 only."""
        text = f"rank {self.rank} on {platform.node()}: {text}"
        if not is_main():
            print(f"rlhf: {text}", file=sys.stderr, flush=True)
        return UserError(text)

    def exchange(
        self, name: str, value: Any = None, answer: Callable[[list], Any] = lambda values: None,
        wait_s: float | None = None,
    ) -> Any:  # fmt: skip
        """Send a value (JSON) of every rank to rank 0, and rank 0's answer to every rank.

        Args:
            name: of this exchange; each is used once.
            answer: computes, on rank 0, the answer for all ranks from the list of values.
            wait_s: how long rank 0 waits for the others; default timeout_s.

        Raises:
            UserError: a rank did not arrive in time; raised on all ranks that did, and names it.
        """
        self.store.set(f"{name}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            return self._answer(name, answer, self.timeout_s if wait_s is None else wait_s)
        try:
            self.store.wait([name], timedelta(seconds=30 + 2 * (wait_s or self.timeout_s)))
            found = json.loads(self.store.get(name))
        except RuntimeError:
            raise self.reported_here(f"rank 0 has not answered ('{name}'); see its error message or its log") from None
        if "missing" in found:
            self.leave()
            raise UserError(found["missing"])
        return found["answer"]

    def _answer(self, name: str, answer: Callable[[list], Any], wait_s: float) -> Any:
        keys = [f"{name}/{rank}" for rank in range(self.world)]
        deadline = time.monotonic() + wait_s
        try:
            for key in keys:
                left = max(0.1, deadline - time.monotonic())
                self.store.wait([key], timedelta(seconds=left))
        except RuntimeError:
            missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            if missing:
                text = self._describe_missing(name, missing, wait_s)
                self.store.set(name, json.dumps({"missing": text}))
                self.leave(missing)
                raise UserError(text) from None
        found = answer([json.loads(self.store.get(key)) for key in keys])
        self.store.set(name, json.dumps({"answer": found}))
        return found

    def _describe_missing(self, name: str, missing: list[int], wait_s: float) -> str:
        hosts = self.hosts or self._guessed_hosts()
        here = Counter(host for rank, host in enumerate(hosts) if rank not in missing)
        away = [h for h in dict.fromkeys(hosts[r] for r in missing) if h not in here]
        fix = (
            "see the log of that process"
            if not away
            else f"check that {', '.join(away[:8])} is up and its launcher running"
        )
        return (
            f"{who(missing, hosts)} did not arrive within {wait_s:g} s ('{name}'; {self.world - len(missing)} of "
            f"{self.world} ranks did); {fix} (or wait longer with --timeout_s)"
        )

    def _guessed_hosts(self) -> list[str]:
        """Host per rank before `exchange_hosts`: from the node's number in the job, and Slurm's name for it."""
        size = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or self.world
        nodes = os.environ.get("SLURM_JOB_NODELIST")
        names = _output(["scontrol", "show", "hostnames", nodes]).split() if nodes else []
        if self.world <= size:
            names = [platform.node()]
        numbers = [rank // size for rank in range(self.world)]
        return [names[n] if n < len(names) else platform.node() if n == 0 else f"machine {n}" for n in numbers]

    def leave(self, missing: Iterable[int] = ()) -> None:
        """Leave the job: rank 0, whose process may host the store, waits until the others have their answers."""
        self.store.set(f"left/{self.rank}", "")
        if self.rank == 0:
            with contextlib.suppress(RuntimeError):
                here = [f"left/{rank}" for rank in range(self.world) if rank not in missing]
                self.store.wait(here, timedelta(seconds=10))

    def exchange_hosts(self) -> None:
        """Share every rank's host with all ranks: the first exchange, which shows that all ranks are present."""
        self.hosts = self.exchange("start", platform.node(), answer=list)

    def leads_host(self) -> bool:
        """Whether this is the first rank of its host."""
        return self.hosts.index(self.hosts[self.rank]) == self.rank

    def clock_offset(self) -> tuple[float, float] | None:
        """How far rank 0's clock is ahead of this host's, in seconds, with the uncertainty.

        The first rank of each host asks rank 0, which answers them in turn; None on all other ranks.
        """
        leaders = [self.hosts.index(host) for host in dict.fromkeys(self.hosts)]
        rounds = []
        with contextlib.suppress(RuntimeError):  # a rank has died: the next exchange names it
            for leader in leaders:
                for number in range(CLOCK_ROUNDS if leader else 0):
                    key = f"clock/{leader}/{number}"
                    if self.rank == 0:
                        self.store.get(key)
                        self.store.set(f"{key}/back", repr(time.time()))
                    elif self.rank == leader:
                        sent = time.time()
                        self.store.set(key, "")
                        answered = float(self.store.get(f"{key}/back"))
                        rounds.append((sent, answered, time.time()))
        return clock_offset(rounds) if rounds else None


def clock_offset(rounds: list[tuple[float, float, float]]) -> tuple[float, float]:
    """The offset of another clock from round trips, as in NTP: the shortest round trip counts.

    Args:
        rounds: (sent, by this clock; answered, by the other clock; received, by this clock), in seconds.

    Returns:
        (seconds that the other clock is ahead, half the round trip: the maximum error of the offset)

    Example:
        [(10.0, 15.5, 11.0), (20.0, 25.1, 20.2)] -> (5.0, 0.1): 25.1 - (20.0 + 20.2) / 2, and 0.2 / 2.
    """
    sent, answered, received = min(rounds, key=lambda r: r[2] - r[0])
    return answered - (sent + received) / 2, (received - sent) / 2


def majority(values: list) -> Any:
    """The most common value; the first one of a tie."""
    counts = Counter(json.dumps(v) for v in values)
    return json.loads(counts.most_common(1)[0][0])


def spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def who(ranks: list[int], hosts: list[str], most: int = 6) -> str:
    """Ranks with their hosts: [2, 3] -> 'n2 (ranks 2-3)'."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(rank)
    named = [f"{h} (rank{'s' if len(r) > 1 else ''} {spans(r)})" for h, r in by_host.items()]
    more = f" and {len(named) - most} more hosts" if len(named) > most else ""
    return ", ".join(named[:most]) + more


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
