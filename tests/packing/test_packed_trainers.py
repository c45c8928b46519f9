"""TRL's own trainers, packed and padded: the same losses, metrics and parameters after three optimizer steps."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import WINDOWED, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from rlhf.config.keys import LATE_CHOICES
from rlhf.packing import pack_backbone
from rlhf.packing.backbone import find_backbone

NOT_A_RESULT = ("runtime", "per_second", "flos", "time", "memory")  # of the machine, not of the model
PAIRS = [  # prompt, chosen, rejected: token ids
    ([5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23], [30, 31]),
    ([12, 13], [24, 25, 26], [24, 25, 27, 28, 29, 30, 31, 32]),  # answers begin alike
    ([14, 15, 16], [40, 41], [40, 41]),  # identical
    ([17, 18, 19, 20], [50], [51]),  # one token
    ([21, 22], [60, 61], [60, 61, 62, 63]),  # one begins the other
    ([23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36], [70, 71, 72, 73, 74, 75], [80, 81, 82]),  # truncated
]
MAX_LENGTH = 16
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0, "init_lora_weights": True}


def arguments(config, folder, **values):
    common = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "optim": "sgd", "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False, "report_to": "none",
        "disable_tqdm": True, "gradient_checkpointing": False, "max_length": MAX_LENGTH, "seed": 1,
        "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
    }  # fmt: skip
    return config(**common | values)


def dpo(folder, model, lora, **values):
    placeholder = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=arguments(DPOConfig, folder, **values),
        train_dataset=placeholder,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if lora else None,
    )
    trainer.train_dataset = Dataset.from_list([dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), p, strict=True)) for p in PAIRS])  # fmt: skip
    return trainer, "pairs"


def reward(folder, model, lora, margin=False, **values):
    rows = [{"chosen_ids": (p + c)[:MAX_LENGTH], "rejected_ids": (p + r)[:MAX_LENGTH]} for p, c, r in PAIRS]
    if margin:
        rows = [row | {"margin": 0.1 * i} for i, row in enumerate(rows)]
    torch.manual_seed(0)  # the new head
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32),
        args=arguments(RewardConfig, folder, center_rewards_coefficient=0.01, **values),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(task_type="SEQ_CLS", **LORA) if lora else None,
    )
    return trainer, "pairs"


def sft(folder, model, lora, **values):
    rows = [{"input_ids": (p + c)[:MAX_LENGTH], "completion_mask": ([0] * len(p) + [1] * len(c))[:MAX_LENGTH]} for p, c, _ in PAIRS]  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=arguments(SFTConfig, folder, **values),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if lora else None,
    )
    return trainer, "rows"


def train(make, folder, model, packed, lora=False, **values):
    """(logged metrics a step, parameters, tokens of each pass through the embedding, trainer)"""
    torch.manual_seed(0)
    trainer, mode = make(folder, model, lora, **values)
    if packed:
        for each in filter(None, (trainer.model, getattr(trainer, "ref_model", None))):
            pack_backbone(each, mode, MAX_LENGTH)
    tokens = []
    find_backbone(trainer.model).get_input_embeddings().register_forward_hook(
        lambda _m, args, _o: tokens.append(args[0].numel())
    )
    trainer.train()
    logs = [{k: v for k, v in log.items() if not any(word in k for word in NOT_A_RESULT)} for log in trainer.state.log_history]  # fmt: skip
    return logs, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, tokens, trainer


def assert_equal_runs(make, tmp_path, model, rel=1e-5, **values):
    """Three steps, padded and packed; returns the packed trainer."""
    logs, parameters, padded_tokens, _ = train(make, tmp_path / "padded", model, False, **values)
    packed_logs, packed_parameters, tokens, trainer = train(make, tmp_path / "packed", model, True, **values)
    assert len(logs) == len(packed_logs) == 4  # three steps and the end
    for log, packed_log in zip(logs, packed_logs, strict=True):
        assert log.keys() == packed_log.keys()
        for name in log:
            # rewards are small differences of log-probabilities of about -100, which float32 rounds to 1e-5
            absolute = 1e-5 if name.startswith("rewards/") else 2e-6
            assert packed_log[name] == pytest.approx(log[name], rel=rel, abs=absolute), name
    assert parameters.keys() == packed_parameters.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(packed_parameters[name], parameter, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")  # fmt: skip
    assert len(tokens) == len(padded_tokens) and sum(tokens) < sum(padded_tokens)
    return trainer


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("make", [dpo, reward, sft])
def test_trainers(make, lora, tiny_llama, tmp_path):
    trainer = assert_equal_runs(make, tmp_path, tiny_llama, lora=lora)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(set(losses)) == 3  # it did train


def test_tokens_that_are_computed(tiny_llama, tmp_path):
    """Policy and reference, one pair a batch: p + c + r with the longest common prefix."""
    *_, tokens, _ = train(dpo, tmp_path, tiny_llama, True, lora=True, per_device_train_batch_size=1, max_steps=6)  # fmt: skip
    want = {
        7 + 4 + 2,
        2 + 2 + 1 + 6,  # 24 25 are shared as well
        3 + 2,  # equal answers once
        4 + 1 + 1,
        2 + 1 + 1 + 3,
        14 + 2 + 2,  # cut at 16
    }
    assert set(tokens) == want and len(tokens) == 12 and tokens[::2] == tokens[1::2]


@pytest.mark.parametrize("make", [dpo, reward, sft])
def test_gradient_checkpointing(make, tiny_llama, tmp_path):
    assert_equal_runs(make, tmp_path, tiny_llama, lora=True, gradient_checkpointing=True)


@pytest.mark.parametrize("make, values", [(dpo, {"loss_type": ["sigmoid", "sft"]}), (dpo, {"ld_alpha": 0.5}), (dpo, {"truncation_mode": "keep_end"}), (reward, {"margin": True}), (sft, {"completion_only_loss": False})])  # fmt: skip
def test_options(make, values, tiny_llama, tmp_path):
    assert_equal_runs(make, tmp_path, tiny_llama, lora=True, **values)


SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1}


@pytest.mark.parametrize("loss", LATE_CHOICES["DPOConfig", "loss_type"])
def test_every_dpo_loss(loss, tiny_llama, tmp_path):
    """And all that is logged: rewards, margins, accuracies, log-probabilities, entropy, logits, token accuracy."""
    values = {"loss_type": loss, "label_smoothing": SMOOTHING.get(loss, 0.0), "beta": 0.5, "learning_rate": 1e-3}
    # discopop divides the margin by 0.05 within a sigmoid, and so multiplies what float32 has rounded by 20
    rel = 1e-4 if loss == "discopop" else 1e-5
    trainer = assert_equal_runs(dpo, tmp_path, tiny_llama, rel, lora=True, per_device_train_batch_size=3, **values)
    assert len({log["loss"] for log in trainer.state.log_history if "loss" in log}) == 3
    names = {"rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected", "logits/chosen", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"}  # fmt: skip
    assert names <= trainer.state.log_history[0].keys()


@pytest.mark.parametrize(
    "values",
    [{"use_weighting": True}, {"f_divergence_type": "js_divergence"}, {"f_divergence_type": "forward_kl"},
     {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}],
    ids=lambda v: str(next(iter(v.values()))),
)  # fmt: skip
def test_weighting_and_divergences(values, tiny_llama, tmp_path):
    assert_equal_runs(dpo, tmp_path, tiny_llama, lora=True, **values)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("make", [dpo, reward, sft])
def test_three_steps_of_adamw(make, lora, tiny_llama, tmp_path):
    """As people train. Adam divides by the size of the gradient: a gradient of 0 to rounding (1e-10 in one path, -1e-10
    in the other) becomes a step of the learning rate, unless epsilon is above the rounding. In exact arithmetic 1e-4 here
    changes nothing; what is compared is to the same 1e-5."""
    assert_equal_runs(make, tmp_path, tiny_llama, lora=lora, optim="adamw_torch", learning_rate=1e-3, adam_epsilon=1e-4)


@pytest.mark.parametrize("size", [1, 3])
def test_batch_sizes(size, tiny_llama, tmp_path):
    assert_equal_runs(dpo, tmp_path, tiny_llama, lora=True, per_device_train_batch_size=size)


@pytest.mark.parametrize("make", [dpo, reward])
def test_gpt2(make, tiny_gpt2, tmp_path):
    assert_equal_runs(make, tmp_path, tiny_gpt2, lora=False, pad_token="<|endoftext|>")


ADDED = ("cohere2", "deepseek_v3", "dots1", "exaone4", "flex_olmo", "gemma3_text", "glm4_moe", "granitemoeshared",
         "hunyuan_v1_dense", "ministral", "nanochat", "olmo3", "opt", "qwen3_moe")  # fmt: skip


@pytest.fixture
def of_family(tiny_llama, tmp_path):
    """The folder of a tiny model of a family, with the tiny Llama's tokenizer; windows of 16 tokens, as MAX_LENGTH."""

    def make(model_type):
        folder = tmp_path / model_type
        windows = {"sliding_window": MAX_LENGTH} if model_type in WINDOWED else {}
        model = tiny_model(model_type, vocab_size=600, pad_token_id=2, **windows)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
        return str(folder)

    return make


