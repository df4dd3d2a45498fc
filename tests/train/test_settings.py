"""Every mistake of a YAML is reported at once, under the key as it was typed."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from phi3_plugin.errors import ConfigError
from phi3_plugin.settings import Settings, read

YAML = Path(__file__).parents[2] / "configs" / "phi3_mini_lora.yaml"
TRAIN = [f for f in sorted(YAML.parent.glob("*.yaml")) if "optimizer:" in f.read_text("utf-8")]
VAL = "dataset_val={_component_: phi3_plugin.data.chat_dataset, source: v.jsonl}"


@pytest.fixture
def paths(tmp_path):
    (tmp_path / "base").mkdir()
    return [
        f"checkpoint_dir={tmp_path / 'base'}",
        f"output_dir={tmp_path / 'out'}",
        f"dataset.source={tmp_path / 'chats.jsonl'}",
    ]


@pytest.fixture
def settings(paths):
    """Read phi3_mini_lora with what a user adds to the command, and keys edited or taken out."""

    def from_command(*typed, edited=(), without=()):
        cfg = OmegaConf.merge(OmegaConf.load(YAML), OmegaConf.from_dotlist([*paths, *typed]))
        for key, value in dict(edited).items():
            OmegaConf.update(cfg, key, value, merge=False)
        for key in without:
            del cfg[key]
        return read(cfg)

    return from_command


@pytest.fixture
def problems(settings):
    def from_command(*typed, **changed):
        with pytest.raises(ConfigError) as caught:
            settings(*typed, **changed)
        return str(caught.value).splitlines()

    return from_command


@pytest.mark.parametrize("file", TRAIN, ids=lambda file: file.stem)
def test_every_config_is_accepted_once_its_paths_are_set(file, paths):
    cfg = OmegaConf.merge(OmegaConf.load(file), OmegaConf.from_dotlist(paths))
    assert isinstance(read(cfg), Settings)


@pytest.mark.parametrize("file", TRAIN, ids=lambda file: file.stem)
def test_every_config_says_which_paths_to_set(file):
    with pytest.raises(ConfigError) as caught:
        read(OmegaConf.load(file))
    unset = [line.split(" is not set. ")[0] for line in str(caught.value).splitlines()]
    assert unset == ["checkpoint_dir", "output_dir", "dataset.source"]


def test_values_arrive_resolved(settings, tmp_path):
    read = settings("epochs=3", "clip_grad_norm=null", "sample_prompts=[one, two]")
    assert (read.checkpoint_dir, read.output_dir) == (tmp_path / "base", tmp_path / "out")
    assert read.model["checkpoint_dir"] == str(tmp_path / "base")
    assert (read.epochs, read.clip_grad_norm, read.batch_size) == (3, None, 4)
    assert read.enable_activation_checkpointing is True
    assert read.sample_prompts == ["one", "two"]
    assert read.checkpointer["card"]["learning rate"] == 2e-4


def test_defaults(tmp_path):
    needed = {
        "checkpoint_dir": str(tmp_path),
        "output_dir": str(tmp_path / "out"),
        "model": {"_component_": "phi3_plugin.models.phi3", "checkpoint_dir": str(tmp_path)},
        "tokenizer": {"_component_": "phi3_plugin.data.phi3_tokenizer", "path": str(tmp_path)},
        "dataset": {"_component_": "phi3_plugin.data.chat_dataset", "source": "chats.jsonl"},
        "optimizer": {"_component_": "torch.optim.AdamW"},
        "batch_size": 2,
        "dtype": "bf16",
    }
    read_back = read(OmegaConf.create(needed))
    defaults = {field.name: field.default for field in fields(Settings)}
    missing = {name for name, value in defaults.items() if value is MISSING}
    assert missing == {*needed, "sample_prompts"}
    assert read_back.sample_prompts == []
    assert (read_back.seed, read_back.epochs, read_back.resume) == (0, 1, "never")
    assert (read_back.keep_best, read_back.max_nonfinite_steps) == (True, 3)


def test_a_seed_that_is_null_is_zero(settings):
    assert settings("seed=null").seed == 0


def test_five_mistakes_are_five_lines(problems):
    lines = problems(
        "batchsize=4",
        "epochs=two",
        "optimizer.learning_rate=1e-4",
        "resume_from_checkpoint=True",
        "early_stop_patience=3",
        without=["batch_size", "checkpointer"],
    )
    assert lines == [
        "batchsize: 4 is given, but this recipe has no such key. Did you mean 'batch_size'?",
        "epochs: 'two' must be a whole number above 0.",
        "optimizer.learning_rate: 0.0001 is given, but torch.optim.AdamW has no such key. "
        "Available: lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, "
        "differentiable, fused.",
        "resume_from_checkpoint: True is not supported by this recipe. Use resume=auto, which goes "
        "on from the newest checkpoint if there is one.",
        "early_stop_patience: 3 needs validation data. Set dataset_val, or val_fraction=0.05 to "
        "split it off the training set.",
    ]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("batch_sice=4", "batch_size"),
        ("lr_sheduler=null", "lr_scheduler"),
        ("max_step_per_epoch=3", "max_steps_per_epoch"),
        ("model.lora_ranks=8", "lora_rank"),
        ("lr_scheduler.warmup_ration=0.1", "warmup_ratio"),
        ("checkpointer.cards={}", "card"),
        ("model._component_=phi3_plugin.models.lora_ph3", "lora_phi3"),
        ("collate_fn=phi3_plugin.data.collate.pad_rigth", "pad_right"),
    ],
)
def test_did_you_mean(problems, typed, meant):
    (line,) = problems(typed)
    assert line.startswith(typed.split("=")[0] + ": ")
    assert f"Did you mean {meant!r}?" in line


def test_what_resembles_nothing_is_just_refused(problems):
    (line,) = problems("xyzzy=1")
    assert line == "xyzzy: 1 is given, but this recipe has no such key. Remove it."


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("batch_size=0", "0 must be a whole number above 0."),
        ("batch_size=2.0", "2.0 must be a whole number above 0."),
        ("batch_size=True", "True must be a whole number above 0."),
        ("max_steps=-1", "-1 must be a whole number above 0 or null."),
        ("seed=-1", "-1 must be a whole number from 0 on."),
        ("epochs=null", "null must be a whole number above 0."),
        ("shuffle=maybe", "'maybe' must be True or False."),
        ("compile=1", "1 must be True or False."),
        ("clip_grad_norm=0", "0 must be a number above 0 or null."),
        ("clip_grad_norm=.nan", "nan must be a number above 0 or null."),
        ("clip_grad_norm='1'", "'1' must be a number above 0 or null."),
        ("lora_plus_ratio=True", "True must be a number above 0 or null."),
        ("val_fraction=1", "1 must be at least 0 and below 1."),
        ("enable_activation_checkpointing=0", "0 must be True or False or a whole number above 0."),
        ("adapter_dtype=fp16", "'fp16' must be fp32 or bf16 or null."),
        ("device='cuda:1'", "'cuda:1' must be cpu or cuda or null. Choose a card with"),
        ("dtype=fp16", "'fp16' must be bf16 or fp32. Where a card has no bf16, use dtype=fp32"),
        ("output_dir=2024", "2024 must be text; put quotes around a number."),
        ("sample_prompts=Hello", "'Hello' must be a list of texts, as in ['one', 'two']."),
        ("sample_prompts=[1]", "[1] must be a list of texts, as in ['one', 'two']."),
        ("dataset_val=val.jsonl", "'val.jsonl' must be a section with _component_ or null."),
        ("resume=True", "True must be auto, never or a checkpoint folder that exists."),
        ("resume=no/such/folder", "'no/such/folder' must be auto, never or a checkpoint"),
        ("checkpoint_dir=no/such/folder", "no/such/folder is not a folder. Download"),
        ("collate_fn=torchtune.data.truncate", "'torchtune.data.truncate' takes no padding_idx"),
    ],
)
def test_each_kind_of_value(problems, typed, expected):
    key = typed.split("=")[0]
    assert problems(typed, without=["checkpointer"])[0].startswith(f"{key}: {expected}")


@pytest.mark.parametrize(
    "typed",
    [
        ["enable_activation_checkpointing=2", "clip_grad_norm=1", "lora_plus_ratio=16"],
        ["val_fraction=0.1", "run_val_every_n_steps=5", "early_stop_patience=2"],
        [VAL, "adapter_dtype=fp32", "device=cpu", "resume=auto", "metric_logger=null"],
        ["fsdp_cpu_offload=True", "fsdp_reshard_after_forward=False", "save_total_limit=1"],
        ["collate_fn=torchtune.data.padded_collate_sft", "lr_scheduler=null"],
        ["loss={_component_: torch.nn.CrossEntropyLoss, ignore_index: -100}"],
        ["group_by_length=True", "dataset.packed=False"],
    ],
)
def test_what_is_accepted(settings, typed):
    settings(*typed)


def test_a_folder_to_resume_from(settings, tmp_path):
    assert settings(f"resume={tmp_path}").resume == str(tmp_path)


@pytest.mark.parametrize("key", ["batch_size", "dtype", "model", "dataset"])
def test_what_must_be_set(problems, key):
    (line,) = problems(without=[key, "checkpointer"])
    assert line.startswith(f"{key} is not set. Set it in the YAML or add {key}")
    for value in ("???", None):
        assert problems(edited={key: value}, without=["checkpointer"]) == [line]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("epochs", "${nowhere}", "Interpolation key 'nowhere' not found."),
        ("model.lora_alpha", "${a.b}", "Interpolation key 'a.b' not found."),
        ("optimizer.lr", "fast", "'fast' must be a number above 0."),
        ("dataset", [{"source": "a"}], "[{'source': 'a'}] must be a section with _component_. For"),
    ],
)
def test_one_mistake_is_one_line(problems, key, value, problem):
    (line,) = problems(edited={key: value}, without=["checkpointer"])
    assert line.startswith(f"{key}: {problem}")


def test_a_key_of_a_component_that_must_be_set(problems):
    (line,) = problems(edited={"model.lora_rank": "???"})
    assert line.startswith("model.lora_rank is not set. Set it in the YAML or add model.lora_rank=")


def test_a_ratio_of_rates_needs_a_rate(problems):
    edited = {"optimizer": {"_component_": "torch.optim.AdamW"}, "lora_plus_ratio": 16}
    (line,) = problems(edited=edited, without=["checkpointer"])
    assert line == "lora_plus_ratio: 16 multiplies optimizer.lr. Set that."


@pytest.mark.parametrize(
    ("one", "other", "more"),
    [
        ("val_fraction=0.1", "dataset_val", VAL),
        ("group_by_length=True", "dataset.packed: True", "dataset.packed=True"),
        ("group_by_length=True", "shuffle: False", "shuffle=False"),
    ],
)
def test_conflicts(problems, one, other, more):
    (line,) = problems(one, more)
    assert line.startswith(f"{one.replace('=', ': ')} conflicts with {other}")


@pytest.mark.parametrize("key", ["run_val_every_n_steps", "early_stop_patience"])
def test_validation_needs_data(problems, key):
    (line,) = problems(f"{key}=2")
    assert line.startswith(f"{key}: 2 needs validation data.")
