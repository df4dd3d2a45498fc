"""Base weights: what is wrong is named, all of it; equal weights have one hash."""

import json
import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from phi3_plugin.checkpoint import base as hashes
from phi3_plugin.checkpoint.base import (
    INDEX,
    base_hash,
    known_hash,
    load_base_weights,
    open_weights,
    other_base,
    refuse_other_base,
    stored_row_norms,
    to_hf,
    to_ours,
    write_weights,
)
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.loralib import write_loralib
from phi3_plugin.checkpoint.merge import merge_into
from phi3_plugin.checkpoint.peft import export_adapter
from phi3_plugin.checkpoint.torchtune import write_torchtune
from phi3_plugin.config import read_config
from phi3_plugin.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    MissingFileError,
    OutputError,
)
from tests.adapters import BASES, PARTS, WHOLE, adapter, base_folder, same
from tests.oracles import MINI_4K, TINY_MHA, hf_logits, hf_model, save_checkpoint
from tests.variants import edit_json


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


def save(folder, weights, shard_bytes=1 << 30):
    sizes = {name: value.nbytes for name, value in weights.items()}
    write_weights(folder, sizes, weights.__getitem__, shard_bytes)
    return len(shards(folder))


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
    assert torch.equal(stored_row_norms(folder, "layers.1.attn.qkv_proj"), weight.norm(dim=1))


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


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', '{"a":' + "[" * 10**4],
)
def test_a_broken_index(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{INDEX} (is not|must hold)"):
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


def test_shards_keep_to_their_size_and_the_index_finds_them(tmp_path):
    expected = {f"layers.{i}.sa_norm.scale": torch.full((10,), float(i)) for i in range(7)}
    assert save(tmp_path, expected, shard_bytes=85) == 4
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 7 * 40
    assert sorted(set(index["weight_map"].values())) == [
        f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)
    ]
    for name, value in expected.items():
        file = tmp_path / index["weight_map"][to_hf(name)]
        assert torch.equal(load_file(file)[to_hf(name)], value)
    (tmp_path / "large").mkdir()
    assert save(tmp_path / "large", dict(list(expected.items())[:2]), shard_bytes=8) == 2


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5))
    with pytest.raises(OutputError, match=r"has 0\.0 GB left, but the weights take"):
        save(tmp_path, {"norm.scale": torch.zeros(3)})
    assert not list(tmp_path.iterdir())


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
    save(out, load_base_weights(base), shard_bytes=50_000)
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


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: base_folder(name, tmp_path_factory.mktemp("base") / name) for name in BASES}


def copy(base, folder, change=lambda weights: weights, shard_bytes=1 << 30):
    """Write a base again, with other weights."""
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    save(folder, change({**load_base_weights(base)}), shard_bytes)
    return folder


def test_equal_weights_have_one_hash_in_any_dtype_and_any_shards(bases, tmp_path):
    bf16 = copy(bases["gqa"], tmp_path / "bf16", lambda w: {n: v.bfloat16() for n, v in w.items()})
    fp32 = copy(bf16, tmp_path / "fp32", lambda w: {n: v.float() for n, v in w.items()}, 50_000)
    assert len(list(fp32.glob("*.safetensors"))) > 3
    assert base_hash(bf16) == base_hash(fp32) != base_hash(bases["gqa"])
    assert len({base_hash(base) for base in bases.values()}) == len(bases)


def test_a_copy_of_a_tied_head_does_not_count(bases, tmp_path):
    with_head = shutil.copytree(bases["tied"], tmp_path / "head")
    for file in with_head.glob("*.safetensors*"):
        file.unlink()
    weights = dict(load_base_weights(bases["tied"]))
    save(with_head, {**weights, "output.weight": weights["tok_embeddings.weight"].clone()})
    assert base_hash(with_head) == base_hash(bases["tied"])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
def test_a_model_with_an_adapter_merged_into_one_part_is_another_base(bases, base, part, tmp_path):
    inner = f"{'mlp.gate_up_proj' if part in ('gate_proj', 'up_proj') else 'attn.qkv_proj'}.{part}"
    made = adapter(read_config(bases[base]), [inner], layers=[1])
    merge_into(tmp_path / "merged", bases[base], made)
    assert base_hash(tmp_path / "merged") != base_hash(bases[base])


def test_a_folder_that_is_written_again_is_read_again(bases, tmp_path, monkeypatch):
    folder = shutil.copytree(bases["mini"], tmp_path / "base")
    reads, own = [], hashes.open_weights
    monkeypatch.setattr(hashes, "open_weights", lambda base: reads.append(1) or own(base))
    for _ in range(3):
        base_hash(folder)
    assert len(reads) == 1
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file({n: v + 1 for n, v in load_file(file).items()}, file, metadata={"format": "pt"})
    base_hash(folder)
    assert len(reads) == 2


