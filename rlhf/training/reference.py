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
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from rlhf.distributed.processes import is_main, say
from rlhf.distributed.sharding import reshard
from rlhf.files import lock_file, write_file
from rlhf.models.counts import is_added
from rlhf.models.embedded import cache_dir
from rlhf.runs.stop import Stopped, Stopper

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

FORMAT = 4  # part of every key: increment it when the computation changes
MAX_TOKENS = 4096  # maximum per forward pass
SHARD_PAIRS, SHARD_SECONDS = 4096, 30  # a file is written after this many pairs or seconds
WAIT_SECONDS = 2  # polling interval while another run builds the reference
Logps = dict[bytes, tuple[float, float]]  # (chosen, rejected) by pair key


# --- on disk ---------------------------------------------------------------------------------------------------------


class Shards:
    """The cache files of one reference."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self) -> Logps:
        """All entries of the files that match their checksum; reports and removes the other files."""
        found: Logps = {}
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
            found |= decode(content)
        return found

    def write(self, entries: Logps) -> None:
        """Add a file atomically. An unwritable cache is reported, not raised: it only costs later runs time."""
        if not entries:
            return
        content = encode(entries)
        path = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(path, content)
        except OSError as error:
            say(f"note: reference log-probabilities can't be cached ({error}); this run keeps them in memory")


def encode(entries: Logps) -> bytes:
    """Entries as a safetensors file: keys (N, 16) uint8, logps (N, 2) float64."""
    from safetensors.numpy import save

    keys = np.frombuffer(b"".join(entries), dtype=np.uint8).reshape(len(entries), 16)
    return save({"keys": keys, "logps": np.array(list(entries.values()), dtype=np.float64)})


def decode(content: bytes) -> Logps:
    """The inverse of `encode`."""
    from safetensors.numpy import load

    arrays = load(content)
    return {key.tobytes(): (float(c), float(r)) for key, (c, r) in zip(arrays["keys"], arrays["logps"], strict=True)}


# --- keys ------------------------------------------------------------------------------------------------------------


def pair_key(row: dict[str, list[int]], max_length: int | None, truncation_mode: str) -> bytes:
    """16 bytes that identify a pair's token ids and where its answers start, after truncation by TRL's collator."""
    digest = hashlib.sha256()
    for side in ("chosen_ids", "rejected_ids"):
        ids, num_prompt = row["prompt_ids"] + row[side], len(row["prompt_ids"])
        if max_length is not None and truncation_mode == "keep_end":
            num_prompt = max(0, num_prompt - max(0, len(ids) - max_length))
            ids = ids[-max_length:]
        elif max_length is not None:
            ids = ids[:max_length]
        digest.update(np.array([len(ids), num_prompt, *ids], dtype=np.int64).tobytes())
    return digest.digest()[:16]


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
    rows = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    keys = [pair_key(row, args.max_length, args.truncation_mode) for row in rows]
    known = _from_main(trainer, lambda: _only(shards.read(), keys))
    with contextlib.ExitStack() as turn:
        if len(known) < len(set(keys)):
            wait_for_turn(trainer, turn, shards.folder, stopper)
            known = _from_main(trainer, lambda: _only(shards.read(), keys))
        missing = {key: i for i, key in enumerate(keys) if key not in known}  # duplicates once
        say(f"  reference {len(keys)} pairs, {len(set(keys)) - len(missing)} of them in the cache ({shards.folder})")
        if missing:
            known |= compute_logps(trainer, rows, missing, shards, stopper)
    chosen, rejected = (np.array([known[k][side] for k in keys], dtype=np.float64) for side in (0, 1))
    return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)


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


def _only(entries: Logps, keys: list[bytes]) -> Logps:
    return {key: entries[key] for key in keys if key in entries}


def compute_logps(
    trainer: DPOTrainer, rows, missing: dict[bytes, int], shards: Shards, stopper: Stopper | None = None
) -> Logps:
    """The entries of the `missing` pairs (key to row): each rank computes its share and receives all of them."""
    from accelerate.utils import gather_object
    from tqdm import tqdm

    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    batches = token_batches(rows, missing, MAX_TOKENS)
    found: Logps = {}
    unwritten: Logps = {}
    written_at = time.monotonic()
    bar = tqdm(total=len(missing), desc="Reference", unit="pair", disable=not is_main() or trainer.args.disable_tqdm)
    try:
        with callable_model(trainer, trainer.ref_model or trainer.model) as model:
            for start in range(0, len(batches), world):
                turn = batches[start : start + world]
                # a rank without a batch repeats the first one: ZeRO-3 gathers weights from all ranks in every pass
                found_here = forward_logps(trainer, model, rows, turn[rank] if rank < len(turn) else turn[0], missing)
                mine = list(found_here.items()) if rank < len(turn) else []
                new = dict(gather_object(mine) if world > 1 else mine)
                found |= new
                unwritten |= new
                bar.update(len(new))
                if stopper and len(found) < len(missing) and stopper.agree():
                    say(f"\nStopped: {len(found)} of {len(missing)} pairs of the reference are in the cache. "
                        "Run the same command to resume.")  # fmt: skip
                    raise Stopped
                if len(unwritten) >= SHARD_PAIRS or time.monotonic() - written_at > SHARD_SECONDS:
                    _write(shards, unwritten)
                    unwritten, written_at = {}, time.monotonic()
    finally:  # on a stop, write what has been computed
        bar.close()
        _write(shards, unwritten)
    return found


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


def token_batches(rows, missing: dict[bytes, int], max_tokens: int) -> list[list[bytes]]:
    """Keys in batches of similar length, longest first, each of at most `max_tokens` padded tokens (or one pair)."""
    lengths = {
        key: max(len(rows[i]["chosen_ids"]), len(rows[i]["rejected_ids"])) + len(rows[i]["prompt_ids"])
        for key, i in missing.items()
    }
    batches: list[list[bytes]] = []
    for key in sorted(missing, key=lambda k: (-lengths[k], k)):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and 2 * longest * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(key)
        else:
            batches.append([key])
    return batches


def forward_logps(trainer: DPOTrainer, model, rows, batch: list[bytes], missing: dict[bytes, int]) -> Logps:
    """Log-probabilities of one batch, from TRL's own reference pass."""
    inputs = trainer._prepare_inputs(trainer.data_collator([rows[missing[key]] for key in batch]))
    was_training = model.training
    model.eval()
    chosen, rejected = trainer.compute_ref_log_probs(model, inputs)
    model.train(was_training)
    return dict(zip(batch, zip(chosen.double().tolist(), rejected.double().tolist(), strict=True), strict=True))


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
    rows = pairs.select(range(min(num_pairs, len(pairs))))
    rows = rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    places = {i.to_bytes(16, "big"): i for i in range(len(rows))}
    found = []
    for model in dict.fromkeys((trainer.model, exact, trainer.ref_model)):
        logps: Logps = {}
        with callable_model(trainer, model) as called:
            for batch in token_batches(rows, places, MAX_TOKENS):
                logps |= forward_logps(trainer, called, rows, batch, places)
        found.append([logps[key] for key in places])
    policy, quantised = np.array(found[0]), np.array(found[-1])
    return bias_of(policy, np.array(found[-2]), quantised, beta)


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


def _write(shards: Shards, entries: Logps) -> None:
    if is_main():
        shards.write(entries)


def _from_main(trainer: DPOTrainer, read) -> Any:
    """The main process's result of `read`, on all ranks: nodes may not share a cache folder."""
    from accelerate.utils import broadcast_object_list

    found = [read() if is_main() else None]
    if trainer.accelerator.num_processes > 1:
        broadcast_object_list(found)
    return found[0]
