"""`rlhf data`: each action on real files, its output for people and programs, its errors, and that nothing is overwritten."""

import json
import os
import re
import subprocess
import sys

import pytest

from rlhf.__main__ import main
from rlhf.curation import near_duplicates as near
from rlhf.curation.export import output_file
from rlhf.curation.lengths import Lengths, bars
from rlhf.curation.sarif import location
from rlhf.curation.screen import safe
from rlhf.data.rows import read_data
from rlhf.errors import UserError


def pair(prompt="Q", chosen="right", rejected="bad", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


@pytest.fixture
def write(tmp_path):
    """write(rows, name) -> the path of a JSON Lines file."""

    def write(rows, name="pairs.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write


@pytest.fixture
def dirty(write):
    """One of each: line 3 repeats 1, line 4 contradicts 2, line 5 has markers and an escape, 6 can't be used, 7 differs in blanks."""
    rows = [pair("Why is it?"), pair("B", "x", "y"), pair("Why is it?"), pair("B", "y", "x"),
            pair("C", "a <|im_start|>b", "\x1b[31mred"), pair("D", ""), pair("E", "a  b", "a b", id=1)]  # fmt: skip
    return write(rows)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An own cache, in which data of any size is prepared."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rlhf.data.prepare.SMALL_BYTES", -1)
    return tmp_path / "cache"


def run_json(capsys, *words):
    code = main(["data", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def by_kind(found):
    return {finding["kind"]: finding for finding in found["findings"]}


def canonical(name, kind="pairs", **values):
    """The rows of a file, as a run reads them."""
    from rlhf.config.recipe import Recipe

    rows = read_data(Recipe("dpo", "", {"dataset_name": str(name), **values}, {}), kind).train
    return [{key: value for key, value in row.items() if key != "place"} for row in rows]


# --- check -----------------------------------------------------------------------------------------------------------


def test_check_names_every_place(dirty, capsys):
    code, found = run_json(capsys, "check", dirty, "--no-near-duplicates")
    kinds = by_kind(found)
    assert (code, found["rows"], found["read"], found["kind"]) == (2, 6, 7, "pairs")
    where = {kind: [(p["place"].removeprefix(dirty), p["about"].replace(dirty, "")) for p in one["places"]]
             for kind, one in kinds.items()}  # fmt: skip
    assert where == {
        "unusable": [(":6", "'chosen' is empty")],
        "contradictions": [(":4", "swapped in :2")],
        "duplicates": [(":3", "equal to :1")],
        "blanks_only": [(":7", "")],
        "markers": [(":5", "chosen, character 3: 'a <|im_start|>b'")],
        "unused": [],
    }
    assert kinds["unusable"]["level"] == "error" and kinds["unused"]["text"].endswith(": id")


def test_check_of_clean_data_finds_nothing(write, capsys):
    file = write([pair("A"), pair("B", "a", "bcd")])
    assert main(["data", "check", file, "--strict", "--no-near-duplicates"]) == 0
    assert "nothing found" in capsys.readouterr().out


def test_strict_is_for_warnings(write, capsys):
    file = write([pair(), pair()])
    assert (main(["data", "check", file]), main(["data", "check", file, "--strict"])) == (0, 2)


def test_screen_shows_few_places_and_escapes_control_characters(write, capsys):
    file = write([pair(chosen="<s>\x1b[31m\u009b2J")] * 5, "odd\x1b[1m.jsonl")
    assert main(["data", "check", file, "--shown", "2"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\u009b" not in shown and "\\x1b" in shown
    assert shown.count(":3  equal to") == 1 and ":4  equal to" not in shown and "and 2 more" in shown
    assert main(["data", "check", file, "--all"]) == 0
    assert ":5  equal to" in capsys.readouterr().out


def test_check_of_a_recipe_reads_what_its_stage_reads(recipe, write, tmp_path, tiny_llama, capsys):
    """Leaks, and what max_length does: with a limit of 80 tokens no answer of 40 words is whole."""
    train = write([pair("Why?"), pair("Where?", "long " * 40, "word " * 40)])
    held = write([pair("why?"), pair("Other")], "held.jsonl")
    path = recipe("dpo", model_name_or_path=tiny_llama, dataset_name=train, eval_dataset_name=held,
                  output_dir=str(tmp_path / "out"))  # fmt: skip
    code, found = run_json(capsys, "check", path, "--max_length", "80")
    kinds = by_kind(found)
    assert (code, found["stage"], found["heldout"]) == (0, "dpo", 2)
    assert kinds["leaks"]["places"] == [{"place": f"{held}:1", "about": f"trained on in {train}:1"}]
    assert [p["place"] for p in kinds["cut"]["places"]] == [f"{train}:2"]
    assert kinds["cut"]["text"] == "rows with an answer that max_length=80 cuts"
    assert not (tmp_path / "out").exists()


def test_check_samples_rows_for_tokens(write, tiny_llama, capsys):
    file = write([pair(f"prompt {n}", "word " * 30, "other " * 30) for n in range(10)])
    found = run_json(capsys, "check", file, "--model", tiny_llama, "--max_length", "20", "--rows", "5")[1]
    cut = by_kind(found)["cut"] if "cut" in by_kind(found) else by_kind(found)["left_out"]
    assert (cut["rows"], cut["of"]) == (5, 5)
    assert any("5 of 10 rows" in note for note in found["notes"])


def test_length_bias(write, capsys):
    rows = [pair(f"Q{n}", "a long answer", "no") for n in range(20)]
    found = run_json(capsys, "check", write(rows), "--no-near-duplicates")[1]
    assert by_kind(found)["length_bias"]["text"] == "the chosen answer is longer in 100% of the pairs"
    rows = [pair(f"Q{n}", *(("long one", "no") if n % 2 else ("no", "long one"))) for n in range(20)]
    found = run_json(capsys, "check", write(rows, "b.jsonl"), "--no-near-duplicates")[1]
    assert "length_bias" not in by_kind(found)


def test_repeated_rows_of_a_mix_are_no_duplicates(recipe, write, tmp_path, tiny_llama, capsys):
    file = write([pair("A"), pair("B")])
    path = recipe("dpo", model_name_or_path=tiny_llama, dataset_name=[{"name": file, "epochs": 3}],
                  output_dir=str(tmp_path / "out"))  # fmt: skip
    assert "duplicates" not in by_kind(run_json(capsys, "check", path, "--rows", "0")[1])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["check", "none.jsonl"], "no data file at none.jsonl"),
        (["check", "none.yaml"], "none.yaml"),
        (["check", "FILE", "--beta", "1"], "keys of a recipe need a recipe"),
        (["check", "FILE", "--drop-leaks"], "--drop-leaks needs --fix OUT"),
        (["check", "FILE", "--format", "parrot"], "--format: there is no format 'parrot'"),
        (["check", "FILE", "--columns", "[a]"], "'columns' is ['a']; expected names"),
        (["check", "FILE", "--columns", "{prompt: nope}"], "there is no column 'nope'"),
        (["check", "FILE", "--fix", "FILE"], "already exists"),
        (["check", "FILE", "--fix", "no/such/a.jsonl"], "--fix: the folder 'no/such' does not exist"),
        (["check", "FILE", "--sarif", "a.txt"], "must end with .sarif or .json"),
        (["show", "FILE"], "tokens need a tokenizer: give --model"),
        (["convert", "FILE", "FILE"], "already exists"),
        (["convert", "FILE", "a.csv"], "must end with .jsonl or .parquet"),
        (["prepare", "FILE"], "is no recipe"),
        (["stats", "configs/quickstart"], "is a folder of recipes; name one of them: sft.yaml"),
        (["stats", "configs/quickstart/evaluate.yaml"], "is an evaluation's recipe"),
        (["stats", "configs/quickstart/dpo.yaml", "--kind", "sft"], "--kind is for data alone"),
    ],
)
def test_mistakes_are_one_sentence(words, error, write, capsys):
    file = write([pair()])
    assert main(["data", *(file if word == "FILE" else word for word in words)]) == 2
    told = capsys.readouterr()
    assert error in told.err and told.err.startswith("rlhf: ") and told.err.count("\n") == 1 and told.out == ""


def test_actions_without_recipe_take_no_keys(capsys):
    with pytest.raises(SystemExit) as done:
        main(["data", "cache", "--beta", "1"])
    assert done.value.code == 2 and "unknown argument '--beta'" in capsys.readouterr().err


def test_data_without_action_lists_them(capsys):
    assert main(["data"]) == 0
    shown = capsys.readouterr().out
    assert all(
        f"rlhf data {name}" in shown for name in ("check", "stats", "show", "convert", "prepare", "cache", "pair")
    )


# --- SARIF -----------------------------------------------------------------------------------------------------------


def test_sarif_has_what_the_standard_requires(dirty, tmp_path, capsys):
    """SARIF 2.1.0: log (version, runs), run (tool), driver (name), rule (id), result (message); indices and lines that exist."""
    out = tmp_path / "found.sarif"
    assert main(["data", "check", dirty, "--sarif", str(out), "--no-near-duplicates"]) == 2
    log = json.loads(out.read_text())
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert (log["version"], run["tool"]["driver"]["name"]) == ("2.1.0", "rlhf data check")
    assert len({rule["id"] for rule in rules}) == len(rules) > 4
    for result in run["results"]:
        assert result["ruleId"] == rules[result["ruleIndex"]]["id"]
        assert result["level"] in ("none", "note", "warning", "error") and result["message"]["text"]
        (place,) = result["locations"]
        assert place["physicalLocation"]["artifactLocation"]["uri"] == f"file://{dirty}"
    lines = {r["ruleId"]: r["locations"][0]["physicalLocation"].get("region") for r in run["results"]}
    assert lines["duplicates"] == {"startLine": 3} and lines["unused"] is None
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(log, SARIF)
    broken = {**log, "runs": [{"results": []}]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SARIF)


# The required properties and the types of sarif-schema-2.1.0.json, of what is written here.
SARIF = {
    "type": "object", "required": ["version", "runs"],
    "properties": {"version": {"enum": ["2.1.0"]}, "runs": {"type": "array", "items": {
        "type": "object", "required": ["tool"],
        "properties": {
            "tool": {"type": "object", "required": ["driver"], "properties": {"driver": {
                "type": "object", "required": ["name"],
                "properties": {"rules": {"type": "array", "uniqueItems": True, "items": {"type": "object", "required": ["id"]}}}}}},
            "results": {"type": "array", "items": {
                "type": "object", "required": ["message"],
                "properties": {
                    "message": {"type": "object", "required": ["text"]}, "level": {"enum": ["none", "note", "warning", "error"]},
                    "ruleIndex": {"type": "integer", "minimum": -1},
                    "locations": {"type": "array", "items": {"properties": {"physicalLocation": {
                        "anyOf": [{"required": ["address"]}, {"required": ["artifactLocation"]}],
                        "properties": {"region": {"properties": {"startLine": {"type": "integer", "minimum": 1}}}}}}}}}}}}}}},
}  # fmt: skip


def test_sarif_of_a_row_without_a_line():
    assert location("org/name (train), row 3") == {
        "logicalLocations": [{"fullyQualifiedName": "org/name (train), row 3", "kind": "object"}]
    }
    assert location("a b.jsonl:3")["physicalLocation"]["artifactLocation"] == {"uri": "a%20b.jsonl"}


# --- fix -------------------------------------------------------------------------------------------------------------


def test_fix_removes_what_is_safe_and_says_so(dirty, tmp_path, capsys):
    out = tmp_path / "clean.jsonl"
    code, found = run_json(capsys, "check", dirty, "--fix", str(out), "--no-near-duplicates")
    assert (code, found["fixed"]["rows"]) == (2, 4)
    assert {why: n for why, n in found["fixed"]["removed"].items() if n} == {
        "can't be used": 1, "the answers differ only in white space": 1, "equal to an earlier row": 1,
    }  # fmt: skip
    assert [row["prompt"][0]["content"] for row in canonical(out)] == [
        "Why is it?",
        "B",
        "B",
        "C",
    ]  # both contradicting ones
    before = out.read_bytes()
    assert main(["data", "check", dirty, "--fix", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err and out.read_bytes() == before
    assert set(by_kind(run_json(capsys, "check", str(out), "--no-near-duplicates")[1])) == {"contradictions", "markers"}


def test_fix_drops_leaks_only_when_asked(recipe, write, tmp_path, tiny_llama, capsys):
    train, held = write([pair("Why?"), pair("B")]), write([pair("why?")], "held.jsonl")
    path = recipe("dpo", model_name_or_path=tiny_llama, dataset_name=train, eval_dataset_name=held,
                  output_dir=str(tmp_path / "out"))  # fmt: skip
    words = ["data", "check", path, "--rows", "0", "--fix"]
    assert main([*words, str(tmp_path / "a.jsonl")]) == 0 and len(canonical(tmp_path / "a.jsonl")) == 2
    assert main([*words, str(tmp_path / "b.jsonl"), "--drop-leaks"]) == 0
    assert [row["prompt"][0]["content"] for row in canonical(tmp_path / "b.jsonl")] == ["B"]
    assert "removed 1 row: the prompt is held out" in capsys.readouterr().out


def test_fix_keeps_rows_that_heldout_splits_off(recipe, write, tmp_path, tiny_llama):
    train = write([pair(f"prompt {n}") for n in range(10)])
    path = recipe(
        "dpo", model_name_or_path=tiny_llama, dataset_name=train, heldout=0.3, output_dir=str(tmp_path / "out")
    )
    assert main(["data", "check", path, "--rows", "0", "--fix", str(tmp_path / "a.jsonl")]) == 0
    assert canonical(tmp_path / "a.jsonl") == canonical(train)


# --- near-duplicates and secrets -------------------------------------------------------------------------------------


def test_similarity_by_hand():
    """Words a b c d e: abc, bcd, cde; a b c d f: abc, bcd, cdf. 2 of 4 shingles are shared."""
    a, b = (near.shingles({"text": text}) for text in ("A, b c d e!", "a b c d f"))
    assert near.similarity(a, b) == 2 / 4


def test_near_duplicates_are_found_and_equal_rows_are_not(write, capsys):
    pytest.importorskip("datasketch")
    words = [f"word{n}" for n in range(60)]
    rows = [
        pair(" ".join(words)),
        pair(" ".join(reversed(words))),
        pair(" ".join([*words[:-1], "changed"])),
        pair(" ".join(words)),
    ]
    file = write(rows)
    found = by_kind(run_json(capsys, "check", file, "--near-duplicates")[1])["near_duplicates"]
    assert [(p["place"], p["about"].split()[-1]) for p in found["places"]] == [(f"{file}:3", f"{file}:1")]


def test_near_duplicates_without_the_package(write, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["data", "check", write([pair()]), "--near-duplicates"]) == 2
    assert "rlhf-dpo[data]" in capsys.readouterr().err


def test_secrets_are_named_and_never_shown(write, capsys):
    pytest.importorskip("detect_secrets")
    key = "AKIA" + "IOSFODNN7EXAMPLA"
    file = write([pair(), pair("R", f"caf\u00c3\u00a9 {key}"), pair(f"key {key}", "")])
    assert main(["data", "check", file, "--secrets", "--all"]) == 2
    told = capsys.readouterr()
    assert f"{file}:2  chosen, line 1: AWS Access Key" in told.out and "garbled" not in told.err
    assert key[:10] not in told.out + told.err


# --- stats -----------------------------------------------------------------------------------------------------------


def test_lengths_by_hand():
    lengths = Lengths()
    for length in (1, 3, 4, 17):
        lengths.add(length)
    assert (lengths.mean, lengths.quantile(0.5), lengths.quantile(0.95), lengths.above(3)) == (6.25, 3, 17, 2)
    assert lengths.histogram() == {1: 1, 2: 0, 4: 2, 8: 0, 16: 0, 32: 1}
    assert bars({4: 2, 8: 1}, 4, "#") == [("3-4", 2, "####"), ("5-8", 1, "##")]


def test_stats_in_characters(write, capsys):
    system = [{"role": "system", "content": "S"}, {"role": "user", "content": "abc"}]
    found = run_json(capsys, "stats", write([pair("abcd", "xy", "z"), pair(system, "x", "yz")]))[1]
    assert found["unit"] == "characters" and found["lengths"]["chosen"]["mean"] == 1.5
    assert found["lengths"]["prompt"]["max"] == len("S\nabc")
    assert (found["chosen_longer"], found["equally_long"], found["with_system"], found["turns"]) == (1, 0, 1, {"2": 2})


def test_stats_in_tokens_are_those_of_the_run(recipe, few_pairs, tmp_path, tiny_llama, capsys):
    from rlhf.models.tokenizer import load_tokenizer, tokenize_pair

    path = recipe(
        "reward",
        model_name_or_path=tiny_llama,
        dataset_name=few_pairs,
        output_dir=str(tmp_path / "out"),
        max_length=100,
    )
    found = run_json(capsys, "stats", path)[1]
    ids = [tokenize_pair(load_tokenizer(tiny_llama), row) for row in canonical(few_pairs)]
    for side in ("prompt", "chosen", "rejected"):
        assert found["lengths"][side]["max"] == max(len(row[f"{side}_ids"]) for row in ids)
    longest = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in ids]
    assert found["longer_than_max_length"] == sum(n > 100 for n in longest) > 0


def test_stats_screen(write, capsys):
    assert main(["data", "stats", write([pair("abcd", "xy", "z")])]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"chosen +2\.0 +2 +2 +2", shown) and "chosen longer: 100.0%" in shown


# --- show ------------------------------------------------------------------------------------------------------------


def test_show_brackets_what_is_trained_on(write, tiny_llama, capsys):
    file = write([pair("Hi", "Yes \x1b[31m", "No"), pair("R")])
    assert main(["data", "show", file, "--model", tiny_llama, "-n", "1"]) == 0
    told = capsys.readouterr()
    plain = told.out.replace("|", "").replace("⏎\n", "\n")
    chosen, rejected = plain.split("\nchosen\n")[1].split("\nrejected\n")
    assert "[[Yes \\x1b[31m<im_end>]]" in chosen.replace(" [[", "[[").replace("\n", "")
    assert "[[No<im_end>]]" in rejected.replace(" [[", "[[").replace("\n", "")
    assert "\x1b" not in told.out and "1 more row" in told.err


def test_show_joins_the_tokens_of_one_character(tiny_llama):
    from rlhf.curation.show import pieces
    from rlhf.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_llama)
    ids = tokenizer("Ä 你🙂<|im_end|>", add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, ids, [False] * (len(ids) - 1) + [True])
    assert "".join(piece.text for piece in found) == "Ä 你🙂<|im_end|>"
    assert [i for piece in found for i in piece.ids] == ids and "\ufffd" not in "".join(p.text for p in found)
    assert (found[-1].trained, found[-1].special, found[0].special) == (True, True, False)


def test_show_finds_a_row_by_its_place(write, tiny_llama, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")  # fewer than the place has characters: it's told in full
    file = write([pair("first"), pair("second")])
    assert main(["data", "show", file, "--model", tiny_llama, "--row", f"{file}:2"]) == 0
    assert f"{file}:2 ---" in capsys.readouterr().out
    assert main(["data", "show", file, "--model", tiny_llama, "--row", f"{file}:7"]) == 2
    assert f"the nearest is '{file}:2'" in capsys.readouterr().err


def test_show_says_what_is_cut(recipe, few_pairs, tmp_path, tiny_llama, capsys):
    path = recipe(
        "sft", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "out"), max_length=10
    )
    assert main(["data", "show", path, "-n", "1"]) == 0
    assert "left out of training: max_length=10 has no room for it" in capsys.readouterr().out


# --- convert ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("pairs", [pair(" x\n y", "  indented\n  more", "b", margin=0.5), pair("R", "c", "d")]),
        (
            "sft",
            [
                {
                    "messages": [
                        {"role": r, "content": c} for r, c in (("system", "S"), ("user", "Q"), ("assistant", "A"))
                    ]
                }
            ],
        ),
        ("sft", [{"prompt": "Q", "completion": "A"}]),
        ("sft", [{"text": "plain \u2028 text"}]),
    ],
)
def test_converted_rows_read_the_same(kind, rows, suffix, write, tmp_path, capsys):
    file, out = write(rows), tmp_path / f"out.{suffix}"
    assert main(["data", "convert", file, str(out), "--kind", kind]) == 0
    assert canonical(out, kind) == canonical(file, kind)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_converted_plain_texts_read_the_same(write, tmp_path):
    file, out = write([pair("Once ", " upon\n", " never")]), tmp_path / "out.jsonl"
    assert main(["data", "convert", file, str(out), "--format", "plain"]) == 0
    assert canonical(out, format="plain") == canonical(file, format="plain")


