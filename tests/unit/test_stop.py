"""When a run ends before its last step."""

import signal

import pytest

from phi3_plugin.errors import DataError
from phi3_plugin.train.stop import NO_IMPROVEMENT, Stop
from phi3_plugin.train.world import World


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield Stop(World("cpu"), patience=2, max_nonfinite=3)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_run_goes_on_unless_there_is_a_reason(stop):
    assert (stop.now(), stop.reason, stop.interrupted) == (False, None, False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_acted_on_when_the_run_asks(number, stop):
    signal.raise_signal(number)
    assert stop.reason is None
    assert (stop.now(), stop.reason, stop.interrupted) == (True, number.name, True)


def test_patience_ends_a_run_that_was_not_interrupted(stop):
    stop.after_validation(1)
    assert not stop.now()
    stop.after_validation(2)
    assert (stop.now(), stop.reason, stop.interrupted) == (True, NO_IMPROVEMENT, False)


def test_only_steps_in_a_row_that_moved_nothing_end_it(stop):
    for problem in ("NaN", "NaN", None, "NaN", "NaN"):
        stop.after_step(problem, [1, 2])
    with pytest.raises(DataError) as error:
        stop.after_step("no token has a label", [7, 3])
    assert str(error.value) == (
        "3 steps in a row left the weights alone: no token has a label. The last saw samples "
        "[7, 3]. Lower the learning rate, or look at these samples. The last checkpoint is whole."
    )
