"""Microsoft's dictionaries as an input: every key mapped, named in a note, or refused by name."""

import pytest
import torch
from omegaconf import OmegaConf

from phi3_plugin import settings
from phi3_plugin.errors import ConfigError
from phi3_plugin.import_config import HANDLED, NO_EFFECT, ONLY, SAME, translate
from phi3_plugin.models import lora_phi3_mini

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
    assert quant_type.startswith("bnb_config.bnb_4bit_quant_type: 'fp4', which it is if not given,")
    assert double.startswith("bnb_config.bnb_4bit_use_double_quant: False, which it is if not")
    with pytest.raises(ConfigError, match="bnb_config: True must be what BitsAndBytesConfig"):
        translate({**SAMPLE, "bnb_config": True})


def test_all_that_cannot_be_honoured_is_named():
    training = {"fp16": True, "lr_scheduler_type": "polynomial", "optim": "adafactor"}
    training |= {"learning_rat": 1, "num_train_epochs": 0.5, "eval_strategy": "epoch"}
    with pytest.raises(ConfigError) as error:
        translate({**sample(training, r=4, bias="some", lora_rank=3), "extra": 1})
    named = [line.partition(":")[0] for line in str(error.value).splitlines()]
    expected = ["extra", "fp16", "learning_rat", "num_train_epochs", "lr_scheduler_type", "optim"]
    assert named == [*expected, "eval_strategy", "peft_config.bias", "peft_config.lora_rank"]
    assert "Did you mean 'learning_rate'?" in str(error.value)


def test_both_dictionaries_must_be_there():
    with pytest.raises(ConfigError, match="has no peft_config"):
        translate({"training_config": {}})


def test_no_key_is_listed_twice():
    keys = [*SAME, *NO_EFFECT, *ONLY, *HANDLED]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("given", [{}, *(given for given, _ in CHOICES)])
def test_the_strict_settings_take_what_is_written(given, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    yaml = translate(sample(given)).yaml
    yaml |= {"checkpoint_dir": str(tmp_path / "base"), "output_dir": str(tmp_path / "out")}
    yaml["dataset"]["source"] = "chats.jsonl"
    read = settings.read(OmegaConf.create(yaml))
    assert read.model["lora_rank"] == 16 and read.optimizer["lr"] == 5e-6
