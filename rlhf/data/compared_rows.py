"""Rows of published data sets with several judged answers to a prompt -> one pair: the better and the worse answer.

Two answers and a judgement (SHP, PKU-SafeRLHF, stack-exchange, HelpSteer, OpenAI, arena, ...), or a list of answers with
scores or ranks (UltraFeedback, Nectar), of which the best is paired with the worst. Rows that judge both alike are no pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.data import columns
from rlhf.data.messages import RowError, describe, has, is_empty, text
from rlhf.data.pair_rows import make_pair, pair_row
from rlhf.data.row_parts import answer_messages, prompt_messages, read_prompt

Row = dict[str, Any]
PROMPT_KEYS = ("prompt", "instruction", "question", "query", "input", "context")
LISTS = ("completions", "responses", "generations", "answers", "candidates", "outputs")
LIST_SCORES = ("scores", "ratings", "rating", "rewards")
LIST_RANKS = ("ranks", "rankings")
ITEM_TEXTS = ("response", "answer", "text", "completion", "output", "content", "generation")
ITEM_SCORES = ("score", "rating", "overall_score", "reward")


def judged(
    row: Row, used: set[str], prompt: Any, prompt_key: str, answers: tuple[str, str], better: int,
    scores: tuple[float, float] | None = None,
) -> Row:  # fmt: skip
    """The pair of two columns.

    Args:
        answers: the columns of the two answers.
        better: which of them is better: 0 or 1.
        scores: of the two, if the row has some: the pair's `scores`.
    """
    used |= {prompt_key, *answers}
    found = columns.add_context(row, used, prompt_messages(prompt, prompt_key)) if prompt_key != "history" else (
        prompt_messages(prompt, prompt_key)
    )  # fmt: skip
    both = [answer_messages(required(row, key), key, found) for key in answers]
    pair = make_pair(row, used, found, both[better], both[1 - better])
    if scores is not None:
        pair["scores"] = (scores[better], scores[1 - better])
    return pair


def required(row: Row, key: str) -> Any:
    if not has(row, key):
        raise RowError(f"'{key}' is missing; the first rows have it")
    return row[key]


def _number(row: Row, key: str) -> float:
    found = columns.number(required(row, key))
    if found is None:
        raise RowError(f"'{key}' is {describe(row[key])}; expected a number")
    return found


def _choice(row: Row, used: set[str], key: str) -> int:
    """A column that says which answer is better: 0 or 1."""
    used.add(key)
    found = _number(row, key)
    if found not in (0, 1):
        raise RowError(f"'{key}' is {describe(row[key])}; expected 0 or 1")
    return int(found)


def _tie(what: str) -> RowError:
    return RowError(f"{what}, so there is no better answer; remove the row")


# --- two answers -----------------------------------------------------------------------------------------------------


def stack_exchange_row(row: Row, used: set[str]) -> Row:
    """stack-exchange-paired: `response_j` has more votes than `response_k`."""
    return judged(row, used, required(row, "question"), "question", ("response_j", "response_k"), 0)


def alpaca_comparison_row(row: Row, used: set[str]) -> Row:
    """LLaMA-Factory's older comparisons: `output` holds the better answer and the worse one."""
    answers = required(row, "output")
    if not isinstance(answers, list) or len(answers) != 2:
        raise RowError(f"'output' is {describe(answers)}; expected a list of the better and the worse answer")
    used.add("output")
    prompt = read_prompt(row, used)
    if prompt is None:
        raise RowError("'instruction' is missing; the first rows have it")
    chosen, rejected = (answer_messages(answer, f"output, answer {n}", prompt) for n, answer in enumerate(answers, 1))
    return make_pair(row, used, prompt, chosen, rejected)


def pku_better_row(row: Row, used: set[str]) -> Row:
    """PKU-SafeRLHF by helpfulness: `better_response_id`."""
    return _pku(row, used, "better_response_id")


def pku_safer_row(row: Row, used: set[str]) -> Row:
    """PKU-SafeRLHF by harmlessness: `safer_response_id`."""
    return _pku(row, used, "safer_response_id")


def _pku(row: Row, used: set[str], key: str) -> Row:
    better = _choice(row, used, key)
    return judged(row, used, required(row, "prompt"), "prompt", ("response_0", "response_1"), better)


def shp_row(row: Row, used: set[str]) -> Row:
    """Stanford Human Preferences: `labels` is 1 if `human_ref_A` is preferred."""
    better = 1 - _choice(row, used, "labels")
    scores = columns.number(row.get("score_A")), columns.number(row.get("score_B"))
    both = None if None in scores else (scores[0] or 0.0, scores[1] or 0.0)
    used.update(key for key in ("score_A", "score_B") if both)
    return judged(row, used, required(row, "history"), "history", ("human_ref_A", "human_ref_B"), better, both)


