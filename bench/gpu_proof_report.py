"""The report of bench/gpu_proof.py: the machine, the targets in plain words, what was compared and what was measured."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

Results = dict[str, dict[str, Any]]
# what is promised: (words, stage, compared with, at least this many times as fast)
SPEEDS = (
    ("DPO at least 5x TRL", "dpo", "trl", 5.0),
    ("DPO at least 4x TRL with precomputed reference", "dpo", "trl-precomputed", 4.0),
    ("reward model at least 3x TRL", "reward", "trl", 3.0),
    ("SFT at least 1.1x TRL's padding-free", "sft", "trl-padding-free", 1.1),
)
MEMORY, MFU, MFU_SHAPE = 0.5, 0.45, "llama-8b"


def file_name(about: dict[str, Any]) -> str:
    """`gpu-nvidia-h200-2026-12-01.md`"""
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    return f"gpu-{device}-{datetime.now(UTC):%Y-%m-%d}.md"


def text(about: dict[str, Any], found: Results, whats: dict[str, str]) -> str:
    """The report as Markdown.

    Args:
        about: the machine (`gpu_proof_device.describe`).
        found: what the parts that have run found.
        whats: all parts, and what each shows.
    """
    lines = [f"# GPU proof: {about['device']}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "", *machine(about, found), ""]
    if about["device"] == "CPU":
        lines += ["**Toy sizes on a CPU: that the script works. No speed or memory here means anything.**", ""]
    lines += [
        "## Targets",
        "",
        *(targets(found) if about["device"] != "CPU" else ["Not judged on a CPU."]),
        "",
        "## Parts",
        "",
        *parts(found, whats),
        "",
    ]
    for name, result in found.items():
        if "variants" in result:
            lines += [f"## {whats.get(name, name)}", "", *comparison(result), ""]
    if "table" in found.get("profile", {}):
        lines += [
            "## Profile of a DPO step",
            "",
            found["profile"]["summary"],
            "",
            "```",
            found["profile"]["table"].rstrip(),
            "```",
            "",
        ]
    wrong = {name: result for name, result in found.items() if not result["ok"]}
    if wrong:
        lines += ["## What failed", ""]
    for name, result in wrong.items():
        lines += [
            f"### {name}",
            "",
            "```",
            *(str(row) for row in result.get("wrong", [])),
            result.get("tail", "").strip()[-3000:],
            "```",
            "",
        ]
    return "\n".join(lines)


def machine(about: dict[str, Any], found: Results) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if name != "rlhf-dpo")
    gpu = f"{about['gpus']} GPU(s), {about.get('gpu_memory_gib')} GiB each, driver {about.get('driver')}, CUDA {about.get('cuda')}; "
    lines = [
        f"{gpu if about['gpus'] else ''}torch {about['torch']}; {versions}; {about['cpus']} cores, {about['memory_gib']} GiB; commit {about['commit']}.",
        f"Attention of packed batches: {about['kernel']}.",
    ]
    commits = sorted({str(result["about"]["commit"]) for result in found.values()} - {str(about["commit"])})
    return lines + ([f"Some parts ran at other commits: {', '.join(commits)}."] if commits else [])


# --- targets ---------------------------------------------------------------------------------------------------------


def targets(found: Results) -> list[str]:
    """A line for each promise: met, not met (and where), or not measured; against TRL's fastest such variant."""
    cases = {
        name: result for name, result in found.items() if "variants" in result and result["ours"] in result["variants"]
    }
    lines = []
    for words, stage, other, least in SPEEDS:
        values = {name: ratio for name, result in cases.items() if result["case"]["stage"] == stage and (ratio := speed(result, other))}  # fmt: skip
        lines.append(judged(words, {n: (v, v >= least, f"{v:.2f}x") for n, v in values.items()}))
    memory = {name: share for name, result in cases.items() if (share := memory_share(result)) is not None}
    lines.append(judged("memory at most half of TRL's", {n: (v, v <= MEMORY, f"{v:.2f}") for n, v in memory.items()}))
    # recomputing activations costs FLOP that MFU does not count
    mfu = {
        name: value for name, result in cases.items()
        if result["case"]["shape"] == MFU_SHAPE and not result["case"]["gradient_checkpointing"] and (value := result["variants"][result["ours"]]["mfu"])
    }  # fmt: skip
    lines.append(judged(f"MFU at least 45% ({MFU_SHAPE})", {n: (v, v >= MFU, f"{v:.0%}") for n, v in mfu.items()}))
    return lines


