"""Reading shards: what is wrong is named, all of it, before anything is loaded."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from phi3_plugin.checkpoint.base import (
    INDEX,
    load_base_weights,
    open_weights,
    row_norms,
    save_weights,
    to_hf,
    to_ours,
)
from phi3_plugin.errors import CheckpointError, ConfigError, MissingFileError
from tests.oracles import MINI_4K, TINY_MHA, hf_logits, hf_model, save_checkpoint


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


def ours(model):
    return {to_ours(name): value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("load", [load_base_weights, open_weights])
def test_every_tensor_bit_for_bit(source, load):
    model, folder = source
    loaded, expected = load(folder), ours(model)
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert (loaded[name].shape, loaded[name].dtype) == (value.shape, value.dtype)
        assert torch.equal(loaded[name][:], value), name


def test_weights_that_are_not_floating_point_numbers(folder):
    edit(shards(folder)[0], lambda tensors: tensors.update({n: tensors[n].char() for n in tensors}))
    with pytest.raises(CheckpointError, match=r"not in BF16, F16.*embed_tokens\.weight is I8"):
        open_weights(folder)


def test_norms_of_rows(source):
    model, folder = source
    weight = ours(model)["layers.1.attn.qkv_proj.weight"]
    assert torch.equal(row_norms(folder, "layers.1.attn.qkv_proj"), weight.norm(dim=1))


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


TIED = {**TINY_MHA, "tie_word_embeddings": True}


@pytest.fixture
def tied(tmp_path):
    model = hf_model(MINI_4K, **TIED)
    return model, save_checkpoint(model, MINI_4K, tmp_path / "tied", **TIED)


def add_head(folder, head):
    save_file({"lm_head.weight": head}, folder / "model-head.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-head.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("load", [load_base_weights, open_weights])
@pytest.mark.parametrize("with_copy", [False, True])
def test_a_tied_head_is_the_embedding_alone(tied, load, with_copy):
    model, folder = tied
    if with_copy:
        add_head(folder, model.lm_head.weight.detach().clone())
    loaded, expected = load(folder), ours(model)
    assert torch.equal(expected.pop("output.weight"), expected["tok_embeddings.weight"])
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name][:], value) for name, value in expected.items())


@pytest.mark.parametrize("cast", [lambda head: head + 1e-3, lambda head: head.bfloat16()])
def test_a_tied_head_that_is_not_the_embedding_is_refused(tied, cast):
    model, folder = tied
    add_head(folder, cast(model.lm_head.weight.detach()))
    with pytest.raises(CheckpointError, match=r"not tied: lm_head\.weight differs from model\."):
        open_weights(folder)


def test_an_untied_folder_without_a_head_is_refused(tied):
    _, folder = tied
    (folder / "config.json").write_text(json.dumps({**MINI_4K, **TINY_MHA}))
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        open_weights(folder)


def test_a_tied_folder_without_the_embedding_is_refused(tied):
    model, folder = tied
    add_head(folder, model.lm_head.weight.detach().clone())
    for shard in shards(folder):
        edit(shard, lambda tensors: tensors.pop("model.embed_tokens.weight", None))
    with pytest.raises(CheckpointError, match=r"missing: model\.embed_tokens\.weight"):
        open_weights(folder)


@pytest.mark.parametrize("sizes", [TINY_MHA, TIED], ids=["untied", "tied"])
def test_transformers_loads_what_we_save(tmp_path, sizes, caplog, monkeypatch):
    model = hf_model(MINI_4K, **sizes)
    base = save_checkpoint(model, MINI_4K, tmp_path / "base", **sizes)
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(base / "config.json", out)
    save_weights(out, load_base_weights(base), shard_bytes=50_000)
    names = json.loads((out / INDEX).read_text())["weight_map"]
    assert names.keys() == {to_hf(name) for name in open_weights(base)}
    assert ("lm_head.weight" in names) == (sizes is TINY_MHA)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # for caplog
    caplog.clear()
    loaded, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not caplog.records
    assert not any(info.values()), info
    tokens = torch.arange(17).reshape(1, 17)
    assert torch.equal(hf_logits(loaded.eval(), tokens), hf_logits(model, tokens))
