"""Curves of a run in the real TensorBoard and in the offline mode of Weights & Biases."""

import pytest
from omegaconf import OmegaConf

from tests.own import CONFIG, tiny_inputs, train

STEPS = {"loss", "lr", "grad_norm"}


def logged_by(name, inputs, **section):
    cfg = OmegaConf.load(CONFIG)
    component = f"torchtune.training.metric_logging.{name}"
    cfg.metric_logger = {"_component_": component, "log_dir": str(inputs / "curves"), **section}
    OmegaConf.save(cfg, inputs / "logged.yaml")
    train(inputs, "max_steps=2", config=inputs / "logged.yaml")


@pytest.fixture
def inputs(tmp_path):
    return tiny_inputs(tmp_path, 40)


def test_tensorboard(inputs, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged_by("TensorBoardLogger", inputs)
    (folder,) = (tmp_path / "curves").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {*events.Tags()["tensors"]} >= STEPS
    assert [event.step for event in events.Tensors("loss")] == [1, 2]


def test_wandb_offline(inputs, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra 'wandb'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged_by("WandBLogger", inputs, project="mine")
    (file,) = (inputs / "curves").rglob("run-*.wandb")
    written = file.read_bytes()
    assert all(key.encode() in written for key in STEPS)