def helpsteer2_row(row: Row, used: set[str]) -> Row:
    """HelpSteer2's preferences: `preference_strength` from -3 (response_1 is much better) to 3 (response_2)."""
    return _helpsteer(row, used, "prompt", ("response_1", "response_2"), "preference_strength")


def helpsteer3_row(row: Row, used: set[str]) -> Row:
    """HelpSteer3's preferences: `overall_preference` from -3 (response1 is much better) to 3 (response2)."""
    return _helpsteer(row, used, "context", ("response1", "response2"), "overall_preference")


def _helpsteer(row: Row, used: set[str], prompt: str, answers: tuple[str, str], key: str) -> Row:
    used.add(key)
    strength = _number(row, key)
    if not strength:
        raise _tie(f"'{key}' is 0")
    return judged(row, used, required(row, prompt), prompt, answers, int(strength > 0), (-strength / 2, strength / 2))


def webgpt_row(row: Row, used: set[str]) -> Row:
    """WebGPT comparisons: `score_0` and `score_1` of `answer_0` and `answer_1`."""
    used |= {"score_0", "score_1"}
    scores = _number(row, "score_0"), _number(row, "score_1")
    if scores[0] == scores[1]:
        raise _tie(f"'score_0' and 'score_1' are both {scores[0]:g}")
    question = required(row, "question")
    prompt = question.get("full_text") if isinstance(question, dict) else question
    return judged(row, used, prompt, "question", ("answer_0", "answer_1"), int(scores[1] > scores[0]), scores)


def openai_row(row: Row, used: set[str]) -> Row:
    """OpenAI's preference format: `input` (messages, tools), `preferred_output`, `non_preferred_output`."""
    given = required(row, "input")
    if not isinstance(given, dict) or not has(given, "messages"):
        raise RowError(f"'input' is {describe(given)}; expected {{'messages': [...]}}")
    used.add("input.messages")
    prompt = prompt_messages(given["messages"], "input.messages")
    sides = ("preferred_output", "non_preferred_output")
    used.update(sides)
    chosen, rejected = (answer_messages(required(row, side), side, prompt) for side in sides)
    more = row
    if not is_empty(given.get("tools")):
        used.add("input.tools")
        more = {**row, "tools": given["tools"]}
    return make_pair(more, used, prompt, chosen, rejected)


def summarize_row(row: Row, used: set[str]) -> Row:
    """OpenAI's summarize_from_feedback: `choice` among two `summaries` of a post; the prompt is that of TL;DR."""
    info, summaries = required(row, "info"), required(row, "summaries")
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise RowError(
            f"'info' is {describe(info)} and 'summaries' {describe(summaries)}; expected a post and two summaries"
        )
    better = _choice(row, used, "choice")
    if has(info, "post") and not is_empty(info["post"]):
        used |= {"info.post", "info.title", "info.subreddit"}
        lines = [f"SUBREDDIT: r/{info['subreddit']}"] if has(info, "subreddit") else []
        lines += [f"TITLE: {info['title']}"] if has(info, "title") else []
        prompt = "\n\n".join([*lines, f"POST: {text(info['post'], 'info.post')}", "TL;DR:"])
    else:
        used |= {"info.article"}
        prompt = f"Article:\n\n{text(info.get('article'), 'info.article')}\n\nTL;DR:"
    used.add("summaries")
    answers = [s.get("text") if isinstance(s, dict) else s for s in summaries]
    both = [[{"role": "assistant", "content": text(a, f"summaries, {n}")}] for n, a in enumerate(answers, 1)]
    return make_pair(row, used, prompt_messages(prompt, "info"), both[better], both[1 - better])


def arena_row(row: Row, used: set[str]) -> Row:
    """Chatbot Arena: `conversation_a`, `conversation_b` and `winner` (model_a, model_b or a tie)."""
    used |= {"conversation_a", "conversation_b", "winner"}
    winner = required(row, "winner")
    if winner not in ("model_a", "model_b"):
        if isinstance(winner, str) and ("tie" in winner or winner == "both_bad"):
            raise _tie(f"'winner' is {winner!r}")
        raise RowError(f"'winner' is {describe(winner)}; expected model_a, model_b or tie")
    sides = [row.get("conversation_a"), row.get("conversation_b")]
    chosen, rejected = sides if winner == "model_a" else reversed(sides)
    keys: set[str] = set()
    more = {key: row[key] for key in ("tools", "system", "margin") if key in row}
    pair = pair_row({**more, "chosen": chosen, "rejected": rejected}, keys)
    used |= keys - {"chosen", "rejected"}
    return pair


# --- lists of answers ------------------------------------------------------------------------------------------------


def ultrafeedback_row(row: Row, used: set[str]) -> Row:
    """UltraFeedback: best against worst by `fine-grained_score`, the mean of the four aspects' ratings."""
    items = _items(row, "completions")
    scores = []
    for n, item in enumerate(items, 1):
        found = columns.number(item.get("fine-grained_score"))
        scores.append(_mean_rating(item, n) if found is None else found)
    return _ultrafeedback(row, used, items, scores)


