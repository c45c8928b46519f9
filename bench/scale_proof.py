"""The same recipe on other numbers of processes and under other launch files: every step's loss, gradient norm and metrics,
and the final weights, against one process.

    python bench/scale_proof.py                                     a tiny random model; the embedded sample on 1, 2 and 4
                                                                    processes, answers of 300 words on 1 and 3
    python bench/scale_proof.py --exact --stages dpo-full           against one process in float64: who is nearer?
    python bench/scale_proof.py --bf16                              in bf16, against bf16's own noise
    python bench/scale_proof.py --model FOLDER --data pairs.jsonl --global-batch-size 6 --processes 2 --launch zero3 fsdp2

Prints a table and exits with 1 if a loss or a gradient norm is off by more than it may be from the order of sums
(bench/scale_bounds.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scale_bounds import Bound, of_noise, of_step
from scale_data import make_tiny_model, nudge, write_long_answers

ROOT = Path(__file__).parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
LAUNCH = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
HYBRID = "fsdp2_hsdp"  # two copies of the model, each sharded over half of 4 or more processes: --launch fsdp2_hsdp --processes 4
STAGES = ("sft", "reward", "dpo", "dpo-qlora", "dpo-full", "dpo-nf4")  # nf4: full, against a 4-bit reference
IN_FLOAT64 = ("sft", "dpo", "dpo-full")  # bitsandbytes and a new reward head are fp32
BETA = 0.1  # DPO's default
OF_THE_SPLIT = {
    "time", "imbalance", "micro_batches", "padding", "tokens_per_second", "examples_per_second", "loss", "grad_norm",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Rows, and how many processes they are split over; an epoch ends in a smaller batch.

    Attributes:
        words: that an answer has at least; 0: the data as it is.
    """

    words: int
    max_length: int
    examples: int
    global_batch_size: int
    processes: tuple[int, ...]


SHAPES = {"short": Shape(0, 256, 13, 5, (2, 4)), "long": Shape(300, 1024, 17, 7, (3,))}
Run = tuple[list[dict[str, Any]], dict[str, Any]]  # logged steps, final weights


def main() -> int:
    args = parse_arguments()
    from rlhf.console import quiet_libraries

    quiet_libraries()
    print(f"{'shape':<6} {'stage':<9} {'launch':<13} {'processes':>9}  {'loss':>8} {'allowed':>8}  {'gradient norm':>13} {'allowed':>8}  "
          f"{'metrics':>8}  {'weights':>8}")  # fmt: skip
    worst = {"loss": 0.0, "gradient": 0.0}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = args.model or make_tiny_model(folder / "model")
        for name in args.shapes:
            shape = shape_of(args, name)
            data = args.data or (
                write_long_answers(folder / "long.jsonl", shape.examples, shape.words)
                if shape.words
                else "embedded:sample"
            )
            for stage in args.stages:
                proof = Proof(args, folder, model, data, shape, stage, name)
                for launch, processes in proof.launches():
                    found = proof.compare(launch, processes)
                    worst = {key: max(worst[key], found[f"{key}_share"]) for key in worst}
                    print(f"{name:<6} {stage:<9} {launch:<13} {processes:>9}  {found['loss']:8.1e} {found['loss_allowed']:8.1e}  "
                          f"{found['gradient']:13.1e} {found['gradient_allowed']:8.1e}  {found['metrics']:8.1e}  {found['weights']:8.1e}", flush=True)  # fmt: skip
    equal = max(worst.values()) <= 1
    against = "float64" if args.exact else "one process"
    print(f"\nlargest difference from {against}, as a share of what is allowed in its step: loss {worst['loss']:.2f}, gradient norm "
          f"{worst['gradient']:.2f}: {'equal' if equal else 'NOT EQUAL'}")  # fmt: skip
    return 0 if equal else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; default: a tiny Llama with random weights")
    parser.add_argument("--data", help="preference pairs in place of the sample; then there is one shape")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), help="default: both; with --data: short")
    parser.add_argument("--stages", nargs="+", choices=STAGES)
    parser.add_argument("--launch", nargs="+", choices=(*LAUNCH, HYBRID), default=list(LAUNCH))
    parser.add_argument("--processes", nargs="+", type=int, help="default: 2 and 4; for long answers 3")
    parser.add_argument("--answer-words", type=int, help="at least, in each answer of the long shape; default: 300")
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--global-batch-size", type=int)
    parser.add_argument("--examples", type=int, help="rows")
    parser.add_argument("--steps", type=int, default=5)
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--exact", action="store_true", help="compare with one process in float64, one in fp32 too")
    precision.add_argument("--bf16", action="store_true", help="train in bf16")
    args = parser.parse_args()
    args.shapes = args.shapes or (["short"] if args.data else list(SHAPES))
    args.stages = args.stages or list(IN_FLOAT64 if args.exact else ("sft", "dpo", "dpo-full") if args.bf16 else STAGES)
    if args.exact and (no := set(args.stages) - set(IN_FLOAT64)):
        parser.error(
            f"--exact: {' and '.join(sorted(no))} can't be computed in float64; these can: {', '.join(IN_FLOAT64)}"
        )
    return args


