"""When a run ends before its last step."""

import math
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from phi3_plugin.device import Received
from phi3_plugin.errors import DataError
from phi3_plugin.launch import STOPPED
from phi3_plugin.train import checkpoints
from phi3_plugin.train.step import StepResult
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


def made(loss, norm=1.0, scale=None):
    """Return what a step did, in fp16 if it has a scale."""
    numbers = torch.tensor([loss, norm, scale or 1.0])
    return StepResult(5, Received(numbers), None, scale is not None)


def test_only_steps_in_a_row_that_moved_nothing_end_it(stop, tmp_path):
    nan, moved = made(math.nan), made(1.0)
    for result in (nan, nan, moved, nan, nan):
        stop.after_step(result, [1, 2])
    with pytest.raises(DataError) as error:
        stop.after_step(replace(nan, tokens=0), [7, 3])
    assert str(error.value) == (
        "3 steps in a row left the weights alone: no token has a label. The last saw samples "
        "[7, 3]. Lower the learning rate, or look at these samples. No checkpoint was saved."
    )
    checkpoints.save(tmp_path / "step_000002", 2, lambda folder: None, {}, replace=False)
    with pytest.raises(DataError, match=rf"The last checkpoint is {tmp_path}/step_000002\."):
        stop.after_step(nan, [7, 3])


def test_overflows_in_fp16_end_it_where_no_scale_is_left(stop):
    for power in range(16, 0, -1):
        stop.after_step(made(1.0, math.inf, 2.0**power), [1])
    with pytest.raises(DataError) as error:
        stop.after_step(made(1.0, math.nan, 1.0), [7, 3])
    assert str(error.value) == (
        "Step after step left the weights alone: the gradient overflowed at a loss scale of 1. "
        "The last saw samples [7, 3]. Lower the learning rate, or look at these samples, or use a "
        "wider range than fp16 has: dtype=fp32 over an NF4 base, "
        "model._component_=phi3_plugin.models.qlora_phi3. No checkpoint was saved."
    )


def test_a_loss_that_is_not_finite_in_fp16_is_no_matter_of_its_scale(stop):
    lost = made(math.nan, math.nan, 65536.0)
    for _ in range(2):
        stop.after_step(lost, [1])
    with pytest.raises(DataError, match=r"3 steps .* not finite.* a wider range than fp16 has"):
        stop.after_step(lost, [1])