def test_links_are_followed_and_broken_ones_do_not_count(bases, tmp_path):
    for file in bases["mini"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "consolidated.safetensors").symlink_to(tmp_path / "gone")
    assert known_hash(tmp_path) == base_hash(bases["mini"])
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text("{")
    assert known_hash(tmp_path) == base_hash(bases["mini"])  # of the same files
    hashes._hash_of.cache_clear()
    assert known_hash(tmp_path) == ""


@pytest.mark.parametrize("form", ["peft", "patterns", "torchtune", "loralib"])
def test_every_form_says_for_which_base_it_is_and_comes_back(bases, form, tmp_path):
    base, config = bases["mini"], read_config(bases["mini"])
    made = adapter(config, PARTS, base_hash=base_hash(base))
    out = tmp_path / "out"
    if form == "torchtune":
        out.mkdir()
        write_torchtune(out / "adapter_model.pt", made, config)
    elif form == "loralib":
        write_loralib(out := tmp_path / "out.safetensors", made, config, merged_linear=True)
    else:
        out.mkdir()
        keys = {"checkpoint_dir": base, "card": {}, "patterns": form == "patterns"}
        export_adapter(out, replace(made, base_hash=""), **keys)
    again = read_adapter(out, config=config)
    assert same(again, made) and again.base_hash == made.base_hash and not again.origin


def test_what_the_adapter_says_itself_is_kept(bases, tmp_path):
    made = adapter(read_config(bases["mini"]), WHOLE, base_hash="rows4:abc")
    export_adapter(tmp_path, made, checkpoint_dir=bases["mini"], card={})
    assert read_adapter(tmp_path, config=read_config(bases["mini"])).base_hash == "rows4:abc"
    keys = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert "base_hash" not in keys  # only the metadata, which other programs do not read
    (tmp_path / "adapter_config.json").write_text(json.dumps({**keys, "lora_alpha": 99}), "utf-8")
    assert read_adapter(tmp_path, config=read_config(bases["mini"])).base_hash == "rows4:abc"


def test_a_base_without_weights_is_no_reason_not_to_save(bases, tmp_path):
    (tmp_path / "base").mkdir()
    shutil.copy(bases["mini"] / "config.json", tmp_path / "base")
    assert known_hash(tmp_path / "base") == ""
    with pytest.raises(MissingFileError):
        base_hash(tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    made = adapter(read_config(bases["mini"]), WHOLE)
    export_adapter(out, made, checkpoint_dir=tmp_path / "base", card={})
    assert read_adapter(out, config=read_config(bases["mini"])).base_hash == ""


def test_another_base_is_refused_and_an_unknown_one_is_not(bases):
    own, other = base_hash(bases["mini"]), base_hash(bases["gqa"])
    for unknown in ("", "some-later-kind:123", own):
        assert other_base(unknown, bases["mini"]) is None
        refuse_other_base(bases["mini"], unknown, "", bases["mini"])
    with pytest.raises(AdapterError) as refused:
        refuse_other_base(bases["mini"] / "a", other, "microsoft/Phi-3", bases["mini"])
    said = str(refused.value)
    for words in (other[6:18], own[6:18], str(bases["mini"]), "microsoft/Phi-3", "check_base"):
        assert words in said
    assert "\n" not in said


def test_norms_count_whole(bases, tmp_path):
    def change(weights):
        weights["layers.1.sa_norm.scale"] = weights["layers.1.sa_norm.scale"].clone()
        weights["layers.1.sa_norm.scale"][37] += 1e-3
        return weights

    assert base_hash(copy(bases["mini"], tmp_path / "b", change)) != base_hash(bases["mini"])


def test_a_base_that_cannot_be_read_is_not_another_one(bases, tmp_path):
    shutil.copy(bases["mini"] / "config.json", tmp_path)
    assert other_base(base_hash(bases["gqa"]), tmp_path) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 1000),
        ("num_hidden_layers", 1),
        ("vocab_size", 2_000_000),
        ("hidden_size", 128),
        ("intermediate_size", 1_000_000),
    ],
)
def test_sizes_that_the_weights_contradict_are_named_before_memory_is_taken(folder, key, value):
    edit_json(folder / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=rf"\n  {key}: {value}, but ") as error:
        open_weights(folder)
    assert len(str(error.value).splitlines()) < 210
