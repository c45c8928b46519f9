"""Templates, pad tokens, end-of-sequence, and tokenisation equal to TRL's."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import UserError
from rlhf.inference.generate import encode_prompt, generate
from rlhf.inference.score import encode_pair, pair_logps, score
from rlhf.models.folder import is_reward_model
from rlhf.models.inference import load_finished
from rlhf.models.tokenizer import load_tokenizer, read_template, tokenize_pair

CHAT = [
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]


def ids_of(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]


def test_gpt2_gets_the_alpaca_template_and_a_pad_token_of_its_own(tiny_gpt2):
    tokenizer = load_tokenizer(tiny_gpt2)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHi\n\n### Response:\nHello.<|endoftext|>\n\n"
        "### Instruction:\nBye\n\n### Response:\nSee you.<|endoftext|>"
    )
    assert tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True).endswith(
        "### Response:\n"
    )
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    # GPT-2's BOS is its EOS: the template must not begin with an end
    assert ids_of(tokenizer, CHAT)[0] != tokenizer.bos_token_id


def test_a_system_message_takes_the_place_of_alpacas_preamble(tiny_gpt2):
    tokenizer = load_tokenizer(tiny_gpt2)
    text = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *CHAT[:2]], tokenize=False)
    assert text == "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.<|endoftext|>"


@pytest.mark.parametrize("name", ["tiny_gpt2", "tiny_llama"], ids=["alpaca", "chatml"])
def test_indentation_of_an_answer_survives_template_and_tokens(name, request):
    tokenizer = load_tokenizer(request.getfixturevalue(name))
    row = {"prompt": CHAT[:1], "chosen": [{"role": "assistant", "content": "    return x"}],
           "rejected": [{"role": "assistant", "content": "return x"}]}  # fmt: skip
    assert "\n    return x" in tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
    pair = tokenize_pair(tokenizer, row)
    for side in ("chosen", "rejected"):  # where the blanks join the prompt's last token, both answers start before it
        assert pair["prompt_ids"] + pair[f"{side}_ids"] == ids_of(tokenizer, row["prompt"] + row[side])
    assert pair["chosen_ids"] != pair["rejected_ids"]


def test_bert_writes_cls_and_sep_once_each_answer(tiny_distilbert):
    tokenizer = load_tokenizer(tiny_distilbert, encoder=True)
    ids = ids_of(tokenizer, CHAT[:2])
    assert ids[0] == tokenizer.cls_token_id and ids.count(tokenizer.cls_token_id) == 1
    assert ids[-1] == tokenizer.sep_token_id and ids.count(tokenizer.sep_token_id) == 1
    assert tokenizer.pad_token == "[PAD]"


def test_no_double_bos(tiny_llama, tmp_path):
    """A tokenizer that adds BOS by itself, under a template that writes BOS: one BOS comes out."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), "alpaca")
    assert loaded("x")["input_ids"][0] == loaded.bos_token_id  # it does add one to plain text
    row = {"prompt": CHAT[:1], "chosen": CHAT[1:2], "rejected": CHAT[3:4]}
    pair = tokenize_pair(loaded, row)
    assert (pair["prompt_ids"] + pair["chosen_ids"]).count(loaded.bos_token_id) == 1
    assert pair["prompt_ids"][0] == loaded.bos_token_id


def test_pad_equal_to_eos_is_replaced_from_the_vocabulary(tiny_llama):
    assert AutoTokenizer.from_pretrained(tiny_llama).pad_token == "<|im_end|>"
    tokenizer = load_tokenizer(tiny_llama)
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("end", ["", "{% if m['role'] == 'user' %}{{ eos_token }}{% endif %}"], ids=["none", "prompt"])
def test_a_template_without_eos_is_refused(end, tiny_llama, tmp_path):
    """Nowhere, or after the user's messages only."""
    template = tmp_path / "endless.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}" + end + "\n{% endfor %}")
    with pytest.raises(UserError, match=r"does not end an answer with the end-of-sequence token '<\|im_end\|>'"):
        load_tokenizer(tiny_llama, str(template))


def test_unknown_template():
    with pytest.raises(UserError, match="no template 'vicuna'; expected alpaca, chatml"):
        read_template("vicuna")


@pytest.fixture
def rows(few_pairs):
    return [json.loads(line) for line in Path(few_pairs).read_text().splitlines()]


