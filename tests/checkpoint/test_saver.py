"""One checkpoint after the other, while training waits or goes on."""

import threading

import pytest
import torch

from phi3_plugin.errors import OutputError
from phi3_plugin.train import checkpoints as run
from phi3_plugin.train.checkpoints import Saver


class Writer:
    """Writes a checkpoint's only file once it is let; notes in which thread."""

    def __init__(self, error=None):
        self.gate, self.error, self.thread = threading.Event(), error, None

    def __call__(self, folder):
        assert self.gate.wait(timeout=30)
        self.thread = threading.current_thread()
        if self.error:
            raise self.error
        (folder / "adapter_model.safetensors").write_text("weights")


@pytest.fixture
def told():
    return []


@pytest.fixture
def saver(tmp_path, told):
    return Saver(tmp_path, 1, lambda *saved: told.append(saved), background=True)


def test_training_waits_unless_it_is_told_not_to(tmp_path, told):
    writer = Writer()
    writer.gate.set()
    saver = Saver(tmp_path, None, lambda *saved: told.append(saved), background=False)
    saver.save("step_000001", 1, writer, {})
    assert told == [("step_000001", 1)]
    assert writer.thread is threading.main_thread()


def test_in_the_background_the_state_is_that_of_the_call(tmp_path, saver, told):
    state, writer = {"weights": torch.zeros(3)}, Writer()
    saver.save("step_000001", 1, writer, state)
    state["weights"] += 1  # training goes on
    assert told == []
    assert not (tmp_path / "step_000001").exists()
    writer.gate.set()
    saver.wait()
    assert told == [("step_000001", 1)]
    assert torch.equal(run.load_state(tmp_path / "step_000001")["weights"], torch.zeros(3))
    assert writer.thread is not threading.main_thread()


def test_one_is_written_after_the_other_and_the_oldest_goes(tmp_path, saver, told):
    for step in (1, 2, 3):
        writer = Writer()
        writer.gate.set()
        saver.save(run.step_name(step), step, writer, {})
        assert told == [(run.step_name(n), n) for n in range(1, step)]
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]


def test_what_could_not_be_written_stops_the_run_at_the_next_save(tmp_path, saver, told):
    full = Writer(OSError(28, "No space left on device"))
    full.gate.set()
    saver.save("step_000001", 1, full, {})
    with pytest.raises(OutputError, match=r"step_000001 could not be written: .*No space left"):
        saver.save("step_000002", 2, Writer(), {})
    assert list(tmp_path.iterdir()) == told == []
    saver.wait()  # said once
