"""Packed and padded under DDP, ZeRO-2, ZeRO-3 and FSDP2, two processes (gloo): the same losses and gradient norms."""

import importlib.util
import json
import shutil
from pathlib import Path

import forked
import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
WORKER = Path(__file__).parent / "packed_worker.py"
COMMON = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0, "main_process_port": 0,
          "rdzv_backend": "static", "same_network": True, "use_cpu": False}  # fmt: skip
LAYOUTS = {
    "ddp": {"distributed_type": "MULTI_GPU"},
    "zero2": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
    "zero3": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}},
    "fsdp2": {"distributed_type": "FSDP", "fsdp_config": {
        "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "fsdp_state_dict_type": "SHARDED_STATE_DICT"}},
}  # fmt: skip
KINDS = {"ddp": "MULTI_CPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}


def train(layout, stage, model, packed, kind, folder):
    folder.mkdir(exist_ok=True)
    (folder / "launch.yaml").write_text(yaml.safe_dump(COMMON | LAYOUTS[layout]))
    out = folder / f"{packed}.json"
    words = (stage, model, packed, kind, out)
    done = forked.launch(2, *words, launch_file=folder / "launch.yaml", program=(WORKER,))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("layout", "kind"),
    [(layout, "lora") for layout in LAYOUTS]
    + [pytest.param(layout, "full", marks=pytest.mark.slow if layout != "ddp" else ()) for layout in LAYOUTS],
)
def test_dpo(layout, kind, tiny_llama, tmp_path):
    """The packed run with its cached reference, against TRL's reference in every step."""
    assert_packed_equals_padded(layout, "dpo", tiny_llama, kind, tmp_path)


@pytest.mark.parametrize("layout", ["ddp", pytest.param("zero3", marks=pytest.mark.slow), "fsdp2"])
def test_reward(layout, tiny_llama, tmp_path):
    assert_packed_equals_padded(layout, "reward", tiny_llama, "lora", tmp_path)


def assert_packed_equals_padded(layout, stage, model, kind, tmp_path):
    if layout.startswith("zero"):
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("the extra `deepspeed` is not installed")
        if shutil.which("g++") is None:
            pytest.skip("there is no g++, with which DeepSpeed compiles what its processes on a CPU talk through")
    padded, packed = (train(layout, stage, model, way, kind, tmp_path / "run") for way in ("padded", "packed"))
    for run in (padded, packed):
        assert run["processes"] == 2 and KINDS[layout] in run["layout"] and len(run["logs"]) == 3
        assert run["sharded"] == (layout in ("zero3", "fsdp2"))
    for want, found in zip(padded["logs"], packed["logs"], strict=True):
        for name in want.keys() & {"loss", "grad_norm", "rewards/margins", "rewards/chosen", "logps/rejected", "accuracy", "margin"}:  # fmt: skip
            absolute = 1e-5 if name.startswith("rewards") else 2e-6  # small differences of large log-probabilities
            assert found[name] == pytest.approx(want[name], rel=1e-5, abs=absolute), name
    assert len({log["loss"] for log in packed["logs"]}) == 3
    assert packed["tokens"] < padded["tokens"]
    if stage == "dpo":
        files = list((tmp_path / "run" / "cache").rglob("*.safetensors"))
        assert 1 <= len(files) <= 2  # the main process writes, after the last batch and each half minute


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_fsdp2_holds_no_unsharded_gradients(lora, recipe, tiny_llama, few_pairs, tmp_path):
    """Between micro-batches of full fine-tuning each of two ranks holds half of the fp32 gradients, not all of them.

    LoRA's are exchanged once a step: unsharded until then, but they are few.
    """
    adapter = dict(use_peft=True, lora_target_modules="all-linear") if lora else {}
    file = recipe("dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "out"), bf16=False,
                  global_batch_size=6, max_tokens_per_device=700, use_cpu=True, **(adapter | {"max_steps": 1}))  # fmt: skip
    lines = Path(file).read_text().splitlines(keepends=True)
    Path(file).write_text("".join(line for line in lines if not line.startswith("per_device")))
    worker, found = str(Path(__file__).parent / "gradients_worker.py"), tmp_path / "found.json"
    done = forked.launch(2, found, "dpo", file, launch_file="fsdp2.yaml", program=(worker,))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(found.read_text())
    everything = 4 * found["trained"]
    if lora:
        assert (found["unsharded"], found["sharded"]) == (everything, 0)
    else:
        assert found["unsharded"] == 0 and everything / 2 <= found["sharded"] < 0.6 * everything