def shape_of(args: argparse.Namespace, name: str) -> Shape:
    given = {"words": args.answer_words if SHAPES[name].words else None, "max_length": args.max_length, "examples": args.examples,
             "global_batch_size": args.global_batch_size, "processes": args.processes and tuple(args.processes)}  # fmt: skip
    return replace(SHAPES[name], **{key: value for key, value in given.items() if value})


@dataclass
class Proof:
    """The runs of one stage on one shape."""

    args: argparse.Namespace
    folder: Path
    model: str
    data: str
    shape: Shape
    stage: str
    name: str

    def __post_init__(self) -> None:
        self.one = self.train("ddp", 1, exact=self.args.exact)
        if self.args.exact:  # bench/scale_float64.py computes no other statistics of the LM head than log-probabilities
            not_made = {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
            self.one = [{name: row[name] for name in row.keys() - not_made} for row in self.one[0]], self.one[1]
        if self.args.bf16:
            fp32 = self.train("ddp", 1, bf16=False)
            nudged = self.train("ddp", 1, model=nudge(self.model, self.folder / "nudged"))
            self.noise = of_noise([steps(run) for run in (self.one, fp32, nudged)])

    def launches(self) -> list[tuple[str, int]]:
        alone = [("ddp", 1)] if self.args.exact else []
        return alone + [(launch, number) for launch in self.args.launch for number in self.shape.processes]

    def train(
        self, launch: str, processes: int, exact: bool = False, bf16: bool | None = None, model: str | None = None
    ) -> Run:
        bf16 = self.args.bf16 if bf16 is None else bf16
        kind = "float64" if exact else "bf16" if bf16 else "fp32"
        out = self.folder / "-".join([self.name, self.stage, launch, str(processes), kind, "nudged" if model else ""])
        recipe = self.recipe(out, processes, model or self.model) | ({"bf16": True} if bf16 else {})
        return train(recipe, out, launch, processes, "adapter_model" if self.stage == "dpo-qlora" else "model", exact)

    def recipe(self, out: Path, processes: int, model: str) -> dict[str, Any]:
        shape, stage = self.shape, self.stage
        recipe = {
            "stage": stage.split("-")[0], "model_name_or_path": model, "dataset_name": self.data, "output_dir": str(out),
            "max_length": shape.max_length, "max_train_examples": shape.examples,
            "global_batch_size": shape.global_batch_size, "max_tokens_per_device": budget(processes, shape.max_length),
            "max_steps": self.args.steps, "learning_rate": 1e-4, "gradient_checkpointing": stage.startswith("dpo"),
            "logging_steps": 1, "save_strategy": "no", "seed": 1,
        }  # fmt: skip
        if stage == "dpo-nf4":
            recipe |= {"reference": "nf4", "max_reference_bias_nats": 1000}
        elif stage.startswith("dpo"):
            recipe |= {"reference_cache": f"{out}-reference", "beta": BETA}
        if stage not in ("dpo-full", "dpo-nf4"):
            recipe |= {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
        return recipe | ({"load_in_4bit": True} if stage == "dpo-qlora" else {})

    def compare(self, launch: str, processes: int) -> dict[str, float]:
        other = self.train(launch, processes)
        return differences(self.one, other, self.bounds())

    def bounds(self) -> list[Bound]:
        """Of each step."""
        from transformers import AutoConfig

        rows = steps(self.one)
        if self.args.bf16:
            return [self.noise] * len(rows)
        vocabulary, found, before = AutoConfig.from_pretrained(self.model).vocab_size, [], 0
        for row in rows:
            size, number = self.shape.global_batch_size, self.shape.examples
            place = (row["step"] - 1) % -(-number // size)
            tokens, before = row["num_tokens"] - before, row["num_tokens"]
            found.append(of_step(self.stage, row, min(size, number - place * size), tokens, BETA, vocabulary))
        return found


def budget(processes: int, max_length: int) -> int:
    """Tokens per micro-batch: one process takes a step in one, the others in several, each in its own way."""
    return 100_000 if processes == 1 else int(max_length * (1.4 + processes / 2))


def train(
    recipe: dict[str, Any], out: Path, launch: str, processes: int, weights: str = "model", exact: bool = False
) -> Run:
    """A run through the command line."""
    from safetensors.torch import load_file

    file = Path(f"{out}.yaml")
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in recipe.items()))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / f"{launch}.yaml")]  # fmt: skip
    command += ["--num_processes", str(processes)]
    if launch == HYBRID:
        command += ["--parallelism_config_dp_replicate_size", "2"]
        command += ["--parallelism_config_dp_shard_size", str(processes // 2)]
    command += [str(ROOT / "bench" / "scale_float64.py")] if exact else ["-m", "rlhf"]
    command += [recipe["stage"], str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode or not (out / "complete.json").is_file():
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    if short := next((line for line in done.stdout.splitlines() if "were left out" in line), ""):
        raise SystemExit(f"{short.strip()}: raise --max-length, so that all rows are trained")
    from rlhf.runs.metrics import read_metrics

    return read_metrics(out), load_file(out / f"{weights}.safetensors")


def steps(run: Run) -> list[dict[str, Any]]:
    return [row for row in run[0] if "loss" in row]


def differences(one: Run, other: Run, bounds: list[Bound]) -> dict[str, float]:
    """The largest: loss and weights absolute, gradient norm relative, metrics relative to the larger of them and 1.

    `_share` is the largest share of what is allowed, and `_allowed` what is allowed in that step.
    """
    found = {"loss": 0.0, "gradient": 0.0, "metrics": 0.0, "loss_share": -1.0, "gradient_share": -1.0}
    assert [row["step"] for row in steps(one)] == [row["step"] for row in steps(other)]
    for a, b, bound in zip(steps(one), steps(other), bounds, strict=True):
        off = {"loss": abs(a["loss"] - b["loss"]), "gradient": abs(a["grad_norm"] - b["grad_norm"]) / a["grad_norm"]}
        for key, allowed in (("loss", bound.loss), ("gradient", bound.gradient)):
            found[key] = max(found[key], off[key])
            if off[key] / allowed > found[f"{key}_share"]:
                found |= {f"{key}_share": off[key] / allowed, f"{key}_allowed": allowed}
        for name in a.keys() & b.keys() - OF_THE_SPLIT:
            if name == "rewards/accuracies" and a["step"] == 1:
                continue  # the policy is its reference: margins of 0, to rounding
            found["metrics"] = max(found["metrics"], abs(a[name] - b[name]) / max(1.0, abs(a[name])))
    found["weights"] = max(float((one[1][name] - other[1][name]).abs().max()) for name in one[1])
    return found


if __name__ == "__main__":
    sys.exit(main())
