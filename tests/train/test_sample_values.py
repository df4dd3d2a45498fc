"""Values of a sample that serve nothing, or only together with others."""

import pytest

from phi3_plugin.errors import ConfigError
from phi3_plugin.import_config import translate
from tests.train.test_sample_config import SAMPLE, sample

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
    assert "bnb_4bit_compute_dtype: 'float32' has no effect: bf16 makes it bf16." in out.notes


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
