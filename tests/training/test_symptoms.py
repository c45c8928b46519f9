"""What the metrics of a run say: each symptom from hand-made logs, each non-symptom, and noise that must not be told."""

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.runs.metrics import findings_of
from rlhf.training.metric_history import LATER, WINDOW, Finding, History, Settings, Teller
from rlhf.training.symptoms import CHECKS, STAGES_OF, find
from rlhf.training.watch import told

LN2 = math.log(2)
DPO = Settings("dpo", learning_rate=1e-4, beta=0.1, total_steps=100, heldout=200)
REWARD = Settings("reward", learning_rate=1e-4, total_steps=100, heldout=200)
SFT = Settings("sft", learning_rate=1e-4, total_steps=100, heldout=200, log_two=False)


def dpo_log(step, chosen, rejected, reference=-100.0, accuracy=0.7, beta=0.1, prefix="", loss=None, **more):
    """A line as TRL logs it. chosen, rejected: log-ratios in nats per answer."""
    margin = beta * (chosen - rejected)
    loss = math.log1p(math.exp(-margin)) if loss is None else loss
    row = {"loss": loss, "rewards/chosen": beta * chosen, "rewards/rejected": beta * rejected, "rewards/margins": margin,
           "rewards/accuracies": accuracy, "logps/chosen": reference + chosen, "logps/rejected": reference + rejected}  # fmt: skip
    row = {prefix + name: value for name, value in row.items()}
    return {"step": step, "epoch": more.pop("epoch", step / 100), "learning_rate": 1e-4, **row, **more}


def held_out(step, chosen, rejected, **more):
    return dpo_log(step, chosen, rejected, prefix="eval_", **more)


def found_in(rows, settings=DPO):
    history = History()
    for row in rows:
        assert history.add(row, settings)
    return {finding.key: finding for finding in find(history, settings)}


# --- a DPO run that is as it should be ------------------------------------------------------------------------------------


def healthy(noise=0.0, seed=0, steps=100):
    """Both log-ratios fall a little, the margin grows, the accuracy rises to 0.75, the held-out loss falls."""
    draw = random.Random(seed)
    for step in range(1, steps + 1):
        share = step / steps
        shake = [draw.gauss(0, noise) for _ in range(3)]
        accuracy = min(1.0, max(0.0, 0.5 + 0.3 * share + 0.5 * shake[2]))
        yield dpo_log(step, 4 * share + 10 * shake[0], -10 * share + 10 * shake[1], accuracy=accuracy)
        if step % 10 == 0:
            yield held_out(step, -5 * share, -10 * share, accuracy=0.5 + 0.25 * share + 0.1 * shake[0])


def test_nothing_is_told_of_a_healthy_run():
    assert found_in(healthy()) == {}


@given(st.integers(0, 10_000), st.floats(0, 0.3))
def test_noise_is_not_told(seed, noise):
    """At every step, not only at the end. 0.3: a batch's log-ratios vary by 3 nats, its accuracy by 0.15."""
    history = History()
    for row in healthy(noise, seed):
        history.add(row, DPO)
        assert find(history, DPO) == [], row


# --- each symptom -------------------------------------------------------------------------------------------------------


def test_chosen_answers_that_fall():
    """-100 -> -115 nats: 0.15 of the reference's."""
    found = found_in([held_out(10, -15, -30)])["chosen_falls"]
    assert found.size == pytest.approx(0.15) and "-100.0 -> -115.0 nats per answer" in found.sentence
    assert "log-ratio to the reference -15.0 (rejected -30.0)" in found.sentence and found.turn[0].startswith(
        "lower learning_rate"
    )
    assert "chosen_falls" not in found_in([held_out(10, -9.9, -30)])
    assert "chosen_falls" not in found_in([held_out(10, 20, -30)])
    assert "chosen_falls" not in found_in([held_out(10, -5, -9, reference=-0.5)])  # nothing to be a share of
    small = Settings("dpo", 1e-4, beta=0.01, heldout=200)
    assert found_in([held_out(10, -15, -30, beta=0.01)], small)["chosen_falls"].turn[0].startswith("raise beta")


def test_without_held_out_rows_training_means_count():
    """The mean of ten logs: -30 and +10 alternate, -10 in the mean of logs, whose reference is -100."""
    rows = [dpo_log(step, -31 if step % 2 else 9, -40) for step in range(1, 11)]
    found = found_in(rows)["chosen_falls"]
    assert found.size == pytest.approx(0.11) and "chosen training answers" in found.sentence
    assert "chosen_falls" not in found_in(rows[:9])


