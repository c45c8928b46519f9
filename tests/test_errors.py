"""How values and messages are shown: on one line, in a bounded length, without control characters."""

from rlhf.errors import one_line, quote


def test_a_message_is_one_line_without_control_characters():
    assert one_line("a\nb \x1b[31m\u2028c  d") == r"a b \x1b[31m c  d"
    assert one_line("ümläut …") == "ümläut …"


def test_a_long_message_keeps_both_ends():
    shown = one_line("start " + "x" * 5000 + " fix")
    assert len(shown) == 600 and shown.startswith("start ") and shown.endswith(" fix")


def test_values_are_cut():
    assert quote("x" * 100, 10) == "'xxxxxxxx…"
    assert quote("a") == "'a'" and quote({"a": [1]}) == "{'a': [1]}"
    assert quote(10**5000) == "a number of about 5001 digits"
    bomb = ["x"] * 9
    for _ in range(30):
        bomb = [bomb] * 9
    assert len(quote(bomb)) <= 80