def trl_trainer(folder, tokenizer, rows, tmp_path):
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(output_dir=str(tmp_path / "t"), use_cpu=True, bf16=False, report_to="none", max_length=256,
                     gradient_checkpointing=False)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder)
    return DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_tokens_and_log_probabilities_are_trls(model, request, rows, tmp_path):
    folder = request.getfixturevalue(model)
    tokenizer = load_tokenizer(folder)
    if model == "tiny_gpt2":  # room for its new pad token, as the stages make it
        from rlhf.models.tokenizer import fit_tokenizer

        fit_tokenizer(AutoModelForCausalLM.from_pretrained(folder), tokenizer).save_pretrained(tmp_path / "m")
        tokenizer.save_pretrained(tmp_path / "m")
        folder = str(tmp_path / "m")
    trainer = trl_trainer(folder, tokenizer, rows, tmp_path)
    for row, tokenised in zip(rows, trainer.train_dataset, strict=True):
        pair = tokenize_pair(tokenizer, row)
        assert {k: tokenised[k] for k in pair} == pair
        assert tokenizer.eos_token_id in pair["chosen_ids"] and tokenizer.eos_token_id in pair["rejected_ids"]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    finished, again = load_finished(folder)
    for i in range(3):
        ours = pair_logps(finished, [encode_pair(again, rows[i], 256)])[0]
        assert ours["chosen"] == pytest.approx(float(chosen[i]), rel=1e-4)
        assert ours["rejected"] == pytest.approx(float(rejected[i]), rel=1e-4)
        tokens = trainer.train_dataset[i]
        whole = len(tokens["prompt_ids"]) + len(tokens["chosen_ids"])
        assert ours["chosen_tokens"] == min(whole, 256) - len(tokens["prompt_ids"])  # cut at max_length, as TRL does


def test_log_probabilities_by_hand(tiny_llama, rows):
    model, tokenizer = load_finished(tiny_llama)
    pair = tokenize_pair(tokenizer, rows[0])
    expected = 0.0
    ids = pair["prompt_ids"] + pair["rejected_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for position in range(len(pair["prompt_ids"]), len(ids)):
        expected += float(logps[position - 1, ids[position]])
    assert pair_logps(model, [encode_pair(tokenizer, rows[0], 1024)])[0]["rejected"] == pytest.approx(
        expected, rel=1e-4
    )


def test_the_score_is_read_at_eos_and_padding_does_not_move_it(tiny_llama, recipe, few_pairs, tmp_path):
    """With SmolLM2's own pad = EOS the score would be read one token early in a padded batch."""
    from rlhf.__main__ import main

    out = tmp_path / "reward"
    assert (
        main(["reward", recipe("reward", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(out))])
        == 0
    )
    model, tokenizer = load_finished(str(out), reward=True)
    alone = score(model, tokenizer, CHAT[:1], "Short.")
    short = ids_of(tokenizer, [CHAT[0], {"role": "assistant", "content": "Short."}])
    long = ids_of(tokenizer, [CHAT[0], {"role": "assistant", "content": "A good deal longer than that."}])
    batch = tokenizer.pad({"input_ids": [short, long]}, return_tensors="pt")
    with torch.no_grad():
        assert float(model(**batch).logits[0, 0]) == pytest.approx(alone, abs=1e-5)
    assert is_reward_model(str(out)) and not is_reward_model(tiny_llama)


def test_answers_do_not_depend_on_their_batch(tiny_llama):
    """Prompts of uneven lengths, together and one at a time."""
    from rlhf.config.stage_config import EvaluateConfig

    model, tokenizer = load_finished(tiny_llama)
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": "Why? " * times}]) for times in (1, 9, 3)]
    alone = [generate(model, tokenizer, [prompt], EvaluateConfig(max_new_tokens=8))[0] for prompt in prompts]
    assert generate(model, tokenizer, prompts, EvaluateConfig(max_new_tokens=8)) == alone
    assert len(set(alone)) == 3


def test_smollm2_is_a_real_model_that_answers(smollm2):
    from rlhf.config.stage_config import EvaluateConfig

    model, tokenizer = load_finished(smollm2)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    answer = generate(model, tokenizer, [prompt], EvaluateConfig(max_new_tokens=12))
    text, is_cut = answer[0]
    assert "Paris" in text and not is_cut
