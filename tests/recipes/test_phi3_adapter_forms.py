"""Every form that an adapter is written in: read back it is the same adapter."""

import importlib.util
from copy import deepcopy

import pytest
import torch
from phi3_plugin.recipes.phi3_demo_checkpoint import build_checkpoint

from phi3_plugin.checkpoint.adapter import served
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError, ConfigError, OutputError
from tests.commands import adapter as run

FOUR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="llama.cpp's gguf package is not installed"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the demo's base, which has a tokenizer, a LoRA, and a DoRA of PEFT."""
    from peft import LoraConfig, get_peft_model

    from phi3_plugin.checkpoint.check import load_base_with_hf

    folder = tmp_path_factory.mktemp("forms")
    build_checkpoint(folder / "base", words=["one", "two"])
    hf = load_base_with_hf(folder / "base")
    for name, dora in (("lora", False), ("dora", True)):
        keys = {"r": 4, "lora_alpha": 8, "target_modules": FOUR, "task_type": "CAUSAL_LM"}
        model = get_peft_model(deepcopy(hf), LoraConfig(use_dora=dora, **keys))
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
    return folder


def convert(place, to, out, adapter="lora", **keys):
    base = {"checkpoint_dir": str(place / "base"), "output_dir": str(out)}
    return run({"verb": "convert", "adapter": str(place / adapter), "to": to, **base, **keys})


def no_norms(module):
    raise AssertionError(module)


def same(place, file):
    """Whether a file, read back, holds the LoRA bit for bit."""
    sizes = read_config(place / "base")
    lora, other = (
        served(read_adapter(path, config=sizes), sizes, no_norms, patterns=True)
        for path in (place / "lora", file)
    )
    assert lora.tensors.keys() == other.tensors.keys()
    assert (lora.ranks, lora.alphas) == (other.ranks, other.alphas)
    return all(torch.equal(lora.tensors[name], other.tensors[name]) for name in lora.tensors)


FILES = [
    ("peft", "out", {}),
    ("peft-patterns", "out", {}),
    ("torchtune", "out", {}),
    ("loralib", "out.pt", {}),
    ("loralib", "out.safetensors", {"merged_linear": True}),
]


@pytest.mark.parametrize(("to", "name", "keys"), FILES, ids=lambda value: str(value))
def test_what_is_written_is_the_same_adapter(place, tmp_path, to, name, keys):
    assert convert(place, to, tmp_path / name, **keys) == 0
    assert same(place, tmp_path / name)
    with pytest.raises(OutputError, match="exists"):
        convert(place, to, tmp_path / name, **keys)


@needs_gguf
def test_a_file_for_llama_cpp(place, tmp_path):
    import gguf

    assert convert(place, "gguf", tmp_path / "out.gguf") == 0
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["adapter.lora.alpha"].contents() == 8
    assert len(reader.tensors) == 2 * 4 * 4


def test_dora_for_llama_cpp_is_to_be_merged(place, tmp_path):
    with pytest.raises(AdapterError, match=r"it knows no DoRA\. Merge it into the base"):
        convert(place, "gguf", tmp_path / "out.gguf", "dora")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "name", "keys", "message"),
    [
        ("gguf", "out", {}, "must be a file that ends in .gguf"),
        ("loralib", "out.bin", {}, "must be a file that ends in .pt or .safetensors"),
        ("gguf", "no/such/out.gguf", {}, "is no folder"),
        ("peft", "out", {"enable_lora": "true,maybe"}, "maybe' must be a list of True and False"),
    ],
)
def test_what_is_refused(place, tmp_path, to, name, keys, message):
    with pytest.raises(ConfigError, match=message):
        convert(place, to, tmp_path / name, **keys)
    assert not list(tmp_path.iterdir())


def test_a_file_without_alpha_needs_it(place, tmp_path):
    from safetensors.torch import load_file, save_file

    convert(place, "loralib", tmp_path / "own.safetensors")
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(tmp_path / "own.safetensors"), bare)
    keys = {"verb": "import", "adapter": str(bare), "checkpoint_dir": str(place / "base")}
    with pytest.raises(AdapterError, match="alpha"):
        run({**keys, "output_dir": str(tmp_path / "out")})
    assert run({**keys, "output_dir": str(tmp_path / "out"), "alpha": 8.0}) == 0
    assert same(place, tmp_path / "out")


def test_onto_nf4_the_difference_is_stated(place, tmp_path, capsys):
    base = {"checkpoint_dir": str(place / "base"), "output_dir": str(tmp_path / "out")}
    assert run({"verb": "merge", "adapter": str(place / "lora"), "onto": "nf4", **base}) == 0
    assert "The quantized weights differ from the original ones by " in capsys.readouterr().out
