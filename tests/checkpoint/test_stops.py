"""The stop ids come from a checkpoint's own files."""

import json

import pytest

from phi3_plugin.config import generation_config, stop_tokens
from phi3_plugin.errors import ConfigError
from tests.assets import assets_dir

TOKENS = {"<|endoftext|>": 32000, "<|assistant|>": 32001, "<|end|>": 32007, "<|user|>": 32010}
PHI3 = {"<|endoftext|>": 32000, "<|assistant|>": 32001, "<|end|>": 32007}


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


LAYOUTS = {
    "tokenizer": {"added_tokens": [{"content": t, "id": i} for t, i in TOKENS.items()]},
    "added_tokens": TOKENS,
    "tokenizer_config": {
        "added_tokens_decoder": {str(i): {"content": t} for t, i in TOKENS.items()}
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_file_that_lists_added_tokens_is_enough(tmp_path, name):
    write(tmp_path, **{name: LAYOUTS[name]})
    assert stop_tokens(tmp_path) == PHI3


def test_the_token_that_ends_a_sequence_is_one(tmp_path):
    tokens = {"</s>": 7, "<|im_end|>": 5, "<|im_start|>": 6}
    write(tmp_path, added_tokens=tokens, tokenizer_config={"eos_token": {"content": "</s>"}})
    assert stop_tokens(tmp_path) == {"<|im_end|>": 5, "</s>": 7}


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        (None, {"eos_token_id": 32000, "pad_token_id": 32000}, [32000, 32001, 32007]),
        ({"eos_token_id": 32007}, {}, [32007, 32000, 32001]),
        ({"eos_token_id": [32000]}, {}, [32000, 32001, 32007]),
        ({"eos_token_id": [32007, 5]}, {}, [32007, 5]),
        ({"temperature": 0.3}, {"eos_token_id": [9]}, [9, 32000, 32001, 32007]),
    ],
)
def test_ids_are_completed_unless_there_are_several(tmp_path, generation, config, stops):
    write(tmp_path, added_tokens=TOKENS, config=config)
    if generation is not None:
        write(tmp_path, generation_config=generation)
    found = generation_config(tmp_path)
    assert found["eos_token_id"] == stops
    assert {**found, **(generation or {}), "eos_token_id": stops} == found
    assert found.get("pad_token_id") == config.get("pad_token_id")


@pytest.mark.assets
@pytest.mark.parametrize("name", ["mini-4k", "mini-128k", "medium-4k"])
def test_published_files_give_the_published_ids(name):
    folder = assets_dir() / "models" / f"phi3-{name}-instruct"
    assert stop_tokens(folder) == PHI3
    assert sorted(generation_config(folder)["eos_token_id"]) == sorted(PHI3.values())


@pytest.mark.assets
def test_phi_4_mini_has_its_own():
    folder = assets_dir() / "models" / "phi4-mini-instruct"
    assert stop_tokens(folder) == {
        "<|endoftext|>": 199999,
        "<|assistant|>": 200019,
        "<|end|>": 200020,
    }


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "added_tokens.json").write_text(text)
    with pytest.raises(ConfigError, match=r"added_tokens\.json"):
        stop_tokens(tmp_path)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("added_tokens.json", {"<|end|>": "x"}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<|end|>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"text": "<|end|>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer.json", {"added_tokens": [{"content": "<|end|>"}]}),
    ],
)
def test_tokens_that_are_none_are_refused(tmp_path, name, keys):
    (tmp_path / name).write_text(json.dumps(keys))
    with pytest.raises(ConfigError, match="list added tokens in an unknown way"):
        stop_tokens(tmp_path)


@pytest.mark.parametrize("stop", ["32000", True, [1, "2"], 1.5])
def test_stops_that_are_no_numbers_are_refused(tmp_path, stop):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    with pytest.raises(ConfigError, match=r"eos_token_id: .* must be a whole number"):
        generation_config(tmp_path)
