"""Reference log-probabilities of DPO: computed once, on packed rows, and cached on disk for every later run.

Before its first update the policy *is* the reference model, so no second model is needed: a forward pass over the data
at that point gives the log-probabilities exactly. They are cached in

    <cache>/reference/<key of the reference>/<sha256 of the file>.safetensors

where the key covers the files of the reference's weights and adapter, dtypes, quantisation, config, the attention path and `ld_alpha`,
and the key of each entry its pair's token ids. So runs with another seed, LoRA rank, beta, learning rate or loss reuse
the cache; of changed data only the changed pairs are computed again; after a change of weights or dtype everything is.
Files are named by their checksum and written atomically: a damaged one doesn't match its name, is removed and computed
again. An interrupted build loses at most 30 s. Concurrent runs that share a cache take a lock: one computes, the others
wait (without lock support both may compute the same entries).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from rlhf.distributed.processes import is_main, say
from rlhf.distributed.sharding import reshard
from rlhf.files import cache_dir, lock_file, write_file
from rlhf.models.counts import is_added
from rlhf.runs.stop import Stopped, Stopper
from rlhf.training.tokenise import pair_key

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

FORMAT = 4  # part of every key: increment it when the computation changes
MAX_TOKENS = 4096  # maximum per forward pass
SHARD_PAIRS, SHARD_SECONDS = 4096, 30  # a file is written after this many pairs or seconds
WAIT_SECONDS = 2  # polling interval while another run builds the reference
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


# --- on disk ---------------------------------------------------------------------------------------------------------


class Shards:
    """The cache files of one reference."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """(keys (N, 16) uint8, log-probabilities (N, 2) float64) of the files that match their checksum; reports and removes
        the other files."""
        keys, logps = [np.zeros((0, 16), np.uint8)], [np.zeros((0, 2), np.float64)]
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                content = path.read_bytes()
            except OSError:  # another run has removed it
                continue
            if hashlib.sha256(content).hexdigest() != path.stem:
                say(f"note: {path} is damaged (its content doesn't match its name); it is removed and computed again")
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            arrays = decode(content)
            keys.append(arrays[0])
            logps.append(arrays[1])
        return np.concatenate(keys), np.concatenate(logps)

    def write(self, keys: np.ndarray, logps: np.ndarray) -> None:
        """Add a file atomically. An unwritable cache is reported, not raised: it only costs later runs time."""
        if not len(keys):
            return
        content = encode(keys, logps)
        path = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(path, content)
        except OSError as error:
            say(f"note: reference log-probabilities can't be cached ({error}); this run keeps them in memory")


def encode(keys: np.ndarray, logps: np.ndarray) -> bytes:
    """A safetensors file of keys (N, 16) uint8 and logps (N, 2) float64: chosen, rejected."""
    from safetensors.numpy import save

    return save({"keys": np.ascontiguousarray(keys), "logps": np.ascontiguousarray(logps, dtype=np.float64)})


def decode(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `encode`."""
    from safetensors.numpy import load

    arrays = load(content)
    return arrays["keys"], arrays["logps"]


def look_up(wanted: np.ndarray, keys: np.ndarray, logps: np.ndarray) -> np.ndarray:
    """The log-probabilities (N, 2) of the wanted keys (N, 16); NaN for those that are not among `keys`."""
    first, same = _distinct(np.concatenate([keys, wanted]))
    known = first[same[len(keys) :]]  # a key's first row: among `keys`, if it is there
    found = np.full((len(wanted), 2), np.nan, np.float64)
    found[known < len(keys)] = logps[known[known < len(keys)]]
    return found


def _distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the first row of each different key, for each row which of these it equals)"""
    halves = _halves(keys)
    order = np.lexsort((halves[1], halves[0]))  # stable: equal keys stay in the order of their rows
    starts = np.ones(len(keys), bool)
    starts[1:] = (halves[0][order][1:] != halves[0][order][:-1]) | (halves[1][order][1:] != halves[1][order][:-1])
    same = np.empty(len(keys), np.int64)
    same[order] = np.cumsum(starts) - 1
    return order[starts], same


def _halves(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys (N, 16) uint8 as two numbers each (uint64); the first alone tells nearly all apart."""
    both = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


# --- keys ------------------------------------------------------------------------------------------------------------


