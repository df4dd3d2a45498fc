"""What a GPU needs of a run: batches made a step ahead, and steps told late. Here on a CPU."""

import pytest
import torch
from phi3_plugin.recipes import lora_finetune

from phi3_plugin.train import ahead
from phi3_plugin.train.monitor import Monitor
from tests.own import assert_same_end, train


@pytest.fixture
def late(monkeypatch):
    """Let a run believe that its CPU is computing while Python goes on."""
    for module in (ahead, lora_finetune):
        monkeypatch.setattr(module, "computes_ahead", lambda device: True)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)


def test_a_run_ends_in_the_same_bits_and_metrics(inputs, whole, tmp_path, late):
    train(inputs, f"output_dir={tmp_path}")
    assert_same_end(tmp_path, whole)


def test_a_step_is_told_when_the_next_is_under_way(inputs, tmp_path, late, monkeypatch):
    happened = []

    def spied(owner, name, what):
        original = getattr(owner, name)

        def spy(*args, **kwargs):
            happened.append(what(args))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)

    spied(lora_finetune, "train_step", lambda args: "step")
    spied(Monitor, "step", lambda args: args[1])
    spied(lora_finetune.Finetune, "validate", lambda args: "validation")
    rarely = "save_every_n_steps=null", "save_every_epoch=False", "run_val_every_n_steps=3"
    train(inputs, *rarely, f"output_dir={tmp_path}", "max_steps=4", "epochs=1")
    first = ["step", "step", 1, "step", 2, "validation", 3]
    assert happened == [*first, "step", 4, "validation"]


def test_a_mistake_of_the_data_comes_with_its_step(inputs, tmp_path, late, monkeypatch):
    make = ahead.Batches._make

    def damaged(self, step):
        if step == 2:
            raise ValueError("damaged")
        return make(self, step)

    monkeypatch.setattr(ahead.Batches, "_make", damaged)
    with pytest.raises(ValueError, match="damaged"):
        train(inputs, f"output_dir={tmp_path}")
    assert (tmp_path / "step_000002").is_dir()
