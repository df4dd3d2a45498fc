"""Loading for use: the logits of transformers and PEFT, over plain and NF4 bases."""

import shutil
from dataclasses import replace
from inspect import signature

import pytest
import torch
from phi3_plugin.recipes.phi3_demo_checkpoint import build_checkpoint
from safetensors.torch import load_file, save_file

from phi3_plugin import load as phi3_load
from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.base import load_base_weights
from phi3_plugin.checkpoint.loralib import write_loralib
from phi3_plugin.checkpoint.peft import export_adapter
from phi3_plugin.checkpoint.torchtune import write_torchtune
from phi3_plugin.config import read_config
from phi3_plugin.data.turns import make_turn
from phi3_plugin.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    MissingFileError,
    Phi3Error,
)
from phi3_plugin.load import load, load_model
from phi3_plugin.models import phi3
from phi3_plugin.models.cache import serve
from phi3_plugin.models.nf4 import is_nf4, nearest_nf4
from phi3_plugin.proof import load_with_peft
from tests.adapters import BASES, PARTS, WHOLE, adapter, base_folder, merged_logits
from tests.oracles import MEDIUM_4K, MINI_4K, TINY_GQA, TINY_MHA, hf_logits, hf_model
from tests.oracles import save_checkpoint as save

TOKENS = torch.randint(0, 150, (2, 17), generator=torch.Generator().manual_seed(5))
WIDE = {**TINY_MHA, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
"""NF4 can store it."""
FP32 = {"dtype": "fp32", "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Bases, and a few adapters of each format for the one with grouped queries."""
    folder = tmp_path_factory.mktemp("load")
    for name in BASES:
        base_folder(name, folder / name)
    save(hf_model(MINI_4K, **WIDE), MINI_4K, folder / "wide", **WIDE)
    base, sizes = folder / "gqa", read_config(folder / "gqa")
    for name, inner in (("whole", WHOLE), ("parts", PARTS)):
        written(base, adapter(sizes, inner), folder / name)
    wide = adapter(read_config(folder / "wide"), WHOLE, layers=range(2))
    written(folder / "wide", wide, folder / "for-wide")
    (folder / "tune").mkdir()
    write_torchtune(folder / "tune" / "adapter_model.pt", adapter(sizes, WHOLE), sizes)
    write_loralib(folder / "lib.safetensors", adapter(sizes, WHOLE), sizes, merged_linear=True)
    return folder


def written(base, made, folder):
    folder.mkdir()
    export_adapter(folder, made, checkpoint_dir=base, card={})
    return folder


def logits(model, tokens=TOKENS):
    with torch.inference_mode():
        return model(tokens)


def test_the_tokenizer_of_the_base_comes_with_the_model(tmp_path):
    build_checkpoint(tmp_path, words=["one", "two"])
    model, tokenizer = load(tmp_path, **FP32)
    (chat,) = tokenizer.tokenize_chats([[make_turn("user", "one")]], add_generation_prompt=True)
    vocabulary = read_config(tmp_path).vocab_size
    assert logits(model, torch.tensor([chat.ids.tolist()])).shape == (1, len(chat.ids), vocabulary)
    assert signature(load).parameters == signature(load_model).parameters


@pytest.mark.parametrize("base", BASES)
def test_the_base_alone_computes_what_transformers_does(place, base):
    published, sizes = BASES[base]
    model = load_model(place / base, **FP32)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    expected = hf_logits(hf_model(published, **sizes), TOKENS)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["whole", "parts", "dora", "saved", "mixed"])
def test_an_adapter_computes_what_its_formula_says(place, kind, tmp_path):
    config = read_config(place / "gqa")
    made = {
        "whole": lambda: adapter(config, WHOLE),
        "parts": lambda: adapter(config, PARTS),
        "dora": lambda: adapter(config, WHOLE, dora=True),
        "saved": lambda: adapter(
            config, (*WHOLE, "tok_embeddings"), saved={"output.weight": torch.randn(160, 64)}
        ),
        "mixed": lambda: adapter(config, WHOLE, (4, 2), (3.0, 0.4), layers=(0, 2)),
    }[kind]()
    model = load_model(place / "gqa", written(place / "gqa", made, tmp_path / "out"), **FP32)
    expected = merged_logits(place / "gqa", made, config, TOKENS)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["lib.safetensors", "tune/adapter_model.pt"])
