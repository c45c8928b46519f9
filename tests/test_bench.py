"""The bench scripts run, and what they compare agrees. Never what they time."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CASES = [("dpo", ["--variants", "trl", "shared"])] + [
    pytest.param(stage, words, marks=pytest.mark.slow)
    for stage, words in (
        ("dpo", ["--train", "full", "--data", "completion-heavy"]), ("dpo", ["--train", "qlora"]), ("reward", []),
        ("sft", ["--max-length", "1024"]), ("sft", ["--max-length", "1024", "--dtype", "bfloat16", "--gradient-checkpointing"]),
    )
]  # fmt: skip


@pytest.mark.parametrize(("stage", "words"), CASES, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_bench(stage, words, smollm2, tiny_llama, few_pairs):
    model = smollm2 if "qlora" in words else tiny_llama  # bitsandbytes takes no layer narrower than its block
    data = [] if "--data" in words else ["--data", few_pairs]
    command = [sys.executable, str(ROOT / "bench" / f"{stage}.py"), "--model", model, *data, "--examples", "2"]
    command += ["--steps", "1", "--rounds", "1", "--no-result", "--device", "cpu", "--max-length", "256", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    head, rows = rows[0], rows[2:]
    assert len(rows) >= 2 and rows[0][0] == "trl"
    differences = [float(row[head.index("max loss difference")]) for row in rows]
    assert max(differences) <= (2e-2 if "bfloat16" in words or "qlora" in words else 1e-5)
    assert all(re.fullmatch(r"[\d.]+x", row[head.index("ratio")]) for row in rows)
