"""loralib's files: written as its own layers load them, and read as they compute."""

import importlib.util
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.loralib import write_loralib
from phi3_plugin.checkpoint.peft import export_adapter
from phi3_plugin.config import read_config
from phi3_plugin.errors import AdapterError, OutputError
from tests.adapters import BASES, PARTS, WHOLE, adapter, base_folder, merged_logits, same
from tests.oracles import hf_logits

needs_loralib = pytest.mark.skipif(
    importlib.util.find_spec("loralib") is None,
    reason="loralib is not installed",
)
QKV = "model.layers.0.self_attn.qkv_proj"
FLAGS = [True, True, True, True, False, True]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: base_folder(name, tmp_path_factory.mktemp("base") / name) for name in BASES}


KINDS = {
    "whole": lambda config: adapter(config, WHOLE),
    "parts": lambda config: adapter(config, PARTS),
    "embedding": lambda config: adapter(config, (*PARTS, "tok_embeddings", "output")),
    "mixed": lambda config: adapter(config, PARTS, (4, 8, 2), (3.0, 1.5, 0.37)),
    "some-layers": lambda config: adapter(config, WHOLE, layers=(1,)),
    "bf16": lambda config: adapter(config, PARTS, (4, 2), dtype=torch.bfloat16),
    "rslora": lambda config: adapter(
        config, PARTS, (8,), (12 / 8**0.5,), origin={"rslora": True, "layout": "fused"}
    ),
}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("merged_linear", [False, True], ids=["linear", "merged"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["mini", "gqa"])
def test_it_comes_back_bit_for_bit(bases, base, kind, merged_linear, suffix, tmp_path):
    config, file = read_config(bases[base]), tmp_path / f"lora.{suffix}"
    made = KINDS[kind](config)
    write_loralib(file, made, config, merged_linear=merged_linear)
    again = read_adapter(file, config=config)
    assert same(again, made)
    assert again.origin == made.origin


def loralib_model(base, about, ranks):
    """Return transformers' model with loralib's layers, built with what the file says."""
    import loralib
    from transformers import Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = model.state_dict()
    for name, rank in ranks.items():
        old, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        alpha = about["alpha"] if not isinstance(about["alpha"], dict) else about["alpha"][name]
        keys, short = {"r": rank, "lora_alpha": alpha}, name.rpartition(".")[2]
        if isinstance(old, nn.Embedding):
            new = loralib.Embedding(old.num_embeddings, old.embedding_dim, **keys)
        elif short in about["enable_lora"]:
            keys.update(enable_lora=about["enable_lora"][short], bias=False)
            new = loralib.MergedLinear(old.in_features, old.out_features, **keys)
        else:
            new = loralib.Linear(old.in_features, old.out_features, bias=False, **keys)
        setattr(parent, short, new)
    model.load_state_dict(weights, strict=False)
    return model.train()


@needs_loralib
@pytest.mark.parametrize("merged_linear", [False, True], ids=["linear", "merged"])
@pytest.mark.parametrize("kind", ["whole", "parts", "embedding", "mixed"])
@pytest.mark.parametrize("base", ["mini", "gqa"])
def test_loralib_itself_computes_the_same(bases, base, kind, merged_linear, tmp_path):
    import loralib

    config, file = read_config(bases[base]), tmp_path / "lora.pt"
    made = KINDS[kind](config)
    write_loralib(file, made, config, merged_linear=merged_linear)
    state, about = torch.load(file), json.loads(file.with_suffix(".json").read_text())
    ranks = {n.removesuffix(".lora_B"): v.shape[1] for n, v in state.items() if n.endswith("_B")}
    model = loralib_model(bases[base], about, ranks)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if "lora_" in name]
    tokens = torch.randint(0, 150, (2, 17))
    ours = merged_logits(bases[base], made, config, tokens)
    torch.testing.assert_close(hf_logits(model, tokens), ours, rtol=0, atol=1e-5)

    given = loralib.lora_state_dict(model)
    assert given.keys() == state.keys()
    if isinstance(about["alpha"], dict):
        return
    torch.save(given, tmp_path / "theirs.pt")
    keys = {"alpha": about["alpha"], "enable_lora": about["enable_lora"] or None}
    read = read_adapter(tmp_path / "theirs.pt", config=config, **keys)
    again = merged_logits(bases[base], read, config, tokens)
    torch.testing.assert_close(again, ours, rtol=0, atol=1e-5)
    torch.save(model.eval().state_dict(), tmp_path / "all.pt")
    with pytest.raises(AdapterError, match=r"eval\(\) adds the adapter to them in place"):
        read_adapter(tmp_path / "all.pt", config=config, **keys)