QUICK = ("deepseek_v3", "gemma3_text", "opt")


@pytest.mark.parametrize(
    "model_type", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ADDED]
)
def test_dpo_of_families(model_type, of_family, tmp_path):
    """Three steps of full fine-tuning by DPOTrainer itself: fused head, its own copy as reference, shared prompts."""
    values = {"router_aux_loss_coef": 0.0} if model_type == "granitemoeshared" else {}  # TRL 1.16 can't compute it
    assert_equal_runs(dpo, tmp_path, of_family(model_type), learning_rate=1e-3, per_device_train_batch_size=3, **values)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gemma3_text", "hunyuan_v1_dense", "opt"])
def test_rewards_of_families(model_type, of_family, tmp_path):
    assert_equal_runs(reward, tmp_path, of_family(model_type), learning_rate=1e-3, per_device_train_batch_size=3)


def test_equal_answers(tiny_llama, tmp_path):
    """Identical answers: the margin is 0 to the bit and the loss ln 2, as padded."""
    trainer, _ = dpo(tmp_path, tiny_llama, True, per_device_train_batch_size=1)
    pack_backbone(trainer.model, "pairs")
    inputs = trainer.data_collator([trainer.train_dataset[2]])
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if "lora_B" in n).fill_(0.1)  # no longer its own reference
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(0.6931472, abs=1e-6)
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, inputs)
    assert torch.equal(chosen, rejected) and trainer._metrics["train"]["rewards/margins"] == [0.0]