def ultrafeedback_overall_row(row: Row, used: set[str]) -> Row:
    """UltraFeedback: best against worst by `overall_score`."""
    items = _items(row, "completions")
    scores = [_item_number(item, "overall_score", n) for n, item in enumerate(items, 1)]
    return _ultrafeedback(row, used, items, scores)


def _ultrafeedback(row: Row, used: set[str], items: list[dict], scores: list[float]) -> Row:
    key = next((k for k in PROMPT_KEYS if has(row, k)), "instruction")
    return best_and_worst(row, used, key, "completions", [i.get("response") for i in items], scores)


def _mean_rating(item: dict, number: int) -> float:
    aspects = item.get("annotations")
    found = (
        [columns.number(a.get("Rating")) for a in aspects.values() if isinstance(a, dict)]
        if isinstance(aspects, dict)
        else []
    )
    ratings = [r for r in found if r is not None]
    if not ratings:
        raise RowError(f"'completions', answer {number} has neither 'fine-grained_score' nor ratings in 'annotations'")
    return sum(ratings) / len(ratings)


def nectar_row(row: Row, used: set[str]) -> Row:
    """Nectar: rank 1 against the last rank."""
    items = _items(row, "answers")
    ranks = [_item_number(item, "rank", n) for n, item in enumerate(items, 1)]
    texts = [item.get("answer") for item in items]
    return best_and_worst(row, used, "prompt", "answers", texts, [-rank for rank in ranks])


def scored_list(row: Row) -> tuple[str, str] | None:
    """(column of a list of answers, column or field of their scores); None if the row has none."""
    for key in LISTS:
        items = row.get(key)
        if not isinstance(items, list) or len(items) < 2:
            continue
        if isinstance(items[0], dict):
            score = next((k for k in ITEM_SCORES if items[0].get(k) is not None), None)
            if score and any(k in items[0] for k in ITEM_TEXTS):
                return key, score
        for name in (*LIST_SCORES, *LIST_RANKS):
            if isinstance(row.get(name), list) and len(row[name]) == len(items) and isinstance(items[0], str):
                return key, name
    return None


def scored_list_row(row: Row, used: set[str]) -> Row:
    """A list of answers with their scores or ranks: best against worst."""
    found = scored_list(row)
    prompt_key = next((k for k in PROMPT_KEYS if has(row, k)), None)
    if found is None or prompt_key is None:
        raise RowError(
            f"found columns {', '.join(map(str, row))}; expected a prompt and a list of at least two answers with as many scores"
        )
    key, score = found
    if score in row and score not in ITEM_SCORES or not isinstance(row[key][0], dict):
        used.add(score)
        numbers = [columns.number(value) for value in row[score]]
        scores = [_known(value, score, n) for n, value in enumerate(numbers, 1)]
        texts = list(row[key])
    else:
        items = _items(row, key)
        scores = [_item_number(item, score, n) for n, item in enumerate(items, 1)]
        name = next((k for k in ITEM_TEXTS if k in items[0]), "text")
        texts = [item.get(name) for item in items]
    if score in LIST_RANKS:
        scores = [-rank for rank in scores]
    return best_and_worst(row, used, prompt_key, key, texts, scores)


def best_and_worst(
    row: Row, used: set[str], prompt_key: str, key: str, answers: Sequence[Any], scores: list[float]
) -> Row:
    """The first answer of the highest score against the last of the lowest."""
    used |= {prompt_key, key}
    if prompt_key == "instruction":
        used.add("input")
    best, worst = scores.index(max(scores)), len(scores) - 1 - scores[::-1].index(min(scores))
    if scores[best] == scores[worst]:
        raise _tie(f"all {len(scores)} answers have the score {abs(scores[best]):g}")
    value = required(row, prompt_key)
    if prompt_key == "instruction" and isinstance(value, str) and not is_empty(row.get("input")):
        value = f"{text(value, 'instruction')}\n\n{text(row['input'], 'input')}"
    prompt = columns.add_context(row, used, prompt_messages(value, prompt_key))
    chosen, rejected = (answer_messages(answers[i], f"{key}, answer {i + 1}", prompt) for i in (best, worst))
    return {**make_pair(row, used, prompt, chosen, rejected), "scores": (scores[best], scores[worst])}


def _items(row: Row, key: str) -> list[dict]:
    items = required(row, key)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RowError(f"'{key}' is {describe(items)}; expected a list of answers with their scores")
    if len(items) < 2:
        raise RowError(f"'{key}' has {len(items)} answer{'s' * (len(items) != 1)}; a pair needs two")
    return items


def _item_number(item: dict, name: str, number: int) -> float:
    return _known(columns.number(item.get(name)), name, number)


def _known(value: float | None, name: str, number: int) -> float:
    if value is None:
        raise RowError(f"answer {number} has no '{name}' that is a number")
    return value
