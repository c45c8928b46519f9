"""Whatever stands in a recipe, on the command line or in a launch file: one sentence with its place, quickly, and short.

A table of what people really write, and of what nobody should. `#` in an expected sentence is the recipe's path.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.__main__ import main
from rlhf.config.key_effects import _TRUE_BY_DEFAULT, EFFECTIVE, ONLY_WITH, REFUSED, STAGES_OF
from rlhf.config.key_ranges import RANGES
from rlhf.config.keys import report_names, scheduler_arguments
from rlhf.config.keys_foreign import FOREIGN
from rlhf.config.recipe import allowed_keys, load_recipe
from rlhf.config.stage_config import EvaluateConfig, StageConfig
from rlhf.distributed.topology import check_topology, topology_of_environment, topology_of_file
from rlhf.errors import UserError

BASE = "model_name_or_path: m\noutput_dir: o\ndataset_name: d\n"
LEVELS = "run_name:\n" + "".join(f"{' ' * (i + 1)}a:\n" for i in range(1000))
BOMB = "a: &a [x]\n" + "".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))  # fmt: skip
# all that can be said about one mistake in a sentence; one list of choices is long
LONGEST = 900


def refusal(tmp_path, text, stage="dpo", words=()):
    """The sentence that a recipe, whose fifth line is the first of `text`, is refused with."""
    path = tmp_path / "r.yaml"
    base = {"evaluate": "sft_model: m\noutput_dir: o\ndataset_name: d\n", "rounds": "output_dir: o\n"}.get(stage, BASE)
    path.write_bytes(
        text if isinstance(text, bytes) else f"stage: {stage}\n{base}{text}\n".encode("utf-8", "surrogatepass")
    )
    with pytest.raises(UserError) as caught:
        load_recipe(str(path), stage, list(words))
    sentence = str(caught.value).replace(str(path), "#")
    assert len(sentence) < LONGEST and "\n" not in sentence and sentence.isprintable(), sentence[:2000]
    return sentence


# --- YAML ------------------------------------------------------------------------------------------------------------

YAML = {
    "tag bool": ("run_name: !!bool maybe", "#:5:11: tags ('!!bool') are not supported; write the value without one"),
    "tag int": ('run_name: !!int ""', "#:5:11: tags ('!!int')"),
    "tag timestamp": ("run_name: !!timestamp x", "#:5:11: tags ('!!timestamp')"),
    "tag python": ("run_name: !!python/object/apply:os.system [ls]", "#:5:11: tags ('!!python/object/apply:os.system')"),
    "key is a bad date": ("2024-13-45: 1", "#:5: unknown key '2024-13-45'"),
    "value is a bad date": ("run_name: 2024-13-45", "#:5: 'run_name' can't be read: month must be in 1..12"),
    "key is a list": ("? [a]\n: 1", "#:5: a key is one word; found a list or a mapping"),
    "key is a mapping": ("? {a: 1}\n: 1", "#:5: a key is one word"),
    "key of 100,000": ("k" * 500 + ": 1", "#:5: unknown key 'kkkkkkk"),
    "alias bomb": (BOMB, "#:5:4: aliases ('&a') are not supported; write the value out, or in quotes"),
    "alias of nothing": ("run_name: *a", "#:5:11: aliases ('*a') are not supported"),
    "3,000 brackets": (f"run_name: {'[' * 3000}", "#:5:22: nested more than 12 levels deep"),
    "1,000 levels": (LEVELS, "#:16:12: nested more than 12 levels deep"),
    "400 digits": (f"seed: {'9' * 400}", "#:5: 'seed' is a number of about 401 digits; expected an integer from 0"),
    "400 digits as float": (f"beta: {'9' * 400}", "#:5: 'beta' is a number of about 401 digits; expected a finite number"),
    "5,000 digits": (f"seed: {'9' * 5000}", "#:5: 'seed' can't be read: it is a number of 5000 digits"),
    "octal": ("seed: 010", "#:5: 'seed' can't be read: YAML reads it as a number in base 8 or 60; write it in decimal"),
    "base 60": ("seed: 1:30", "#:5: 'seed' can't be read: YAML reads it as a number in base 8 or 60"),
    "half a number": ("seed: 0x_", "#:5: 'seed' can't be read: invalid literal"),
    "no character": ('run_name: "\\UFFFFFFFF"', "#:5: not valid YAML: Python int too large"),
    "half a character": ('run_name: "\\ud800"', "#:5: 'run_name' is '\\ud800', which contains NUL or a lone surrogate"),
    "NUL": ('output_dir2: "a"\nrun_name: "a\\0b"', "#:5: unknown key 'output_dir2'"),
    "NUL in a path": ('eval_dataset_name: "a\\0b"', "#:5: 'eval_dataset_name' is 'a\\x00b', which contains NUL"),
    "merge": ("<<: {a: 1}", "#:5: unknown key '<<'"),
    "merge as value": ("run_name: <<", "#:5: 'run_name' can't be read: could not determine a constructor"),
    "directive": ("%YAML 9.9", "#:5:1: not valid YAML: found incompatible YAML document"),
    "inner key twice": ("lr_scheduler_kwargs: {a: 1, a: 2}", "#:5: 'lr_scheduler_kwargs' sets 'a' twice; keep one"),
    "long text": (f"loss_type: {'x' * 100_000}", "#:5: 'loss_type' is 'xxxxxxxx"),
    "long list": (f"run_name: [{'x, ' * 20_000}]", "#:5: 'run_name' is ['x', 'x', 'x', 'x', 'x', 'x', ...]; expected a string or null"),
    "UTF-16": ("stage: dpo".encode("utf-16"), "#: UTF-16, not UTF-8 text; save the recipe as UTF-8"),
    "binary": (bytes(range(256)), "#: not UTF-8 text (byte 128)"),
    "zeros": (bytes(100), "#:1: not valid YAML: character #x0000 is not allowed"),
    "2 MB": (b"stage: dpo\nx: " + b"x" * 2_000_000, "# has 2,000,014 bytes, too many for a recipe (at most 1,000,000)"),
}  # fmt: skip


@pytest.mark.parametrize("name", YAML)
def test_yaml(tmp_path, name):
    text, expected = YAML[name]
    assert refusal(tmp_path, text).startswith(expected)


def paths(folder):
    """Paths that are no recipe, each with the sentence."""
    (folder / "folder").mkdir()
    (folder / "dangling.yaml").symlink_to(folder / "gone.yaml")
    (folder / "loop.yaml").symlink_to(folder / "loop.yaml")
    os.mkfifo(folder / "pipe.yaml")
    return {
        "a\0b.yaml": "'a\\x00b.yaml' can't be the path of a recipe: embedded null byte",
        "x" * 300 + ".yaml": "can't be the path of a recipe: file name too long",
        str(folder / "folder"): "/folder is a folder, not a recipe",
        str(folder / "dangling.yaml"): "dangling.yaml: it is a link to '",
        str(folder / "loop.yaml"): "loop.yaml: it is a link to '",
        str(folder / "pipe.yaml"): "pipe.yaml is not a regular file",
        str(folder / "none" / "x.yaml"): "x.yaml; this project's recipes are in configs/",
    }


def test_paths_that_are_no_recipe(tmp_path):
    for path, expected in paths(tmp_path).items():
        with pytest.raises(UserError) as caught:
            load_recipe(path, "dpo")
        assert expected in str(caught.value) and len(str(caught.value)) < 500


# --- the command line ------------------------------------------------------------------------------------------------

WORDS = {
    "twice": (["--beta", "0.1", "--beta", "0.2"], "--beta is given twice on the command line; keep one"),
    "alias": (["--beta", "*a"], "--beta: aliases ('*a') are not supported"),
    "brackets": (["--beta", "[" * 3000], "--beta: nested more than 12 levels deep"),
    "half a list": (["--loss_type", "[sigmoid,"], "--loss_type: not valid YAML: expected the node content"),
    "tag": (["--beta", "!!int x"], "--beta: tags ('!!int') are not supported"),
    "digits": (["--beta", "9" * 500], "--beta: 'beta' is a number of about 501 digits; expected a finite number"),
    "date": (["--beta", "2024-13-45"], "--beta: 'beta' can't be read: month must be in 1..12"),
    "long": (["--beta", "x" * 100_000], "--beta: 'beta' is 'xxxx"),
    "long key": (["--" + "x" * 100_000, "1"], "--xxxx"),
    "long stray word": (["x" * 100_000], "unexpected 'xxxx"),
    "not UTF-8": (["--run_name", "\udc80"], "--run_name: 'run_name' is '\\udc80', which contains NUL or a lone surrogate"),
    "blank folder": (["--output_dir", "  "], "--output_dir: output_dir ' ' is blank; name the folder for the results"),
    "no folder": (["--output_dir", ""], "#: key 'output_dir' is missing"),
    "NUL": (["--output_dir", "a\0b"], "--output_dir: 'output_dir' is 'a\\x00b', which contains NUL"),
    "long name": (["--output_dir", "a/" + "x" * 256], "--output_dir: output_dir 'a/xxx"),
    "long path": (["--output_dir", "a/" * 3000], "--output_dir: output_dir 'a/a/"),
    "nobody": (["--output_dir", "~no-such-user/x"], "--output_dir: output_dir '~no-such-user/x': no such user"),
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_words(tmp_path, name):
    words, expected = WORDS[name]
    assert refusal(tmp_path, "", words=words).startswith(expected)


def test_output_dir_through_a_dangling_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("link", "link/a/b", "loop", "loop/a"):
        found = refusal(tmp_path, "", words=["--output_dir", str(tmp_path / name)])
        assert (
            "goes through the link" in found and "which doesn't exist; remove the link, or name another folder" in found
        )


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    path = tmp_path / "dpo.yaml"
    keys = ("model_name_or_path", "output_dir", "dataset_name", "eval_dataset_name", "reference_cache", "chat_template")
    path.write_text("stage: dpo\n" + "".join(f"{key}: ~/{key}\n" for key in keys))
    values = load_recipe(str(path), "dpo").values
    assert {key: values[key] for key in keys} == {key: f"/home/x/{key}" for key in keys}
    path.write_text(
        "stage: dpo\nmodel_name_or_path: ~/m\noutput_dir: o\nchosen_dataset_name: ~/c\nrejected_dataset_name: ~/r\n"
    )
    values = load_recipe(str(path), "dpo").values
    assert (values["chosen_dataset_name"], values["rejected_dataset_name"]) == ("/home/x/c", "/home/x/r")
    names = ("base_model", "sft_model", "reward_model", "dpo_model", "output_dir", "dataset_name")
    path.write_text("stage: evaluate\n" + "".join(f"{key}: ~/{key}\n" for key in names))
    values = load_recipe(str(path), "evaluate").values
    assert {key: values[key] for key in names} == {key: f"/home/x/{key}" for key in names}


# --- values ----------------------------------------------------------------------------------------------------------

VALUES = {
    "seed: -1": "'seed' is -1; expected an integer from 0 to 4_294_967_295",
    "adam_beta1: 5": "'adam_beta1' is 5.0; expected a number at least 0 and below 1",
    "use_peft: true\nlora_dropout: 7": "'lora_dropout' is 7.0; expected a number at least 0 and below 1",
    "watchdog_minutes: -1": "'watchdog_minutes' is -1.0; expected a number from 0 to 525_600 (0 disables)",
    "neftune_noise_alpha: -5": "'neftune_noise_alpha' is -5.0; expected a number from 0 to 1000",
    "dataset_num_proc: -3": "'dataset_num_proc' is -3; expected an integer from 1 to 4096",
    "dataloader_num_workers: -1": "'dataloader_num_workers' is -1; expected an integer from 0 to 4096",
    "lora_r: 1000000000": "'lora_r' is 1000000000; expected an integer from 1 to 16384",
    "label_smoothing: 9": "'label_smoothing' is 9.0; expected a number at least 0 and below 0.5",
    "weight_decay: -1": "'weight_decay' is -1.0; expected a number from 0 to 10",
    "max_grad_norm: -1": "'max_grad_norm' is -1.0; expected a number from 0 to",
    "max_steps: -5": "'max_steps' is -5; expected an integer from 1 to 1_000_000_000, or -1 (-1: decided by num_train_epochs)",
    "max_steps: 0": "'max_steps' is 0; expected",
    "beta: 1e30": "'beta' is 1e+30; expected a number above 0 and at most 1000 (0.01 to 1 is usual)",
    "learning_rate: 1e30": "'learning_rate' is 1e+30; expected a number above 0 and at most 1 (1e-6 to 1e-3 is usual)",
    "learning_rate: 3": "'learning_rate' is 3.0; expected a number above 0 and at most 1",
    "global_batch_size: 99999999999": "'global_batch_size' is 99999999999; expected an integer from 1 to 1_000_000",
    "max_length: 100000000000000000000": "'max_length' is 100000000000000000000; expected an integer from 1 to",
    "warmup_steps: -3": "'warmup_steps' is -3.0; expected a number from 0 to",
    "warmup_steps: 2.5": "(an integer number of steps, or a fraction of the run below 1)",
    "save_total_limit: 0": "'save_total_limit' is 0; expected an integer from 1",
    "beta: .nan": "'beta' is nan; expected a finite number",
    "loss_weights: [.inf]": "'loss_weights' is [inf]; expected a finite number",
    "gradient_checkpointing_kwargs: {a: .nan}": "'gradient_checkpointing_kwargs' is {'a': nan}; expected a finite number",
    "bf16: true\nfp16: true": "#:6: bf16 and fp16 are both true; keep one",
    "loss_type: [sigmoid, sft]\nloss_weights: [1.0]": "#:6: loss_weights has 1 numbers and loss_type has 2; give one weight per loss",
    "loss_weights: [1.0, 2.0]": "loss_weights has 2 numbers and loss_type has 1",
    "loss_type: [sft, sft]": "lists a loss twice",
    "loss_type: simpo": "SimPO has no reference model and is not one of TRL's DPO losses; the closest are",
    "loss_type: orpo": "ORPO is another trainer, without a reference model; here train `rlhf sft` first",
    "loss_type: kto": "KTO takes single answers with a thumb up or down",
    "lr_scheduler_type: cosin": "; did you mean 'cosine'?",
    "lr_scheduler_kwargs: {foo: 1}": "lr_scheduler_kwargs has 'foo', but the scheduler linear takes none",
    "lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycle: 1}": "#:6: lr_scheduler_kwargs has 'num_cycle', but the scheduler cosine takes num_cycles",
    "lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: x}": "#:6: lr_scheduler_kwargs.num_cycles is 'x'; expected a number",
    "lr_scheduler_type: warmup_stable_decay": "the scheduler warmup_stable_decay needs num_decay_steps",
    "lr_scheduler_type: cosine_with_min_lr": "the scheduler cosine_with_min_lr needs min_lr",
    "lr_scheduler_kwargs: hello": "'lr_scheduler_kwargs' is 'hello'; expected a mapping or null",
    "lr_scheduler_type: reduce_lr_on_plateau": "reduce_lr_on_plateau follows the held-out loss; set eval_strategy",
    "load_best_model_at_end: true": "load_best_model_at_end needs equal strategies",
    "accelerator_config: no-such-file.json": "'accelerator_config' is 'no-such-file.json'; expected a mapping or null",
    "lr_scheduler_kwargs: {1: 2}": "'lr_scheduler_kwargs' is {1: 2}; expected strings as its keys",
    "optim: adamw_8bi": "; did you mean 'adamw_8bit'?",
    "optim_args: foo": "optim_args is 'foo'; expected name=value,name=value",
    "attn_implementation: flash": "expected one of eager, sdpa, flash_attention_2, flash_attention_3, flex_attention or a kernel",
    "attn_implementation: spda": "; did you mean 'sdpa'?",
    "report_to: wandbb": "; did you mean 'wandb'?",
    "report_to: [none, wandb]": "use `none` and `all` alone",
    "debug: x": "'debug' is 'x'; expected one of underflow_overflow, tpu_metrics_debug",
    "ddp_backend: glo": "; did you mean 'gloo'?",
    "torch_compile_mode: fast": "'torch_compile_mode' is 'fast'; expected one of default",
    "gradient_checkpointing: true\nactivation_checkpointing: true": "two names of the same key",
}  # fmt: skip
LOADS = (
    "max_steps: -1", "warmup_steps: 0.1", "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}",
    "lr_scheduler_type: cosine\nlr_scheduler_kwargs: '{\"num_cycles\": 1}'", "attn_implementation: flash_attention_2",
    "attn_implementation: flash_attention_3", "attn_implementation: kernels-community/flash-attn2", "report_to: wandb",
    "report_to: [tensorboard, wandb]", "report_to: all", "loss_type: [sigmoid, sft]\nloss_weights: [1.0, 0.1]",
    "use_peft: false\nlora_r: 8", "label_smoothing: 0", "loss_type: robust\nlabel_smoothing: 0.1", "max_gradient_spike: 0",
    "optim: galore_adamw\noptim_target_modules: [attn]", "bf16: true\nfp16: false", "optim: paged_adamw_8bit\nadam_beta1: 0.9",
    "save_strategy: epoch", "push_to_hub: true\nhub_model_id: a/b", "eval_strategy: steps\neval_steps: 0.1\ndataset_test_split: t",
)  # fmt: skip


@pytest.mark.parametrize("text", VALUES)
def test_values(tmp_path, text):
    found = refusal(tmp_path, text)
    assert VALUES[text] in found and re.match("#:[56]: ", found)


@pytest.mark.parametrize("text", LOADS)
def test_values_that_are_fine(tmp_path, text):
    path = tmp_path / "dpo.yaml"
    path.write_text(f"stage: dpo\n{BASE}{text}\n")
    assert load_recipe(str(path), "dpo").stage == "dpo"


def numeric_keys():
    found = {}
    for stage in ("sft", "reward", "dpo", "evaluate", "rounds"):
        found |= {k.name: k for k in allowed_keys(stage).values() if re.search(r"\b(int|float)\b", k.annotation)}
    return found


def test_every_number_has_a_range():
    assert set(numeric_keys()) - set(REFUSED) - set(RANGES) == set()
    assert set(RANGES) - set(numeric_keys()) == set()


@pytest.mark.parametrize("name", sorted(RANGES))
def test_ranges_hold_at_both_ends(tmp_path, name):
    """What is just outside is refused by the key's name, and every default of TRL and of ours lies inside."""
    stage = next(s for s in ("dpo", "sft", "reward", "evaluate", "rounds") if name in allowed_keys(s))
    allowed = RANGES[name]
    outside = [
        allowed.low if allowed.above else allowed.low - 1,
        allowed.high if allowed.below else allowed.high * 2 + 1,
    ]
    for value in outside:
        if value != allowed.also:
            value = [value] if "list" in allowed_keys(stage)[name].annotation else value
            assert f"'{name}' is " in refusal(tmp_path, f"{name}: {value}", stage)
    for stage in ("sft", "reward", "dpo", "evaluate", "rounds"):
        default = allowed_keys(stage)[name].default if name in allowed_keys(stage) else "None"
        assert default in ("None", "'auto'") or allowed.holds(float(default)), (stage, name, default)


