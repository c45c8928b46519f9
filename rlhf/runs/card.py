"""The model card (README.md) of a training run, written only from what the run's own files record.

It replaces the cards of TRL and PEFT, which contain `None` and `[More Information Needed]`. A card can be published as
it is: paths of this machine are shortened to their last component.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from rlhf.data.mix import data_name
from rlhf.files import read_json, write_file
from rlhf.models import embedded
from rlhf.runs.command import TOKEN, shell_line
from rlhf.runs.measure_tables import tables
from rlhf.runs.metrics import findings_of, read_metrics
from rlhf.runs.records import describe_best
from rlhf.runs.results import COLUMNS, cut_sentence, judge_sentence, part_about, table_rows, what_got_worse
from rlhf.runs.verdict import (
    MODEL_COLUMNS,
    PAIR_COLUMNS,
    compared_with_others,
    model_note,
    model_rows,
    pair_note,
    pair_rows,
    verdicts,
)

CARD = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
EMBEDDED_ID, EMBEDDED_LICENCE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
MARK = "<!-- written by rlhf-dpo; evaluate adds its results as long as the text above is unchanged: sha256 {} -->"
KINDS = {"sft": "A language model after supervised fine-tuning (SFT)",
         "reward": "A reward model: it scores an answer to a conversation, higher is better",
         "dpo": "A language model after direct preference optimization (DPO)"}  # fmt: skip
TAGS = {"sft": ["trl", "sft"], "reward": ["trl", "reward-trainer"], "dpo": ["trl", "dpo"]}
QUESTION = '{"role": "user", "content": "What is a good way to start the day?"}'
ANSWER = '{"role": "assistant", "content": "With a walk."}'

USAGE = {
    ("policy", False): f"""\
from transformers import pipeline
generator = pipeline("text-generation", model=".")
print(generator([{QUESTION}], max_new_tokens=64)[0]["generated_text"][-1]["content"])""",
    ("policy", True): f"""\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model, tokenizer = AutoPeftModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
