"""rlhf.pack and rlhf.train: TRL's losses, the command line's checks and records, and the examples of docs/python.md."""

import copy
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import rlhf
from rlhf.api import pack, train
from rlhf.errors import UserError
from rlhf.packing import packing_mode
from rlhf.runs.command import shell_line

ROOT = Path(__file__).parent.parent
NOT_A_RESULT = ("runtime", "per_second", "flos", "time", "memory")  # of the machine, not of the model
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "lora_dropout": 0.0}


def test_import_is_instant():
    heavy = ("torch", "transformers", "trl", "datasets", "numpy", "yaml")
    code = (
        f"import sys, rlhf; print([m for m in {heavy} if m in sys.modules], 'pack' in dir(rlhf), rlhf.train.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[] False train\n", done.stderr


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'rlhf' has no attribute 'tain'"):
        rlhf.tain  # noqa: B018


# --- pack ------------------------------------------------------------------------------------------------------------

CLASSES = {"dpo": (DPOTrainer, DPOConfig), "reward": (RewardTrainer, RewardConfig), "sft": (SFTTrainer, SFTConfig)}


@pytest.fixture(autouse=True)
def trl_lm_head(monkeypatch):
    """TRL's own LM head is back after each test, and is what the plain trainers here are measured with."""
    from trl.trainer import utils

    for name in ("_use_triton", "_ChunkedLogProbFunction"):
        monkeypatch.setattr(utils, name, getattr(utils, name))


@pytest.fixture
def rows(few_pairs):
    return [json.loads(line) for line in Path(few_pairs).read_text().splitlines()]


def plain_trainer(stage, folder, model, rows, lora=True, **values):
    trainer_class, config = CLASSES[stage]
    common = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "optim": "sgd",
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False, "report_to": "none", "max_length": 256,
        "disable_tqdm": True, "gradient_checkpointing": False, "seed": 1, "lr_scheduler_type": "constant",
    }  # fmt: skip
    torch.manual_seed(0)  # a new head's weights
    if stage == "reward":
        loaded = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model)
    if stage == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    else:
        rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    if lora:
        task = "SEQ_CLS" if stage == "reward" else "CAUSAL_LM"
        lora = LoraConfig(
            task_type=task, r=4, target_modules="all-linear", lora_dropout=values.pop("lora_dropout", 0.0)
        )
    return trainer_class(
        model=loaded, args=config(**common | values), train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model), peft_config=lora or None,
    )  # fmt: skip


