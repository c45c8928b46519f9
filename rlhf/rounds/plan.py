"""The rounds of a recipe folder: what each of them reads and writes, and which step comes next. Imports no torch.

Round 1 is the folder's own dpo.yaml and evaluate.yaml. In each later round the last policy answers the prompts that dpo.yaml
trains on (never held-out ones), the reward model picks the best and the worst answer, DPO trains on these pairs, and the
same held-out prompts are evaluated. The recipes of a round are files in its folder, written before it starts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf.config.recipe import Recipe, check_recipe, load_recipe
from rlhf.config.stage_config import RoundsConfig
from rlhf.errors import UserError, quote
from rlhf.files import read_json, write_file
from rlhf.rounds.compare import Result, read_result, why_stop
from rlhf.runs.records import read_complete, read_recipe

LABEL, DPO, EVALUATE = "label", "dpo", "evaluate"
# Of dpo.yaml's keys those that name its data, which a round replaces.
DATA_KEYS = (
    "dataset_name dataset_config dataset_train_split dataset_test_split eval_dataset_name heldout chosen_dataset_name "
    "rejected_dataset_name format columns roles bad_rows max_train_examples max_eval_examples"
).split()


@dataclass(frozen=True)
class Step:
    """`kind` (LABEL, DPO or EVALUATE) of a round, numbered from 1."""

    kind: str
    round: int

    def __str__(self) -> str:
        what = {LABEL: "answers and their labels", DPO: "DPO", EVALUATE: "evaluation"}[self.kind]
        return f"round {self.round}, {what}"


@dataclass(frozen=True)
class Rounds:
    """The rounds of a recipe folder.

    Attributes:
        recipe: of stage `rounds`; its path is the folder if that has no rounds.yaml.
        dpo, evaluation: the folder's own recipes.
        reward_model: which labels the answers.
    """

    recipe: Recipe
    config: RoundsConfig
    dpo: Recipe
    evaluation: Recipe
    reward_model: str
    folder: Path = field(repr=False)

    @property
    def start(self) -> str:
        """The model that dpo.yaml starts from."""
        return self.dpo.values["model_name_or_path"]

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.jsonl"

    @property
    def asked(self) -> dict[str, Any]:
        """What decides which prompts are answered; kept beside them."""
        return {"max_prompts": self.config.max_prompts, **{key: self.dpo.get(key) for key in DATA_KEYS}}

    @property
    def asked_file(self) -> Path:
        return self.folder / "prompts.json"

    @property
    def heldout(self) -> Path:
        return self.folder / "heldout.jsonl"

    def place(self, number: int) -> Path:
        """The folder of round `number` > 1."""
        return self.folder / f"round-{number}"

    def pairs(self, number: int) -> Path:
        return self.place(number) / "pairs.jsonl"

    def policy(self, number: int) -> str:
        return self.dpo.values["output_dir"] if number == 1 else str(self.place(number) / "dpo")

    def evaluated(self, number: int) -> Path:
        return Path(self.evaluation.values["output_dir"]) if number == 1 else self.place(number) / "evaluation"

    # --- where they stand

    def is_done(self, step: Step) -> bool:
        if step.kind == LABEL:
            pairs = self.pairs(step.round)
            return pairs.is_file() and read_json(pairs.with_name(f"{pairs.name}.provenance.json")) is not None
        folder = Path(self.policy(step.round)) if step.kind == DPO else self.evaluated(step.round)
        return bool(read_complete(folder))

    def results(self) -> list[Result]:
        """Of the rounds that are evaluated, in order."""
        found = []
        for number in range(1, self.config.num_rounds + 1):
            if not self.is_done(Step(EVALUATE, number)):
                break
            found.append(read_result(number, self.evaluated(number), self.policy(number), self.pairs(number)))
        return found

    def why_stop(self) -> str:
        """Why no further round is run; '' if one is."""
        return why_stop(self.results(), self.config.num_rounds, self.config.min_gain)

    def next_step(self) -> Step | None:
        """The first step that is not complete; None if there is none."""
        for number in range(1, self.config.num_rounds + 1):
            kinds = (DPO, EVALUATE) if number == 1 else (LABEL, DPO, EVALUATE)
            if number > 1 and self.why_stop():
                return None
            for kind in kinds:
                if not self.is_done(Step(kind, number)):
                    return Step(kind, number)
        return None

    # --- the recipes of a round

    def dpo_values(self, number: int) -> dict[str, Any]:
        """The keys of round `number`'s dpo.yaml."""
        values = {key: value for key, value in self.dpo.values.items() if key not in DATA_KEYS}
        values |= {"dataset_name": str(self.pairs(number)), "output_dir": self.policy(number)}
        last, own = self.policy(number - 1), values.pop("reference_model", None)
        if self.config.start_from == "last":
            values["model_name_or_path"] = last
            reference = (own or self.start) if self.config.reference == "start" else None  # none: what it starts from
        else:
            reference = own if self.config.reference == "start" else last
        if reference:
            values["reference_model"] = reference
        if self.evaluates:
            values["eval_dataset_name"] = str(self.heldout)
        return values

    @property
    def evaluates(self) -> bool:
        """Whether DPO looks at held-out rows while it trains."""
        return self.dpo.get("eval_strategy", "no") != "no" or bool(self.dpo.get("eval_on_start"))

    def evaluation_values(self, number: int) -> dict[str, Any]:
        """The keys of round `number`'s evaluate.yaml: without the model before SFT, which no round changes."""
        values = {key: value for key, value in self.evaluation.values.items() if key != "base_model"}
        return values | {"dpo_model": self.policy(number), "output_dir": str(self.evaluated(number))}

    def recipe_file(self, kind: str, number: int) -> Path:
        """The recipe of a step: the folder's own in round 1."""
        if number == 1:
            return Path((self.dpo if kind == DPO else self.evaluation).path)
        return self.place(number) / f"{kind}.yaml"

    def values_of(self, kind: str, number: int) -> dict[str, Any]:
        return self.dpo_values(number) if kind == DPO else self.evaluation_values(number)

    def has_recipe(self, kind: str, number: int) -> bool:
        return read_recipe(self.recipe_file(kind, number)) == self.values_of(kind, number)

    def write_recipe(self, kind: str, number: int) -> None:
        """Write the recipe of a later round, unless it is there.

        Raises:
            UserError: another one is there.
        """
        file = self.recipe_file(kind, number)
        values = self.values_of(kind, number)
        before = read_recipe(file)
        if before is not None and before != values:
            keys = sorted(key for key in {**before, **values} if before.get(key) != values.get(key))
            raise UserError(
                f"{file} was written from other recipes ({', '.join(keys)}); set them back, or give the rounds a new output_dir"
            )
        if before is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            source = self.dpo.path if kind == DPO else self.evaluation.path
            text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
            write_file(file, f"# Round {number}, from {source}: written by `rlhf rounds`.\n{text}")


