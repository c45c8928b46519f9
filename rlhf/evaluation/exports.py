"""The policies' answers in the formats of AlpacaEval and Arena-Hard, for their own judges.

AlpacaEval (https://github.com/tatsu-lab/alpaca_eval at cd543a1): a JSON list of {instruction, output, generator, dataset}.
Arena-Hard-Auto (https://github.com/lmarena/arena-hard-auto at 196f6b8): JSONL of {uid, ans_id, model, messages, tstamp,
metadata}, the answer in the last message as {"answer": text}, and in metadata the counts of its style control. Its own uid
of a question is not in a data set of pairs: here it is the hash of the prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from rlhf.config.stage_config import EvaluateConfig
from rlhf.data.mix import data_name
from rlhf.distributed.processes import say
from rlhf.evaluation.judging import conversation
from rlhf.evaluation.measure import Found, Subject
from rlhf.files import write_file

FOLDER = "exports"


def export_answers(folder: Path, config: EvaluateConfig, found: Found, subjects: list[Subject]) -> None:
    """Write what the recipe's `export` asks for into RUN_DIR/exports, one file per policy."""
    name = data_name(config.dataset_name or "")
    for subject in (subject for subject in subjects if subject.kind == "policy"):
        label, file = subject.short, re.sub(r"[^\w.+-]", "-", subject.short)
        answers = [answer for answer in found.answers if label in answer]
        if "alpaca_eval" in (config.export or ()):
            lines: list[Any] = [alpaca_eval(answer["prompt"], answer[label], label, name) for answer in answers]
            _write(
                folder / FOLDER / "alpaca_eval" / file / "model_outputs.json",
                json.dumps(lines, indent=1, ensure_ascii=False) + "\n",
            )
        if "arena_hard" in (config.export or ()):
            count = lambda text, tokenizer=subject.tokenizer: len(tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
            lines = [arena_hard(answer["prompt"], answer[label], label, count(answer[label])) for answer in answers]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            _write(folder / FOLDER / "arena_hard" / "model_answer" / f"{file}.jsonl", text)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, text)
    say(f"{'Exported':<12} {file}")


def alpaca_eval(prompt: list[dict], answer: str, generator: str, dataset: str) -> dict[str, str]:
    """An item of AlpacaEval's model_outputs.json; a prompt of several turns is one text with their roles."""
    return {"instruction": conversation(prompt), "output": answer, "generator": generator, "dataset": dataset}


def arena_hard(prompt: list[dict], answer: str, model: str, num_tokens: int) -> dict[str, Any]:
    """A line of Arena-Hard's model_answer/MODEL.jsonl.

    Args:
        num_tokens: of the answer, by the model's own tokenizer (Arena-Hard counts with GPT-4o's).
    """
    uid = hashlib.sha256(conversation(prompt).encode()).hexdigest()[:32]
    messages = [
        *({"role": m["role"], "content": m["content"]} for m in prompt),
        {"role": "assistant", "content": {"answer": answer}},
    ]
    return {
        "uid": uid, "ans_id": hashlib.sha256(f"{uid}{model}{answer}".encode()).hexdigest()[:22], "model": model,
        "messages": messages, "tstamp": 0.0, "metadata": {"token_len": num_tokens, **markdown_counts(answer)},
    }  # fmt: skip


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    """Headers, list items and bold parts outside of code blocks, as Arena-Hard's style control counts them."""
    text = re.sub(r"```[^`]*```", "", text)
    count = lambda pattern: len(re.findall(pattern, text, re.MULTILINE))  # noqa: E731
    return {
        "header_count": {f"h{n}": count(rf"^#{{{n}}}\s") for n in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }
