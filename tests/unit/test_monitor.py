"""A run's numbers survive a kill and a resume; a bar for people at a terminal, lines for a log."""

import io
import json
import math
import re
from contextlib import closing
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from phi3_plugin.errors import CheckpointError, OutputError
from phi3_plugin.train.monitor import (
    MEASURED,
    RESUMED,
    History,
    Monitor,
    Progress,
)


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def strict_lines(path):
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def train(history, first, last, seconds=1.0):
    """Log steps as a run does: validation every second step, a save every fourth."""
    for step in range(first, last + 1):
        history.log(
            step,
            epoch=step // 5,
            loss=3 / step,
            lr=1e-4 * step,
            grad_norm=0.5,
            tokens=100 + step,
            tokens_per_second=(100 + step) / seconds,
            seconds=seconds,
            peak_memory_gib=seconds,
        )
        if step % 2 == 0:
            history.log(step, val_loss=2 / step, val_tokens=50)
        if step % 4 == 0:
            history.log(step, event="saved", folder=f"step_{step}")


def unmeasured(lines):
    """Return what must not depend on when and how often a run was stopped."""
    return [
        {key: value for key, value in line.items() if key not in MEASURED}
        for line in lines
        if line.get("event") != RESUMED
    ]


def test_a_step_is_one_line_with_every_field(tmp_path):
    path = tmp_path / "out" / "metrics.jsonl"
    train(History(path), 1, 1, seconds=0.5)
    assert path.read_text().endswith("}\n")
    assert strict_lines(path) == [
        {
            "step": 1,
            "epoch": 0,
            "loss": 3.0,
            "lr": 1e-4,
            "grad_norm": 0.5,
            "tokens": 101,
            "tokens_per_second": 202.0,
            "seconds": 0.5,
            "peak_memory_gib": 0.5,
        }
    ]


def test_any_field_is_one_line_of_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    History(path).log(4, event="saved", folder=tmp_path, note="zwölf\n\ud800")
    expected = {"step": 4, "event": "saved", "folder": str(tmp_path), "note": "zwölf\n\ud800"}
    assert History.read(path) == [expected]
    assert len(path.read_bytes().splitlines()) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_null(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    History(path).log(1, loss=value, norms={"a": [value, 1.0]})
    assert strict_lines(path) == [{"step": 1, "loss": None, "norms": {"a": [None, 1.0]}}]


def test_nothing_is_written_before_there_is_something_to_say(tmp_path):
    History(tmp_path / "out" / "metrics.jsonl")
    assert list(tmp_path.iterdir()) == []
    assert History.read(tmp_path / "out" / "metrics.jsonl") == []


def test_a_new_run_sets_an_earlier_file_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train(History(path), 1, 6)
    earlier = path.read_bytes()
    train(History(path), 1, 1)
    assert len(History.read(path)) == 1
    assert (tmp_path / "metrics.previous.jsonl").read_bytes() == earlier


@pytest.mark.parametrize("killed", [8, 9, 10, 11])
def test_a_resumed_run_leaves_the_file_of_one_that_never_stopped(tmp_path, killed):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    train(History(whole), 1, 12)
    train(History(stopped), 1, killed)
    kept = stopped.read_bytes().splitlines(keepends=True)[:14]

    resumed = History(stopped, resumed_step=8)
    resumed.log(8, event=RESUMED)
    train(resumed, 9, 12, seconds=7.0)

    assert stopped.read_bytes().splitlines(keepends=True)[:14] == kept
    assert unmeasured(History.read(stopped)) == unmeasured(History.read(whole))
    assert sum(line.get("event") == RESUMED for line in History.read(stopped)) == 1
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["stopped.jsonl", "whole.jsonl"]


def test_a_run_killed_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train(History(path), 1, 2)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(lines[0] + lines[1]), len(whole)):
        path.write_bytes(whole[:cut])
        complete = 2 + (cut == len(whole) - 1)  # all but the newline is there
        assert len(History.read(path)) == complete
        train(History(path, resumed_step=1), 2, 2)
        assert path.read_bytes() == whole