def judged(words: str, values: dict[str, tuple[float, bool, str]]) -> str:
    if not values:
        return f"- {words}: **not measured**"
    verdicts = {met for _, met, _ in values.values()}
    verdict = "met" if verdicts == {True} else "not met" if verdicts == {False} else "met in part"
    return f"- {words}: **{verdict}** ({', '.join(f'{name} {shown}' for name, (_, _, shown) in values.items())})"


def speed(result: dict[str, Any], other: str) -> float | None:
    """This project's speed as a multiple of TRL's fastest variant of a kind (with or without Liger's kernels)."""
    against = result["variants"][result["ours"]]["against"]
    ratios = [x["speed"] for name, x in against.items() if name.split("+")[0] == other]
    return min(ratios, default=None)


def memory_share(result: dict[str, Any]) -> float | None:
    """This project's peak memory as a share of that of TRL's leanest variant; None on CPUs, which do not count it."""
    mine = result["variants"][result["ours"]]
    shares = [x["memory"] for name, x in mine["against"].items() if name.startswith("trl")]
    return max(shares, default=None) if mine["memory_gib"] is not None else None


# --- tables ----------------------------------------------------------------------------------------------------------


def parts(found: Results, whats: dict[str, str]) -> list[str]:
    rows = [["part", "", "what was found", "s"]]
    for name, what in whats.items():
        result = found.get(name)
        state = "not run" if result is None else "ok" if result["ok"] and result["state"] == "done" else "not here" if result["ok"] else "**failed**"  # fmt: skip
        result = result or {}
        rows.append(
            [
                f"{name}: {what}",
                state,
                result.get("summary", ""),
                f"{result['seconds']:.0f}" if "seconds" in result else "",
            ]
        )
    return table(rows)


def comparison(result: dict[str, Any]) -> list[str]:
    """A case's variants, the first one's losses and TRL's numbers as the base."""
    found, case = result["variants"], result["case"]
    unit = "answers" if case["stage"] == "sft" else "pairs"
    base = next(iter(found), None)
    rows = [
        [
            "variant",
            f"{unit}/s",
            f"of {base}'s",
            "peak memory",
            f"of {base}'s",
            "MFU",
            "of measured matmuls",
            "largest loss difference",
            "first loss",
        ]
    ]
    for name, mine in found.items():
        against = found[name]["against"].get(base)
        memory = mine["memory_gib"]
        rows.append([
            name, f"{mine['per_second']:.3g}", f"{against['speed']:.2f}x" if against else "", f"{memory:.1f} GiB" if memory else "",
            f"{against['memory']:.2f}" if against and memory else "", share(mine["mfu"]), share(mine["of_matmul"]),
            f"{against['loss']:.1e}" if against else "", f"{mine['losses'][0]:.4f}",
        ])  # fmt: skip
    lines = table(rows)
    some = next(iter(found.values()), None)
    if some:
        lines += ["", f"{some['parameters'] / 1e6:,.0f} M parameters, {case['train']}, bf16, {case['examples']} {unit} a step, {len(some['seconds'])} "
                  f"measured steps after one; {max(m['tokens'] for m in found.values())} tokens in them, {max(m['padded'] for m in found.values())} padded."]  # fmt: skip
    return lines + [f"Left out: {name} ({why})." for name, why in result["left_out"].items()]


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def table(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in rows]
    return [lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]]