def test_closed_lists_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(report_names()) == {"none", "all", *INTEGRATION_TO_CALLBACK}


def test_schedulers_are_those_of_transformers():
    import inspect

    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    for name, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        takes = scheduler_arguments(name.value)
        names = set(inspect.signature(function).parameters)
        assert takes is None or set(takes) <= names, name
    assert scheduler_arguments("cosine") == {"num_cycles": False}
    assert scheduler_arguments("warmup_stable_decay")["num_decay_steps"] is True


# --- keys without effect ---------------------------------------------------------------------------------------------

NO_EFFECT = (
    ("reward", "reference: cached", "#:5: 'reference' has no effect in reward: it belongs to dpo; remove it"),
    ("sft", "reference_cache: x", "#:5: 'reference_cache' has no effect in sft: it belongs to dpo; remove it"),
    ("sft", "max_reference_bias_nats: 2.0", "in sft: it belongs to dpo"),
    ("reward", "continue_adapter: false", "#:5: 'continue_adapter' has no effect in reward: it belongs to sft and dpo; remove it"),
    ("dpo", "label_smoothing_factor: 0.1", "in dpo: it belongs to sft"),
    ("dpo", "max_tokens_per_device: 99", "#:5: 'max_tokens_per_device' has no effect without global_batch_size; change that, or remove max_tokens_per_device"),
    ("dpo", "lora_r: 8", "without `use_peft: true`: all weights are trained"),
    ("dpo", "bnb_4bit_quant_type: fp4", "without `load_in_4bit: true`"),
    ("dpo", "reference: online\nreference_model: x", "without `reference: cached` or `nf4`"),
    ("dpo", "reference: online\nreference_cache: x", "#:6: 'reference_cache' has no effect without `reference: cached`"),
    ("dpo", "global_batch_size: 8\ndataloader_drop_last: true", "#:6: 'dataloader_drop_last' has no effect with global_batch_size"),
    ("dpo", "global_batch_size: 8\ndataloader_in_order: false", "#:6: 'dataloader_in_order' has no effect with global_batch_size"),
    ("dpo", "global_batch_size: 8\nper_device_eval_batch_size: 8", "with global_batch_size"),
    ("dpo", "label_smoothing: 0.1", "without a loss_type that smooths (robust, exo_pair, aot, aot_unpaired)"),
    ("dpo", "discopop_tau: 0.1", "without `loss_type: discopop`"),
    ("dpo", "f_alpha_divergence_coef: 0.1", "without `f_divergence_type: alpha_divergence`"),
    ("dpo", "ref_model_sync_steps: 8", "without `sync_ref_model: true`"),
    ("dpo", "neftune_noise_alpha: 5", "without `packing: false`"),
    ("dpo", "optim: sgd\nadam_beta1: 0.9", "#:6: 'adam_beta1' has no effect with this `optim`, which is not an Adam"),
    ("dpo", "lr_scheduler_type: constant\nwarmup_steps: 3", "#:6: 'warmup_steps' has no effect with a scheduler that does not"),
    ("dpo", "pad_to_multiple_of: 8", "without `packing: false`: packed rows have no padding"),
    ("dpo", "gradient_checkpointing: false\ngradient_checkpointing_kwargs: {use_reentrant: true}", "#:6: 'gradient_checkpointing_kwargs' has no effect without `gradient_checkpointing: true`"),
    ("dpo", "torch_compile: true", "#:5: 'torch_compile' has no effect that is worth its price without `packing: false`: "),
    ("sft", "torch_compile_mode: default", "'torch_compile_mode' has no effect that is worth its price without `packing: false`"),
    ("dpo", "optim_target_modules: [a]", "without a GaLore or APOLLO `optim`"),
    ("dpo", "eval_steps: 8", "without `eval_strategy: steps`"),
    ("dpo", "save_strategy: epoch\nsave_steps: 8", "#:6: 'save_steps' has no effect without `save_strategy: steps`"),
    ("dpo", "hub_model_id: a/b", "without `push_to_hub: true`"),
    ("dpo", "trackio_space_id: a/b", "without `report_to: trackio`"),
    ("dpo", "max_eval_examples: 8", "without heldout, dataset_test_split or eval_dataset_name"),
    *(("dpo", f"{key}: 1", f"#:5: key '{key}' can't be set here: ") for key in
      ("local_rank", "resume_from_checkpoint", "label_names", "do_train", "do_eval", "do_predict", "ignore_data_skip",
       "remove_unused_columns", "auto_find_batch_size", "save_only_model", "parallelism_config", "use_cache")),
)  # fmt: skip


