"""The same recipe on other numbers of processes and under other launch files: every step's loss, gradient norm and metrics,
and the final weights, against one process.

    python bench/scale_proof.py                                     tiny random model, the embedded sample, 1, 2 and 4 processes
    python bench/scale_proof.py --model FOLDER --data pairs.jsonl --global-batch-size 6 --processes 2 --launch zero3 fsdp2

Prints a table and exits with 1 if a loss is off by more than 5e-6 or a gradient norm by more than 1e-5 of itself (5e-5 and
2e-2 for QLoRA, whose adapter is in bf16).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
LAUNCH = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
HYBRID = "fsdp2_hsdp"  # two copies of the model, each sharded over half of 4 or more processes: --launch fsdp2_hsdp --processes 4
STAGES = ("sft", "reward", "dpo", "dpo-qlora", "dpo-full", "dpo-nf4")  # nf4: full, against a 4-bit reference
LOSS, GRADIENT = 5e-6, 1e-5  # largest allowed difference: absolute, and relative
LOSS_BF16, GRADIENT_BF16 = (
    5e-5,
    2e-2,
)  # of dpo-qlora, whose adapter TRL keeps in bf16: a rounding more or less of each weight
BUDGETS = {1: 100_000, 2: 600, 4: 900}  # other token budgets, so that the split differs besides


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; default: a tiny Llama with random weights")
    parser.add_argument("--data", default="embedded:sample", help="preference pairs")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--launch", nargs="+", choices=(*LAUNCH, HYBRID), default=list(LAUNCH))
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--global-batch-size", type=int, default=5)
    parser.add_argument("--examples", type=int, default=13, help="rows, so that an epoch ends in a smaller batch")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    print(
        f"{'stage':<9} {'launch':<13} {'processes':>9}  {'loss':>8}  {'gradient norm':>13}  {'metrics':>8}  {'weights':>8}"
    )
    worst = {"fp32": [0.0, 0.0], "bf16": [0.0, 0.0]}
    from rlhf.console import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or make_tiny_model(Path(folder) / "model")
        for stage in args.stages:
            one = train(args, Path(folder), model, stage, "ddp", 1)
            for launch in args.launch:
                for processes in args.processes:
                    found = compare(one, train(args, Path(folder), model, stage, launch, processes))
                    kind = "bf16" if stage == "dpo-qlora" else "fp32"
                    worst[kind] = [max(worst[kind][0], found["loss"]), max(worst[kind][1], found["gradient"])]
                    print(
                        f"{stage:<9} {launch:<13} {processes:>9}  {found['loss']:8.1e}  {found['gradient']:13.1e}  "
                        f"{found['metrics']:8.1e}  {found['weights']:8.1e}",
                        flush=True,
                    )
    right = True
    print()
    for kind, limits in (("fp32", (LOSS, GRADIENT)), ("bf16", (LOSS_BF16, GRADIENT_BF16))):
        (loss, gradient), equal = worst[kind], worst[kind][0] <= limits[0] and worst[kind][1] <= limits[1]
        right &= equal
        if any((stage == "dpo-qlora") == (kind == "bf16") for stage in args.stages):
            print(
                f"largest differences from one process, {kind}: loss {loss:.1e} (allowed {limits[0]:.0e}), gradient norm "
                f"{gradient:.1e} of itself (allowed {limits[1]:.0e}): {'equal' if equal else 'NOT EQUAL'}"
            )
    return 0 if right else 1


def make_tiny_model(folder: Path) -> str:
    """A Llama of 2 layers with random weights and the embedded model's tokenizer; as wide as bitsandbytes' blocks need."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from rlhf.models.embedded import NAME, resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve(NAME))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train(args, folder: Path, model: str, stage: str, launch: str, processes: int) -> tuple[list[dict], dict]:
    """(logged steps, final weights) of a run through the command line."""
    from safetensors.torch import load_file

    from rlhf.runs.metrics import read_metrics

    out = folder / f"{stage}-{launch}-{processes}"
    recipe = {
        "stage": stage.split("-")[0], "model_name_or_path": model, "dataset_name": args.data, "output_dir": str(out), "max_length": 256,
        "max_train_examples": args.examples, "global_batch_size": args.global_batch_size,
        "max_tokens_per_device": BUDGETS.get(processes, 1000), "max_steps": args.steps, "learning_rate": 1e-4,
        "gradient_checkpointing": stage.startswith("dpo"), "logging_steps": 1, "save_strategy": "no", "seed": 1,
    }  # fmt: skip
    if stage == "dpo-nf4":
        recipe |= {"reference": "nf4", "max_reference_bias_nats": 1000}
    elif stage != "dpo-full":
        recipe |= {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
    if stage == "dpo-qlora":
        recipe |= {"load_in_4bit": True}
    if stage.startswith("dpo") and stage != "dpo-nf4":
        recipe["reference_cache"] = str(folder / f"reference-{launch}-{processes}")
    file = folder / f"{out.name}.yaml"
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in recipe.items()))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "launch" / f"{launch}.yaml"),
    ]
    command += ["--num_processes", str(processes)]
    if launch == HYBRID:
        command += ["--parallelism_config_dp_replicate_size", "2"]
        command += ["--parallelism_config_dp_shard_size", str(processes // 2)]
    command += ["-m", "rlhf", recipe["stage"], str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode or not (out / "complete.json").is_file():
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    weights = "adapter_model" if stage == "dpo-qlora" else "model"
    return [row for row in read_metrics(out) if "loss" in row], load_file(out / f"{weights}.safetensors")


def compare(one: tuple[list[dict], dict], other: tuple[list[dict], dict]) -> dict[str, float]:
    """Largest differences: loss and weights absolute, gradient norm relative, metrics relative to the larger of them and 1."""
    own = {
        "time",
        "imbalance",
        "micro_batches",
        "padding",
        "tokens_per_second",
        "examples_per_second",
        "loss",
        "grad_norm",
    }
    found = {"loss": 0.0, "gradient": 0.0, "metrics": 0.0}
    assert [row["step"] for row in one[0]] == [row["step"] for row in other[0]]
    for a, b in zip(one[0], other[0], strict=True):
        found["loss"] = max(found["loss"], abs(a["loss"] - b["loss"]))
        found["gradient"] = max(found["gradient"], abs(a["grad_norm"] - b["grad_norm"]) / a["grad_norm"])
        for name in a.keys() - own:
            if name == "rewards/accuracies" and a["step"] == 1:
                continue  # the policy is its reference: margins of 0, to rounding
            found["metrics"] = max(found["metrics"], abs(a[name] - b[name]) / max(1.0, abs(a[name])))
    found["weights"] = max(float((one[1][name] - other[1][name]).abs().max()) for name in one[1])
    return found


if __name__ == "__main__":
    sys.exit(main())
