"""How the cost of a training step grows with the number of processes, in three parts.

    bytes      measured: what each process sends in an optimizer step under every launch file, against the ZeRO paper
    imbalance  simulated: tokens of the fullest of 8 to 1,024 processes over the mean, with real lengths
    paper      computed: memory, FLOPs, bytes and bounds of the efficiency of 1B, 8B and 70B models on 8 to 1,024 GPUs

    python bench/scale.py                                             all of it (6 to 10 minutes on 2 cores)
    python bench/scale.py --parts imbalance paper --data pairs.jsonl  with the lengths of other preference pairs

Prints tables; --write puts what is printed into bench/results/scale.md.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import compare
import numpy as np

ROOT = Path(__file__).parent.parent
LAUNCH = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
TRAININGS = {
    "full": {},
    "lora": {"use_peft": True, "lora_r": 8, "lora_dropout": 0.0, "lora_target_modules": "all-linear"},
    "full+gc": {"gradient_checkpointing": True},
}
MICRO_BATCHES = (1, 1, 2, 2)  # of steps 1 to 4; the second of each two is measured
MAX_LENGTH = 1024  # tokens; longer answers are left out, as DPO does
SHAPES = compare.SHAPES | {
    "llama-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                  "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
# On paper
LORA_RANK, SEQUENCE = 16, 1024
TOKENS, FIXED_PAIRS = 16384, 512  # a GPU and step, where the work grows with the GPUs; pairs a step, where it does not
PEAK_FLOPS, MFU = 989e12, 0.40  # NVIDIA H100 SXM and H200 data sheets: bf16, dense; the share of it is an assumption
NVLINK, NDR = 450e9, 50e9  # bytes/s and GPU, one direction: NVLink 4 (900 GB/s both); InfiniBand NDR, 400 Gb/s
GPUS_A_NODE, GPU_BYTES = 8, 80e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--data", default="embedded:sample", help="preference pairs, for their lengths")
    parser.add_argument("--data-title", help="what the data are called in the results; default: their name")
    parser.add_argument("--launch", nargs="+", choices=LAUNCH, default=list(LAUNCH))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--write", action="store_true", help="write what is shown to bench/results/scale.md")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    texts = []
    for part in args.parts:
        texts.append(PARTS[part](args))
        print(texts[-1], flush=True)
    if args.write:
        (compare.RESULTS / "scale.md").write_text(header() + "\n".join(texts), encoding="utf-8")


# --- formulas of what is sent ----------------------------------------------------------------------------------------


def ring_bytes(collective: str, size: float, processes: int) -> float:
    """Bytes that each process sends in a ring (Patarasuk & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002).

    Args:
        collective: `all-reduce`; `all-gather` or `reduce-scatter`, half of it; `broadcast` or `reduce`, by convention
            one pass of the whole tensor.
        size: bytes of the whole tensor: what goes into a reduce-scatter, what comes out of an all-gather.
    """
    if processes == 1:
        return 0.0
    if collective in ("broadcast", "reduce"):
        return size
    return {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}[collective] * (processes - 1) / processes * size


def zero_bytes(launch: str, trained: float, weights: float, processes: int, micro_batches: int = 1) -> float:
    """Bytes that each process sends in an optimizer step by the ZeRO paper (arXiv:1910.02054, section 7).

    DDP all-reduces gradients. ZeRO-1 and 2 reduce-scatter them and all-gather what was updated (7.2.1); ZeRO-2 keeps no
    whole gradient, so it reduces in each micro-batch. ZeRO-3 and FSDP all-gather all weights forward and again backward
    and reduce-scatter gradients, all of it in each micro-batch (7.2.2).

    Args:
        trained: bytes of the weights that are trained, which their gradients have too.
        weights: bytes of all weights, frozen ones included.
    """
    reduce, gather = (ring_bytes("reduce-scatter", size, processes) for size in (trained, weights))
    if launch in ("ddp", "zero1"):
        return reduce + reduce  # the second is the all-gather of as many bytes
    if launch == "zero2":
        return micro_batches * reduce + reduce
    return micro_batches * (2 * gather + reduce)


def built_bytes(launch: str, parameters: list, processes: int, micro_batches: int = 1) -> float:
    """Bytes that each process sends with DeepSpeed 0.19, accelerate 1.15 and torch 2.13 as they are; NOTES says why.

    Args:
        parameters: of a Llama, (name, bytes, elements, trained) each.
    """
    size = lambda *words: sum(p[1] for p in parameters if any(word in p[0] for word in words))  # noqa: E731
    weights, head = size(""), size("lm_head")
    trained = sum(p[1] for p in parameters if p[3])
    reduce = ring_bytes("reduce-scatter", trained, processes)
    if launch in ("zero1", "zero2"):  # all-reduce, then all-gather
        return (micro_batches if launch == "zero2" else 1) * 2 * reduce + reduce
    if launch == "fsdp2":
        gathered = micro_batches * (2 * weights - head - size("model.norm."))
        full = all(p[3] for p in parameters)
        return ring_bytes("all-gather", gathered, processes) + (micro_batches if full else 1) * reduce
    return zero_bytes(launch, trained, weights, processes, micro_batches)


NOTES = """\
Where the ratio to the paper is not 1, this is done instead (read in the libraries' source, and counted in "as built"):

- ZeRO-1 and 2: DeepSpeed all-reduces gradients (use_multi_rank_bucket_allreduce, on by default) where the paper
  reduce-scatters them: 3 passes instead of 2. ZeRO-1 does it once a step, ZeRO-2 in each micro-batch.
- ZeRO-3 is compared with the paper alone: what DeepSpeed gathers when is decided by a prefetcher that learns from the step
  before. With LoRA it sends less: the embedding and the first layer's q, k and v pass no gradient on, and are not gathered
  backward. With gradient checkpointing (full+gc) and one micro-batch it sends more: a layer's matrices are gathered a third
  time, to compute it again. FSDP2 gathers a layer once for both.
- FSDP2: accelerate keeps the last norm and the head from forward to backward. LoRA's gradients
  stay unsharded until the last micro-batch (no_sync) and are reduce-scattered once; with full fine-tuning that would be
  4 bytes per parameter on every rank, so they are reduce-scattered in each micro-batch, as in the paper.

Other: gradient norms, metrics, DDP's buffers and its map of used parameters (find_unused_parameters)."""


# --- bytes: measured -------------------------------------------------------------------------------------------------


def bytes_part(args) -> str:
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model")
        for launch in args.launch:
            for processes in args.processes:
                trainings = ["full"] if processes == 1 else ["full", "lora"]
                if processes == 2 and launch in ("zero3", "fsdp2"):
                    trainings.append("full+gc")
                runs += measure(launch, processes, trainings, model, Path(folder))
                print(f"  {launch}, {processes} processes: measured", file=sys.stderr, flush=True)
    alone = [f"{sent(run['model'], 1):.0f}" for run in runs if run["processes"] == 1 and run["micro_batches"] == 1]
    order = lambda run: (run["training"], run["micro_batches"], run["processes"])  # noqa: E731
    table = [traffic_row(run) for run in sorted(runs, key=order) if run["processes"] > 1]
    titles = "training,launch,processes,micro-batches,MB sent,ZeRO paper,ratio,as built,ratio,other kB".split(",")
    megabytes, rank = sum(p[1] for p in runs[0]["parameters"]) / 1e6, TRAININGS["lora"]["lora_r"]
    return f"""## Bytes sent in an optimizer step (measured)

The collective operations of real processes (gloo, fp32) in a step of DPO, as torch's dispatcher sees them on the main
process; their sizes are turned into what a process sends in a ring: (N-1)/N of the whole tensor for an all-gather or a
reduce-scatter, twice that for an all-reduce. A Llama of 4 layers and {megabytes:.1f} MB; LoRA of rank {rank} on all
linear layers; full+gc: with gradient checkpointing. Steps after the first, the same micro-batch once or twice.
Bytes that one process alone sends: {", ".join(alone) or "not measured"}.

{aligned([titles, *table])}

{NOTES}
"""


def traffic_row(run: dict) -> tuple:
    """A line of the table; MB are 10^6 bytes."""
    parameters, processes, micro = run["parameters"], run["processes"], run["micro_batches"]
    trained, weights = sum(p[1] for p in parameters if p[3]), sum(p[1] for p in parameters)
    found = sent(run["model"], processes)
    paper = zero_bytes(run["launch"], trained, weights, processes, micro)
    built = built_bytes(run["launch"], parameters, processes, micro)
    return (
        run["training"], run["launch"], processes, micro, f"{found / 1e6:.3f}", f"{paper / 1e6:.3f}",
        f"{found / paper:.3f}", f"{built / 1e6:.3f}", f"{found / built:.3f}",
        f"{sent(run['other'], processes) / 1e3:.2f}",
    )  # fmt: skip


def sent(sizes: dict[str, float], processes: int) -> float:
    """Bytes that each process sends, from {collective: bytes of its whole tensors}."""
    return sum(ring_bytes(collective, size, processes) for collective, size in sizes.items())


def make_model(folder: Path, **shape: int) -> str:
    """A Llama of 4 layers with random weights; its matrices are above ZeRO-3's threshold of 100,000 elements.

    Args:
        shape: values of LlamaConfig instead of those here.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from rlhf.data.sources import SAMPLE_DIR
    from rlhf.models.tokenizer import read_template

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((SAMPLE_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines(), trainer)
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    tokenizer.chat_template = read_template("chatml")
    torch.manual_seed(0)
    config = LlamaConfig(**{
        "vocab_size": len(tokenizer), "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, **shape,
    })  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def measure(launch: str, processes: int, trainings: list[str], model: str, folder: Path) -> list[dict]:
    """Start `processes` processes, which train each way in turn; what `worker` has found, with what it is of."""
    folder, recipes = folder / f"{launch}-{processes}", []
    folder.mkdir()
    for training in trainings:
        name = folder / training
        recipe = {
            "stage": "dpo", "model_name_or_path": model, "dataset_name": "embedded:sample", "output_dir": str(name),
            "reference_cache": f"{name}-reference", "max_length": 256, "max_train_examples": 16, "global_batch_size": 4,
            "max_tokens_per_device": 4096, "max_steps": len(MICRO_BATCHES), "logging_steps": 1, "save_strategy": "no",
            "gradient_checkpointing": False, "use_cpu": True, "seed": 1,
        } | TRAININGS[training]  # fmt: skip
        recipes.append(f"{name}.yaml")
        Path(recipes[-1]).write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in recipe.items()))
    out = folder / "worker.json"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/launch/{launch}.yaml"]
    command += ["--num_processes", str(processes), str(Path(__file__).resolve()), "--worker", str(out), *recipes]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode or not out.is_file():
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return [run | {"launch": launch, "processes": processes} for run in json.loads(out.read_text())]


def worker(out: str, *recipes: str) -> None:
    """In each process that accelerate starts: train the recipes through the command line and note what is sent.

    The main process writes a list of {"training": the recipe's name, "micro_batches": how many, "model" and "other":
    {collective: bytes of its whole tensors}, "parameters": (name, bytes, elements, trained) of each}.
    """
    import accelerate

    import rlhf.training.run
    from rlhf.__main__ import main as command_line
    from rlhf.runs.stop import leave
    from rlhf.training.trainer import GlobalBatches

    runs, watch = [], watch_collectives()
    training_step, train = GlobalBatches.training_step, rlhf.training.run.train_or_restore
    end_training = accelerate.Accelerator.end_training

    def repeat_micro_batch(self, model, inputs, *rest):
        (part,) = inputs["micro_batches"]
        parts = [part] * MICRO_BATCHES[self.state.global_step]
        return training_step(self, model, inputs | {"micro_batches": parts}, *rest)

    def train_with_notes(trainer, run):
        trainer.add_callback(note_taker(watch, runs))
        train(trainer, run)

    GlobalBatches.training_step, rlhf.training.run.train_or_restore = repeat_micro_batch, train_with_notes
    for recipe in recipes:  # the processes stay connected until the last
        accelerate.Accelerator.end_training = end_training if recipe == recipes[-1] else lambda self: None
        assert command_line(["dpo", recipe]) == 0
    if int(os.environ.get("RANK", 0)) == 0:
        Path(out).write_text(json.dumps(runs))
    leave(0)


def note_taker(watch, runs: list[dict]):
    """A callback of the trainer that adds to `runs` what `watch` sees in each second step."""
    from transformers import TrainerCallback

    class Notes(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            watch.clear()
            watch.__enter__()

        def on_step_end(self, args, state, control, model=None, **kwargs):
            watch.__exit__(None, None, None)
            if state.global_step % 2 == 0:
                micro_batches, training = MICRO_BATCHES[state.global_step - 1], Path(args.output_dir).name
                about = {"training": training, "micro_batches": micro_batches}
                runs.append(about | {"model": watch.model, "other": watch.other, "parameters": sizes(model)})

    return Notes()


def sizes(model) -> list[tuple[str, int, int, bool]]:
    """(name, bytes, elements, trained) of each parameter, whole where it is split over processes."""
    from rlhf.distributed.sharding import num_elements

    counted = [(name, p, num_elements(p)) for name, p in model.named_parameters()]
    return [(name, number * p.element_size(), number, p.requires_grad) for name, p, number in counted]


def watch_collectives():
    """A dispatch mode that adds up bytes of whole tensors by collective: in `model` those of weights and gradients, in
    `other` what has fewer than 128 elements or is not fp32 (norms of gradients, flags, metrics).

    It sees the calls of torch.distributed, of DDP's reducer in C++, of FSDP2 and DTensor, and of DeepSpeed.
    """
    import torch
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    names = ("all-reduce", "all-gather", "reduce-scatter", "broadcast", "reduce")
    silent = ("waittensor", "wraptensorautograd", "barrier", "monitoredbarrier")

    class Watch(TorchDispatchMode):
        def clear(self) -> None:
            self.model, self.other = {}, {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if any(issubclass(t, DTensor) for t in types):
                return NotImplemented  # comes again as what DTensor makes of it
            result = function(*args, **(kwargs or {}))
            space, name = str(function).split(".")[:2]
            name = name.replace("_", "")
            if "c10d" not in space or name in silent:
                return result
            kind = next((kind for kind in names if name.startswith(kind.replace("-", ""))), None)
            if kind is None:
                raise NotImplementedError(f"{function} is not counted yet")
            sides = [[x for x in tree_leaves(side) if isinstance(x, torch.Tensor)] for side in (*args[:2], result)]
            whole = max(sides, key=lambda side: sum(x.nbytes for x in side))  # the other is a part of it
            model = whole[0].dtype == torch.float32 and sum(x.numel() for x in whole) >= 128
            found = self.model if model else self.other
            found[kind] = found.get(kind, 0) + sum(x.nbytes for x in whole)
            return result

    return Watch()


# --- imbalance: simulated --------------------------------------------------------------------------------------------


def imbalance_part(args) -> str:
    pairs, lines = read_lengths(args.data), []
    mean = np.mean([p[0] for p in pairs])
    for each in (4, 16):
        for processes in (8, 16, 32, 64, 128, 256, 512, 1024):
            found = simulate(pairs, processes, each)
            values = (f"{found[x]:.3f}" for x in ("balanced", "bound", "in_order", "padded"))
            lines.append((each, processes, *values, "yes" if processes * each > len(pairs) else "no"))
    titles = ("pairs each", "processes", "balanced", "at best", "in order, packed", "in order, padded", "replaced")
    return f"""## Tokens of the fullest process over the mean (simulated, lengths are real)

{args.data_title or Path(args.data).name}: {len(pairs):,} pairs can be used and have at most {MAX_LENGTH:,} tokens
a prompt with its answer (SmolLM2's tokenizer); {mean:.0f} on average, the prompt counted once. What the slowest process
computes over what each would if a step's packed tokens were shared out evenly; mean of 50 steps, each drawn again (with
replacement where the pairs are too few: "replaced"). Tokens, not time: attention grows faster than a pair's length.

- balanced: rlhf.training.batching.split_batch, one micro-batch; it takes {found["split_s"] * 1e3:.0f} ms for the last line
- at best: what no split is below, because a pair stays whole: the longest pair over the mean, or 1
- in order: the same number of pairs for each process; packed in the same way, or padded to the process's longest
  answer, with the prompt twice, as TRL does

{aligned([titles, *lines])}
"""


@functools.cache
def read_lengths(data: str) -> list[tuple[int, int]]:
    """(tokens packed, tokens of both rows padded to the longer) of each pair, tokenised as DPO does."""
    from transformers import AutoTokenizer

    from rlhf.data.prepare import prepare
    from rlhf.data.sources import Source, load_source
    from rlhf.models.embedded import NAME, resolve
    from rlhf.models.tokenizer import tokenize_pair
    from rlhf.training.tokenise import count_tokens

    tokenizer, lengths = AutoTokenizer.from_pretrained(resolve(NAME)), []
    rows = map(json.loads, gzip.open(data, "rt", encoding="utf-8")) if data.endswith(".gz") else load_source(data).rows
    for row in rows:
        try:
            (pair,) = prepare(Source(data, [row], None, ""), "pairs").rows
        except ValueError:  # no answer in it: left out
            continue
        pair = tokenize_pair(tokenizer, pair)
        packed, padded = count_tokens(pair, None, False), count_tokens(pair, None, True)
        if padded <= 2 * MAX_LENGTH:
            lengths.append((packed, padded))
    return lengths


def simulate(pairs: list[tuple[int, int]], processes: int, each: int, steps: int = 50) -> dict[str, float]:
    """What the fullest process has over the ideal, mean of `steps` global batches of `processes` x `each` pairs.

    Args:
        pairs: (tokens packed, tokens padded), as `read_lengths` gives them.

    Returns:
        {"balanced", "in_order", "padded"}: tokens of the fullest process over the mean of the packed tokens, ideally 1;
        {"bound"}: what no split is below; {"split_s"}: seconds of the last split_batch.
    """
    from rlhf.training.batching import split_batch

    draw, lengths = np.random.default_rng(0), np.array(pairs)
    found = {"balanced": [], "bound": [], "in_order": [], "padded": []}
    for _ in range(steps):
        batch = lengths[draw.choice(len(lengths), processes * each, replace=processes * each > len(lengths))]
        started = time.perf_counter()
        split = split_batch(batch[:, 0].tolist(), processes, max_tokens=10**9)
        seconds = time.perf_counter() - started
        ranks, ideal = batch.reshape(processes, each, 2), batch[:, 0].sum() / processes
        found["balanced"].append(1 + split.imbalance)
        found["bound"].append(max(1.0, batch[:, 0].max() / ideal))
        found["in_order"].append(ranks[:, :, 0].sum(axis=1).max() / ideal)
        found["padded"].append(each * ranks[:, :, 1].max() / ideal)
    return {name: float(np.mean(values)) for name, values in found.items()} | {"split_s": seconds}


# --- paper: computed -------------------------------------------------------------------------------------------------


def layer_shapes(shape: dict) -> list[tuple[int, int]]:
    """(inputs, outputs) of the matrices of a Llama's layer: q, k, v, o, gate, up, down."""
    h, inner = shape["hidden_size"], shape["intermediate_size"]
    queries, keys = (shape[f"num_{x}_heads"] * shape["head_dim"] for x in ("attention", "key_value"))
    return [(h, queries), (h, keys), (h, keys), (queries, h), (h, inner), (h, inner), (inner, h)]


def count_parameters(shape: dict) -> int:
    """Of a Llama: embedding, head (unless it is the same), layers of matrices and two norms, last norm; no biases."""
    hidden = shape["hidden_size"]
    layer = sum(a * b for a, b in layer_shapes(shape)) + 2 * hidden
    ends = (1 if shape["tie_word_embeddings"] else 2) * shape["vocab_size"] * hidden
    return shape["num_hidden_layers"] * layer + ends + hidden


def count_lora(shape: dict, rank: int) -> int:
    """Of LoRA on each matrix of each layer: rank x (inputs + outputs) (arXiv:2106.09685)."""
    return shape["num_hidden_layers"] * rank * sum(a + b for a, b in layer_shapes(shape))


def state_bytes(launch: str, trained: int, frozen: int, processes: int) -> float:
    """Weights, gradients and Adam's state on a GPU, mixed precision (ZeRO, arXiv:1910.02054, section 3.1, figure 1).

    A trained parameter takes 2 bytes of weight, 2 of gradient and 12 of optimizer (fp32 weight, two moments); a frozen
    one 2. ZeRO-1 splits the 12, ZeRO-2 the gradient too, ZeRO-3 and FSDP everything.
    """
    if launch == "zero3":
        return (16 * trained + 2 * frozen) / processes
    split = {"ddp": 0, "zero1": 12, "zero2": 14}[launch]
    return 2 * frozen + (16 - split) * trained + split * trained / processes


def working_bytes(shape: dict, tokens: float, gathered: bool) -> float:
    """Activations on a GPU with gradient checkpointing in bf16, an estimate.

    The input of each layer, 2 x hidden bytes a token; one layer's own, 34 x hidden (Korthikanti et al.,
    arXiv:2205.05198, equation 2, without the scores, which flash attention does not keep); fp32 logits of 1,024 tokens.
    Where weights are split: two gathered layers and the head, 2 bytes a parameter.
    """
    hidden, vocabulary = shape["hidden_size"], shape["vocab_size"]
    weights = 2 * (2 * sum(a * b for a, b in layer_shapes(shape)) + hidden * vocabulary) if gathered else 0
    return (2 * shape["num_hidden_layers"] + 34) * hidden * tokens + 4 * 1024 * vocabulary + weights


def step_flops(shape: dict, tokens: float, sequence: int, lora: int = 0) -> float:
    """Model FLOPs of `tokens` tokens in sequences of `sequence`, recomputation not counted (PaLM, arXiv:2204.02311, B).

    6 a parameter and token: 2 forward, 2 for the gradient of the inputs, 2 for that of the weights, which frozen ones
    do not need (`lora`: parameters of LoRA, 0 for full fine-tuning); an embedding that is only looked up is left out.
    Attention: 12 x layers x heads x head_dim x sequence a token.
    """
    looked_up = 0 if shape["tie_word_embeddings"] else shape["vocab_size"] * shape["hidden_size"]
    matrices = count_parameters(shape) - looked_up
    width = shape["num_attention_heads"] * shape["head_dim"]
    attention = 12 * shape["num_hidden_layers"] * width * sequence
    return tokens * ((4 * matrices + 6 * lora if lora else 6 * matrices) + attention)


def efficiency(compute_s: float, sending_s: float, imbalance: float) -> tuple[float, float]:
    """The mean process's share of time in which it computes: nothing of the sending overlapped, and all of it.

    A step takes as long as the fullest process, which computes 1 + imbalance times as long as the mean.
    """
    fullest = compute_s * (1 + imbalance)
    return compute_s / (fullest + sending_s), compute_s / max(fullest, sending_s)


def plan(shape: dict, training: str, launch: str, gpus: int, imbalance: float, tokens: float = TOKENS) -> dict:
    """Memory (bytes), bytes sent, seconds and efficiencies of a GPU in a step of `tokens` tokens a GPU."""
    weights = count_parameters(shape)
    lora = count_lora(shape, LORA_RANK) if training == "lora" else 0
    trained, frozen = (lora, weights) if lora else (weights, 0)
    traffic = zero_bytes(launch, 2 * trained, 2 * (trained + frozen), gpus)
    compute = step_flops(shape, tokens, SEQUENCE, lora) / (PEAK_FLOPS * MFU)
    inside = gpus <= GPUS_A_NODE
    slow, fast = (traffic / (NVLINK if inside else across) for across in (NDR, min(NVLINK, GPUS_A_NODE * NDR)))
    memory = state_bytes(launch, trained, frozen, gpus) + working_bytes(shape, tokens, launch == "zero3")
    return {
        "memory": memory, "traffic": traffic, "compute_s": compute, "slow_s": slow, "fast_s": fast,
        "slow": efficiency(compute, slow, imbalance), "fast": efficiency(compute, fast, imbalance),
    }  # fmt: skip


def plan_row(name: str, training: str, launch: str, gpus: int, imbalance: float, tokens: float = TOKENS) -> tuple:
    """A line of the tables; GB are 10^9 bytes."""
    found = plan(SHAPES[name], training, launch, gpus, imbalance, tokens)
    fits = found["memory"] <= GPU_BYTES
    memory = f"{found['memory'] / 1e9:.1f}" if fits else f"does not fit: {found['memory'] / 1e9:.0f}"
    times = (f"{found[x]:.3f}" for x in ("compute_s", "slow_s", "fast_s"))
    bounds = ("{:.2f} to {:.2f}".format(*found[x]) if fits else "" for x in ("slow", "fast"))
    return (name, training, launch, gpus, f"{tokens:,.0f}", memory, f"{found['traffic'] / 1e9:.2f}", *times, *bounds)


def paper_part(args) -> str:
    pairs = read_lengths(args.data)
    mean = np.mean([p[0] for p in pairs])
    grows = {gpus: simulate(pairs, gpus, 16)["balanced"] - 1 for gpus in (8, 64, 1024)}
    fixed = {gpus: simulate(pairs, gpus, FIXED_PAIRS // gpus)["balanced"] - 1 for gpus in (8, 32, 128, 512)}
    ways = (("full", "zero2"), ("full", "zero3"), ("lora", "ddp"), ("lora", "zero3"))
    first = [plan_row(name, *way, gpus, grows[gpus]) for name in SHAPES for way in ways for gpus in grows]
    second = [plan_row("llama-8b", *way, g, fixed[g], FIXED_PAIRS / g * mean) for way in ways for g in fixed]
    titles = "model,training,launch,GPUs,tokens a GPU,GB a GPU,GB sent,compute s,sending s at 50,at 400,"
    titles = (titles + "efficiency at 50,at 400").split(",")
    unequal = [", ".join(f"{x:.1%} on {gpus}" for gpus, x in found.items()) for found in (grows, fixed)]
    return PAPER.format(
        tokens=TOKENS, sequence=SEQUENCE, rank=LORA_RANK, mfu=MFU, most=TOKENS * 1024, pairs=TOKENS * 1024 / mean,
        fixed_pairs=FIXED_PAIRS, grows=unequal[0], fixed=unequal[1], first=aligned([titles, *first]),
        second=aligned([titles, *second]),
    )  # fmt: skip


PAPER = """## Models of 1B, 8B and 70B on 8 to 1,024 GPUs (arithmetic, not a measurement)

Nothing in this part was run. Shapes of Llama 3, bf16, gradient checkpointing, sequences of {sequence:,} tokens, one
micro-batch a step; LoRA of rank {rank} on all linear layers. zero3 stands for FSDP2 too; ZeRO-1 sends what ZeRO-2 does
and takes 2 bytes a parameter more.

- memory: 2 + 2 + 12 bytes a trained parameter, 2 a frozen one, split by stage (ZeRO, arXiv:1910.02054, figure 1);
  activations (2 layers + 34) hidden x tokens (arXiv:2205.05198, equation 2, without the scores), logits of 1,024
  tokens; where weights are split, two gathered layers and the head. Of 80 GB
- compute: 6 x parameters x tokens, LoRA 4, and 12 x layers x width x sequence x tokens FLOPs (PaLM, arXiv:2204.02311,
  appendix B) at {mfu:.0%} (assumed, recomputation included) of 989 TFLOP/s: bf16, dense, H100 SXM or H200 (data sheet)
- sent: 2 bytes a parameter; (N-1)/N x 2 G for DDP, ZeRO-1 and 2, (N-1)/N x (2 P + G) for ZeRO-3 and FSDP2 (ZeRO paper,
  section 7), G trained parameters, P all. DeepSpeed as it is built (see the measured part) sends 3 G under ZeRO-1 and
  2, and about 3 P + G under ZeRO-3 with gradient checkpointing
- sending: 450 GB/s within 8 GPUs (NVLink 4, one direction). On more, 50 GB/s if all that a GPU sends leaves through its
  own InfiniBand NDR port (400 Gb/s), or 400 if 8 rings each leave the node through another port, as NCCL lays them.
  Latency is not counted; a ring's grows with N
- efficiency: the mean GPU's compute over the fullest one's plus sending (nothing overlapped), to that over the larger
  of the two (all of it); the fullest computes 1 + imbalance times the mean, as simulated with 16 pairs each: {grows}

The work grows with the GPUs: {tokens:,} tokens on each; {most:,} a step on 1,024 GPUs, about {pairs:,.0f} of those pairs.

{first}

The work is fixed: {fixed_pairs} pairs a step, shared out. Imbalance {fixed}: a pair stays whole.
(So few tokens a GPU would not reach {mfu:.0%} either.)

{second}
"""


# --- output ----------------------------------------------------------------------------------------------------------


def aligned(rows: list[tuple]) -> str:
    """A Markdown table whose columns are aligned in plain text too; the first row is the head."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *lines[1:]])


def header() -> str:
    """When, how, on what and with which versions."""
    from rlhf.runs.provenance import environment

    found = environment()
    names = ("torch", "transformers", "trl", "accelerate", "peft", "deepspeed")
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in names if name in found["versions"])
    command = " ".join(["python bench/scale.py", *(shlex.quote(compare._short(word)) for word in sys.argv[1:])])
    return f"""# How the cost of a training step grows with the number of processes

{datetime.now(UTC):%Y-%m-%d %H:%M} UTC

    {command}

{compare._hardware(found["hardware"])}; {versions}; commit {found["git_commit"]}.

"""


PARTS = {"bytes": bytes_part, "imbalance": imbalance_part, "paper": paper_part}

if __name__ == "__main__":
    main()