@pytest.mark.parametrize(
    "stage, text, expected", NO_EFFECT, ids=[f"{s} {t}".replace("\n", " ") for s, t, _ in NO_EFFECT]
)
def test_key_without_effect(tmp_path, stage, text, expected):
    assert expected in refusal(tmp_path, text, stage)


def test_a_revision_of_what_is_no_hub_model(tmp_path):
    for name in (str(tmp_path), "embedded:smollm2-135m-instruct"):
        found = refusal(tmp_path, "model_revision: v1", words=["--model_name_or_path", name])
        assert found.startswith("#:5: 'model_revision' has no effect on ")


def test_what_the_command_line_switches_off_needs_no_deleting(tmp_path):
    path = tmp_path / "dpo.yaml"
    path.write_text(
        f"stage: dpo\n{BASE}dataset_test_split: t\neval_strategy: steps\neval_steps: 5\nreference_cache: x\n"
    )
    recipe = load_recipe(str(path), "dpo", ["--eval_strategy", "no", "--reference", "online"])
    assert recipe.get("eval_steps") == 5


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_every_key_of_the_libraries_is_judged_once(stage):
    """A new release of TRL or transformers brings keys: look at what reads each, and put it where it belongs."""
    own = {key.name for key in allowed_keys(stage).values() if key.owner == "StageConfig"} - {"packing"}
    for name in set(allowed_keys(stage)) - own:
        found = [table for table in (REFUSED, ONLY_WITH, EFFECTIVE) if name in table]
        assert len(found) == 1, (name, len(found))