def trained(trainer):
    """(logged metrics a step, parameters, rows of each pass through the backbone)"""
    passes = []
    trainer.model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: passes.append(args[0].shape))
    trainer.train()
    logs = [{k: v for k, v in log.items() if not any(word in k for word in NOT_A_RESULT)} for log in trainer.state.log_history]  # fmt: skip
    return logs, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, passes


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("stage", CLASSES)
def test_packed_trainer_trains_what_trl_trains(stage, lora, tiny_llama, rows, tmp_path, capsys):
    logs, parameters, _ = trained(plain_trainer(stage, tmp_path / "plain", tiny_llama, rows, lora))
    trainer = plain_trainer(stage, tmp_path / "packed", tiny_llama, rows, lora)
    assert pack(trainer, reference_cache=tmp_path / "reference") is None
    from trl.trainer import utils

    assert utils._ChunkedLogProbFunction.__module__ == "rlhf.packing.lm_head"
    packed_logs, packed_parameters, passes = trained(trainer)
    assert len(logs) == len(packed_logs) == 4  # three steps and the end
    for log, packed_log in zip(logs, packed_logs, strict=True):
        assert log.keys() == packed_log.keys()
        for name in log:
            # rewards are small differences of log-probabilities of about -1000, which float32 rounds to 1e-4
            absolute = 1e-4 if name.startswith("rewards/") else 5e-6
            assert packed_log[name] == pytest.approx(log[name], rel=2e-5, abs=absolute), name
    assert len({log["loss"] for log in logs if "loss" in log}) == 3  # it did train
    for name, parameter in parameters.items():
        torch.testing.assert_close(packed_parameters[name], parameter, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")  # fmt: skip
    assert [shape[0] for shape in passes] == [1, 1, 1]  # one row a step, and no reference beside the policy


def test_reference_is_cached_between_trainers(tiny_llama, rows, tmp_path, capsys):
    for known in (0, 12):
        trainer = plain_trainer("dpo", tmp_path, tiny_llama, rows)
        assert pack(trainer, reference_cache=tmp_path / "reference") is None
        assert f"reference 12 pairs, {known} of them in the cache" in capsys.readouterr().out
        assert pack(trainer) is None  # doing it again changes nothing
        assert capsys.readouterr().out == ""
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(trainer.train_dataset.column_names)


def test_online_reference(tiny_llama, rows, tmp_path):
    trainer = plain_trainer("dpo", tmp_path, tiny_llama, rows)
    assert pack(trainer, cached_reference=False) is None
    *_, passes = trained(trainer)
    assert [shape[0] for shape in passes] == [1] * 6  # policy and reference, packed


def test_rows_that_are_given_to_evaluate_get_their_reference(tiny_llama, rows, tmp_path):
    pairs = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows[:5]])
    plain, packed = (plain_trainer("dpo", tmp_path / name, tiny_llama, rows) for name in ("plain", "packed"))
    assert pack(packed, reference_cache=tmp_path / "reference") is None
    for trainer in (plain, packed):
        trainer.train()
    losses = [trainer.evaluate(pairs)["eval_loss"] for trainer in (plain, packed)]
    assert losses[0] != pytest.approx(0.693147, abs=1e-4) and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_held_out_rows_get_their_reference(tiny_llama, rows, tmp_path):
    plain, packed = (plain_trainer("dpo", tmp_path / name, tiny_llama, rows) for name in ("plain", "packed"))
    for trainer in (plain, packed):
        trainer.eval_dataset = {"few": trainer.train_dataset.select(range(5))}
    assert pack(packed, reference_cache=tmp_path / "reference") is None
    for trainer in (plain, packed):
        trainer.train()
    assert "ref_chosen_logps" in packed.eval_dataset["few"].column_names
    found = [trainer.evaluate()["eval_few_loss"] for trainer in (plain, packed)]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_columns_that_trl_would_have_ignored_are_not_used(tiny_llama, rows, tmp_path):
    trainer = plain_trainer("dpo", tmp_path, tiny_llama, rows)
    for side in ("chosen", "rejected"):
        trainer.train_dataset = trainer.train_dataset.add_column(f"ref_{side}_logps", [7.0] * 12)
    assert pack(trainer, reference_cache=tmp_path / "reference") is None
    assert max(trainer.train_dataset["ref_chosen_logps"]) < 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: setattr(t.args, "sync_ref_model", True), "sync_ref_model moves it during training"),
        (lambda t: setattr(t.state, "global_step", 1), "the trainer has started to train"),
        (lambda t: setattr(t, "train_dataset", t.train_dataset.to_iterable_dataset()),
         "the rows are of type IterableDataset, which can't be gone over beforehand"),
        (lambda t: setattr(t, "train_dataset", t.train_dataset.remove_columns("prompt_ids")),
         "the rows are tokenized in every step"),
        (lambda t: setattr(t, "is_deepspeed_enabled", True), "under FSDP and DeepSpeed only a recipe caches it"),
    ],
)  # fmt: skip
def test_reference_that_stays_online(change, reason, tiny_llama, rows, tmp_path):
    trainer = plain_trainer("dpo", tmp_path, tiny_llama, rows)
    change(trainer)
    assert pack(trainer) == f"the reference is asked in every step: {reason}"
    assert packing_mode(trainer.model) == "pairs" and not trainer.precompute_ref_logps


def test_reference_with_dropout_stays_online(tiny_gpt2, tiny_llama, rows, tmp_path):
    """Only the new adapter's own dropout is off while the reference is asked."""
    trainer = plain_trainer("dpo", tmp_path, tiny_llama, rows, lora_dropout=0.1, disable_dropout=False)
    assert pack(trainer, reference_cache=tmp_path / "reference") is None
    rows = [row | {"prompt": "a", "chosen": " b", "rejected": " c"} for row in rows]  # GPT-2 has no template
    trainer = plain_trainer("dpo", tmp_path, tiny_gpt2, rows, disable_dropout=False)
    assert pack(trainer) == (
        "batches are padded, not packed: its attention has a dropout of 0.1; set attention_dropout (GPT-2: attn_pdrop) to 0; "
        "the reference is asked in every step: it has dropout, and TRL does not switch that off for it"
    )


def test_model_that_cannot_be_packed(tiny_distilbert, rows, tmp_path):
    rows = [row | {"prompt": "a", "chosen": " b", "rejected": " c"} for row in rows]
    trainer = plain_trainer("reward", tmp_path, tiny_distilbert, rows, lora=False, eos_token="[SEP]")
    assert pack(trainer) == (
        "batches are padded, not packed: DistilBertModel is an encoder: its tokens attend to later ones"
    )
    trainer.train()


def test_packing_of_trl(tiny_llama, rows, tmp_path):
    trainer = plain_trainer("sft", tmp_path, tiny_llama, rows)
    trainer.args.padding_free = True
    assert pack(trainer) == "batches stay TRL's own: `padding_free=True` lays them out in one row already"
    assert packing_mode(trainer.model) is None


