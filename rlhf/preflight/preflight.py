"""`rlhf preflight`: finds what breaks jobs on clusters before a GPU-hour is spent, and prints a table.

Each rank inspects its own host (probes.py); the ranks communicate over the rendezvous store (rendezvous.py), then
exchange tensors as in training (bandwidth.py); rank 0 judges their reports (judge_hosts.py, judge_network.py,
judge_storage.py). The order: presence of all ranks, hosts, disks, and last the network, because that can hang.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config.recipe import Recipe, load_recipe, stage_of
from rlhf.config.stage_config import TRAINING_STAGES
from rlhf.distributed.processes import is_main, say, world_size
from rlhf.distributed.topology import topology_of_environment
from rlhf.errors import UserError
from rlhf.files import cache_dir
from rlhf.preflight.judge_hosts import host_rows, judge_devices, judge_nodes, judge_versions
from rlhf.preflight.judge_network import judge_clocks, judge_collectives, judge_interfaces
from rlhf.preflight.judge_storage import judge_folder, judge_memory, judge_paths, judge_write
from rlhf.preflight.probes import (
    MODEL_KEYS,
    describe,
    disk_facts,
    look_at_paths,
    model_folder,
    nearest_folder,
    remove_canary,
    sees_canary,
    write_canary,
    write_speed,
)
from rlhf.preflight.rendezvous import Ranks, who
from rlhf.preflight.table import Row
from rlhf.runs.checkpoints import newest_checkpoint
from rlhf.runs.lineage import maker_of
from rlhf.training.checks import bytes_needed, refuse_damaged
from rlhf.training.plan import merges
from rlhf.training.room import count_weights, training_room

if TYPE_CHECKING:
    import torch

WRITE_BYTES = 64 << 20


def preflight(
    recipe_path: str | None,
    overrides: list[str],
    output_dir: str | None = None,
    quick: bool = False,
    timeout_s: float = 120.0,
) -> None:
    """Run all checks on all ranks and print one table on rank 0.

    Args:
        overrides: `--key value` of the recipe.
        output_dir: default: the recipe's, or the working folder.
        quick: check only whether things work, measure no speeds.
        timeout_s: time-out in seconds for each check that can hang.

    Raises:
        UserError: something will not work; on all ranks, after the table. If a rank is missing, there is no table.
    """
    recipe, mistake = _read(recipe_path, overrides, output_dir)
    if mistake and world_size() == 1:
        raise UserError(mistake)
    ranks = Ranks(timeout_s)
    ranks.exchange_hosts()
    if mistakes := ranks.exchange("recipe", mistake, answer=lambda found: _mistakes(found, ranks.hosts)):
        ranks.leave()
        raise UserError(mistakes)
    checks = Checks(ranks, recipe, output_dir or (recipe.values["output_dir"] if recipe else "."), quick)
    try:
        checks.run()
        errors = ranks.exchange("verdict", answer=lambda _: checks.show())
        ranks.leave()
    except UserError as error:  # a rank has died
        if checks.device is None:
            raise
        _leave_at_once(error)
    if errors:
        verdict = UserError(
            f"not ready: {errors} error{'s' if errors > 1 else ''}; fix the errors above and run preflight again"
        )
        if checks.network_failed:
            _leave_at_once(verdict)
        checks.close()
        raise verdict
    checks.close()


def _leave_at_once(error: UserError) -> None:
    """Exit with code 2 even if a thread hangs in NCCL, which would block a clean exit."""
    if is_main():
        print(f"rlhf: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def _read(recipe_path: str | None, overrides: list[str], output_dir: str | None) -> tuple[Recipe | None, str]:
    """(recipe or None, '' or what is wrong with it)."""
    if not recipe_path:
        return None, ""
    more = ["--output_dir", output_dir] if output_dir else []
    try:
        recipe = load_recipe(recipe_path, stage_of(recipe_path), overrides + more)
        refuse_damaged(recipe, MODEL_KEYS)
        return recipe, ""
    except UserError as error:
        return None, str(error)


def _mistakes(found: list[str], hosts: list[str]) -> str:
    """One message for all ranks; a mistake on some ranks only is reported with their hosts."""
    wrong = [rank for rank, text in enumerate(found) if text]
    if not wrong or len(wrong) == len(found):
        return found[0]
    return (
        f"{who(wrong, hosts)}: {found[wrong[0]]} (the other ranks don't have this error: is that disk shared by all "
        "hosts?)"
    )


class Checks:
    """One preflight: every rank runs the same steps; the rows are collected on rank 0.

    Attributes:
        rows: of the table.
        device: the one tensors were exchanged on; None before.
        network_failed: an exchange of tensors has failed or hangs.
    """

    def __init__(self, ranks: Ranks, recipe: Recipe | None, output_dir: str, quick: bool):
        self.ranks, self.recipe, self.output_dir, self.quick = ranks, recipe, output_dir, quick
        self.rows: list[Row] = []
        self.device: torch.device | None = None
        self.network_failed = False

    def gather(self, name: str, value: Any, wait_s: float | None = None) -> list:
        """All ranks' values on rank 0; an empty list on the other ranks."""
        found: list = []
        self.ranks.exchange(name, value, answer=found.extend, wait_s=wait_s)
        return found

    def run(self) -> None:
        ranks, recipe = self.ranks, self.recipe
        on_cpu = bool(recipe and recipe.get("use_cpu")) or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        report = describe(ranks.local_rank, on_cpu)
        reports = self.gather("report", report)
        if is_main():
            self.judge_reports(reports)
        if clocks := judge_clocks(self.gather("clocks", ranks.clock_offset()), ranks.hosts):
            self.rows.append(clocks)
        if recipe:
            self.check_paths(recipe)
        self.check_folder()
        if is_main() and recipe and recipe.stage in TRAINING_STAGES:
            self.check_model(recipe, reports)
        if ranks.world > 1:
            self.check_network(report["device"], reports)

    def judge_reports(self, reports: list[dict]) -> None:
        hosts = self.ranks.hosts
        first, *rest = host_rows(reports, hosts)
        findings = judge_devices(reports, hosts) + judge_nodes(hosts, int(os.environ.get("SLURM_JOB_NUM_NODES", 1)))
        self.rows += [dataclasses.replace(first, findings=tuple(findings)), *rest, judge_versions(reports, hosts)]
        if self.ranks.world > 1:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            found = tuple(judge_interfaces(reports, hosts))
            self.rows.append(Row("rendezvous", f"{where}: all {self.ranks.world} ranks are present", found))

    def check_paths(self, recipe: Recipe) -> None:
        looks = self.gather("paths", look_at_paths(recipe))
        if is_main():
            names = {key: recipe.values[key] for key in looks[0]}
            places, makers = {k: recipe.where(k) for k in names}, {k: maker_of(recipe, n) for k, n in names.items()}
            if row := judge_paths(looks, names, places, makers, self.ranks.hosts):
                self.rows.append(row)

    def check_folder(self) -> None:
        """All ranks look for a file of rank 0, and rank 0 for a file of each host; then free space and write speed."""
        ranks = self.ranks
        wanted = str(Path(self.output_dir).expanduser().absolute())
        canary = f".rlhf-preflight-{uuid.uuid4().hex[:12]}"
        folder, name, expected = ranks.exchange(
            "folder", wanted, answer=lambda found: [nearest_folder(found[0]), canary, found[0]]
        )
        error = write_canary(folder, name) if is_main() else ""
        mine = f"{name}-{ranks.rank}"
        try:
            error = ranks.exchange("canary", error, answer=lambda found: found[0])
            seen = not error and sees_canary(folder, name)
            writes = ranks.leads_host() and ranks.rank > 0 and seen
            failure = write_canary(folder, mine) if writes else ""
            elsewhere = wanted if wanted != expected else ""
            answers = self.gather("seen", [seen, writes, failure, elsewhere])
            if is_main():
                unseen = [rank for rank, answer in enumerate(answers) if not answer[0] and not error]
                self.judge_disk(folder, name, error, unseen, self.unwritten(folder, name, answers))
            ranks.exchange("disk")
        finally:
            remove_canary(folder, mine)
            if is_main():
                remove_canary(folder, name)

    def unwritten(self, folder: str, name: str, answers: list) -> list[str]:
        """The errors of the other hosts' files, as seen by rank 0."""
        texts = []
        for rank, (_, writes, failure, elsewhere) in enumerate(answers):
            place = who([rank], self.ranks.hosts)
            if failure:
                texts.append(f"{place} can't write there: {failure}")
            elif writes and not sees_canary(folder, f"{name}-{rank}"):
                texts.append(f"{self.ranks.hosts[0]} doesn't see what {place} writes")
            if elsewhere:
                texts.append(f"on {place} it is {elsewhere}: start all ranks in the same folder")
        return texts

    def judge_disk(self, folder: str, name: str, error: str, unseen: list[int], unwritten: list[str]) -> None:
        """Free space in the output folder and the reference cache, and the write speed of checkpoints (rank 0)."""
        recipe, needed = self.recipe, None
        if recipe and recipe.stage in TRAINING_STAGES and (source := model_folder(recipe)):
            merge = merges(recipe.ours, recipe.is_quantised)
            newest = newest_checkpoint(Path(recipe.values["output_dir"]))
            needed = bytes_needed(str(source), recipe.uses_lora, merge, newest)
        speed = None
        if not error and not self.quick:
            speed, error = write_speed(folder, f"{name}-speed", WRITE_BYTES)
        hosts = self.ranks.hosts
        self.rows.append(
            judge_folder("output folder", folder, error, unseen, unwritten, hosts, disk_facts(folder), needed)
        )
        if recipe and recipe.stage == "dpo" and recipe.ours.reference == "cached":
            cache = nearest_folder(recipe.ours.reference_cache or str(cache_dir() / "reference"))
            failure = write_canary(cache, f"{name}-cache")
            remove_canary(cache, f"{name}-cache")
            self.rows.append(
                judge_folder("reference cache", cache, failure, [], [], hosts[:1], disk_facts(cache), None)
            )
        if speed:
            self.rows.append(judge_write(speed, needed))

    def check_model(self, recipe: Recipe, reports: list[dict]) -> None:
        if source := model_folder(recipe):
            parameters, on_disk = count_weights(source)
            on_cpu = reports[0]["device"]["kind"] == "cpu"
            needed = training_room(parameters, on_disk, recipe, topology_of_environment(), self.ranks.world, on_cpu)
            self.rows.append(judge_memory(needed.total, parameters, reports, self.ranks.hosts))

    def check_network(self, device: dict[str, Any], reports: list[dict]) -> None:
        """Exchange tensors, unless earlier errors rule it out."""
        import torch

        from rlhf.preflight.bandwidth import measure

        hopeless = any(row.check in ("hosts", "rendezvous") and row.status == "error" for row in self.rows)
        if self.ranks.exchange("network", hopeless, answer=lambda found: found[0]):
            self.rows.append(Row("all-reduce", "skipped because of the errors above"))
            return
        kind = device["kind"]
        self.device = torch.device(kind, self.ranks.local_rank) if kind == "cuda" else torch.device(kind)
        result = measure(self.ranks, self.device, self.quick)
        results = self.gather("measured", result, wait_s=self.ranks.timeout_s + 30)
        if is_main():
            self.rows += judge_collectives(results, self.ranks.hosts, [r["device"].get("name", "CPU") for r in reports])
        failed = any(r["error"] for r in results)
        self.network_failed = self.ranks.exchange("failed", failed, answer=lambda found: found[0])

    def show(self) -> int:
        """Print the table, the findings and the next step; returns the number of errors."""
        findings = [finding for row in self.rows for finding in row.findings]
        errors = sum(finding.level == "error" for finding in findings)
        title = self.recipe.path if self.recipe else self.output_dir
        hosts = len(set(self.ranks.hosts))
        print_table(
            f"{title}: {count(self.ranks.world, 'process', 'processes')} on {count(hosts, 'host', 'hosts')}", self.rows
        )
        for finding in sorted(findings, key=lambda f: f.level):
            say(f"{finding.level:<8} {finding.found}\n{'':<8} -> {finding.fix}")
        if not errors:
            ready = f"Ready{', with warnings' if findings else ''}"
            stage = self.recipe and self.recipe.stage
            say(f"{ready}: run the same command with `{stage}` in place of `preflight`." if stage else f"{ready}.")
        return errors

    def close(self) -> None:
        if self.device is not None:
            import torch.distributed as dist

            dist.destroy_process_group()


def count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def print_table(title: str, rows: list[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=120)  # a log file has no width
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=True)
    for column in ("check", "", "found"):
        table.add_column(column, no_wrap=column != "found", overflow="fold")
    before = ""
    for row in rows:
        style = {"error": "bold red", "warning": "yellow", "ok": "green"}[row.status]
        table.add_row("" if row.check == before else row.check, Text(row.status, style), Text(row.shown))
        before = row.check
    console.print(table)