def test_keys_that_are_true_by_default_are_known():
    keys = allowed_keys("dpo") | allowed_keys("sft")
    assert {name for name in ONLY_WITH if name in keys and keys[name].default == "True"} == set(_TRUE_BY_DEFAULT)


def test_judged_keys_exist():
    known = set().union(*(allowed_keys(stage) for stage in ("sft", "reward", "dpo")))
    assert (set(ONLY_WITH) | EFFECTIVE | set(STAGES_OF)) - known == set()


# --- names of other projects -----------------------------------------------------------------------------------------


def test_names_of_others_are_none_of_ours():
    ours = set().union(*(allowed_keys(stage) for stage in ("sft", "reward", "dpo")))
    assert len(FOREIGN) >= 60
    assert set(FOREIGN) & ours == set()


def test_answers_name_keys_that_exist():
    known = set().union(*(allowed_keys(stage) for stage in ("sft", "reward", "dpo"))) | {"heldout"}
    for name, found in FOREIGN.items():
        first = re.match(r"[a-z_0-9]+$|`?([a-z_0-9]+)(?=:|`| \(| and |,|;)", found)
        if first and not found.startswith(("nothing", "that is", "the stage")):
            assert (first.group(1) or first.group(0)) in known, (name, found)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("lr", "unknown key 'lr'; use learning_rate"),
        ("lora_rank", "unknown key 'lora_rank'; use lora_r"),  # and not local_rank, which is nearer
        ("micro_batch_size", "use per_device_train_batch_size; or better global_batch_size"),
        ("cutoff_len", "use max_length"),
        ("num_epochs", "use num_train_epochs"),
        ("pref_beta", "use beta"),
        ("sequence_len", "use max_length"),
        ("batch_size", "use global_batch_size"),  # which is a key of evaluate's
        ("template", "use chat_template"),
        ("finetuning_type", "use `use_peft: true`"),
        ("adapter", "use `use_peft: true`"),
        ("datasets", "use dataset_name"),
        ("base_model", "use model_name_or_path"),
        ("val_set_size", "use heldout"),
        ("flash_attn", "drop it: packed attention uses a varlen flash kernel"),
        ("zero_stage", "set it in the launch file"),
        ("pretrain", "use model_name_or_path"),
        ("torch_dtype", "use dtype"),
        ("max_prompt_length", "use max_length, which limits prompt and answer together"),
        ("overwrite_output_dir", "use --fresh"),
    ],
)
def test_name_of_another_project(tmp_path, name, expected):
    found = refusal(tmp_path, f"{name}: 1")
    assert found.startswith(f"#:5: unknown key '{name}'; ") and expected in found