def test_zeros_after_a_power_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train(History(path), 1, 1)
    path.write_bytes(path.read_bytes() + bytes(40))
    assert len(History.read(path)) == 1


@pytest.mark.parametrize("bad", [b"{half\n", b"[1]\n", b"\xff\n", b'{"step": "3"}\n'])
def test_a_damaged_line_elsewhere_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    train(History(path), 1, 2)
    good = path.read_bytes()
    path.write_bytes(bad + good)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 1 is not"):
        History.read(path)


def test_blank_lines_are_no_damage(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train(History(path), 1, 1)
    path.write_bytes(b"\n" + path.read_bytes() + b"\n\n")
    assert len(History.read(path)) == 1


def test_a_failed_cut_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    train(History(path), 1, 6)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OutputError, match="disk gone"):
        History(path, resumed_step=2).log(2, event=RESUMED)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resume_without_the_file_starts_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train(History(path, resumed_step=4), 5, 5)
    assert [line["step"] for line in History.read(path)] == [5]


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"metrics\.jsonl could not be written"):
        History(tmp_path / "file" / "metrics.jsonl").log(1, event="saved")


# How far it is


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


def advance(progress, clock, first, last, seconds=1.0):
    for step in range(first, last + 1):
        clock.now += seconds
        progress.update(step, loss=3 / step, lr=2e-4, tokens_per_second=12345.6)


def test_a_log_file_gets_lines():
    stream, clock = io.StringIO(), Clock()
    with closing(Progress(4, stream=stream, clock=clock)) as progress:
        advance(progress, clock, 1, 4)
    assert stream.getvalue().splitlines() == [
        "step 1/4   25%  loss 3.0000  lr 2.00e-04  12,346 tok/s  0:00:03 left",
        "step 2/4   50%  loss 1.5000  lr 2.00e-04  12,346 tok/s  0:00:02 left",
        "step 3/4   75%  loss 1.0000  lr 2.00e-04  12,346 tok/s  0:00:01 left",
        "step 4/4  100%  loss 0.7500  lr 2.00e-04  12,346 tok/s  0:00:04 in all",
    ]


def test_skipped_steps_are_shown_from_the_first_on():
    stream = io.StringIO()
    with closing(Progress(2, stream=stream, clock=Clock())) as progress:
        for step in (1, 2):
            progress.update(step, loss=1.0, lr=1e-4, tokens_per_second=5.0, skipped=step - 1)
    first, second = stream.getvalue().splitlines()
    assert "loss 1.0000  lr" in first and "loss 1.0000  skipped 1  lr" in second


def test_a_long_run_fills_a_log_with_about_a_hundred_lines():
    stream, clock = io.StringIO(), Clock()
    with closing(Progress(5000, stream=stream, clock=clock)) as progress:
        advance(progress, clock, 1, 5000, seconds=0.01)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 101
    assert lines[0].startswith("step    1/5000    0%")
    assert lines[1].startswith("step   50/5000    1%")
    assert lines[-1].startswith("step 5000/5000  100%")


def test_slow_steps_show_a_sign_of_life_every_minute():
    stream, clock = io.StringIO(), Clock()
    with closing(Progress(1000, stream=stream, clock=clock)) as progress:
        advance(progress, clock, 1, 7, seconds=25)
    assert re.findall(r"step +(\d+)/", stream.getvalue()) == ["1", "4", "7"]


def test_a_resumed_run_counts_from_where_it_was_and_times_only_its_own_steps():
    stream, clock = io.StringIO(), Clock()
    with closing(Progress(100, 90, stream=stream, clock=clock)) as progress:
        advance(progress, clock, 91, 92, seconds=10)
    first, second = stream.getvalue().splitlines()
    assert first.startswith("step  91/100   91%") and first.endswith("0:01:30 left")
    assert second.endswith("0:01:20 left")


