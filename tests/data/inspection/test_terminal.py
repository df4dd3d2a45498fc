"""The view in a terminal: it fits, means the same without colors, and data cannot drive it."""

import re

import pytest

from phi3_plugin.data.formats import UNUSABLE
from phi3_plugin.inspect import Cut, Unit
from phi3_plugin.pages.inspection import TAIL_LINES, Terminal, columns, seen
from tests.data.inspection.inspected import findings, numbers, sample

EVIL = "\x1b]0;title\x07\x1b[2J\r\u202e中文" * 20


def shown(*samples, width=80, color=False, **changes):
    return Terminal(width, color=color).report(numbers(**changes), samples, "out/data.html")


def lines(text):
    return text.splitlines()


def test_the_whole_report():
    text = shown(sample(("<|user|>", False), (" Hi", False), (" Yes", True), ("<|end|>", True)))
    assert lines(text)[0] == "Training data: chats.jsonl"
    assert lines(text)[-1] == "All of it: out/data.html"
    for said in (
        "No problem was found.",
        "Rows                    100 read",
        "Tokens an epoch         4,100",
        "Trained on              2,050 (50 %)",
        "Training                75 steps of 4 samples, 25 an epoch",
        "  median 25   95 % have up to 200   longest 200",
        "> plain                                 10 %              25",
        "  packed                               1.0 %               5",
        "> 256 (yours)                            0 %             0 %",
        "1. chats.jsonl:1: 4 tokens, 2 trained",
        "| <|user|>·Hi",
        "+ ·Yes<|end|>",
    ):
        assert said in lines(text), said


def test_without_color_there_is_no_escape_sequence():
    assert "\x1b" not in shown(sample((EVIL, True)))
    assert "\x1b[" in shown(sample(("a", True)), color=True)


def test_colors_change_nothing_but_colors():
    units = ("<|user|>", False), (" a\nb", False), (" c", True), ("<|end|>", True)
    plain, colored = (shown(sample(*units, lost=5), color=color) for color in (False, True))
    assert re.sub(r"\x1b\[[\d;]*m", "", colored) == plain


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("color", [False, True])
def test_it_fits(width, color):
    noticed = findings((UNUSABLE, f"{EVIL}:1", EVIL), (UNUSABLE, "b" * 200, "c " * 200))
    units = [(EVIL, True), ("word" * 60, False), (" a", True), ("中" * 50, True)]
    many = sample(*units, where=EVIL, lost=12345)
    text = shown(many, width=width, color=color, findings=noticed)
    for line in lines(text):
        assert columns(line) <= width, line


def test_data_cannot_drive_the_terminal():
    noticed = findings((UNUSABLE, EVIL, EVIL))
    text = shown(sample((EVIL, True), where=EVIL), color=True, findings=noticed)
    rest = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", rest)
    assert "\\x1b]0;title\\x07" in rest


def test_a_line_is_trained_on_as_a_whole_or_not_at_all():
    text = shown(sample(("<|user|>", False), (" a\n\nb", True), (" c", False)))
    start = lines(text).index("| <|user|>")
    assert lines(text)[start : start + 5] == ["| <|user|>", "+ ·a⏎", "+ ⏎", "+ b", "| ·c"]


def test_the_border_of_a_cut_sample():
    text = shown(sample(("a", True), lost=1200))
    assert lines(text)[-3:-1] == ["✂ 1,200 tokens cut here, not seen", ""]
    one = sample(("a", True), lost=1)._replace(from_start=True)
    place = lines(shown(one)).index("✂ 1 token cut before the last turns, not seen")
    assert lines(shown(one))[place + 1] == "+ a"


def test_samples_that_are_dropped():
    cuts = [Cut(100, 0.5, 0.31, "yours"), Cut(150, 0.1, 0.05, "", least=True)]
    text = shown(limit=100, cuts=cuts, truncate="drop")
    assert "If samples are dropped above  (> is yours)" in lines(text)
    assert any(line.endswith("█ dropped") for line in lines(text)) and "cut" not in text
    assert max(map(columns, lines(text))) <= 80
    assert ["150", "10", "%", "≥", "5.0", "%"] in map(str.split, lines(text))


def test_a_long_sample_is_shortened_in_the_middle():
    text = shown(sample(*((f"line {n}\n", True) for n in range(100))))
    assert "+ line·0⏎" in lines(text) and "+ line·99⏎" in lines(text)
    assert "+ line·50⏎" not in lines(text)
    assert f"  … {100 - 9 - TAIL_LINES} more lines in the page" in lines(text)


def test_white_space_can_be_seen():
    assert seen(" a\tb\n\r") == "·a⇥b⏎\\x0d"


def test_columns():
    assert columns("ab") == 2 and columns("中文") == 4 and columns("e\u0301") == 1
    assert columns("\x1b[31mab\x1b[0m") == 2


def test_empty_units_do_no_harm():
    text = shown(sample(("", True), ("", False)))
    assert "1. chats.jsonl:1: 2 tokens, 1 trained" in lines(text)
    assert Unit("", (), False, False).text == ""
