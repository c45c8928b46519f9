"""docs/gpu.md lists what only a GPU executes, each with the test that covers it or the reason why none can."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
ROWS = [line.split("|")[1:-1] for line in TEXT.splitlines() if line.startswith("| `")]


def calls(source: str) -> set[str]:
    """`torch.cuda.NAME`, names imported from bitsandbytes, and NCCL where it is chosen."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
            found.add(ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bitsandbytes":
            found |= {f"bitsandbytes {alias.name}" for alias in node.names}
        if isinstance(node, ast.Constant) and node.value == "nccl":
            found.add("nccl")
    return found


def test_what_counts_as_a_call():
    assert calls("import torch\ntorch.cuda.synchronize(0)\nx = torch.cuda.get_device_properties(0).total_memory") == {
        "torch.cuda.synchronize", "torch.cuda.get_device_properties",
    }  # fmt: skip
    assert calls("def f():\n    from bitsandbytes.nn import Linear4bit\n    return 'nccl'") == {
        "bitsandbytes Linear4bit",
        "nccl",
    }


def test_every_call_is_listed():
    there = {
        (call, str(path.relative_to(ROOT)))
        for path in (ROOT / "rlhf").rglob("*.py")
        for call in calls(path.read_text(encoding="utf-8"))
    }
    rows = [(re.findall("`([^`]+)`", row[0]), re.findall("`([^`]+)`", row[1])) for row in ROWS]
    listed = {(call, file) for calls_, files in rows for call in calls_ for file in files}
    assert there == listed


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip()[:60])
def test_its_test_exists_or_there_is_a_reason(row):
    tests = re.findall(r"`(tests/[^`]+\.py)`(?:: `(\w+)`)?", row[2])
    for file, name in tests:
        assert (ROOT / file).is_file(), file
        assert not name or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {name}"
    assert tests or row[2].strip().startswith("none: "), row
