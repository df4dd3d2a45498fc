"""What reaches a terminal."""

import os
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest

from phi3_plugin import terminal
from phi3_plugin.errors import DataError
from phi3_plugin.terminal import harmless, in_lines, outlived, show_error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("naïve 你好 😀 a\nb\tc", "naïve 你好 😀 a\nb\tc"),
        ("\x1b[31m\r\x07\x9b", "\\x1b[31m\\x0d\\x07\\x9b"),
        ("\u202e\u2066\u200b\ufeff\u2028\xa0", "\\u202e\\u2066\\u200b\\ufeff\\u2028\\xa0"),
        ("\ud800\U000e0041", "\\ud800\\U000e0041"),
    ],
)
def test_harmless(text, expected):
    assert harmless(text) == expected


FAMILY, CODER = "👩\u200d👩\u200d👧\u200d👦", "👩🏽\u200d💻"
ENGLAND = "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"


@pytest.mark.parametrize(
    "text",
    [
        *(
            FAMILY,
            CODER,
            "❤\ufe0f\u200d🔥",
            "🏴\u200d☠\ufe0f",
            "🙂\u200d↔\ufe0f",
            f"a{ENGLAND}b",
            "🇩🇪",
            "1\ufe0f\u20e3",
        ),
        *("می\u200cخواهم", "क्\u200dष", "ක්\u200dය", "e\u0301"),
    ],
)
def test_what_joins_signs_stays(text):
    assert harmless(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pass\u200cword\u200d", "pass\\u200cword\\u200d"),
        ("\u200d👩\u200d", "\\u200d👩\\u200d"),
        ("👩\u200d+", "👩\\u200d+"),
        ("😀\u200d\u200d😀", "😀\\u200d\\u200d😀"),
        (f"{ENGLAND[:-1]}", "🏴\\U000e0067\\U000e0062\\U000e0065\\U000e006e\\U000e0067"),
        ("🏴\U000e0061\U000e007f", "🏴\\U000e0061\\U000e007f"),
    ],
)
def test_what_joins_nothing_is_spelled_out(text, expected):
    assert harmless(text) == expected


def test_lines_break_between_words_in_a_terminal_alone(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    text = "Saved.\nThe quick brown fox jumps over /a/folder/of-a-long-name.\n  short"
    lines = in_lines(text, is_terminal=True).splitlines()
    assert lines == [
        *("Saved.", "The quick brown fox", "jumps over", "/a/folder/of-a-long-name.", "  short")
    ]
    assert in_lines(text) == text  # which goes into a log


def test_an_error_is_shown_and_does_nothing(capsys):
    show_error(DataError("column '\x1b[2J\x1b[31mX\x07'"))
    assert capsys.readouterr().err == "phi3_plugin: DataError: column '\\x1b[2J\\x1b[31mX\\x07'\n"


@pytest.mark.parametrize("text", ["x" * 10_000, "x\n" * 100])
def test_a_long_error_is_cut_at_a_screen_and_says_so(text, capsys):
    show_error(DataError(text))
    shown = capsys.readouterr().err
    assert len(shown) < 4_200 and shown.count("\n") <= 41
    assert "characters more (PHI3_PLUGIN_TRACEBACK=1)" in shown


@pytest.mark.parametrize(("rank", "waits"), [("0", False), ("3", True)])
def test_the_first_process_speaks_first(rank, waits, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    show_error(DataError("here alone"))
    assert slept == [terminal.AFTER_THE_FIRST] * waits
    assert "here alone" in capsys.readouterr().err


def gone_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def gone_terminal():
    controller, terminal = os.openpty()
    os.close(controller)
    return os.fdopen(terminal, "w")


def full_disk():
    return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")


@pytest.mark.parametrize("opened", [gone_pipe, gone_terminal, full_disk, lambda: None])
def test_what_a_terminal_cannot_take_is_lost(opened):
    stream = opened()
    with redirect_stdout(stream), redirect_stderr(stream), outlived():
        for text in ("one", "two"):
            print(text, flush=True)
            show_error(DataError(text))
    if opened in (gone_pipe, gone_terminal):
        stream.close()  # with nothing left to write


def test_what_it_can_take_it_gets(capsys):
    with outlived():
        print("shown")
    assert capsys.readouterr().out == "shown\n"
