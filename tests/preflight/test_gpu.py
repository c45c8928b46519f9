"""`rlhf preflight --gpu` on a CPU: what it measures is true there too, and what is wrong is found."""

import pytest
import torch
from torch import nn

import rlhf.packing.attention as attention
import rlhf.preflight.gpu as gpu
from rlhf.__main__ import main
from rlhf.preflight.equality import (
    LAYOUTS,
    Difference,
    answers_are_apart,
    attend_exactly,
    attend_padded,
    attention_difference,
    differ,
    model_difference,
    visible,
)
from rlhf.preflight.gpu import StepMeasure, StepSize, check_device, equality_rows, pairs, small_llama, step_row

CPU = torch.device("cpu")
ON_CPU = {"kind": "cpu", "problem": ""}


def kernel(query, key, value, plan, scaling, top_left=False, leaks=False):
    """A varlen kernel as documented, causal and aligned to the bottom right; or wrong in one of two ways."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = []
    q_ends, k_ends = plan.cu_seqlens_q.tolist(), plan.cu_seqlens_k.tolist()
    for i in range(len(q_ends) - 1):
        first = 0 if leaks else k_ends[i]
        q = query[q_ends[i] : q_ends[i + 1]].transpose(0, 1).float()
        k, v = (x[first : k_ends[i + 1]].transpose(0, 1).float() for x in (key, value))
        n, m = q.shape[1], k.shape[1]
        sees = torch.arange(m)[None] <= torch.arange(n)[:, None] + (0 if top_left else m - n)
        scores = (q @ k.transpose(1, 2) * scaling).masked_fill(~sees, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype))
    return torch.cat(outputs)


@pytest.fixture
def use_kernel(monkeypatch):
    """Packed attention in half precision through `kernel`, as through a GPU's."""
    return lambda **wrong: monkeypatch.setattr(
        attention, "varlen_kernel", lambda device: lambda *args: kernel(*args, **wrong)
    )


def few(monkeypatch):
    """Fewer cases, where it is not about them."""
    monkeypatch.setattr(gpu, "HEAD_DIMS", (64,))
    monkeypatch.setattr(gpu, "PAIR", gpu.PAIR[1:2])
    monkeypatch.setattr(gpu, "LAYOUTS", {"uneven pairs": LAYOUTS["uneven pairs"]})


@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_is_equal(lengths, dtype, use_kernel):
    for _ in range(2):
        found = attention_difference(lengths, dtype, CPU, 4, 2, 64)
        assert found.equal and 0 < found.packed < (1e-6 if dtype == torch.float32 else 1e-2), found
        use_kernel()  # and once more through it
    assert answers_are_apart(dtype, CPU)


@pytest.mark.parametrize("wrong", ["top_left", "leaks"])
def test_a_wrong_kernel_is_found(wrong, use_kernel, monkeypatch):
    few(monkeypatch)
    use_kernel(**{wrong: True})
    found = {name: attention_difference(lengths, torch.bfloat16, CPU, 4, 2, 64) for name, lengths in LAYOUTS.items()}
    assert not found["uneven pairs"].equal and found["uneven pairs"].packed > 0.1
    assert found["rows"].equal == (
        wrong == "top_left"
    )  # where there are as many queries as keys the corners are the same
    rows = equality_rows(CPU)
    assert [row.status for row in rows] == ["error", "error"]
    assert "packed is off by" in rows[0].findings[0].found and "packing: false" in rows[0].findings[0].fix


def test_answers_that_see_each_other_are_found(monkeypatch):
    def all_of_it(module, query, key, value, mask, scaling, packed_segments):
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(
            1, 2
        ), None

    few(monkeypatch)
    monkeypatch.setattr("rlhf.preflight.equality.attention_forward", all_of_it)
    assert not answers_are_apart(torch.float32, CPU)
    assert "changes the rejected one's attention" in equality_rows(CPU)[0].findings[-1].found


def test_what_is_seen_by_hand():
    """p p c r r: chosen sees the prefix, rejected the prefix and not chosen; another segment nothing of this one."""
    assert visible([(2, 1, 2), (0, 1, 0)]).int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1],
    ]  # fmt: skip
    tensors = [torch.randn(1, 2, 14, 8, dtype=torch.float64) for _ in range(3)]
    lengths = [(4, 3, 2), (0, 2, 3)]
    torch.testing.assert_close(attend_exactly(*tensors, lengths, 0.3), attend_padded(*tensors, lengths, 0.3))


