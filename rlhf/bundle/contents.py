"""What goes into a bundle: the recipes with their new paths, and all that they name. Nothing is written here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rlhf
from rlhf.bundle import data, models, scripts
from rlhf.bundle.archive import Item
from rlhf.bundle.places import Places
from rlhf.bundle.recipes import (
    DATA,
    MODELS,
    OUTPUTS,
    TASKS,
    Named,
    check_no_secrets,
    is_inside,
    named,
    read_recipes,
    rewrite,
)  # fmt: skip
from rlhf.config.recipe import Recipe
from rlhf.config.yaml_reader import read_text
from rlhf.errors import UserError
from rlhf.files import cache_dir
from rlhf.models import embedded

TEXTS = (".yaml", ".yml", ".jinja", ".md")  # that are taken from the recipe folder though no recipe names them
LAUNCH = ("launch/*.yaml", "launch/*.sh", "slurm/*.sh", "slurm/*.sbatch", "slurm/site.env.example", "slurm/README.md")
ONLINE = ("wandb", "comet_ml", "mlflow", "neptune", "clearml", "swanlab", "dagshub", "trackio")


@dataclass
class Contents:
    """The files of a bundle but its wheels.

    Attributes:
        folder: of the recipes in the bundle.
        stages: (stage, file in the bundle) in the order in which they run.
        items: by name in the bundle.
        moved: values that were rewritten: {"file", "line", "key", "from", "to"}.
        left_out: one sentence for each thing that is not in the bundle.
    """

    folder: str = ""
    stages: list[tuple[str, str]] = field(default_factory=list)
    items: dict[str, Item] = field(default_factory=dict)
    moved: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, *items: Item) -> None:
        for item in items:
            self.items.setdefault(item.name, item)

    @property
    def size(self) -> int:
        return sum(item.size for item in self.items.values())


def project_folder() -> Path:
    """The checkout that this package runs from, or else the current folder.

    Raises:
        UserError: neither is one.
    """
    for folder in (Path(rlhf.__file__).resolve().parents[1], Path.cwd()):
        if all((folder / name).is_file() for name in ("pyproject.toml", "requirements.lock", "launch/pipeline.sh")):
            return folder
    raise UserError(
        "launch/ and requirements.lock, which belong into a bundle, are not beside the installed package; run `rlhf bundle` "
        "in a checkout of the project"
    )


def collect(folder: Path, with_models: bool = True) -> Contents:
    """List what a recipe folder needs.

    Raises:
        UserError: a recipe, data or model that is missing or damaged, with the place where it is named.
    """
    recipes, project = read_recipes(folder), project_folder()
    made = [Output(Path(item.recipe.path), item.value) for item in named(recipes, ("output_dir",))]
    named_models = list(_models(recipes, made)) if with_models else []
    places = _places(folder, recipes, named_models)
    contents = Contents(places.of(str(folder)))
    _add_data(contents, places, recipes)
    _add_models(contents, places, named_models)
    _add_recipes(contents, places, recipes, made, with_models)
    _add_other_texts(contents, folder)
    for pattern in LAUNCH:
        for path in sorted(project.glob(pattern)):
            check_no_secrets(read_text(str(path), "text"), path)
            contents.add(Item.copy(path.relative_to(project).as_posix(), "launch", path))
    has_hub = any(item.name.startswith(f"{models.HUB}/") for item in contents.items.values())
    has_cache = any(item.name.startswith("cache/") for item in contents.items.values())
    for name, text, executable in scripts.launchers(contents.folder, has_hub or with_models, has_cache or with_models):
        contents.add(Item.text(name, "launch", text, executable))
    contents.left_out += _left_out(recipes, made, with_models, named(recipes, MODELS))
    contents.left_out = list(dict.fromkeys(contents.left_out))
    return contents


@dataclass(frozen=True)
class Output:
    """The output folder of a recipe."""

    file: Path
    folder: str


@dataclass(frozen=True)
class Model:
    """A model to bundle.

    Attributes:
        name: `embedded:…`, a local folder, or a hub id.
        revision: of a hub model; `code` if only its code is wanted.
        base: of a local adapter; else ''.
    """

    name: str
    revision: str
    where: str
    base: str = ""


def _models(recipes: list[Recipe], made: list[Output]) -> Iterator[Model]:
    """The models that recipes name, and the bases of adapters; not what a recipe of the folder makes."""
    for item in named(recipes, MODELS):
        if any(is_inside(item.value, output.folder) for output in made):
            continue
        revision = item.recipe.get("model_revision") if item.key == "model_name_or_path" else None
        name, where = item.value, item.where
        for _ in range(5):  # an adapter's base is seldom an adapter
            base = models.check_folder(Path(name).expanduser(), where) if models.is_local(name) else ""
            yield Model(name, revision or "main", where, base)
            if not base:
                break
            name, revision, where = base, "main", f"{name}/adapter_config.json"


def _places(folder: Path, recipes: list[Recipe], named_models: list[Model]) -> Places:
    paths = [(str(folder), "configs")]
    paths += [(item.value, f"runs/{folder.resolve().name}") for item in named(recipes, ("output_dir",))]
    paths += [(item.value, "cache") for item in named(recipes, ("reference_cache",))]
    paths += [(item.value, "data") for item in _local_data(recipes)]
    paths += [(item.value, "tasks") for item in named(recipes, TASKS)]
    paths += [(item.value, "templates") for item in _templates(recipes)]
    paths += [(model.name, "models") for model in named_models if models.is_local(model.name)]
    in_cache = cache_dir() / "models" / Path(models.EMBEDDED).name
    return Places(paths, Path.cwd(), {in_cache: models.EMBEDDED})


def _local_data(recipes: list[Recipe]) -> Iterator[Named]:
    for item in named(recipes, DATA):
        if not data.is_packaged(item.value) and data.is_local(item.value, item.where):
            yield item


def _templates(recipes: list[Recipe]) -> Iterator[Named]:
    for item in named(recipes, ("chat_template",)):
        if "/" in item.value or item.value.endswith(".jinja"):
            if not Path(item.value).is_file():
                raise UserError(f"{item.where}: chat_template: no file at {item.value}")
            yield item


def _add_data(contents: Contents, places: Places, recipes: list[Recipe]) -> None:
    for item in named(recipes, DATA):
        if data.is_packaged(item.value):
            continue
        if not data.is_local(item.value, item.where):
            contents.add(*data.hub_items(item.value, item.recipe.get("dataset_config"), item.where))
            continue
        items, left = data.local_items(Path(item.value).expanduser(), places.of(item.value), item.where)
        contents.add(*items)
        contents.left_out += [f"{name}: not data" for name in left]
    for item in named(recipes, TASKS):
        contents.add(*data.task_items(Path(item.value).expanduser(), places.of(item.value), item.where))
    for item in _templates(recipes):
        contents.add(Item.copy(places.of(item.value), "data", Path(item.value)))


def _add_models(contents: Contents, places: Places, named_models: list[Model]) -> None:
    hub: dict[tuple[str, str], str] = {}
    for model in named_models:
        if model.name.startswith(embedded.PREFIX):
            contents.add(*models.embedded_items(model.where))
        elif models.is_local(model.name):
            folder = Path(model.name).expanduser()
            base = places.of(model.base) if model.base and models.is_local(model.base) else None
            contents.add(*models.folder_items(folder, places.of(model.name), base))
            beside = [path.name for path in models.folder_files(folder)[1]]
            if beside:
                contents.left_out.append(f"{folder}: of this model, what loading does not read ({', '.join(beside)})")
        elif models.is_hub_id(model.name):
            hub.setdefault((model.name, model.revision), model.where)
        else:
            raise models.no_such_model(model.name, model.where)
    _add_hub_models(contents, hub)


def _add_hub_models(contents: Contents, hub: dict[tuple[str, str], str]) -> None:
    """Hub models, and those that they need, out of the local cache; all that are missing are named at once.

    Args:
        hub: (name, revision), and where it is named.
    """
    problems: dict[str, None] = {}
    found: list[tuple[str, list[Item]]] = []
    waiting = list(hub)
    for name, revision in waiting:  # grows while models need others
        where = hub[name, revision]
        try:
            if revision == "code":
                found.append((revision, models.code_items(name, where)))
                continue
            items, needs = models.hub_items(name, revision, where)
        except UserError as error:
            problems[str(error)] = None
            continue
        found.append((revision, items))
        new = [need for need in needs if need not in hub]
        hub.update(dict.fromkeys(new, where))
        waiting += new
    if problems:
        raise UserError("; and ".join(problems))
    for _, items in sorted(found, key=lambda pair: pair[0] != "main"):  # its own `refs/main` comes first
        contents.add(*items)


def _add_recipes(
    contents: Contents, places: Places, recipes: list[Recipe], made: list[Output], with_models: bool
) -> None:
    """The recipes with the paths of the bundle, each checked: the same keys, in the same lines."""

    def place(key: str, value: str) -> str | None:
        if key in OUTPUTS or key in TASKS:
            is_path = True
        elif key in MODELS:
            is_made = any(is_inside(value, output.folder) for output in made)
            is_path = is_made or (with_models and models.is_local(value))
        elif key in DATA:
            is_path = not data.is_packaged(value) and data.is_local(value, key)
        else:
            is_path = key == "chat_template" and ("/" in value or value.endswith(".jinja"))
        new = places.of(value) if is_path and value else None
        return None if new == os.path.normpath(value) else new

    for recipe in recipes:
        path = Path(recipe.path)
        text = read_text(recipe.path)
        check_no_secrets(text, path)
        text, changes = rewrite(text, place)
        name = f"{contents.folder}/{path.name}"
        contents.add(Item.text(name, "recipe", text))
        contents.stages.append((recipe.stage, name))
        contents.moved += [{"file": name, **change} for change in changes]


def _add_other_texts(contents: Contents, folder: Path) -> None:
    taken = {item.path.resolve() for item in contents.items.values() if item.path}
    for path in sorted(folder.iterdir()):
        name = f"{contents.folder}/{path.name}"
        if name in contents.items or path.resolve() in taken:
            continue
        if path.suffix in TEXTS and path.is_file() and not path.name.startswith("."):
            text = read_text(str(path), "text")
            check_no_secrets(text, path)
            contents.add(Item.text(name, "recipe", text))
        elif not path.is_dir():
            contents.left_out.append(f"{path}: no recipe names it")


def _left_out(recipes: list[Recipe], made: list[Output], with_models: bool, given: Iterator[Named]) -> Iterator[str]:
    """What the user might look for in the bundle."""
    for output in made:
        if os.path.lexists(os.path.expanduser(output.folder)):
            yield f"{output.folder}: the output of {output.file}, which the run makes again"
    if not with_models:
        for item in given:
            if not any(is_inside(item.value, output.folder) for output in made):
                yield f"{item.value}: --no-models; {item.where} names it, and it has to be there"
    for recipe in recipes:
        if recipe.get("push_to_hub"):
            yield f"a way to the hub: {recipe.where('push_to_hub')} pushes to it; add `--push_to_hub false` there"
        if recipe.get("benchmarks"):
            yield f"the data of {recipe.where('benchmarks')}, which lm-evaluation-harness reads from the hub or its cache there"
        reporters = recipe.get("report_to") or []
        reporters = [reporters] if isinstance(reporters, str) else reporters
        if online := sorted(set(reporters) & set(ONLINE)):
            yield f"a way to {', '.join(online)}: {recipe.where('report_to')} reports there"
