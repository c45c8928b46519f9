"""Tokenizers: chat templates that end answers with EOS, a dedicated pad token, and the token ids of a pair."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer
from trl.data_utils import common_prefix_length

from rlhf.data.messages import KEPT_FIELDS, Messages
from rlhf.distributed.sharding import unsharded_shape, writable
from rlhf.errors import UserError, one_line
from rlhf.models.folder import revision_of

TEMPLATES = Path(__file__).parent / "chat_templates"


PAD_CANDIDATES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")


NEW_PAD_TOKEN = "<|pad|>"


PROBE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]


def load_tokenizer(
    name: str, chat_template: str | None = None, trust_remote_code: bool = False, encoder: bool = False, revision: str = "main"
):  # fmt: skip
    """Load a tokenizer with a chat template and a pad token that differs from its end-of-sequence token.

    Args:
        name: a model that `locate` returned.
        chat_template: `alpaca`, `chatml`, `plain` or a .jinja file; None takes the model's own, or alpaca if it has none.
        revision: of a hub's model.
        encoder: a BERT-like reward model, whose answers need not end with EOS.

    Raises:
        UserError: an unknown template, or one without EOS, with which a policy would never learn to stop.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        name, trust_remote_code=trust_remote_code, revision=revision_of(name, revision)
    )
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
        if chat_template == "plain":
            tokenizer.chat_template = _with_begin(tokenizer, tokenizer.chat_template)
    elif not tokenizer.chat_template:
        tokenizer.chat_template = read_template("alpaca")
    ensure_pad_token(tokenizer)
    if not encoder:
        _check_template_ends(tokenizer)
    return tokenizer


def read_template(name: str) -> str:
    """The text of a chat template: `alpaca`, `chatml`, `plain`, or a .jinja file."""
    path = TEMPLATES / f"{name}.jinja" if "/" not in name and not name.endswith(".jinja") else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
        raise UserError(f"chat_template: no template '{name}'; expected {known} or the path of a .jinja file")
    return path.read_text(encoding="utf-8")


def _with_begin(tokenizer, template: str) -> str:
    """The plain template for a tokenizer: it starts with the special tokens that the tokenizer writes before a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return template.replace('set begin = ""', f"set begin = {json.dumps(tokenizer.decode(full[:start]))}")


def ensure_pad_token(tokenizer) -> None:
    """Give the tokenizer a dedicated pad token, from its own vocabulary if that has a suitable one.

    With pad = EOS a reward model would read its score one token too early (transformers looks for the last non-pad
    token), and collators that mask by token would drop EOS from the labels.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    vocabulary = tokenizer.get_vocab()
    for token in PAD_CANDIDATES:
        if token in vocabulary and token not in (tokenizer.eos_token, tokenizer.bos_token):
            tokenizer.pad_token = token
            return
    tokenizer.add_special_tokens({"pad_token": NEW_PAD_TOKEN})