def pair_keys(dataset, max_length: int | None, truncation_mode: str) -> np.ndarray:
    """The keys (N, 16) uint8 of tokenised pairs: from their column `pair_key`, or computed."""
    if "pair_key" in dataset.column_names:  # as bytes objects they would be three times as large
        column = dataset.select_columns(["pair_key"]).with_format("arrow")[:]["pair_key"]
        return np.concatenate([np.zeros((0, 16), np.uint8), *map(_key_bytes, column.chunks)])
    rows = dataset.select_columns(list(IDS))
    found = b"".join(pair_key(row, max_length, truncation_mode) for row in rows)
    return np.frombuffer(found, np.uint8).reshape(-1, 16)


def _key_bytes(chunk: Any) -> np.ndarray:
    """An Arrow array of N 16-byte values as (N, 16) uint8, without a copy."""
    if not len(chunk):
        return np.zeros((0, 16), np.uint8)
    _, offsets, values = chunk.buffers()
    begin = int(np.frombuffer(offsets, np.int32)[chunk.offset])
    return np.frombuffer(values, np.uint8)[begin : begin + 16 * len(chunk)].reshape(-1, 16)


def reference_key(model, source: str, path: str, **more: Any) -> str:
    """32 hex digits that identify the reference.

    Args:
        model: the policy before its first update, as TRL's trainer holds it: its config and dtypes count, and those of the
            adapter `ref` if it is trained further. A new adapter is disabled for the reference.
        source: identifies the files that its weights were read from (`weights_digest`).
        path: how attention is computed (`packed`, `sdpa`, ...).
        more: whatever else changes the values (autocast dtype, device type, ld_alpha).
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NO_MATTER and not k.startswith("_")}
    dtypes = sorted({str(p.dtype) for name, p in model.named_parameters() if not is_added(name)})
    adapter: dict[str, Any] = {}
    if "ref" in getattr(model, "peft_config", {}):
        adapter = {k: v for k, v in sorted(model.peft_config["ref"].to_dict().items()) if k in _ADAPTER_KEYS}
    parts = [FORMAT, source, path, more, config, dtypes, adapter]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


_NO_MATTER = frozenset("transformers_version use_cache architectures torch_dtype dtype pad_token_id".split())
_ADAPTER_KEYS = frozenset(
    "peft_type r lora_alpha use_rslora use_dora fan_in_fan_out alpha_pattern rank_pattern".split()
)


# --- computing -------------------------------------------------------------------------------------------------------


def add_reference_logps(
    trainer: DPOTrainer, dataset, source: str, path: str, folder: Path | None = None, stopper: Stopper | None = None
):
    """Add the columns `ref_chosen_logps` and `ref_rejected_logps` (float64, nats) that TRL's DPOTrainer reads.

    Args:
        trainer: TRL's DPOTrainer before its first update, packed or not.
        dataset: its tokenised rows (`prompt_ids`, `chosen_ids`, `rejected_ids`).
        source, path: for the key: the files of the weights, and how attention is computed.
        folder: the cache; default: `reference` in the user's cache folder of this project.
        stopper: checked after each batch; on a stop the finished pairs are in the cache.

    Raises:
        Stopped: a stop was requested.

    A collective: all ranks share the computation, the main one reads and writes files.
    """
    args = cast("DPOConfig", trainer.args)
    key = reference_key(
        trainer.accelerator.unwrap_model(trainer.ref_model or trainer.model), source, path,
        autocast=trainer.accelerator.mixed_precision, device=args.device.type, ld_alpha=trainer.ld_alpha,
    )  # fmt: skip
    shards = Shards((folder or cache_dir() / "reference") / key)
    keys = pair_keys(dataset, args.max_length, args.truncation_mode)
    logps = _from_cache(trainer, shards, keys)
    with contextlib.ExitStack() as turn:
        if np.isnan(logps[:, 0]).any():
            wait_for_turn(trainer, turn, shards.folder, stopper)
            logps = _from_cache(trainer, shards, keys)
        first, same = _distinct(keys)
        missing = first[np.isnan(logps[first, 0])]  # duplicates once
        say(f"  reference {len(keys)} pairs, {len(first) - len(missing)} of them in the cache ({shards.folder})")
        if len(missing):
            compute_logps(trainer, dataset, Missing(missing, keys, logps), shards, stopper)
            logps = logps[first[same]]
    return dataset.add_column("ref_chosen_logps", logps[:, 0]).add_column("ref_rejected_logps", logps[:, 1])


def _from_cache(trainer: DPOTrainer, shards: Shards, keys: np.ndarray) -> np.ndarray:
    """The cached log-probabilities (N, 2) of these keys, NaN for the others, on all ranks: nodes may not share a cache folder."""
    from accelerate.utils import broadcast

    found = look_up(keys, *shards.read()) if is_main() else np.zeros((len(keys), 2), np.float64)
    if trainer.accelerator.num_processes == 1:
        return found
    import torch

    return broadcast(torch.from_numpy(found).to(trainer.accelerator.device)).cpu().numpy()


def wait_for_turn(
    trainer: DPOTrainer, turn: contextlib.ExitStack, folder: Path, stopper: Stopper | None = None
) -> None:
    """Let one run at a time build a reference: the other runs (of a sweep) wait, then read it from the cache.

    Args:
        turn: releases the lock when it is closed; if the process dies, the kernel releases it.

    Raises:
        Stopped: a stop was requested.

    A collective: all ranks must call it.
    """
    waited = False
    while True:
        free = _from_main(
            trainer, lambda: _take(turn, folder / ".lock")
        )  # polled often, so that no rank waits long in the broadcast
        if free:
            return
        if not waited:
            say(f"  reference is being computed by another run ({folder}); waiting for it")
        waited = True
        if stopper and stopper.agree():
            say("\nStopped while waiting for the reference. Run the same command to resume.")
            raise Stopped
        time.sleep(WAIT_SECONDS)


def _take(turn: contextlib.ExitStack, path: Path) -> bool:
    """Take the lock; returns False if another run holds it. True also where locking is not possible."""
    with contextlib.ExitStack() as opened:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context(open(path, "a", encoding="utf-8"))
        except OSError:  # a read-only cache
            return True
        if not lock_file(file):
            return False
        turn.enter_context(opened.pop_all())
    return True


class Missing(NamedTuple):
    """Pairs whose log-probabilities are to be computed.

    Attributes:
        rows: numbers of the data set's rows.
        keys: (N, 16) uint8, of all rows.
        logps: (N, 2) float64, of all rows: filled in.
    """

    rows: np.ndarray
    keys: np.ndarray
    logps: np.ndarray


def compute_logps(
    trainer: DPOTrainer, dataset, missing: Missing, shards: Shards, stopper: Stopper | None = None
) -> None:
    """Compute the missing pairs: each rank computes its share and receives all of them."""
    from accelerate.utils import gather_object
    from tqdm import tqdm

    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    rows = dataset.select_columns(list(IDS))
    batches = token_batches(padded_lengths(dataset, missing.rows), missing.rows, MAX_TOKENS)
    num_done, unwritten = 0, []
    written_at = time.monotonic()
    bar = tqdm(
        total=len(missing.rows), desc="Reference", unit="pair", disable=not is_main() or trainer.args.disable_tqdm
    )
    try:
        with callable_model(trainer, trainer.ref_model or trainer.model) as model:
            for start in range(0, len(batches), world):
                turn = batches[start : start + world]
                # a rank without a batch repeats the first one: ZeRO-3 gathers weights from all ranks in every pass
                here = turn[rank] if rank < len(turn) else turn[0]
                found = forward_logps(trainer, model, rows, here)
                mine = [(here, found)] if rank < len(turn) else []
                for numbers, values in gather_object(mine) if world > 1 else mine:
                    missing.logps[numbers] = values
                    unwritten.append(numbers)
                    num_done += len(numbers)
                    bar.update(len(numbers))
                if stopper and num_done < len(missing.rows) and stopper.agree():
                    say(f"\nStopped: {num_done} of {len(missing.rows)} pairs of the reference are in the cache. "
                        "Run the same command to resume.")  # fmt: skip
                    raise Stopped
                if sum(map(len, unwritten)) >= SHARD_PAIRS or time.monotonic() - written_at > SHARD_SECONDS:
                    _write(shards, missing, unwritten)
                    unwritten, written_at = [], time.monotonic()
    finally:  # on a stop, write what has been computed
        bar.close()
        _write(shards, missing, unwritten)


@contextlib.contextmanager
def callable_model(trainer: DPOTrainer, model):
    """A form of `model` that can be called before training has started.

    Under DeepSpeed that is an inference engine, which places and gathers the weights; it is destroyed afterwards. TRL
    does not destroy its own: ZeRO-3's hooks then run twice in training, and LoRA fails with "pop from an empty deque"
    (deepspeed 0.19).
    """
    if model is trainer.ref_model or not trainer.is_deepspeed_enabled:
        try:
            yield model
        finally:
            reshard(model)  # or FSDP2 leaves the last layers unsharded, and the optimizer would be made from those
        return
    from trl.models import prepare_deepspeed

    engine = prepare_deepspeed(model, trainer.accelerator)
    try:
        yield engine
    finally:
        engine.destroy()
        # DeepSpeed 0.19 leaves hooks that call the destroyed engine: training under ZeRO-3 with gradient checkpointing
        # would then find empty weights.
        for module in model.modules():
            for name in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt"):
                module.__dict__.pop(name, None)


def padded_lengths(dataset, numbers: np.ndarray) -> np.ndarray:
    """Tokens of the longer side of each of these pairs."""
    if "padded" in dataset.column_names:
        return np.asarray(dataset.with_format("numpy")["padded"][:])[numbers] // 2
    rows = dataset.select_columns(list(IDS)).select(numbers)
    return np.array([len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows], np.int64)


def token_batches(lengths: np.ndarray, numbers: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Row numbers in batches of similar length, longest first, each of at most `max_tokens` padded tokens (or one pair).

    Example:
        >>> [batch.tolist() for batch in token_batches(np.array([3, 9, 4]), np.array([0, 1, 2]), 20)]
        [[1], [2, 0]]
    """
    order = np.lexsort((numbers, -lengths))
    batches, at = [], 0
    while at < len(order):
        size = max(1, max_tokens // (2 * max(1, int(lengths[order[at]]))))
        batches.append(numbers[order[at : at + size]])
        at += size
    return batches


def forward_logps(trainer: DPOTrainer, model, rows, numbers: np.ndarray) -> np.ndarray:
    """Log-probabilities (N, 2) float64 of these rows, from TRL's own reference pass."""
    import torch

    inputs = trainer._prepare_inputs(trainer.data_collator([rows[int(number)] for number in numbers]))
    was_training = model.training
    model.eval()
    chosen, rejected = trainer.compute_ref_log_probs(model, inputs)
    model.train(was_training)
    return torch.stack([chosen, rejected], dim=1).double().cpu().numpy()  # read once


# --- a quantised reference -------------------------------------------------------------------------------------------


def measure_bias(trainer: DPOTrainer, exact, beta: float, num_pairs: int = 32) -> dict[str, float]:
    """The bias that quantisation adds to the reference, measured on the first training pairs.

    Args:
        trainer: with the quantised model as `ref_model`, before its first update.
        exact: the same model unquantised; the policy itself if it starts from the reference's weights.
        beta: of the loss.

    Returns:
        pairs; mean_nats and worst_nats: |difference| of log-probabilities per answer; mean_margin_nats and
        worst_margin_nats: of margins per pair; loss and exact_loss: DPO's (sigmoid) at step 0 with either reference.
    """
    pairs = cast("Dataset", trainer.train_dataset)
    rows = pairs.select(range(min(num_pairs, len(pairs)))).select_columns(list(IDS))
    numbers = np.arange(len(rows))
    batches = token_batches(padded_lengths(rows, numbers), numbers, MAX_TOKENS)
    found = []
    for model in dict.fromkeys((trainer.model, exact, trainer.ref_model)):
        logps = np.zeros((len(rows), 2), np.float64)
        with callable_model(trainer, model) as called:
            for batch in batches:
                logps[batch] = forward_logps(trainer, called, rows, batch)
        found.append(logps)
    return bias_of(found[0], found[-2], found[-1], beta)


def bias_of(policy, exact, quantised, beta: float) -> dict[str, float]:
    """The values of `measure_bias`, from (pairs, 2) log-probabilities of chosen and rejected."""
    answers = np.abs(quantised - exact)
    margins = np.abs((quantised - exact) @ [1, -1])
    loss, exact_loss = (float(np.logaddexp(0, -beta * ((policy - r) @ [1, -1])).mean()) for r in (quantised, exact))
    return {
        "pairs": len(policy), "mean_nats": float(answers.mean()), "worst_nats": float(answers.max()),
        "mean_margin_nats": float(margins.mean()), "worst_margin_nats": float(margins.max()),
        "loss": loss, "exact_loss": exact_loss,
    }  # fmt: skip


def _write(shards: Shards, missing: Missing, batches: list[np.ndarray]) -> None:
    if is_main() and batches:
        numbers = np.concatenate(batches)
        shards.write(missing.keys[numbers], missing.logps[numbers])


def _from_main(trainer: DPOTrainer, read) -> Any:
    """The main process's result of `read`, on all ranks: nodes may not share a cache folder."""
    from accelerate.utils import broadcast_object_list

    found = [read() if is_main() else None]
    if trainer.accelerator.num_processes > 1:
        broadcast_object_list(found)
    return found[0]