def test_no_trainer():
    assert pack([]) == (
        "trainer is of type list; expected TRL's DPOTrainer, RewardTrainer or SFTTrainer (nothing was changed)"
    )


# --- train -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tiny_llama, tmp_path):
    """Of a small DPO run."""
    return {
        "stage": "dpo", "model_name_or_path": tiny_llama, "output_dir": tmp_path / "dpo", "max_length": 256, "max_steps": 3,
        "per_device_train_batch_size": 2, "learning_rate": 1e-3, "save_strategy": "no", "gradient_checkpointing": False,
        "reference_cache": tmp_path / "reference", "logging_steps": 1, **LORA,
    }  # fmt: skip


def test_train_with_a_dict_and_rows(keys, rows, few_pairs, tmp_path, capsys):
    given, before = copy.deepcopy(rows), dict(keys)
    run = train(keys, train_dataset=rows, eval_dataset=Dataset.from_list(rows[:4]), beta=0.2)
    assert (run.folder, run.complete["steps"], run.complete["train_examples"]) == (tmp_path / "dpo", 3, 12)
    assert rows == given and keys == before  # untouched
    AutoModelForCausalLM.from_pretrained(run.folder)
    provenance = json.loads((run.folder / "provenance.json").read_text())
    call = "rlhf.train(recipe, train_dataset=<12 rows>, eval_dataset=<4 rows>, beta=0.2)"
    assert (provenance["command"], provenance["launcher"], shell_line(provenance)) == ([call], None, call)
    assert (run.folder / "recipe.yaml").read_text().startswith(f"# recipe, as run by `{call}`\n")
    assert "beta: 0.2\n" in (run.folder / "recipe.yaml").read_text()
    assert len(provenance["inputs"]["dataset_name"]) == len(provenance["inputs"]["heldout"]) == 64
    assert "4 of 4 held-out prompts are also in the training data" in " ".join(capsys.readouterr().out.split())

    same = train(keys, train_dataset=Dataset.from_list(rows), eval_dataset=rows[:4], beta=0.2)
    assert same.complete == run.complete  # not trained again: the same rows, however they are held
    assert "complete: " in capsys.readouterr().out
    with pytest.raises(UserError, match="differs in the content of dataset_name .python:train_dataset."):
        train(keys, train_dataset=rows[:11], eval_dataset=rows[:4], beta=0.2)
    fresh = train(keys, train_dataset=rows[:11], fresh=True)
    assert fresh.folder == tmp_path / "dpo-2" and fresh.complete["train_examples"] == 11


def test_same_numbers_as_the_command_line(recipe, keys, rows, few_pairs, tmp_path, capsys):
    from rlhf.__main__ import main

    keys = {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    keys.pop("stage")
    path = recipe("dpo", **keys, dataset_name=few_pairs)
    assert main(["dpo", path]) == 0
    expected = json.loads((tmp_path / "dpo" / "complete.json").read_text())
    run = train(path, rows, output_dir=tmp_path / "python")
    assert (run.complete["first_loss"], run.complete["weights_sha256"]) == (
        expected["first_loss"], expected["weights_sha256"],
    )  # fmt: skip
    provenance = json.loads((run.folder / "provenance.json").read_text())
    assert provenance["recipe"] == path
    assert provenance["command"] == [f"rlhf.train({path!r}, train_dataset=<12 rows>, output_dir='{tmp_path}/python')"]


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_other_stages(stage, keys, rows, tmp_path):
    keys.pop("reference_cache")
    run = train(keys | {"stage": stage, "output_dir": tmp_path / stage}, rows)
    assert run.complete["stage"] == stage and run.folder == tmp_path / stage


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learing_rate": 1}, "recipe: unknown key 'learing_rate'; did you mean 'learning_rate'?"),
        ({"stage": "evaluate"}, "recipe: stage is 'evaluate'; rlhf.train runs sft, reward, dpo"),
        ({"stage": None}, "recipe: the recipe does not say its stage; rlhf.train runs sft, reward, dpo"),
        ({"learning_rate": "much"}, "recipe: 'learning_rate' is 'much'; expected a number"),
        ({"output_dir": None}, "recipe: key 'output_dir' is missing; it names the folder for the results"),
        ({"dataset_train_split": "train"}, "recipe: dataset_train_split has no effect on rows that are given; remove it"),
        ({"beta": -1}, "recipe: 'beta' is -1.0; expected a number above 0 and at most 1000 (0.01 to 1 is usual)"),
    ],
)  # fmt: skip
def test_mistake_in_a_dict(change, message, keys, rows):
    with pytest.raises(UserError) as error:
        train(keys | change, rows)
    assert str(error.value) == message