def test_a_learning_rate_that_moves_nothing():
    still = [dpo_log(step, 0.002, -0.002) for step in range(1, 13)]
    found = found_in(still)["nothing_moves"]
    assert "the loss is 0.6929, where it started: ln 2" in found.sentence and "10 to 100 times" in found.turn[0]
    assert found_in(still[:10]) == {}  # ten steps after the rate was up are needed
    warming = [row | {"learning_rate": 0.0} for row in still]
    assert found_in(warming) == {}
    assert found_in([*still[:-1], dpo_log(12, 0.2, 0.0)]) == {}  # one batch that moves is enough
    long = Settings("dpo", 1e-4, beta=0.1, total_steps=1000, heldout=200)
    assert found_in(still, long) == {}  # 10% of a run


def test_too_small_a_beta():
    """4 nats away, and beta makes 0.02 of them: a loss of ln 2 - 0.005."""
    settings = Settings("dpo", 1e-4, beta=0.005, total_steps=20, heldout=200)
    rows = [dpo_log(step, 4, 2, beta=0.005) for step in range(1, 13)]
    found = found_in(rows, settings)
    assert set(found) == {"small_beta"} and "that is a reward of 0.02" in found["small_beta"].sentence
    assert (
        found_in([dpo_log(step, 20, -20, beta=0.005) for step in range(1, 13)], settings) == {}
    )  # a margin of 0.2: learns


def test_margins_that_grow_alone():
    def rows(accuracy, losses):
        for step, loss in zip((10, 20, 30, 40), losses, strict=True):
            yield held_out(step, 0, -step / 2, accuracy=accuracy(step), loss=loss)  # margins 0.5 to 2.0

    up, down = (0.60, 0.61, 0.63, 0.66), (0.60, 0.58, 0.57, 0.56)
    found = found_in(rows(lambda step: 0.7, up))["margin_without_accuracy"]
    assert "from 0.50 to 2.00" in found.sentence and "(70% -> 70%)" in found.sentence
    assert "margin_without_accuracy" not in found_in(rows(lambda step: 0.7, down))  # it learns
    assert "margin_without_accuracy" not in found_in(rows(lambda step: 0.6 + step / 200, up))
    assert "margin_without_accuracy" not in found_in(rows(lambda step: 0.97, up))


@pytest.mark.parametrize("settings", [DPO, REWARD])
def test_an_accuracy_that_turns(settings):
    name = "eval_rewards/accuracies" if settings.stage == "dpo" else "eval_accuracy"

    def rows(*accuracies):
        return [{"step": 10 * (i + 1), "eval_loss": 0.5, name: value} for i, value in enumerate(accuracies)]

    # two standard errors of 0.8 on 200 pairs: 2 sqrt(0.16 / 200) = 0.057
    found = found_in(rows(0.7, 0.8, 0.75, 0.72), settings)["accuracy_turns"]
    assert "was 80% at step 20 and is 72% now" in found.sentence and found.size == pytest.approx(0.8 - 0.735)
    assert found_in(rows(0.7, 0.8, 0.76, 0.74), settings) == {}
    assert found_in(rows(0.7, 0.8, 0.82, 0.60), settings) == {}  # one evaluation
    few = Settings(settings.stage, 1e-4, heldout=40)
    assert found_in(rows(0.7, 0.8, 0.75, 0.70), few) == {}  # 2 sqrt(0.16 / 40) = 0.13


@pytest.mark.parametrize("settings", [DPO, REWARD, SFT])
def test_a_held_out_loss_that_turns(settings):
    def rows(*losses):
        return [{"step": 10 * i, "eval_loss": loss} for i, loss in enumerate(losses)]

    assert found_in(rows(0.69, 0.60, 0.62, 0.64), settings)["loss_turns"].size == pytest.approx(0.64 / 0.60 - 1)
    assert found_in(rows(0.69, 0.60, 0.605, 0.64), settings) == {}  # only once above
    assert found_in(rows(0.69, 0.60, 0.62, 0.62), settings) == {}  # 3%


def test_pairs_learnt_by_heart():
    rows = [dpo_log(step, 5, -5, accuracy=1.0, epoch=1 + step / 100) for step in range(1, 11)]
    assert set(found_in([held_out(1, 0, 0, accuracy=0.6), *rows])) == {"memorises"}
    assert found_in([held_out(1, 0, 0, accuracy=0.8), *rows]) == {}
    first = [row | {"epoch": row["epoch"] - 1} for row in rows]
    assert found_in([held_out(1, 0, 0, accuracy=0.6), *first]) == {}


