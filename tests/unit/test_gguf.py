"""GGUF adapters are those of llama.cpp's own converter, read back with its own package."""

import importlib
import json
import math

import pytest
import torch

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.gguf import write_gguf
from phi3_plugin.errors import AdapterError, MissingFileError, OutputError
from tests.oracles import MEDIUM_4K, MINI_4K, TINY_GQA, TINY_MHA

R = 4
SHAPES = {
    "layers.{}.attn.qkv_proj": (96, 64),
    "layers.{}.attn.o_proj": (64, 64),
    "layers.{}.mlp.gate_up_proj": (192, 64),
    "layers.{}.mlp.down_proj": (64, 96),
}
THEIRS = {
    "attn.qkv_proj": "attn_qkv",
    "attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""What convert_lora_to_gguf.py calls them; it reorders and splits nothing of a Phi-3."""


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf", reason="llama.cpp's gguf package is not installed")


@pytest.fixture
def base(tmp_path):
    return write_config(tmp_path / "base", {**MEDIUM_4K, **TINY_GQA})


def write_config(folder, keys):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


def random_pair(module, out, inner, rank=R):
    a, b = torch.randn(rank, inner), torch.randn(out, rank)
    return {f"{module}.lora_a.weight": a, f"{module}.lora_b.weight": b}


def random_adapter(scale=3.0):
    torch.manual_seed(0)
    tensors = {}
    for layer in range(3):
        for name, (out, inner) in SHAPES.items():
            tensors |= random_pair(name.format(layer), out, inner)
    return Adapter.of(tensors, scale)


def read(gguf, file):
    reader = gguf.GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    types = {key: field.types[0].name for key, field in reader.fields.items()}
    return fields, types, {t.name: torch.tensor(t.data) for t in reader.tensors}


def changes(fields, tensors):
    """What llama.cpp adds to each weight: llama-adapter.h, get_scale; llama-graph.cpp."""
    names = {name.rpartition(".")[0] for name in tensors}
    out = {}
    for name in names:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        scale = fields["adapter.lora.alpha"] / b.shape[1]
        out[name] = scale * (a @ b.T if name == "token_embd.weight" else b @ a)
    return out


def test_names_values_and_metadata_are_the_converters(gguf, base, tmp_path):
    adapter = random_adapter()
    write_gguf(tmp_path / "a.gguf", adapter, base)
    fields, types, tensors = read(gguf, tmp_path / "a.gguf")
    expected = {
        "general.architecture": ("STRING", "phi3"),
        "general.type": ("STRING", "adapter"),
        "general.name": ("STRING", "a"),
        "adapter.type": ("STRING", "lora"),
        "adapter.lora.alpha": ("FLOAT32", 12.0),
        "general.quantization_version": ("UINT32", 2),
    }
    own = {key: (types[key], value) for key, value in fields.items() if not key.startswith("GGUF")}
    assert own == expected
    assert len(tensors) == len(adapter.tensors)
    for layer in range(3):
        for ours, theirs in THEIRS.items():
            for kind in "ab":
                value = tensors[f"blk.{layer}.{theirs}.weight.lora_{kind}"]
                own = adapter.tensors[f"layers.{layer}.{ours}.lora_{kind}.weight"]
                assert value.dtype == torch.float32
                assert torch.equal(value, own)


def test_embedding_and_head_of_a_base_that_does_not_tie_them(gguf, base, tmp_path):
    torch.manual_seed(1)
    tensors = random_pair("output", 160, 64) | random_pair("tok_embeddings", 64, 160)
    write_gguf(tmp_path / "a.gguf", Adapter.of(tensors, 2.0), base)
    fields, _, found = read(gguf, tmp_path / "a.gguf")
    assert fields["general.name"] == "a"
    assert torch.equal(found["token_embd.weight.lora_a"], tensors["tok_embeddings.lora_a.weight"].T)
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    assert shapes == {
        "output.weight.lora_a": (R, 64),
        "output.weight.lora_b": (160, R),
        "token_embd.weight.lora_a": (160, R),
        "token_embd.weight.lora_b": (64, R),
    }


def scaled(rank, scale):
    adapter, module = random_adapter(), "layers.1.mlp.down_proj"
    tensors = {**adapter.tensors, **random_pair(module, 64, 96, rank)}
    return Adapter(tensors, {**adapter.scales, module: scale})


CASES = {
    "rslora": lambda: random_adapter(12 / math.sqrt(R + 1)),
    "ranks": lambda: scaled(7, 12 / 7),
    "ranks and alphas": lambda: scaled(2, 0.3),
    "bf16": lambda: Adapter.of({n: v.bfloat16() for n, v in random_adapter().tensors.items()}, 3.0),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_adds_what_the_adapter_adds(gguf, base, tmp_path, case):
    adapter = CASES[case]()
    write_gguf(tmp_path / "a.gguf", adapter, base)
    fields, _, tensors = read(gguf, tmp_path / "a.gguf")
    assert fields["adapter.lora.alpha"] == int(fields["adapter.lora.alpha"]) > 0
    found = changes(fields, tensors)
    assert len(found) == 12
    for module, scale in adapter.scales.items():
        a, b = (adapter.tensors[f"{module}.lora_{x}.weight"].float() for x in "ab")
        _, layer, inner = module.split(".", 2)
        change = found[f"blk.{layer}.{THEIRS[inner]}.weight"]
        torch.testing.assert_close(change, scale * (b @ a), rtol=1e-5, atol=1e-5)


def test_parts_are_made_whole(gguf, tmp_path):
    base = write_config(tmp_path / "base", {**MINI_4K, **TINY_MHA})
    q, v = (f"layers.0.attn.qkv_proj.{part}" for part in ("q_proj", "v_proj"))
    tensors = random_pair(q, 64, 64) | random_pair(v, 64, 64)
    write_gguf(tmp_path / "a.gguf", Adapter.of(tensors, 2.0), base)
    fields, _, found = read(gguf, tmp_path / "a.gguf")
    change = changes(fields, found)["blk.0.attn_qkv.weight"]
    deltas = [2 * tensors[f"{p}.lora_b.weight"] @ tensors[f"{p}.lora_a.weight"] for p in (q, v)]
    expected = torch.cat([deltas[0], torch.zeros(64, 64), deltas[1]])
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-5)


REFUSED = {
    "dora": (
        {"layers.0.attn.o_proj.magnitude": torch.ones(64)},
        {},
        "knows no DoRA. Write a model",
    ),
    "saved": ({"output.weight": torch.ones(160, 64)}, {}, "output.weight: it replaces no whole"),
    "tied head": (
        random_pair("output", 160, 64),
        {"tie_word_embeddings": True},
        "output: in this base one tensor is embedding and head",
    ),
    "tied embedding": (
        random_pair("tok_embeddings", 64, 160),
        {"tie_word_embeddings": True},
        "tok_embeddings: in this base",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused(tmp_path, case):
    more, keys, message = REFUSED[case]
    base = write_config(tmp_path / "base", {**MEDIUM_4K, **TINY_GQA, **keys})
    adapter = Adapter.of({**random_adapter().tensors, **more}, 3.0)
    with pytest.raises(AdapterError, match=message):
        write_gguf(tmp_path / "a.gguf", adapter, base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_file_that_is_there_stays(gguf, base, tmp_path):
    file = tmp_path / "a.gguf"
    file.write_text("mine")
    with pytest.raises(OutputError, match="exists and would be overwritten"):
        write_gguf(file, random_adapter(), base)
    assert file.read_text() == "mine"


def test_nothing_is_left_of_a_file_that_could_not_be_written(gguf, base, tmp_path, monkeypatch):
    def full(self):
        raise OSError("disk full")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OutputError, match="disk full"):
        write_gguf(tmp_path / "out" / "a.gguf", random_adapter(), base)
    assert not list((tmp_path / "out").iterdir())


def test_without_the_package_the_message_says_what_to_install(base, tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingFileError, match=r"pip install 'phi3-plugin\[gguf\]'"):
        write_gguf(tmp_path / "a.gguf", random_adapter(), base)
    assert not (tmp_path / "a.gguf").exists()
