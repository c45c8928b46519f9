"""What the parts of bench/gpu_proof.py share: where they run, the models they train, and all calls that only CUDA has.

Every call of torch.cuda in these scripts is in this file, behind a check of the device's type; tests/test_gpu_proof.py keeps it so.
Each does nothing, or returns None, on a CPU.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import compare

# Random weights; toys are what the tests run on a CPU. Heads as wide as flash attention's kernels like them.
SHAPES = compare.SHAPES | {
    "toy": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1024, "tie_word_embeddings": True},
    "small": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
              "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096, "tie_word_embeddings": True},
}  # fmt: skip


MODEL_BYTES = 40e9  # of the scratch folder: an 8B model in bf16, a 1B model, runs


@dataclass(frozen=True)
class Context:
    """Where a part runs.

    Attributes:
        device: `cuda` or `cpu`.
        toy: tiny shapes and few steps: what a CPU can do in seconds.
        scratch: a folder for models and runs, removed at the end; memory-backed where there is room.
        gpus: how many there are.
    """

    device: str
    toy: bool
    scratch: str
    gpus: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def folder(self, name: str) -> Path:
        """A new, empty folder for a part."""
        path = Path(self.scratch) / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


def roomy_folder() -> str | None:
    """Where models go: memory, if there is room for them (an 8B model is loaded a dozen times), else the usual place."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage("/dev/shm").free > MODEL_BYTES and os.access("/dev/shm", os.W_OK):
            return "/dev/shm"
    return None


def free_name(folder: Path) -> Path:
    """A name beside a folder that is not taken: FOLDER.old-1."""
    return next(p for i in range(1, 10_000) if not (p := folder.with_name(f"{folder.name}.old-{i}")).exists())


def model_folder(context: Context, shape: str) -> str:
    """A model of SHAPES with random weights in the scratch folder, made once; a toy takes the place of a larger one on CPUs."""
    shape = "toy" if context.toy else shape
    folder = Path(context.scratch) / "models" / shape
    if not folder.is_dir():
        partial = folder.with_name(f".{shape}-{os.getpid()}")
        compare.make_model(SHAPES[shape], partial, make_tokenizer(), context.device)
        free_memory(context.device)
        try:
            partial.rename(folder)
        except OSError:  # another part was quicker
            shutil.rmtree(partial)
    return str(folder)


def make_tokenizer() -> Any:
    """A byte-level BPE of 1,024 tokens trained on the embedded sample, with the ChatML template: nothing has to be fetched."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from rlhf.data.sources import SAMPLE_DIR
    from rlhf.models.tokenizer import read_template

    rows = [json.loads(line) for line in (SAMPLE_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [m["content"] for row in rows for side in ("prompt", "chosen", "rejected") for m in row[side]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[1], eos_token=special[2], pad_token=special[2], unk_token=special[0]
    )  # fmt: skip
    made.chat_template = read_template("chatml")
    return made


# --- torch.cuda: all of it -------------------------------------------------------------------------------------------


def describe(device: str) -> dict[str, Any]:
    """Versions and device, for the report; what decides whether a result of an earlier call is still this machine's."""
    import torch

    from rlhf.packing import kernel_name
    from rlhf.preflight.probes import driver_version
    from rlhf.runs.provenance import environment

    found = environment()
    about = {
        "versions": found["versions"], "commit": found["git_commit"], "cpus": found["hardware"]["cpus"],
        "memory_gib": found["hardware"].get("memory_gib"), "device": "CPU", "gpus": 0, "torch": torch.__version__,
        "kernel": kernel_name(torch.device(device)),
    }  # fmt: skip
    if device == "cuda":
        about |= {
            "device": torch.cuda.get_device_name(0), "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda,
            "capability": list(torch.cuda.get_device_capability(0)), "driver": driver_version(),
            "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        }  # fmt: skip
    return about


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(0) if device == "cuda" else "CPU"


def synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def free_memory(device: str) -> None:
    """Drop what nothing refers to, and count peak memory anew."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def is_out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)