def test_validation_and_print_in_a_log_file():
    stream = io.StringIO()
    with closing(Progress(10, stream=stream, clock=Clock())) as progress:
        progress.validation(5, loss=1.25, perplexity=3.4903)
        progress.print("Saved out/epoch_0")
    assert stream.getvalue().splitlines() == [
        "step  5/10  validation loss 1.2500  perplexity 3.490",
        "Saved out/epoch_0",
    ]


def test_a_terminal_gets_one_bar():
    stream, clock = Terminal(), Clock()
    with closing(Progress(3, stream=stream, clock=clock, columns=100)) as progress:
        advance(progress, clock, 1, 3)
    bar, rest = screen(stream)
    assert rest == ""
    assert bar.startswith("100%") and "3/3" in bar and "12,346 tok/s" in bar
    assert "loss 1.0000" in bar and "lr 2.00e-04" in bar and "in all" in bar
    assert len(bar) <= 100


def test_printing_does_not_break_the_bar():
    stream, clock = Terminal(), Clock()
    with closing(Progress(3, stream=stream, clock=clock, columns=100)) as progress:
        advance(progress, clock, 1, 1)
        progress.validation(1, loss=1.25, perplexity=3.4903)
        progress.print("Saved\nout/epoch_0")
        advance(progress, clock, 2, 3)
    *lines, bar, rest = screen(stream)
    assert lines == [
        "step 1/3  validation loss 1.2500  perplexity 3.490",
        "Saved",
        "out/epoch_0",
    ]
    assert bar.startswith("100%") and rest == ""


def test_a_resumed_bar_starts_where_the_run_was():
    stream = Terminal()
    with closing(Progress(100, 90, stream=stream, columns=100)):
        pass
    assert screen(stream)[0].startswith(" 90%")


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_the_bar_fits_its_terminal(columns):
    stream, clock = Terminal(), Clock()
    with closing(Progress(100_000, stream=stream, clock=clock, columns=columns)) as progress:
        advance(progress, clock, 99_998, 100_000)
    assert all(len(line) <= columns for line in screen(stream))
    assert "100000/100000" in screen(stream)[0]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_odd_numbers(stream):
    with closing(Progress(2, stream=stream, clock=Clock())) as progress:
        progress.update(1, loss=math.nan, lr=0.0, tokens_per_second=math.inf)
        progress.update(2, loss=math.inf, lr=0.0, tokens_per_second=0.0)
        progress.validation(2, loss=math.nan, perplexity=math.inf)
    assert "loss nan" in stream.getvalue()
    Progress(0, stream=stream).close()
    Progress(5, 5, stream=stream).close()


def test_stderr_is_the_default(capsys):
    with closing(Progress(1)) as progress:
        progress.print("here")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "here\n")


# Both together


def test_a_perplexity_beyond_all_numbers_is_null_in_the_file(tmp_path, capsys):
    settings = SimpleNamespace(output_dir=tmp_path, log_every_n_steps=1, metric_logger=None)
    monitor = Monitor(True, OmegaConf.create({}), settings, total=4, start=0)
    monitor.validation(2, 1000.0, 7, ["Yes."])
    monitor.close()
    assert strict_lines(tmp_path / "metrics.jsonl") == [
        {"step": 2, "val_loss": 1000.0, "val_perplexity": None, "val_tokens": 7},
        {"step": 2, "answers": ["Yes."]},
    ]
    assert capsys.readouterr().err == "step 2/4  validation loss 1000.0000  perplexity inf\n"


def test_lines_that_are_lost_are_counted(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 3, 4)]

    def lost(*kept):
        file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        return History(file, 4).lost_steps()

    assert lost(*lines) == lost(*lines, {"step": 5, "loss": 1.0}) == 0
    assert lost(*lines[:2]) == lost(lines[0], lines[3], {"step": 4, "event": "saved"}) == 2
    assert lost({"step": 2, "event": "resumed"}, *lines[2:]) == 0  # of another folder's run
    file.unlink()
    assert History(file, 4).lost_steps() == 4
    assert History(file, 4).is_beside(tmp_path / "step_000004")
    assert not History(file, 4).is_beside(tmp_path / "other" / "step_000004")
