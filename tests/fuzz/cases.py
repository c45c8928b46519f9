"""Inputs that went wrong once, by area: files of a box, and the command that is given in it.

Each was found by hand or by the fuzzer to end in a traceback, a hang, an answer that nobody can read, or a wrong one.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
from dataclasses import dataclass, field

AREAS = ("recipes", "command line", "data", "run folders", "launch", "models")
FOLDER, PREFIX = ("a folder",), "-> "  # as a file's content: an empty folder; a text that starts so is a link


@dataclass
class Case:
    """Files (path in the box to bytes, a `-> link` or FOLDER) and the words of a command that runs in the box."""

    area: str
    name: str
    files: dict[str, object]
    words: list[str]
    writes: tuple[str, ...] = field(default=())  # paths of the box that the command may write


PAIR = {"prompt": "What is 2 + 2?", "chosen": "It is four.", "rejected": "It is five."}
DATA = b"".join(json.dumps(PAIR | {"prompt": f"What is {i} + 2?"}).encode() + b"\n" for i in range(3))
RECIPE = {
    "model_name_or_path": "embedded:smollm2-135m-instruct",
    "dataset_name": "d.jsonl",
    "output_dir": "out",
    "max_steps": 2,
    "use_cpu": True,
}
RECIPES = {"sft": RECIPE, "reward": RECIPE, "dpo": RECIPE | {"beta": 0.1}}
_HEADER = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
WEIGHTS = struct.pack("<Q", len(_HEADER)) + _HEADER + bytes(8)
MODEL = {"m/config.json": b'{"model_type": "llama"}', "m/model.safetensors": WEIGHTS}
DEEPSPEED = {
    "distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": {"zero_stage": 2},
}  # fmt: skip
FSDP = {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 2}}


def recipe_text(values: dict, stage: str = "dpo", **more) -> bytes:
    lines = {"stage": stage, **values, **more}
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()).encode()


def box(stage: str = "dpo", **more) -> dict[str, object]:
    """A recipe with its data and its model, all of it right."""
    return {f"{stage}.yaml": recipe_text(RECIPES[stage], stage, **more), "d.jsonl": DATA, **MODEL}


def check(stage: str = "dpo", *more: str) -> list[str]:
    return [stage, f"{stage}.yaml", "--check", *more]


# --- recipes ---------------------------------------------------------------------------------------------------------

BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n".encode() for x, y in zip("abcdefgh", "bcdefghi", strict=True)
)
DIGITS = "1" + "0" * 320
# What stands behind `key: ` in a recipe, or as a word of the command line.
VALUES = (
    "!!bool maybe", '!!int ""', "!!timestamp x", "!!float abc", "!!binary x", "!!python/object:os.system {}", "!!set {a}",
    "2024-13-45", "0x_", "0b2", "1_000", "190:20:30", "12e3", "1e999", ".nan", "-.inf", ".inf", DIGITS, "9" * 5000, "-1", "0",
    "-3", "5", "1e30", "99999999999", "0.5", "true", "no", "null", "~", "", "[]", "{}", "[1, [2, [3]]]", "{a: {b: c}}", "[null]",
    '"\\0"', '"a\\nb"', '"\\ud800"', '"\\u202eabc"', '"\\e[31mred"', "😀", "a" * 300, "x" * 100_000, "[" * 400, "{" * 400, "- " * 1500,
    "*nothing", "&a [*a]", "hello", "/", ".", "..", "~/x", '"   "', "/dev/null", "a/" * 3000, "%s%n", "{{ x }}", "'", '"', "|", "? a",
)  # fmt: skip
KEYS = (
    "beta", "max_length", "output_dir", "dataset_name", "model_name_or_path", "run_name", "seed", "learning_rate", "report_to",
    "lora_target_modules", "loss_type", "save_strategy", "use_peft", "eval_strategy", "dataset_test_split", "logging_steps",
    "global_batch_size", "lr_scheduler_kwargs", "chat_template", "loss_weights", "bf16",
)  # fmt: skip


def _recipes():
    base = recipe_text(RECIPES["dpo"])
    texts = {
        "binary": b"\xff\xfe\x00\x01", "a NUL": base + b"run_name: a\0b\n", "a list": b"- a\n", "empty": b"", "a tab": base + b"\tx: 1\n",
        "an alias bomb": base + BOMB, "a bomb as value": BOMB + base.replace(b"beta: 0.1", b"beta: *i"),
        "a date as key": base + b"2024-13-45: x\n", "0x_ as key": base + b"0x_: 1\n", "a tag as key": base + b"!!bool maybe: x\n",
        "a list as key": base + b"[1, 2]: x\n", "a mapping as key": base + b"{a: b}: x\n", "a merge": base + b"<<: [1]\n",
        "nested lists": base + b"x: " + b"[" * 400, "nested maps": b"{" * 400, "1,500 levels": b"".join(
            b" " * i + b"a:\n" for i in range(1500)), "a million letters": base + b"seed: " + b"x" * 1_000_000 + b"\n",
        "a long key": base + b"x" * 100_000 + b": 1\n", "a line break in a key": base + b'"a\\nb": 1\n',
        "two documents": base + b"---\n" + base, "UTF-16": base.decode().encode("utf-16"), "a BOM": b"\xef\xbb\xbf" + base,
        "a control character": base + b'run_name: "\\e[31m"\n', "keys twice": base + base,
        "lone surrogates": base + b'run_name: "\\ud800"\n',
    }  # fmt: skip
    for name, text in texts.items():
        yield Case("recipes", name, box() | {"dpo.yaml": text}, check())
    for key in ("beta", "max_length", "run_name", "output_dir", "report_to"):
        for value in ("!!bool maybe", '!!int ""', "!!timestamp x", DIGITS, "[" * 400, "x" * 100_000, '"a\\nb"'):
            text = recipe_text({k: v for k, v in RECIPES["dpo"].items() if k != key}) + f"{key}: {value}\n".encode()
            yield Case("recipes", f"{key}: {value[:30]}", box() | {"dpo.yaml": text}, check())


# --- the command line ------------------------------------------------------------------------------------------------


def _command_line():
    overrides = [
        ["--beta", "!!bool maybe"], ["--run_name", "!!bool maybe"], ["--beta", "[" * 3000], ["--max_length", "9" * 400],
        ["--beta", "x" * 100_000], ["--output_dir", "o" * 300], ["--output_dir", "a/" * 3000], ["--dataset_name", "d" * 300],
        ["--dataset_name", "d" * 300 + ".jsonl"], ["--model_name_or_path", "m" * 300], ["--output_dir", "\n"], ["--output_dir", "   "],
        ["--output_dir", "~/x"], ["--dataset_num_proc", "-3"], ["--dataloader_num_workers", "-1"], ["--seed", "-1"],
        ["--adam_beta1", "5"], ["--lora_dropout", "7"], ["--watchdog_minutes", "-1"], ["--neftune_noise_alpha", "-5"],
        ["--label_smoothing", "9"], ["--beta", "0.1", "--beta", "0.2"], ["--dataset_name", "/usr/lib"], ["--dataset_name", "../../.."],
        ["--dataset_name", "/proc/self/mem"], ["--dataset_name", "/dev/zero"], ["--dataset_name", "."], ["--"], ["--="], ["-x"],
        ["--fresh", "--output_dir", "/"], ["--fresh", "--output_dir", "."], ["--output_dir", "/"], ["--output_dir", "d.jsonl/sub"],
        ["--output_dir", "/dev/null"], ["--output_dir", "/proc/x"], ["--launch", "l" * 300], ["--launch", "/"], ["--be\nta", "1"],
        ["--\x1b[31m", "1"], ["--" + "k" * 5000, "1"], ["--chat_template", "c" * 5000], ["--chat_template", "/etc"],
        ["--lr_scheduler_kwargs", "{a: 1}"], ["--report_to", "hello"], ["--max_train_examples", "1" + "0" * 30],
    ]  # fmt: skip
    for words in overrides:
        yield Case("command line", " ".join(words)[:60], box(), check("dpo", *words))
    commands = [
        ["dpo"], ["dpo", "r" * 300 + ".yaml", "--check"], ["dpo", "nothing.yaml", "--check"], ["dpo", ".", "--check"],
        ["dpo", "--check", "--beta", "1"], ["pairs", "p" * 300], ["pairs", "d.jsonl", "--output_dir", "d.jsonl/sub"],
        ["pairs", "d.jsonl", "--output_dir", "o" * 300], ["pairs", "d.jsonl", "--limit", "-1"], ["pairs", "d.jsonl", "--limit", "x"],
        ["status", "s" * 300], ["status", "/"], ["status", "nothing"], ["report", "r" * 300], ["report", "nothing"], ["report", "d.jsonl"],
        ["nothing"], ["dpo", "dpo.yaml", "--status"], ["dpo", "dpo.yaml", "--launch", "x"], ["status"], ["status", "a\nb"], ["pairs", "\0"],
        ["sft", "dpo.yaml", "--check"], ["evaluate", "dpo.yaml", "--check"],
    ]  # fmt: skip
    for words in commands:
        yield Case("command line", " ".join(words)[:60], box(), words)


# --- data ------------------------------------------------------------------------------------------------------------


def parquet(rows: list[dict], **columns) -> bytes:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    for name, array in columns.items():
        table = table.append_column(name, array)
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


def _parquets():
    import pyarrow

    rows = [PAIR] * 2
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(struct.pack("<3i", 0, 1, 2)), pyarrow.py_buffer(b"\xff\xfe")]
    )
    far = pyarrow.array([2**40, 1], pyarrow.int64())
    yield "no UTF-8", parquet(rows, note=bad)
    yield "a far date", parquet(rows, when=far.cast(pyarrow.timestamp("s")))
    yield "a long duration", parquet(rows, span=far.cast(pyarrow.duration("s")))
    yield "a far day", parquet(rows, day=pyarrow.array([2**30, 1], pyarrow.int32()).cast(pyarrow.date32()))
    yield "cut short", parquet(rows)[:-20]
    yield "no parquet", DATA


def _line(**columns) -> bytes:
    return json.dumps(PAIR | columns).encode() + b"\n"


def _data():
    many = "1" + "0" * 400
    lines = {
        "1,000 levels": b'{"prompt": ' + b"[" * 100_000 + b"\n", "5,000 digits": b'{"a": ' + b"1" * 5000 + b"}\n",
        "a surrogate": b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}\n', "a margin of 400 digits": _line(margin=1)[:-3] +
        many.encode() + b"}\n", "NaN": _line(margin=float("nan")), "infinite": _line(margin=float("inf")), "a list": b"[1]\n",
        "a JSON list": b"[1, 2]", "a null": b"null\n", "empty": b"", "white space": b"  \n\n", "UTF-16": DATA.decode().encode("utf-16"),
        "latin-1": b'{"prompt": "\xe9"}\n', "HTML": b"<!DOCTYPE html><html>", "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid",
        "chosen a dict": _line(chosen={"role": "assistant", "content": "a"}), "chosen a number": _line(chosen=1),
        "chosen nested": _line(chosen=[[[1]]]), "no role": _line(chosen=[{"content": "a"}]), "a role of its own": _line(
            chosen=[{"role": "x" * 5000, "content": "a"}]), "content null": _line(chosen=[{"role": "assistant", "content": None}]),
        "same answers": _line(rejected=PAIR["chosen"]), "empty prompt": _line(prompt=""), "no prompt": b'{"chosen": "a", "rejected": "b"}\n',
        "a column of 100,000 letters": _line(**{"k" * 100_000: 1}), "500 columns": _line(**{f"c{i}": i for i in range(500)}),
        "no columns": b"{}\n", "a control character": b'{"a\\u001b[31m": 1}\n', "gzip": gzip.compress(DATA), "binary": bytes(range(256)),
        "a line break in a column": b'{"a\\nb": 1}\n', "a row of 2 MB, cut": b'{"prompt": "' + b"x" * 2_000_000,
    }  # fmt: skip
    for name, content in lines.items():
        for stage in ("reward", "sft") if name in ("5,000 digits", "a surrogate") else ("reward",):
            yield Case("data", f"{name} ({stage})", box(stage) | {"d.jsonl": content}, check(stage))
    for name, content in _parquets():
        yield Case("data", f"parquet: {name}", box(dataset_name="d.parquet") | {"d.parquet": content}, check())
    for name, content in {"a NUL": b"prompt,chosen,rejected\na,\0,c\n", "a quote": b'prompt,chosen,rejected\na,"b,c\n',
                          "empty": b"", "one line": b"prompt,chosen,rejected\n", "columns twice": b"prompt,chosen,chosen\na,b,c\n",
                          "fields": b"prompt,chosen,rejected\na,b\n", "binary": bytes(range(256))}.items():  # fmt: skip
        yield Case("data", f"csv: {name}", box(dataset_name="d.csv") | {"d.csv": content}, check())
    for name, files in {
        "a script": {"s/s.py": b"raise SystemExit(7)\n"}, "damaged info": {"s/dataset_info.json": b"{}", "s/state.json": b"{}"},
        "damaged dict": {"s/dataset_dict.json": b"[1]"}, "empty": {"s": FOLDER}, "a folder as split": {"s/train.jsonl": FOLDER},
        "a dangling split": {"s/train.jsonl": "-> gone"}, "itself": {"s/train.jsonl": "-> train.jsonl"}, "text": {"s/a.txt": b"hello"},
        "gzip": {"s/train.jsonl.gz": gzip.compress(DATA)},
    }.items():  # fmt: skip
        yield Case("data", f"folder: {name}", box(dataset_name="s") | files, check())
    for name in ("d.jsonl.gz", "d.gz", "d.bin", "gone.jsonl", "link.jsonl"):
        yield Case("data", f"named {name}", box() | {"d.bin": DATA, "d.gz": gzip.compress(DATA), "d.jsonl.gz": gzip.compress(DATA),
                   "link.jsonl": "-> link.jsonl"}, check("dpo", "--dataset_name", name))  # fmt: skip


# --- run folders, models, launch files -------------------------------------------------------------------------------

JUNK = (
    b"[1]", b'{"a": 1}', b"", b"{", b"null", b'"x"', b"\xff\xfe", b"[" * 10_000, b"1" * 5000, b'{"steps": "x"}', b'{"inputs": [1]}',
    b'{"stage": [1]}', b'{"steps": 2, "seconds": NaN, "first_loss": null}', b'{"steps": -1}', b'{"steps": 1}', b'{"files": {"a": [1, "0"]}}',
    b'{"files": {"../x": [1, "0"]}}', b'{"files": {"/etc/passwd": [1, "0"]}}', b'{"files": []}', BOMB, FOLDER, "-> gone", "-> /dev/null", "-> .",
)  # fmt: skip
RUN_FILES = ("recipe.yaml", "provenance.json", "complete.json", "stopped.json", "metrics.jsonl", "checkpoint-2/manifest.json",
             "checkpoint-2/trainer_state.json", ".lock", "checkpoint-2")  # fmt: skip
PROVENANCE = {
    "stage": "dpo",
    "recipe": "dpo.yaml",
    "command": ["rlhf", "dpo"],
    "versions": {},
    "hardware": {"cpus": 2},
    "git_commit": None,
}


SHA_OF_X = hashlib.sha256(b"x").hexdigest().encode()


def run_box(complete: bool = False) -> dict[str, object]:
    """A run of dpo.yaml in the folder `out`, with a checkpoint of step 2."""
    files = box() | {
        "out/recipe.yaml": recipe_text(RECIPES["dpo"]), "out/provenance.json": json.dumps(PROVENANCE | {"inputs": {}}).encode(),
        "out/metrics.jsonl": b'{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.6}\n', "out/checkpoint-2/a": b"x",
        "out/checkpoint-2/manifest.json": b'{"files": {"a": [1, "%s"]}}' % SHA_OF_X, "out/checkpoint-2/trainer_state.json": b'{"max_steps": 4}',
    }  # fmt: skip
    return files | (
        {"out/complete.json": b'{"steps": 2, "seconds": 1.0, "weights_sha256": "ab", "train_examples": 3}'}
        if complete
        else {}
    )


RUN_COMMANDS = (
    check(),
    ["dpo", "dpo.yaml", "--status"],
    ["status", "out"],
    ["status", "."],
    ["report", "out"],
    check("dpo", "--fresh"),
)


def without(files: dict[str, object], name: str) -> dict[str, object]:
    """Files but one, and but what is in it."""
    return {path: content for path, content in files.items() if path != name and not path.startswith(f"{name}/")}


def _run_folders():
    damage = [(name, junk) for name in ("complete.json", "provenance.json") for junk in JUNK]
    damage += [("checkpoint-2/manifest.json", junk) for junk in JUNK[-10:]] + [
        ("recipe.yaml", junk) for junk in JUNK[-6:]
    ]
    damage += [
        ("checkpoint-²", FOLDER),
        ("metrics.jsonl", b'[1]\n3\n{"step": "x"}\n\xff\n'),
        ("stopped.json", b'{"step": "two"}'),
        ("recipe.yaml", b"{" * 400),
    ]
    for number, (name, junk) in enumerate(damage):
        files = without(run_box(complete=number % 2 == 1), f"out/{name}") | {f"out/{name}": junk}
        words = RUN_COMMANDS[number % len(RUN_COMMANDS)] if name != "complete.json" else RUN_COMMANDS[number % 4]
        yield Case(
            "run folders",
            f"{name}: {str(junk)[:30]}: {' '.join(words)}",
            files,
            words,
            ("out/report.html", "report.html"),
        )
    for name, content in {"dangling": "-> gone", "itself": "-> out", "a file": b"x", "other files": None}.items():
        files = without(box(), "out") | (
            {"out": content} if content else {"out/mine.txt": b"x", "out/\x1b[31m\n": b"x"}
        )
        for words in (
            check(),
            check("dpo", "--fresh"),
            ["dpo", "dpo.yaml", "--status"],
            ["report", "out"],
            ["status", "out"],
        ):
            yield Case("run folders", f"output_dir {name}: {' '.join(words)}", files, words)
    evaluation = {
        "evaluate.yaml": recipe_text({"dataset_name": "d.jsonl", "dataset_test_split": "train", "output_dir": "out", "dpo_model": "m"}, "evaluate"),
        "out/complete.json": b'{"pairs": 3}', "out/results.json": b'{"pairs": 3, "policies": {}}', "out/answers.jsonl": b"",
        "out/provenance.json": json.dumps(PROVENANCE | {"stage": "evaluate"}).encode(), "d.jsonl": DATA, **MODEL,
    }  # fmt: skip
    evaluation["out/recipe.yaml"] = evaluation["evaluate.yaml"]
    for name, junk in (("results.json", b"[1]"), ("results.json", b'{"pairs": 1, "policies": 1}'), ("answers.jsonl", b'[1]\n{"prompt": 1}\n\xff'),
                       ("results.json", "-> gone"), ("answers.jsonl", FOLDER), ("complete.json", b"[1]")):  # fmt: skip
        for words in (["evaluate", "evaluate.yaml", "--check"], ["report", "out"]):
            yield Case(
                "run folders",
                f"{name}: {str(junk)[:30]}: {words[0]}",
                evaluation | {f"out/{name}": junk},
                words,
                ("out/report.html", "report.html"),
            )
    for text in (
        b"\xff\xfe",
        b"[" * 400,
        b"seed: 2024-13-45",
        b"output_dir: 123",
        b"output_dir: [a]",
        b"output_dir: {a: 1}",
        b"!!bool maybe: 1",
        FOLDER,
    ):
        yield Case("run folders", f"sibling sft.yaml: {str(text)[:30]}", box() | {"sft.yaml": text}, check())


def _models():
    for name, files in {
        "complete.json a list": {"m/complete.json": b"[1]"}, "dangling weights": {"m/model.safetensors": "-> gone"},
        "weights cut short": {"m/model.safetensors": WEIGHTS[:20]}, "weights empty": {"m/model.safetensors": b""},
        "weights a folder": {"m/model.safetensors": FOLDER}, "weights itself": {"m/model.safetensors": "-> model.safetensors"},
        "a pickle": {"m/model.safetensors": None, "m/pytorch_model.bin": b"\x80\x04."}, "no weights": {"m/model.safetensors": None},
        "a damaged index": {"m/model.safetensors": None, "m/model.safetensors.index.json": b"[1]"}, "config a list": {"m/config.json": b"[1]"},
        "config binary": {"m/config.json": b"\xff"}, "config deep": {"m/config.json": b"[" * 10_000}, "no config": {"m/config.json": None},
        "an adapter of nothing": {"m/adapter_config.json": b"{}"}, "an adapter as list": {"m/adapter_config.json": b"[1]"},
        "Git LFS": {"m/model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "m a file": {"m/config.json": None,
        "m/model.safetensors": None, "m": b"x"}, "m itself": {"m/config.json": None, "m/model.safetensors": None, "m": "-> m"},
    }.items():  # fmt: skip
        changed = {path: content for path, content in (box() | files).items() if content is not None}
        yield Case("models", name, changed, check())


def _launch():
    texts = {
        "deepspeed_config a text": {**DEEPSPEED, "deepspeed_config": "hello"}, "zero_stage a word": {**DEEPSPEED, "deepspeed_config": {
            "zero_stage": "two"}}, "zero_stage null": {**DEEPSPEED, "deepspeed_config": {"zero_stage": None}}, "fsdp_config a list": {
            **FSDP, "fsdp_config": [1]}, "fsdp_version x": {**FSDP, "fsdp_config": {"fsdp_version": "x"}}, "a list": [1], "a text": "x",
        "no type": {}, "a type of its own": {"distributed_type": ["x"]}, "zero_stage 9": {**DEEPSPEED, "deepspeed_config": {"zero_stage": 9}},
    }  # fmt: skip
    files = {name: json.dumps(value).encode() for name, value in texts.items()}
    files |= {"a bad date": b"distributed_type: FSDP\nwhen: 2024-13-45\n", "binary": b"\xff\xfe", "nested": b"[" * 400, "a tag": b"distributed_type: !!bool maybe\n",
              "a bomb": BOMB + b"distributed_type: *i\n", "empty": b"", "a folder": FOLDER, "itself": "-> l.yaml"}  # fmt: skip
    for name, content in files.items():
        yield Case("launch", name, box() | {"l.yaml": content}, check("dpo", "--launch", "l.yaml"))


def corpus() -> list[Case]:
    """All of them."""
    return [*_recipes(), *_command_line(), *_data(), *_run_folders(), *_launch(), *_models()]
