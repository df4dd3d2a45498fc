"""Adapters that other programs wrote, read as they compute."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from phi3_plugin.checkpoint.adapter import A, B
from phi3_plugin.checkpoint.base import hf_name
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError, MissingFileError
from phi3_plugin.proof import load_base_with_hf
from tests.adapters import BASES, PARTS, adapter, base_folder, merged_logits
from tests.chosen import some

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]

CASES = {
    "lora": {"target_modules": FUSED},
    "dora": {"target_modules": FUSED, "use_dora": True},
    "rslora": {"target_modules": FUSED, "use_rslora": True},
    "patterns": {
        "target_modules": FUSED,
        "rank_pattern": {"o_proj": 2, "model.layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"^model.layers.0.mlp.down_proj": 5, r"layers\.\d+\.mlp": 7},
    },
    "saved": {"target_modules": FUSED, "modules_to_save": ["lm_head", "embed_tokens"]},
    "embedding": {"target_modules": [*FUSED, "embed_tokens"]},
    "head": {"target_modules": [*FUSED, "lm_head"]},
    "layers": {"target_modules": FUSED, "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: base_folder(name, tmp_path_factory.mktemp("base") / name) for name in BASES}


def trained_by_peft(base, folder, **keys):
    """Return logits of an adapter that PEFT made, filled with random numbers and saved."""
    settings = LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **keys)
    model = get_peft_model(load_base_with_hf(base), settings).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "lora_" in name:
                parameter.normal_(std=0.1)
            elif "modules_to_save" in name:
                parameter.normal_(std=0.06)
        tokens = torch.randint(0, 150, (2, 17))
        model.save_pretrained(folder)
        return tokens, model(input_ids=tokens).logits


@pytest.mark.parametrize(
    ("base", "case"),
    some([(b, c) for b in BASES for c in CASES], ["gqa-patterns", "tied-embedding", "mini-dora"]),
)
def test_what_peft_trained_computes_the_same(bases, base, case, tmp_path):
    tokens, theirs = trained_by_peft(bases[base], tmp_path, **CASES[case])
    config = read_config(bases[base])
    read = read_adapter(tmp_path, config=config)
    ours = merged_logits(bases[base], read, config, tokens)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert read.base == str(bases[base])
    assert (read.origin == {"rslora": True}) == (case == "rslora")


def peft_folder(folder, tensors, **keys):
    """Write a folder as PEFT's with tensors under any names."""
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["o_proj"], **keys}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def peft_names(made, prefix="base_model.model.", end=".weight"):
    endings = {A: f".lora_A{end}", B: f".lora_B{end}"}
    return {
        prefix + hf_name(name.removesuffix(ending)) + theirs: value
        for name, value in made.tensors.items()
        for ending, theirs in endings.items()
        if name.endswith(ending)
    }


@pytest.fixture
def config(bases):
    return read_config(bases["gqa"])


@pytest.mark.parametrize(
    ("prefix", "end"),
    [
        ("base_model.model.", ".weight"),
        ("", ".weight"),
        ("base_model.model.", ".default.weight"),
        ("module.base_model.model._orig_mod.", ".weight"),
    ],
)
def test_parts_of_converted_bases_are_parts_of_fused_layers(config, prefix, end, tmp_path):
    made = adapter(config, PARTS)
    read = read_adapter(peft_folder(tmp_path, peft_names(made, prefix, end)), config=config)
    assert read.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(read.tensors[name], value) for name, value in made.tensors.items())
    assert set(read.scales.values()) == {3.0}


def test_a_pickled_adapter_of_peft_is_read_without_running_it(config, tmp_path):
    made = adapter(config, PARTS)
    peft_folder(tmp_path, peft_names(made))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    read = read_adapter(tmp_path, config=config)
    assert all(torch.equal(read.tensors[name], value) for name, value in made.tensors.items())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type: 'LOHA', only LORA"),
        ({"lora_bias": True}, "lora_bias: True is a feature"),
        ({"bias": "all"}, "bias: 'all' is a feature"),
        ({"use_qalora": True}, "use_qalora: True"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "corda"}, "init_lora_weights: 'corda' changes the base"),
        ({"from_the_future": 1}, "'from_the_future': 1 is an unknown key"),
        ({"r": 0}, "r: 0 must be a whole number"),
        ({"r": True}, "r: True must"),
        ({"r": 8}, "is said to have rank 8, but its tensors have 4"),
        ({"lora_alpha": -1}, "lora_alpha: -1 must be"),
        ({"lora_alpha": math.nan}, "lora_alpha: nan must be"),
        ({"lora_alpha": "16"}, "lora_alpha: '16' must be"),
        ({"lora_dropout": 2}, "lora_dropout: 2 must be"),
        ({"use_dora": True}, "use_dora is True, but no modules have magnitudes"),
        ({"alpha_pattern": {"(a+)+$": 3}}, r"alpha_pattern: '\(a\+\)\+\$': 3 is not read"),
        ({"alpha_pattern": {"(.|.)(.|.)(.|.)": 3}}, "is not read"),
        ({"alpha_pattern": {"[z-a]": 3}}, "is not read"),
        ({"rank_pattern": {"o_proj": 2.5}}, "rank_pattern: 'o_proj': 2.5 is not read"),
        ({"rank_pattern": [1]}, "rank_pattern: must be an object"),
        ({"rank_pattern": {str(i): 1 for i in range(2001)}}, "at most 2000"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(config, keys, message, tmp_path):
    folder = peft_folder(tmp_path, peft_names(adapter(config, PARTS)), **keys)
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder, config=config)


def test_another_alpha_than_the_file_says_is_refused(config, tmp_path):
    folder = peft_folder(tmp_path, peft_names(adapter(config, PARTS)))
    with pytest.raises(AdapterError, match=r"alpha: 8, but .* says 12"):
        read_adapter(folder, config=config, alpha=8)
    with pytest.raises(AdapterError, match=r"rank: 8, but .* has 4"):
        read_adapter(folder, config=config, rank=8)


def test_without_settings_alpha_must_be_given(config, tmp_path):
    folder = peft_folder(tmp_path, peft_names(adapter(config, PARTS)))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="does not say its alpha"):
        read_adapter(folder, config=config)
    assert set(read_adapter(folder, config=config, alpha=2).scales.values()) == {0.5}


def test_no_adapter_is_one_clear_error(config, tmp_path):
    with pytest.raises(MissingFileError, match="it is not an adapter folder"):
        read_adapter(tmp_path, config=config)
    with pytest.raises(MissingFileError, match="is not there"):
        read_adapter(tmp_path / "none.safetensors", config=config)
