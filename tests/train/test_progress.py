"""A bar for people at a terminal, lines for a log file."""

import io
import math
import re

import pytest

from phi3_plugin.train.monitor import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def screen(terminal):
    """Return the lines that a terminal shows: a carriage return overwrites the line."""
    lines = []
    for line in terminal.getvalue().split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def run(progress, clock, first, last, seconds=1.0):
    for step in range(first, last + 1):
        clock.now += seconds
        progress.update(step, loss=3 / step, lr=2e-4, tokens_per_second=12345.6)


def test_a_log_file_gets_lines():
    stream, clock = io.StringIO(), Clock()
    with Progress(4, stream=stream, clock=clock) as progress:
        run(progress, clock, 1, 4)
    assert stream.getvalue().splitlines() == [
        "step 1/4   25%  loss 3.0000  lr 2.00e-04  12,346 tok/s  0:00:03 left",
        "step 2/4   50%  loss 1.5000  lr 2.00e-04  12,346 tok/s  0:00:02 left",
        "step 3/4   75%  loss 1.0000  lr 2.00e-04  12,346 tok/s  0:00:01 left",
        "step 4/4  100%  loss 0.7500  lr 2.00e-04  12,346 tok/s  0:00:04 in all",
    ]


def test_a_long_run_fills_a_log_with_about_a_hundred_lines():
    stream, clock = io.StringIO(), Clock()
    with Progress(5000, stream=stream, clock=clock) as progress:
        run(progress, clock, 1, 5000, seconds=0.01)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 101
    assert lines[0].startswith("step    1/5000    0%")
    assert lines[1].startswith("step   50/5000    1%")
    assert lines[-1].startswith("step 5000/5000  100%")


def test_slow_steps_show_a_sign_of_life_every_minute():
    stream, clock = io.StringIO(), Clock()
    with Progress(1000, stream=stream, clock=clock) as progress:
        run(progress, clock, 1, 7, seconds=25)
    assert re.findall(r"step +(\d+)/", stream.getvalue()) == ["1", "4", "7"]


def test_a_resumed_run_counts_from_where_it_was_and_times_only_its_own_steps():
    stream, clock = io.StringIO(), Clock()
    with Progress(100, 90, stream=stream, clock=clock) as progress:
        run(progress, clock, 91, 92, seconds=10)
    first, second = stream.getvalue().splitlines()
    assert first.startswith("step  91/100   91%") and first.endswith("0:01:30 left")
    assert second.endswith("0:01:20 left")


def test_validation_and_print_in_a_log_file():
    stream = io.StringIO()
    with Progress(10, stream=stream, clock=Clock()) as progress:
        progress.validation(5, loss=1.25, perplexity=3.4903)
        progress.print("Saved out/epoch_0")
    assert stream.getvalue().splitlines() == [
        "step  5/10  validation loss 1.2500  perplexity 3.49",
        "Saved out/epoch_0",
    ]


def test_a_terminal_gets_one_bar():
    stream, clock = Terminal(), Clock()
    with Progress(3, stream=stream, clock=clock, columns=100) as progress:
        run(progress, clock, 1, 3)
    bar, rest = screen(stream)
    assert rest == ""
    assert bar.startswith("100%") and "3/3" in bar and "12,346 tok/s" in bar
    assert "loss 1.0000" in bar and "lr 2.00e-04" in bar and "in all" in bar
    assert len(bar) <= 100


def test_printing_does_not_break_the_bar():
    stream, clock = Terminal(), Clock()
    with Progress(3, stream=stream, clock=clock, columns=100) as progress:
        run(progress, clock, 1, 1)
        progress.validation(1, loss=1.25, perplexity=3.4903)
        progress.print("Saved\nout/epoch_0")
        run(progress, clock, 2, 3)
    *lines, bar, rest = screen(stream)
    assert lines == [
        "step 1/3  validation loss 1.2500  perplexity 3.49",
        "Saved",
        "out/epoch_0",
    ]
    assert bar.startswith("100%") and rest == ""


def test_a_resumed_bar_starts_where_the_run_was():
    stream = Terminal()
    with Progress(100, 90, stream=stream, columns=100):
        pass
    assert screen(stream)[0].startswith(" 90%")


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_the_bar_fits_its_terminal(columns):
    stream, clock = Terminal(), Clock()
    with Progress(100_000, stream=stream, clock=clock, columns=columns) as progress:
        run(progress, clock, 99_998, 100_000)
    assert all(len(line) <= columns for line in screen(stream))
    assert "100000/100000" in screen(stream)[0]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_odd_numbers(stream):
    with Progress(2, stream=stream, clock=Clock()) as progress:
        progress.update(1, loss=math.nan, lr=0.0, tokens_per_second=None)
        progress.update(2, loss=math.inf, lr=0.0, tokens_per_second=0.0)
        progress.validation(2, loss=math.nan, perplexity=math.inf)
    assert "loss nan" in stream.getvalue()
    with Progress(0, stream=stream), Progress(5, 5, stream=stream):
        pass


def test_an_error_leaves_the_bar_on_its_own_line():
    stream, clock = Terminal(), Clock()
    with (
        pytest.raises(KeyboardInterrupt),
        Progress(3, stream=stream, clock=clock, columns=90) as progress,
    ):
        run(progress, clock, 1, 2)
        raise KeyboardInterrupt
    assert stream.getvalue().endswith("\n")
    assert screen(stream)[0].startswith(" 67%")


def test_stderr_is_the_default(capsys):
    with Progress(1) as progress:
        progress.print("here")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "here\n")
