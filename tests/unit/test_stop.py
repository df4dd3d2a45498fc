"""When a run ends before its last step."""

import os
import signal
import threading
import time

import pytest

from phi3_plugin.errors import DataError
from phi3_plugin.launch import STOPPED
from phi3_plugin.train import checkpoints
from phi3_plugin.train.stop import NO_IMPROVEMENT, Stop
from phi3_plugin.train.world import World
from tests import warm

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def stop(tmp_path):
    hangs_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where tests run under nohup
    stop = Stop(World("cpu"), tmp_path, patience=2, max_nonfinite=3)
    yield stop
    stop.close()
    signal.signal(signal.SIGHUP, hangs_up)


def test_a_run_goes_on_unless_there_is_a_reason(stop):
    assert (stop.now(), stop.reason, stop.interrupted) == (False, None, False)


EACH = pytest.mark.parametrize("number", SIGNALS)


@EACH
def test_a_signal_in_a_step_is_acted_on_when_the_run_asks(number, stop, capfd):
    assert not stop.now()
    signal.raise_signal(number)
    assert stop.reason is None
    assert f"{number.name}: the run saves and ends after this step" in capfd.readouterr().err
    assert (stop.now(), stop.reason, stop.interrupted) == (True, number.name, True)


@EACH
def test_before_the_first_step_and_after_the_result_is_saved_it_ends_at_once(number, stop, capfd):
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            signal.raise_signal(number)
        assert end.value.code == STOPPED
        assert f"{number.name}: stopped at once" in capfd.readouterr().err
        stop.now()
        stop.saved()


def test_under_nohup_a_closed_terminal_is_not_listened_to(tmp_path, stop):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    again = Stop(World("cpu"), tmp_path, patience=None, max_nonfinite=3)
    assert not again.now()
    signal.raise_signal(signal.SIGHUP)
    assert not again.now()
    again.close()


def test_a_run_that_is_over_leaves_signals_to_whom_they_came_before(tmp_path):
    heard, threads = [], threading.active_count()
    pipes = len(os.listdir("/proc/self/fd"))
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        stop = Stop(World("cpu"), tmp_path, patience=None, max_nonfinite=3)
        stop.now()
        signal.raise_signal(signal.SIGTERM)
        stop.close()  # while the thread still looks whether Python's handler acts
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, pipes)
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_program_that_trains_in_another_thread_keeps_its_signals(tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def train():
        stop = Stop(World("cpu"), tmp_path, patience=None, max_nonfinite=3)
        assert not stop.now()
        stop.close()
        ended.append(signal.getsignal(signal.SIGINT))

    ended = []
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert ended == [before]


def test_a_run_within_somebodys_python_does_not_end_that(stop, capfd, monkeypatch):
    monkeypatch.setattr("phi3_plugin.train.stop.SOON", 0.0)
    monkeypatch.setattr("os._exit", lambda code: pytest.fail("it ended"))
    os.write(stop._wakes, bytes([signal.SIGINT]))  # as while Python's own handler cannot act
    while "SIGINT: the run ends when the call into a library" not in capfd.readouterr().err:
        time.sleep(0.01)


def test_whoever_repeats_ctrl_c_does_not_wait_for_the_step(stop):
    stop.now()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # schedulers repeat it
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGINT)


IN_A_LIBRARY = """
from pathlib import Path
import torch
from phi3_plugin.train.stop import Stop
from phi3_plugin.train.world import World
stop = Stop(World("cpu"), Path("out"), patience=None, max_nonfinite=3)
stop.is_command = True
print("ready", flush=True)
torch.linalg.svd(torch.ones(6000, 6000))  # for a minute
"""


def test_a_call_into_a_library_does_not_hold_it_up(tmp_path):
    process = warm.begin("python", "-c", IN_A_LIBRARY, cwd=tmp_path)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - before < 5  # within a second, but the machine may be busy
    assert process.returncode == STOPPED
    assert "SIGINT: stopped at once" in said


def test_patience_ends_a_run_that_was_not_interrupted(stop):
    stop.after_validation(1)
    assert not stop.now()
    stop.after_validation(2)
    assert (stop.now(), stop.reason, stop.interrupted) == (True, NO_IMPROVEMENT, False)


def test_only_steps_in_a_row_that_moved_nothing_end_it(stop, tmp_path):
    for problem in ("NaN", "NaN", None, "NaN", "NaN"):
        stop.after_step(problem, [1, 2])
    with pytest.raises(DataError) as error:
        stop.after_step("no token has a label", [7, 3])
    assert str(error.value) == (
        "3 steps in a row left the weights alone: no token has a label. The last saw samples "
        "[7, 3]. Lower the learning rate, or look at these samples. No checkpoint was saved."
    )
    checkpoints.save(tmp_path / "step_000002", 2, lambda folder: None, {}, replace=False)
    with pytest.raises(DataError, match=rf"The last checkpoint is {tmp_path}/step_000002\."):
        stop.after_step("NaN", [7, 3])