def test_through_peft_and_back(bases, tmp_path):
    base = bases["gqa"]
    config, made = read_config(base), adapter(read_config(base), PARTS)
    write_loralib(tmp_path / "a.safetensors", made, config, merged_linear=True)
    read = read_adapter(tmp_path / "a.safetensors", config=config)
    (tmp_path / "peft").mkdir()
    export_adapter(tmp_path / "peft", read, checkpoint_dir=base, card={})
    write_loralib(
        tmp_path / "b.safetensors",
        read_adapter(tmp_path / "peft", config=config),
        config,
        merged_linear=True,
    )
    one, other = (load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_names_are_hugging_faces_and_alpha_is_in_the_metadata(bases, tmp_path):
    config = read_config(bases["gqa"])  # 8 query heads, 2 of keys: 6 groups
    file = tmp_path / "lora.safetensors"
    write_loralib(file, adapter(config, PARTS), config, merged_linear=True)
    with safe_open(file, framework="pt") as opened:
        about = json.loads(opened.metadata()["phi3_plugin"])
        assert opened.get_slice(f"{QKV}.lora_A").get_shape() == [5 * 4, 64]
        assert opened.get_slice(f"{QKV}.lora_B").get_shape() == [5 * 16, 4]
        assert len(opened.keys()) == 3 * 3 * 2
    assert about["alpha"] == 12
    assert about["enable_lora"]["qkv_proj"] == [True] * 4 + [False, True]
    assert about["enable_lora"]["gate_up_proj"] == [False, True]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "does not say its alpha"),
        ({"alpha": 0, "enable_lora": FLAGS}, "alpha: 0 for .* must be a number above 0"),
        ({"alpha": True, "enable_lora": FLAGS}, "alpha: True for"),
        ({"alpha": 12}, "as a MergedLinear of loralib has them. Give the enable_lora"),
        ({"alpha": 12, "enable_lora": [True, False, True]}, "are not those of 2 of 3 groups"),
        ({"alpha": 12, "enable_lora": [False] * 6}, "are not those of 0 of 6 groups"),
        ({"alpha": 12, "enable_lora": [True] * 5}, "are not those of 5 of 5"),
        ({"alpha": 12, "enable_lora": [1, 0, 1]}, r"enable_lora: 'qkv_proj': \[1, 0, 1\]"),
        ({"alpha": 12, "enable_lora": {"o_proj": [True]}}, "enable_lora: 'o_proj'"),
    ],
)
def test_what_does_not_fit_is_refused(bases, keys, message, tmp_path):
    config = read_config(bases["gqa"])
    made = adapter(config, ("attn.qkv_proj.q_proj", "attn.qkv_proj.v_proj"))
    write_loralib(tmp_path / "a.pt", made, config, merged_linear=True)
    (tmp_path / "a.json").unlink()
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path / "a.pt", config=config, **keys)


def test_groups_that_hold_rows_of_two_parts_are_refused(bases, tmp_path):
    config = read_config(bases["gqa"])  # 64 query rows, 16 of keys, 16 of values
    tensors = {f"{QKV}.lora_A": torch.ones(8, 64), f"{QKV}.lora_B": torch.ones(64, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=r"3 groups of attn.qkv_proj hold 32 rows each, but"):
        keys = {"alpha": 4, "enable_lora": [True, False, True]}
        read_adapter(tmp_path / "a.safetensors", config=config, **keys)


def test_groups_of_one_part_may_differ(bases, tmp_path):
    config = read_config(bases["gqa"])
    a, b = torch.randn(3 * 4, 64), torch.randn(3 * 16, 4)
    save_file({f"{QKV}.lora_A": a, f"{QKV}.lora_B": b}, tmp_path / "a.safetensors")
    flags = [True, False, True, False, False, True]  # two of the four groups of q
    read = read_adapter(tmp_path / "a.safetensors", config=config, alpha=8, enable_lora=flags)
    assert read.ranks == {
        "layers.0.attn.qkv_proj.q_proj": 8,
        "layers.0.attn.qkv_proj.v_proj": 4,
    }
    assert set(read.scales.values()) == {2.0}
    q = "layers.0.attn.qkv_proj.q_proj.lora_"
    delta = read.tensors[f"{q}b.weight"] @ read.tensors[f"{q}a.weight"]
    expected = torch.zeros(64, 64)
    expected[:16], expected[32:48] = b[:16] @ a[:4], b[16:32] @ a[4:8]
    torch.testing.assert_close(delta, expected)


@pytest.mark.parametrize("merged_linear", [False, True])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"dora": True}, "loralib has no DoRA"),
        ({"saved": {"output.weight": torch.ones(160, 64)}}, "output.weight: loralib's files hold"),
    ],
)
def test_what_loralib_does_not_have_is_refused(bases, more, message, merged_linear, tmp_path):
    config = read_config(bases["mini"])
    with pytest.raises(AdapterError, match=message):
        made = adapter(config, WHOLE, **more)
        write_loralib(tmp_path / "a.pt", made, config, merged_linear=merged_linear)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_stays(bases, tmp_path):
    config = read_config(bases["mini"])
    (tmp_path / "a.json").write_text("mine")
    with pytest.raises(OutputError, match=r"a\.json exists and would be overwritten"):
        write_loralib(tmp_path / "a.pt", adapter(config, WHOLE), config, merged_linear=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_given_alpha_counts_more_than_the_files(bases, tmp_path):
    config = read_config(bases["mini"])
    write_loralib(tmp_path / "a.pt", adapter(config, WHOLE), config, merged_linear=False)
    read = read_adapter(tmp_path / "a.pt", config=config, alpha=4)
    assert isinstance(read, Adapter)
    assert set(read.scales.values()) == {1.0}