# --- launch files ----------------------------------------------------------------------------------------------------

DEEPSPEED, FSDP = "distributed_type: DEEPSPEED\n", "distributed_type: FSDP\n"
DAMAGED = {
    DEEPSPEED + "deepspeed_config: hello": "#:2: 'deepspeed_config' is 'hello'; expected `key: value` lines below it",
    DEEPSPEED + "deepspeed_config: {zero_stage: two}": "#:2: deepspeed_config.zero_stage is 'two'; expected an integer from 0 to 3",
    DEEPSPEED + "deepspeed_config: {zero_stage: null}": "#:2: deepspeed_config.zero_stage is None; expected an integer",
    DEEPSPEED + "deepspeed_config: {zero_stage: 7}": "#:2: deepspeed_config.zero_stage is 7; expected",
    DEEPSPEED + "deepspeed_config: {offload_param_device: [1]}": "#:2: deepspeed_config.offload_param_device is [1]; expected one value",
    FSDP + "fsdp_config: [1]": "#:2: 'fsdp_config' is [1]; expected `key: value` lines below it",
    FSDP + "fsdp_config: {fsdp_version: x}": "#:2: fsdp_config.fsdp_version is 'x'; expected an integer from 1 to 2",
    "distributed_type: NO\nmain_process_ip: 2024-13-45": "#:2: 'main_process_ip' can't be read: month must be in 1..12",
    "distributed_type: [NO]": "#: not a launch file of accelerate",
    "distributed_type: MEGATRON_LM": "#:1: 'distributed_type' is 'MEGATRON_LM'; expected NO, MULTI_GPU",
    "distributed_type: NO\nmixed_precision: 7": "#:2: 'mixed_precision' is 7; expected no, bf16 or fp16",
    "distributed_type: NO\nparallelism_config: {parallelism_config_tp_size: x}": "#:2: parallelism_config.parallelism_config_tp_size is 'x'",
    "distributed_type: &a NO": "#:1:19: aliases ('&a') are not supported",
    bytes(200): "#:1: not valid YAML: character #x0000 is not allowed",
    b"\xff\xfe" * 30: "#: UTF-16, not UTF-8 text; save the launch file as UTF-8",
    b"\x80\x81": "#: not UTF-8 text (byte 0); save the launch file as UTF-8",
}  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: repr(text[:60]))
def test_damaged_launch_file(tmp_path, text):
    path = tmp_path / "l.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        topology_of_file(str(path))
    assert str(caught.value).replace(str(path), "#").startswith(DAMAGED[text])


