"""Reading shards: what is wrong is named, all of it, before anything is loaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi3_plugin.checkpoint.hf import INDEX, load_base_weights
from phi3_plugin.checkpoint.names import to_ours
from phi3_plugin.errors import CheckpointError, ConfigError, MissingFileError
from tests.oracles import MINI_4K, TINY_MHA, hf_model, save_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model = hf_model(MINI_4K, **TINY_MHA)
    folder = save_checkpoint(model, MINI_4K, tmp_path_factory.mktemp("base"), **TINY_MHA)
    return model, folder


@pytest.fixture
def folder(source, tmp_path):
    return shutil.copytree(source[1], tmp_path / "copy")


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_every_tensor_bit_for_bit(source):
    model, folder = source
    loaded = load_base_weights(folder)
    expected = {to_ours(name): value for name, value in model.state_dict().items()}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_one_file_without_an_index(source, tmp_path):
    model, folder = source
    shutil.copy(folder / "config.json", tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert len(load_base_weights(tmp_path)) == len(model.state_dict())


def test_missing_unexpected_and_misshaped_at_once(folder):
    def change(tensors):
        name = next(n for n in tensors if n.endswith("down_proj.weight"))
        tensors["model.layers.9.extra.weight"] = tensors.pop(name)
        norm = next(n for n in tensors if "norm" in n)
        tensors[norm] = torch.ones(7)

    edit(shards(folder)[1], change)
    with pytest.raises(CheckpointError) as caught:
        load_base_weights(folder)
    text = str(caught.value)
    assert "missing: model.layers." in text
    assert "unexpected: model.layers.9.extra.weight" in text
    assert "is [7], expected [64]" in text


def test_a_missing_shard(folder):
    shards(folder)[1].unlink()
    with pytest.raises(MissingFileError, match=r"not there: model-00002-of-00003\.safetensors"):
        load_base_weights(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_a_truncated_shard(folder, keep):
    shard = shards(folder)[0]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model-00001.*damaged or cut short"):
        load_base_weights(folder)


def test_a_shard_that_the_index_does_not_name(folder):
    shutil.copy(shards(folder)[0], folder / "model-00001-of-00009.safetensors")
    with pytest.raises(CheckpointError, match=r"does not name: model-00001-of-00009"):
        load_base_weights(folder)


def test_a_tensor_in_another_shard_than_the_index_says(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-00003.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"misplaced: model\.embed_tokens\.weight"):
        load_base_weights(folder)


def test_an_index_that_leaves_the_folder(folder):
    index = {"weight_map": {"lm_head.weight": "../other/model.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_base_weights(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="is not a shard index"):
        load_base_weights(folder)


def test_no_weights_and_pickles(folder):
    for file in (*shards(folder), folder / INDEX):
        file.unlink()
    with pytest.raises(MissingFileError, match="Download the checkpoint's"):
        load_base_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(MissingFileError, match="pickles: convert them to safetensors"):
        load_base_weights(folder)


def test_a_llama_folder(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    with pytest.raises(ConfigError, match="model_type is 'llama'"):
        load_base_weights(folder)
