"""Our own folders read back, and what adapter_config.json of a stranger says."""

import json
import time

import pytest
import torch
import yaml
from safetensors.torch import save_file

from phi3_plugin.checkpoint.peft import WEIGHTS, load_note, model_card
from phi3_plugin.checkpoint.peft_config import read_peft_config
from phi3_plugin.errors import AdapterError, CheckpointError, MissingFileError

NAME = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"


def test_a_damaged_file_is_one_clear_error(tmp_path):
    with pytest.raises(MissingFileError, match="it is not an adapter folder"):
        load_note(tmp_path)
    save_file({NAME: torch.ones(4, 8)}, tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} is damaged or cut short: .* Copy it"):
        load_note(tmp_path)


@pytest.mark.parametrize("note", ["{", "[]", "[" * 100_000, "3"])
def test_a_note_of_others_is_none(tmp_path, note):
    save_file({NAME: torch.ones(4, 8)}, tmp_path / WEIGHTS, metadata={"phi3_plugin": note})
    assert load_note(tmp_path) == {}


GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 12}


def settings(folder, **keys):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**GOOD, **keys}))
    return read_peft_config(file)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_rslora": "false"}, "use_rslora: 'false' must be true or false"),
        ({"use_dora": 1}, "use_dora: 1 must be true or false"),
        (
            {"base_model_name_or_path": {"a": 1}},
            r"base_model_name_or_path: \{'a': 1\} must be text",
        ),
        ({"lora_alpha": 10**400}, r"lora_alpha: 1000+\.\.\. must be a number"),
        ({"lora_alpha": 1e-320}, "lora_alpha: 1e-320 must be a number"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(tmp_path, keys, message):
    with pytest.raises(AdapterError, match=message):
        settings(tmp_path, **keys)


def test_of_many_problems_the_first_are_listed(tmp_path):
    with pytest.raises(AdapterError, match=r"and 49980 more$") as error:
        settings(tmp_path, **{f"key{i}": 1 for i in range(50_000)})
    assert len(str(error.value)) < 3000


def test_many_patterns_take_little_time(tmp_path):
    names = {f"layers.{i}.mlp.x_proj": 3 for i in range(2000)}
    read = settings(tmp_path, rank_pattern=names, alpha_pattern=names)
    start = time.perf_counter()
    for layer in range(100):
        assert read.scale(f"model.layers.{layer}.self_attn.o_proj") == 3.0
    assert time.perf_counter() - start < 10  # a minute where each is compiled anew


@pytest.mark.parametrize("base", ["a/b", "@home: #1", "yes", "1e3", "a\nb: [", "x" * 300, "- é"])
def test_the_front_matter_is_yaml_whatever_the_base_is_called(base):
    config = {"base_model_name_or_path": base, "use_dora": False, "target_modules": ["o_proj"]}
    card = model_card({**config, "r": 4, "lora_alpha": 8, "lora_dropout": 0.0}, {})
    _, matter, text = card.split("---\n", 2)
    facts = yaml.safe_load(matter)
    assert facts.get("base_model") == (base if base == "a/b" else None)  # the hub takes no other
    assert facts["tags"] == ["lora", "phi3", "torchtune"]
    assert text.startswith(f"\n# LoRA adapter for {' '.join(base.split())}\n")
