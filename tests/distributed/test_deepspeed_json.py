"""A launch file that names a DeepSpeed config, as docs/scaling.md shows it."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from test_ddp import launch

from rlhf.distributed.topology import Topology, topology_of_file
from rlhf.runs.metrics import read_metrics

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_config_of_the_page_trains(recipe, tiny_llama, few_pairs, tmp_path):
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++, with which DeepSpeed compiles what its processes on a CPU talk through")
    (text,) = re.findall(r"```json\n(.*?zero_hpz.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)
    config = json.loads(text)
    config["zero_optimization"]["zero_hpz_partition_size"] = 2  # the processes of this host
    (tmp_path / "zero3_hpz.json").write_text(json.dumps(config))
    zero3 = (ROOT / "launch" / "zero3.yaml").read_text()
    assert "  zero_stage: 3\n" in zero3
    path = tmp_path / "launch.yaml"
    path.write_text(zero3.replace("  zero_stage: 3\n", f"  deepspeed_config_file: {tmp_path}/zero3_hpz.json\n"))
    assert topology_of_file(str(path)) == Topology("DeepSpeed", 3, name=str(path))
    out = tmp_path / "dpo"
    file = recipe("dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(out), max_steps=2)
    launch(2, "dpo", file, launch_file=str(path))
    assert read_metrics(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert json.loads((out / "complete.json").read_text())["steps"] == 2
    assert json.loads((out / "provenance.json").read_text())["hardware"]["processes"] == 2
