import json
import logging
import warnings

import pytest
import torch
from phi3_plugin.recipes import phi3_demo as task
from phi3_plugin.recipes.phi3_demo_checkpoint import ADDED_TOKENS, build_checkpoint
from tokenizers import Tokenizer
from torchtune.data import Message

from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.checkpoint.check import hf_tokenizer, load_base_with_hf
from phi3_plugin.config import read_config
from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.models import phi3
from tests.assets import assets_dir

CHAT = [
    {"role": "system", "content": "Be brief."},
    *task.chat("kfaqz")["messages"],
    {"role": "user", "content": "Grüße,\n  and 2 + 2?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    build_checkpoint(folder, words=task.words())
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_transformers_loads_it_without_a_word(folder, caplog):
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, tokenizer = load_base_with_hf(folder), hf_tokenizer(folder)
    finally:
        transformers_log.removeHandler(caplog.handler)
    loud = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert not [r for r in loud if r.name.startswith("transformers")]
    assert type(model).__name__ == "Phi3ForCausalLM"
    assert tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == [
        tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|assistant|>", "<|end|>")
    ]


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "whole"])
def test_ids_follow_phi3s_rules(folder, prompt):
    tokenizer = hf_tokenizer(folder)
    chat = task.chat("kfaqz")["messages"][: 1 if prompt else 2]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]
    # No BOS, no newline after a role token or <|end|>, one token a word.
    expected = ["<|user|>", "▁Reverse:", "▁k", "▁f", "▁a", "▁q", "▁z", "<|end|>", "<|assistant|>"]
    if not prompt:
        expected += ["▁z", "▁q", "▁a", "▁f", "▁k", "<|end|>", "<|endoftext|>"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected


def test_ids_are_equal_in_transformers_tokenizers_and_here(folder):
    hf, raw = hf_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = hf.apply_chat_template(CHAT, tokenize=False)
    ids = hf.apply_chat_template(CHAT)["input_ids"]
    assert raw.encode(text).ids == ids
    messages = [Message(role=m["role"], content=m["content"]) for m in CHAT]
    assert phi3_tokenizer(folder).tokenize_messages(messages)[0] == ids


def test_text_survives_bytes_and_spaces(folder):
    tokenizer = hf_tokenizer(folder)
    text = "Grüße,  12 × 3 → ok\n\ttab"
    ids = tokenizer(text)["input_ids"]
    assert "<unk>" not in tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer.decode(ids) == text


def test_our_model_takes_every_weight(folder):
    model = phi3(folder)
    model.load_state_dict(load_base_weights(folder))
    ids = torch.arange(17)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), load_base_with_hf(folder)(ids).logits)


def test_weights_lie_in_shards_under_an_index(folder):
    index = read(folder, "model.safetensors.index.json")
    files = {file.name for file in folder.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert len(files) == 2
    assert index["metadata"]["total_size"] == 4 * load_base_with_hf(folder).num_parameters()


def test_equal_seeds_give_equal_files(folder, tmp_path):
    build_checkpoint(tmp_path, words=task.words())
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_vocabulary_is_rounded_up_as_in_phi3(folder):
    config = read_config(folder)
    tokens = len(hf_tokenizer(folder))
    assert tokens < config.vocab_size < tokens + 64
    assert config.vocab_size % 64 == 0
    assert config.head_dim % 2 == 0


@pytest.mark.assets
@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"],
)
def test_files_differ_from_the_published_ones_in_sizes_and_ids_only(folder, name):
    ours, published = (read(where, name) for where in (folder, mini_4k()))
    published.pop("auto_map", None)  # remote code, which nothing needs any more
    assert ours.keys() == published.keys()
    changed = {key for key in ours if ours[key] != published[key]}
    assert changed <= {
        *("_name_or_path", "torch_dtype", "added_tokens_decoder", "model_max_length"),
        *("eos_token_id", "pad_token_id", "vocab_size", "hidden_size", "intermediate_size"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "sliding_window"),
        *("max_position_embeddings", "original_max_position_embeddings"),
    }


@pytest.mark.assets
def test_tokenizer_has_the_structure_of_the_published_one(folder):
    ours, published = (read(where, "tokenizer.json") for where in (folder, mini_4k()))
    for content in (ours, published):
        del content["model"]["vocab"], content["model"]["merges"]
        for token in content["added_tokens"]:
            del token["id"]
    ours["model"].pop("ignore_merges")  # newer than the published file
    assert ours == published


@pytest.mark.assets
def test_added_tokens_have_the_published_flags_and_order(folder):
    decoders = [
        read(where, "tokenizer_config.json")["added_tokens_decoder"]
        for where in (folder, mini_4k())
    ]
    ours, published = (list(decoder.values()) for decoder in decoders)
    assert ours == published
    assert list(read(folder, "added_tokens.json")) == [text for text, _ in ADDED_TOKENS]


def mini_4k():
    return assets_dir() / "models" / "phi3-mini-4k-instruct"
