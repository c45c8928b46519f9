"""Metrics that are read later: the numbers of TRL's own expressions, in one collective."""

import ast
import contextlib
import inspect
import textwrap
from pathlib import Path

import pytest
import torch
from trl import DPOTrainer, RewardTrainer, SFTTrainer

from rlhf.packing.known import Known
from rlhf.training import step_metrics
from rlhf.training.deferred import Pending, deferring


class Ranks:
    """An accelerator of `world` ranks, all of which have the values of this one times 1, 2, ..."""

    def __init__(self, world, truncates=False):
        self.world, self.calls = world, 0
        self.gradient_state = type("", (), {"end_of_dataloader": truncates, "remainder": 1 if truncates else 0})()

    def gather(self, x):
        self.calls += 1
        x = x[None] if x.dim() == 0 else x
        return torch.cat([x * rank for rank in range(1, self.world + 1)])

    def gather_for_metrics(self, x):
        found = self.gather(x)
        return found[: self.gradient_state.remainder] if self.gradient_state.end_of_dataloader else found


def trl(accelerator, sums, counts, rewards):
    """Expressions of TRL 1.16's losses."""
    gathered = accelerator.gather_for_metrics(sums).sum()
    total = accelerator.gather_for_metrics(counts).sum()
    found = {"entropy": (gathered / total).item() if total > 0 else 0.0}
    a, b = accelerator.gather_for_metrics(sums).sum().item(), accelerator.gather_for_metrics(counts).sum().item()
    found["logits"] = a / b if b > 0 else 0.0
    all_rewards = accelerator.gather(rewards)
    found |= {"min": all_rewards.min().item(), "mean": all_rewards.mean().item(), "max": all_rewards.max().item()}
    found["margin"] = accelerator.gather_for_metrics(rewards.mean()).mean().item()
    tokens = 0
    for _ in range(3):
        tokens += accelerator.gather_for_metrics(counts).sum().item() // 2
    return found | {"tokens": tokens}


@pytest.mark.parametrize("count", [7, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("world", [1, 3])
def test_the_same_numbers(world, dtype, count):
    torch.manual_seed(0)
    values = torch.randn((), dtype=dtype), torch.tensor(count), torch.randn(6, 1, dtype=dtype)
    want = trl(Ranks(world), *values)
    later, ranks = Ranks(world), Ranks(world)
    for counts in (values[1], Known.of(values[1], values[1])):
        ranks.calls = 0
        pending = Pending(ranks.gather)
        with deferring(later, pending):
            found = trl(later, values[0], counts, values[2])
        assert ranks.calls == later.calls == 0
        found = {name: getattr(value, "value", value) for name, value in found.items()}
        assert found == want and {name: type(x) for name, x in found.items()} == {
            name: type(x) for name, x in want.items()
        }
        assert ranks.calls == 1 and later.calls == 0


@pytest.mark.parametrize("trainer, number", [(SFTTrainer, 2), (RewardTrainer, 0), (DPOTrainer, 4)])
def test_trl_compares_counts_only_as_divide_does(trainer, number):
    """`a / b if b > 0 else 0.0`, and no other branch on a count: `bool(count > 0)` is True without reading it."""
    source = inspect.getsource(getattr(trainer, "_compute_loss", trainer.compute_loss))
    tree, found = ast.parse(textwrap.dedent(source)), 0
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.IfExp, ast.If))
            and isinstance(node.test, ast.Compare)
            and isinstance(node.test.ops[0], ast.Gt)
        ):
            assert isinstance(node, ast.IfExp) and ast.unparse(node.orelse) == "0.0", ast.unparse(node)
            assert (
                ast.unparse(node.body).removesuffix(".item()").strip("()").endswith(f"/ {ast.unparse(node.test.left)}")
            )
            found += 1
    assert found == number


