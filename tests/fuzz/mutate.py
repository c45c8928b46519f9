"""Inputs that nobody thought of: the right ones and those of the corpus, changed at random from a seed."""

from __future__ import annotations

import gzip
import io
import json
import random
from dataclasses import replace

import cases
from cases import AREAS, FOLDER, Case, box, check, recipe_text, without

SCALARS = (
    None,
    True,
    0,
    -1,
    3.5,
    2**70,
    "",
    " ",
    "a",
    "😀",
    "\0",
    "a\nb",
    "\x1b[31m",
    "x" * 3000,
    float("nan"),
    float("inf"),
)
WORDS = (
    "--check",
    "--fresh",
    "--status",
    "--keys",
    "--",
    "--launch",
    "--beta",
    "0.1",
    "-h",
    "=",
    "--x",
    "dpo",
    "out",
    "\n",
    "*",
    "",
)


def draw(area: str, rng: random.Random, number: int) -> Case:
    """A case of an area; the same generator state gives the same case."""
    case = _MAKERS[area](rng)
    return replace(case, area=area, name=f"drawn {number}: {case.name}")


def shape(rng: random.Random, depth: int = 0):
    """A JSON value of any shape."""
    kind = rng.random()
    if depth > 2 or kind < 0.6:
        return rng.choice(SCALARS)
    if kind < 0.8:
        return [shape(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {
        str(rng.choice(("role", "content", "a", "", "text", "prompt"))): shape(rng, depth + 1)
        for _ in range(rng.randrange(4))
    }


def damage(content: bytes, rng: random.Random) -> bytes:
    """Bytes with one to four places flipped, cut, doubled or filled."""
    for _ in range(rng.randrange(1, 5)):
        at, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 2, 10, 200))
        cut = content[at : at + length]
        middle = rng.choice(
            (b"", cut * 3, rng.randbytes(length), cut[::-1], b"\0", b"\xff", b"\n", b"{", b"]", b": ", b"!!bool ")
        )
        content = content[:at] + middle + content[at + length :]
    return content


def _recipe(rng: random.Random) -> Case:
    from rlhf.config.recipe import allowed_keys

    stage = rng.choice(("sft", "reward", "dpo"))
    values = dict(cases.RECIPES[stage])
    if rng.random() < 0.3:
        text = damage(recipe_text(values, stage), rng)
        return Case("", "text", box(stage) | {f"{stage}.yaml": text}, check(stage))
    changed = rng.sample(sorted(allowed_keys(stage)), rng.choice((1, 1, 1, 2, 3)))
    if rng.random() < 0.3:
        changed = [rng.choice(cases.KEYS)]
    lines = "".join(f"{key}: {rng.choice(cases.VALUES)}\n" for key in changed).encode()
    text = recipe_text({k: v for k, v in values.items() if k not in changed}, stage) + lines
    return Case("", ", ".join(changed), box(stage) | {f"{stage}.yaml": text}, check(stage))


def _command_line(rng: random.Random) -> Case:
    from rlhf.config.recipe import allowed_keys

    stage = rng.choice(("sft", "reward", "dpo"))
    words = check(stage)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.75:
            key = rng.choice((rng.choice(sorted(allowed_keys(stage))), rng.choice(cases.KEYS)))
            value = rng.choice(cases.VALUES).replace("\0", "")
            value = value if rng.random() < 0.8 else json.dumps(shape(rng))
            words += [f"--{key}={value}"] if rng.random() < 0.2 else [f"--{key}", value]
        else:
            words.insert(rng.randrange(1, len(words) + 1), rng.choice(WORDS))
    words = [word for word in words if word not in ("-h",)]
    if "--check" not in words and "--status" not in words:
        words.append("--check")
    return Case("", "words", box(stage), words)


