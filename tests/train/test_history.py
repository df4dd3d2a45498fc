"""A run's numbers survive a kill, and a resumed run leaves the file of one that never stopped."""

import json
import math

import pytest

from phi3_plugin.errors import CheckpointError, OutputError
from phi3_plugin.train.monitor import MEASURED, RESUMED, History


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def strict_lines(path):
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def train(history, first, last, seconds=1.0):
    """Log steps as a run does: validation every second step, a save every fourth."""
    for step in range(first, last + 1):
        history.log_step(
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
            history.log_validation(step, loss=2 / step, tokens=50)
        if step % 4 == 0:
            history.log_event("saved", step, folder=f"step_{step}")


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


def test_validations_and_events(tmp_path):
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    history.log_validation(4, loss=0.5, tokens=30)
    history.log_event("saved", 4, folder=tmp_path, note="zwölf\n\ud800")
    assert History.read(path) == [
        {"step": 4, "val_loss": 0.5, "val_perplexity": math.exp(0.5), "val_tokens": 30},
        {"event": "saved", "step": 4, "folder": str(tmp_path), "note": "zwölf\n\ud800"},
    ]
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_null(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    history.log_validation(1, loss=value, tokens=0)
    history.log_event("skipped", 1, loss=value, norms={"a": [value, 1.0]})
    first, second = strict_lines(path)
    assert first["val_loss"] is None
    assert second == {"event": "skipped", "step": 1, "loss": None, "norms": {"a": [None, 1.0]}}


def test_a_perplexity_beyond_all_numbers_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    History(path).log_validation(1, loss=1000.0, tokens=1)
    assert strict_lines(path)[0]["val_perplexity"] is None


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
    resumed.log_event(RESUMED, 8)
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
        History(path, resumed_step=2).log_event(RESUMED, 2)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resume_without_the_file_starts_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train(History(path, resumed_step=4), 5, 5)
    assert [line["step"] for line in History.read(path)] == [5]


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"metrics\.jsonl could not be written"):
        History(tmp_path / "file" / "metrics.jsonl").log_event("saved", 1)
