"""Every mistake of a YAML is reported at once, under the key as it was typed."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from phi3_plugin.errors import ConfigError
from phi3_plugin.options import EvaluateOptions
from phi3_plugin.settings import (
    STOCK_KEYS,
    Settings,
    bytes_of,
    component_problems,
    conflicts,
    logger_problems,
    read,
    read_beside,
    stock_problems,
)

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
    assert (read_back.seed, read_back.epochs, read_back.resume) == (0, 1, "auto")
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
        "val_fraction=0",
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
        ("seed=-1", "-1 must be a whole number from 0 to 2**63 - 1."),
        ("epochs=null", "null must be a whole number above 0."),
        ("shuffle=maybe", "'maybe' must be True or False."),
        ("compile=1", "1 must be True or False or null."),
        ("clip_grad_norm=0", "0 must be a number above 0 or null."),
        ("clip_grad_norm=.nan", "nan must be a number above 0 or null."),
        ("clip_grad_norm='1'", "'1' must be a number above 0 or null."),
        ("lora_plus_ratio=True", "True must be a number above 0 or null."),
        ("val_fraction=1", "1 must be at least 0 and below 1 or null."),
        ("enable_activation_checkpointing=0", "0 must be True or False or a whole number above 0."),
        ("adapter_dtype=fp16", "'fp16' must be bf16 or fp32 or null."),
        (
            "device='cuda:1'",
            "'cuda:1' must be cpu or cuda or xpu or mps or null. Choose a card with",
        ),
        ("dtype=half", "'half' must be bf16 or fp16 or fp32. fp16 is for cards without bf16"),
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
        ("loss", {}, "{} must be a section with _component_ or null."),
        ("loss", {"label_smoothing": 0.1}, "{'label_smoothing': 0.1} must be a section with"),
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
        (
            "tokenizer.add_tokens=['<a>']",
            "model.apply_lora_to_output: True",
            "model.apply_lora_to_output=True",
        ),
    ],
)
def test_conflicts(problems, one, other, more):
    (line,) = problems(one, more)
    assert line.startswith(f"{one.replace('=', ': ')} conflicts with {other}")


@pytest.mark.parametrize("key", ["run_val_every_n_steps", "early_stop_patience"])
def test_validation_needs_data(problems, key):
    (line,) = problems(f"{key}=2", "val_fraction=0")
    assert line.startswith(f"{key}: 2 needs validation data.")


def test_patience_needs_validations_on_the_way(problems):
    none = "run_val_every_n_steps=null"
    (line,) = problems("early_stop_patience=2", "val_fraction=0.1", none)
    assert line.startswith("early_stop_patience: 2 counts validations")


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        ("seed=9223372036854775808", "seed: 9223372036854775808 must be"),
        ("lr_scheduler.num_warmup_steps=-3", "lr_scheduler.num_warmup_steps: -3 must be a whole"),
        ("lr_scheduler.num_warmup_steps=0.1", "lr_scheduler.num_warmup_steps: 0.1 must be a whol"),
        ("lr_scheduler.warmup_ratio=1.5", "lr_scheduler.warmup_ratio: 1.5 must be a number from 0"),
        ("optimizer.betas=[0.9]", "optimizer: torch.optim.AdamW does not take these values. "),
        ("optimizer.betas=[0.9,1.5]", "optimizer: torch.optim.AdamW does not take these values. "),
        ("optimizer.weight_decay=-1", "optimizer: torch.optim.AdamW does not take these values. "),
        ("optimizer.eps=x", "optimizer: torch.optim.AdamW does not take these values. "),
    ],
)
def test_values_that_would_do_the_wrong_thing(problems, typed, key):
    (line,) = problems(typed)
    assert line.startswith(key)


def test_the_warm_up_of_torchtunes_own_schedule_is_a_number_of_steps_too(problems):
    cosine = "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
    section = f"lr_scheduler={{_component_: {cosine}, num_warmup_steps: -1, warmup_ratio: null}}"
    lines = problems(section)
    assert any(line.startswith("lr_scheduler.num_warmup_steps: -1 must be") for line in lines)


@pytest.mark.parametrize("dtype", ["bf16", "null"])
def test_what_is_trained_is_not_in_fp16(problems, dtype):
    (line,) = problems("dtype=fp16", f"adapter_dtype={dtype}")
    assert line.startswith("adapter_dtype: ") and "Set it to fp32." in line
    model = {"_component_": "phi3_plugin.models.phi3", "checkpoint_dir": "base"}
    (line,) = conflicts({"model": model, "dtype": "fp16"}, 1)
    assert line.startswith("dtype: 'fp16' is too coarse for weights that are trained")


def test_what_only_adapters_have_is_refused_without_them():
    model = {"_component_": "phi3_plugin.models.phi3", "checkpoint_dir": "base"}
    lines = conflicts({"model": model, "lora_plus_ratio": 4, "adapter_dtype": "fp32"}, 1)
    assert [line.partition(":")[0] for line in lines] == ["lora_plus_ratio", "adapter_dtype"]


@pytest.mark.parametrize(
    ("logger", "package"),
    [("WandBLogger", "wandb"), ("CometLogger", "comet_ml"), ("MLFlowLogger", "mlflow")],
)
def test_a_logger_without_its_package_is_said_before_anything_is_loaded(
    logger, package, monkeypatch
):
    monkeypatch.setattr("phi3_plugin.settings.find_spec", lambda name: None)
    component = f"torchtune.training.metric_logging.{logger}"
    (line,) = logger_problems({"_component_": component})
    assert f"needs the package {package}, which is not installed. Run: pip install" in line


@pytest.mark.parametrize(
    "typed",
    [
        ("val_fraction=0.0", "run_val_every_n_steps=50", "early_stop_patience=3"),
        ("init_adapter=gone", "optimizer.betas=[7]", "max_steps_per_epoch=3"),
        ("optimizer._component_=not_installed.AdamW", "enable_activation_offloading=True"),
        ("metric_logger._component_=torchtune.training.metric_logging.WandBLogger",),
    ],
)
def test_what_only_matters_to_training_binds_no_other_recipe(paths, typed, monkeypatch):
    monkeypatch.setattr("phi3_plugin.settings.find_spec", lambda name: None)
    cfg = OmegaConf.merge(OmegaConf.load(YAML), OmegaConf.from_dotlist([*paths, *typed]))
    read_beside(cfg, EvaluateOptions, processes=1)
    with pytest.raises(ConfigError):
        read(cfg)


@pytest.mark.parametrize("key", ["output_dir", "init_adapter", "resume", "metric_logger.log_dir"])
def test_a_tilde_is_the_home_folder(paths, tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there").mkdir(exist_ok=True)
    logger = "metric_logger._component_=torchtune.training.metric_logging.DiskLogger"
    cfg = OmegaConf.load(YAML)
    del cfg.metric_logger
    typed = [*paths, logger, "metric_logger.log_dir=x", f"{key}=~/there"]
    settings = read(OmegaConf.merge(cfg, OmegaConf.from_dotlist(typed)))
    value = settings.metric_logger if "." in key else vars(settings)
    assert str(value[key.rpartition(".")[2]]) == str(tmp_path / "there")


def test_a_tilde_is_left_alone_where_it_is_no_path(paths):
    typed = [*paths, "sample_prompts=['~/x']", "dataset.system_prompt='~/y'"]
    settings = read(OmegaConf.merge(OmegaConf.load(YAML), OmegaConf.from_dotlist(typed)))
    assert settings.sample_prompts == ["~/x"] and settings.dataset["system_prompt"] == "~/y"


# torchtune's own keys: accepted where they change nothing, refused with what to do instead.


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


def stock(given):
    return list(stock_problems(given))


@pytest.mark.parametrize("key", STOCK_KEYS)
def test_neutral_or_refused(key):
    neutral, _ = STOCK_KEYS[key]
    assert [stock({key: value}) for value in neutral] == [[]] * len(neutral)
    value, instead = REFUSED[key]
    (line,) = stock({key: value})
    assert line.startswith(f"{key}: {value!r} is not supported by this recipe. ")
    assert instead in line


def test_a_number_is_no_switch():
    assert stock({"resume_from_checkpoint": 0, "save_adapter_weights_only": 1}) != []


@pytest.mark.parametrize(
    "loss",
    [
        None,
        {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss", "num_output_chunks": 4},
        {"_component_": "torch.nn.CrossEntropyLoss", "ignore_index": -100, "label_smoothing": 0.0},
    ],
)
def test_cross_entropy_is_accepted(settings, loss):
    assert settings(edited={"loss": loss}).loss is None


LOSSES = "phi3_plugin.train.losses."


@pytest.mark.parametrize("name", ["torch.nn.CrossEntropyLoss", f"{LOSSES}sft"])
def test_a_smoothed_cross_entropy_is_ours(settings, name):
    loss = settings(edited={"loss": {"_component_": name, "label_smoothing": 0.1}}).loss
    assert loss == {"_component_": f"{LOSSES}sft", "label_smoothing": 0.1}


WHOLE = {"_component_": "phi3_plugin.models.phi3", "checkpoint_dir": "x"}
PAIRS = {"dataset._component_": "phi3_plugin.data.preference_dataset"}


@pytest.mark.parametrize(
    ("loss", "changed", "problem"),
    [
        ({"_component_": "torchtune.rlhf.loss.PPOLoss"}, PAIRS, "loss._component_: 'torchtune.rlh"),
        ("torch.nn.CrossEntropyLoss", {}, "loss: 'torch.nn.CrossEntropyLoss' must be a section"),
        (
            {"_component_": "torch.nn.CrossEntropyLoss", "label_smoothing": 1.5},
            {},
            "loss.label_smoothing: 1.5 must be at least 0 and below 1",
        ),
        (
            {"_component_": "torch.nn.CrossEntropyLoss", "label_smoothing": 0.1, "weight": 1},
            {},
            "loss.weight: 1 is not supported by this recipe. Remove it.",
        ),
        ({"_component_": f"{LOSSES}sft", "label_smothing": 0.1}, {}, "loss.label_smothing: 0.1 "),
        (
            {"_component_": f"{LOSSES}sft", "label_smoothing": 0.1},
            PAIRS,
            "loss: 'phi3_plugin.train.losses.sft' would learn rejected answers as well.",
        ),
        ({"_component_": f"{LOSSES}dpo", "beta": -1}, PAIRS, "loss.beta: -1 must be a number abo"),
        ({"_component_": f"{LOSSES}dpo", "form": "x"}, PAIRS, "loss.form: 'x' must be sigmoid "),
        ({"_component_": f"{LOSSES}kto", "gamma": 1}, PAIRS, "loss.gamma: 1 "),
        ({"_component_": f"{LOSSES}dpo"}, {}, "dataset._component_: 'phi3_plugin.data.chat_data"),
        (None, PAIRS, "loss: null would learn rejected answers as well."),
        (
            {"_component_": f"{LOSSES}dpo"},
            {**PAIRS, "collate_fn": "phi3_plugin.data.collate.pad_right"},
            "collate_fn: 'phi3_plugin.data.collate.pad_right' does not keep the answers",
        ),
        (
            {"_component_": f"{LOSSES}dpo"},
            {**PAIRS, "model.lora_init": "pissa"},
            "model.lora_init: 'pissa' changes what is under the adapter",
        ),
        (
            {"_component_": f"{LOSSES}kto"},
            {**PAIRS, "model.modules_to_save": ["lm_head"]},
            "model.modules_to_save: ['lm_head'] changes what is under",
        ),
        (
            {"_component_": f"{LOSSES}dpo"},
            {**PAIRS, "model": WHOLE, "checkpointer": None, "adapter_dtype": None},
            "model._component_: phi3_plugin.models.phi3 changes as a whole",
        ),
    ],
)
def test_other_losses_are_refused(problems, loss, changed, problem):
    (line,) = problems(edited={"loss": loss, **changed})
    assert line.startswith(problem)


def test_losses_of_answers_are_read(settings):
    stock = {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.2}
    read = settings(edited={"loss": stock, **PAIRS})
    assert read.loss == {"_component_": f"{LOSSES}dpo", "beta": 0.2}
    changed = {"model": WHOLE, "checkpointer": None, "adapter_dtype": None}
    settings(edited={"loss": {"_component_": f"{LOSSES}simpo"}, **PAIRS, **changed})


DISTILL = {"_component_": f"{LOSSES}distill"}
STOCK_KL = {"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"}


@pytest.mark.parametrize(
    ("loss", "changed", "problem"),
    [
        (DISTILL, {"teacher_dir": "gone"}, "teacher_dir: gone is not a folder."),
        (DISTILL, {"teacher_adapter": "gone"}, "teacher_adapter: 'gone' is not there."),
        (DISTILL, {"teacher_quantized": True}, "teacher_quantized: True is for a teacher_dir"),
        (DISTILL, PAIRS, "dataset._component_: phi3_plugin.data.preference_dataset has rejected"),
        (DISTILL, {"model.lora_init": "pissa"}, "model.lora_init: 'pissa' changes what is under"),
        (DISTILL, {"kd_loss": STOCK_KL, "kd_ratio": 2}, "loss.kd_ratio: 2 must be above 0 and"),
        ({**DISTILL, "temperature": 0}, {}, "loss.temperature: 0 must be a number above 0"),
        ({**DISTILL, "kd_ratio": 0}, {}, "loss.kd_ratio: 0 must be above 0 and at most 1"),
        ({**DISTILL, "kd_ratio": 1}, {}, "loss.kd_ratio: 1 with the base as the teacher leaves"),
        ({**DISTILL, "kd_ratio": 0.3}, {"kd_ratio": 0.5}, "kd_ratio: 0.5 conflicts with loss."),
        ({**DISTILL, "kd_rate": 1}, {}, "loss.kd_rate: 1 is given, but phi3_plugin.train.losses."),
        (None, {"teacher_adapter": "x"}, "teacher_adapter: 'x' is of no use to another loss"),
        (None, {"kd_loss": {"_component_": "torchtune.modules.loss.ReverseKLLoss"}}, "kd_loss._c"),
        (None, {"kd_ratio": 0.5}, "kd_ratio: 0.5 is of no use to another loss than distill"),
        (
            {"_component_": f"{LOSSES}sft", "label_smoothing": 0.1},
            {"kd_loss": STOCK_KL},
            "kd_loss._component_: 'torchtune.modules.loss.ForwardKLWithChunkedOutputLoss' is not",
        ),
    ],
)
def test_what_does_not_go_with_a_teacher(problems, loss, changed, problem):
    (line,) = problems(edited={"loss": loss, **changed})
    assert line.startswith(problem)


def test_torchtunes_keys_of_distillation_are_ours(settings, tmp_path):
    entropy = {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}
    teacher = {"_component_": "phi3_plugin.models.phi3", "quantize_base": True}
    stock = {"kd_loss": STOCK_KL, "kd_ratio": 0.3, "teacher_model": teacher}
    stock["teacher_checkpointer"] = {"checkpoint_dir": str(tmp_path)}
    for loss in (entropy, None, DISTILL):
        read = settings(edited={"loss": loss, **stock})
        assert read.loss == {**DISTILL, "kd_ratio": 0.3}
        assert (read.teacher_dir, read.teacher_quantized) == (tmp_path, True)
    softer = settings(edited={"loss": {**DISTILL, "temperature": 2}, **stock})
    assert softer.loss == {**DISTILL, "kd_ratio": 0.3, "temperature": 2}
    with pytest.raises(ConfigError, match=r"teacher_model\.quantize_base: True conflicts with"):
        settings(edited={"loss": entropy, **stock, "teacher_quantized": False})


def test_the_profiler_stays_off():
    for off in (None, {"enabled": False, "cpu": True}, {}):
        assert stock({"profiler": off}) == []
    for on in (True, {"enabled": True}, "yes"):
        (line,) = stock({"profiler": on})
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
        (
            "model",
            {"lora_attn_modules": ["o_proj"], "lora_rnk": 1},
            "model.lora_rnk: 1 is given, but ",
        ),
        (
            "model",
            {"lora_attn_modules": ["o_proj"], "lora_rank": 0},
            "model.lora_rank: 0 must be a whole number above 0.",
        ),
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
    (line,) = component_problems(key, {"_component_": components[key], **section})
    assert line.startswith(problem)


def test_a_component_of_the_users_own_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_optimizers.py").write_text("def make(params, **anything): ...")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["elsewhere"])
    section = {"_component_": "my_optimizers.make", "speed": 3}
    assert [*component_problems("optimizer", section)] == []


def test_a_component_that_breaks_on_import_is_a_problem_like_others(tmp_path, monkeypatch):
    (tmp_path / "my_broken_data.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    section = {"_component_": "my_broken_data.rows"}
    (line,) = component_problems("dataset", section)
    assert "ZeroDivisionError('division by zero')" in line


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ("output_dir=x", "output_dir: 'x' differs from"),
        ("layout=split", "layout: 'split' differs from 'fused', which this recipe"),
        ("card=x", "card: 'x' must be a section of names and values."),
        ("cards={}", "cards: {} is given, but phi3_plugin.checkpoint.Phi3Checkpointer has no such"),
        ("_component_=torchtune.training.FullModelHFCheckpointer", "_component_: 'torchtune.tra"),
        ("save_adapter_weights_only=False", "save_adapter_weights_only: False differs from True"),
    ],
)
def test_a_checkpointer_that_asks_for_something_else(problems, typed, problem):
    (line,) = problems(f"checkpointer.{typed}")
    assert line.startswith(f"checkpointer.{problem}")


def test_what_is_wrong_at_the_top_and_in_the_checkpointer_is_one_line(problems):
    (line,) = problems("save_adapter_weights_only=False")
    assert line.startswith("save_adapter_weights_only: False is not supported by this recipe.")


def test_a_component_that_the_command_line_sets_to_null_is_none(settings):
    """torchtune hands `lr_scheduler=null` on as a section whose component is null."""
    read = settings(edited={"lr_scheduler._component_": None}, without=["checkpointer"])
    assert read.lr_scheduler is None


def test_a_recipe_reads_its_own_keys_beside_those_of_a_run(paths):
    def both(*typed):
        cfg = OmegaConf.merge(OmegaConf.load(YAML), OmegaConf.from_dotlist([*paths, *typed]))
        return read_beside(cfg, EvaluateOptions, processes=1)

    settings, own = both("adapter=a", "generation.temperature=1", "generation.stop='Q:'")
    assert settings.batch_size == 4 and own.adapter == Path("a")
    assert (own.generation.temperature, own.generation.stop) == (1, ("Q:",))
    wrong = ("max_sample=3", "worst=-1", "generation.top_p=2", "generation.beams=4", "epochs=0")
    with pytest.raises(ConfigError) as caught:
        both(*wrong)
    lines = str(caught.value).splitlines()
    assert {line.split(":")[0] for line in lines} == {word.split("=")[0] for word in wrong}
    assert "Did you mean 'max_samples'?" in lines[0]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 16 * 2**30),
        ("12GB", 12 * 10**9),
        ("1.5 gib", 3 * 2**29),
        ("500MB", 500 * 10**6),
        (8_000_000_000, 8 * 10**9),
        (8e9, 8 * 10**9),
        ("16", 16),
        ("16G", None),
        ("-1GB", None),
        ("0GB", None),
        (True, None),
        (None, None),
        ([], None),
    ],
)
def test_amounts_of_memory(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("value", ["16G", "-3", "lots", "0"])
def test_a_budget_that_is_no_amount(problems, value):
    (line, *_) = problems(f"memory_budget={value}")
    assert line.startswith("memory_budget: ") and "must be an amount of memory: 16GiB" in line


def test_one_key_decides_what_recomputes(problems):
    (line,) = problems("memory_budget=16GiB", "enable_activation_checkpointing=True")
    assert line.startswith("memory_budget: '16GiB' conflicts with enable_activation_checkpoin")


def test_offloading_needs_a_gpu_and_recompute(problems, settings, monkeypatch):
    offload = "enable_activation_offloading=True"
    gpu, recompute = problems(offload, "enable_activation_checkpointing=False")
    assert "this run is on another device" in gpu
    assert "Add enable_activation_checkpointing=True" in recompute
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert settings(offload).enable_activation_offloading
    (line,) = problems(offload, "device=cpu")
    assert "this run is on another device" in line


def test_an_adapter_to_start_from_must_be_there_and_start_alone(problems, tmp_path):
    (line,) = problems("init_adapter=no/such/folder")
    assert line.startswith("init_adapter: 'no/such/folder' is not there.")
    (line,) = problems(f"init_adapter={tmp_path}", "model.lora_init=gaussian")
    assert line.endswith("conflicts with lora_init: 'gaussian'. Keep one.")


def test_weights_that_processes_share_need_an_optimizer_that_can(paths):
    typed = (*paths, "optimizer={_component_: bitsandbytes.optim.AdamW8bit, lr: 1e-4}")
    cfg = OmegaConf.merge(OmegaConf.load(YAML), OmegaConf.from_dotlist(typed))
    with pytest.raises(ConfigError, match=r"cannot update weights .* Set fsdp_replicas=2"):
        read(cfg, processes=2)
