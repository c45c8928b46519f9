"""Every format of the field, by a row as its data set has it: recognised by content, and its exact canonical row."""

import json
import pickle
from pathlib import Path

import pytest
from canonical import Reading, preference_rows, sft_rows

from rlhf.config.stage_config import FORMATS as NAMES
from rlhf.data.format_table import FORMATS
from rlhf.data.recognise import converter
from rlhf.data.sources import Source
from rlhf.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def source(*rows):
    return Source("f.jsonl", list(rows), [7 * (n + 1) for n in range(len(rows))], "digest")


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


SKY, BLUE, GREEN = "What color is the sky?", "It is blue.", "It is green."
Q, A, B = [user(SKY)], [assistant(BLUE)], [assistant(GREEN)]
PAIR = {"prompt": Q, "chosen": A, "rejected": B}
SFT = {"prompt": Q, "completion": A}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
TOOL = {"role": "tool", "name": "get_weather", "content": "18 degrees"}
CALLING = [assistant("", tool_calls=[CALL]), TOOL, assistant("18 degrees.")]
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What color is the sky?\n\nAssistant:"
EARLIER = [user("Hi"), assistant("Hello.")]
ULTRA = {
    "prompt": SKY, "prompt_id": "f0e3", "chosen": [*Q, *A], "rejected": [*Q, *B], "messages": [*Q, *A],
    "score_chosen": 8.0, "score_rejected": 4.0,
}  # fmt: skip


def ultra_completion(response, overall, fine):
    ratings = {name: {"Rating": str(int(fine)), "Rationale": "…"} for name in ("helpfulness", "honesty")}
    return {
        "model": "alpaca-7b", "principle": "helpfulness", "custom_system_prompt": "Be helpful.", "response": response,
        "critique": "…", "overall_score": overall, "fine-grained_score": fine, "annotations": ratings,
    }  # fmt: skip


