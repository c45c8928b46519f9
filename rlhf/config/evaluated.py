"""Which models an evaluate recipe measures, and who judges their answers: `models`, `judge` and the keys of the stages.

A model has a label: `base`, `sft` and `dpo` are those of `base_model`, `sft_model` and `dpo_model`; under `models` it is
given (`{label: model}`) or the end of its name. Checked without torch, with the place of the key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

from rlhf.errors import UserError, quote

ROLES = ("base", "sft", "dpo")
# A label is also a key of answers.jsonl, beside its own `LABEL_cut` and `LABEL_reward`, and a part of a file's name.
LABEL = re.compile(r"(?!.*_(cut|reward)$)[\w.+/@:-]([\w.+/@: -]{0,78}[\w.+/@:-])?")
TAKEN = ("row", "prompt", "tools", "chat_template_kwargs", "reward", "judged")
EXPORTS = ("alpaca_eval", "arena_hard")


@dataclass(frozen=True)
class RewardJudge:
    """A reward model that judges answers: the higher score wins."""

    label: str
    model: str


@dataclass(frozen=True)
class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint, asked in both orders which answer is better.

    Attributes:
        endpoint: its address up to `/v1`.
        api_key_env: name of the environment variable with the key; the key itself stands nowhere.
        template: a Jinja file with `prompt`, `first` and `second`; None for our own.
        parameters: of the request, beside model and messages; one that is null is left out.
        usd_per_million_tokens: of input and of output, for the estimate of costs.
    """

    label: str
    endpoint: str
    model: str
    api_key_env: str | None = None
    template: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 120.0
    retries: int = 6
    concurrency: int = 8
    max_calls: int | None = None
    usd_per_million_tokens: tuple[float, float] | None = None


Where = Callable[[str], str]
_NUMBERS: dict[str, tuple[Any, float, float]] = {"timeout_s": (float, 0.1, 3600), "retries": (int, 0, 100), "concurrency": (int, 1, 256), "max_calls": (int, 1, 1e9)}  # fmt: skip
_TEXTS = ("label", "endpoint", "model", "api_key_env", "template")


def policies_of(values: dict[str, Any], where: Where = str) -> dict[str, str]:
    """The policies to measure: model by label, the stages' first.

    Raises:
        UserError: with the place of `models`.
    """
    found = {role: values[f"{role}_model"] for role in ROLES if values.get(f"{role}_model")}
    given, place = values.get("models"), where("models")
    if given is None:
        return found
    if isinstance(given, list):
        given = dict(zip(_labels(given, place), given, strict=True))
    elif not given or not all(isinstance(text, str) and text for pair in given.items() for text in pair):
        raise UserError(f"{place}: models is {quote(given)}; expected names of models, or `label: model` for each")
    for label, name in given.items():
        _check_label(label, place)
        if label in found:
            raise UserError(f"{place}: models names {quote(label)}, and so does {label}_model; remove one")
        found[label] = os.path.expanduser(name)
    return {label: found[label] for label in (*(r for r in ROLES if r in found), *(x for x in found if x not in ROLES))}


def model_keys(values: dict[str, Any], where: Where = str) -> dict[str, str]:
    """The model by its key in results and provenance: `sft_model`, `models.LABEL`, `reward_model`, `judge.LABEL`."""
    keys = {key_of_policy(label, values): name for label, name in policies_of(values, where).items()}
    if values.get("reward_model"):
        keys["reward_model"] = values["reward_model"]
    for judge in judges_of(values, where):
        if isinstance(judge, RewardJudge):
            keys[f"judge.{judge.label}"] = judge.model
    return keys


def key_of_policy(label: str, values: dict[str, Any]) -> str:
    """`sft_model` for `sft`, also if `models` names it; `models.LABEL` for any other."""
    return f"{label}_model" if label in ROLES else f"models.{label}"


def recipe_key(key: str, values: dict[str, Any]) -> str:
    """The recipe's key that a key of `model_keys` comes from."""
    return key if key in values else "judge" if key.startswith("judge.") else "models"


def judges_of(values: dict[str, Any], where: Where = str) -> list[RewardJudge | EndpointJudge]:
    """The judges that `judge` names; not `reward_model`, which judges too.

    Raises:
        UserError: with the place of `judge`.
    """
    given, place = values.get("judge"), where("judge")
    if given is None:
        return []
    given = given if isinstance(given, list) else [given]
    if not given or not all(isinstance(item, dict) or (isinstance(item, str) and item) for item in given):
        raise UserError(
            f"{place}: judge is {quote(values['judge'])}; expected a reward model, an endpoint, or a list of them"
        )
    given = [item if isinstance(item, dict) else {"model": item} for item in given]
    for item in given:
        _check_judge(item, place)
    labels = _labels([item["model"] for item in given], place, taken=())
    found: list[RewardJudge | EndpointJudge] = []
    for item, label in zip(given, labels, strict=True):
        label = item.get("label", label)
        if "endpoint" not in item:
            found.append(RewardJudge(label, os.path.expanduser(item["model"])))
            continue
        prices = item.get("usd_per_million_tokens")
        settings = {key: value for key, value in item.items() if key not in ("label", "usd_per_million_tokens")}
        settings |= {"template": os.path.expanduser(item["template"])} if item.get("template") else {}
        found.append(EndpointJudge(label, **settings, usd_per_million_tokens=tuple(prices) if prices else None))
    if repeated := [judge.label for judge in found if [j.label for j in found].count(judge.label) > 1]:
        raise UserError(f"{place}: two judges are called {quote(repeated[0])}; give each a `label`")
    return found


