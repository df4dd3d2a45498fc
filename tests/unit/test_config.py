"""config.json is read strictly: every key is used, required, or known to be irrelevant."""

import json

import pytest

from phi3_plugin.config import (
    LongRoPE,
    Phi3Config,
    Rope,
    generation_config,
    parse_config,
    read_config,
    stop_tokens,
)
from phi3_plugin.errors import ConfigError, MissingFileError
from tests.assets import assets_dir
from tests.oracles import MEDIUM_4K, MINI_4K

LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
LONGER = {"max_position_embeddings": 131072}


def test_mini_4k():
    assert parse_config(MINI_4K) == Phi3Config(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32064,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope=Rope(theta=10000.0, rotary_dim=96),
        sliding_window=2047,
    )
    assert parse_config(MINI_4K).head_dim == 96


def test_medium_4k_has_grouped_heads():
    config = parse_config(MEDIUM_4K)
    assert (config.head_dim, config.qkv_size) == (128, 5120 + 2 * 1280)


def test_rope_parameters_of_transformers_5():
    keys = {k: v for k, v in MINI_4K.items() if k not in ("rope_theta", "rope_scaling")}
    keys["rope_parameters"] = {
        "rope_theta": 10000.0,
        "rope_type": "default",
        "partial_rotary_factor": 1.0,
    }
    assert parse_config(keys) == parse_config(MINI_4K)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'phi3'"),
        (
            {"model_type": "phi4flash"},
            r"'phi4flash' \(Phi-4-mini-flash-reasoning, whose layers are",
        ),
        ({"model_type": ["phi3"]}, r"model_type is \['phi3'\], expected"),
        ({"new_key": 3}, "new_key: 3 is an unknown key"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: 'yes' must be True or False"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.type: 'linear' is not supported"),
        ({"rope_scaling": {**LONG, "beta": 1}}, r"rope_scaling.beta: 1 is an unknown key"),
        ({"rope_scaling": {**LONG, "factor": -1}}, r"rope_scaling.factor: -1 must be a number"),
        ({"rope_scaling": {"type": "su"}}, "rope_scaling.short_factor: None factors, expected 48"),
        ({"rope_parameters": {**LONG, "long_factor": [1.0]}}, "long_factor: 1 factors, expected"),
        (
            {"rope_scaling": {**LONG, "long_factor": [0.0] * 48}},
            "rope_scaling.long_factor: every factor must be a number above 0",
        ),
        (
            {"rope_scaling": {**LONG, "original_max_position_embeddings": 2048}},
            "original_max_position_embeddings: 2048 differs from 4096 at the top",
        ),
        (
            {"rope_scaling": LONG, "original_max_position_embeddings": "4k"},
            "original_max_position_embeddings: '4k' must be at least 2",
        ),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: 1.5 must be above 0, at most 1"),
        ({"partial_rotary_factor": 0.33}, "partial_rotary_factor: 0.33 of 96 is not an even"),
        ({"hidden_size": None}, "hidden_size: null must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 must be a whole number"),
        ({"hidden_size": 3073}, "hidden_size: 3073 must be a multiple of num_attention_heads"),
        ({"num_key_value_heads": 5}, "num_attention_heads: 32 must be a multiple of num_key"),
        ({"sliding_window": 0}, "sliding_window: 0"),
        ({"rope_theta": None}, "rope_theta: None must be a number above 0"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({**MINI_4K, **change})


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINI_4K, "a": 1, "hidden_act": "gelu", "vocab_size": -1})
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_longrope_goes_by_three_names(name):
    scaling = parse_config(MINI_4K | LONGER | {"rope_scaling": LONG | {"type": name}}).rope.scaling
    assert scaling == LongRoPE((1.0,) * 48, (2.0,) * 48, 4096, pytest.approx(1.190238, abs=1e-6))


def test_longrope_of_older_and_newer_files_is_one():
    older = {**MINI_4K, **LONGER, "rope_scaling": LONG, "partial_rotary_factor": 1.0}
    newer = {k: v for k, v in older.items() if k not in ("rope_theta", "rope_scaling")}
    newer["rope_parameters"] = {**LONG, "rope_type": "longrope", "rope_theta": 10000.0}
    assert parse_config(newer) == parse_config(older)


def test_an_attention_factor_that_is_given_is_taken():
    keys = MINI_4K | LONGER
    given = parse_config(keys | {"rope_scaling": LONG | {"attention_factor": 1.5}})
    assert given.rope.scaling.attention_factor == 1.5
    stretched = parse_config(keys | {"rope_scaling": LONG | {"factor": 1.0}})
    assert stretched.rope.scaling.attention_factor == 1.0