# name: (row, canonical pair)
PAIRS = {
    # TRL's documentation, "Dataset formats"
    "TRL explicit, conversational": (PAIR, PAIR),
    "TRL implicit, conversational": ({"chosen": [*Q, *A], "rejected": [*Q, *B]}, PAIR),
    "TRL explicit, standard": ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"prompt": [user("The sky is")], "chosen": [assistant("blue.")], "rejected": [assistant("green.")]}),
    "TRL with margin": ({**PAIR, "margin": 1.5}, {**PAIR, "margin": 1.5}),
    "TRL with tools": ({**PAIR, "tools": [WEATHER]}, {**PAIR, "tools": [WEATHER]}),
    "TRL with tools as JSON": ({**PAIR, "tools": json.dumps([WEATHER])}, {**PAIR, "tools": [WEATHER]}),
    "TRL with template variables": ({**PAIR, "chat_template_kwargs": {"enable_thinking": False}},
        {**PAIR, "chat_template_kwargs": {"enable_thinking": False}}),
    "TRL tool calls, answers of several messages": ({**PAIR, "chosen": CALLING, "tools": [WEATHER]},
        {**PAIR, "chosen": CALLING, "tools": [WEATHER]}),
    "tool calls with null content": ({**PAIR, "chosen": [assistant(None, tool_calls=[CALL])]},
        {**PAIR, "chosen": [assistant(None, tool_calls=[CALL])]}),
    "tool calls without content": ({**PAIR, "chosen": [{"role": "assistant", "tool_calls": [CALL]}]},
        {**PAIR, "chosen": [assistant(None, tool_calls=[CALL])]}),
    "tool result in the prompt": ({"prompt": [*Q, *CALLING[:2]], "chosen": A, "rejected": B},
        {"prompt": [*Q, *CALLING[:2]], "chosen": A, "rejected": B}),
    "reasoning that alone differs": (
        {"prompt": Q, "chosen": [assistant(BLUE, reasoning_content="Rayleigh.")], "rejected": A},
        {"prompt": Q, "chosen": [assistant(BLUE, reasoning_content="Rayleigh.")], "rejected": A}),
    "thinking": ({"prompt": Q, "chosen": [assistant(BLUE, thinking="Rayleigh.")], "rejected": B},
        {"prompt": Q, "chosen": [assistant(BLUE, thinking="Rayleigh.")], "rejected": B}),
    "answers of several turns": (
        {"chosen": [*Q, *A, user("Why?"), assistant("Rayleigh.")], "rejected": [*Q, *B, user("Really?"), assistant("Yes.")]},
        {"prompt": Q, "chosen": [*A, user("Why?"), assistant("Rayleigh.")],
         "rejected": [*B, user("Really?"), assistant("Yes.")]}),
    "explicit answers of several turns": (
        {"prompt": Q, "chosen": [*A, user("Why?"), assistant("Rayleigh.")], "rejected": B},
        {"prompt": Q, "chosen": [*A, user("Why?"), assistant("Rayleigh.")], "rejected": B}),
    "diverging in a later user's turn": (
        {"chosen": [*Q, *A, user("Why?"), assistant("x")], "rejected": [*Q, *A, user("How?"), assistant("y")]},
        {"prompt": Q, "chosen": [*A, user("Why?"), assistant("x")], "rejected": [*A, user("How?"), assistant("y")]}),
    "developer role": ({"prompt": [{"role": "developer", "content": "Be brief."}, *Q], "chosen": A, "rejected": B},
        {"prompt": [{"role": "developer", "content": "Be brief."}, *Q], "chosen": A, "rejected": B}),
    # Anthropic
    "HH-RLHF": ({"chosen": f"{HH} {BLUE}", "rejected": f"{HH} {GREEN}"}, {**PAIR, "prompt": [*EARLIER, *Q]}),
    "HH-RLHF that diverges earlier": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Sky?\n\nAssistant: Blue.",
         "rejected": "\n\nHuman: Hi\n\nAssistant: Go.\n\nHuman: Why?\n\nAssistant: Just go."},
        {"prompt": [user("Hi")], "chosen": [assistant("Hello."), user("Sky?"), assistant("Blue.")],
         "rejected": [assistant("Go."), user("Why?"), assistant("Just go.")]}),
    "HH-RLHF with its prompt": ({"prompt": HH, "chosen": f" {BLUE}", "rejected": f" {GREEN}"},
        {**PAIR, "prompt": [*EARLIER, *Q]}),
    # axolotl
    "axolotl chatml.intel": ({"system": "Be brief.", "question": SKY, "chosen": BLUE, "rejected": GREEN},
        {**PAIR, "prompt": [system("Be brief."), *Q]}),
    "axolotl chatml.icr": ({"system": "Be brief.", "input": SKY, "chosen": BLUE, "rejected": GREEN},
        {**PAIR, "prompt": [system("Be brief."), *Q]}),
    "axolotl chatml.argilla": ({"instruction": SKY, "chosen_response": BLUE, "rejected_response": GREEN}, PAIR),
    "axolotl chatml.argilla_chat": ({"chosen": [*Q, *A], "rejected": [*Q, *B], "dataset": "x"}, PAIR),
    "axolotl chatml.ultra": ({"system": "Be brief.", **ULTRA}, {**PAIR, "prompt": [system("Be brief."), *Q]}),
    "axolotl chatml.prompt_pairs": ({"system": None, "prompt": SKY, "chosen": BLUE, "rejected": GREEN}, PAIR),
    "axolotl chat_template.default": ({"messages": Q, "chosen": A[0], "rejected": B[0]}, PAIR),
    "axolotl chat_template, from and value": ({"conversations": [human(SKY)], "chosen": gpt(BLUE), "rejected": gpt(GREEN)},
        PAIR),
    # LLaMA-Factory
    "LLaMA-Factory alpaca": ({"instruction": "Translate.", "input": "Hallo", "chosen": "Hello", "rejected": "Bye",
        "system": "S", "history": [["q", "a"]]},
        {"prompt": [system("S"), user("q"), assistant("a"), user("Translate.\n\nHallo")], "chosen": [assistant("Hello")],
         "rejected": [assistant("Bye")]}),
    "LLaMA-Factory comparison": ({"instruction": SKY, "input": "", "output": [BLUE, GREEN]}, PAIR),
    "LLaMA-Factory sharegpt": ({"conversations": [human("Hi"), gpt("Hello."), human(SKY)], "chosen": gpt(BLUE),
        "rejected": gpt(GREEN), "system": "S", "tools": json.dumps([WEATHER["function"]])},
        {**PAIR, "prompt": [system("S"), *EARLIER, *Q], "tools": [WEATHER]}),
    # argilla, H4
    "argilla binarized": ({"source": "x", "prompt": SKY, "chosen": [*Q, *A], "chosen-rating": 4.5, "chosen-model": "m",
        "rejected": [*Q, *B], "rejected-rating": 2.0, "rejected-model": "m"}, PAIR),
    "argilla dpo-mix": ({"dataset": "x", "chosen": [*EARLIER, *Q, *A], "chosen_rating": 5.0, "rejected": [*EARLIER, *Q, *B],
        "rejected_rating": 3.0}, {**PAIR, "prompt": [*EARLIER, *Q]}),
    "argilla capybara": ({"prompt": SKY, "chosen": [*EARLIER, *Q, *A], "rejected": [*EARLIER, *Q, *B], "rating_chosen": 5,
        "rating_rejected": 4}, {**PAIR, "prompt": [*EARLIER, *Q]}),
    "argilla distilabel": ({"system": "S", "input": SKY, "chosen": BLUE, "rejected": GREEN, "generations": [BLUE, GREEN],
        "order": ["chosen", "rejected"], "rating": [9.0, 8.0], "status": "x", "chosen_score": 9.0, "rejected_score": 8.0},
        {**PAIR, "prompt": [system("S"), *Q]}),
    "UltraFeedback binarized": (ULTRA, PAIR),
    "zephyr": ({k: v for k, v in ULTRA.items() if k != "messages"}, PAIR),
    "Orca pairs": ({"system_prompt": "S", "question": SKY, "chosen": BLUE, "rejected": GREEN},
        {**PAIR, "prompt": [system("S"), *Q]}),
    # OpenRLHF
    "OpenRLHF message lists": ({"chosen": [*Q, *A], "rejected": [*Q, *B], "source": "x"}, PAIR),
    "OpenRLHF context": ({"context": SKY, "chosen": BLUE, "rejected": GREEN}, PAIR),
    "OpenRLHF context_messages": ({"context_messages": [*EARLIER, *Q], "chosen": BLUE, "rejected": GREEN},
        {**PAIR, "prompt": [*EARLIER, *Q]}),
    "OpenRLHF question": ({"question": SKY, "chosen": BLUE, "rejected": GREEN}, PAIR),
    # judged answers
    "stack-exchange-paired": ({"qid": 1, "question": SKY, "date": "2020", "metadata": ["https://…"], "response_j": BLUE,
        "response_k": GREEN}, PAIR),
    "PKU-SafeRLHF single": ({"prompt": SKY, "response_0": GREEN, "response_1": BLUE, "is_response_0_safe": True,
        "is_response_1_safe": True, "better_response_id": 1}, PAIR),
    "SHP": ({"post_id": "x", "domain": "askscience_train", "upvote_ratio": 0.9, "history": SKY, "human_ref_A": BLUE,
        "human_ref_B": GREEN, "labels": 1, "score_A": 20, "score_B": 5, "seconds_difference": 3.0}, PAIR),
    "SHP, B preferred": ({"history": SKY, "human_ref_A": GREEN, "human_ref_B": BLUE, "labels": 0}, PAIR),
    "HelpSteer2 preferences": ({"split": "train", "prompt": SKY, "response_1": GREEN, "response_2": BLUE,
        "preference_strength": 2, "preference_statement": "…", "preference_elaboration": "…"}, PAIR),
    "HelpSteer2 dialogue": ({"prompt": "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhat color is the sky?",
        "response_1": BLUE, "response_2": GREEN, "preference_strength": -1}, {**PAIR, "prompt": [*EARLIER, *Q]}),
    "HelpSteer3": ({"domain": "general", "language": "english", "context": [*EARLIER, *Q], "response1": BLUE,
        "response2": GREEN, "overall_preference": -2, "individual_preference": []}, {**PAIR, "prompt": [*EARLIER, *Q]}),
    "Nectar": ({"prompt": "\n\nHuman: What color is the sky?\n\nAssistant: ", "answers": [
        {"answer": "Grey.", "model": "x", "rank": 2.0}, {"answer": BLUE, "model": "y", "rank": 1.0},
        {"answer": GREEN, "model": "z", "rank": 7.0}], "turns": 1, "num_responses": 3, "source": ["x"],
        "good_natured": True}, PAIR),
    "UltraFeedback": ({"source": "x", "instruction": SKY, "models": ["a", "b", "c"], "completions": [
        ultra_completion("Grey.", 7.0, 3.0), ultra_completion(GREEN, 8.0, 1.25), ultra_completion(BLUE, 6.0, 4.75)],
        "correct_answers": ["None"], "incorrect_answers": ["None"]}, PAIR),
    "UltraFeedback, overall score only": ({"instruction": SKY, "completions": [
        {"response": GREEN, "overall_score": 3.5}, {"response": BLUE, "overall_score": 8.0}]}, PAIR),
    "scored list of texts": ({"instruction": SKY, "generations": [GREEN, "Grey.", BLUE], "ratings": [1, 3, 5]}, PAIR),
    "ranked list of texts": ({"prompt": SKY, "responses": [GREEN, BLUE], "ranks": [2, 1]}, PAIR),
    "scored list of mappings": ({"prompt": SKY, "responses": [{"text": GREEN, "score": -1.0}, {"text": BLUE, "score": 2.5}]},
        PAIR),
    "WebGPT": ({"question": {"dataset": "eli5", "id": "x", "full_text": SKY}, "answer_0": BLUE, "score_0": 0.5,
        "answer_1": GREEN, "score_1": -0.5, "quotes_0": {"title": []}, "tokens_0": None}, PAIR),
    "OpenAI preference": ({"input": {"messages": [*EARLIER, *Q], "tools": [WEATHER], "parallel_tool_calls": True},
        "preferred_output": A, "non_preferred_output": B}, {**PAIR, "prompt": [*EARLIER, *Q], "tools": [WEATHER]}),
    "summarize from feedback": ({"info": {"id": "t3", "post": "I lost it.", "title": "My key", "subreddit": "tifu", "site":
        None, "article": None}, "summaries": [{"text": " Lost a cat.", "policy": "sup2", "note": "x"},
        {"text": " Lost my key.", "policy": "ref", "note": "y"}], "choice": 1, "worker": "w", "batch": "b",
        "extra": {"confidence": None}},
        {"prompt": [user("SUBREDDIT: r/tifu\n\nTITLE: My key\n\nPOST: I lost it.\n\nTL;DR:")],
         "chosen": [assistant("Lost my key.")], "rejected": [assistant("Lost a cat.")]}),
    "Chatbot Arena": ({"question_id": "x", "model_a": "m", "model_b": "n", "winner": "model_b", "judge": "j",
        "conversation_a": [*Q, *B], "conversation_b": [*Q, *A], "turn": 1, "language": "English"}, PAIR),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_pair(name):
    row, expected = PAIRS[name]
    assert preference_rows(source(row, row)) == [expected] * 2


