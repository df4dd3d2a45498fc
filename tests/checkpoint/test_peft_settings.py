"""Settings of a stranger: what they say counts, and they cost neither time nor screens of text."""

import json
import time

import pytest

from phi3_plugin.checkpoint.peft import read_settings
from phi3_plugin.errors import AdapterError

GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 12}


def settings(folder, **keys):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**GOOD, **keys}))
    return read_settings(file)


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
        assert read.scale(f"model.layers.{layer}.self_attn.o_proj", 4) == 3.0
    assert time.perf_counter() - start < 10  # a minute where each is compiled anew


def test_a_rank_that_is_not_the_tensors_is_said_in_short(tmp_path):
    with pytest.raises(AdapterError, match=r"is said to have rank 1000+\.\.\., but its") as error:
        settings(tmp_path, r=10**300).scale("model.layers.0.self_attn.o_proj", 4)
    assert len(str(error.value)) < 400
