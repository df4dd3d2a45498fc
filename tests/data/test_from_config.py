"""Options as torchtune's configs hand them over: OmegaConf values, mistakes among them."""

import json

import pytest
from omegaconf import OmegaConf
from torchtune import config

from phi3_plugin.errors import ConfigError, DataError, MissingFileError


@pytest.fixture
def build(folder, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "the", "answer": "other"}) + "\n")

    def from_yaml(tokenizer="", dataset=""):
        text = f"""
tokenizer: {{_component_: phi3_plugin.data.phi3_tokenizer, path: '{folder}', max_seq_len: 64}}
dataset: {{_component_: phi3_plugin.data.chat_dataset, source: '{file}'}}
"""
        changes = OmegaConf.create(f"tokenizer: {{{tokenizer}}}\ndataset: {{{dataset}}}")
        cfg = OmegaConf.merge(OmegaConf.create(text), changes)
        config.validate(OmegaConf.create({"tokenizer": cfg.tokenizer}))
        return config.instantiate(cfg.dataset, config.instantiate(cfg.tokenizer))

    return from_yaml


def test_every_option(build):
    dataset = build(
        tokenizer="pad: unk, special_in_text: text, dropped: warn",
        dataset="columns: {user: answer, assistant: question}, packed: True, train_on: last, "
        "system_prompt: '', split: train, subset: null",
    )
    assert dataset[0]["tokens"][-1] == dataset.padding_idx


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("source: null", r"dataset\.source is not set"),
        ("format: 3", r"dataset\.format: 3 is unknown"),
        ("format: [messages]", r"dataset\.format: \['messages'\] is unknown"),
        ("columns: [q, a]", r"dataset\.columns: \['q', 'a'\] must name one column for user"),
        ("columns: {user: question}", r"dataset\.columns: .* must name one column for user"),
        ("columns: {user: q, assistant: 3}", r"dataset\.columns: .* must name one column"),
        ("columns: question", r"dataset\.columns: 'question' must name one column for user"),
        ("split: null", r"dataset\.split: None must be text"),
        ("split: [train]", r"dataset\.split: \['train'\] must be text"),
        ("subset: 2024", r"dataset\.subset: 2024 must be text"),
        ("packed: 'no'", r"dataset\.packed: 'no' must be True or False"),
        ("train_on: [last]", r"dataset\.train_on: \['last'\] must be one of"),
        ("system_prompt: [a]", r"dataset\.system_prompt: the system content is list"),
    ],
)
def test_mistakes_in_the_data_set(build, options, says):
    with pytest.raises(ConfigError, match=says):
        build(dataset=options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("path: null", "is not set"),
        ("pad: [unk]", r"tokenizer\.pad: \['unk'\] must be one of"),
        ("special_in_text: false", r"tokenizer\.special_in_text: False must be one of"),
        ("max_seq_len: 2k", r"tokenizer\.max_seq_len: '2k' must be a whole number"),
    ],
)
def test_mistakes_in_the_tokenizer(build, options, says):
    with pytest.raises(ConfigError, match=says):
        build(tokenizer=options)


def test_data_and_files(build):
    with pytest.raises(DataError, match="there is no 'prompt'"):
        build(dataset="format: prompt_response")
    with pytest.raises(MissingFileError, match="there is no file or folder"):
        build(dataset="source: ./rows.csv")


def test_columns_that_rows_do_not_have(build):
    with pytest.raises(DataError, match="there is no 'q'; the keys are: question, answer"):
        build(dataset="columns: {user: q, assistant: answer}")
