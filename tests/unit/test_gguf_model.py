"""Models in GGUF are those of llama.cpp's own converter, and are written a weight at a time."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.base import open_weights, to_hf
from phi3_plugin.checkpoint.files import whole_files
from phi3_plugin.checkpoint.gguf_model import (
    _pieces,
    name_for_llama_cpp,
    q8_0,
    write_model,
)
from phi3_plugin.checkpoint.merge import merge_into
from phi3_plugin.errors import CheckpointError, OutputError, TokenizerError
from tests.assets import assets_dir
from tests.family import FILES, published, sizes
from tests.oracles import hf_model, save_checkpoint
from tests.variants import BUILT, backend, edit_json

gguf = pytest.importorskip("gguf", reason="llama.cpp's gguf package is not installed")

OF = {"mini": "mini-4k", "3.5": "3.5-mini", "phi4-mini": "phi-4-mini", "phi4": "phi-4"}
"""Built tokenizers, and the config.json of which a checkpoint with one is made."""


def checkpoint(folder, tokenizer="mini", variant=None, dtype=torch.bfloat16, **more):
    """A tiny checkpoint with a tokenizer that was built here."""
    BUILT[tokenizer](folder)
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    keys = published(variant or OF[tokenizer])
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1)
    small = {**sizes(variant or OF[tokenizer]), "vocab_size": vocab, **ends, **more}
    save_checkpoint(hf_model(keys, **small).to(dtype), keys, folder, **small)
    return folder


def convert(base, file, quantization="f16", change=lambda name, value: value):
    """Write a checkpoint as it is; return what llama.cpp will do otherwise."""
    weights = open_weights(base)
    shapes = {name: stored.shape for name, stored in weights.items()}
    return write_model(
        file, base, shapes, lambda name: change(name, weights[name][:]), quantization
    )


def read(file):
    reader = gguf.GGUFReader(file)
    return Keys(reader.fields), {tensor.name: tensor for tensor in reader.tensors}


class Keys(dict):
    """Fields, whose values are made when they are asked for: a vocabulary takes a second."""

    def __getitem__(self, key):
        return super().__getitem__(key).contents()


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("mini") / "base")


THEIRS = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.scale": "output_norm.weight",
    "output.weight": "output.weight",
    "layers.1.sa_norm.scale": "blk.1.attn_norm.weight",
    "layers.1.attn.qkv_proj.weight": "blk.1.attn_qkv.weight",
    "layers.1.attn.o_proj.weight": "blk.1.attn_output.weight",
    "layers.1.mlp_norm.scale": "blk.1.ffn_norm.weight",
    "layers.1.mlp.gate_up_proj.weight": "blk.1.ffn_up.weight",
    "layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
}
"""What llama.cpp loads of a Phi-3, layer by layer."""


@pytest.mark.parametrize(
    ("quantization", "number"), [("f16", 1), ("bf16", 32), ("q8_0", 7), ("q4_0", 2)]
)
def test_weights_are_those_of_the_packages_quantizers(mini, tmp_path, quantization, number):
    convert(mini, tmp_path / "m.gguf", quantization)
    keys, tensors = read(tmp_path / "m.gguf")
    assert keys["general.file_type"] == number
    weights = open_weights(mini)
    assert len(tensors) == len(weights)
    for name, theirs in THEIRS.items():
        value, tensor = weights[name][:], tensors[theirs]
        kind = gguf.GGMLQuantizationType[quantization.upper()]
        if name == "output.weight" and quantization == "q4_0":
            kind = gguf.GGMLQuantizationType.Q8_0
        if name.endswith("scale"):
            kind = gguf.GGMLQuantizationType.F32
        expected = gguf.quants.quantize(value.float().numpy(), kind)
        assert tensor.tensor_type == kind
        assert list(tensor.shape) == [*value.shape][::-1]
        assert tensor.data.tobytes() == expected.tobytes(), name


def test_q8_0_has_the_bytes_of_the_package():
    random = np.random.default_rng(0)
    rows = random.normal(size=(37, 320)).astype(np.float32)
    rows[3] = 0
    rows[5, :32] = 1e-12  # a scale that fp16 has not
    # The largest is 127, so that others are halves, which round away from zero
    halves = random.integers(-253, 254, size=(64, 320)).astype(np.float32) / 2
    halves[:, ::32] = 127 * np.sign(random.normal(size=(64, 10)))
    for given in (rows, halves, rows * 1e3, rows.astype(np.float16).astype(np.float32)):
        expected = gguf.quants.quantize(given, gguf.GGMLQuantizationType.Q8_0)
        assert (q8_0(given) == expected).all()


EXPECTED = {
    "general.architecture": "phi3",
    "general.type": "model",
    "phi3.context_length": 131072,
    "phi3.rope.scaling.original_context_length": 4096,
    "phi3.rope.dimension_count": 96,
    "phi3.rope.freq_base": 10000.0,
    "phi3.rope.scaling.attn_factor": pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5),
    "phi3.attention.sliding_window": 262144,
    "phi3.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
    "phi3.block_count": 2,
    "general.quantization_version": 2,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 32000,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 32000,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_eos_token": False,
}
"""Of Phi-3.5-mini, whatever its size."""


def with_published_tokenizer(folder, variant, **more):
    """A tiny checkpoint with the published tokenizer."""
    keys = published(variant)
    small = {**sizes(variant), **{key: keys[key] for key in keys if "_id" in key}, **more}
    small["vocab_size"] = keys["vocab_size"]
    save_checkpoint(hf_model(keys, **small).bfloat16(), keys, folder, **small)
    for file in (assets_dir() / "models" / FILES[variant]).iterdir():
        if file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copyfile(file, folder / file.name)
    return folder


@pytest.mark.assets
def test_keys_of_a_published_checkpoint(tmp_path):
    base = with_published_tokenizer(tmp_path / "base", "3.5-mini", hidden_size=192)
    assert convert(base, tmp_path / "m.gguf") == []
    keys, tensors = read(tmp_path / "m.gguf")
    assert {key: keys[key] for key in EXPECTED} == EXPECTED
    assert "phi-3" in keys["general.name"].lower()
    config = json.loads((base / "config.json").read_text())
    for name in ("long", "short"):
        tensor = tensors[f"rope_factors_{name}.weight"]
        factors = np.array(config["rope_scaling"][f"{name}_factor"], np.float32)
        assert tensor.tensor_type.name == "F32" and np.array_equal(tensor.data, factors)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    scores = keys["tokenizer.ggml.scores"]
    assert len(tokens) == len(types) == len(scores) == 32064
    of = gguf.TokenType
    for i, text, kind, score in (
        (0, "<unk>", of.CONTROL, -1000),
        (2, "</s>", of.USER_DEFINED, -1000),
        (13, "<0x0A>", of.BYTE, 0),
        (259, "▁▁", of.NORMAL, -1e9),
        (260, "▁t", of.NORMAL, -1),
        (32000, "<|endoftext|>", of.CONTROL, -1000),
        (32001, "<|assistant|>", of.CONTROL, -1000),
        (32007, "<|end|>", of.CONTROL, -1000),
        (32063, "[PAD32063]", of.UNUSED, -10000),
    ):
        assert (tokens[i], types[i], scores[i]) == (text, kind, score)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    assert keys["tokenizer.chat_template"] == settings["chat_template"]


@pytest.mark.assets
def test_scores_that_tokenizer_json_alone_gives_have_the_order_of_tokenizer_model(tmp_path):
    source = assets_dir() / "models" / FILES["mini-4k"]
    vocabulary = Tokenizer.from_file(str(source / "tokenizer.json"))
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    one, other = (
        dict(_pieces(gguf.TokenType, folder, vocabulary, model)) for folder in (source, tmp_path)
    )
    assert one.keys() == other.keys() == set(range(32000))
    assert all(piece.text == other[i].text for i, piece in one.items())
    merged = {"".join(pair.split(" ")): rank for rank, pair in enumerate(model["merges"])}
    pieces = [(piece.score, other[i].score) for i, piece in one.items() if piece.text in merged]
    spaces = [score for published, score in pieces if published == -1e9]  # merged last of all
    scored = [score for published, score in sorted(pieces) if published > -1e9]
    assert len({*scored}) > 25_000 and scored == sorted(scored)
    assert spaces and max(spaces) < scored[0]


def test_a_tied_head_is_not_there_twice(tmp_path):
    base = checkpoint(tmp_path / "base", "phi4-mini")
    remarks = convert(base, tmp_path / "m.gguf", "q4_0")
    keys, tensors = read(tmp_path / "m.gguf")
    assert "output.weight" not in tensors
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    assert keys["phi3.rope.dimension_count"] == 96
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "gpt-4o"
    assert keys["tokenizer.ggml.merges"][0] and "tokenizer.ggml.scores" not in keys
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    for text in ("<|end|>", "<|tool|>"):
        assert types[tokens.index(text)] == gguf.TokenType.CONTROL
    assert any("<|user|>" in remark for remark in remarks)


def test_rows_that_are_no_whole_blocks_stay_f16(tmp_path):
    base = checkpoint(tmp_path / "base", intermediate_size=248)
    convert(base, tmp_path / "m.gguf", "q8_0")
    _, tensors = read(tmp_path / "m.gguf")
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"


def test_llama_cpp_is_told_by_the_name_how_tokens_treat_white_space():
    strips, keeps = backend(rstrip=True), backend(rstrip=False)
    assert name_for_llama_cpp("my model", strips) == "my model (Phi-3)"
    assert name_for_llama_cpp("Phi 3 Mini", strips) == "Phi-3 Mini"
    assert name_for_llama_cpp("MyPhi3", strips) == "MyPhi3"
    assert name_for_llama_cpp("my-phi-3", keeps) == "my-Phi 3"
    assert name_for_llama_cpp("my model", keeps) == "my model"
    keeps.add_special_tokens([AddedToken("<|new|>", rstrip=True)])
    assert name_for_llama_cpp("my model", keeps) == "my model (Phi-3)"


def test_a_model_of_the_hub_has_its_name_there(mini, tmp_path):
    snapshot = shutil.copytree(mini, tmp_path / "models--some--Phi-3-thing/snapshots/0a67737cc")
    convert(snapshot, tmp_path / "m.gguf")
    assert read(tmp_path / "m.gguf")[0]["general.name"] == "Phi-3-thing"


def test_new_tokens_are_in_the_file(mini, tmp_path):
    """They take rows that the model has, or more."""
    config = json.loads((mini / "config.json").read_text())
    first, width = backend().get_vocab_size(), config["hidden_size"]
    tokens = range(first, config["vocab_size"] + 2)
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    entries = [{"id": i, "content": f"<|new {i}|>", "special": True, **flags} for i in tokens]
    values = {i: torch.full((width,), float(i % 100)) for i in tokens}
    rows = {"tok_embeddings": values, "output": values}
    adapter = Adapter({}, {}, rows=rows, new_tokens=entries)
    merge_into(tmp_path / "m.gguf", mini, adapter, gguf="f16")
    keys, tensors = read(tmp_path / "m.gguf")
    texts, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(texts) == len(types) == tokens.stop
    for name in ("token_embd.weight", "output.weight"):
        assert (tensors[name].data[first:] == np.array(tokens)[:, None] % 100).all()
    assert texts[first:] == [entry["content"] for entry in entries]
    assert {*types[first:]} == {gguf.TokenType.CONTROL}


@pytest.mark.parametrize("where", ["README.md", "generation_config.json"])
def test_a_broken_card_is_one_error(tmp_path, where):
    base = checkpoint(tmp_path / "base")
    text = "---\ntags: [\n---\n" if where == "README.md" else '{"top_k": "many"}'
    (base / where).write_text(text)
    with pytest.raises(CheckpointError, match=where):
        convert(base, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    base = checkpoint(tmp_path / "base", "phi4-mini")
    description = json.loads((base / "tokenizer.json").read_text())
    cutter = description["pre_tokenizer"]
    cutter["pretokenizers"][0]["pattern"] = {"Regex": r"\w+|\W"}
    edit_json(base / "tokenizer.json", pre_tokenizer=cutter)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json.*knows no tokenizer"):
        convert(base, tmp_path / "m.gguf")


@pytest.mark.parametrize("quantization", ["f16", "q8_0", "q4_0", "bf16"])
@pytest.mark.parametrize("value", [1e9, float("nan")])
def test_what_the_type_cannot_hold_is_named(mini, tmp_path, quantization, value):
    def change(name, weight):
        if name == "layers.1.mlp.down_proj.weight":
            weight[3, 5] = value
        return weight

    if (quantization, value) == ("bf16", 1e9):
        return
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        convert(mini, tmp_path / "m.gguf", quantization, change)
    assert not list(tmp_path.iterdir())


def test_a_weight_and_the_next_are_in_memory(mini, tmp_path):
    alive = weakref.WeakSet()

    def change(name, weight):
        assert len(alive) <= 2, name
        alive.add(weight)
        return weight

    convert(mini, tmp_path / "m.gguf", "q8_0", change)


def test_what_is_there_stays_and_a_full_disk_leaves_nothing(mini, tmp_path, monkeypatch):
    (tmp_path / "m.Modelfile").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        convert(mini, tmp_path / "m.gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(OutputError, match="Make room"):
        convert(mini, tmp_path / "other.gguf")
    monkeypatch.undo()

    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OutputError, match="No space left"):
        convert(mini, tmp_path / "other.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.Modelfile"]


def test_files_reach_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    with whole_files(tmp_path / "a") as (partial,):
        partial.write_text("x")
    assert (tmp_path / "a").stat().st_ino in synced


# llama.cpp's own converter, where it is: PHI3_LLAMA_CPP names a clone of llama.cpp

DRIVER = """
import runpy, sys
import conversion.base
pre = sys.argv.pop()  # told by a hash of ids, which a tiny vocabulary has not
if pre: conversion.base.TextModel.get_vocab_base_pre = lambda *_: pre
runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""