def test_convert_keeps_the_source(write, tmp_path):
    out = tmp_path / "out.jsonl"
    file = write([pair("A"), pair("B", ""), pair("C")])
    assert main(["data", "convert", file, str(out), "--with-source", "--skip"]) == 0
    assert [json.loads(line)["source"] for line in out.read_text().splitlines()] == [f"{file}:1", f"{file}:3"]


def test_convert_stops_at_a_bad_row_and_leaves_nothing(write, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert main(["data", "convert", write([pair(), pair("B", "")]), str(out)]) == 2
    assert "'chosen' is empty" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_convert_pairs_thumbs(suffix, write, tmp_path, capsys):
    rows = [
        {"prompt": p, "completion": c, "label": up}
        for p, c, up in (("A", "x", True), ("B", "z", True), ("A", "y", False))
    ]
    out = tmp_path / f"out.{suffix}"
    assert main(["data", "convert", write(rows), str(out)]) == 0
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in canonical(out)] == [("x", "y")]
    assert "good answers without a bad one" in capsys.readouterr().err


def test_convert_pairs_nothing(write, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert main(["data", "convert", write([{"prompt": "A", "completion": "x", "label": True}]), str(out)]) == 2
    assert "no prompt has both a better and a worse answer" in capsys.readouterr().err and not out.exists()


def test_columns_and_roles_from_the_command_line(write, tmp_path):
    rows = [{"ask": [{"role": "customer", "content": "Q"}], "chosen": "a", "rejected": "b"}]
    out = tmp_path / "out.jsonl"
    words = ["--columns", "{prompt: ask}", "--roles", "{customer: user}"]
    assert main(["data", "convert", write(rows), str(out), *words]) == 0
    assert canonical(out)[0]["prompt"] == [{"role": "user", "content": "Q"}]


def test_parquet_refuses_rows_of_any_form(write, tmp_path, capsys):
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
    }
    rows = [{"messages": [{"role": "user", "content": "Q"}, call]}]
    assert main(["data", "convert", write(rows), str(tmp_path / "out.parquet"), "--kind", "sft"]) == 2
    assert "write a .jsonl file" in capsys.readouterr().err and not (tmp_path / "out.parquet").exists()
    assert main(["data", "convert", write(rows), str(tmp_path / "out.jsonl"), "--kind", "sft"]) == 0
    assert canonical(tmp_path / "out.jsonl", "sft") == canonical(write(rows), "sft")


