"""The curves of docs/tuning.md: five short DPO runs of SmolLM2-135M on real pairs, each with one thing wrong but the first.

python bench/tuning.py --hh harmless.jsonl.gz --out runs/tuning          trains what is not complete yet, then draws
python bench/tuning.py --hh harmless.jsonl.gz --out runs/tuning --draw   draws what is complete

--hh: Anthropic's HH-RLHF, harmless-base (MIT licence), as JSON lines with `chosen` and `rejected`; the 152 shortest
dialogues with different prompts are used. About 5 minutes per run on one idle core. The healthy run is on the embedded sample.
"""

import argparse
import gzip
import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path

from rlhf.evaluation.plots import COLOURS, MARK, points_of
from rlhf.runs.metrics import read_metrics
from rlhf.training.metric_history import History, Settings, Teller
from rlhf.training.symptoms import find

COMMON = {
    "stage": "dpo", "model_name_or_path": "embedded:smollm2-135m-instruct", "max_length": 256, "beta": 0.1, "use_peft": True,
    "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_modules": "all-linear", "num_train_epochs": 1,
    "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "global_batch_size": 4, "max_tokens_per_device": 2048,
    "gradient_checkpointing": False, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 8, "eval_on_start": True,
    "save_steps": 20, "save_total_limit": 1, "merge_adapter": False, "heldout": 56, "seed": 42, "use_cpu": True,
}  # fmt: skip
SAMPLE = {
    "dataset_name": "embedded:sample", "heldout": 0.2, "max_length": 512, "global_batch_size": 8, "eval_steps": 3,
    "max_train_examples": 120, "max_eval_examples": 40, "learning_rate": 2e-4,
}  # fmt: skip
RUNS = {
    "healthy": SAMPLE,
    "too-low": {"learning_rate": 1e-6},
    "too-high": {"learning_rate": 3e-3},
    "small-beta": {"learning_rate": 3e-4, "beta": 0.005},
    "overfit": {"learning_rate": 3e-4, "num_train_epochs": 8, "max_train_examples": 32},
}
PANELS = (  # a title, the unit, and what is drawn
    ("Loss", "nats per pair", {"loss": "training", "eval_loss": "held out"}),
    ("Accuracy", "share of pairs", {"rewards/accuracies": "training", "eval_rewards/accuracies": "held out"}),
    ("Log-ratio, held out", "nats per answer", {"eval_rewards/chosen": "chosen", "eval_rewards/rejected": "rejected"}),
)


def shortest(file: Path, number: int = 152) -> list[dict[str, str]]:
    """The shortest dialogues with different prompts and no empty turn, in a random order."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    found: dict[str, tuple[int, dict[str, str]]] = {}
    for row in rows:
        texts = [row["chosen"], row["rejected"]]
        turns = [
            turn for text in texts for turn in text.replace("\n\nHuman:", "\n\nAssistant:").split("\n\nAssistant:")[1:]
        ]
        prompt = _prompt(*texts)
        if all(turn.strip() for turn in turns) and all(text[len(prompt) :].strip() for text in texts):
            words = len(prompt.split()) + sum(len(text[len(prompt) :].split()) for text in texts)
            if prompt not in found or words < found[prompt][0]:
                found[prompt] = words, {"chosen": row["chosen"], "rejected": row["rejected"]}
    pairs = [row for _, row in sorted(found.values(), key=lambda item: item[0])[:number]]
    random.Random(0).shuffle(pairs)
    return pairs


def _prompt(chosen: str, rejected: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    mark = "\n\nAssistant:"
    return chosen[: chosen.rfind(mark, 0, same) + len(mark)]


def train(name: str, out: Path) -> None:
    values = COMMON | {"dataset_name": str(out / "hh.jsonl"), "reference_cache": str(out / "reference")} | RUNS[name]
    recipe = out / f"{name}.yaml"
    recipe.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
    subprocess.run([sys.executable, "-m", "rlhf", "dpo", str(recipe), "--output_dir", str(out / name)], check=True)


def told(rows: list[dict], beta: float, rate: float, heldout: int) -> list:
    """What a run with these logs says about itself, in the words of this version."""
    history, teller, found = History(), Teller(), []
    total = max(row["step"] for row in rows)
    settings = Settings("dpo", rate, beta=beta, total_steps=total, heldout=heldout)
    for row in rows:
        if history.add(row, settings):
            found += teller.news(find(history, settings))
    return found


def draw(rows: list[dict], beta: float, marks: list[int]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8, "svg.hashsalt": "rlhf"}
    with plt.rc_context(style):
        figure, all_axes = plt.subplots(1, 3, figsize=(8.4, 2.2), layout="constrained")
        for axes, (title, unit, metrics) in zip(all_axes, PANELS, strict=True):
            for (metric, label), colour in zip(metrics.items(), COLOURS, strict=False):
                points = points_of({"metrics": rows}, metric)
                scale = 1 / beta if "Log-ratio" in title else 1
                steps, values = [step for step, _ in points], [value * scale for _, value in points]
                circles = {"marker": "o", "markersize": 3} if metric.startswith("eval_") else {"alpha": 0.6}
                axes.plot(steps, values, color=colour, linewidth=1.2, label=label, **circles)
            for step in marks:
                axes.axvline(step, color=MARK, linewidth=0.8, linestyle=":")
            axes.locator_params(nbins=4)
            axes.set_title(title, fontsize=9, loc="left")
            axes.set_xlabel("step")
            axes.set_ylabel(unit)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=7)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    without_comments = re.sub(r"<!--.*?-->", "", text.getvalue())
    return re.sub(r"\n\s*", "\n", re.sub(r'"[^"]*"', _rounded, without_comments))


def _rounded(attribute: re.Match[str]) -> str:
    """An attribute with its coordinates to a tenth of a point: half the size of the file."""
    return re.sub(r"-?\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), attribute[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hh", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, default=Path(__file__).parent.parent / "docs" / "tuning")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.pictures.mkdir(parents=True, exist_ok=True)
    (options.out / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shortest(options.hh)))
    for name, values in RUNS.items():
        if not options.draw:
            train(name, options.out)
        if not (rows := read_metrics(options.out / name)):
            print(f"{name}: not run")
            continue
        beta = float(values.get("beta", COMMON["beta"]))
        found = told(rows, beta, values["learning_rate"], values.get("max_eval_examples", COMMON["heldout"]))
        picture = draw(rows, beta, sorted({finding.step for finding in found}))
        (options.pictures / f"{name}.svg").write_text(picture)
        print(f"\n{name}: {len(picture) / 1000:.0f} kB")
        for finding in found:
            print(f"  step {finding.step}: {finding.sentence}.\n    turn: {'; or '.join(finding.turn)}")


if __name__ == "__main__":
    main()
