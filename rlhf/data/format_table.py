"""The formats of rows that are recognised: their names, what tells each from the others, and its conversion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from rlhf.data import compared_rows, pair_rows, plain_rows, row_parts, sft_rows, unpaired
from rlhf.data.messages import has

Row = dict[str, Any]
Convert = Callable[[Row, set[str]], Row]


class Format(NamedTuple):
    """One shape of rows.

    Attributes:
        matches: whether a row has this shape.
        sft, pairs, unpaired: the conversion to a canonical row of that kind; None if there is none.
        about: its columns, and which pair is taken.
    """

    name: str
    matches: Callable[[Row], bool]
    about: str
    sft: Convert | None = None
    pairs: Convert | None = None
    unpaired: Convert | None = None

    def conversion(self, kind: str) -> Convert | None:
        return {"sft": self.sft, "pairs": self.pairs, "unpaired": self.unpaired}[kind]


def _have(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(has(row, name) for name in names)


def _has_prompt(row: Row) -> bool:
    return any(has(row, key) for key in (*row_parts.PROMPTS, *row_parts.OTHER_PROMPTS))


def _is_answered(row: Row) -> bool:
    answer = next((k for k in row_parts.ANSWERS if has(row, k)), None)
    if answer == "output" and _is_comparison(row):
        return False
    return answer is not None and (answer != "chosen" or not has(row, "rejected")) and _has_prompt(row)


def _is_openai(row: Row) -> bool:
    return isinstance(row.get("input"), dict) and has(row, "preferred_output") and has(row, "non_preferred_output")


def _is_comparison(row: Row) -> bool:
    answers = row.get("output")
    return has(row, "instruction") and isinstance(answers, list) and [type(a) for a in answers] == [str, str]


def _items_have(key: str, field: str) -> Callable[[Row], bool]:
    def matches(row: Row) -> bool:
        items = row.get(key)
        first = items[0] if isinstance(items, list) and items else None
        return isinstance(first, dict) and field in first

    return matches


def _is_scored_list(row: Row) -> bool:
    others = _items_have("completions", "overall_score"), _items_have("completions", "annotations")
    taken = _items_have("answers", "rank")(row) or any(matches(row) for matches in others)
    return not taken and compared_rows.scored_list(row) is not None and _has_prompt(row)


def _has_ratings(row: Row) -> bool:
    return _items_have("completions", "fine-grained_score")(row) or _items_have("completions", "annotations")(row)


# In the order in which they are tried. The first four are one reading, `standard`, if none of them is asked for by name.
FORMATS = (
    Format("messages", _have("messages"), "messages, the last of them the assistant's", sft_rows.messages_row),
    Format("sharegpt", lambda row: has(row, "conversations") or has(row, "conversation"), "conversations of from and value",
           sft_rows.sharegpt_row),
    Format("prompt-completion", _is_answered, "a prompt and a completion", sft_rows.prompt_completion_row),
    Format("text", _have("text"), "text", sft_rows.text_row),
    Format("pairs", lambda row: row_parts.sides_of(row) is not None, "chosen and rejected, with a prompt or as whole dialogues",
           pairs=pair_rows.pair_row),
    Format("plain", lambda row: False, "plain texts of a base model, unchanged", plain_rows.plain_sft_row,
           plain_rows.plain_pair_row),
    Format("openai-preference", _is_openai, "preferred_output against non_preferred_output", pairs=compared_rows.openai_row),
    Format("alpaca-comparison", _is_comparison, "an output of two answers, the better first",
           pairs=compared_rows.alpaca_comparison_row),
    Format("stack-exchange-paired", _have("question", "response_j", "response_k"), "response_j against response_k",
           pairs=compared_rows.stack_exchange_row),
    Format("pku-saferlhf-better", _have("prompt", "response_0", "response_1", "better_response_id"),
           "the more helpful response, by better_response_id", pairs=compared_rows.pku_better_row),
    Format("pku-saferlhf-safer", _have("prompt", "response_0", "response_1", "safer_response_id"),
           "the safer response, by safer_response_id", pairs=compared_rows.pku_safer_row),
    Format("shp", _have("history", "human_ref_A", "human_ref_B", "labels"), "human_ref_A against human_ref_B, by labels",
           pairs=compared_rows.shp_row),
    Format("helpsteer2-preference", _have("prompt", "response_1", "response_2", "preference_strength"),
           "response_1 against response_2, by the sign of preference_strength", pairs=compared_rows.helpsteer2_row),
    Format("helpsteer3", _have("context", "response1", "response2", "overall_preference"),
           "response1 against response2, by the sign of overall_preference", pairs=compared_rows.helpsteer3_row),
    Format("webgpt", _have("question", "answer_0", "answer_1", "score_0", "score_1"), "the answer of the higher score",
           pairs=compared_rows.webgpt_row),
    Format("summarize-from-feedback", _have("info", "summaries", "choice"), "the chosen of two summaries",
           pairs=compared_rows.summarize_row),
    Format("chatbot-arena", _have("conversation_a", "conversation_b", "winner"), "the winner's answer",
           pairs=compared_rows.arena_row),
    Format("nectar", _items_have("answers", "rank"), "rank 1 against the last rank", pairs=compared_rows.nectar_row),
    Format("ultrafeedback", _has_ratings, "best against worst of completions, by fine-grained_score (the mean rating)",
           pairs=compared_rows.ultrafeedback_row),
    Format("ultrafeedback-overall", lambda row: _items_have("completions", "overall_score")(row) and not _has_ratings(row),
           "best against worst of completions, by overall_score", pairs=compared_rows.ultrafeedback_overall_row),
    Format("scored-list", _is_scored_list, "best against worst of a list of answers, by their scores or ranks",
           pairs=compared_rows.scored_list_row),
    Format("kto", unpaired.is_kto, "an answer with its thumb up or down: no pair", pairs=unpaired.refuse_kto,
           unpaired=unpaired.kto_row),
    Format("helpsteer2", unpaired.is_helpsteer, "an answer with its scores: no pair", pairs=unpaired.refuse_helpsteer,
           unpaired=unpaired.helpsteer_row),
)  # fmt: skip
BY_NAME = {fmt.name: fmt for fmt in FORMATS}