@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "rotary_dim", "long", "tied"),
    [
        ("phi3-mini-4k-instruct", 96, False, False),
        ("phi3-medium-4k-instruct", 128, False, False),
        ("phi3-mini-128k-instruct", 96, True, False),
        ("phi3.5-mini-instruct", 96, True, False),
        ("phi4-mini-instruct", 96, True, True),
    ],
)
def test_published_files(name, rotary_dim, long, tied):
    config = read_config(assets_dir() / "models" / name)
    assert (config.rope.theta, config.rope.rotary_dim) == (10000.0, rotary_dim)
    assert (config.rope.scaling is not None, config.tie_word_embeddings) == (long, tied)


def test_a_folder_without_config_or_no_folder(tmp_path):
    with pytest.raises(MissingFileError, match=r"has no config\.json"):
        read_config(tmp_path)
    with pytest.raises(MissingFileError, match="nowhere is not a folder"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="checkpoint_dir is not set"):
        read_config(None)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_file_that_is_not_a_json_object(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="JSON"):
        read_config(tmp_path)


def test_errors_are_also_the_standard_library_kind(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="not set"):
        read_config(None)


def test_a_saved_transformers_config_is_read(tmp_path):
    from transformers import Phi3Config as HFConfig

    HFConfig(**MINI_4K).save_pretrained(tmp_path)
    keys = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in keys
    assert read_config(tmp_path) == parse_config(MINI_4K)


# Stop ids, which come from a checkpoint's own files.

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


HOSTILE = [
    "[" * 10_000,
    "[" * 10_000 + "]" * 10_000,
    f'{{"a": {"[" * 200 + "]" * 200}}}',
    f'{{"hidden_size": {"9" * 5000}}}',
    f'{{"hidden_size": {"9" * 1001}}}',
    "3",
    "",
]


@pytest.mark.parametrize("text", HOSTILE, ids=[text[:20] for text in HOSTILE])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "added_tokens.json"])
def test_hostile_json_is_one_error_that_names_the_file(tmp_path, name, text):
    (tmp_path / "config.json").write_text(json.dumps(MINI_4K))
    (tmp_path / name).write_text(text)
    read = read_config if name == "config.json" else generation_config
    with pytest.raises(ConfigError, match=rf"{name} (is not valid JSON|must hold)") as error:
        read(tmp_path)
    assert len(str(error.value)) < 300


def test_a_file_that_may_not_be_read_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(MINI_4K))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: Permission denied"):
        read_config(tmp_path)


def test_published_numbers_without_limit_are_read(tmp_path):
    limit = 1000000000000000019884624838656
    (tmp_path / "config.json").write_text(json.dumps(MINI_4K))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
    assert generation_config(tmp_path)["eos_token_id"] == [32000]


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": {"a": 1e999}},
        {"added_tokens.json": {"a": [1]}},
        {"tokenizer.json": {"added_tokens": {"a": 1}}},
        {"tokenizer.json": {"added_tokens": [1]}},
        {"tokenizer.json": {"added_tokens": [{"content": [], "id": 1}]}},
        {"tokenizer_config.json": {"added_tokens_decoder": [1]}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "a"}}}},
    ],
)
def test_tokens_listed_in_an_unknown_way(tmp_path, files):
    (tmp_path / "config.json").write_text(json.dumps(MINI_4K))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content).replace("Infinity", "1e999"))
    with pytest.raises(ConfigError, match="list added tokens in an unknown way"):
        generation_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10_000_000}, "num_hidden_layers: 10000000 must be at most"),
        ({"max_position_embeddings": 10**10}, "max_position_embeddings: 10000000000 must be at"),
        ({"vocab_size": 10**900}, "vocab_size: a number of 901 digits must be at most"),
        ({"hidden_size": 32 * 10**8}, "hidden_size: 3200000000 must be at most"),
        ({"intermediate_size": 10**9}, "intermediate_size: 1000000000 must be at most"),
        (
            {"rope_scaling": LONG, **LONGER, "original_max_position_embeddings": 10**10},
            "original_max_position_embeddings: 10000000000 must be at most",
        ),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"hidden_size": 3072.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": True}, "rope_theta"),
        ({"rope_theta": [1]}, "rope_theta"),
        ({"partial_rotary_factor": float("nan")}, "partial_rotary_factor"),
        ({"attention_dropout": float("nan")}, "attention_dropout"),
        ({"rope_scaling": [1]}, r"rope_scaling: \[1\] must be an object or null"),
        ({"rope_scaling": "su"}, "rope_scaling: 'su' must be an object or null"),
        ({"rope_scaling": {"type": []}}, "rope_scaling.type"),
        ({"rope_scaling": {**LONG, "factor": float("nan")}, **LONGER}, "rope_scaling.factor"),
        ({"num_key_value_heads": [8]}, "num_key_value_heads"),
        ({"sliding_window": "2047"}, "sliding_window"),
        ({"sliding_window": -1}, "sliding_window"),
    ],
    ids=str,
)
def test_hostile_sizes_and_values_are_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=rf"config\.json cannot be used:(.|\n)* {message}"):
        parse_config(MINI_4K | change)
