"""A note in the metadata is believed only where the file is what it would write."""

import base64
import json
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phi3_plugin.checkpoint import adapter as served
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.loralib import write_loralib
from phi3_plugin.checkpoint.peft import export_adapter, load_trained
from phi3_plugin.config import read_config
from tests.checkpoint.adapters import PARTS, adapter, base_folder, same

WEIGHTS = "adapter_model.safetensors"
MIXED = ("attn.qkv_proj.v_proj", "attn.qkv_proj.q_proj", "mlp.gate_up_proj", "attn.o_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder("gqa", tmp_path_factory.mktemp("base") / "gqa")


@pytest.fixture
def made(base):
    return adapter(read_config(base), PARTS, (4, 8), (3.0, 0.37))


@pytest.fixture
def folder(base, made, tmp_path):
    export_adapter(tmp_path, made, checkpoint_dir=base, card={})
    return tmp_path


def rewrite(folder, change):
    file = folder / WEIGHTS
    with safe_open(file, framework="pt") as opened:
        note = json.loads(opened.metadata()["phi3_plugin"])
    tensors = load_file(file)
    note = change(note, tensors)
    text = note if isinstance(note, str) else json.dumps(note)
    save_file(tensors, file, metadata={"phi3_plugin": text})


def first(note):
    return next(iter(note["modules"]))


def with_modules(note, **values):
    return {**note, "modules": {**note["modules"], first(note): values["value"]}}


def filled(tensors):
    """Give a B numbers for rows of k, which has no adapter."""
    name = next(n for n in tensors if n.endswith("qkv_proj.lora_B.weight"))
    tensors[name] = torch.ones_like(tensors[name])
    return True


BOMB = base64.b64encode(zlib.compress(bytes(50_000_000), 9)).decode()

CHANGES = {
    "no json": lambda note, _: "{",
    "deep json": lambda note, _: "[" * 100_000,
    "a list": lambda note, _: [],
    "modules no object": lambda note, _: {**note, "modules": [1]},
    "a foreign module": lambda note, _: {**note, "modules": {"../../etc/passwd": [4, 3.0]}},
    "a module too many": lambda note, _: {
        **note,
        "modules": {**note["modules"], "layers.2.mlp.down_proj": [4, 3.0]},
    },
    "no modules": lambda note, _: {**note, "modules": {}},
    "text for a rank": lambda note, _: with_modules(note, value=["4", 3.0]),
    "a huge rank": lambda note, _: with_modules(note, value=[10**12, 3.0]),
    "another rank": lambda note, _: with_modules(note, value=[3, 3.0]),
    "another scale": lambda note, _: with_modules(note, value=[4, 2.0]),
    "factor zero": lambda note, _: with_modules(note, value=[4, 3.0, 0.0]),
    "four numbers": lambda note, _: with_modules(note, value=[4, 3.0, 1.0, 1.0]),
    "NaN": lambda note, _: with_modules(note, value=[4, float("nan")]),
    "a bomb": lambda note, _: {**note, "rounded": dict.fromkeys(note["rounded"], BOMB)},
    "no base64": lambda note, _: {**note, "rounded": dict.fromkeys(note["rounded"], "\u00e4!")},
    "a number for text": lambda note, _: {**note, "rounded": dict.fromkeys(note["rounded"], 3)},
    "rows of k": lambda note, tensors: filled(tensors) and note,
}


def test_the_original_comes_back(base, made, folder):
    assert same(read_adapter(folder, config=read_config(base)), made)


@pytest.mark.parametrize("patterns", [False, True])
@pytest.mark.parametrize("scales", [(1.0, 2.0), (0.37, 1 / 3, 2.0, 1.0)])
def test_it_comes_back_from_one_form_after_the_other(base, scales, patterns, tmp_path):
    """Each form has an order of its own, in which two scales may be equally frequent."""
    config, made = read_config(base), adapter(read_config(base), MIXED, (4, 2), scales)
    read = made
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
        write_loralib(tmp_path / f"{name}.safetensors", read, config, merged_linear=True)
        read = read_adapter(tmp_path / f"{name}.safetensors", config=config)
        export_adapter(tmp_path / name, read, checkpoint_dir=base, card={}, patterns=patterns)
        read = read_adapter(tmp_path / name, config=config)
        assert same(read, made), name


@pytest.mark.parametrize("change", CHANGES)
def test_a_note_that_does_not_fit_is_left_aside(base, made, folder, change):
    rewrite(folder, CHANGES[change])
    read = read_adapter(folder, config=read_config(base))
    assert set(read.ranks.values()) == {12}  # those of q and v
    assert not any("qkv_proj." in module for module in read.scales)
    stored = load_file(folder / WEIGHTS)
    assert len(read.tensors) == len(stored)
    assert all(torch.isfinite(value).all() for value in read.tensors.values())


def test_a_note_that_no_header_holds_is_left_out(base, made, tmp_path, monkeypatch):
    monkeypatch.setattr(served, "NOTE_CHARACTERS", 10)
    export_adapter(tmp_path, made, checkpoint_dir=base, card={})
    again = load_trained(tmp_path, base)
    assert again.keys() == made.tensors.keys()
    for name, value in made.tensors.items():
        torch.testing.assert_close(again[name], value, rtol=2e-7, atol=0)