def _data(rng: random.Random) -> Case:
    stage = rng.choice(("sft", "reward", "dpo"))
    rows = [dict(cases.PAIR, prompt=f"What is {i}?") for i in range(3)]
    if rng.random() < 0.7:
        row = rng.choice(rows)
        for _ in range(rng.choice((1, 1, 2))):
            row[
                rng.choice(
                    ("prompt", "chosen", "rejected", "margin", "messages", "score_chosen", "label", "tools", "x")
                )
            ] = shape(rng)
    if rng.random() < 0.3:
        column = rng.choice(("prompt", "chosen", "rejected"))
        for row in rows:
            row.pop(column, None)
    kind = rng.choice(("jsonl", "jsonl", "jsonl", "json", "csv", "parquet", "folder", "gz"))
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    name = f"d.{kind}"
    if kind == "json":
        content = json.dumps(rows).encode()
    elif kind == "csv":
        content = _csv(rows)
    elif kind == "parquet":
        content = _parquet(rows, content)
    elif kind == "gz":
        name, content = "d.jsonl.gz", gzip.compress(content)
    elif kind == "folder":
        name = "s"
    if rng.random() < 0.5:
        content = damage(content, rng)
    file = (
        f"s/{rng.choice(('train.jsonl', 'train.csv', 'train.parquet', 'dataset_info.json', 'a.json'))}"
        if kind == "folder"
        else name
    )
    return Case("", kind, box(stage, dataset_name=name) | {file: content}, check(stage))


def _csv(rows: list[dict]) -> bytes:
    import csv

    text = io.StringIO()
    writer = csv.DictWriter(text, sorted({key for row in rows for key in row}))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def _parquet(rows: list[dict], otherwise: bytes) -> bytes:
    import pyarrow

    try:
        return cases.parquet(rows)
    except (pyarrow.ArrowException, OverflowError, ValueError):  # rows that no table can hold
        return otherwise


def _run_folder(rng: random.Random) -> Case:
    files = cases.run_box(complete=rng.random() < 0.5)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice((*cases.RUN_FILES, "checkpoint-²", "checkpoint-03", "model.safetensors", "stop"))
        before = files.get(f"out/{name}")
        if isinstance(before, bytes) and rng.random() < 0.5:
            content = damage(before, rng)
        else:
            content = rng.choice((*cases.JUNK, json.dumps(shape(rng)).encode(), rng.randbytes(20)))
        files = without(files, f"out/{name}") | {f"out/{name}": content}
        parent = files.get(f"out/{name}".rpartition("/")[0])
        if parent is not None:  # a file can't lie below what is none
            files.pop(f"out/{name}".rpartition("/")[0])
    return Case("", "run", files, rng.choice(cases.RUN_COMMANDS), ("out/report.html", "report.html"))


def _launch(rng: random.Random) -> Case:
    config = json.loads(json.dumps(rng.choice((cases.DEEPSPEED, cases.FSDP, {"distributed_type": "MULTI_GPU"}))))
    inner = next((value for value in config.values() if isinstance(value, dict)), config)
    place = rng.choice((config, inner))
    place[rng.choice((*place, "zero_stage", "fsdp_version", "num_processes", "offload_optimizer_device"))] = shape(rng)
    content = json.dumps(config).encode()
    if rng.random() < 0.4:
        content = damage(content, rng)
    return Case("", "launch", box() | {"l.yaml": content}, check("dpo", "--launch", "l.yaml"))


def _model(rng: random.Random) -> Case:
    files = box()
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(
            ("config.json", "model.safetensors", "adapter_config.json", "model.safetensors.index.json", "complete.json")
        )
        before = files.get(f"m/{name}")
        junk = (
            *cases.JUNK,
            None,
            json.dumps(shape(rng)).encode(),
            b'{"weight_map": {"w": "../x"}}',
            b'{"base_model_name_or_path": 1}',
        )
        content = damage(before, rng) if isinstance(before, bytes) and rng.random() < 0.6 else rng.choice(junk)
        files = {path: c for path, c in files.items() if path != f"m/{name}"} | (
            {f"m/{name}": content} if content is not None else {}
        )
    files.setdefault("m", FOLDER) if not any(path.startswith("m/") for path in files) else None
    return Case("", "model", files, check(rng.choice(("dpo",))))


_MAKERS = dict(zip(AREAS, (_recipe, _command_line, _data, _run_folder, _launch, _model), strict=True))
SHARES = dict(zip(AREAS, (0.3, 0.2, 0.25, 0.15, 0.05, 0.05), strict=True))


def drawn(count: int, seed: int, areas: tuple[str, ...] = AREAS) -> list[Case]:
    """`count` cases over all areas by their shares; an area's cases depend on seed and count alone."""
    found = []
    for area in areas:
        rng = random.Random(f"{seed} {area}")
        found += [draw(area, rng, number) for number in range(max(1, round(count * SHARES[area])))]
    return found