REFUSED_LAUNCHES = (
    ("mixed_precision: fp8", {}, "sets `mixed_precision: fp8`"),
    ("parallelism_config: {parallelism_config_tp_size: 2}", {}, "sets tensor parallelism, which is not supported"),
    ("parallelism_config: {parallelism_config_cp_size: 2, parallelism_config_sp_size: 4}", {}, "context and sequence parallelism"),
    ("mixed_precision: bf16", {"bf16": "false"}, "--bf16: the recipe sets `bf16: false`, but "),
    ("mixed_precision: fp16", {"bf16": "true"}, "--bf16: the recipe sets `bf16: true`, but "),
)  # fmt: skip


@pytest.mark.parametrize("text, keys, expected", REFUSED_LAUNCHES, ids=[text for text, _, _ in REFUSED_LAUNCHES])
def test_what_a_launch_file_may_not_ask_for(tmp_path, monkeypatch, text, keys, expected):
    """From the file, and from the environment that accelerate makes of it."""
    from faults import environment_of

    recipe, launch = tmp_path / "dpo.yaml", tmp_path / "l.yaml"
    recipe.write_text(f"stage: dpo\n{BASE}")
    launch.write_text(f"compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 8\n{text}\n")
    loaded = load_recipe(str(recipe), "dpo", [f"--{key}={value}" for key, value in keys.items()])
    with pytest.raises(UserError) as caught:
        check_topology(loaded, topology_of_file(str(launch)), False)
    assert expected in str(caught.value) and str(launch) in str(caught.value)
    made = (
        {"ACCELERATE_MIXED_PRECISION": "fp8"} if "fp8" in text else environment_of(str(launch))
    )  # it asks for a package
    for name, value in made.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        check_topology(loaded, topology_of_environment(), False)
    assert expected in str(caught.value)


