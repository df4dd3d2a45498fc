"""torchtune's own keys: accepted where they change nothing, refused with what to do instead."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from phi3_plugin.settings import STOCK_KEYS, read, section_problems, stock_problems

REFUSED = {
    "max_steps_per_epoch": (3, "max_steps,"),
    "resume_from_checkpoint": (True, "resume=auto"),
    "save_adapter_weights_only": (False, "adapter merge"),
    "optimizer_in_bwd": (True, "Set it to False"),
    "log_peak_memory_stats": ("sometimes", "True or False"),
    "low_cpu_ram": (True, "Set it to False"),
    "cudnn_deterministic_mode": (True, "Set it to null"),
    "custom_sharded_layers": (["output"], "Set it to null"),
}
CHECKPOINTER = "phi3_plugin.checkpoint.Phi3Checkpointer"


@pytest.mark.parametrize("key", STOCK_KEYS)
def test_neutral_or_refused(key):
    neutral, _ = STOCK_KEYS[key]
    assert [stock_problems({key: value}) for value in neutral] == [[]] * len(neutral)
    value, instead = REFUSED[key]
    (line,) = stock_problems({key: value})
    assert line.startswith(f"{key}: {value!r} is not supported by this recipe. ")
    assert instead in line


def test_a_number_is_no_switch():
    assert stock_problems({"resume_from_checkpoint": 0, "save_adapter_weights_only": 1}) != []


@pytest.mark.parametrize(
    "loss",
    [
        None,
        {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss", "num_output_chunks": 4},
        {"_component_": "torch.nn.CrossEntropyLoss", "ignore_index": -100, "label_smoothing": 0.0},
    ],
)
def test_cross_entropy_is_accepted(loss):
    assert stock_problems({"loss": loss}) == []


@pytest.mark.parametrize(
    ("loss", "problem"),
    [
        ({"_component_": "torchtune.rlhf.loss.DPOLoss"}, "loss._component_: 'torchtune.rlh"),
        ("torch.nn.CrossEntropyLoss", "loss: 'torch.nn.CrossEntropyLoss' must be a section"),
        (
            {"_component_": "torch.nn.CrossEntropyLoss", "label_smoothing": 0.1},
            "loss.label_smoothing: 0.1 is not supported by this recipe. Remove it.",
        ),
    ],
)
def test_other_losses_are_refused(loss, problem):
    (line,) = stock_problems({"loss": loss})
    assert line.startswith(problem)


def test_the_profiler_stays_off():
    for off in (None, {"enabled": False, "cpu": True}, {}):
        assert stock_problems({"profiler": off}) == []
    for on in (True, {"enabled": True}, "yes"):
        (line,) = stock_problems({"profiler": on})
        assert line.startswith("profiler.enabled: ")


@pytest.mark.parametrize(
    ("key", "section", "problem"),
    [
        ("optimizer", {"params": []}, "optimizer.params: [] is set by the recipe. Remove it."),
        (
            "optimizer",
            {"_component_": "torch.optim"},
            "optimizer._component_: 'torch.optim' cannot",
        ),
        ("model", {"lora_attn_modules": None, "lora_rnk": 1}, "model.lora_rnk: 1 is given, but "),
        ("model", {}, "model.lora_attn_modules is not set. Set it in the YAML or add model.lora_"),
        ("dataset", {"source": None}, "dataset.source is not set. Set it in the YAML or add "),
        ("dataset_val", {}, "dataset_val.source is not set. Set it in the YAML or add "),
        (
            "lr_scheduler",
            {"_component_": "torch.optim.lr_scheduler.StepLR", "step_size": 1},
            "lr_scheduler._component_: 'torch.optim.lr_scheduler.StepLR' takes no num_training_",
        ),
        (
            "lr_scheduler",
            {"num_training_steps": 1},
            "lr_scheduler.num_training_steps: 1 is set by the recipe.",
        ),
        (
            "optimizer",
            {"_component_": "no_such_package.Adam"},
            "optimizer._component_: 'no_such_package.Adam' cannot be imported. "
            "ModuleNotFoundError(\"No module named 'no_such_package'\").",
        ),
        (
            "tokenizer",
            {"_component_": ""},
            "tokenizer._component_: '' cannot be imported. ValueError('Empty path').",
        ),
    ],
)
def test_a_component_that_cannot_be_called(key, section, problem):
    components = {
        "optimizer": "torch.optim.AdamW",
        "model": "phi3_plugin.models.lora_phi3_mini",
        "dataset": "phi3_plugin.data.chat_dataset",
        "dataset_val": "phi3_plugin.data.chat_dataset",
        "lr_scheduler": "phi3_plugin.train.cosine_with_warmup",
        "tokenizer": "phi3_plugin.data.phi3_tokenizer",
    }
    (line,) = section_problems(key, {key: {"_component_": components[key], **section}})
    assert line.startswith(problem)


def test_a_component_of_the_users_own_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_optimizers.py").write_text("def make(params, **anything): ...")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["elsewhere"])
    section = {"_component_": "my_optimizers.make", "speed": 3}
    assert section_problems("optimizer", {"optimizer": section}) == []


def test_a_component_that_breaks_on_import_is_a_problem_like_others(tmp_path, monkeypatch):
    (tmp_path / "my_broken_data.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    section = {"_component_": "my_broken_data.rows"}
    (line,) = section_problems("dataset", {"dataset": section})
    assert "ZeroDivisionError('division by zero')" in line


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"output_dir": "x"}, "checkpointer.output_dir: 'x' differs from 'out', which this recipe"),
        ({"layout": "split"}, "checkpointer.layout: 'split' differs from 'fused', which this "),
        ({"card": "x"}, "checkpointer.card: 'x' must be a section of names and values."),
        (
            {"cards": {}},
            "checkpointer.cards: {} is given, but " + CHECKPOINTER + " has no such key.",
        ),
        (
            {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_files": []},
            "checkpointer._component_: 'torchtune.training.FullModelHFCheckpointer' is not ",
        ),
        (
            {"save_adapter_weights_only": False},
            "checkpointer.save_adapter_weights_only: False differs from True, which this recipe",
        ),
    ],
)
def test_a_checkpointer_that_asks_for_something_else(section, problem):
    given = {"checkpoint_dir": "base", "output_dir": "out", "checkpointer": section}
    (line,) = section_problems("checkpointer", given)
    assert line.startswith(problem)


def test_a_checkpointer_as_our_yamls_have_it():
    section = {
        "_component_": CHECKPOINTER,
        "checkpoint_dir": "base",
        "output_dir": "out",
        "card": {"data": "chats"},
        "lora_dropout": 0.1,
        "model_type": "PHI3_MINI",
        "layout": "fused",
        "save_adapter_weights_only": False,
    }
    given = {"checkpoint_dir": "base", "output_dir": "out", "save_adapter_weights_only": False}
    # Refused once, at the top
    assert section_problems("checkpointer", {**given, "checkpointer": section}) == []
    assert len(stock_problems(given)) == 1


@pytest.mark.parametrize("key", ["checkpointer", "lr_scheduler", "metric_logger", "dataset_val"])
def test_a_section_may_be_null(key):
    assert section_problems(key, {key: None}) == []


def test_a_component_that_the_command_line_sets_to_null_is_none(tmp_path):
    """torchtune hands `lr_scheduler=null` on as a section whose component is null."""
    cfg = OmegaConf.load(Path(__file__).parents[2] / "configs" / "phi3_mini_lora.yaml")
    cfg.checkpoint_dir, cfg.output_dir = str(tmp_path), str(tmp_path / "out")
    cfg.dataset.source = "chats.jsonl"
    cfg.lr_scheduler._component_ = None
    assert read(cfg).lr_scheduler is None
