"""A round of faults; `make faults N=200` runs more of them."""

import faults
import pytest


@pytest.mark.slow
def test_faults(tiny_llama, few_pairs, tmp_path):
    """Each kind thrice, with one process and with two. Nothing is lost, and nobody has to lend a hand."""
    told = []
    wrong = faults.run_faults(tmp_path, tiny_llama, few_pairs, 27, 2, tell=told.append)
    print("\n".join(told))
    assert wrong == []


def test_a_difference_is_told():
    import torch

    want = ([(1, 0.5), (2, 0.25)], {"w": torch.zeros(2)})
    assert faults.difference(want, want) == ""
    assert faults.difference(want, ([(1, 0.5)], want[1])) == "metrics.jsonl has the steps [1]"
    assert faults.difference(want, ([(1, 0.5), (2, 0.2500001)], want[1])).startswith("the loss of step 2 is 0.2500001")
    assert faults.difference(want, (want[0], {"w": torch.tensor([0.0, 1e-9])})) == "1 weights differ"