def test_chosen_does_not_reach_rejected(tiny_llama, tmp_path):
    """Mutation: other chosen tokens leave the rejected answer's log-probability alone."""
    trainer, _ = dpo(tmp_path, tiny_llama, True)
    pack_backbone(trainer.model, "pairs")
    example = trainer.train_dataset[0]
    other = example | {"chosen_ids": [90, 91, 92, 93]}
    (chosen, rejected), (other_chosen, other_rejected) = (
        trainer.compute_ref_log_probs(trainer.model, trainer.data_collator([x])) for x in (example, other)
    )
    assert abs(rejected.item() - other_rejected.item()) <= 1e-6 * abs(rejected.item())
    assert abs(chosen.item() - other_chosen.item()) > 0.1


def test_precomputed_reference(tiny_llama, tmp_path):
    """compute_ref_log_probs goes through the packed backbone too."""
    padded, packed = (dpo(tmp_path, tiny_llama, True)[0] for _ in range(2))
    pack_backbone(packed.model, "pairs")
    inputs = padded.data_collator([padded.train_dataset[i] for i in range(6)])
    for want, found in zip(*(t.compute_ref_log_probs(t.model, inputs) for t in (padded, packed)), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [dpo, reward, sft])
def test_trained_model_is_plain(make, tiny_llama, tmp_path):
    """Saved after packed training, loaded without this project: the same logits."""
    *_, trainer = train(make, tmp_path / "run", tiny_llama, True)
    trainer.save_model(str(tmp_path / "model"))
    auto = AutoModelForSequenceClassification if make is reward else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "model").eval()
    assert again.config._attn_implementation == "sdpa" and "forward" not in vars(find_backbone(again))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(trainer.model.eval()(input_ids=ids).logits, again(input_ids=ids).logits, rtol=1e-5, atol=1e-5)  # fmt: skip


def test_packed_before_the_trainer(tiny_llama, tmp_path):
    """TRL then asks for packed attention when it loads the reference; that one is padded, with the same result."""
    padded, _ = dpo(tmp_path, tiny_llama, False)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    pack_backbone(model, "pairs")
    packed = DPOTrainer(
        model=model, args=arguments(DPOConfig, tmp_path), train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=padded.processing_class,
    )  # fmt: skip
    inputs = padded.data_collator([padded.train_dataset[i] for i in range(6)])
    with torch.no_grad():
        for trainer in (padded, packed):  # away from the reference
            next(trainer.model.parameters()).mul_(1.1)
    want, found = (trainer.compute_loss(trainer.model, dict(inputs)).item() for trainer in (padded, packed))
    assert found == pytest.approx(want, rel=1e-5) and abs(want - 0.6931) > 1e-3


def test_bfloat16_autocast(tiny_llama, tmp_path):
    """bf16 keeps 8 bits: losses to 1e-2."""
    runs = [train(dpo, tmp_path / str(packed), tiny_llama, packed, lora=True, bf16=True) for packed in (False, True)]
    for log, packed_log in zip(runs[0][0][:3], runs[1][0][:3], strict=True):
        assert packed_log["loss"] == pytest.approx(log["loss"], abs=1e-2)
    assert sum(runs[1][2]) < sum(runs[0][2])
