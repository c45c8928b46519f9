"""Three steps of TRL's DPO or reward trainer, packed or padded, under whatever accelerate launched it with.

packed_worker.py STAGE MODEL packed|padded lora|full OUT.json
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from rlhf.packing import pack_backbone
from rlhf.packing.backbone import find_backbone
from rlhf.runs.stop import leave
from rlhf.training.reference import add_reference_logps

stage, model_name, packed, kind, out = sys.argv[1:]
rows = [{"prompt_ids": list(range(5, 5 + 2 * i)), "chosen_ids": list(range(40, 43 + i)), "rejected_ids": list(range(60, 69 - i))} for i in range(1, 9)]  # fmt: skip
config, trainer_class, auto = (
    (DPOConfig, DPOTrainer, AutoModelForCausalLM)
    if stage == "dpo"
    else (RewardConfig, RewardTrainer, AutoModelForSequenceClassification)
)
args = config(
    output_dir=str(Path(out).parent / "out"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, optim="sgd",
    logging_steps=1, save_strategy="no", use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
    gradient_checkpointing=False, lr_scheduler_type="constant", seed=1,
)  # fmt: skip
if os.environ.get("ACCELERATE_USE_FSDP"):  # accelerate 1.15 trains plain DDP on CPUs, in silence, without this
    PartialState().distributed_type = DistributedType.MULTI_GPU
if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
torch.manual_seed(0)
model = auto.from_pretrained(model_name, dtype=torch.float32, **({"num_labels": 1} if stage == "reward" else {}))
lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM" if stage == "dpo" else "SEQ_CLS")
placeholder = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
trainer = trainer_class(
    model=model, args=args, train_dataset=Dataset.from_list(placeholder),
    processing_class=AutoTokenizer.from_pretrained(model_name), peft_config=lora if kind == "lora" else None,
)  # fmt: skip
if stage == "reward":
    rows = [{"chosen_ids": r["prompt_ids"] + r["chosen_ids"], "rejected_ids": r["prompt_ids"] + r["rejected_ids"]} for r in rows]  # fmt: skip
trainer.train_dataset = Dataset.from_list(rows)
tokens = []
find_backbone(trainer.model).get_input_embeddings().register_forward_hook(lambda _m, a, _o: tokens.append(a[0].numel()))
if packed == "packed":
    for each in filter(None, (trainer.model, getattr(trainer, "ref_model", None))):
        pack_backbone(trainer.accelerator.unwrap_model(each), "pairs")
    if stage == "dpo":  # the cached reference, shared by the processes
        trainer.train_dataset = add_reference_logps(
            trainer, trainer.train_dataset, "files", "packed", Path(out).parent / "cache"
        )
        trainer.precompute_ref_logps = True
trainer.train()
if trainer.accelerator.is_main_process:
    found = {
        "layout": str(trainer.accelerator.distributed_type), "processes": trainer.accelerator.num_processes,
        "logs": [log for log in trainer.state.log_history if "loss" in log], "tokens": sum(tokens),
        "sharded": any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in trainer.model.parameters()),
    }  # fmt: skip
    Path(out).write_text(json.dumps(found))
leave(0)