question = tokenizer.apply_chat_template([{QUESTION}], add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**question, max_new_tokens=64)[0], skip_special_tokens=True))""",
    ("reward", False): f"""\
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model, tokenizer = AutoModelForSequenceClassification.from_pretrained("."), AutoTokenizer.from_pretrained(".")
messages = [{QUESTION}, {ANSWER}]
print(model(tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")["input_ids"]).logits.item())""",
    ("reward", True): f"""\
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer
model = AutoPeftModelForSequenceClassification.from_pretrained(".", num_labels=1).eval()
tokenizer = AutoTokenizer.from_pretrained(".")
messages = [{QUESTION}, {ANSWER}]
print(model(input_ids=tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")["input_ids"]).logits.item())""",
}


def write_card(folder: Path, summary: dict[str, Any] | None = None, measured: dict[str, Any] | None = None) -> None:
    """Write README.md into a run folder (main process only); does nothing if no run has started there.

    Args:
        summary: the content of complete.json (which may be written later); None while the run trains.
        measured: {"folder", "results", "data", "key": as which model} of an evaluation of exactly these weights.
    """
    provenance = read_json(folder / "provenance.json")
    if not provenance:
        return
    text = card_text(folder, provenance, summary, measured)
    write_file(folder / CARD, text + MARK.format(hashlib.sha256(text.encode()).hexdigest()) + "\n")


def refresh_cards(
    names: dict[str, str], digests: dict[str, str], results: dict[str, Any], evaluation: Path
) -> list[str]:
    """Add an evaluation's results to the cards of the runs that it measured.

    A card is left unchanged if it was edited by hand, or if the run's weights are not the measured ones.

    Args:
        names, digests: of the measured models, by key (`sft_model`, ...).

    Returns:
        The cards that could not be written, each with the reason.
    """
    recipe = _recipe(evaluation)
    data = f"{public(data_name(recipe.get('dataset_name')))}, split `{recipe.get('dataset_test_split', 'test')}`"
    failed = []
    for key in names:
        folder = Path(names.get(key) or "/nowhere")
        complete = read_json(folder / "complete.json")
        if complete and complete.get("weights_sha256") == digests.get(key) and is_ours(folder / CARD):
            try:
                write_card(folder, complete, {"folder": str(evaluation), "results": results, "data": data, "key": key})
            except OSError as error:
                failed.append(f"{folder / CARD}: {error.strerror}")
    return failed


def is_ours(card: Path) -> bool:
    """Whether a card was written by `write_card` and has not been edited since."""
    try:
        text, _, mark = card.read_text(encoding="utf-8").rpartition(MARK.partition("{")[0])
    except (OSError, UnicodeDecodeError):
        return False
    return mark.startswith(hashlib.sha256(text.encode()).hexdigest())


# --- what is recorded about a run ------------------------------------------------------------------------------------


def _recipe(folder: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def ancestors(folder: Path, most: int = 20) -> list[str]:
    """The chain of models that a run was trained from, nearest first; the last is the earliest one on record."""
    names: list[str] = []
    while len(names) < most:
        name = _recipe(folder).get("model_name_or_path")
        inputs = (read_json(folder / "provenance.json") or {}).get("inputs") or {}
        if not isinstance(name, str):
            return names
        if inputs.get("model_name_or_path", name) != name and hub_id(name) == name:
            name = f"./{name}"  # it was a folder: only a hub id is its own digest
        if name in names:
            return names
        names.append(name)
        folder = Path(name)
    return names


def hub_id(name: str) -> str | None:
    """A model's (or a data set's) id on the hub; None if it is a local path or not on the hub under its name."""
    if name == embedded.NAME:
        return EMBEDDED_ID
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() and not name.endswith(".jsonl") else None


def public(name: str) -> str:
    """A model's or a file's name without the folders of this machine."""
    is_path = os.path.isabs(name) or name.startswith("~")
    return f"…/{Path(name).name}" if is_path else name


def hyper_parameters(recipe: dict[str, Any], provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of the main hyper-parameters, including the defaults that were in effect."""
    arguments = provenance.get("arguments") or {}
    found = {**(arguments.get("stage") or {}), **(arguments.get("model") or {}), **arguments, **recipe}
    get: Callable[[str], Any] = found.get
    batch = get("global_batch_size")
    if batch is None and get("per_device_train_batch_size"):
        processes = int((provenance.get("hardware") or {}).get("processes") or 1)
        batch = get("per_device_train_batch_size") * (get("gradient_accumulation_steps") or 1) * processes
    max_steps = get("max_steps") or 0
    epochs = get("num_train_epochs") and f"num_train_epochs={get('num_train_epochs'):g}"
    loss = get("loss_type")
    rows = [
        ("learning rate", get("learning_rate") and f"{float(get('learning_rate')):g}, {get('lr_scheduler_type')}"),
        ("examples per step", batch),
        ("length", f"max_steps={max_steps}" if max_steps > 0 else epochs),
        ("loss", ", ".join(loss) if isinstance(loss, list) else loss),
        ("beta", get("beta") if provenance.get("stage") == "dpo" else None),
        ("max_length", get("max_length")),
        ("method", method(found)),
        ("seed", get("seed")),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def method(found: dict[str, Any]) -> str:
    """`LoRA r=16` (on 4 bits), or `full fine-tuning`."""
    if not found.get("use_peft"):
        return "full fine-tuning"
    bits = " on a 4-bit base" if found.get("load_in_4bit") else " on an 8-bit base" if found.get("load_in_8bit") else ""
    return f"LoRA r={found.get('lora_r', 16)}{bits}"


def data_rows(recipe: dict[str, Any], provenance: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(purpose, name, sha256) of each data set the run used."""
    inputs = provenance.get("inputs") or {}
    name, split = data_name(recipe.get("dataset_name") or ""), recipe.get("dataset_train_split", "train")
    rows = [("training", f"{name}, split {split}", inputs.get("dataset_name"))] if name else []
    for side in ("chosen", "rejected"):
        key = f"{side}_dataset_name"
        if recipe.get(key):
            rows.append((f"training, {side}", recipe[key], inputs.get(key)))
    test_split = recipe.get("dataset_test_split")
    other = recipe.get("eval_dataset_name")
    if other or (name and test_split):
        rows.append(("held out", other or f"{name}, split {test_split}", inputs.get("heldout")))
    return [(what, str(name), digest or "not recorded") for what, name, digest in rows]


# --- the text --------------------------------------------------------------------------------------------------------


def card_text(folder: Path, provenance: dict, summary: dict | None, measured: dict | None) -> str:
    """The card without its last line."""
    recipe, stage = _recipe(folder), provenance["stage"]
    is_adapter = (folder / "adapter_config.json").is_file()
    names = ancestors(folder)
    kind = f"{KINDS[stage]}{', as a LoRA adapter' if is_adapter else ''}."
    title = public(str(recipe.get("hub_model_id") or recipe.get("output_dir") or folder.name))
    parts = [
        f"# {_plain(title.removeprefix('…/'))}",
        f"{kind} Made by rlhf-dpo {provenance['versions'].get('rlhf-dpo', '')}.",
    ]
    if summary is None:
        parts.append("**The training is not complete; this folder holds no finished model yet.**")
    else:
        who = "reward" if stage == "reward" else "policy"
        parts += ["## Usage", "In this folder (elsewhere, replace the dot with its path or hub id):"]
        parts.append(f"```python\n{USAGE[who, is_adapter]}\n```")
    parts += ["## Made from", *_origin_lines(names, is_adapter), "## Data", _table(
        ("for", "data set", "sha256"), [(w, public(n), f"`{d}`") for w, n, d in data_rows(recipe, provenance)])]  # fmt: skip
    parts += ["## Training", _table(("", ""), hyper_parameters(recipe, provenance))]
    if summary:
        parts.append(_training_line(folder, summary))
    parts.append(f"```\n{_public_command(provenance)}\n```")
    shown = {k: public(v) if isinstance(v, str) else v for k, v in recipe.items() if not k.endswith("token")}
    recipe_text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).replace("```", "'''")
    parts += ["The recipe:", f"```yaml\n{recipe_text}```", *_result_parts(stage, measured)]
    return f"---\n{front_matter(recipe, stage, names, is_adapter)}---\n\n" + "\n\n".join(parts) + "\n\n"


def front_matter(recipe: dict[str, Any], stage: str, names: list[str], is_adapter: bool) -> str:
    """The YAML front matter for the hub, without models and data sets that are not on the hub."""
    base, data = _base(names, is_adapter), hub_id(data_name(recipe.get("dataset_name") or ""))
    found: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-classification" if stage == "reward" else "text-generation",
        "tags": [*TAGS[stage], "rlhf-dpo", *(["lora"] if is_adapter else [])],
    }
    if base and hub_id(base):
        found["base_model"] = hub_id(base)
    if licence := licence_of(names):
        found["license"] = licence
    if data:
        found["datasets"] = [data]
    return yaml.safe_dump(found, sort_keys=False)


def _base(names: list[str], is_adapter: bool) -> str | None:
    """`base_model` as the hub defines it: what an adapter was trained on; for a full model, the earliest ancestor."""
    if not is_adapter:
        return names[-1] if names else None
    base = next((name for name in names if not (Path(name) / "adapter_config.json").is_file()), None)
    return base if base in (None, names[-1]) else f"./{base}"  # a model with a recipe of its own is a folder


def licence_of(names: list[str]) -> str | None:
    """The licence of the earliest ancestor, if it is recorded locally; else None."""
    if not names:
        return None
    if names[-1] == embedded.NAME:
        return EMBEDDED_LICENCE
    try:
        head = (Path(names[-1]) / CARD).read_text(encoding="utf-8").split("---")
        found = yaml.safe_load(head[1]) if len(head) > 2 and not head[0].strip() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    licence = found.get("license") if isinstance(found, dict) else None
    return licence if isinstance(licence, str) else None


def _origin_lines(names: list[str], is_adapter: bool) -> list[str]:
    lines = [" ← ".join(f"`{_code(public(name))}`" for name in names) or "Not recorded."]
    if names and names[-1] == embedded.NAME:
        lines.append(
            f"`{embedded.NAME}` is {EMBEDDED_ID} out of the 4-bit weights in the package {embedded.REQUIREMENT}."
        )
    licence = licence_of(names)
    lines.append(f"Licence of the base model: {_plain(licence)}." if licence else
                 "The licence of the base model is not recorded; see its own page before you publish this one.")  # fmt: skip
    base = _base(names, is_adapter)
    if is_adapter and (base is None or not hub_id(base) or base == embedded.NAME):
        lines.append(
            "The adapter's base model is on the machine that trained it: to use the adapter elsewhere, set "
            "`base_model_name_or_path` in adapter_config.json to the new path of the base model."
        )
    return lines


def _training_line(folder: Path, summary: dict[str, Any]) -> str:
    losses = [summary.get("first_loss"), summary.get("last_loss")]
    text = f"{summary['steps']} step{'' if summary['steps'] == 1 else 's'} on {summary['train_examples']} examples, "
    text += f"training loss {' → '.join(f'{float(x):.3f}' for x in losses if x is not None)}."
    metrics = read_metrics(folder)
    heldout = [m for m in metrics if "eval_loss" in m]
    if heldout:
        text += f" Held-out loss at step {heldout[-1]['step']}: {heldout[-1]['eval_loss']:.3f}."
    if best := describe_best(summary):
        text += f" {best[0].upper()}{best[1:]}."
    text += f" Weights sha256 `{summary.get('weights_sha256')}`."
    said = [f"- Step {row['step']}: {_plain(row['sentence'])}." for row in findings_of(metrics)]
    return "\n\n".join([text, *(["What the run said about itself:", "\n".join(said)] if said else [])])


def _public_command(provenance: dict[str, Any]) -> str:
    words = shell_line(provenance).replace("```", "'''")
    return " ".join(public(word) if not TOKEN.fullmatch(word) else word for word in words.splitlines()[0].split(" "))


def _result_parts(stage: str, measured: dict[str, Any] | None) -> list[str]:
    if measured is None:
        return ["## Results", "Not evaluated yet: `rlhf evaluate RECIPE.yaml` measures it and adds the results here."]
    found = [
        "## Results",
        f"On {measured['results']['pairs']} pairs of {_plain(measured['data'])}. All numbers: `{_code(public(measured['folder']))}/results.json`.",
    ]
    key = measured.get("key") or f"{stage}_model"
    if key == f"{stage}_model":
        results = part_about(measured["results"], stage)
        rows = table_rows(results)
        said = [what_got_worse(rows), judge_sentence(results), cut_sentence(results)]
        found += [_table(COLUMNS, rows), *(_plain(s) for s in said if s)]
    results = compared_with_others(measured["results"], key)
    found += [f"**{_plain(sentence)}**" for sentence in verdicts(results)]
    for columns, table, note in (
        (PAIR_COLUMNS, pair_rows(results), pair_note(results)),
        (MODEL_COLUMNS, model_rows(results), model_note(results)),
    ):
        found += [_table(columns, list(table)), _plain(note)] if table else []
    for more in tables(measured["results"]):
        if stage in more.stages:
            found += [f"### {_plain(more.title)}", _table(more.columns, more.rows)]
            found += [_plain(more.sentence)] if more.sentence else []
    return found


def _table(columns: tuple, rows: list) -> str:
    line = lambda cells: "| " + " | ".join(_plain(str(c)).replace("|", "\\|") for c in cells) + " |"  # noqa: E731
    return "\n".join([line(columns), "|" + " --- |" * len(columns), *map(line, rows)])


def _plain(text: str) -> str:
    """One line, with Markdown and HTML in it escaped."""
    return " ".join(text.split()).replace("<", "&lt;").replace("[", "\\[")


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")
