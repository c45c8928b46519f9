"""What an evaluate recipe asks for beyond its held-out pairs: `reward_benchmarks` and `benchmarks`."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.recipe import Recipe
from rlhf.config.stage_config import EvaluateConfig
from rlhf.distributed.processes import is_main
from rlhf.evaluation.benchmarks import Benchmarks, compare, find_benchmarks, folder_digest, item_lines, measure_model
from rlhf.evaluation.measure import free_memory, load_model
from rlhf.evaluation.partial import Measured
from rlhf.evaluation.reward_bench_files import Benchmark, read_benchmark
from rlhf.evaluation.reward_measures import score_benchmark
from rlhf.files import write_file
from rlhf.runs.results import POLICIES


@dataclass
class Extras:
    """The benchmarks of a recipe.

    Attributes:
        reward: those of the reward model, read.
        inputs: what they are, for the record of the run and the keys of what was measured.
    """

    config: EvaluateConfig
    where: Callable[[str], str]
    reward: list[Benchmark]
    inputs: dict[str, str]
    tasks: Benchmarks | None = None

    def find_tasks(self) -> None:
        """Find the tasks of `benchmarks` and read their data: seconds, and perhaps a download.

        Raises:
            UserError: see `find_benchmarks`.
        """
        config = self.config
        if config.benchmarks and self.tasks is None:
            self.tasks = find_benchmarks(
                config.benchmarks, config.benchmark_tasks, config.benchmark_limit, self.where
            )  # fmt: skip

    def measure(self, names: dict[str, str], measured: Measured) -> dict[str, Any]:
        """The results of all benchmarks, by key of results.json, and their items' files. A collective.

        Args:
            names: folders of the models, by recipe key.

        Raises:
            Stopped: a stop was requested; what has been computed is kept.
        """
        self.find_tasks()
        return self._measure_reward(names, measured) | self._measure_tasks(names, measured)

    def _measure_reward(self, names: dict[str, str], measured: Measured) -> dict[str, Any]:
        if not self.reward:
            return {}
        from rlhf.inference.score import pack
        from rlhf.models.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(names["reward_model"], encoder=True)

        def load() -> Any:
            model = load_model(names["reward_model"], self.config, True)
            pack(model)  # however long its rows are
            return model

        results, lines = [], []
        for benchmark in self.reward:
            found, own = score_benchmark(benchmark, tokenizer, load, measured)
            results.append(found)
            lines += own
            free_memory()
        _write(measured.folder / "reward_benchmarks.jsonl", lines)
        return {"reward_benchmarks": results}

    def _measure_tasks(self, names: dict[str, str], measured: Measured) -> dict[str, Any]:
        if self.tasks is None:
            return {}
        from rlhf.models.tokenizer import load_tokenizer

        policies = [short for short in POLICIES if f"{short}_model" in names]
        tokenizers = {short: load_tokenizer(names[f"{short}_model"]) for short in policies}
        with_template = all(getattr(tokenizer, "chat_template", None) for tokenizer in tokenizers.values())
        results = {}
        for short in policies:
            name = names[f"{short}_model"]
            results[short] = measure_model(
                self.tasks, short, functools.partial(load_model, name, self.config, False), tokenizers[short],
                self.config.batch_size, with_template, measured,
            )  # fmt: skip
            free_memory()
        if not is_main():
            return {}
        _write(measured.folder / "benchmarks.jsonl", item_lines(results))
        return {"benchmarks": compare(results, self.tasks, with_template)}


def read_extras(recipe: Recipe, config: EvaluateConfig) -> Extras:
    """Read what the recipe asks for, as far as it takes no time.

    Raises:
        UserError: a file of `reward_benchmarks` can't be used.
    """
    reward = [read_benchmark(name, recipe.where("reward_benchmarks")) for name in config.reward_benchmarks or ()]
    inputs = {f"reward_benchmark {benchmark.name}": benchmark.digest for benchmark in reward}
    if config.benchmarks:
        installed = importlib.util.find_spec("lm_eval") is not None
        version = importlib.metadata.version("lm_eval") if installed else "not installed"
        inputs["benchmarks"] = f"lm_eval {version} {folder_digest(config.benchmark_tasks)}"
    return Extras(config, recipe.where, reward, inputs)


def _write(path: Path, lines: Any) -> None:
    if is_main():
        write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
