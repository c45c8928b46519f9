"""Canonical rows become the token ids that TRL's own preparation gives the raw rows; what a template drops is named."""

import json
from types import SimpleNamespace

import pytest
from canonical import preference_rows, sft_rows
from datasets import Dataset
from trl import DPOTrainer, RewardTrainer, SFTTrainer

from rlhf.data.format_options import FormatOptions
from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.models.tokenizer import load_tokenizer, template_drops, tokenize_pair
from rlhf.training.lengths import answers_cut
from rlhf.training.tokenise import Counts, Settings, Tokenise

# Tools, their calls and results, reasoning, a variable; asks `'tool_calls' in message`, as Llama's template does.
TEMPLATE = """{%- if tools -%}<|im_start|>system
Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}<|im_end|>
{% endif -%}
{%- for m in messages -%}<|im_start|>{{ m.role }}{{ " " + m.name if m.name else "" }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif -%}
{%- if 'tool_calls' in m and m.tool_calls %}{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}{% endif -%}
{{ m.content or "" }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif -%}"""
STRICT = TEMPLATE.replace("'tool_calls' in m and m.tool_calls", "'tool_calls' in m")


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool_of(name, **properties):
    schema = {"type": "object", "properties": {k: {"type": v} for k, v in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": f"What {name} is.", "parameters": schema}}


WEATHER, TIME = tool_of("weather", city="string"), tool_of("time", zone="integer", format="string")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
Q, A, B = [user("What color is the sky?")], [assistant("It is blue.")], [assistant("It is green.")]
CALLING = [
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "name": "weather", "content": "18"},
    assistant("18 degrees."),
]
PAIRS = {
    "explicit": {"prompt": Q, "chosen": A, "rejected": B},
    "implicit": {"chosen": [*Q, *A], "rejected": [*Q, *B]},
    "tools": {"prompt": Q, "chosen": CALLING, "rejected": B, "tools": [WEATHER]},
    "other tools": {"prompt": Q, "chosen": A, "rejected": B, "tools": [TIME, WEATHER]},
    "tools as text": {"prompt": Q, "chosen": CALLING, "rejected": B, "tools": json.dumps([WEATHER])},
    "call and result in the prompt": {"prompt": Q + CALLING[:2], "chosen": A, "rejected": B},
    "reasoning": {"prompt": Q, "chosen": [assistant("Blue.", reasoning_content="Rayleigh.")], "rejected": [assistant("Blue.")]},
    "variables": {"prompt": Q, "chosen": A, "rejected": B, "chat_template_kwargs": {"enable_thinking": False}},
    "several turns": {"prompt": Q, "chosen": [*A, user("Why?"), assistant("Rayleigh.")], "rejected": B},
    "earlier divergence": {"chosen": [*Q, *A, user("Why?"), *A], "rejected": [*Q, *B, user("How?"), *B]},
}  # fmt: skip
SFTS = {
    "prompt and completion": {"prompt": Q, "completion": A},
    "tools": {"prompt": Q, "completion": CALLING, "tools": [WEATHER]},
    "dialogue": {"messages": [*Q, *CALLING], "tools": [WEATHER]},
    "reasoning": {"prompt": Q, "completion": [assistant("Blue.", reasoning_content="Rayleigh.")]},
    "variables": {"prompt": Q, "completion": A, "chat_template_kwargs": {"enable_thinking": False}},
}


@pytest.fixture(params=["chat with tools", "chatml"])
def tokenizer(request, tiny_llama):
    loaded = load_tokenizer(tiny_llama)
    if request.param == "chat with tools":
        loaded.chat_template = TEMPLATE
    return loaded


def trl_prepares(trainer, tokenizer, dataset):
    """Rows of token ids, by TRL's own method; only what it reads of a trainer is there."""
    args = SimpleNamespace(
        dataset_num_proc=None,
        max_length=None,
        dataset_text_field="text",
        assistant_only_loss=False,
        truncation_mode="keep_start",
        shuffle_dataset=False,
    )
    holder = SimpleNamespace(_tokenizer=tokenizer, chat_template=tokenizer.chat_template, completion_only_loss=True)
    more = (False, None, "train") if trainer is SFTTrainer else ("train",)
    return trainer._prepare_dataset(holder, dataset, tokenizer, args, *more)


def source(*rows):
    return Source("f.jsonl", list(rows), None, "digest")


def as_trl_loads(raw):
    """A raw row as the data set that TRL's users have: tools as JSON, since Arrow would give each the others' parameters."""
    tools = raw.get("tools")
    return Dataset.from_list([raw if tools is None or isinstance(tools, str) else {**raw, "tools": json.dumps(tools)}])


def tokenised(stage, tokenizer, rows):
    return Tokenise(tokenizer, Settings(stage, None))(rows, 0, Counts())


@pytest.mark.parametrize("name", PAIRS)
def test_pair_has_trls_tokens(tokenizer, name):
    raw = PAIRS[name]
    (row,) = preference_rows(source(raw))
    ours = tokenize_pair(tokenizer, row)
    theirs = trl_prepares(DPOTrainer, tokenizer, as_trl_loads(raw))[0]
    assert {side: ours[side] for side in ours} == {side: theirs[side] for side in ours}
    rewards = trl_prepares(RewardTrainer, tokenizer, as_trl_loads(raw))[0]
    assert rewards["chosen_ids"] == ours["prompt_ids"] + ours["chosen_ids"]
    assert rewards["rejected_ids"] == ours["prompt_ids"] + ours["rejected_ids"]


@pytest.mark.parametrize("name", SFTS)
def test_sft_row_has_trls_tokens(tokenizer, name):
    raw = SFTS[name]
    (row,) = sft_rows(source(raw))
    theirs = trl_prepares(SFTTrainer, tokenizer, as_trl_loads(raw))[0]
    ours = tokenised("sft", tokenizer, [row])
    assert (ours["input_ids"], ours["labels"]) == ([theirs["input_ids"]], [theirs["labels"]])


@pytest.mark.parametrize("template", [TEMPLATE, STRICT], ids=["lenient", "asks for the field"])
def test_rows_of_one_data_set_don_t_give_each_other_nulls(tiny_llama, template):
    """One tool's parameters would appear in another tool, and `tool_calls` in every message."""
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = template
    rows = preference_rows(source(*PAIRS.values()))
    together = tokenised("dpo", tokenizer, rows)
    for number, row in enumerate(rows):
        alone = tokenize_pair(tokenizer, row)
        assert {side: together[side][number] for side in alone} == alone


def test_lengths_count_tools_and_all_turns(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    (row,) = preference_rows(source(PAIRS["tools"]))
    ids = tokenize_pair(tokenizer, row)
    longest = len(ids["prompt_ids"]) + len(ids["chosen_ids"])
    limits = (longest, longest - 1)
    assert [answers_cut([row], tokenizer, Settings("dpo", n))[0].cut.rows for n in limits] == [0, 1]


# --- texts of a base model -------------------------------------------------------------------------------------------

TEXTS = {
    "explicit": {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    "implicit": {"chosen": "The sky is blue.\n", "rejected": "The sky is green.\n"},
    "implicit, without a space": {"chosen": "The sky is blue", "rejected": "The sky is black"},
    "with its EOS": {"prompt": "  def f():\n", "chosen": "    return 1\n<|endoftext|>", "rejected": "    pass\n"},
}
PLAIN = FormatOptions("plain")


@pytest.fixture(params=["no BOS", "BOS"])
def plain_tokenizer(request, tiny_gpt2, tmp_path):
    """GPT-2 adds nothing to a text; Llama's tokenizers add BOS."""
    if request.param == "no BOS":
        return load_tokenizer(tiny_gpt2, "plain")
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tiny_gpt2)
    loaded.add_special_tokens({"bos_token": "<s>"})
    loaded.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", loaded.bos_token_id)]
    )
    loaded.save_pretrained(tmp_path)
    return load_tokenizer(str(tmp_path), "plain")


@pytest.mark.parametrize("name", TEXTS)
def test_plain_pair_has_trls_tokens(plain_tokenizer, name):
    (row,) = preference_rows(source(TEXTS[name]), None, PLAIN)
    ours = tokenize_pair(plain_tokenizer, row)
    theirs = trl_prepares(DPOTrainer, plain_tokenizer, Dataset.from_list([TEXTS[name]]))[0]
    assert ours == {side: theirs[side] for side in ours}
    assert ours["chosen_ids"][-1] == plain_tokenizer.eos_token_id


def test_plain_sft_has_trls_tokens(plain_tokenizer):
    raw = {"prompt": "The sky is", "completion": " blue.\n"}
    (row,) = sft_rows(source(raw), None, PLAIN)
    theirs = trl_prepares(SFTTrainer, plain_tokenizer, as_trl_loads(raw))[0]
    assert tokenised("sft", plain_tokenizer, [row])["labels"] == [theirs["labels"]]
    assert sft_rows(source({"text": " The sky.\n"}), None, PLAIN) == [{"text": " The sky.\n"}]


def test_plain_keeps_a_prompt_that_all_answers_repeat():
    row = {
        "prompt": "The sky over Paris is",
        "chosen": "The sky over Paris is blue",
        "rejected": "The sky over Paris is red",
    }
    assert preference_rows(source(row), None, PLAIN)[0]["chosen"] == [assistant(row["chosen"])]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"chosen": "a", "rejected": "b"}, "there is no 'prompt', and 'chosen' and 'rejected' don't start alike"),
        ({**TEXTS["explicit"], "system": "S"}, "'system' can't be used with `format: plain`"),
        ({**TEXTS["explicit"], "chosen": A}, "'chosen' is list "),
        ({"prompt": "x"}, "found columns prompt; expected the texts chosen + rejected"),
    ],
)
def test_plain_row_error(row, message):
    with pytest.raises(UserError) as caught:
        preference_rows(source(row), None, PLAIN)
    assert str(caught.value).startswith(f"f.jsonl, row 1: {message}")