def _labels(names: list[Any], place: str, taken: tuple[str, ...] = (*ROLES, *TAKEN)) -> list[str]:
    """The shortest end of each name that no other has: `runs/a/dpo` and `runs/b/dpo` -> `a/dpo`, `b/dpo`."""
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{place}: {quote(names)}: expected names of models")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{place}: {quote(repeated[0])} is named twice; give each a label of its own")
    parts = [[p for p in PurePath(name.removeprefix("embedded:")).parts if p != "/"] or [name] for name in names]
    found = []
    for i, own in enumerate(parts):
        size = 1
        end = lambda p, size: "/".join(p[-size:])  # noqa: E731
        others = [p for j, p in enumerate(parts) if j != i]
        while size < len(own) and (end(own, size) in taken or end(own, size) in [end(p, size) for p in others]):
            size += 1
        label = end(own, size)
        label = f"./{label}" if label in taken else label
        found.append(label if LABEL.fullmatch(label) else f"model {i + 1}")
    return found


def _check_label(label: str, place: str) -> None:
    if label in TAKEN or not LABEL.fullmatch(label):
        raise UserError(
            f"{place}: models: {quote(label)} can't be a label: expected letters, digits and . + / @ : - or spaces inside, "
            f"not {', '.join(TAKEN)}, and not an end in _cut or _reward"
        )


def _check_judge(item: dict[str, Any], place: str) -> None:
    known = {field for field in EndpointJudge.__dataclass_fields__} if "endpoint" in item else {"model", "label"}
    if "api_key" in item:
        raise UserError(
            f"{place}: judge: a key does not belong into a recipe, which is copied into every run folder; put it into an "
            "environment variable and name that: `api_key_env: NAME`"
        )
    for key in item:
        if key not in known:
            what = "an endpoint" if "endpoint" in item else "a reward model (an endpoint has `endpoint`)"
            raise UserError(f"{place}: judge: unknown key {quote(key)} of {what}; expected {', '.join(sorted(known))}")
    for key in ("model", "endpoint") if "endpoint" in item else ("model",):
        if not isinstance(item.get(key), str) or not item[key]:
            raise UserError(f"{place}: judge: `{key}` is {quote(item.get(key))}; expected a name")
    for key in _TEXTS:
        if key in item and not (isinstance(item[key], str) and item[key]):
            raise UserError(f"{place}: judge: {key} is {quote(item[key])}; expected a text")
    if "label" in item:
        _check_label(item["label"], place)
    if "endpoint" in item:
        _check_endpoint(item, place)


def _check_endpoint(item: dict[str, Any], place: str) -> None:
    try:
        address = urlsplit(item["endpoint"])
        usable = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:
        usable = False
    if not usable or address.username is not None or address.query or address.fragment:
        raise UserError(
            f"{place}: judge: endpoint is {quote(re.sub(r'//[^/]*@', '//…@', item['endpoint']).split('?')[0])}; expected an "
            "address such as https://api.openai.com/v1 or http://localhost:8000/v1, without user, password or query"
        )
    if "api_key_env" in item and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", item["api_key_env"]):
        raise UserError(f"{place}: judge: api_key_env is no name of an environment variable (is it the key itself?)")
    for key, (kind, low, high) in _NUMBERS.items():
        value = item.get(key, low)
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value <= high:
            what = "an integer" if kind is int else "a number"
            raise UserError(f"{place}: judge: {key} is {quote(value)}; expected {what} from {low:g} to {high:g}")
    prices = item.get("usd_per_million_tokens", [0, 0])
    if not isinstance(prices, list) or len(prices) != 2 or not all(
        isinstance(p, (int, float)) and not isinstance(p, bool) and p >= 0 for p in prices
    ):  # fmt: skip
        raise UserError(f"{place}: judge: usd_per_million_tokens is {quote(prices)}; expected [of input, of output]")
    parameters = item.get("parameters", {})
    if not isinstance(parameters, dict) or {"model", "messages", "stream", "n"} & set(parameters):
        raise UserError(
            f"{place}: judge: parameters is {quote(parameters)}; expected a mapping such as `{{temperature: 0}}`, without "
            "model, messages, stream and n"
        )


def check_evaluated(values: dict[str, Any], path: str, where: Where) -> None:
    """Check models, judges and what refers to them.

    Raises:
        UserError: nothing to evaluate, or a key without effect.
    """
    policies, judges = policies_of(values, where), judges_of(values, where)
    by_stage = values.get("sft_model") and values.get("dpo_model")
    if not (by_stage or values.get("reward_model") or values.get("models") or (policies and values.get("benchmarks"))):
        raise UserError(
            f"{path}: nothing to evaluate; set 'sft_model' and 'dpo_model' and/or 'reward_model', or 'models'"
        )
    answering = [label for label in policies if label != "base" or not values.get("base_model")]
    if judges and len(answering) < 2:
        raise UserError(
            f"{where('judge')}: 'judge' has no effect on the answers of one model; add the other to 'models'"
        )
    for judge in judges:
        if isinstance(judge, RewardJudge) and judge.model == values.get("reward_model"):
            raise UserError(
                f"{where('judge')}: {judge.model} is the reward_model, which judges already; remove it here"
            )
    baseline = values.get("baseline")
    if baseline is not None and baseline not in answering:
        raise UserError(f"{where('baseline')}: baseline is {quote(baseline)}; expected one of {', '.join(answering)}")


def baseline_of(values: dict[str, Any]) -> str:
    """The policy that the others are compared with: `baseline`, else SFT's, else the first of `models`."""
    policies = policies_of(values)
    answering = [label for label in policies if label != "base" or not values.get("base_model")]
    return values.get("baseline") or ("sft" if "sft" in policies else answering[0] if answering else "")
