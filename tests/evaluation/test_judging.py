"""Judges behind an endpoint: a real server in a process of its own, which fails in every way that such servers fail."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf.config.evaluated import EndpointJudge
from rlhf.config.stage_config import EvaluateConfig
from rlhf.errors import UserError
from rlhf.evaluation import endpoint as endpoint_module
from rlhf.evaluation.endpoint import Endpoint, Reply
from rlhf.evaluation.judging import TEMPLATE, check_endpoints, decide, judge_all, read_template, read_verdict, render
from rlhf.evaluation.partial import Measured
from rlhf.runs.stop import Stopper

KEY = "sk-not-to-be-shown-12345"
SERVER = Path(__file__).with_name("openai_server.py")


def start(tmp_path_factory, *key):
    log = tmp_path_factory.mktemp("server") / "log.jsonl"
    log.touch()
    process = subprocess.Popen([sys.executable, str(SERVER), str(log), *key], stdout=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    read = lambda: [json.loads(line) for line in log.read_text().splitlines()]  # noqa: E731
    return SimpleNamespace(address=address, requests=read, process=process, clear=lambda: log.write_text(""))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = start(tmp_path_factory)
    yield found
    found.process.kill()
    found.process.wait()


@pytest.fixture(scope="module")
def locked_server(tmp_path_factory):
    found = start(tmp_path_factory, KEY)
    yield found
    found.process.kill()
    found.process.wait()


@pytest.fixture(autouse=True)
def quick(monkeypatch, server):
    monkeypatch.setattr(endpoint_module, "FIRST_DELAY", 0.01)
    server.clear()


def message(first="long answer", second="short", prompt="q"):
    return [{"role": "user", "content": render(TEMPLATE, prompt, first, second)}]


def ask(server, model, folder=None, **settings):
    judge = EndpointJudge("J", server.address, model, **{"retries": 3, "timeout_s": 5, **settings})
    one = Endpoint(judge, "r.yaml:3", folder)
    try:
        return one.ask(message())
    finally:
        one.close()


# --- one call --------------------------------------------------------------------------------------------------------


def test_a_request_is_a_chat_completion(server):
    assert (
        read_verdict(ask(server, "longer", parameters={"max_tokens": 99, "temperature": None, "top_p": 0.5}).text)
        == "A"
    )
    (request,) = server.requests()
    assert request["body"] == {"model": "longer", "messages": message(), "max_tokens": 99, "top_p": 0.5}


@pytest.mark.parametrize("model, tries", [("busy", 3), ("broken", 3), ("overloaded", 3), ("malformed", 2), ("empty", 2), ("cut", 2)])  # fmt: skip
def test_what_may_pass_is_tried_again(model, tries, server):
    assert read_verdict(ask(server, model).text) == "A"
    assert [request["number"] for request in server.requests()] == list(range(1, tries + 1))


@pytest.mark.parametrize("model", ["slow", "trickle"])
def test_a_reply_that_does_not_come_is_asked_for_again(model, server):
    assert read_verdict(ask(server, model, timeout_s=0.5).text) == "A" and len(server.requests()) == 2


@pytest.mark.parametrize("model, why", [("filtered", "refused"), ("refusing", "refused"), ("short", "too long")])
def test_what_the_model_will_not_judge_is_no_error(model, why, server):
    assert ask(server, model) == Reply(None, why) and len(server.requests()) == 1


@pytest.mark.parametrize(
    "model, said, tries",
    [
        ("down", "failed 4 times, at last with: HTTP 500: .*always.* What has been judged is kept; the same command resumes", 4),
        ("poor", "refuses the request: HTTP 429: .*exceeded your current quota", 1),
        ("strict", "refuses the request: HTTP 400: .*Unsupported parameter", 1),
    ],
)  # fmt: skip
def test_what_will_not_pass_ends_the_run(model, said, tries, server):
    with pytest.raises(UserError, match=f"r.yaml:3: the judge J at http://127.0.0.1:.*/v1 {said}"):
        ask(server, model)
    assert len(server.requests()) == tries


def test_nobody_there(tmp_path):
    judge = EndpointJudge("J", "http://127.0.0.1:9/v1", "m", retries=0)
    with pytest.raises(UserError, match="J at http://127.0.0.1:9/v1 can't be reached: .*refused"):
        Endpoint(judge, "r.yaml:3").check()


def test_no_reply_is_paid_twice(server, tmp_path):
    for _ in range(2):
        assert read_verdict(ask(server, "longer", tmp_path).text) == "A"
    assert len(server.requests()) == 1
    ask(server, "longer", tmp_path, parameters={"max_tokens": 7})  # another request
    (tmp_path / "replies-0.jsonl").open("ab").write(b'{"key": "x", "te')  # a kill cut the last line
    ask(server, "first", tmp_path)
    assert [r["body"]["model"] for r in server.requests()] == ["longer", "longer", "first"]
    ask(server, "first", tmp_path)
    assert len(server.requests()) == 3


# --- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_never_shown(locked_server, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))  # requests would send this instead of a plain header
    assert read_verdict(ask(locked_server, "longer", tmp_path, api_key_env="JUDGE_KEY").text) == "A"
    with pytest.raises(UserError) as refused:
        ask(locked_server, "strict", tmp_path, api_key_env="JUDGE_KEY")
    assert "your key is …" in str(refused.value)
    shown = str(refused.value) + "".join(capsys.readouterr()) + (tmp_path / "replies-0.jsonl").read_text()
    assert KEY not in shown


def test_a_wrong_or_missing_key_is_known_before_a_model_loads(locked_server, monkeypatch):
    judge = EndpointJudge("J", locked_server.address, "longer", api_key_env="JUDGE_KEY")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(UserError, match="needs a key in the environment variable JUDGE_KEY, which is not set"):
        Endpoint(judge, "r.yaml:3")
    monkeypatch.setenv("JUDGE_KEY", "sk-wrong")
    with pytest.raises(UserError, match="refuses the key in JUDGE_KEY .HTTP 401.") as error:
        Endpoint(judge, "r.yaml:3").check()
    assert "sk-wrong" not in str(error.value)
    with pytest.raises(UserError, match="refuses the key in JUDGE_KEY"):
        Endpoint(judge, "r.yaml:3").ask(message())
    monkeypatch.setenv("JUDGE_KEY", "two\nlines")
    with pytest.raises(UserError, match="what is in JUDGE_KEY can't be a key"):
        Endpoint(judge, "r.yaml:3")
    keyless = EndpointJudge("J", locked_server.address, "longer")
    with pytest.raises(UserError, match="wants a key .HTTP 401.; name the environment variable"):
        Endpoint(keyless, "r.yaml:3").check()


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("Better: [[A]]", "A"), ("[[a]]", "A"), ("Not [[A]] but\n[[ B ]].", "B"), ("[[C]]", "C"), ("[[tie]]", "C"),
        ("My final verdict is: [[A>>B]]", "A"), ("[[B>A]]", "B"), ("[[A=B]]", "C"), ("A is better", None), ("[[D]]", None), ("", None),
    ],
)  # fmt: skip
def test_the_last_verdict_counts(text, verdict):
    assert read_verdict(text) == verdict


@pytest.mark.parametrize(
    "verdicts, win",
    [(("A", "B"), 1.0), (("B", "A"), 0.0), (("C", "C"), 0.5), (("A", "A"), 0.5), (("B", "B"), 0.5), (("A", "C"), 0.5), (("A", None), None)],
)  # fmt: skip
def test_both_orders_have_to_agree(verdicts, win):
    assert decide(verdicts) == win


def test_a_template_shows_all_three(tmp_path):
    file = tmp_path / "t.txt"
    judge = EndpointJudge("J", "http://x/v1", "m", template=str(file))
    with pytest.raises(UserError, match="template .* can't be read"):
        read_template(judge, "r.yaml:3")
    file.write_text("{{ prompt }} {{ first }}")
    with pytest.raises(UserError, match="does not show {{ second }}"):
        read_template(judge, "r.yaml:3")
    file.write_text("{{ prompt }} {{ first }} {{ second }} {{ third }}")
    with pytest.raises(UserError, match="'third' is undefined"):
        read_template(judge, "r.yaml:3")
    file.write_text("{{ prompt.__class__.__mro__ }}")
    with pytest.raises(UserError, match="unsafe"):
        read_template(judge, "r.yaml:3")
    file.write_text("Q: {{ prompt }} 1: {{ first }} 2: {{ second }}")
    assert render(read_template(judge, "r.yaml:3"), "p", "<b>", "{{ c }}") == "Q: p 1: <b> 2: {{ c }}"


# --- all comparisons -------------------------------------------------------------------------------------------------

ANSWERS = [
    {"row": 0, "prompt": [{"role": "user", "content": "q0"}], "x": "longest", "y": "short", "z": "mid len"},
    {"row": 1, "prompt": [{"role": "user", "content": "q1"}], "x": "same", "y": "same", "z": ""},
    {"row": 2, "prompt": [{"role": "user", "content": "q2"}], "x": "a", "y": "bcd", "z": "efg"},
]


def config_of(server, model="longer", **settings):
    judge = {"endpoint": server.address, "model": model, "concurrency": 2, "retries": 3, **settings}
    return EvaluateConfig(models={"x": "m/x", "y": "m/y", "z": "m/z"}, judge=judge, dataset_name="d")  # type: ignore[arg-type]


def judge_in(folder, config):
    with Stopper(folder) as stopper, Measured(folder, "k", stopper, lambda: None) as measured:
        return judge_all(config, ANSWERS, measured, "r.yaml:3", False)


def test_every_pair_is_asked_in_both_orders(server, tmp_path):
    found = judge_in(tmp_path, config_of(server))
    wins = {(line["a"], line["b"], line["row"]): line["win"] for line in found}
    assert wins == {
        ("y", "x", 0): 0.0, ("y", "x", 1): 0.5, ("y", "x", 2): 1.0,  # shorter, the same, longer
        ("z", "x", 0): 0.5, ("z", "x", 1): 0.0, ("z", "x", 2): 1.0,  # as long, empty, longer
        ("z", "y", 0): 1.0, ("z", "y", 1): 0.0, ("z", "y", 2): 0.5,
    }  # fmt: skip
    asked = [(request["first"], request["second"]) for request in server.requests()]
    assert sorted(asked) == sorted((y, x) for x, y in asked) and len(asked) == 2 * 6  # no call for equal and empty ones
    assert {line.get("why") for line in found} == {None, "equal", "empty"}
    judge_in(tmp_path, config_of(server))
    assert len(server.requests()) == len(asked)


def test_a_judge_that_prefers_the_first_decides_nothing(server, tmp_path):
    found = judge_in(tmp_path, config_of(server, "first"))
    assert {line["win"] for line in found if line.get("verdicts")} == {0.5}


def test_what_is_not_judged_has_its_reason(server, tmp_path):
    for model, why in (("silent", "no verdict"), ("refusing", "refused")):
        found = [line for line in judge_in(tmp_path / model, config_of(server, model)) if "verdicts" in line]
        assert {(line["win"], line["why"]) for line in found} == {(None, why)} and len(found) == 6


def test_a_judge_that_breaks_down_has_lost_nothing(server, tmp_path):
    """The calls before it are kept one by one, though their batch never ended."""
    config = config_of(server, "dying", concurrency=1)
    endpoint = Endpoint._once
    calls = []

    def once(self, body):
        calls.append(body)
        if len(calls) == 4:
            raise UserError("the server went away")
        return endpoint(self, body)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Endpoint, "_once", once)
        with pytest.raises(UserError, match="went away"):
            judge_in(tmp_path, config)
    assert len(server.requests()) == 3
    judge_in(tmp_path, config)
    assert len(server.requests()) == 12


def test_calls_and_costs_are_told_beforehand(server, capsys):
    """3 prompts x 3 pairs x 2 orders = 18 calls. To write: 18 * 512 = 9,216 tokens, at 10 dollars a million 0.092.

    To read: 18 templates of 588 characters and 18 prompts of 2, of 4 to a token, and 36 answers of 96 tokens: 6,111, 0.012.
    """
    assert len(TEMPLATE) == 588
    check_endpoints(config_of(server, usd_per_million_tokens=[2, 10]), "r.yaml:3", ANSWERS)
    told = capsys.readouterr().out
    assert "at most 18 calls (3 prompts, 3 pairs of models, both orders)" in told
    assert "about 0.0061 M tokens to read and at most 0.0092 M to write, so at most about 0.10 US dollars" in told
    with pytest.raises(UserError, match="needs up to 18 calls, more than max_calls: 17"):
        check_endpoints(config_of(server, max_calls=17), "r.yaml:3", ANSWERS)
    check_endpoints(config_of(server, "unknown"), "r.yaml:3", ANSWERS)
    assert "lists no model 'unknown', but longer, busy, first" in capsys.readouterr().out
    assert server.requests() == []