def _check_template_ends(tokenizer) -> None:
    prompt = tokenizer.apply_chat_template(PROBE[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    complete = tokenizer.apply_chat_template(PROBE, return_dict=True)["input_ids"]
    if tokenizer.eos_token_id not in complete[len(prompt) :]:
        raise UserError(
            f"the chat template does not end an answer with the end-of-sequence token {tokenizer.eos_token!r} (it ends "
            f"with {tokenizer.decode(complete[-2:])!r}), so the model would never learn to stop; set `chat_template` in "
            "the recipe to one that does"
        )


def template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """What TRL's trainers hand to the chat template for a canonical row, beside its messages: tools and the row's own variables."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools or None, **(row.get("chat_template_kwargs") or {})}


def render(tokenizer, row: dict[str, Any], messages: Messages, **options) -> list[int]:
    """Token ids of messages of a canonical row, as TRL's trainers make them.

    Raises:
        UserError: the template can't render them; with the row's place.
    """
    options = {**template_arguments(row), **options}
    try:
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
    except (TemplateError, TypeError, AttributeError) as error:
        place = f"{row['place']}: " if "place" in row else ""
        raise UserError(f"{place}the chat template can't render this row: {one_line(error, 200)}") from None


def tokenize_pair(tokenizer, row: dict[str, Any]) -> dict[str, list[int]]:
    """Token ids of a canonical pair, split exactly as by TRL's DPOTrainer.

    Returns:
        {"prompt_ids", "chosen_ids", "rejected_ids"}: the prompt ends where the prompt alone and the prompt with an
        answer start to differ.
    """
    prompt = render(tokenizer, row, row["prompt"], add_generation_prompt=True)
    chosen, rejected = (render(tokenizer, row, row["prompt"] + row[side]) for side in ("chosen", "rejected"))
    cut = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
    return {"prompt_ids": prompt[:cut], "chosen_ids": chosen[cut:], "rejected_ids": rejected[cut:]}


def template_drops(tokenizer, row: dict[str, Any]) -> list[str]:
    """What a canonical row has and the chat template leaves out: fields without which it renders the very same texts.

    Returns:
        Names such as `tools`, `chat_template_kwargs.enable_thinking`, `tool_calls`, `reasoning_content`, or `role tool` for the
        messages of a role; empty if all is rendered, or if the row has no chat (`text`).

    Raises:
        UserError: the template can't render the row.
    """
    if "text" in row:
        return []
    try:
        wanted = _rendered(tokenizer, row)
    except Exception as error:  # a template raises what it likes
        raise UserError(f"the chat template can't render this row: {one_line(error, 200)}") from None
    return [name for name, without in _reductions(row) if _renders_as(tokenizer, without, wanted)]


def _rendered(tokenizer, row: dict[str, Any]) -> list[str]:
    arguments = template_arguments(row)
    return [tokenizer.apply_chat_template(m, tokenize=False, **arguments) for m in conversations(row)]


def _renders_as(tokenizer, row: dict[str, Any], wanted: list[str]) -> bool:
    try:
        return _rendered(tokenizer, row) == wanted
    except Exception:  # without the field it can't be rendered, so it is used
        return False


def conversations(row: dict[str, Any]) -> list[Messages]:
    """The whole conversations of a canonical row: prompt and answer, for each answer."""
    if "messages" in row:
        return [row["messages"]]
    return [row["prompt"] + row[side] for side in ("completion", "chosen", "rejected") if side in row]


def _reductions(row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of a part, the row without it)."""
    if row.get("tools"):
        yield "tools", {**row, "tools": None}
    kwargs = row.get("chat_template_kwargs") or {}
    for name in kwargs:
        yield (
            f"chat_template_kwargs.{name}",
            {**row, "chat_template_kwargs": {k: v for k, v in kwargs.items() if k != name}},
        )
    parts: dict[str, Messages] = {
        key: row[key] for key in ("prompt", "completion", "chosen", "rejected", "messages") if key in row
    }
    every = [message for found in parts.values() for message in found]
    for field in KEPT_FIELDS:
        if any(message.get(field) for message in every):
            bare = {part: [{k: v for k, v in m.items() if k != field} for m in found] for part, found in parts.items()}
            yield field, row | bare
    for role in ("system", "developer", "tool"):
        if any(message["role"] == role for message in every):
            yield f"role {role}", row | {part: [m for m in found if m["role"] != role] for part, found in parts.items()}


def fit_tokenizer(model, tokenizer):
    """Resize the embeddings for an added pad token, and set pad and EOS in the model's configs."""
    weight = model.get_input_embeddings().weight
    rows = unsharded_shape(weight)[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():  # a fixed value (the mean), so that two loads give the same model
            for layer in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
                with writable(layer.weight):
                    layer.weight[rows:] = layer.weight[:rows].mean(dim=0)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        stops = model.generation_config.eos_token_id
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in (
            stops if isinstance(stops, list) else [stops]
        ):
            model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model