def load_rounds(target: str, overrides: list[str] | None = None) -> Rounds:
    """The rounds of a recipe folder, or of its rounds.yaml.

    Raises:
        UserError: a mistake in one of the recipes, or one is missing.
    """
    folder = target if os.path.isdir(target) else os.path.dirname(target) or "."
    file = os.path.join(folder, "rounds.yaml") if os.path.isdir(target) else target
    siblings = {kind: os.path.join(folder, f"{kind}.yaml") for kind in (DPO, EVALUATE)}
    for kind, path in siblings.items():
        if not os.path.isfile(path):
            raise UserError(
                f"{quote(folder)} has no {kind}.yaml; rounds repeat the dpo and the evaluate stage of a recipe folder"
            )
    dpo, evaluation = load_recipe(siblings[DPO], DPO), load_recipe(siblings[EVALUATE], EVALUATE)
    given = os.path.lexists(file) or file == target
    recipe = load_recipe(file if given else target, "rounds", overrides, None if given else {"stage": "rounds"})
    default = os.path.join(os.path.dirname(os.path.normpath(dpo.values["output_dir"])), "rounds")
    config = RoundsConfig(**recipe.values)
    rounds = Rounds(
        recipe, config, dpo, evaluation, _reward_model(recipe, folder, evaluation), Path(config.output_dir or default)
    )
    _check(rounds)
    return rounds


def _reward_model(recipe: Recipe, folder: str, evaluation: Recipe) -> str:
    if given := recipe.get("reward_model"):
        return given
    trained = (read_recipe(os.path.join(folder, "reward.yaml")) or {}).get("output_dir")
    if found := trained or evaluation.get("reward_model"):
        return os.path.expanduser(found)
    raise UserError(
        f"{recipe.path}: no reward model labels the answers; set reward_model, or add a reward.yaml to the folder"
    )


def _check(rounds: Rounds) -> None:
    evaluation, dpo, where = rounds.evaluation, rounds.dpo, rounds.recipe.where
    for key in ("sft_model", "dpo_model"):
        if not evaluation.get(key):
            raise UserError(f"{evaluation.path}: key '{key}' is missing; rounds compare the policy with it by win rate")
    if not evaluation.get("reward_model"):
        raise UserError(
            f"{evaluation.path}: key 'reward_model' is missing; rounds stop when the win rate by it no longer rises"
        )
    if os.path.normpath(evaluation.values["dpo_model"]) != os.path.normpath(dpo.values["output_dir"]):
        raise UserError(
            f"{evaluation.where('dpo_model')}: dpo_model is {evaluation.values['dpo_model']}, and dpo.yaml writes {dpo.values['output_dir']}; "
            "rounds need the evaluation of that policy"
        )
    if dpo.get("reference") == "nf4" and (rounds.config.start_from, rounds.config.reference) != ("start", "start"):
        raise UserError(
            f"{where('reference')}: dpo.yaml has `reference: nf4`; rounds with another reference than the policy they start from "
            "take an exact one: set `reference: cached` there, or `start_from: start` and `reference: start` here"
        )
    before = read_json(rounds.asked_file)
    if before is not None and before != rounds.asked:
        keys = sorted(key for key, value in rounds.asked.items() if before.get(key) != value)
        raise UserError(
            f"{rounds.prompts} was written with other values of {', '.join(keys)}; set them back, or give the rounds a new output_dir"
        )
    for number in range(2, rounds.config.num_rounds + 1):
        for stage, values in ((DPO, rounds.dpo_values(number)), (EVALUATE, rounds.evaluation_values(number))):
            check_recipe(Recipe(stage, str(rounds.recipe_file(stage, number)), dict(values), dict.fromkeys(values)))