# --- what a template drops -------------------------------------------------------------------------------------------

EVERYTHING = {
    "prompt": [{"role": "developer", "content": "Be brief."}, *Q, *CALLING[:2]],
    "chosen": [assistant("Blue.", reasoning_content="Rayleigh.")],
    "rejected": B,
    "tools": [WEATHER],
    "chat_template_kwargs": {"enable_thinking": False, "tone": "kind"},
}


def drops(name, template, row, request):
    tokenizer = load_tokenizer(request.getfixturevalue(name))
    tokenizer.chat_template = template or tokenizer.chat_template
    return template_drops(tokenizer, row)


def test_template_that_renders_all_drops_nothing(request):
    row = {k: v for k, v in EVERYTHING.items() if k != "chat_template_kwargs"}
    assert drops("tiny_llama", TEMPLATE, row, request) == []


def test_variable_that_no_turn_reads_is_dropped(request):
    """`enable_thinking` of this template writes into the start of an answer that is to come, not into one that is there."""
    kwargs = ["chat_template_kwargs.enable_thinking", "chat_template_kwargs.tone"]
    assert drops("tiny_llama", TEMPLATE, EVERYTHING, request) == kwargs


def test_template_that_renders_contents_alone(request):
    """ChatML writes every role's content."""
    found = drops("tiny_llama", None, EVERYTHING, request)
    assert found == [
        "tools", "chat_template_kwargs.enable_thinking", "chat_template_kwargs.tone", "tool_calls", "reasoning_content", "name"
    ]  # fmt: skip


def test_template_that_skips_roles(request):
    row = {"prompt": EVERYTHING["prompt"], "completion": A}
    assert drops("tiny_gpt2", None, row, request) == ["tool_calls", "name", "role developer", "role tool"]


def test_a_text_has_no_template(request):
    assert drops("tiny_llama", None, {"text": "x"}, request) == []


def test_template_that_stops_at_the_row_is_one_sentence(request):
    template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="^the chat template can't render this row: no system role$"):
        drops("tiny_llama", template, EVERYTHING, request)
