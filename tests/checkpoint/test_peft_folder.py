"""Adapter folders that are broken or malicious are refused without opening anything."""

import json

import pytest
import torch
from safetensors.torch import save_file

from phi3_plugin.checkpoint.peft import is_plain, read_peft_folder, split_name
from phi3_plugin.errors import AdapterError, CheckpointError, MissingFileError

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]}
NAME = "base_model.model.model.layers.0.self_attn.o_proj"


@pytest.fixture
def folder(tmp_path):
    tensors = {f"{NAME}.lora_A.weight": torch.ones(4, 8), f"{NAME}.lora_B.weight": torch.ones(8, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return said(tmp_path)


def said(folder, **keys):
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **keys}))
    return folder


def test_what_a_folder_says(folder):
    adapter = read_peft_folder(said(folder, rank_pattern={"o_proj": 4}, alpha_pattern={"q": 1}))
    module = "model.layers.0.self_attn.o_proj"
    assert (adapter.adapted, adapter.ranks) == ([module], {module: 4})
    assert (adapter.scale(module), adapter.targeted(module)) == (2.0, True)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type: 'IA3' is not a LoRA adapter"),
        ({"r": "16"}, "r: '16' must be a number above 0"),
        ({"r": float("nan")}, "r: nan must be a number above 0"),
        ({"r": 0, "lora_alpha": True}, "lora_alpha: True must be a number"),
        ({"rank_pattern": [1]}, "rank_pattern: must be an object"),
        ({"rank_pattern": dict.fromkeys(map(str, range(2001)), 4)}, "at most 2000 names"),
        ({"rank_pattern": 5}, "rank_pattern: must be an object"),
        ({"alpha_pattern": {"o_proj": None}}, "alpha_pattern.o_proj: None"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "is not read"),
        ({"target_modules": [1]}, "target_modules"),
        ({"exclude_modules": [1]}, "exclude_modules"),
        ({"exclude_modules": "(a+)+$"}, "exclude_modules: .* is not read"),
        ({"layers_to_transform": "0"}, "layers_to_transform: '0' must be a number or a list"),
        ({"layers_to_transform": [True]}, "layers_to_transform"),
        ({"layers_pattern": "h"}, "layers_pattern: 'h' is not where a Phi-3 has its layers"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: a feature of PEFT that"),
    ],
)
def test_configurations_that_say_nothing(folder, keys, match):
    with pytest.raises(AdapterError, match=match):
        read_peft_folder(said(folder, **keys))


def test_patterns_that_take_long_are_not_matched(folder):
    assert not is_plain("(a+)+$") and not is_plain("(" * 301) and not is_plain("(")
    assert is_plain(r".*\.(q_proj|o_proj)") and is_plain("o_proj")
    adapter = read_peft_folder(said(folder, target_modules="(.*.*.*.*)+x"))
    assert adapter.targeted("model.layers.0.self_attn.o_proj")


@pytest.mark.parametrize("excluded", [["o_proj"], r".*\.o_proj", ["layers.0.self_attn.o_proj"]])
def test_modules_that_are_excluded_are_not_targeted(folder, excluded):
    adapter = read_peft_folder(said(folder, exclude_modules=excluded))
    assert not adapter.targeted("model.layers.0.self_attn.o_proj")
    keys = {"layers_to_transform": [0], "layers_pattern": ["layers"], "exclude_modules": ["o"]}
    adapter = read_peft_folder(said(folder, **keys))
    assert adapter.targeted("model.layers.0.self_attn.o_proj")


def test_a_file_is_no_folder(folder):
    with pytest.raises(MissingFileError, match="is no folder"):
        read_peft_folder(folder / "adapter_model.safetensors")


def test_files_that_are_missing_or_damaged(folder, tmp_path):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        read_peft_folder(folder)
    weights.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        read_peft_folder(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(MissingFileError, match=r"adapter_model\.bin.*not opened here"):
        read_peft_folder(folder)
    for text, match in (
        ("{", "not valid JSON"),
        ("[" * 9999, "not valid JSON"),
        ("[]", "must hold"),
    ):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match=match):
            read_peft_folder(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(MissingFileError, match=r"has no adapter_config\.json"):
        read_peft_folder(folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.lm_head.lora_A.weight", ("lm_head", "A")),
        ("base_model.model.model.embed_tokens.lora_embedding_B", ("model.embed_tokens", "B")),
        (f"{NAME}.lora_magnitude_vector", ("model.layers.0.self_attn.o_proj", "magnitude")),
        (f"{NAME}.base_layer.weight", ("model.layers.0.self_attn.o_proj", "base")),
        ("base_model.model.lm_head.weight", ("lm_head", "saved")),
        ("model.lm_head.lora_A.weight", ("model.lm_head.lora_A.weight", None)),
    ],
)
def test_names_of_tensors(name, expected):
    assert split_name(name) == expected
