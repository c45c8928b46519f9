"""`rlhf data check`: everything that is found in data, with its places, for people, for CI, and as a cleaned copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.text import Text

from rlhf.curation.export import output_file, write_rows, writing
from rlhf.curation.findings import KINDS, Finding, data_findings, in_order
from rlhf.curation.fix import Fixed, fixed
from rlhf.curation.sarif import sarif
from rlhf.curation.screen import COLOURS, Screen, command, note, plural, shown
from rlhf.curation.target import Target, in_file_order, open_target
from rlhf.data.rows import StageData
from rlhf.errors import UserError, one_line
from rlhf.files import write_file


def check(options: Any, rest: list[str]) -> int:
    """Check data; returns 2 for rows that would end a run, or with --strict for anything that is no mere note.

    Raises:
        UserError: the data can't be read, an output file exists, a package is missing.
    """
    from rlhf.curation import near_duplicates, secret_scan

    target = open_target(options.target, options, rest)
    if options.near_duplicates:
        near_duplicates.require()
    if options.secrets:
        secret_scan.require()
    if options.drop_leaks and not options.fix:
        raise UserError("--drop-leaks needs --fix OUT, where the other rows are written")
    fix = output_file(options.fix, "--fix") if options.fix else None
    report = output_file(options.sarif, "--sarif", (".sarif", ".json")) if options.sarif else None
    data = target.read()
    findings, notes = _find(target, data, options)
    done = fixed(data, bool(target.recipe.ours.heldout), options.drop_leaks) if fix else None
    if fix and done:
        write_rows(done.rows, fix, plain=target.recipe.get("format") == "plain")
    if report:
        with writing(report):
            write_file(report, json.dumps(sarif(findings, target.name), indent=1) + "\n")
    if options.json:
        print(json.dumps(_record(target, data, findings, notes, done), indent=1), flush=True)
    else:
        _show(target, data, findings, notes, options)
        _show_files(done, fix, report, len(data.train))
    grave = {"error"} | ({"warning"} if options.strict else set())
    return 2 if any(finding.level in grave for finding in findings) else 0


def _find(target: Target, data: StageData, options: Any) -> tuple[list[Finding], list[str]]:
    """(findings, what was not looked at and why)"""
    from rlhf.curation import near_duplicates, secret_scan

    most, notes = None if options.all else options.shown, []
    found = data_findings(data, most, target.recipe.ours.bad_rows == "skip")
    if not target.is_recipe:  # a margin is for reward models, which the kind of rows doesn't tell
        found = [f for f in found if f.kind != "unused" or not f.text.endswith(": margin")]
    rows = in_file_order(data.train)
    wanted = options.near_duplicates
    if wanted is None and len(rows) > near_duplicates.DEFAULT_UP_TO:
        notes.append(f"near-duplicates of {len(rows):,} rows: only with --near-duplicates")
    elif wanted is None and not near_duplicates.is_installed():
        notes.append("near-duplicates: the package datasketch is missing (the extra `data`)")
    elif wanted is not False:
        found += near_duplicates.near_duplicates(rows, most)
    if options.secrets:
        found = secret_scan.secrets(rows, most, found)
    tokens, why = _with_tokens(target, data, options, most)
    notes += [why] if why else []
    return in_order(found + tokens), notes


def _with_tokens(target: Target, data: StageData, options: Any, most: int | None) -> tuple[list[Finding], str]:
    if options.rows == 0:
        return [], ""
    if not target.recipe.get("model_name_or_path"):
        return [], "--model NAME adds lengths in tokens and what the chat template does"
    from rlhf.curation.encoder import encoder_of
    from rlhf.curation.token_findings import token_findings

    try:
        encoder = encoder_of(target, data, options.max_length)
    except UserError as error:
        if "the chat template does not end" not in str(error):
            raise
        return [Finding("template", 0, (), one_line(error, 400))], ""
    if isinstance(encoder, str):
        return [], encoder
    rows = in_file_order(data.train)
    found, counts = token_findings(rows, encoder, most, options.rows)
    part = (
        f"{counts.rows:,} of {len(rows):,} rows, evenly spaced" if counts.rows < len(rows) else f"{counts.rows:,} rows"
    )
    return found, f"lengths and chat template: {part}, with the tokenizer of {encoder.model}"


def _record(
    target: Target, data: StageData, findings: list[Finding], notes: list[str], done: Fixed | None
) -> dict[str, Any]:
    found = {
        "target": target.name, "stage": target.stage if target.is_recipe else None, "kind": target.kind,
        "rows": len(data.train), "heldout": len(data.heldout) if data.heldout is not None else None,
        "read": data.num_read + len(data.skipped), "findings": [finding.record() for finding in findings], "notes": notes,
        "summary": data.summary.record() if data.summary else None,
    }  # fmt: skip
    return found | ({"fixed": {"rows": len(done.rows), "removed": done.removed}} if done else {})


def _show(target: Target, data: StageData, findings: list[Finding], notes: list[str], options: Any) -> None:
    screen, noun = Screen(), "pair" if target.kind == "pairs" else "row"
    words = [f"{plural(len(data.train), noun)}{f' for {target.stage}' if target.is_recipe else ''}"]
    words += [f"{len(data.heldout):,} held out"] if data.heldout is not None else []
    if target.kind == "pairs" and data.summary and data.summary.chosen_longer is not None:
        words.append(f"chosen longer in {data.summary.chosen_longer:.0%}")
    screen.print(Text(f"{shown(target.name, 200)}: {', '.join(words)}", "bold"))
    for line in [*data.about, *notes]:
        screen.print(Text(f"  {shown(line)}", "dim"))
    for finding in findings:
        _show_one(screen, finding)
    counts = [plural(n, level) for level in ("error", "warning") if (n := sum(f.level == level for f in findings))]
    screen.print()
    if not counts:
        screen.print(Text("nothing found", "green"))
    else:
        more = any(len(f.places) < f.rows for f in findings)
        screen.print(f"{' and '.join(counts)} found" + ("; --all shows every place" if more else ""))
    if options.fix is None and any(f.kind in ("duplicates", "blanks_only", "unusable", "skipped") for f in findings):
        screen.print(
            f"Next: {command('check', target.name, '--fix', 'clean.jsonl')}   # a copy without what is safe to remove"
        )
    elif target.is_recipe:
        screen.print(f"Next: {command('show', target.name)}   # the tokens that are trained on")
    else:
        screen.print(f"Next: {command('stats', target.name)}   # lengths, turns, sources")


def _show_one(screen: Screen, finding: Finding) -> None:
    number = f"{finding.rows:,}" if finding.rows else ""
    of = f" (of {finding.of:,} that were looked at)" if finding.of else ""
    screen.print()
    screen.print(
        Text.assemble((f"{finding.level:<8}", COLOURS[finding.level]), f"{number:>7}  {shown(finding.title)}{of}")
    )
    for place, about in finding.places:
        screen.print(Text.assemble(" " * 17, (shown(place, 200), "cyan"), f"  {shown(about)}" if about else ""))
    if (more := finding.rows - len(finding.places)) > 0:
        screen.print(Text(f"{' ' * 17}and {more:,} more", "dim"))
    if finding.level != "note":
        screen.print(Text(f"{' ' * 17}-> {KINDS[finding.kind].fix}", "dim"))


def _show_files(done: Fixed | None, fix: Path | None, report: Path | None, total: int) -> None:
    if done and fix:
        print(f"\n{fix}: {plural(len(done.rows), 'row')}")
        for line in done.lines() or ["nothing was removed"]:
            print(f"  {line}")
    if report:
        note(f"{report} written")