@pytest.mark.parametrize("name", PAIRS)
def test_sft_takes_the_better_answer_of_a_pair(name):
    row, expected = PAIRS[name]
    wanted = {"completion" if k == "chosen" else k: v for k, v in expected.items() if k not in ("rejected", "margin")}
    assert sft_rows(source(row)) == [wanted]


TOOL_TURNS = [user("Weather in Paris?"), *CALLING]
# name: (row, canonical SFT row)
SFTS = {
    "TRL prompt-completion, conversational": (SFT, SFT),
    "TRL prompt-completion, standard": ({"prompt": SKY, "completion": BLUE}, SFT),
    "TRL language modelling": ({"messages": [*Q, *A]}, SFT),
    "TRL text": ({"text": "The sky is blue."}, {"text": "The sky is blue."}),
    "TRL completion of several messages": ({"prompt": TOOL_TURNS[:1], "completion": CALLING, "tools": [WEATHER]},
        {"prompt": TOOL_TURNS[:1], "completion": CALLING, "tools": [WEATHER]}),
    "OpenAI chat": ({"messages": [system("S"), *Q, assistant(BLUE, weight=1)]}, {**SFT, "prompt": [system("S"), *Q]}),
    "OpenAI chat with tools": ({"messages": TOOL_TURNS, "tools": [WEATHER], "parallel_tool_calls": False},
        {"messages": TOOL_TURNS, "tools": [WEATHER]}),
    "reasoning": ({"messages": [*Q, assistant(BLUE, reasoning_content="Rayleigh.")]},
        {"prompt": Q, "completion": [assistant(BLUE, reasoning_content="Rayleigh.")]}),
    "alpaca": ({"instruction": "Translate.", "input": "Hallo", "output": "Hello", "text": "Below is …"},
        {"prompt": [user("Translate.\n\nHallo")], "completion": [assistant("Hello")]}),
    "LLaMA-Factory alpaca": ({"instruction": SKY, "input": "", "output": BLUE, "system": "S", "history": [["Hi", "Hello."]]},
        {**SFT, "prompt": [system("S"), *EARLIER, *Q]}),
    "Orca": ({"id": "niv.1", "system_prompt": "S", "question": SKY, "response": BLUE}, {**SFT, "prompt": [system("S"), *Q]}),
    "ShareGPT": ({"id": "x", "conversations": [human(SKY), gpt(BLUE)]}, SFT),
    "ShareGPT with system": ({"conversations": [{"from": "system", "value": "S"}, human(SKY), gpt(BLUE)]},
        {**SFT, "prompt": [system("S"), *Q]}),
    "ShareGPT of several turns": ({"conversations": [human("Hi"), gpt("Hello."), human(SKY), gpt(BLUE)], "system": "S"},
        {"messages": [system("S"), *EARLIER, *Q, *A]}),
    "LLaMA-Factory tools": ({"conversations": [human("Weather in Paris?"),
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": "18 degrees"}, gpt("18 degrees.")], "tools": json.dumps([WEATHER["function"]])},
        {"messages": [TOOL_TURNS[0], CALLING[0], {"role": "tool", "content": "18 degrees"}, CALLING[2]], "tools": [WEATHER]}),
    "ShareGPT with roles": ({"conversations": [*Q, *A]}, SFT),
    "Capybara": ({"source": "x", "conversation": [{"input": "Hi", "output": "Hello."}, {"input": SKY, "output": BLUE}]},
        {"messages": [*EARLIER, *Q, *A]}),
    "OpenRLHF input and output": ({"input": SKY, "output": BLUE}, SFT),
    "OpenRLHF question and response": ({"question": SKY, "response": BLUE}, SFT),
    "UltraFeedback binarized": (ULTRA, SFT),
    "UltraChat": ({"prompt": SKY, "prompt_id": "x", "messages": [*Q, *A]}, SFT),
    "HelpSteer2": ({"prompt": SKY, "response": BLUE, "helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 2,
        "verbosity": 1}, SFT),
    "thumb up": ({"prompt": Q, "completion": A, "label": True}, SFT),
}  # fmt: skip


@pytest.mark.parametrize("name", SFTS)
def test_sft(name):
    row, expected = SFTS[name]
    assert sft_rows(source(row, row)) == [expected] * 2


def test_the_recipe_knows_every_format():
    assert NAMES == tuple(fmt.name for fmt in FORMATS)


def test_the_page_names_every_format():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`{name}`" not in page] == []


@pytest.mark.parametrize("kind, rows", [("pairs", PAIRS), ("sft", SFTS)], ids=["pairs", "sft"])
def test_a_converter_is_picklable_and_keeps_no_state(kind, rows):
    for row, expected in rows.values():
        convert = pickle.loads(pickle.dumps(converter(kind, [row])))  # noqa: S301 (what it just wrote)
        before = json.dumps(row)
        assert [convert(row, set()), convert(row, set())] == [expected] * 2
        assert json.dumps(row) == before


# --- what is not a pair ----------------------------------------------------------------------------------------------


def error(convert, *rows, **more):
    with pytest.raises(UserError) as caught:
        convert(source(*rows), **more)
    return str(caught.value)


@pytest.mark.parametrize(
    "row, message",
    [
        ({**PAIRS["SHP"][0], "labels": 2}, "'labels' is int '2'; expected 0 or 1"),
        (
            {**PAIRS["HelpSteer2 preferences"][0], "preference_strength": 0},
            "'preference_strength' is 0, so there is no better",
        ),
        ({**PAIRS["HelpSteer3"][0], "overall_preference": "x"}, "'overall_preference' is str 'x'; expected a number"),
        (
            {**PAIRS["WebGPT"][0], "score_0": -0.5},
            "'score_0' and 'score_1' are both -0.5, so there is no better answer",
        ),
        (
            {**PAIRS["Chatbot Arena"][0], "winner": "tie (bothbad)"},
            "'winner' is 'tie (bothbad)', so there is no better",
        ),
        (
            {**PAIRS["scored list of texts"][0], "ratings": [4, 4, 4]},
            "all 3 answers have the score 4, so there is no better",
        ),
        ({**PAIRS["scored list of texts"][0], "ratings": [4, None, 4]}, "answer 2 has no 'ratings' that is a number"),
        ({**PAIRS["Nectar"][0], "answers": [{"answer": "x", "rank": 1}]}, "'answers' has 1 answer; a pair needs two"),
        ({**PAIRS["stack-exchange-paired"][0], "response_k": BLUE}, "'chosen' and 'rejected' are equal"),
    ],
)
def test_row_without_a_better_answer(row, message):
    good = next(r for r, _ in PAIRS.values() if r.keys() == row.keys())
    assert error(preference_rows, good, row).startswith(f"f.jsonl:14: {message}")


def test_row_of_another_format_than_the_first_rows():
    assert (
        error(preference_rows, *[PAIRS["SHP"][0]] * 20, PAIR)
        == "f.jsonl:147: 'labels' is missing; the first rows have it"
    )


@pytest.mark.parametrize(
    "row, what",
    [
        ({"prompt": Q, "completion": A, "label": True}, "a KTO row"),
        ({"prompt": SKY, "completion": BLUE, "label": "False"}, "a KTO row"),
        ({"prompt": SKY, "completion": BLUE, "label": 0}, "a KTO row"),
        ({"instruction": SKY, "input": "", "output": BLUE, "kto_tag": True}, "a KTO row"),
        ({"conversations": [human(SKY), gpt(BLUE)], "kto_tag": False}, "a KTO row"),
        (SFTS["HelpSteer2"][0], "a HelpSteer row"),
    ],
)
def test_single_judged_answers_are_refused_by_name_with_the_conversion(row, what):
    message = error(preference_rows, row)
    assert f"; this looks like {what}, with one answer and its " in message and "`rlhf data convert` pairs" in message


def test_stepwise_supervision_is_refused_by_name():
    row = {"prompt": "1 + 1?", "completions": ["1 + 1 = 2", "So 3"], "labels": [True, False]}
    assert "this looks like stepwise supervision" in error(preference_rows, row)


@pytest.mark.parametrize("key", ["images", "image", "videos", "audios"])
def test_images_are_refused_by_name(key):
    assert error(preference_rows, {**PAIR, key: ["x.png"]}).startswith(f"f.jsonl:7: '{key}' is set")


def test_an_image_in_a_message_is_refused_by_name():
    row = {**PAIR, "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}]}
    assert "the content has parts of type image; only text is trained" in error(preference_rows, row)


def test_texts_without_a_prompt_say_what_could_read_them():
    message = error(preference_rows, {"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert (
        message.startswith("f.jsonl:7: there is no 'prompt', and 'chosen' is not a dialogue")
        and "`format: plain`" in message
    )


# --- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages, message",
    [
        ([*Q, assistant("", tool_calls="[")], "'messages', message 2: 'tool_calls' is str '['; expected JSON"),
        ([*Q, assistant("", tool_calls=[{"f": 1}])], "'messages', message 2: 'tool_calls' is list "),
        (
            [user("Q") | {"tool_calls": [CALL]}, *A],
            "'messages', message 1: 'tool_calls' in a message of the user; only",
        ),
        ([*Q, assistant(BLUE, reasoning_content=["x"])], "'messages', message 2: 'reasoning_content' is list "),
        ([*Q, assistant(BLUE, function_call={"name": "f"})], "'messages', message 2: 'function_call' is set"),
        (
            [*Q, {"role": "function", "content": "5"}, *A],
            "'messages', message 2: role 'function'; expected one of system, ",
        ),
        ([{"from": "someone", "value": "Q"}, *A], "'messages', message 1: role 'someone'; expected one of system, "),
        (
            [*Q, {"from": "function_call", "value": "call f"}, *A],
            "'messages', message 2: a function call is str 'call f'",
        ),
        ([*Q, assistant(None)], "'messages, message 2' is NoneType 'None'; expected a string"),
        (
            [*Q, assistant("x", reasoning_content="\ud800")],
            "'messages, message 2, reasoning_content' has a lone surrogate",
        ),
        (
            [*Q, assistant("", tool_calls=[{"function": {"name": "\ud800"}}])],
            "'messages', message 2: 'tool_calls' is list ",
        ),
    ],
)
def test_message_that_cannot_be_used(messages, message):
    assert error(sft_rows, {"messages": messages}).startswith(f"f.jsonl:7: {message}")


def test_a_role_to_be_mapped_says_how():
    assert error(sft_rows, {"messages": [{"role": "Human", "content": "Q"}, *A]}).endswith(
        "`roles: {Human: user}` maps it"
    )


def test_nulls_of_a_table_are_no_fields():
    """Arrow gives every message of a column the fields of all others."""
    nulls = {"tool_calls": None, "reasoning_content": None, "name": None, "tool_call_id": None}
    row = {
        "messages": [{**user(SKY), **nulls}, {**assistant(BLUE), **nulls}],
        "tools": None,
        "chat_template_kwargs": None,
    }
    assert sft_rows(source(row)) == [SFT]


def test_nulls_of_a_table_are_no_parameters():
    """Arrow gives every tool of a column the parameters of all others."""
    filled = json.loads(json.dumps(WEATHER))
    filled["function"]["parameters"]["properties"] |= {"zone": None, "city": {"type": "string", "enum": None}}
    assert preference_rows(source({**PAIR, "tools": [filled]}))[0]["tools"] == [WEATHER]


def test_a_sequence_of_mappings_is_a_mapping_of_lists():
    """What `datasets` gives for a feature of the type Sequence({...})."""
    row = {"conversations": {"from": ["human", "gpt"], "value": [SKY, BLUE]}}
    assert sft_rows(source(row)) == [SFT]


@pytest.mark.parametrize(
    "more, message",
    [
        ({"tools": "not JSON"}, "'tools' is str 'not JSON'; expected JSON"),
        ({"tools": {"name": "f"}}, "'tools' is dict "),
        ({"tools": [1]}, "'tools' is list '[1]'; expected a list of JSON schemas of functions"),
        ({"chat_template_kwargs": ["x"]}, "'chat_template_kwargs' is list "),
        ({"chat_template_kwargs": {"tokenize": False}}, "'chat_template_kwargs' is dict "),
    ],
)
def test_template_fields_that_cannot_be_used(more, message):
    assert error(preference_rows, {**PAIR, **more}).startswith(f"f.jsonl:7: {message}")


def test_an_answer_with_two_assistant_messages_in_a_row():
    row = {"prompt": Q, "chosen": [*A, *A], "rejected": B}
    assert "'chosen' has roles ['assistant', 'assistant']; expected one assistant message" in error(
        preference_rows, row
    )


def test_an_excluded_answer_within_an_answer_of_several_turns():
    turns = [assistant(BLUE, weight=0), user("Why?"), assistant("Rayleigh.")]
    for row in ({"prompt": Q, "chosen": turns, "rejected": B}, {"chosen": Q + turns, "rejected": [*Q, *B, *Q, *B]}):
        assert "excluded from training" in error(preference_rows, row)


@pytest.mark.parametrize("name, unused", [
    ("OpenAI preference", {"input.parallel_tool_calls"}), ("TRL with tools", set()), ("Chatbot Arena", {"judge", "language",
    "model_a", "model_b", "question_id", "turn"}), ("SHP", {"domain", "post_id", "seconds_difference", "upvote_ratio"}),
    ("summarize from feedback", {"batch", "info.id", "worker"}), ("UltraFeedback binarized", {"messages", "prompt_id"}),
])  # fmt: skip
def test_columns_not_used_are_listed(name, unused):
    preference_rows(source(PAIRS[name][0]), reading := Reading())
    assert set(reading.num_unused) == unused
