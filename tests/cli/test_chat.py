"""`chat`: lines in and answers out, a terminal, interrupts, and the end."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from phi3_plugin import chat as phi3_chat
from phi3_plugin.chat import ChatSession, run, talk
from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.errors import ConfigError, OutputError
from phi3_plugin.generate import Generator
from phi3_plugin.load import load_model
from phi3_plugin.options import ChatOptions, read_options
from tests.answers import keys


def test_lines_go_in_and_answers_come_out(inputs, monkeypatch, capsys):
    data = b"Add: one\\\ntwo\n\n/reset\nAdd: one\nAdd: \xff\n/exit\nnever"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert run(options(inputs)) == 0
    out, error = capsys.readouterr()
    assert out and ">>>" not in out
    assert error.count("(Cut at 6 tokens") == 2 and "half a surrogate pair" in error


@pytest.mark.parametrize("full", [True, False])
def test_it_ends_where_nobody_reads_the_answers(inputs, monkeypatch, full):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Add: one\n" * 3)))
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(io.FileIO("/dev/full" if full else writing, "w"))
    )
    if full:
        os.close(writing)
        with pytest.raises(OutputError, match="standard output cannot be written"):
            run(options(inputs))
    else:
        assert run(options(inputs)) == 1
    sys.stdout.close()


def options(inputs, **more):
    given = {**keys(**more), "checkpoint_dir": str(inputs / "base")}
    return read_options(ChatOptions, given, "chat")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stop": ["<|ende|>"]}, "stop: '<.ende.>' would never be written"),
        ({"temperature": -1.0}, "temperature: -1.0 must be"),
        ({"raw": True}, "raw: True is given, but chat has no such key"),
    ],
)
def test_mistakes_are_told(inputs, given, message):
    with pytest.raises(ConfigError, match=message):
        run(options(inputs, **given))


class Typed:
    """Stands in for input(): gives lines, and raises what a terminal would."""

    def __init__(self, *events):
        self.events = list(events)

    def __call__(self, prompt=""):
        event = self.events.pop(0)
        if isinstance(event, type):
            raise event
        return event


@pytest.mark.parametrize(
    ("events", "left"),
    [
        (("four", KeyboardInterrupt, KeyboardInterrupt, "never"), 1),
        (("four", EOFError, "never"), 1),
        (("four\\", EOFError, EOFError, "never"), 1),
        (("four", "/exit", "never"), 1),
    ],
)
def test_it_is_left_by_a_second_interrupt_or_the_end(monkeypatch, events, left):
    typed, heard = Typed(*events), []
    chat = SimpleNamespace(take=lambda text: heard.append(text) or text != "/exit")
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(phi3_chat, "is_terminal", lambda: True)
    assert talk(chat) == 0
    assert len(typed.events) == left and heard[0].startswith("four")


def test_an_interrupt_long_after_another_clears_a_line_and_no_more(monkeypatch):
    typed, heard = Typed(KeyboardInterrupt, KeyboardInterrupt, "four", EOFError), []
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(phi3_chat, "is_terminal", lambda: True)
    monkeypatch.setattr(phi3_chat, "SECOND_PRESS", 0.0)
    assert talk(SimpleNamespace(take=lambda text: heard.append(text) or True)) == 0
    assert heard == ["four"] and not typed.events


def test_an_interrupted_answer_leaves_the_next_as_it_would_be(inputs, monkeypatch, capsys):
    answers = []
    for stops in (True, False):
        chat = real_chat(inputs)
        if stops:
            chat._show = stopping(3)
            chat.take("Add: four")
            chat._show, chat.turns = lambda _: None, chat.turns[:-2]
        chat.take("Add: one plus two")
        answers.append([turn.content for turn in chat.turns])
    assert answers[0] == answers[1]


def real_chat(inputs):
    o = options(inputs, max_new_tokens=20)
    model = load_model(o.checkpoint_dir, dtype=o.dtype, device=o.device)
    tokenizer = phi3_tokenizer(o.checkpoint_dir, dropped="warn")
    return ChatSession(Generator(model, tokenizer, o), tokenizer, 512, None)


def stopping(count):
    pieces = []

    def show(piece):
        pieces.append(piece)
        if len(pieces) == count:
            raise KeyboardInterrupt

    return show


@pytest.mark.slow
@pytest.mark.exhaustive  # by the clock: an answer that ends before the signal is none to stop
def test_in_a_terminal_an_interrupt_stops_an_answer_and_no_more(cwd):
    command = [Path(sys.executable).parent / "phi3-tune", "chat", "--base", "base"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        wait_for(ours, ">>> ")
        os.write(ours, b"Add: one\n")
        wait_for(ours, "Add: one\r\n", more=1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        wait_for(ours, ">>> ")
        os.write(ours, b"/save chats.jsonl\n")
        wait_for(ours, "Added a conversation of 2 messages to chats.jsonl.\r\n", more=len(">>> "))
        os.write(ours, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


MODES = r"\x1b\[\?\d+[lh]\r?"
"""What readline tells a terminal between a line and its answer."""


def wait_for(terminal, text, more=0):
    """Read until a text has come, and so many characters after it."""
    seen = ""
    while text not in seen or len(re.sub(MODES, "", seen.partition(text)[2])) < more:
        assert select.select([terminal], [], [], 60)[0], seen
        seen += os.read(terminal, 1000).decode("utf-8", "replace")
