"""Measure the models of an evaluation: log-probabilities and scores of the pairs, answers and their scores.

Imports torch only in functions, so that `rlhf evaluate --check` starts at once.
"""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass, field
from typing import Any

from rlhf.config.evaluated import RewardJudge, baseline_of, judges_of, key_of_policy, policies_of
from rlhf.config.stage_config import EvaluateConfig
from rlhf.evaluation.partial import Measured


@dataclass
class Subject:
    """A model to measure, before its weights load: the rows as its tokenizer has them.

    Attributes:
        short: a policy's label (`base`, `sft`, `dpo`, or one of `models`), `reward`, or the label of a judge.
        pairs: the pairs, cut to max_length (a reward model's: both answers whole).
        prompts: the prompts that it answers, by row; a reward model's is empty.
        kind: `policy`, `reward` (of reward_model) or `judge`.
        samples: how many of the first prompts it answers by sampling too, for its divergence from the baseline.
        why_no_samples: why its divergence can't be measured; '' if it is, or if nobody asked.
    """

    short: str
    name: str
    tokenizer: Any
    pairs: list[Any]
    prompts: dict[int, list[int]]
    kind: str = "policy"
    samples: int = 0
    why_no_samples: str = ""


@dataclass
class Found:
    """What was measured, in the order of the rows.

    Attributes:
        pairs: log-probabilities and rewards of both answers per pair.
        answers: each policy's own answer to each prompt with its reward; other judges' scores in `judged`.
        samples: by policy and row: {"ids", "cut", "logp", "reference_logp"}.
    """

    pairs: list[dict]
    answers: list[dict]
    samples: dict[str, dict[int, dict]] = field(default_factory=dict)


def prepare(rows: list[dict], names: dict[str, str], config: EvaluateConfig) -> list[Subject]:
    """Tokenise the rows for every model, in the order of measurement: the baseline after what samples for it, judges last.

    Args:
        names: the models by their key (`rlhf.config.evaluated.model_keys`).

    Raises:
        UserError: a prompt leaves no room for an answer.
    """
    from rlhf.inference.generate import encode_prompt
    from rlhf.inference.score import encode_pair
    from rlhf.models.tokenizer import load_tokenizer

    values = vars(config)
    baseline = baseline_of(values)
    subjects = []
    for label in policies_of(values):
        name = names[key_of_policy(label, values)]
        tokenizer = load_tokenizer(name)
        asked = config.num_shown if label == "base" and config.base_model else len(rows)
        prompts = {i: encode_prompt(tokenizer, row["prompt"], row) for i, row in enumerate(rows[:asked])}
        pairs: list[Any] = [encode_pair(tokenizer, row, config.max_length) for row in rows]
        subjects.append(Subject(label, name, tokenizer, pairs, prompts))
    reference = next((subject for subject in subjects if subject.short == baseline), None)
    for subject in subjects:
        if reference is None or subject is reference or reference.name == subject.name or not config.kl_prompts:
            continue
        if subject.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
            subject.why_no_samples = f"its tokens are not those of {baseline}"
        elif len(subject.prompts) == len(rows):
            subject.samples = min(config.kl_prompts, len(rows))
    subjects.sort(key=lambda subject: subject is reference)
    judges = [("reward", names["reward_model"], "reward")] if "reward_model" in names else []
    judges += [(j.label, names[f"judge.{j.label}"], "judge") for j in judges_of(values) if isinstance(j, RewardJudge)]
    return subjects + [_judge(rows, *judge) for judge in judges]


def _judge(rows: list[dict], label: str, name: str, kind: str) -> Subject:
    from rlhf.inference.score import SIDES, encode_answer
    from rlhf.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(name, encoder=True)
    pairs = [[encode_answer(tokenizer, row["prompt"], row[side], row) for side in SIDES] for row in rows]
    return Subject(label, name, tokenizer, pairs, {}, kind)


def measure(rows: list[dict], subjects: list[Subject], config: EvaluateConfig, measured: Measured) -> Found:
    """Score the pairs and answer the prompts with every model, one model in memory at a time.

    Raises:
        Stopped: a stop was requested.
    """
    from transformers import set_seed

    set_seed(config.seed)
    pairs: list[dict] = [
        {"row": i, **{key: row[key] for key in ("prompt", "subset", "tools", "chat_template_kwargs") if key in row}}
        for i, row in enumerate(rows)
    ]
    labels = list(policies_of(vars(config)))
    found = Found(pairs, [dict(pair) for pair in pairs])
    for subject in subjects:
        if subject.kind == "policy":
            measure_policy(subject, subjects, config, measured, found)
        else:
            measure_rewards(subject, labels, config, measured, found)
        free_memory()  # the model was a local of these
    for line in (*found.pairs, *found.answers):  # the same lines, whichever model was measured first
        for key in _in_order(line, labels):
            line[key] = line.pop(key)
    return found


def _in_order(line: dict[str, Any], labels: list[str]) -> list[str]:
    """The keys of a line: what is not a policy's, then each policy's, then the judges'."""
    own = [key for label in labels for key in (label, f"{label}_cut") if key in line]
    judged = [key for key in line if key in ("reward", "judged") or key.endswith("_reward")]
    return [key for key in line if key not in own and key not in judged] + own + judged