def test_differ_by_hand():
    """Off by 0.3 of 1, padded by 0.1: 2 x 0.1 + 0.05 are allowed. NaN is never equal."""
    one, off, padded = torch.ones(1), torch.tensor([1.3]), torch.tensor([1.1])
    found = differ("case", [one, off], [one, padded], [one, one], ["a", "b"], 0.05)
    assert found.worst == "b" and not found.equal
    assert (found.packed, found.padded, found.allowed) == pytest.approx((0.3, 0.1, 0.25))
    found = differ("case", [one * torch.nan, off], [one, padded], [one, one], ["a", "b"], 0.05)
    assert found.worst == "a" and not found.equal
    assert Difference("", "", 0.2, 0.1, 0.25).equal


def test_a_model_over_a_wrong_kernel_is_found(use_kernel):
    ids, mask = (x[::4] for x in pairs(1, 256))
    for wrong in (False, True):
        use_kernel(top_left=wrong)
        found = model_difference(small_llama(32, 2, 4), ids, mask, "pairs", torch.bfloat16, CPU)
        assert found.equal != wrong
    assert found.worst in ("hidden states", "gradients") and found.packed > 0.1


# --- the table -------------------------------------------------------------------------------------------------------


def test_a_step_by_hand():
    found = StepMeasure(1_000_000_000, 2000, 6e12, 0.01, 0.03, 5.0, 12.0)
    shown = step_row(found, "NVIDIA H200", torch.bfloat16).shown  # 6e12 / 0.01 s = 600 TFLOP/s of 989
    assert (
        shown
        == "1,000 M parameters, 2,000 packed tokens: 200,000 tokens/s, MFU 61%, 3.0x padded; 5.0 GiB, padded 12.0 GiB"
    )
    assert "600.0 TFLOP/s" in step_row(found, "another", torch.bfloat16).shown


def test_a_device_is_checked():
    rows = check_device(CPU, ON_CPU, (StepSize(64, 2, 4, 1, 0),))
    assert [(row.check, row.status) for row in rows] == [
        ("cpu 0", "ok"), ("attention", "ok"), ("packed = padded", "ok"), ("packed = padded", "ok"), ("a step", "ok"),
    ]  # fmt: skip
    assert "48 of 48 cases" in rows[2].shown and "tokens/s" in rows[4].shown
    assert sum(map(sum, gpu.PAIR)) == 2025 and "2,025 packed tokens" in rows[4].shown


def test_a_full_or_broken_gpu_is_reported(monkeypatch):
    cuda = torch.device("cuda", 3)
    monkeypatch.setattr(gpu, "equality_rows", lambda device: [])
    monkeypatch.setattr(gpu, "_kernel_row", lambda device: gpu.Row("attention", "kernel"))
    found = {"kind": "cuda", "problem": "", "name": "NVIDIA L4", "memory": [2**30, 24 * 2**30]}
    assert check_device(cuda, found, gpu.STEP_SIZES)[-1].shown == "not measured: less than 2 GiB are free"
    (row,) = check_device(cuda, {"kind": "cpu", "problem": "CUDA error: out of reach"}, gpu.STEP_SIZES)
    assert row.status == "error" and row.findings[0].found == "cuda 3: CUDA error: out of reach"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpu"], "torch finds no GPU on this machine; without --gpu, preflight checks everything else"),
        (["recipe.yaml", "--gpu"], "--gpu needs nothing else (found 'recipe.yaml'); run: rlhf preflight --gpu"),
        (["--gpu", "--quick"], "--gpu needs nothing else"),
    ],
)
def test_where_it_can_not_run(words, told, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "describe_device", lambda *args: ON_CPU)
    assert main(["preflight", *words]) == 2
    assert told in capsys.readouterr().err


def test_under_a_launcher_it_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["preflight", "--gpu"]) == 2
    assert "without `accelerate launch`" in capsys.readouterr().err


def test_the_whole_command(monkeypatch, capsys):
    """Its table, verdict and exit code, with a CPU in the GPU's place."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    few(monkeypatch)
    real = gpu.check_device
    for wrong, code in ((False, 0), (True, 2)):
        monkeypatch.setattr(gpu, "describe_device", lambda *args: ON_CPU)
        monkeypatch.setattr(gpu, "check_device", lambda *args: real(CPU, ON_CPU, (StepSize(32, 1, 4, 1, 0),)))
        if wrong:
            monkeypatch.setattr(gpu, "answers_are_apart", lambda *args: False)
        assert main(["preflight", "--gpu"]) == code
        shown = capsys.readouterr()
        assert ("Ready." in shown.out) == (not wrong)
        assert ("not ready: 1 error above" in shown.err) == wrong