def test_output_file_that_is_none(tmp_path):
    with pytest.raises(UserError, match="can't be a file"):
        output_file("a" * 300 + ".jsonl", "OUT")


# --- prepare and cache -----------------------------------------------------------------------------------------------


def test_prepare_twice_and_clean(cache, recipe, few_pairs, tmp_path, tiny_llama, capsys):
    path = recipe("dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "out"))
    assert main(["data", "prepare", path]) == 0
    first = capsys.readouterr().out
    assert "12 training rows" in first and "nothing to do" not in first and "there already" not in first
    data, tokens = (re.search(rf"\n  {what} +(\S+)", first)[1] for what in ("rows", "token ids"))
    assert os.path.isfile(f"{data}/prepared.json") and os.path.isfile(f"{tokens}/chunk-00000.json")
    assert main(["data", "prepare", path]) == 0
    again = capsys.readouterr().out
    assert "everything was there: nothing to do" in again and again.count("there already") == 2

    assert main(["data", "cache"]) == 0
    shown = capsys.readouterr().out
    assert "12 rows of" in shown and "just now" in shown and "tokens/" in shown
    other = cache / "data" / "mine.txt"
    other.write_text("keep")
    (cache / "models").mkdir()
    (cache / "data" / ("0" * 32)).symlink_to(cache / "models")
    assert main(["data", "cache", "--clean", "1"]) == 0
    assert "0 folders removed" in capsys.readouterr().out
    for folder in (data, tokens):
        for path in (folder, *(f"{folder}/{name}" for name in os.listdir(folder))):
            os.utime(path, (1, 1))
    assert main(["data", "cache", "--clean", "1"]) == 0
    assert "2 folders removed" in capsys.readouterr().out
    assert not os.path.exists(data) and not os.path.exists(tokens)
    assert other.read_text() == "keep" and (cache / "models").is_dir() and (cache / "data" / ("0" * 32)).is_symlink()


def test_a_run_finds_what_was_prepared(cache, recipe, few_pairs, tmp_path, tiny_llama, monkeypatch):
    """If it did not, it would tokenise, which is made to fail."""
    path = recipe(
        "sft", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "out"), max_steps=1
    )
    assert main(["data", "prepare", path]) == 0
    monkeypatch.setattr("rlhf.training.tokens.Job.work", lambda *_, **__: pytest.fail("tokenised again"))
    monkeypatch.setattr("rlhf.data.prepare._Job._prepare", lambda *_: pytest.fail("prepared again"))
    assert main(["sft", path]) == 0