def measure_policy(
    subject: Subject, subjects: list[Subject], config: EvaluateConfig, measured: Measured, found: Found
) -> None:
    """Add a policy's log-probabilities of the pairs, its answers, and its samples; or, of the baseline, those of others' samples."""
    from rlhf.evaluation.sampled import answer_batches, answer_logps, sample
    from rlhf.inference.generate import generate, prompt_batches
    from rlhf.inference.score import pair_batches, pair_logps

    short, tokenizer, prompts = subject.short, subject.tokenizer, subject.prompts
    model = functools.cache(lambda: _packed(subject.name, config, reward=False))  # not loaded if nothing is missing
    logps = measured.compute(
        f"{short}: pairs",
        pair_batches(subject.pairs, len(tokenizer)),
        lambda batch: pair_logps(model(), [subject.pairs[i] for i in batch]),
    )
    texts = measured.compute(
        f"{short}: answers",
        prompt_batches(prompts, config.batch_size),
        lambda batch: generate(model(), tokenizer, [prompts[i] for i in batch], config),
    )
    for i, value in logps.items():
        found.pairs[i][short] = value
    for i, (text, is_cut) in texts.items():
        found.answers[i] |= {short: text, f"{short}_cut": is_cut}

    def score(task: str, asked: dict[int, list[int]], samples: dict[int, dict], key: str) -> None:
        answers = {i: one["ids"] for i, one in samples.items()}
        work = lambda batch: answer_logps(model(), [asked[i] for i in batch], [answers[i] for i in batch])  # noqa: E731
        for i, value in measured.compute(task, answer_batches(asked, answers, len(tokenizer)), work).items():
            samples[i][key] = value

    if subject.samples:
        asked = {i: prompts[i] for i in range(subject.samples)}
        found.samples[short] = measured.compute(
            f"{short}: samples",
            prompt_batches(asked, config.batch_size),
            lambda batch: sample(model(), tokenizer, {i: asked[i] for i in batch}, config),
        )
        score(f"{short}: KL", asked, found.samples[short], "logp")
    elif short == baseline_of(vars(config)):
        for other in subjects:
            if other.samples:
                score(f"{short}: KL of {other.short}", other.prompts, found.samples[other.short], "reference_logp")


def measure_rewards(
    subject: Subject, labels: list[str], config: EvaluateConfig, measured: Measured, found: Found
) -> None:
    """Add a reward model's scores to the pairs and to the policies' answers."""
    from rlhf.inference.score import SIDES, encode_answer, scores, token_batches

    tokenizer, is_ours = subject.tokenizer, subject.kind == "reward"
    model = functools.cache(lambda: _packed(subject.name, config, reward=True))
    task = "reward" if is_ours else f"judge {subject.short}"

    def score_pairs(batch: list[int]) -> list[dict[str, float]]:
        found = scores(model(), tokenizer, [subject.pairs[i][side] for side in range(2) for i in batch])
        longer = [len(subject.pairs[i][0]) - len(subject.pairs[i][1]) for i in batch]  # the prompt is the same
        return [
            dict(zip(SIDES, found[at :: len(batch)], strict=True)) | {"longer": longer[at]} for at in range(len(batch))
        ]

    padded = {i: 2 * max(map(len, both)) for i, both in enumerate(subject.pairs)}
    for i, value in measured.compute(f"{task}: pairs", token_batches(padded), score_pairs).items():
        if is_ours:
            found.pairs[i]["reward"] = value
        else:
            found.pairs[i].setdefault("judged", {})[subject.short] = value
    for label in labels:
        asked = {
            i: encode_answer(tokenizer, answer["prompt"], answer[label], answer)
            for i, answer in enumerate(found.answers) if answer.get(label)
        }  # fmt: skip
        score = lambda batch, asked=asked: scores(model(), tokenizer, [asked[i] for i in batch])  # noqa: E731
        batches = token_batches({i: len(ids) for i, ids in asked.items()})
        for i, value in measured.compute(f"{task}: {label}'s answers", batches, score).items():
            if is_ours:
                found.answers[i][f"{label}_reward"] = value
            else:
                found.answers[i].setdefault("judged", {}).setdefault(subject.short, {})[label] = value


def load_model(name: str, config: EvaluateConfig, reward: bool):
    """A finished model on this process's device or devices."""
    from accelerate import PartialState

    from rlhf.models.inference import load_finished

    device = PartialState().device
    model, _ = load_finished(
        name, reward=reward, dtype=_dtype(config, device), device=device, load_in_4bit=config.load_in_4bit
    )
    return model


def _packed(name: str, config: EvaluateConfig, reward: bool):
    """`load_model`, packed if the model can be."""
    from rlhf.inference.score import pack

    model = load_model(name, config, reward)
    pack(model, config.max_length)
    return model


def check_room(names: dict[str, str], config: EvaluateConfig) -> None:
    """Raise UserError if one of the models does not fit on this process's GPUs: before the first one is measured."""
    from accelerate import PartialState

    from rlhf.models.inference import check_bitsandbytes, placement

    if config.load_in_4bit:
        check_bitsandbytes()
    device = PartialState().device
    for name in names.values():
        placement(name, _dtype(config, device), device, config.load_in_4bit)


def _dtype(config: EvaluateConfig, device) -> str | None:
    return config.dtype or (None if device.type == "cuda" else "float32")


def free_memory() -> None:
    """Give the memory of dropped models back: on a GPU to the driver, and never by way of host memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