def test_adapters_of_other_programs(place, name):
    expected = logits(load_model(place / "gqa", place / "whole", **FP32))
    found = logits(load_model(place / "gqa", place / name, **FP32))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_it_computes_what_peft_does(place):
    peft = load_with_peft(place / "gqa", place / "parts")
    found = logits(load_model(str(place / "gqa"), str(place / "parts"), **FP32))
    torch.testing.assert_close(found, hf_logits(peft, TOKENS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_an_nf4_base_holds_what_qlora_trains_over(place, adapted, tmp_path):
    nf4 = phi3(place / "wide")
    weights = load_base_weights(place / "wide")
    nf4.load_state_dict({n: nearest_nf4(v) if "_proj" in n else v for n, v in weights.items()})
    expected = logits(nf4.eval())
    keys = {}
    if adapted:  # an adapter that does nothing
        made = adapter(read_config(place / "wide"), WHOLE, layers=range(2))
        nothing = {n: v * 0 if "lora_b" in n else v for n, v in made.tensors.items()}
        keys = {"adapter": written(place / "wide", Adapter(nothing, made.scales), tmp_path / "a")}
    model = load_model(place / "wide", **FP32, quantize=True, **keys)
    assert sum(is_nf4(p) for p in model.parameters()) == 8
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def test_bf16_is_in_bf16_and_the_tables_are_not(place):
    model = load_model(place / "gqa", place / "whole", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {table.dtype for table in model.buffers()} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32
    expected = logits(load_model(place / "gqa", place / "whole", **FP32))
    assert (logits(model).float() - expected).norm() < 2e-2 * expected.norm()


def test_a_base_is_shared_and_stays_as_it_is(place):
    base = load_model(place / "gqa", **FP32)
    before = logits(base)
    both = load_model(place / "gqa", place / "parts", **FP32, sharing=base)
    alone = load_model(place / "gqa", place / "parts", **FP32)
    theirs, ours = dict(base.named_parameters()), dict(both.named_parameters())
    assert all(ours[name] is value for name, value in theirs.items())
    assert torch.equal(logits(both), logits(alone))
    assert torch.equal(logits(base), before)


def test_what_an_adapter_replaces_is_not_shared(place, tmp_path):
    config = read_config(place / "gqa")
    made = adapter(config, WHOLE, saved={"output.weight": torch.randn(160, 64)})
    folder = written(place / "gqa", made, tmp_path / "out")
    base = load_model(place / "gqa", **FP32)
    both = load_model(place / "gqa", folder, **FP32, sharing=base)
    assert torch.equal(both.output.weight, made.saved["output.weight"])
    assert not torch.equal(base.output.weight, both.output.weight)


def test_only_the_same_kind_of_base_is_shared(place):
    base = load_model(place / "wide", **FP32)
    adapted = load_model(place / "gqa", place / "whole", **FP32)
    with pytest.raises(ConfigError, match="another dtype or quantize"):
        load_model(place / "wide", device="cpu", sharing=base)
    with pytest.raises(ConfigError, match="another dtype or quantize"):
        load_model(place / "wide", **FP32, quantize=True, sharing=base)
    with pytest.raises(ConfigError, match="the model has an adapter"):
        load_model(place / "gqa", **FP32, sharing=adapted)


def test_only_the_same_base_is_shared_and_before_it_is_served(place, tmp_path):
    base, other = load_model(place / "gqa", **FP32), other_weights(place, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"sharing: the model is of .*gqa, but this is .*other"):
        load_model(other, **FP32, sharing=base)
    with pytest.raises(ConfigError, match=r"sharing: the model is of None"):
        load_model(other, **FP32, sharing=torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="or elsewhere"):
        load_model(place / "gqa", **FP32, sharing=load_model(place / "gqa", **FP32).to("meta"))
    serve(base)
    with pytest.raises(ConfigError, match=r"made ready by serve\(\)"):
        load_model(place / "gqa", place / "whole", **FP32, sharing=base)


@pytest.mark.parametrize("rank", [0, 2])
def test_each_process_of_a_machine_has_its_own_gpu(place, monkeypatch, rank):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)
    devices = []
    monkeypatch.setattr(phi3_load, "fill", lambda model, values, device: devices.append(device))
    load_model(place / "gqa")
    assert devices == [torch.device("cuda", rank)]


def other_weights(place, folder):
    """Write a base of the same shapes."""
    return save(hf_model(MEDIUM_4K, seed=1, **TINY_GQA), MEDIUM_4K, folder, **TINY_GQA)


def test_an_adapter_for_another_base_is_refused_unless_it_is_asked_for(place, tmp_path):
    other = other_weights(place, tmp_path / "other")
    with pytest.raises(AdapterError, match=r"made for other weights than those of .*other"):
        load_model(other, place / "whole", **FP32)
    load_model(other, place / "whole", **FP32, check_base=False)
    file = tmp_path / "old" / "adapter_model.safetensors"
    shutil.copytree(place / "whole", file.parent)
    save_file(load_file(file), file, metadata={"format": "pt"})  # PEFT's own, or an older one
    load_model(other, file.parent, **FP32)


def test_an_adapter_of_loftq_needs_the_base_in_nf4(place, tmp_path):
    made = adapter(read_config(place / "wide"), WHOLE, layers=range(2))
    loftq = replace(made, origin={"lora_init": "loftq"})
    folder = written(place / "wide", loftq, tmp_path / "loftq")
    with pytest.raises(AdapterError, match=r"belongs to the base in NF4.*quantize=True"):
        load_model(place / "wide", folder, **FP32)
    load_model(place / "wide", folder, **FP32, quantize=True)


def test_what_no_keys_say_is_to_be_merged(place, tmp_path):
    made = adapter(read_config(place / "gqa"), WHOLE)
    some = {n: v for n, v in made.tensors.items() if not n.startswith("layers.1.mlp.down_proj")}
    left = Adapter(some, {m: made.scales[m] for m in made.ranks if f"{m}.lora_a.weight" in some})
    with pytest.raises(AdapterError, match="`phi3-tune adapter merge` makes a checkpoint of"):
        load_model(place / "gqa", written(place / "gqa", left, tmp_path / "odd"), **FP32)


@pytest.mark.parametrize(
    ("base", "adapter", "keys", "kind", "message"),
    [
        ("none", None, {}, MissingFileError, "none is not a folder"),
        ("whole", None, {}, MissingFileError, "whole is the folder of an adapter"),
        ("empty", None, {}, MissingFileError, "has neither model.safetensors"),
        ("cut", None, {}, CheckpointError, "damaged or cut short"),
        ("gqa", "none", {}, MissingFileError, "none"),
        ("gqa", "mini", {}, MissingFileError, "it is not an adapter folder"),
        ("gqa", "for-wide", {}, AdapterError, "is not an adapter of this base"),
        ("mini", "for-wide", {}, AdapterError, "is not an adapter of this base"),
        ("gqa", None, {"dtype": "fp8"}, ConfigError, "'fp8' must be one of bf16, fp16, fp32"),
        ("gqa", None, {"device": "tpu"}, ConfigError, "'tpu' must be one of 'cpu', 'cuda', 'xpu'"),
        ("gqa", None, {"quantize": True}, ConfigError, "cannot be stored in NF4"),
    ],
)
def test_mistakes_are_told(place, base, adapter, keys, kind, message):
    for name in ("empty", "cut"):
        (place / name).mkdir(exist_ok=True)
        shutil.copy(place / "gqa" / "config.json", place / name)
    (place / "cut" / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(kind, match=message) as told:
        load_model(place / base, adapter and place / adapter, **{**FP32, **keys})
    assert isinstance(told.value, Phi3Error)