@pytest.mark.parametrize("asked, keys, expected", [
    ("bf16", {}, (True, False)), ("no", {}, (False, False)), ("no", {"bf16": "true"}, (True, False)),
    ("bf16", {"bf16": "true"}, (True, False)),
])  # fmt: skip
def test_a_launch_files_precision_is_honoured(tmp_path, monkeypatch, asked, keys, expected):
    from rlhf.config.build import build_configs

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    path = tmp_path / "dpo.yaml"
    path.write_text(f"stage: dpo\n{BASE}use_cpu: true\n")
    args, _, _ = build_configs(load_recipe(str(path), "dpo", [f"--{key}={value}" for key, value in keys.items()]))
    assert (args.bf16, args.fp16) == expected


def test_fp16_needs_a_gpu(tmp_path, monkeypatch):
    from rlhf.config.build import build_configs

    path = tmp_path / "dpo.yaml"
    path.write_text(f"stage: dpo\n{BASE}use_cpu: true\n")
    with pytest.raises(UserError, match="--fp16: fp16 needs a GPU, but this run is on the CPU"):
        build_configs(load_recipe(str(path), "dpo", ["--fp16"]))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="the launch file's mixed_precision: fp16 needs a GPU"):
        build_configs(load_recipe(str(path), "dpo"))


