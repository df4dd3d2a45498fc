"""Microsoft's dictionaries as an input: every key mapped, named in a note, or refused by name."""

import pytest
import torch
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model

from phi3_plugin import settings
from phi3_plugin.errors import ConfigError
from phi3_plugin.import_config import path, translate
from phi3_plugin.models import lora_phi3_mini
from tests.oracles import MINI_4K, TINY_MHA, hf_model

# What the sample script says, with the two values that it hands to its trainer.
SAMPLE = {
    "training_config": {
        "bf16": True,
        "do_eval": False,
        "learning_rate": 5.0e-06,
        "log_level": "info",
        "logging_steps": 20,
        "logging_strategy": "steps",
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1,
        "max_steps": -1,
        "output_dir": "./checkpoint_dir",
        "overwrite_output_dir": True,
        "per_device_eval_batch_size": 4,
        "per_device_train_batch_size": 4,
        "remove_unused_columns": True,
        "save_steps": 100,
        "save_total_limit": 1,
        "seed": 0,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "gradient_accumulation_steps": 1,
        "warmup_ratio": 0.2,
    },
    "peft_config": {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "target_modules": "all-linear",
        "modules_to_save": None,
    },
    "max_seq_length": 2048,
    "packing": True,
}
NOTEBOOK = ["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]


def sample(training=None, **peft):
    """Return the sample with some keys changed."""
    return {
        **SAMPLE,
        "training_config": {**SAMPLE["training_config"], **(training or {})},
        "peft_config": {**SAMPLE["peft_config"], **peft},
    }


def trainable(section):
    """Count what Phi-3-mini would train."""
    keys = {k: v for k, v in section.items() if k not in ("_component_", "checkpoint_dir")}
    with torch.device("meta"):
        model = lora_phi3_mini(**{k: v for k, v in keys.items() if k != "lora_dropout"})
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def test_smoothing_and_noise_are_ours():
    yaml = translate(sample({"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5})).yaml
    assert yaml["neftune_alpha"] == 5
    loss = {"_component_": "phi3_plugin.train.losses.sft", "label_smoothing": 0.1}
    assert yaml["loss"] == loss
    assert "loss" not in translate(sample({"label_smoothing_factor": 0.0})).yaml


def test_the_sample_script():
    out = translate(SAMPLE)
    assert out.yaml == {
        "checkpoint_dir": None,
        "output_dir": "./checkpoint_dir",
        "model": {
            "checkpoint_dir": "${checkpoint_dir}",
            "_component_": "phi3_plugin.models.lora_phi3",
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "lora_attn_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
            "apply_lora_to_mlp": True,
            "apply_lora_to_output": False,
        },
        "tokenizer": {
            "_component_": "phi3_plugin.data.phi3_tokenizer",
            "path": "${checkpoint_dir}",
            "max_seq_len": 2048,
        },
        "dataset": {
            "_component_": "phi3_plugin.data.chat_dataset",
            "source": None,
            "packed": True,
        },
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "epochs": 1,
        "seed": 0,
        "optimizer": {
            "_component_": "torch.optim.AdamW",
            "fused": True,
            "lr": 5.0e-06,
            "weight_decay": 0.0,
        },
        "lr_scheduler": {
            "_component_": "phi3_plugin.train.cosine_with_warmup",
            "warmup_ratio": 0.2,
        },
        "clip_grad_norm": 1.0,
        "dtype": "bf16",
        "adapter_dtype": "fp32",
        "enable_activation_checkpointing": True,
        "save_every_n_steps": 100,
        "save_every_epoch": False,
        "save_total_limit": 1,
        "resume": "never",
        "val_fraction": 0.0,
        "log_every_n_steps": 20,
    }
    named = [note.partition(":")[0] for note in out.notes]
    ignored = ["log_level", "overwrite_output_dir", "per_device_eval_batch_size"]
    assert named == [*ignored, "remove_unused_columns"]
    assert trainable(out.yaml["model"]) == 25_165_824


@pytest.mark.parametrize(
    ("targets", "layers", "count"),
    [
        ("as-published", ["o_proj", "down_proj"], 8_912_896),
        ("as-intended", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], 25_165_824),
        ("as-intended-parts", NOTEBOOK, 29_884_416),
    ],
)
def test_the_list_of_the_notebooks(targets, layers, count):
    out = translate(sample(target_modules=NOTEBOOK), targets)
    section = out.yaml["model"]
    assert section["lora_attn_modules"] == layers if targets != "as-intended" else True
    assert set(section["lora_attn_modules"]) == set(layers) and section["apply_lora_to_mlp"]
    assert trainable(section) == count
    lost = [note for note in out.notes if note.startswith("target_modules")]
    if targets == "as-published":
        assert lost == [
            "target_modules: these match nothing in a Phi-3: k_proj, q_proj, v_proj, gate_proj, "
            "up_proj. Their layers are fused: --targets as-intended."
        ]
    else:
        assert not lost


def test_some_parts_stay_parts_where_the_layer_is_not_meant():
    out = translate(sample(target_modules=["q_proj", "v_proj", "c_attn"]), "as-intended")
    assert out.yaml["model"]["lora_attn_modules"] == ["q_proj", "v_proj"]
    assert out.yaml["model"]["apply_lora_to_mlp"] is False
    assert "match nothing in a Phi-3: c_attn." in out.notes[-1]


def test_targets_of_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"matches no layer of a Phi-3.*--targets as-intended"):
        translate(sample(target_modules=["q_proj", "v_proj"]))


CHOICES = [
    ({"max_steps": 12}, {"max_steps": 12, "epochs": 12}),
    ({"num_train_epochs": 3.0}, {"epochs": 3}),
    ({"bf16": False}, {"dtype": "fp32"}),
    ({"save_strategy": "epoch"}, {"save_every_epoch": True, "save_every_n_steps": None}),
    ({"eval_strategy": "steps", "eval_steps": 7}, {"run_val_every_n_steps": 7}),
    ({"do_eval": True}, {"val_fraction": 0.05}),
    ({"load_best_model_at_end": True, "do_eval": True}, {"keep_best": True}),
    ({"max_grad_norm": 0, "save_total_limit": 0}, {"clip_grad_norm": None}),
]


@pytest.mark.parametrize(("given", "expected"), CHOICES)
def test_keys_that_decide_together(given, expected):
    yaml = translate(sample(given)).yaml
    assert {key: yaml[key] for key in expected} == expected


def test_schedule_and_optimizer():
    yaml = translate(sample({"lr_scheduler_type": "constant"})).yaml
    assert "lr_scheduler" not in yaml
    given = {"lr_scheduler_type": "linear", "warmup_steps": 5, "optim": "paged_adamw_32bit"}
    out = translate(sample({**given, "adam_beta2": 0.95}))
    assert out.yaml["lr_scheduler"] == {
        "_component_": "phi3_plugin.train.linear_with_warmup",
        "num_warmup_steps": 5,
    }
    assert out.yaml["optimizer"]["betas"] == [0.9, 0.95]
    assert out.yaml["optimizer"]["_component_"] == "torch.optim.AdamW"
    assert any("pages nothing out" in note for note in out.notes)


def test_an_nf4_base():
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    yaml = translate({**SAMPLE, "bnb_config": nf4}).yaml
    assert yaml["model"]["_component_"] == "phi3_plugin.models.qlora_phi3"
    with pytest.raises(ConfigError, match=r"bnb_config\.bnb_4bit_quant_type: 'fp4' must be"):
        translate({**SAMPLE, "bnb_config": {**nf4, "bnb_4bit_quant_type": "fp4"}})


def test_what_is_not_said_of_nf4_is_what_transformers_takes():
    with pytest.raises(ConfigError) as error:
        translate({**SAMPLE, "bnb_config": {"load_in_4bit": True}})
    quant_type, double = str(error.value).splitlines()
    assert quant_type.endswith("'fp4' must be 'nf4'. If it is not given, it is 'fp4'.")
    assert double.startswith("bnb_config.bnb_4bit_use_double_quant: False must be True.")
    with pytest.raises(ConfigError, match="bnb_config: True must be what BitsAndBytesConfig"):
        translate({**SAMPLE, "bnb_config": True})


def test_all_that_cannot_be_honoured_is_named():
    training = {"fp16": True, "lr_scheduler_type": "polynomial", "optim": "adafactor"}
    training |= {"learning_rat": 1, "num_train_epochs": 0.5, "eval_strategy": "epoch"}
    with pytest.raises(ConfigError) as error:
        translate({**sample(training, r=4, bias="some", lora_rank=3), "extra": 1})
    named = [line.partition(":")[0] for line in str(error.value).splitlines()]
    expected = ["extra", "fp16", "learning_rat", "num_train_epochs", "lr_scheduler_type", "optim"]
    expected += ["eval_strategy", "peft_config.bias", "peft_config.lora_rank"]
    assert sorted(named) == sorted(expected)
    assert "Did you mean 'learning_rate'?" in str(error.value)


def test_both_dictionaries_must_be_there():
    with pytest.raises(ConfigError, match="has no peft_config"):
        translate({"training_config": {}})


@pytest.mark.parametrize("given", [{}, *(given for given, _ in CHOICES)])
def test_the_strict_settings_take_what_is_written(given, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    yaml = translate(sample(given)).yaml
    yaml |= {"checkpoint_dir": str(tmp_path / "base"), "output_dir": str(tmp_path / "out")}
    yaml["dataset"]["source"] = "chats.jsonl"
    read = settings.read(OmegaConf.create(yaml))
    assert read.model["lora_rank"] == 16 and read.optimizer["lr"] == 5e-6


# Names, against what PEFT finds under them in a Phi-3.


@pytest.fixture(scope="module")
def hf():
    return hf_model(MINI_4K, **TINY_MHA)


def adapted_by_peft(hf, **keys):
    """Return layer, target and rank of each adapter that PEFT makes."""
    with torch.device("meta"):
        model = get_peft_model(hf, LoraConfig(r=4, **keys))
    found = {
        (path(name.removeprefix("base_model.model.")), module.r["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    model.unload()
    return found


@pytest.mark.parametrize(
    "target_modules",
    [
        ["qkv_proj", "self_attn.o_proj"],
        ["mlp.down_proj", "q_proj"],
        ["lm_head", "model.embed_tokens", "o_proj"],
        ["mlp.o_proj", "o_proj.", "down_proj"],
    ],
)
def test_names_are_those_that_peft_finds(hf, target_modules):
    section = translate(sample(target_modules=target_modules)).yaml["model"]
    ours = {*section["lora_attn_modules"]}
    ours |= {"lm_head"} if section["apply_lora_to_output"] else set()
    ours |= {"embed_tokens"} if section.get("apply_lora_to_embedding") else set()
    assert ours == {target for (_, target), _ in adapted_by_peft(hf, target_modules=target_modules)}


def test_ranks_are_those_that_peft_gives(hf):
    given = {"layers.1.self_attn.o_proj": 2, "0.mlp.down_proj": 3, "self_attn.qkv_proj": 5}
    keys = {"target_modules": ["qkv_proj", "o_proj", "down_proj"], "rank_pattern": given}
    ours = translate(sample(**keys)).yaml["model"]["rank_pattern"]
    assert ours == {"1.o_proj": 2, "0.down_proj": 3, "qkv_proj": 5}
    for (layer, target), rank in adapted_by_peft(hf, **keys):
        assert rank == ours.get(f"{layer}.{target}", ours.get(target, 4))


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"target_modules": "o_proj"}, "'o_proj' is a pattern for PEFT. List the names"),
        ({"target_modules": ["o_proj", "norm"]}, "'norm' is no linear layer"),
        ({"target_modules": ["layers.1.mlp.down_proj"]}, "is in one layer. Name 'down_proj'"),
        ({"rank_pattern": {"^.*o_proj": 2}}, r"rank_pattern: '\^\.\*o_proj' is no layer"),
        ({"rank_pattern": {"3.o_proj": 2}}, "rank_pattern: '3.o_proj' is no layer"),
        (
            {"alpha_pattern": {"o_proj": 2, "layers.1.self_attn.o_proj": 3}},
            "alpha_pattern: 'layers.1.self_attn.o_proj' is never reached after 'o_proj'",
        ),
    ],
)
def test_what_peft_reads_otherwise_is_refused(keys, match):
    with pytest.raises(ConfigError, match=match):
        translate(sample(**keys))


def test_a_name_of_nothing_stays_in_its_line():
    note = translate(sample(target_modules=["o_proj", "x\nseed: 5"])).notes[-1]
    assert note == r"target_modules: these match nothing in a Phi-3: 'x\nseed: 5'."


def test_a_layer_that_is_named_beside_its_parts_is_there_once():
    targets = ["qkv_proj", "q_proj", "up_proj"]
    section = translate(sample(target_modules=targets), "as-intended").yaml["model"]
    assert section["lora_attn_modules"] == ["qkv_proj", "up_proj"]


# Values that serve nothing, or only together with others.

WRONG = [
    *({"max_steps": value} for value in ("10", None)),
    *({"num_train_epochs": value} for value in ("x", None, 0)),
    *({key: ["x"]} for key in ("lr_scheduler_type", "optim", "eval_strategy")),
    *({key: 0.1} for key in ("save_steps", "logging_steps", "eval_steps")),
    *({"warmup_ratio": value} for value in (2, "x")),
    *({"output_dir": value} for value in ({"_component_": "os.system"}, "${oc.env:HOME}", "???")),
    *({key: "false"} for key in ("bf16", "gradient_checkpointing", "group_by_length")),
    {"adam_beta1": "x"},
    {"learning_rate": float("nan")},
    {"load_best_model_at_end": True},
    {"seed": -1},
]


@pytest.mark.parametrize("given", WRONG)
def test_a_value_that_serves_nothing_is_one_line_under_its_own_name(given):
    with pytest.raises(ConfigError) as error:
        translate(sample(given))
    assert str(error.value).startswith(f"{next(iter(given))}: ")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "given",
    [
        *({"r": value} for value in (0, None, "8")),
        *({"lora_alpha": value} for value in (0, 1.5)),
        *({"target_modules": value} for value in (5, [1, {}])),
        {"lora_dropout": None},
        {"use_rslora": "false"},
        {"modules_to_save": "lm_head"},
        {"init_lora_weights": ["x"]},
        {"init_lora_weight": False},
    ],
)
def test_a_value_that_peft_does_not_take_is_never_replaced(given):
    with pytest.raises(ConfigError, match=rf"^peft_config\.{next(iter(given))}: ") as error:
        translate(sample(**given))
    assert len(str(error.value).splitlines()) == 1


def test_starts_that_need_another_base_are_refused():
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    with pytest.raises(ConfigError, match="init_lora_weights: 'pissa' needs a base that is not"):
        translate({**sample(init_lora_weights="pissa"), "bnb_config": nf4})
    with pytest.raises(ConfigError, match="init_lora_weights: 'loftq' makes up for what NF4"):
        translate(sample(init_lora_weights="loftq"))
    out = translate({**sample(init_lora_weights="loftq"), "bnb_config": nf4})
    assert out.yaml["model"]["lora_init"] == "loftq"
    assert "bnb_4bit_compute_dtype: 'float32' has no effect: dtype is bf16." in out.notes


def test_fp16_is_ours():
    out = translate(sample({"fp16": True, "bf16": False}))
    assert out.yaml["dtype"] == "fp16"
    with pytest.raises(ConfigError, match="fp16: True conflicts with bf16: True"):
        translate(sample({"fp16": True, "bf16": True}))


def test_a_length_of_its_own_and_no_other():
    with pytest.raises(ConfigError, match="max_seq_length and max_length: 2048 and 512 differ"):
        translate(sample({"max_length": 512}))
    short = {key: value for key, value in SAMPLE.items() if key != "max_seq_length"}
    with pytest.raises(ConfigError, match="packing: True needs the length of a pack"):
        translate(short)


def test_a_warm_up_below_one_step_is_a_share():
    schedule = translate(sample({"warmup_steps": 0.1})).yaml["lr_scheduler"]
    assert schedule["warmup_ratio"] == 0.1 and "num_warmup_steps" not in schedule


def test_one_layer_alone():
    assert translate(sample(layers_to_transform=1)).yaml["model"]["layers_to_transform"] == [1]
