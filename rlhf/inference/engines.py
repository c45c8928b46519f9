"""What generates: transformers in padded batches, its continuous batching, or vLLM where that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf.distributed.processes import world_size
from rlhf.errors import UserError, pip_install
from rlhf.inference.finished import Found, free_memory, load
from rlhf.models.folder import is_adapter

Asked = dict[int, tuple[list[int], int, tuple[int, int]]]  # by item: prompt ids, limit of new tokens, (row, sample)


@dataclass
class Engine:
    """A model that answers.

    Attributes:
        batch_size: answers at a time, of `transformers`; the others decide themselves.
    """

    name: str
    found: Found
    sampling: Any
    batch_size: int
    device: Any
    dtype: str | None
    load_in_4bit: bool
    manager: Any = None  # of continuous batching
    _loaded: Any = None

    def loaded(self) -> Any:
        """(model, tokenizer), loaded at the first call."""
        if self._loaded is None:
            self._loaded = _load_vllm(self) if self.name == "vllm" else load(
                self.found, device=self.device, dtype=self.dtype, load_in_4bit=self.load_in_4bit
            )  # fmt: skip
        return self._loaded

    def drop(self) -> None:
        """Give the memory back."""
        if self.manager is not None:
            self.manager.stop(block=True)
        self._loaded = self.manager = None
        free_memory()

    def batches(self, asked: Asked) -> Iterator[list[int]]:
        """The items in the batches in which they are answered.

        Those of `transformers` have one limit and similar lengths, the longest prompts first: a batch is padded to its longest.
        """
        order = sorted(asked, key=lambda item: (-asked[item][1], -len(asked[item][0]), item))
        if self.name != "transformers":
            yield from [order] if order else []
            return
        batch: list[int] = []
        for item in order:
            if batch and (len(batch) == self.batch_size or asked[item][1] != asked[batch[0]][1]):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def answers(self, asked: Asked, batch: list[int]) -> list[Any]:
        """The answers (`rlhf.inference.sampling.Answer`) to one batch, in its order."""
        if self.name == "vllm":
            return _vllm(self, [asked[item] for item in batch])
        if self.name == "continuous":
            return _continuous(self, [asked[item] for item in batch])
        from rlhf.inference.sampling import answer

        model, tokenizer = self.loaded()
        prompts, draws = [asked[item][0] for item in batch], [asked[item][2] for item in batch]
        return answer(model, tokenizer, prompts, draws, self.sampling, asked[batch[0]][1])


def check_engine(name: str, found: Found, load_in_4bit: bool) -> None:
    """Raise UserError if an engine can't run this model here: before anything loads."""
    if name != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"--engine vllm needs vLLM, which is not installed; run: {pip_install('vllm')}")
    if is_adapter(found.path):
        raise UserError(
            f"--engine vllm takes full models, and {found.name} is an adapter; run: rlhf merge {found.name} OUT_DIR"
        )
    if load_in_4bit:
        raise UserError("--engine vllm and --load_in_4bit don't go together; use --engine transformers")
    if world_size() > 1:
        raise UserError("--engine vllm spreads a model over the GPUs itself; start it without `accelerate launch`")


# --- transformers' continuous batching -------------------------------------------------------------------------------


def _continuous(engine: Engine, asked: list[Any]) -> list[Any]:
    """Requests join and leave the batch at any step. Greedy answers are those of padded batches but for rounding.

    Sampled ones are drawn from one generator, so they depend on which requests run together, and on a resume.
    """
    from rlhf.inference.sampling import read, stops_of

    model, tokenizer = engine.loaded()
    stops = stops_of(model, tokenizer)
    if engine.manager is None:
        engine.manager = _manager(engine, model, tokenizer, stops)
    manager = engine.manager
    for number, (ids, limit, _) in enumerate(asked):
        manager.add_request(input_ids=ids, request_id=f"{number}", max_new_tokens=limit, eos_token_id=stops)
    found: dict[int, Any] = {}
    while len(found) < len(asked):
        request = manager.get_result(timeout=1)
        if request is None and not manager.is_running():
            raise UserError("transformers' continuous batching has stopped; use --engine transformers")
        if request is not None and request.error:
            raise UserError(f"transformers' continuous batching has failed: {request.error}; use --engine transformers")
        if request is not None and request.is_finished():
            found[int(request.request_id)] = read(tokenizer, list(request.generated_tokens), stops)
    return [found[number] for number in range(len(asked))]


def _manager(engine: Engine, model: Any, tokenizer: Any, stops: list[int]) -> Any:
    """transformers' manager, which takes most of the free memory for its cache, so there is one for all blocks."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    sampling = engine.sampling
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, **drawn
    )
    seed = ContinuousBatchingConfig(seed=sampling.seed % 2**31)
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=seed)
    manager.start()
    return manager


# --- vLLM ------------------------------------------------------------------------------------------------------------


def _load_vllm(engine: Engine) -> Any:
    """(vLLM's engine, tokenizer)"""
    import torch
    from vllm import LLM

    from rlhf.models.tokenizer import load_tokenizer

    gpus = max(1, torch.cuda.device_count())
    model = LLM(
        model=engine.found.path, dtype=engine.dtype or "auto", tensor_parallel_size=gpus, seed=engine.sampling.seed
    )
    return model, load_tokenizer(engine.found.path)


def _vllm(engine: Engine, asked: list[Any]) -> list[Any]:
    """Each request has its own seed, which vLLM's own sampler uses: its answers are not those of the other engines."""
    from vllm import SamplingParams

    from rlhf.inference.sampling import Answer

    model, tokenizer = engine.loaded()
    sampling, parameters = engine.sampling, []
    for _, limit, (row, sample) in asked:
        seed = (sampling.seed * 1_000_003 + row * 1_009 + sample) % 2**31
        parameters.append(SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=limit, seed=seed,
            stop_token_ids=[tokenizer.eos_token_id], skip_special_tokens=True,
        ))  # fmt: skip
    out = model.generate([{"prompt_token_ids": one[0]} for one in asked], parameters, use_tqdm=False)
    answers = [request.outputs[0] for request in out]
    return [Answer(one.text.strip(), len(one.token_ids), one.finish_reason == "stop") for one in answers]
