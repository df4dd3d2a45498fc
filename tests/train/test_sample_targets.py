"""Names in a `peft_config`, against what PEFT finds under them in a Phi-3."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from phi3_plugin.errors import ConfigError
from phi3_plugin.import_config import path, translate
from tests.oracles import MINI_4K, TINY_MHA, hf_model
from tests.train.test_sample_config import sample


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