def test_environment_that_is_none_of_accelerates(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE is 'two'; expected an integer"):
        topology_of_environment()


# --- the whole way ---------------------------------------------------------------------------------------------------


def test_refusals_import_no_torch(tmp_path):
    path = tmp_path / "dpo.yaml"
    path.write_text(f"stage: dpo\n{BASE}lr: {'[' * 3000}\n")
    code = (
        "import sys; from rlhf.__main__ import main; code = main(['dpo', sys.argv[1], '--status'])\n"
        "print(code, [m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, capture_output=True, text=True)
    expected = f"rlhf: {path}:5:16: nested more than 12 levels deep; values are flat\n"
    assert (done.stdout, done.stderr) == ("2 []\n", expected)


def test_stage_config_has_help():
    assert all(key.help for key in allowed_keys("dpo").values() if key.owner == StageConfig.__name__)
    assert EvaluateConfig.__name__ in {key.owner for key in allowed_keys("evaluate").values()}


@pytest.mark.parametrize(
    "words, expected",
    [
        (["x" * 100_000], "invalid choice: 'xxxx"),
        (["report", "x", "--" + "x" * 100_000], "unknown argument '--xxxx"),
        (["chat", "m", "--top_p", "7"], "argument --top_p: '7' is not a number from 1e-06 to 1"),
        (["chat", "m", "--temperature", "nan"], "argument --temperature: 'nan' is not a number from 0 to 100"),
        (["chat", "m", "--max_new_tokens", "-1"], "argument --max_new_tokens: '-1' is not a number from 1 to 1e+06"),
        (["chat", "m", "--seed", "9" * 5000], "argument --seed: '9999"),
        (["pairs", "d", "--limit", "-5"], "argument --limit: '-5' is not a number from 1 to 1e+12"),
        (["preflight", "--timeout_s", "0"], "argument --timeout_s: '0' is not a number from 1 to 1e+06"),
    ],
)
def test_words_of_other_commands(capsys, words, expected):
    with pytest.raises(SystemExit) as done:
        main(words)
    error = capsys.readouterr().err
    assert done.value.code == 2 and expected in error and len(error) < 2500


def test_a_long_word_in_the_recipes_place(capsys):
    assert main(["dpo", "x" * 100_000, "--beta", "1"]) == 2
    assert capsys.readouterr().err.startswith(
        "rlhf: the recipe comes first: rlhf dpo RECIPE.yaml --key value (found 'xxx"
    )
    assert main(["dpo", "x" * 100_000]) == 2
    assert len(capsys.readouterr().err) < 400


def test_report_of_a_folder_with_a_damaged_recipe(tmp_path, capsys):
    (tmp_path / "dpo.yaml").write_text(f"stage: dpo\noutput_dir: {'[' * 3000}\n")
    assert main(["report", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err == f"rlhf: {tmp_path}/dpo.yaml:2:24: nested more than 12 levels deep; values are flat\n"
    )
