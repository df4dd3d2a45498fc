"""What options of LoRA may not be; what they do is in tests/contract/test_logits_variants.py."""

import pytest

from phi3_plugin.errors import AdapterError
from phi3_plugin.models.lora_settings import TARGETS, LoRASettings

ALL = list(TARGETS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_attn_modules": ["w2"]}, "'w2' is called 'down_proj' here.*Available: qkv"),
        ({"lora_attn_modules": ["foo"]}, "'foo' matches no linear layer.*Available: qkv_proj"),
        ({"lora_attn_modules": []}, "lora_attn_modules: empty"),
        ({"apply_lora_to_mlp": True}, r"apply_lora_to_mlp: True disagrees.*add gate_up_proj"),
        ({"lora_attn_modules": ALL}, r"apply_lora_to_mlp: False disagrees.*Set it to True"),
        ({"lora_rank": 0}, "lora_rank: 0 must be a whole number above 0"),
        ({"lora_rank": -4}, "lora_rank: -4"),
        ({"lora_rank": 1.5}, "lora_rank: 1.5"),
        ({"lora_alpha": 0.5}, "lora_alpha: 0.5 must be a whole number"),
        ({"lora_dropout": 1.0}, "lora_dropout: 1.0 must be at least 0 and below 1"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(AdapterError, match=message):
        LoRASettings(**{"lora_attn_modules": ["o_proj"], **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora_attn_modules": ["v_proj", "qkv_proj", "q_proj"]},
            r"lora_attn_modules: 'qkv_proj' and its parts 'q_proj', 'v_proj' .*Keep either",
        ),
        (
            {"lora_attn_modules": ["up_proj", "gate_up_proj"], "apply_lora_to_mlp": True},
            r"'gate_up_proj' and its part 'up_proj' .*Keep either",
        ),
        (
            {"lora_attn_modules": ["o_proj", "k_proj"], "use_dora": True},
            r"use_dora: True needs whole layers, but lora_attn_modules has 'k_proj'.*'qkv_proj'",
        ),
        ({"lora_attn_modules": ["up_proj"]}, "apply_lora_to_mlp: False disagrees.*Set it to True"),
        ({"apply_lora_to_mlp": True}, "apply_lora_to_mlp: True disagrees"),
        ({"lora_attn_modules": ["w1"]}, "'w1' is called 'gate_proj' here.*Available: qkv_proj"),
        ({"lora_attn_modules": ["w3"]}, "'w3' is called 'up_proj' here"),
        ({"lora_attn_modules": ["output_proj"]}, "'output_proj' is called 'o_proj' here"),
    ],
)
def test_wrong_parts_of_layers_are_one_line_each(settings, message):
    with pytest.raises(AdapterError, match=message) as caught:
        LoRASettings(**{"lora_attn_modules": ["q_proj"], **settings})
    assert len(str(caught.value).splitlines()) == 1


def test_all_wrong_settings_are_reported_at_once():
    with pytest.raises(AdapterError) as caught:
        LoRASettings(["w1", "foo"], lora_rank=0, lora_alpha=-1, lora_dropout=2)
    assert len(str(caught.value).splitlines()) == 5
