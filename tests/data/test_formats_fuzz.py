"""Rows of any shape and with any value in any place: a canonical row or one sentence, never a traceback."""

import copy
import json

from canonical import Reading, preference_rows, sft_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import PAIRS, SFTS

from rlhf.config.stage_config import CHAT_ROLES, COLUMN_NAMES, FORMATS
from rlhf.data.features import features
from rlhf.data.format_options import FormatOptions
from rlhf.data.messages import RowError, answer_text
from rlhf.data.recognise import converter
from rlhf.data.sources import Source
from rlhf.data.summary import line, summarise
from rlhf.errors import UserError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(
    ["user", "assistant", "tool", "\ud800", "[{'role': 'user'}]", "\n\nHuman: a\n\nAssistant: b", "<extra_id_1>User\n", "null", 10**400]
)  # fmt: skip
FIELDS = st.sampled_from(
    ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "weight", "text", "score", "rank",
     "response", "messages", "overall_score", "annotations", "reasoning_content", "input", "output"]
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=3), max_leaves=8
)
KNOWN = st.sampled_from([row for row, _ in (*PAIRS.values(), *SFTS.values())])
NAMES = st.sampled_from(sorted(COLUMN_NAMES | {"images", "train", "functions", "system", "x"}))


@st.composite
def damaged(draw):
    """A row of a known format with one of its parts, however deep, replaced or removed, and columns added."""
    row = copy.deepcopy(draw(KNOWN))
    for _ in range(draw(st.integers(0, 2))):
        place = row
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = draw(st.sampled_from(list(keys)))
            if isinstance(place[key], (dict, list)) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.booleans()):
                place[key] = draw(VALUES)
            else:
                del place[key]
            break
    return {**row, **draw(st.dictionaries(NAMES, VALUES, max_size=2))}


ROWS = damaged() | st.dictionaries(NAMES, VALUES, max_size=5)
OPTIONS = st.builds(
    FormatOptions,
    st.none() | st.sampled_from(FORMATS),
    st.lists(st.tuples(st.sampled_from(sorted(COLUMN_NAMES)), NAMES | st.just("input.messages")), max_size=2).map(
        tuple
    ),
    st.lists(st.tuples(st.sampled_from(["gpt", "x"]), st.sampled_from(CHAT_ROLES)), max_size=1).map(tuple),
)


def is_canonical(row):
    for key in ("prompt", "chosen", "rejected", "completion", "messages"):
        for message in row.get(key, ()):
            assert message["role"] in CHAT_ROLES and "content" in message
            assert message["content"] or message["role"] == "tool" or message["tool_calls"]
    for key in ("chosen", "rejected", "completion"):
        if key in row:
            assert row[key][0]["role"] == row[key][-1]["role"] == "assistant"
    if "chosen" in row:
        assert row["prompt"][-1]["role"] in ("user", "tool")
    json.dumps(row, ensure_ascii=False, allow_nan=True).encode("utf-8")


@given(rows=st.lists(ROWS, min_size=1, max_size=3), options=st.just(FormatOptions()) | OPTIONS)
@settings(max_examples=500)
def test_any_rows_are_canonical_or_refused_in_a_sentence(rows, options):
    before = repr(rows)
    for convert, kind in ((sft_rows, "sft"), (preference_rows, "pairs")):
        reading = Reading("skip")
        try:
            found = convert(Source("f", rows, None, "d"), reading, options)
        except UserError as error:
            assert str(error)
            continue
        for row in found:
            is_canonical(row)
            assert features(row).prompts
            answer_text(row.get("chosen", []))
        assert line(summarise(reading.rows, reading.num_unused))
        assert len(found) + len(reading.skipped) == len(rows), kind
    assert repr(rows) == before  # the rows of a source are read again by others


@given(rows=st.lists(ROWS, min_size=1, max_size=2))
@settings(max_examples=100)
def test_single_answers_too(rows):
    try:
        convert = converter("unpaired", rows)
    except UserError:
        return
    for row in rows:
        try:
            is_canonical(convert(row, set()))
        except RowError:
            continue


@given(row=KNOWN, kind=st.sampled_from(["sft", "pairs"]))
def test_canonical_rows_are_read_as_they_are(row, kind):
    """What `rlhf data convert` writes is a format, too."""
    convert = {"sft": sft_rows, "pairs": preference_rows}[kind]
    try:
        found = convert(Source("f", [row], None, "d"))
    except UserError:
        return
    assert convert(Source("f", found, None, "d")) == found
