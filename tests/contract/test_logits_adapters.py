"""QLoRA, DoRA and LoRA on the head against PEFT, and what their state dicts hold."""

import itertools

import pytest
import torch

from phi3_plugin.checkpoint.base import load_base_weights, to_hf, to_peft
from phi3_plugin.errors import ConfigError
from phi3_plugin.models import lora_phi3, lora_phi3_mini, phi3_mini, qlora_phi3, qlora_phi3_mini
from phi3_plugin.models.lora_settings import TARGETS
from phi3_plugin.models.nf4 import is_nf4
from tests.oracles import MEDIUM_4K, MINI_4K, TINY_GQA, TINY_MHA, hf_model, save_checkpoint

NF4_SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
MHA = (MINI_4K, {**TINY_MHA, **NF4_SIZES})
GQA = (MEDIUM_4K, {**TINY_GQA, **NF4_SIZES})
ALL = list(TARGETS)


@pytest.fixture(scope="module", params=[MHA, GQA], ids=["mha", "gqa"])
def base(request, tmp_path_factory):
    published, sizes = request.param
    model = hf_model(published, **sizes)
    return model, save_checkpoint(model, published, tmp_path_factory.mktemp("b") / "base", **sizes)


def trained(folder, targets=ALL, **keys):
    """Return our model as after training: every adapter parameter random."""
    mlp = bool({"gate_up_proj", "down_proj"} & set(targets))
    model = lora_phi3(folder, targets, mlp, lora_rank=4, lora_alpha=12, **keys)
    model.load_state_dict(load_base_weights(folder), strict=False)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.05)  # at 0.1 PEFT itself is 1e-5 off fp64
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
            module.magnitude.data *= torch.rand_like(module.magnitude) + 0.5
        # as torchtune's recipes do
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name or "magnitude" in name)
    return model.eval()


def peft_twin(hf, model, targets, **keys):
    """Return PEFT's model with our adapter, over a base with our (dequantized) weights."""
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    hf, state = deepcopy(hf), model.state_dict()
    weights = {to_hf(n): v for n, v in state.items() if "lora" not in n and "magnit" not in n}
    hf.load_state_dict(weights)
    twin = get_peft_model(hf, LoraConfig(r=4, lora_alpha=12, target_modules=targets, **keys))
    adapter = {to_peft(n): v for n, v in state.items() if "lora" in n or "magnitude" in n}
    result = set_peft_model_state_dict(twin, adapter)
    assert not result.unexpected_keys
    return twin.eval()


@pytest.mark.parametrize(
    ("quantize", "dora", "head"),
    [case for case in itertools.product([False, True], repeat=3) if any(case)],
    ids=lambda on: "yes" if on else "no",
)
def test_logits_and_gradients_equal_peft(base, quantize, dora, head):
    hf, folder = base
    model = trained(folder, use_dora=dora, quantize_base=quantize, apply_lora_to_output=head)
    twin = peft_twin(hf, model, [*ALL, *(["lm_head"] if head else [])], use_dora=dora)
    batch = torch.randint(0, 150, (2, 17))
    ours, theirs = model(batch), twin(input_ids=batch, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for logits in (ours, theirs):
        logits.square().mean().backward()
    expected = {
        n.replace(".default", "").replace("vector.weight", "vector"): p.grad
        for n, p in twin.named_parameters()
        if p.requires_grad
    }
    grads = {to_peft(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 2e-5 * expected[name].norm(), name


def test_every_linear_layer_but_the_head_is_quantized(base):
    _, folder = base
    model = qlora_phi3(folder, ["o_proj"], lora_rank=4)
    stored = {name: is_nf4(p) for name, p in model.named_parameters() if "lora" not in name}
    linear = {n for n in stored if n.split(".")[-2] in TARGETS}
    assert {name for name, nf4 in stored.items() if nf4} == linear
    assert len(linear) == 2 * 4


def test_nf4_weights_are_quantized_whole_and_survive_a_round_trip(base):
    hf, folder = base
    model = trained(folder, quantize_base=True)
    weight = hf.state_dict()["model.layers.1.mlp.down_proj.weight"]
    state = model.state_dict()
    kept = state["layers.1.mlp.down_proj.weight"]
    assert not is_nf4(kept) and kept.dtype == torch.float32
    assert 0.01 < (kept - weight).norm() / weight.norm() < 0.15
    again = trained(folder, quantize_base=True)
    again.load_state_dict(state)
    batch = torch.randint(0, 150, (2, 9))
    with torch.no_grad():
        # Quantizing what was dequantized moves a weight by at most its scale's own rounding.
        torch.testing.assert_close(again(batch), model(batch), rtol=0, atol=0.05)


@pytest.mark.parametrize("dora", [False, True])
def test_torchtune_merges_our_state_dict(base, dora):
    from torchtune.modules.peft import get_merged_lora_ckpt

    from phi3_plugin.models import phi3

    _, folder = base
    model = trained(folder, use_dora=dora, quantize_base=True)
    merged = phi3(folder).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    merged.load_state_dict(get_merged_lora_ckpt(state, rank=4, alpha=12))
    batch = torch.randint(0, 150, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(merged(batch), model(batch), rtol=0, atol=1e-4)


@pytest.mark.parametrize("quantize", [False, True])
def test_a_new_dora_adapter_is_the_identity(base, quantize):
    _, folder = base
    model = lora_phi3(folder, ALL, True, use_dora=True, quantize_base=quantize)
    model.load_state_dict(load_base_weights(folder), strict=False)
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    plain = lora_phi3(folder, ALL, True, quantize_base=quantize)
    plain.load_state_dict(load_base_weights(folder), strict=False)
    batch = torch.randint(0, 150, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(batch), plain(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_to_empty_and_initialize_as_the_distributed_recipe_does(base, dora):
    _, folder = base
    with torch.device("meta"):
        model = lora_phi3(folder, ALL, True, use_dora=dora)
    layer = model.layers[0].mlp.down_proj
    layer.to_empty(device="cpu")
    layer.initialize_parameters()
    adapter = {name: p for name, p in layer.named_parameters() if name != "weight"}
    assert adapter.keys() == set(layer.adapter_params())
    assert all(p.device.type == "cpu" for p in adapter.values())
    assert layer.weight.is_meta
    assert not adapter["lora_b.weight"].any() and adapter["lora_a.weight"].any()


def test_a_size_that_nf4_cannot_store_is_refused(tmp_path):
    sizes = {**TINY_MHA, "hidden_size": 72, "num_attention_heads": 4}
    folder = save_checkpoint(hf_model(MINI_4K, **sizes), MINI_4K, tmp_path / "base", **sizes)
    with pytest.raises(ConfigError, match="216 x 72 weights cannot be stored in NF4"):
        qlora_phi3(folder, ["o_proj"])


def test_builders_without_a_folder_have_the_published_sizes():
    with torch.device("meta"):
        model = phi3_mini()
        adapted = lora_phi3_mini(ALL, True, lora_rank=16)
        quantized = qlora_phi3_mini(["qkv_proj"], lora_rank=16)
    assert sum(p.numel() for p in model.parameters()) == 3_821_079_552
    trainable = [p for n, p in adapted.named_parameters() if "lora" in n]
    assert sum(p.numel() for p in trainable) == 25_165_824
    assert is_nf4(quantized.layers[0].mlp.down_proj.weight)


def test_the_signature_is_torchtunes():
    import inspect

    from torchtune.models.phi3 import lora_phi3_mini as theirs

    ours = inspect.signature(lora_phi3_mini).parameters
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in inspect.signature(theirs).parameters.values()
    ]
