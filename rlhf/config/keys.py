"""The keys of TRL's and transformers' config classes, read from the source of the installed versions.

Importing them would take seconds (torch); names, types, choices, defaults and help are parsed from their source.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import UserError, pip_install


@dataclass(frozen=True)
class Key:
    """One allowed key.

    Attributes:
        annotation: its type, as an annotation string.
        choices: its allowed values, if it is an enumeration.
        owner: the class that it is a field of.
        default: as source text; '' if it has none.
        help: what it does.
    """

    name: str
    annotation: str
    choices: tuple | None
    owner: str
    default: str = ""
    help: str = ""


# Values that TRL and transformers only check after a model has loaded. tests/config/test_config.py compares each list
# with the installed library.
_LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
LATE_CHOICES = {
    ("TrainingArguments", "log_level"): _LOG_LEVELS,
    ("TrainingArguments", "log_level_replica"): _LOG_LEVELS,
    ("DPOConfig", "loss_type"): (
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    ),
    ("DPOConfig", "f_divergence_type"): ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    ("SFTConfig", "loss_type"): ("nll", "dft"),
    ("SFTConfig", "packing_strategy"): ("bfd", "bfd_split", "wrapped"),
}  # fmt: skip
# Choices that no metadata lists: torch's and bitsandbytes' own.
OWN_CHOICES = {
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "bnb_4bit_quant_storage": ("uint8", "int8", "float16", "bfloat16", "float32"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "debug": ("", "underflow_overflow", "tpu_metrics_debug"),
}

# Defaults of libraries that `build_configs` replaces, and help texts that would be untrue with ours.
OWN_DEFAULTS = {
    "dtype": "float32; with LoRA on a GPU the checkpoint's, and bfloat16 for a 4- or 8-bit base",
    "bf16": "True on a GPU that has it",
    "report_to": "none",
    "use_cpu": "True without a GPU",
    "dataloader_pin_memory": "True on a GPU",
}
OWN_HELP = {
    "dtype": "What the weights load in. Adapters and a reward model's new head are trained in float32 in either case.",
    "bf16": "Compute in bfloat16 (mixed precision) instead of float32.",
}


def own_keys(config_class: type) -> dict[str, Key]:
    """The fields of one of our dataclasses."""
    keys = {}
    for f in dataclasses.fields(config_class):
        choices = tuple(f.metadata["choices"]) if "choices" in f.metadata else None
        keys[f.name] = Key(f.name, str(f.type), choices, config_class.__name__, repr(f.default), f.metadata.get("help", ""))  # fmt: skip
    return keys


@functools.cache
def library_keys(package: str, file: str, class_name: str, owner: str) -> dict[str, Key]:
    """The fields of a library's config class.

    Raises:
        UserError: the library is not installed.
    """
    body = next(n for n in source(package, file).body if isinstance(n, ast.ClassDef) and n.name == class_name).body
    keys = {}
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        name, annotation = node.target.id, ast.unparse(node.annotation)
        choices = LATE_CHOICES.get((class_name, name)) or OWN_CHOICES.get(name) or _literal_choices(node)
        choices = choices or (report_names() if name == "report_to" else _enum_choices(annotation))
        default, told = _default_and_help(node)
        default, told = OWN_DEFAULTS.get(name, default), OWN_HELP.get(name, told)
        keys[name] = Key(name, annotation, tuple(choices) if choices else None, owner, default, told)
    return keys


@functools.cache
def source(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package '{package}' is not installed; run `make setup`, or: {pip_install('rlhf-dpo')}")
    return ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))


@functools.cache
def report_names() -> tuple[str, ...]:
    """The choices of `report_to`: the keys of transformers' INTEGRATION_TO_CALLBACK, and `none` and `all`."""
    for node in source("transformers", "integrations/integration_utils.py").body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "INTEGRATION_TO_CALLBACK":
            return ("none", "all", *_strings(node.value))
    return ()


def _strings(table: ast.expr) -> list[str]:
    """The keys of a literal dict that are texts."""
    keys = table.keys if isinstance(table, ast.Dict) else []
    return [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]


def scheduler_arguments(name: str) -> dict[str, bool] | None:
    """The arguments that `lr_scheduler_kwargs` may set for a scheduler of transformers.

    Returns:
        Each argument and whether it is required; None if the scheduler accepts any.
    """
    module = source("transformers", "optimization.py")
    table = next(n.value for n in module.body
                 if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "TYPE_TO_SCHEDULER_FUNCTION")  # fmt: skip
    members = {value: member for member, value in _enum_members("SchedulerType").items()}
    assert isinstance(table, ast.Dict), "transformers' schedulers are no literal dict any more"
    functions = {getattr(k, "attr", None): getattr(v, "id", "") for k, v in zip(table.keys, table.values, strict=True)}
    called = functions.get(members.get(name))
    function = next((n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == called), None)
    if function is None or function.args.kwarg is not None:
        return None
    names = [a.arg for a in function.args.args]
    needed = len(names) - len(function.args.defaults)
    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    if name in ("constant", "constant_with_warmup"):
        return {}
    return {arg: number < needed for number, arg in enumerate(names) if arg not in given}


def _literal_choices(node: ast.AnnAssign) -> list | None:
    """The literal list in `metadata={"choices": [...]}`."""
    value = _metadata(node).get("choices")
    return ast.literal_eval(value) if isinstance(value, ast.List) else None


def _metadata(node: ast.AnnAssign) -> dict[str, ast.expr]:
    for part in ast.walk(node):
        if isinstance(part, ast.keyword) and part.arg == "metadata" and isinstance(part.value, ast.Dict):
            return {key.value: value for key, value in zip(part.value.keys, part.value.values, strict=True)
                    if isinstance(key, ast.Constant) and isinstance(key.value, str)}  # fmt: skip
    return {}


def _default_and_help(node: ast.AnnAssign) -> tuple[str, str]:
    value: ast.expr | None = node.value
    if isinstance(value, ast.Call):
        named = {keyword.arg: keyword.value for keyword in value.keywords}
        value = named.get("default") or named.get("default_factory")
    default = "" if value is None else ast.unparse(value)
    default = {"default_optim": "'adamw_torch_fused'", "list": "[]"}.get(default, default.removeprefix("lambda: "))
    text = _metadata(node).get("help")
    try:
        words = ast.literal_eval(text) if text is not None else ""
    except ValueError:  # computed by code
        words = ""
    return default, " ".join(str(words).replace("%%", "%").split())


def _enum_choices(annotation: str) -> tuple[str, ...] | None:
    """The values of an enum named in an annotation such as `SchedulerType | str`."""
    name = annotation.split(" | ")[0]
    return tuple(_enum_members(name).values()) or None if name.endswith(("Type", "Strategy", "Names")) else None


@functools.cache
def _enum_members(name: str) -> dict[str, Any]:
    for file in ("trainer_utils.py", "training_args.py"):
        for node in source("transformers", file).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return {getattr(n.targets[0], "id", ""): n.value.value for n in node.body
                        if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)}  # fmt: skip
    return {}
