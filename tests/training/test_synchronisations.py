"""How often a step waits for the GPU: counted on the `meta` device, which can't be read, so that whatever reads it shows.

The model and its batches are on `meta`; what the collator knows is on the CPU. A GPU is waited for by a value that is read
(`.item()`, `bool()`, `tolist()`), by a shape that depends on values (`nonzero`, boolean masks), and by a copy that the
host waits for. Tensors on `meta` have no values, so `Waits` counts these calls and makes up what they return.
"""

import contextlib
import dataclasses
import traceback
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from trl import DPOTrainer

from rlhf.config.recipe import load_recipe
from rlhf.distributed.topology import topology_of_environment
from rlhf.packing import PackedCollator
from rlhf.packing.collate import KEY
from rlhf.training import step_metrics
from rlhf.training import trainer as trainer_module
from rlhf.training.dpo import DPO
from rlhf.training.plan import make_plan
from rlhf.training.reward import REWARD
from rlhf.training.sft import SFT

META = torch.device("meta")
STAGES = {"sft": SFT, "reward": REWARD, "dpo": DPO}
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Counts, by the line that asks, the calls for which the host would wait for the device of `meta` tensors."""

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        here = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = [x for x in here if x.device == META]
        if func is aten._to_copy.default and (kwargs.get("device") == META) != bool(on_device) and "device" in kwargs:
            if on_device:
                return self._note("to the host", torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype))
            if not kwargs.get("non_blocking"):
                self._note("a copy from the host that is waited for", None)
            return func(*args, **kwargs)
        if not on_device:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self._note("a value", 1.0 if args[0].is_floating_point() else 1)
        if func in (aten.equal.default, aten.is_nonzero.default):
            return self._note("a value", True)
        if func is aten.nonzero.default:
            return self._note("nonzero", args[0].new_empty((1, args[0].dim()), dtype=torch.int64))
        if func is aten.masked_select.default:
            return self._note("a masked selection", args[0].new_empty(1))
        if func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1]):
            return self._note("a boolean index", args[0].new_empty(1, *args[0].shape[args[1][0].dim() :]))
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        if tags & set(func.tags) and func is not aten.index.Tensor:  # by integers: it has the shape of these
            self._note(str(func), None)
        return func(*args, **kwargs)

    def _note(self, what, value):
        lines = [x for x in traceback.extract_stack() if "/torch/" not in x.filename and x.filename != __file__]
        self.calls.append(f"{what}: {Path(lines[-1].filename).name}, {lines[-1].line}")
        return value


@pytest.fixture
def on_meta(recipe, tiny_llama, few_pairs, tmp_path, monkeypatch):
    """on_meta(stage, **values) -> a trainer of a recipe whose model and batches are on `meta`."""

    def make(stage, **values):
        values = {
            "per_device_train_batch_size": None,
            "global_batch_size": 6,
            "max_tokens_per_device": 100_000,
        } | values
        file = Path(recipe(stage, model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "out"), **values))  # fmt: skip
        file.write_text("".join(x for x in file.read_text().splitlines(True) if not x.endswith(" null\n")))
        plan = make_plan(STAGES[stage], load_recipe(str(file), stage), topology_of_environment())
        trainer = STAGES[stage].build(plan, None)
        assert isinstance(trainer.data_collator if stage != "dpo" else trainer.data_collator.collate, PackedCollator)
        trainer._start_checked = True
        for model in filter(None, (trainer.model, getattr(trainer, "ref_model", None))):
            model.to(META)
        monkeypatch.setattr(type(trainer.args), "device", property(lambda self: META))
        monkeypatch.setattr(Accelerator, "device", property(lambda self: META))
        enabled = torch.is_autocast_enabled
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cuda": kind != "meta" and enabled(kind))
        from trl.trainer import utils

        monkeypatch.setattr(utils, "_use_triton", lambda device: True)  # as on a GPU: only answer tokens are scored
        trainer.model.train()
        return trainer

    return make


def step_of(trainer, max_tokens):
    trainer.global_batch = dataclasses.replace(trainer.global_batch, max_tokens_per_device=max_tokens)
    return next(iter(trainer.get_train_dataloader()))


def waits(compute):
    """The calls for which `compute` would wait for a GPU."""
    with Waits() as found, contextlib.suppress(NotImplementedError):
        compute()
    return found.calls


READ = "to the host: deferred.py"  # the metrics of all micro-batches of a step, in one copy
HELDOUT = {
    "eval_dataset_name": "embedded:sample", "dataset_test_split": "heldout", "max_eval_examples": 7, "eval_strategy": "steps", "eval_steps": 2,
}  # fmt: skip
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}


@pytest.mark.parametrize(
    "stage, values",
    [
        ("sft", LORA), ("reward", {}), ("dpo", LORA), ("sft", {"gradient_checkpointing": True}), ("dpo", {"reference": "online"}),
        ("dpo", LORA | {"reference": "online", "loss_type": ["sigmoid", "sft", "ipo"]}),
        ("dpo", LORA | {"ld_alpha": 0.5, "use_weighting": True}),
    ],
)  # fmt: skip
def test_a_step_waits_once(stage, values, on_meta):
    """For the metrics, however many micro-batches it has: none of them waits."""
    trainer = on_meta(stage, **values)
    for max_tokens, several in ((100_000, False), (520, True)):
        step = step_of(trainer, max_tokens)
        assert (len(step["micro_batches"]) > 2) == several
        calls = waits(lambda step=step: trainer.training_step(trainer.model, step))
        assert [call[: len(READ)] for call in calls] == [READ], calls
        assert trainer._metrics["train"]["num_tokens"] and trainer._metrics["train"]["tokens_per_second"]


@pytest.mark.parametrize("stage", STAGES)
def test_batches_of_trl_wait_when_they_are_logged(stage, on_meta):
    """Without a global batch: three micro-batches of gradient accumulation, then the log."""
    trainer = on_meta(stage, **LORA, global_batch_size=None, max_tokens_per_device=None, per_device_train_batch_size=2)
    trainer.current_gradient_accumulation_steps = 3
    columns = trainer._signature_columns or trainer._set_signature_columns_if_needed() or trainer._signature_columns
    rows = trainer.train_dataset.select_columns([c for c in trainer.train_dataset.column_names if c in columns])
    for start in (0, 2, 4):
        batch = trainer.data_collator([rows[start], rows[start + 1]])
        assert waits(lambda batch=batch: trainer.training_step(trainer.model, batch)) == []
    calls = waits(lambda: trainer.log({}))
    assert [call[: len(READ)] for call in calls] == [READ], calls


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_of_an_evaluation_do_not_wait(stage, on_meta):
    """Its steps do, to add up their losses and labels; at its end the metrics are read once."""
    trainer = on_meta(stage, **LORA, **HELDOUT)
    loader = trainer.get_eval_dataloader()
    found = []
    for max_tokens in (100_000, 520):
        trainer.global_batch = dataclasses.replace(trainer.global_batch, max_tokens_per_device=max_tokens)
        found.append(waits(lambda: trainer.evaluation_loop(loader, "Evaluation")))
    assert found[0] == found[1] and sum(READ in call for call in found[0]) == 1
    steps = -(-len(loader.dataset) // 6)
    assert sum("torch.stack(losses)" in call for call in found[0]) == steps
    assert len(found[0]) == 2 + steps * (2 if stage == "sft" else 1)  # and the loss of all
    assert len(trainer._metrics["eval"]) >= 3


def test_what_is_put_back_is_counted(on_meta, monkeypatch):
    """This test would see it: a metric that is read, TRL's as they are, a layout of the forward pass, a boolean mask."""
    trainer = on_meta("dpo", **LORA)
    step = step_of(trainer, 520)
    run = lambda: waits(lambda: trainer.training_step(trainer.model, step))  # noqa: E731

    with monkeypatch.context() as patch:
        compute = DPOTrainer.compute_loss
        patch.setattr(DPOTrainer, "compute_loss", lambda *a, **k: (loss := compute(*a, **k), loss.item())[0])
        assert sum(call.startswith("a value: ") for call in run()) == len(step["micro_batches"]) > 2

    with monkeypatch.context() as patch:
        patch.setattr(step_metrics, "deferring", lambda *a: contextlib.nullcontext())
        patch.setattr(DPOTrainer, "log", lambda *a: None)
        patch.setattr(trainer.accelerator, "gather_for_metrics", lambda x: getattr(x, "plain", x))
        calls = run()
        assert sum("dpo_trainer.py" in call for call in calls) >= 13 * len(step["micro_batches"]), calls

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "known_inputs", lambda batch: {k: v for k, v in batch.items() if k != KEY})
        calls = [call for call in run() if READ not in call]
        assert {call.split(": ")[1].split(",")[0] for call in calls} >= {"layout.py", "utils.py", "dpo_trainer.py"}, (
            calls
        )