def test_alone_nothing_is_gathered():
    accelerator = Ranks(1)
    with deferring(accelerator, Pending()):
        found = accelerator.gather(torch.tensor([3.0, 4.0]))
    assert found.mean().item().value == 3.5 and accelerator.calls == 0
    assert accelerator.gather(torch.ones(1)).tolist() == [1.0]  # as it was, after the block


def test_what_can_not_wait_is_read():
    """A branch that is no check of a count, a shape, a function of torch: TRL may come to use them."""
    pending = Pending(Ranks(2).gather)
    x = pending.add(torch.tensor([1.0, -2.0]))
    assert x.shape == (4,) and torch.cat([x, torch.ones(1)]).tolist() == [1, -2, 2, -4, 1] and x[1] == -2
    total = pending.add(torch.tensor(0)).sum()
    assert bool(total > 0)  # not read: `divide` knows
    assert not total > 1 and not total.item() != 0 and total.item() == 0 and not total.item()
    assert int(total) == 0 and float(total + 1) == 1 and -(3 - total).item().value == -3


def test_only_a_count_is_taken_to_be_more_than_zero():
    """Another value's sign is read: it may decide something else than a division."""
    pending = Pending(Ranks(2).gather)
    numbers, mask = pending.add(torch.tensor([0.0, 0.0])), pending.add(torch.tensor([False, False]))
    assert bool(mask.sum().item() > 0) and pending.num_added == 2  # not read
    assert not numbers.sum() > 0 and pending.num_added == 0
    for x in (
        pending.add(torch.tensor(0)).float().sum(),
        pending.add(torch.tensor([0])).max(),
        pending.add(torch.tensor(-1.0)).sum(),
    ):
        assert not x > 0
    assert not pending.add(torch.tensor(0)).sum() - 1 > 0 and not mask.sum() / 2 > 0


def test_rows_that_a_last_batch_repeats_are_dropped_at_once():
    accelerator = Ranks(2, truncates=True)
    pending = Pending(accelerator.gather)
    with deferring(accelerator, pending):
        assert accelerator.gather_for_metrics(torch.tensor([4.0, 5.0])).tolist() == [4.0]
        later = accelerator.gather(torch.tensor([4.0, 5.0]))
    assert later.value.tolist() == [4, 5, 8, 10]


def test_a_long_sum_is_no_deep_recursion():
    pending, total = Pending(), 0
    for _ in range(5000):
        total += pending.add(torch.tensor(2)).sum().item()
    assert total.value == 10_000


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
@pytest.mark.parametrize("batches", ["global", "trl"])
def test_a_run_logs_the_same(stage, batches, recipe, tiny_llama, few_pairs, tmp_path, monkeypatch):
    """With TRL's own reading per micro-batch and with ours: every logged number, to the last bit."""
    from rlhf.__main__ import main
    from rlhf.runs.metrics import read_metrics

    split = {"global_batch_size": 5, "max_tokens_per_device": 520, "per_device_train_batch_size": None}
    if batches == "trl":
        split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "per_device_eval_batch_size": 2}
    found = []
    for name in ("later", "now"):
        file = Path(recipe(
            stage, name=name, model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / name), max_steps=4,
            logging_steps=2, use_peft=True, lora_r=4, lora_target_modules="all-linear", eval_dataset_name="embedded:sample",
            dataset_test_split="heldout", max_eval_examples=7, eval_strategy="steps", eval_steps=2, **split,
        ))  # fmt: skip
        file.write_text("".join(x for x in file.read_text().splitlines(True) if not x.endswith(" null\n")))
        if name == "now":
            monkeypatch.setattr(step_metrics, "deferring", lambda *a: contextlib.nullcontext())
        assert main([stage, str(file)]) == 0
        found.append([
            {k: v for k, v in row.items() if k != "time" and not any(w in k for w in ("runtime", "per_second", "flos", "memory", "accuracies_"))}
            for row in read_metrics(tmp_path / name)
        ])  # fmt: skip
    assert found[0] == found[1] and sum(len(row) for row in found[0]) > 30