def test_mistake_in_the_call(keys, rows):
    with pytest.raises(UserError) as error:
        train(keys, rows, beta=-1)
    assert str(error.value).startswith("train(beta=…): 'beta' is -1.0; expected a number above 0")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "train_dataset has no rows; expected one example a row"),
        (["a"], "train_dataset, row 1: expected a dict of column names and values, found 'a'"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}],
         "train_dataset, row 1: 'chosen' and 'rejected' are equal, so there is nothing to learn; remove the pair"),
        ("pairs.jsonl", "train_dataset is of type str; expected a datasets.Dataset or a list of dicts, one a row"),
        (DatasetDict(train=Dataset.from_list([{"a": 1}])),
         "train_dataset has the splits train; give one of them, as in train_dataset=dataset['train']"),
    ],
)  # fmt: skip
def test_mistake_in_rows(given, message, keys):
    with pytest.raises(UserError) as error:
        train(keys, given)
    assert str(error.value) == message
    assert not keys["output_dir"].exists()


def test_no_recipe():
    with pytest.raises(UserError, match="recipe is of type int; expected a dict of keys, or the path of a recipe"):
        train(1)
    with pytest.raises(UserError, match="no recipe at none.yaml"):
        train("none.yaml")


def test_recipe_of_rows_that_are_gone(keys, rows, capsys):
    with pytest.raises(UserError) as error:
        train(keys, dataset_name="python:train_dataset")
    assert str(error.value) == (
        "train(dataset_name=…): 'python:train_dataset' stands for rows that Python code gave to rlhf.train; give them again, "
        "or name a file"
    )


def test_other_thread(keys, rows):
    found = []

    def call():
        with pytest.raises(UserError) as error:
            train(keys, rows)
        found.append(str(error.value))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert found == ["rlhf.train stops and saves on signals, which Python gives to its main thread only: call it there"]


def test_stopped_and_resumed(keys, rows, tmp_path):
    from rlhf.runs.stop import Stopped

    keys |= {"save_strategy": "steps", "reference": "online"}
    keys.pop("reference_cache")
    (tmp_path / "dpo").mkdir()
    (tmp_path / "dpo" / "stop").touch()
    with pytest.raises(Stopped):
        train(keys, rows)
    assert [path.name for path in (tmp_path / "dpo").glob("checkpoint-*")] == ["checkpoint-1"]
    run = train(keys, rows)
    straight = train(keys | {"output_dir": tmp_path / "straight"}, rows)
    assert run.complete["steps"] == 3
    assert run.complete["weights_sha256"] == straight.complete["weights_sha256"]


SCRIPT = """
import json
from rlhf import train

rows = [json.loads(line) for line in open({pairs!r})]
run = train({keys!r}, rows)
print("done", run.complete["steps"])
"""


def test_on_two_processes(keys, rows, few_pairs, tmp_path):
    """The same losses as on one."""
    keys.pop("per_device_train_batch_size")
    one = train(keys | {"global_batch_size": 4}, rows)
    keys = {k: str(v) if isinstance(v, Path) else v for k, v in keys.items()} | {"output_dir": str(tmp_path / "two")}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(pairs=few_pairs, keys=keys | {"global_batch_size": 4}))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "ddp.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "--num_processes", "2", str(script)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done 3") == 2
    two = json.loads((tmp_path / "two" / "complete.json").read_text())
    assert two["first_loss"] == pytest.approx(one.complete["first_loss"], rel=1e-6)
    assert two["last_loss"] == pytest.approx(one.complete["last_loss"], rel=1e-5)
    provenance = json.loads((tmp_path / "two" / "provenance.json").read_text())
    assert shell_line(provenance) == "rlhf.train(recipe, train_dataset=<12 rows>)"


def test_token_stays_out_of_the_record(keys, rows):
    from rlhf.api import _call

    assert _call(keys, {}, {"hub_token": "hf_secret", "output_dir": Path("x")}) == (
        "rlhf.train(recipe, hub_token=..., output_dir='x')"
    )


# --- docs/python.md --------------------------------------------------------------------------------------------------

MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "embedded:smollm2-135m-instruct")
PAGE = ROOT / "docs" / "python.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="this is an image, which holds a part of the project")
def test_examples_of_the_docs(tiny_llama, few_pairs, tmp_path, monkeypatch):
    """All of them, in order, in one namespace, with a tiny model in the place of the small one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.jsonl").write_text(Path(few_pairs).read_text())
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 6 and all(any(model in block for block in blocks) for model in MODELS)
    names = {}
    for block in blocks:
        for model in MODELS:
            block = block.replace(model, tiny_llama)
        exec(compile(block, "docs/python.md", "exec"), names)
