"""launch/pipeline.sh on the quickstart's own recipes, with a tiny model in place of the real one."""

import subprocess
from pathlib import Path

import yaml
from forked import environment

ROOT = Path(__file__).parent.parent
TINY = {"max_length": 256, "max_steps": 2, "max_train_examples": 8, "global_batch_size": 2, "save_steps": 1}


def write_recipes(folder, model):
    folder.mkdir()
    for stage in ("sft", "reward", "dpo", "evaluate"):
        values = yaml.safe_load((ROOT / "configs" / "quickstart" / f"{stage}.yaml").read_text())
        for key in ("model_name_or_path", "base_model"):
            if str(values.get(key)).startswith("embedded:"):
                values[key] = model
        values |= {"max_eval_examples": 4, "max_new_tokens": 4} if stage == "evaluate" else TINY
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(values))
    return folder


def pipeline(recipes, *words, code=0):
    """What it has printed, in the folder that holds `recipes`."""
    command = [str(ROOT / "launch" / "pipeline.sh"), str(recipes), *words]
    done = subprocess.run(command, cwd=recipes.parent, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr
