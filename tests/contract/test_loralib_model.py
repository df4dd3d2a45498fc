"""loralib's functions on our models, against the package itself where it is installed."""

import importlib.util
from copy import deepcopy

import pytest
import torch
from torch import nn

from phi3_plugin.checkpoint.base import load_base_weights, to_hf
from phi3_plugin.errors import AdapterError
from phi3_plugin.models import lora_phi3
from phi3_plugin.models import loralib as ours
from tests.oracles import (
    MEDIUM_4K,
    MINI_4K,
    TINY_GQA,
    TINY_MHA,
    hf_logits,
    hf_model,
    save_checkpoint,
)

needs_loralib = pytest.mark.skipif(
    importlib.util.find_spec("loralib") is None,
    reason="loralib is not installed",
)
FOUR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
PARTS = ["q_proj", "v_proj", "up_proj"]
TARGETS = {
    "fused": {"lora_attn_modules": FOUR},
    "parts": {"lora_attn_modules": PARTS},
    "k and v": {"lora_attn_modules": ["k_proj", "v_proj", "o_proj"], "apply_lora_to_mlp": False},
    "head": {"lora_attn_modules": FOUR, "apply_lora_to_output": True},
    "embedding": {"lora_attn_modules": FOUR, "apply_lora_to_embedding": True},
}
BASES = {"mha": (MINI_4K, TINY_MHA), "gqa": (MEDIUM_4K, TINY_GQA)}


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory):
    published, sizes = BASES[request.param]
    model = hf_model(published, **sizes)
    return model, save_checkpoint(model, published, tmp_path_factory.mktemp("l") / "base", **sizes)


def trained(folder, seed=1, **keys):
    """Return one of our models with random adapters."""
    keys = {"apply_lora_to_mlp": True, "lora_rank": 4, "lora_alpha": 12, **keys}
    model = lora_phi3(folder, **keys)
    model.load_state_dict(load_base_weights(folder), strict=False)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def built_by_loralib(hf, model):
    """Return transformers' model with loralib's layers in the places that `layers` names."""
    import loralib

    twin = deepcopy(hf)
    for name, layer in ours.layers(model).items():
        old = twin.get_submodule(name)
        keys = {"r": layer.r, "lora_alpha": layer.lora_alpha}
        if layer.kind == "MergedLinear":
            keys["enable_lora"] = list(layer.enable_lora)
        if layer.kind == "Embedding":
            new = loralib.Embedding(old.num_embeddings, old.embedding_dim, **keys)
        else:
            kind = getattr(loralib, layer.kind)
            new = kind(old.in_features, old.out_features, bias=False, **keys)
        new.load_state_dict(old.state_dict(), strict=False)
        twin.set_submodule(name, new)
    return twin


@needs_loralib
@pytest.mark.parametrize("targets", TARGETS)
def test_a_model_of_loralib_computes_the_same_and_gives_it_back(base, targets):
    import loralib

    hf, folder = base
    model = trained(folder, **TARGETS[targets])
    twin = built_by_loralib(hf, model).train()
    result = twin.load_state_dict(ours.lora_state_dict(model), strict=False)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    batch = torch.randint(0, 150, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(model(batch), hf_logits(twin, batch), rtol=0, atol=1e-5)
    again = trained(folder, seed=2, **TARGETS[targets])
    ours.load_lora_state_dict(again, loralib.lora_state_dict(twin))
    for name, value in model.named_parameters():
        assert torch.equal(value, again.get_parameter(name)), name


@needs_loralib
@pytest.mark.parametrize("bias", ours.BIASES)
def test_the_same_is_trained_and_kept_on_layers_with_biases(bias):
    import loralib

    def model():
        return nn.Sequential(loralib.Linear(4, 6, r=2), nn.Linear(6, 3), nn.LayerNorm(3))

    one, other = model(), model()
    loralib.mark_only_lora_as_trainable(one, bias)
    ours.mark_only_lora_as_trainable(other, bias)
    expected = {name: parameter.requires_grad for name, parameter in one.named_parameters()}
    assert {name: p.requires_grad for name, p in other.named_parameters()} == expected


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("bias", ours.BIASES)
def test_only_adapters_are_trained(base, targets, bias):
    model = trained(base[1], **TARGETS[targets])
    ours.mark_only_lora_as_trainable(model, bias=bias)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name


@pytest.mark.parametrize("targets", TARGETS)
def test_state_dicts_go_around_bit_for_bit(base, targets):
    folder = base[1]
    model, again = (trained(folder, seed, **TARGETS[targets]) for seed in (1, 2))
    ours.load_lora_state_dict(again, ours.lora_state_dict(model, bias="all"))
    for name, value in model.named_parameters():
        assert torch.equal(value, again.get_parameter(name)), name


def test_names_are_those_of_hugging_face(base):
    model = trained(base[1], **TARGETS["embedding"], apply_lora_to_output=True)
    modules = {name.rpartition(".lora_")[0] for name in ours.lora_state_dict(model)}
    own = {name.rpartition(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert modules == {to_hf(f"{name}.weight").removesuffix(".weight") for name in own}
    assert len(modules) == 3 * 4 + 2


def test_parts_of_unequal_size_share_finer_groups(base):
    hf, folder = base
    model = trained(folder, **TARGETS["parts"])
    per_key = hf.config.num_attention_heads // hf.config.num_key_value_heads
    layer = ours.layers(model)["model.layers.0.self_attn.qkv_proj"]
    assert layer.enable_lora == (*[True] * per_key, False, True)
    state, module = ours.lora_state_dict(model), model.layers[0].attn.qkv_proj
    a = state["model.layers.0.self_attn.qkv_proj.lora_A"]
    assert a.shape == ((per_key + 1) * 4, 64)
    assert all(torch.equal(part, module.q_proj.lora_a.weight) for part in a.split(4)[:per_key])
    b = state["model.layers.0.self_attn.qkv_proj.lora_B"]
    assert torch.equal(b, torch.cat([module.q_proj.lora_b.weight, module.v_proj.lora_b.weight]))


def test_groups_of_one_part_must_agree(tmp_path):
    published, sizes = BASES["gqa"]
    folder = save_checkpoint(hf_model(published, **sizes), published, tmp_path / "base", **sizes)
    model = trained(folder, **TARGETS["parts"])
    state = {name: value.clone() for name, value in ours.lora_state_dict(model).items()}
    state["model.layers.2.self_attn.qkv_proj.lora_A"][0] += 1
    before = deepcopy(model.state_dict())
    with pytest.raises(AdapterError, match=r"layers\.2.*the groups of q_proj differ"):
        ours.load_lora_state_dict(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_all_that_does_not_fit_is_listed(base):
    model = trained(base[1], **TARGETS["fused"])
    state = ours.lora_state_dict(model)
    name = "model.layers.0.self_attn.o_proj.lora_A"
    del state[name.replace("0", "1")]
    state[name] = torch.zeros(8, 64)
    state |= {"lm_head.weight": torch.zeros(1), "model.norm.bias": torch.zeros(1)}
    with pytest.raises(AdapterError) as error:
        ours.load_lora_state_dict(model, state)
    assert str(error.value).splitlines()[1:] == [
        "  missing: model.layers.1.self_attn.o_proj.lora_A",
        "  unexpected: lm_head.weight, not an adapter",
        "  unexpected: model.norm.bias, a bias, which a Phi-3 has not",
        f"  wrong shape: {name} is [8, 64], the model's [4, 64]",
    ]


@pytest.mark.parametrize("targets", ["fused", "parts"])
def test_values_that_are_no_weights_are_refused(base, targets):
    model = trained(base[1], **TARGETS[targets])
    state = ours.lora_state_dict(model)
    name, before = next(iter(state)), deepcopy(model.state_dict())
    for wrong, match in (
        (torch.full_like(state[name], float("nan")), "not finite"),
        (torch.ones_like(state[name], dtype=torch.complex64), "not a tensor of floats"),
        (None, "not a tensor of floats"),
    ):
        with pytest.raises(AdapterError, match=f"{match}: {name}"):
            ours.load_lora_state_dict(model, {**state, name: wrong})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_loralib_does_not_have_is_refused(base):
    with pytest.raises(AdapterError, match="has no convolution"):
        ours.Conv2d(3, 4, kernel_size=3, r=2)
    with pytest.raises(AdapterError, match="loralib has no DoRA"):
        ours.lora_state_dict(trained(base[1], **TARGETS["fused"], use_dora=True))
    with pytest.raises(AdapterError, match="bias: 'some' must be one of none, all, lora_only"):
        ours.mark_only_lora_as_trainable(nn.Linear(1, 1), bias="some")


def test_what_a_state_dict_would_leave_out_is_refused(base):
    model = trained(base[1], **TARGETS["fused"], modules_to_save=["lm_head"])
    for refused in (ours.lora_state_dict, ours.layers):
        with pytest.raises(AdapterError, match="output is trained whole, but a file of loralib"):
            refused(model)
    ours.mark_only_lora_as_trainable(model)
    assert not any("output" in name for name in ours.lora_state_dict(model))
    with pytest.raises(AdapterError, match="has no adapters of this package"):
        ours.lora_state_dict(nn.Linear(2, 2))


def test_parts_of_other_ranks_are_refused(base):
    model = trained(base[1], **TARGETS["parts"], rank_pattern={"v_proj": 2})
    with pytest.raises(AdapterError, match=r"qkv_proj: its parts have ranks or scales that differ"):
        ours.lora_state_dict(model)


@needs_loralib
def test_a_convolution_of_loralib_is_refused():
    import loralib

    model = nn.Sequential(loralib.Conv2d(3, 4, kernel_size=3, r=2))
    with pytest.raises(AdapterError, match="has no convolution"):
        ours.mark_only_lora_as_trainable(model)
