"""The layout of a batch, made where it is collated, and brought to the backbone."""

import pickle

import pytest
import torch

from rlhf.packing import backbone as backbone_module
from rlhf.packing import pack_backbone
from rlhf.packing.collate import KEY, PackedCollator, known_inputs, move_batch, packed_batch
from rlhf.packing.known import Known, plain
from rlhf.packing.layout import packed_layout

META = torch.device("meta")

ROWS = [[5, 6, 7, 0], [5, 6, 8, 9]]
LENGTHS = (3, 4)


def collate(rows):
    ids = torch.tensor(rows)
    mask = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "completion_mask": mask.long() * (ids > 6),
        "margin": torch.ones(1),
    }


@pytest.mark.parametrize("mode", ["pairs", "rows"])
def test_the_layout_is_that_of_the_forward_pass(mode):
    batch = PackedCollator(collate, mode, varlen=True)(ROWS)
    want = packed_layout(batch["input_ids"], batch["attention_mask"], mode)
    found = batch[KEY]
    assert found.layout.segments == want.segments and found.mode == mode and found.shape == (2, 4)
    for name in ("token_index_T", "position_ids_T", "padded_index_N", "packed_index_N"):
        assert torch.equal(getattr(found.layout, name), getattr(want, name))
    assert found.varlen.max_seqlen_q == max(p + c for p, c, _ in want.segments)
    assert PackedCollator(collate, mode)(ROWS)[KEY].varlen is None


def test_it_travels(tmp_path):
    """Through a worker's queue, a loader that moves batches, and ours: indices on the device, values on the host."""
    from accelerate.utils import send_to_device

    batch = pickle.loads(pickle.dumps(PackedCollator(collate, "pairs", varlen=True)(ROWS)))  # noqa: S301
    for moved in (send_to_device(batch, META), move_batch(batch, META)):
        inputs = known_inputs(moved)
        assert KEY not in inputs and type(inputs["attention_mask"]) is type(inputs["margin"]) is torch.Tensor
        assert {name for name, x in inputs.items() if type(x) is Known} == {"input_ids", "completion_mask"}
        assert all(x.device == META for x in inputs.values())
        made = packed_batch(inputs["input_ids"], "pairs")
        assert made.layout.token_index_T.device == made.varlen.cu_seqlens_q.device == META
        assert inputs["completion_mask"].tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]
        assert packed_batch(inputs["input_ids"].to(META), "pairs") is made
    assert batch[KEY].layout.token_index_T.device.type == "cpu"


def test_it_fits_only_its_batch():
    ids = known_inputs(PackedCollator(collate, "pairs")(ROWS))["input_ids"]
    assert packed_batch(ids, "pairs") is not None
    for other in (packed_batch(ids, "rows"), packed_batch(ids[:1], "pairs"), packed_batch(ids.flip(0), "pairs"), packed_batch(plain(ids), "pairs")):  # fmt: skip
        assert other is None
    wrong = Known.of(plain(ids)[:1], plain(ids)[:1], ids.packed)
    assert packed_batch(wrong, "pairs") is None


def test_a_batch_that_is_not_right_padded_is_left_alone():
    left = lambda rows: {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}  # noqa: E731
    assert KEY not in PackedCollator(left, "pairs")(ROWS)
    assert KEY not in PackedCollator(lambda rows: {"input_ids": rows}, "pairs")(ROWS)
    with pytest.raises(ValueError, match="packing mode 'pair' is unknown"):
        PackedCollator(collate, "pair")


def test_the_backbone_takes_it(tiny_llama, monkeypatch):
    """The same hidden states as from the padded tensors, without looking at their values again."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_llama).eval()
    pack_backbone(model, "pairs")
    batch = PackedCollator(collate, "pairs")(ROWS)
    ordinary = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        want = model(**ordinary, use_cache=False).last_hidden_state
        monkeypatch.setattr(backbone_module, "packed_layout", None)
        monkeypatch.setattr(backbone_module, "is_right_padded", None)
        inputs = {name: known_inputs(batch)[name] for name in ordinary}
        assert torch.equal(model(**inputs, use_cache=False).last_hidden_state, want)
        with pytest.raises(TypeError):
            model(**ordinary, use_cache=False)


def test_a_call_that_is_not_packed_gets_ordinary_tensors(tiny_llama):
    """With a cache, say."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_llama).eval()
    pack_backbone(model, "pairs")
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(type(args[0])))
    with torch.no_grad():
        model(input_ids=known_inputs(PackedCollator(collate, "pairs")(ROWS))["input_ids"], use_cache=True)
    assert seen == [torch.Tensor]