@pytest.mark.parametrize("settings", [DPO, REWARD, SFT])
def test_a_training_loss_that_rises(settings):
    start = 3.0 if settings.stage == "sft" else LN2
    rows = [{"step": i, "loss": start * (1 if i <= 10 else 1.21)} for i in range(1, 21)]
    assert found_in(rows, settings)["loss_rises"].size == pytest.approx(0.21)
    assert found_in(rows[:19], settings) == {}
    assert found_in([row | {"loss": min(row["loss"], 1.19 * start)} for row in rows], settings) == {}


def test_a_reward_model_that_learns_nothing():
    rows = [{"step": i, "loss": LN2 + 0.02 * (-1) ** i, "margin": 0.3 * (-1) ** i, "accuracy": 0.5, "learning_rate": 1e-4}
            for i in range(1, 13)]  # fmt: skip
    assert "a coin toss" in found_in(rows, REWARD)["nothing_moves"].sentence
    assert found_in([row | {"loss": 0.66} for row in rows], REWARD) == {}
    assert found_in([row | {"margin": 0.05} for row in rows], REWARD) == {}


def test_sft_that_learns_nothing():
    training = [{"step": i, "loss": 2.5 + 0.3 * (-1) ** i, "learning_rate": 1e-4} for i in range(1, 13)]
    still = [{"step": step, "eval_loss": 2.5 - step * 1e-4} for step in (0, 6, 12)]
    assert set(found_in([*training, *still], SFT)) == {"nothing_moves"}
    assert found_in([*training, *still[:2], {"step": 12, "eval_loss": 2.49}], SFT) == {}


def test_a_policy_that_goes_by_length():
    def row(longer, shorter):
        return held_out(
            10, 1, -1, **{"eval_rewards/accuracies_longer": longer, "eval_rewards/accuracies_shorter": shorter}
        )

    assert "will get longer" in found_in([row(0.9, 0.3)])["follows_length"].sentence
    assert "will get shorter" in found_in([row(0.3, 0.9)])["follows_length"].sentence
    assert found_in([row(0.9, 0.55)]) == {} and found_in([row(0.6, 0.45)]) == {} and found_in([row(0.4, 0.05)]) == {}
    assert found_in([row(0.9, 0.3)], Settings("dpo", 1e-4, beta=0.1, heldout=30)) == {}


# --- what holds for all -----------------------------------------------------------------------------------------------

NUMBER = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.integers(-5, 5))
NAMES = ("loss", "eval_loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
         "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/chosen",
         "eval_rewards/accuracies_longer", "eval_rewards/accuracies_shorter", "accuracy", "eval_accuracy", "margin",
         "eval_margin", "learning_rate", "epoch", "train_runtime")  # fmt: skip


@given(
    st.lists(st.dictionaries(st.sampled_from(NAMES), NUMBER, max_size=12), max_size=40),
    st.sampled_from([DPO, REWARD, SFT, Settings("dpo", 1e-4, beta=0.001)]),
)
def test_no_log_breaks_it(rows, settings):
    """Whatever is logged or missing, NaN too: training must not end because of who watches it."""
    history, teller = History(), Teller()
    for step, row in enumerate(rows):
        if history.add({"step": step, **row}, settings):
            for finding in teller.news(find(history, settings)):
                line = {
                    "step": step,
                    "finding": finding.key,
                    "sentence": finding.sentence,
                    "turn": list(finding.turn),
                    "size": finding.size,
                }
                assert findings_of([json.loads(json.dumps(line))])
    assert len(history.first) <= WINDOW and len(history.last) <= LATER


def test_each_check_belongs_to_a_stage():
    assert {check.__name__ for check in CHECKS} == set(STAGES_OF)


def test_a_symptom_is_told_once_and_again_when_it_is_twice_as_bad():
    teller = Teller()
    first, same, worse = (Finding("chosen_falls", 1, "", (), size) for size in (0.1, 0.19, 0.2))
    assert teller.news([first]) == [first] and teller.news([first]) == [] and teller.news([same]) == []
    assert teller.news([worse]) == [worse] and Teller(teller.told).news([worse]) == []


def test_a_finding_as_it_stands_on_the_screen():
    finding = Finding("small_beta", 12, "the loss is still 0.693", ("raise beta", "train longer"), 1.0)
    assert told(finding) == (
        "\nstep 12: the loss is still 0.693.\n  turn: raise beta; or train longer. docs/tuning.md: small_beta"
    )