LLAMA_CPP = Path(os.environ.get("PHI3_LLAMA_CPP") or "nowhere")
needs_converter = pytest.mark.skipif(
    not (LLAMA_CPP / "convert_hf_to_gguf.py").is_file(),
    reason="PHI3_LLAMA_CPP names no clone of llama.cpp",
)


def theirs(folder, file, quantization, pre=""):
    words = [str(folder), "--outfile", str(file), "--outtype", quantization, pre]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *words], cwd=LLAMA_CPP, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return file.read_bytes()


def tuned(base):
    """A LoRA on every layer."""
    torch.manual_seed(0)
    tensors = {}
    for name, weight in open_weights(base).items():
        if to_hf(name).endswith("_proj.weight"):
            module, (out, inner) = name.removesuffix(".weight"), weight.shape
            tensors[f"{module}.lora_a.weight"] = 0.1 * torch.randn(4, inner)
            tensors[f"{module}.lora_b.weight"] = 0.1 * torch.randn(out, 4)
    return Adapter.of(tensors, 2.0)


@needs_converter
@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("variant", ["mini-4k", "mini-128k", "3.5-mini", "medium-4k"])
def test_the_file_is_that_of_the_converter(tmp_path, variant, quantization):
    base = with_published_tokenizer(tmp_path / "base", variant)
    folder, file = tmp_path / "my_model", tmp_path / "my_model.gguf"
    merge_into(folder, base, tuned(base))
    expected = theirs(folder, tmp_path / "theirs.gguf", quantization)
    merge_into(file, base, tuned(base), gguf=quantization)
    assert file.read_bytes() == expected


@needs_converter
@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["phi4-mini", "phi4"])
def test_the_file_of_a_byte_level_tokenizer_is_too(tmp_path, tokenizer):
    base = checkpoint(tmp_path / "base", tokenizer)
    edit_json(base / "tokenizer_config.json", add_bos_token=False, add_eos_token=False)
    folder, file = tmp_path / "my_model", tmp_path / "my_model.gguf"
    merge_into(folder, base, tuned(base))
    theirs(folder, tmp_path / "theirs.gguf", "q8_0", "gpt-4o")
    merge_into(file, base, tuned(base), gguf="q8_0")
    (one, tensors), (other, expected) = read(file), read(tmp_path / "theirs.gguf")
    assert [*one] == [*other] and all(one[key] == other[key] for key in one)
    assert {n: t.data.tobytes() for n, t in tensors.items()} == {
        n: t.data.tobytes() for n, t in expected.items()
    }
