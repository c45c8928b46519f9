"""What an evaluation says about its reward model beyond accuracy: calibration, length bias, subsets, RewardBench."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from rlhf.evaluation.calibration import calibration
from rlhf.evaluation.length_bias import length_bias
from rlhf.evaluation.partial import Measured
from rlhf.evaluation.reward_bench_files import Benchmark
from rlhf.evaluation.statistics import compare
from rlhf.evaluation.subsets import by_subset

HUGE = 1_000_000  # tokens: what transformers writes for a tokenizer without a limit


def about_rewards(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Calibration, length bias and accuracy by subset of the reward model that scored the pairs.

    Args:
        pairs: each with `reward`: {"chosen", "rejected": scores, "longer": tokens of chosen minus those of rejected}, and
            perhaps `subset`.

    Returns:
        {"calibration": `calibration`, "length": `length_bias`, "subsets": `by_subset`}, without what was not recorded.
    """
    scored = [pair for pair in pairs if "reward" in pair]
    if not scored:
        return {}
    margins = [pair["reward"]["chosen"] - pair["reward"]["rejected"] for pair in scored]
    found: dict[str, Any] = {"calibration": calibration(margins)}
    if all("longer" in pair["reward"] for pair in scored):
        found["length"] = length_bias(margins, [pair["reward"]["longer"] for pair in scored])
    found["subsets"] = by_subset([pair.get("subset") for pair in scored], [compare(m, 0.0) for m in margins])
    return found


def score_benchmark(
    benchmark: Benchmark, tokenizer: Any, load: Callable[[], Any], measured: Measured
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score all answers of a benchmark with a reward model. A collective.

    Args:
        load: the reward model, called only if a score is missing.

    Returns:
        (results: `Benchmark.results` and "cut": answers longer than the tokenizer's limit, cut on the right as RewardBench
        does; `Benchmark.lines`)
    """
    from rlhf.inference.score import encode_answer, scores, token_batches

    asked = [(question, answer) for question in benchmark.questions for answer in question.answers]
    rows = [encode_answer(tokenizer, question.prompt, answer) for question, answer in asked]
    limit = tokenizer.model_max_length if tokenizer.model_max_length < HUGE else None
    cut = sum(len(row) > limit for row in rows) if limit else 0
    rows = [row[:limit] for row in rows]
    model = functools.cache(load)
    batches = token_batches({i: len(row) for i, row in enumerate(rows)})
    found = measured.compute(
        f"reward: {benchmark.name}", batches, lambda batch: scores(model(), tokenizer, [rows[i] for i in batch])
    )
    flat, own = [found[i] for i in range(len(rows))], []
    for question in benchmark.questions:
        own.append(flat[: len(question.answers)])
        del flat[: len(question.answers)]
    return benchmark.results(own) | {"cut": cut}, list(benchmark.lines(own))
