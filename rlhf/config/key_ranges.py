"""Allowed values of each key: type, range, choices. All numeric ranges are in one table."""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from rlhf.config.keys import Key
from rlhf.errors import UserError, quote


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`.

    Attributes:
        above: excludes `low` itself.
        below: excludes `high` itself.
        also: one more allowed number, with a meaning of its own.
        integer_above_1: numbers from 1 on must be integers (transformers reads those below 1 as a fraction of the run).
        note: a hint at the end of the message.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    also: float | None = None
    integer_above_1: bool = False
    note: str = ""

    def holds(self, value: float) -> bool:
        if value == self.also:
            return True
        if self.integer_above_1 and value >= 1 and value != int(value):
            return False
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.above or self.below:
            low = f"{'above' if self.above else 'at least'} {_number(self.low)}"
            high = f" and {'below' if self.below else 'at most'} {_number(self.high)}"
        else:
            low, high = f"from {_number(self.low)}", f" to {_number(self.high)}"
        also = f", or {self.also:g}" if self.also is not None else ""
        return f"{low}{high}{also}{f' ({self.note})' if self.note else ''}"


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", "_") if abs(value) >= 1e5 else f"{value:g}"


_STEPS = 1_000_000_000
_ROWS = 1_000_000_000_000
COUNT = Range(1, _STEPS)
SHARE = Range(0, 1)
SHARE_BELOW_1 = Range(0, 1, below=True)
SEED = Range(0, 2**32 - 1, note="numpy accepts no other")
EVERY = Range(
    0, _STEPS, above=True, integer_above_1=True, note="an integer number of steps, or a fraction of the run below 1"
)

# Upper bounds are far beyond any real run: they catch typing errors.
RANGES = {
    # optimizer
    "learning_rate": Range(0, 1, above=True, note="1e-6 to 1e-3 is usual"),
    "weight_decay": Range(0, 10),
    "adam_beta1": SHARE_BELOW_1,
    "adam_beta2": SHARE_BELOW_1,
    "adam_epsilon": SHARE,
    "max_grad_norm": Range(0, 1e12, note="0: gradients are not clipped"),
    "warmup_steps": Range(
        0, _STEPS, integer_above_1=True, note="an integer number of steps, or a fraction of the run below 1"
    ),
    "num_train_epochs": Range(0, 1_000_000, above=True),
    "max_steps": Range(1, _STEPS, also=-1, note="-1: decided by num_train_epochs"),
    "per_device_train_batch_size": Range(1, 65536),
    "per_device_eval_batch_size": Range(1, 65536),
    "gradient_accumulation_steps": Range(1, 65536),
    "global_batch_size": Range(1, 1_000_000),
    "max_tokens_per_device": Range(1, 100_000_000),
    # losses
    "beta": Range(0, 1000, above=True, note="0.01 to 1 is usual"),
    "label_smoothing": Range(0, 0.5, below=True),
    "label_smoothing_factor": SHARE_BELOW_1,
    "loss_weights": Range(0, 1_000_000),
    "ld_alpha": SHARE,
    "f_alpha_divergence_coef": Range(-100, 100),
    "discopop_tau": Range(0, 1000, above=True),
    "center_rewards_coefficient": Range(0, 1000),
    "router_aux_loss_coef": Range(0, 100),
    "ref_model_mixup_alpha": SHARE,
    "ref_model_sync_steps": COUNT,
    "max_reference_bias_nats": Range(0, 1_000_000, above=True),
    "neftune_noise_alpha": Range(0, 1000, note="5 to 15 is usual"),
    # model
    "lora_r": Range(1, 16384),
    "lora_alpha": Range(1, 1_000_000),
    "lora_dropout": SHARE_BELOW_1,
    "max_length": Range(1, 100_000_000),
    "pad_to_multiple_of": Range(1, 65536),
    # data
    "max_train_examples": Range(1, _ROWS),
    "max_eval_examples": Range(1, _ROWS),
    "dataset_num_proc": Range(1, 4096),
    "dataloader_num_workers": Range(0, 4096),
    "dataloader_prefetch_factor": Range(1, 65536),
    "seed": SEED,
    "data_seed": SEED,
    # logging, saving, evaluating
    "logging_steps": EVERY,
    "eval_steps": EVERY,
    "save_steps": EVERY,
    "eval_delay": Range(0, _STEPS),
    "early_stopping_patience": COUNT,
    "early_stopping_threshold": Range(0, 1_000_000),
    "save_total_limit": Range(1, 1_000_000, note="remove it to keep all"),
    "torch_empty_cache_steps": COUNT,
    # processes
    "ddp_bucket_cap_mb": Range(1, 1_000_000),
    "ddp_timeout": Range(1, 31_536_000, note="seconds"),
    "watchdog_minutes": Range(0, 525_600, note="0 disables"),
    "max_gradient_spike": Range(1, 1e12, above=True, also=0, note="0 disables"),
    # evaluate
    "max_new_tokens": Range(1, 1_000_000),
    "num_shown": Range(1, 1000),
    "kl_prompts": Range(0, _ROWS, note="0 disables"),
    "heldout": Range(0, 10**9, above=True),
    "batch_size": Range(1, 65536),
    "benchmark_limit": Range(1, _ROWS),
    # rounds
    "num_rounds": Range(2, 1000),
    "min_gain": Range(-1, 1),
    "max_prompts": Range(1, _ROWS),
    "num_answers": Range(2, 10_000),
    "min_margin": Range(0, 1e6),
    "temperature": Range(0, 100, above=True),
    "top_p": Range(0, 1, above=True),
}

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_KERNEL = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?(:\w+)?")

_WRONG = object()
_TYPE_NAMES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a string", "None": "null",
               "list": "a list", "dict": "a mapping"}  # fmt: skip
_LOSSES_OF_OTHERS = {
    "simpo": "SimPO has no reference model and is not one of TRL's DPO losses; the closest are `sigmoid_norm` (averages over the "
    "answer's tokens) and `ipo`",
    "orpo": "ORPO is another trainer, without a reference model; here train `rlhf sft` first and then `loss_type: sigmoid`, or "
    "both at once with `loss_type: [sigmoid, sft]`",
    "cpo": "CPO is another trainer, without a reference model; `loss_type: [sigmoid, sft]` is DPO plus its second term",
    "kto": "KTO takes single answers with a thumb up or down, and is another trainer; for pairs there is `bco_pair`, "
    "`apo_zero` or `sigmoid`",
    "kto_pair": "TRL has dropped it; `bco_pair` or `apo_zero` is the closest",
    "ppo": "this project has no PPO; `rlhf dpo` reaches the same optimum without sampling",
    "grpo": "this project has no GRPO; `rlhf dpo` learns from pairs",
    "cdpo": "conservative DPO is `loss_type: robust` with label_smoothing here",
    "rdpo": "`loss_type: robust` with label_smoothing",
    "dpo": "DPO's own loss is `sigmoid`",
    "rpo": "`loss_type: [sigmoid, sft]` with `loss_weights: [1.0, 1.0]`",
    "mpo": "`loss_type: [sigmoid, bco_pair, sft]` with `loss_weights: [0.8, 0.2, 1.0]`",
    "sppo": "`sppo_hard`",
    "exo": "`exo_pair`",
    "nca": "`nca_pair`",
    "bco": "`bco_pair`",
    "apo": "`apo_zero` or `apo_down`",
}  # fmt: skip


def check_value(where: str, key: Key, value: Any) -> Any:
    """Return the value converted to its field's type.

    Raises:
        UserError: with the found and the expected value.
    """
    members = [m.strip() for m in split_union(key.annotation)]
    members = ["str" if m.endswith(("Type", "Strategy", "Names")) else m for m in members]
    members = ["list[str]" if m.startswith("list[") and m.endswith(("Option]", "Type]")) else m for m in members]
    if "list[str]" in members:
        value = [value] if isinstance(value, str) else value
    if "list[str | dict]" in members and "str" not in members:  # one item, or a list of them
        value = [value] if isinstance(value, str) else value
    if any(m.startswith("dict") for m in members) and "str" in members:  # a string is JSON; TRL would open it as a file
        members.remove("str")
        value = _read_json(value) if isinstance(value, str) else value
    checked = _coerce(members, value, bool(key.choices))
    if checked is _WRONG:
        expected = " or ".join(dict.fromkeys(_TYPE_NAMES.get(m.split("[")[0], m) for m in members))
        raise UserError(f"{where}: '{key.name}' is {quote(value)}; expected {expected}")
    _check_parts(where, key.name, checked, value)
    items = checked if isinstance(checked, list) else [checked]
    for item in items:
        if key.choices and item is not None and item not in key.choices and not isinstance(item, bool):
            raise UserError(f"{where}: {_not_a_choice(key, item)}")
        _check_range(where, key, item, members)
    if key.name == "attn_implementation" and checked is not None:
        _check_attention(where, checked)
    if key.name == "report_to" and len(items) > 1 and {"none", "all"} & set(items):
        raise UserError(f"{where}: 'report_to' is {quote(items)}; use `none` and `all` alone")
    return checked


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def split_union(annotation: str) -> list[str]:
    return re.split(r" \| (?![^\[]*\])", annotation)


def _not_a_choice(key: Key, item: Any) -> str:
    listed = f"'{key.name}' is {quote(item)}; expected one of {', '.join(map(str, filter(None, key.choices or ())))}"
    if key.name == "loss_type" and str(item).lower() in _LOSSES_OF_OTHERS and "sigmoid" in (key.choices or ()):
        return f"{listed}; {_LOSSES_OF_OTHERS[str(item).lower()]}"
    near = difflib.get_close_matches(str(item)[:100], [str(c) for c in key.choices or ()], n=1)
    return listed + (f"; did you mean '{near[0]}'?" if near else "")


def _check_range(where: str, key: Key, value: Any, members: list[str]) -> None:
    allowed = RANGES.get(key.name)
    if allowed is None or isinstance(value, bool) or not isinstance(value, (int, float)) or allowed.holds(value):
        return
    kind = "a number" if any("float" in m for m in members) else "an integer"
    raise UserError(f"{where}: '{key.name}' is {quote(value)}; expected {kind} {allowed}")


def _check_attention(where: str, value: str) -> None:
    if value in ATTENTION or _KERNEL.fullmatch(value):
        return
    near = difflib.get_close_matches(value[:100], ATTENTION, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UserError(
        f"{where}: 'attn_implementation' is {quote(value)}; expected one of {', '.join(ATTENTION)} or a kernel on the hub "
        f"(kernels-community/flash-attn2){hint}"
    )


def _check_parts(where: str, name: str, value: Any, given: Any) -> None:
    """Reject NaN, infinity and lone surrogates, also inside lists and mappings."""
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        raise UserError(f"{where}: '{name}' is {quote(given)}; expected strings as its keys")
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        _check_parts(where, name, part, given)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: '{name}' is {quote(given)}; expected a finite number")
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" or c == "\0" for c in value):
        raise UserError(
            f"{where}: '{name}' is {quote(given)}, which contains NUL or a lone surrogate; write it in UTF-8"
        )


def _coerce(members: list[str], value: Any, closed: bool) -> Any:
    if value is None:
        return None if "None" in members else _WRONG
    if isinstance(value, bool):
        # YAML 1.1 reads a bare `no` as false; transformers writes save_strategy: "no".
        if "bool" in members or "Literal[False]" in members:
            return value
        return "no" if closed and value is False and "str" in members else _WRONG
    if isinstance(value, (int, float)) and ("int" in members or "float" in members):
        return _coerce_number(members, value)
    if isinstance(value, str):
        # YAML 1.1 reads 1e-4 as a string (it wants 1.0e-4).
        if "str" not in members and "float" in members:
            try:
                return float(value)
            except ValueError:
                return _WRONG
        return value if "str" in members else _WRONG
    if isinstance(value, list):
        inner = next((m[5:-1] for m in members if m.startswith("list[")), None)
        if inner is None:
            return _WRONG
        items = [_coerce(split_union(inner), item, closed) for item in value]
        return _WRONG if any(i is _WRONG for i in items) else items
    if isinstance(value, dict):
        return value if any(m.startswith("dict") for m in members) else _WRONG
    return _WRONG


def _coerce_number(members: list[str], value: int | float) -> Any:
    if "float" in members and "int" not in members:
        try:
            return float(value)
        except OverflowError:  # an integer of more than 308 digits
            return math.inf if value > 0 else -math.inf
    if "float" in members:
        return value
    return int(value) if isinstance(value, int) or value.is_integer() else _WRONG
