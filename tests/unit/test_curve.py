"""A resumed run goes on in the same curve; stand-ins take the place of the services."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from omegaconf import OmegaConf

from phi3_plugin.train.curve import open_logger

CONFIG = OmegaConf.create({"resume": "auto"})


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("WANDB_RUN_ID", "COMET_EXPERIMENT_KEY", "MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def open_it(tmp_path, logger, step=None, **given):
    section = {"_component_": f"torchtune.training.metric_logging.{logger}", **given}
    return open_logger(section, CONFIG, tmp_path, step)


@pytest.fixture
def wandb(monkeypatch):
    """Stand in for wandb, which refuses other settings for a run that it knows."""
    module = ModuleType("wandb")
    module.run, module.asked, module.logged = None, [], []
    seen = {}

    def init(**asked):
        module.asked.append(asked)
        module.run = SimpleNamespace(_label=lambda **_: None)
        return module.run

    def update(values, allow_val_change):
        assert allow_val_change or seen.items() <= values.items()
        seen.update(values, resume="never")

    def finish():
        module.run = None

    module.init, module.finish = init, finish
    module.config = SimpleNamespace(update=update)
    module.save = lambda *_, **__: None
    module.log = module.logged.append
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("torchtune.training.metric_logging.save_config", lambda config: config)
    return module


def test_wandb_goes_on_in_the_run_that_it_knows(wandb, tmp_path):
    for step in (None, 4, 8):
        open_it(tmp_path, "WandBLogger", step, project="mine").close()
    ids = {asked["id"] for asked in wandb.asked}
    assert len(ids) == 1 and ids.pop()
    assert {asked["resume"] for asked in wandb.asked} == {"allow"}
    assert {asked["project"] for asked in wandb.asked} == {"mine"}
    open_it(tmp_path, "WandBLogger", None, project="mine").close()
    assert wandb.asked[-1]["id"] != wandb.asked[0]["id"]  # a new run, a new curve


def test_what_the_user_says_of_the_run_comes_first(wandb, tmp_path, monkeypatch):
    open_it(tmp_path, "WandBLogger", id="chosen", resume="must").close()
    assert (wandb.asked[-1]["id"], wandb.asked[-1]["resume"]) == ("chosen", "must")
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-job")
    open_it(tmp_path, "WandBLogger", 4).close()
    assert wandb.asked[-1]["id"] == "of-the-job"


@pytest.mark.parametrize("note", [b"", b"\xff", b"[]", b'{"logger": "Comet', b'{"logger": "X"}'])
def test_a_note_that_is_damaged_or_of_another_logger_starts_a_curve(wandb, note, tmp_path):
    (tmp_path / "logger.json").write_bytes(note)
    open_it(tmp_path, "WandBLogger", 4).close()
    assert json.loads((tmp_path / "logger.json").read_text()) == {
        "logger": "WandBLogger",
        "run": wandb.asked[0]["id"],
    }


def test_tensorboard_writes_into_the_same_folder_and_drops_what_is_made_again(
    monkeypatch, tmp_path
):
    opened = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step=None):
            opened.append((log_dir, purge_step))
            Path(log_dir).mkdir(parents=True, exist_ok=True)

        def close(self):
            pass

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("torchtune.training.metric_logging.save_config", lambda config: config)
    logs = str(tmp_path / "logs")
    for step in (None, 4):
        open_it(tmp_path, "TensorBoardLogger", step, log_dir=logs).close()
    (first, _), *_, (last, purged) = opened
    assert first == last and first.startswith(f"{logs}/run_0_")
    assert purged == 5
    moved = tmp_path / "logs_moved"
    (tmp_path / "logs").rename(moved)
    open_it(tmp_path, "TensorBoardLogger", 4, log_dir=str(moved)).close()
    assert opened[-1] == (first.replace(logs, str(moved)), 5)
    open_it(tmp_path, "TensorBoardLogger", 4, log_dir=str(tmp_path / "other")).close()
    assert opened[-1][0].startswith(f"{tmp_path}/other/run_0_")


def test_comet_goes_on_in_the_same_experiment(monkeypatch, tmp_path):
    keys = []

    def start(experiment_key, **_):
        keys.append(experiment_key)
        nothing = lambda *_, **__: None  # noqa: E731
        return SimpleNamespace(log_parameters=nothing, log_asset=nothing, end=nothing)

    module = ModuleType("comet_ml")
    module.start, module.ExperimentConfig = start, dict
    monkeypatch.setitem(sys.modules, "comet_ml", module)
    monkeypatch.setattr(
        "torchtune.training.metric_logging.save_config", lambda config: tmp_path / "x"
    )
    for step in (None, 4):
        open_it(tmp_path, "CometLogger", step).close()
    assert keys[0] == keys[1] and len(keys[0]) == 32


def test_mlflow_goes_on_in_the_same_run_and_is_not_told_its_parameters_again(monkeypatch, tmp_path):
    runs, told = [], []

    def start_run(run_name):
        runs.append(os.environ.get("MLFLOW_RUN_ID", f"run-{len(runs)}"))
        return SimpleNamespace(info=SimpleNamespace(run_id=runs[-1]))

    module = ModuleType("mlflow")
    module.start_run = start_run
    module.is_tracking_uri_set = lambda: True
    module.active_run = lambda: runs[-1] if len(runs) > len(told) else None
    module.log_params = lambda values, run_id: told.append(run_id)
    module.log_artifact = lambda *_, **__: None
    module.end_run = lambda: None
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setattr(
        "torchtune.training.metric_logging.save_config", lambda config: tmp_path / "x"
    )
    for step in (None, 4):
        open_it(tmp_path, "MLFlowLogger", step).close()
    assert runs == ["run-0", "run-0"]
    assert told == ["run-0"]


def test_a_logger_of_somebody_elses_is_made_as_it_is_asked_for(tmp_path):
    section = {"_component_": "torchtune.training.metric_logging.StdoutLogger"}
    assert (
        open_logger(section, OmegaConf.create({"output_dir": str(tmp_path)}), tmp_path, 4)
        is not None
    )
    assert not (tmp_path / "logger.json").exists()
