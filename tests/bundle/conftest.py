import contextlib
import os
import re
import shutil
from pathlib import Path

import pytest

from rlhf.__main__ import main

KEYS = """\
max_length: 256
max_steps: 3
per_device_train_batch_size: 2
learning_rate: 1.0e-3
logging_steps: 1
save_strategy: "no"
gradient_checkpointing: false
seed: 1
"""


@pytest.fixture
def job(tmp_path, tiny_llama, few_pairs, monkeypatch):
    """A folder to stand in, with configs/mine: SFT and then DPO of what it makes, every path absolute and outside."""
    away = tmp_path / "away"
    away.mkdir()
    shutil.copytree(tiny_llama, away / "tiny llama")
    shutil.copy(few_pairs, away / "pairs.jsonl")
    recipes = tmp_path / "here" / "configs" / "mine"
    recipes.mkdir(parents=True)
    for stage, model in (("sft", away / "tiny llama"), ("dpo", away / "out" / "sft")):
        lines = f"# the {stage} stage\nstage: {stage}\nmodel_name_or_path: {model}   # from outside\n"
        lines += f"output_dir: {away}/out/{stage}\n\ndataset_name: '{away}/pairs.jsonl'\n{KEYS}"
        lines += f"reference_cache: {away}/logps\n" if stage == "dpo" else ""
        (recipes / f"{stage}.yaml").write_text(lines)
    monkeypatch.chdir(tmp_path / "here")
    return Job(tmp_path, away, recipes)


class Job:
    def __init__(self, root: Path, away: Path, recipes: Path):
        self.root, self.away, self.recipes = root, away, recipes
        self.file, self.there = root / "mine.tar", root / "there"

    def bundle(self, *words) -> int:
        return main(["bundle", str(self.recipes), "--no-wheels", "-o", str(self.file), *words])

    def unbundle(self, *words) -> int:
        with contextlib.chdir(self.root):
            return main(["unbundle", str(self.file), str(self.there), *words])

    def edit(self, stage: str, old: str, new: str) -> None:
        path = self.recipes / f"{stage}.yaml"
        text = path.read_text()
        assert re.search(old, text, flags=re.MULTILINE)
        path.write_text(re.sub(old, new, text, flags=re.MULTILINE))

    def tree(self, folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {os.path.relpath(path, folder): path.read_bytes() for path in files}