def test_clean_leaves_what_is_being_written(cache, recipe, few_pairs, tmp_path, tiny_llama, capsys):
    from rlhf.files import lock_file

    assert main(["data", "stats", few_pairs]) == 0
    (folder,) = (path for path in (cache / "data").iterdir() if path.is_dir())
    with open(folder.with_name(f"{folder.name}.lock"), "a") as lock:
        assert lock_file(lock)
        assert main(["data", "cache", "--clean", "0"]) == 0
        assert folder.is_dir()
    assert main(["data", "cache", "--clean", "0"]) == 0
    assert not folder.exists()


def test_small_data_needs_no_preparation(recipe, few_pairs, tmp_path, tiny_llama, capsys):
    path = recipe("dpo", model_name_or_path=tiny_llama, dataset_name=few_pairs, output_dir=str(tmp_path / "out"))
    assert main(["data", "prepare", path]) == 0
    assert "small: each start reads and tokenises it in moments" in capsys.readouterr().out


def test_empty_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "none"))
    assert (main(["data", "cache"]), run_json(capsys, "cache")[1] if capsys.readouterr() else None) == (0, [])


# --- pair, and the pipe ----------------------------------------------------------------------------------------------


def test_pair_is_pairs(tmp_path, capsys):
    for words in (["pairs"], ["data", "pair"]):
        out = tmp_path / words[-1]
        assert main([*words, "embedded:sample", "--limit", "2", "--output_dir", str(out)]) == 0
        assert len((out / "preference_data.jsonl").read_text().splitlines()) == 2


def test_closed_pipe_ends_quietly(write):
    file = write([pair(f"Q{n} <s>") for n in range(3000)])
    code = "import sys; from rlhf.__main__ import command; command()"
    process = subprocess.Popen([sys.executable, "-c", code, "data", "check", file, "--all", "--no-near-duplicates"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read().decode(), process.wait()) == ("", 141)


def test_safe_keeps_lines_and_escapes_the_rest():
    assert safe("a\n\tb\x1b[31m\u009b\u202e é") == "a\n\tb\\x1b[31m\\x9b\\u202e é"
